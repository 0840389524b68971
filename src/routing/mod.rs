//! Who may be chosen, and the choice. Pure: what decides is given, time and chance included.

mod candidates;
mod policies;
mod prefix;
mod router;
mod settings;

pub use crate::vllm::Usage;
pub use candidates::{Candidates, Tried};
pub use policies::{Definition, Needs, Outcome, POLICIES, Policy, RouteInput, Selection, Shared};
pub use prefix::{PrefixIndex, Prompt, TokenRates};
pub use router::Router;
pub use settings::{PolicyName, Settings};
