//! Sockets, buffers and the driver under them. With `shard` the only place that names monoio.

mod driver;

pub use driver::{Driver, IoChoice};
