//! What the process tells about itself.

pub mod log;
pub mod metrics;
