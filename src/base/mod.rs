//! What everything else may name: pauses, the clock, the calendar, the limit of open files.

mod backoff;
mod clock;
mod date;
mod open_files;

pub use backoff::Backoff;
pub use clock::{Clock, Millis, unix_millis};
pub use date::Date;
pub use open_files::raise_open_files;
