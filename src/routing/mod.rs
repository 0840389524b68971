//! Who may be chosen, and the choice. Pure: what decides is given, time and chance included.

mod candidates;
mod journal;
mod policies;
mod prefix;
mod router;
mod session;
mod settings;

pub use crate::vllm::Usage;
pub use candidates::{Candidates, Terms, Tried};
pub use journal::{Density, Event, Journal, Sparse};
pub use policies::{Definition, Needs, Outcome, POLICIES, Policy, RouteInput, Score, Selection, Shared};
pub use prefix::{
    CHUNK_BITS, CHUNK_BYTES, CacheSizes, MAX_CHUNKS, MAX_SEATS, Partings, PrefixIndex, Prompt, STRIDE,
    TokenRates,
};
pub use router::Router;
pub use session::SessionKeys;
pub use settings::{ModelPolicy, PolicyName, Settings};
