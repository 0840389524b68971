//! What everything else may name: the clock, the limit of open files.

mod clock;
mod open_files;

pub use clock::{Clock, Millis, unix_millis};
pub use open_files::raise_open_files;
