//! Sockets, buffers and the driver under them. With `shard` the only place that names monoio.
//!
//! Under io_uring the kernel owns a buffer until its operation completes, so every read and write takes its
//! [`Buffer`] by value and gives it back with the result. A read or write that is dropped before it is done is
//! cancelled and its buffer lost: its connection must not be used any further.

use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

mod bell;
mod buffer;
mod contain;
mod driver;
mod limits;
mod outbox;
mod settings;
mod socket;
mod watch;

pub use bell::{Bell, Ringer, bell};
pub use buffer::Buffer;
pub use contain::{Contained, Panicked, contain};
pub use driver::{Driver, IoChoice, Runtime};
pub use limits::{Limits, Needs, TooLow, open_files};
pub use settings::Settings;
pub use socket::{Listener, ReadAhead, ReadHalf, Reserve, WriteHalf, accept_from, connect, listen};
pub use watch::{Elapsed, Limited, Parting, ShardClock, TICK_MS, Watch, Watches};

/// Waits for `millis` milliseconds on the shard's timer, at least one tick of it.
///
/// # Cancellation
/// Nothing is lost if the future is dropped.
pub async fn pause(millis: u64) {
    monoio::time::sleep(std::time::Duration::from_millis(millis)).await;
}

/// Lets this shard's other tasks run, and the driver look at their sockets, once; `late` as for [`wake_later`].
///
/// # Cancellation
/// Nothing is lost if the future is dropped.
pub async fn give_way(late: bool) {
    let mut given = false;
    poll_fn(|context| {
        if given {
            return Poll::Ready(());
        }
        given = true;
        wake_later(context.waker(), late);
        Poll::Pending
    })
    .await;
}

/// Wakes a task that could go on but lets others go first. It must be another task that does: monoio puts a task that
/// wakes itself before all others. As long as somebody always gives way no timer is looked at, so when they are
/// `late`, one is waited for.
pub fn wake_later(waker: &Waker, late: bool) {
    let waker = waker.clone();
    spawn(async move {
        if late {
            pause(1).await;
        }
        waker.wake();
    });
}

/// Runs `task` on this shard until it ends.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    drop(monoio::spawn(task));
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, io::Write, rc::Rc};

    use super::*;

    /// Rounds that a task which never waits but for this gets through while another one is served by its socket
    /// and, if `timed`, by a timer.
    fn rounds(driver: Driver, timed: bool) -> Option<u64> {
        const MANY: u64 = 1_000_000;
        let mut runtime = Runtime::build(driver).ok()?;
        let off = Settings { tcp_keepalive_secs: 0, tcp_user_timeout_secs: 0 };
        let listener = listen("127.0.0.1:0".parse().unwrap(), 1, &off).unwrap().remove(0);
        let address = listener.local_addr().unwrap();
        Some(runtime.block_on(async {
            let listener = accept_from(listener, driver).unwrap();
            let mut client = std::net::TcpStream::connect(address).unwrap();
            let (mut reader, _writer) = listener.accept().await.unwrap();
            let (served, rounds) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
            let tell = served.clone();
            spawn(async move {
                let (read, _) = reader.read(Buffer::new(0, 1)).await;
                assert_eq!(read.unwrap(), 1);
                if timed {
                    pause(1).await;
                }
                tell.set(true);
            });
            pause(1).await;
            client.write_all(b"x").unwrap();
            let round = rounds.clone();
            let flooding = monoio::spawn(async move {
                while !served.get() && round.get() < MANY {
                    round.set(round.get() + 1);
                    give_way(timed && round.get() % 100 == 0).await;
                }
            });
            flooding.await;
            rounds.get()
        }))
    }

    #[test]
    fn who_gives_way_lets_sockets_and_timers_be_served() {
        for driver in [Driver::UringPlain, Driver::Epoll] {
            for timed in [false, true] {
                let Some(rounds) = rounds(driver, timed) else { continue };
                assert!(rounds < 1000, "{driver}, timed {timed}: {rounds}");
            }
        }
    }
}
