//! Who may be chosen, and the choice. Pure: what decides is given, time and chance included.

mod candidates;
mod policies;
mod prefix;
mod settings;

pub use candidates::{Candidates, Tried};
pub use policies::{Definition, Needs, Outcome, POLICIES, Policy, RouteInput, Selection, Shared, Usage};
pub use prefix::{CHUNK_BYTES, MAX_CHUNKS, MAX_SEATS, PrefixIndex, Prompt, TokenRates};
pub use settings::{PolicyName, Settings};
