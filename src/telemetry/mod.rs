//! What the process tells about itself.

pub mod log;
pub mod metrics;
mod shortage;

pub use shortage::{QUIET_MS, Resource, Shortages};
