//! Who may be chosen, and the choice. Pure: what decides is given, time and chance included.

mod candidates;
mod policies;
mod prefix;
mod router;
mod session;
mod settings;

pub use candidates::{Candidates, Tried};
pub use policies::{Definition, Needs, Outcome, POLICIES, Policy, RouteInput, Selection, Shared, Usage};
pub use prefix::Prompt;
pub use router::Router;
pub use session::SessionKeys;
pub use settings::{ModelPolicy, PolicyName, Settings};
