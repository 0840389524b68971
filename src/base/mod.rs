//! What everything else may name: the clock and the calendar.

mod clock;
mod date;

pub use clock::{Clock, Millis};
pub use date::Date;
