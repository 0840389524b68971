//! What everything else may name: the clock.

mod clock;

pub use clock::{Clock, Millis, unix_millis};
