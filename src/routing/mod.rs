//! Who may be chosen, and the choice. Pure: what decides is given, time and chance included.

mod candidates;
mod policies;
mod settings;

pub use candidates::{Candidates, Tried};
pub use policies::{Definition, POLICIES, Policy, RouteInput, Selection};
pub use settings::{PolicyName, Settings};
