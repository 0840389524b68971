//! Sockets, buffers and the driver under them. With `shard` the only place that names monoio.
//!
//! Under io_uring the kernel owns a buffer until its operation completes, so every read and write takes its
//! [`Buffer`] by value and gives it back with the result. A read or write that is dropped before it is done is
//! cancelled and its buffer lost: its connection must not be used any further.

mod bell;
mod buffer;
mod contain;
mod driver;
mod socket;
mod watch;

pub use bell::{Bell, Ringer, bell};
pub use buffer::Buffer;
pub use contain::{Contained, Panicked, contain};
pub use driver::{Driver, IoChoice, Runtime};
pub use socket::{Listener, ReadAhead, ReadHalf, WriteHalf, accept_from, connect, listen};
pub use watch::{Elapsed, Limited, ShardClock, TICK_MS, Watch, Watches};

/// Waits for `millis` milliseconds on the shard's timer, at least one tick of it.
///
/// # Cancellation
/// Nothing is lost if the future is dropped.
pub async fn pause(millis: u64) {
    monoio::time::sleep(std::time::Duration::from_millis(millis)).await;
}

/// Runs `task` on this shard until it ends.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    drop(monoio::spawn(task));
}
