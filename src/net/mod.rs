//! Sockets, buffers and the driver under them. With `shard` the only place that names monoio.
//!
//! Under io_uring the kernel owns a buffer until its operation completes, so every read and write takes its
//! [`Buffer`] by value and gives it back with the result. A read or write that is dropped before it is done is
//! cancelled and its buffer lost: its connection must not be used any further.

use std::{future::poll_fn, task::Poll};

mod buffer;
mod contain;
mod driver;
mod settings;
mod socket;
mod watch;

pub use buffer::Buffer;
pub use contain::{Contained, Panicked, contain};
pub use driver::{Driver, IoChoice, Runtime};
pub use settings::Settings;
pub use socket::{Listener, ReadAhead, ReadHalf, WriteHalf, accept_from, connect, listen};
pub use watch::{Elapsed, Limited, ShardClock, TICK_MS, Watch, Watches};

/// Waits for `millis` milliseconds on the shard's timer, at least one tick of it.
///
/// # Cancellation
/// Nothing is lost if the future is dropped.
pub async fn pause(millis: u64) {
    monoio::time::sleep(std::time::Duration::from_millis(millis)).await;
}

/// Lets this shard's other tasks run, once. Not to be looped on: as long as somebody always gives way, the driver
/// looks at sockets but not at timers, so when `late`, a timer is waited for.
///
/// # Cancellation
/// Nothing is lost if the future is dropped.
pub async fn give_way(late: bool) {
    if late {
        return pause(1).await;
    }
    let mut given = false;
    poll_fn(|context| {
        if given {
            return Poll::Ready(());
        }
        given = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs `task` on this shard until it ends.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    drop(monoio::spawn(task));
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, io::Write, rc::Rc};

    use super::*;

    #[test]
    fn who_gives_way_lets_sockets_and_timers_be_served() {
        for driver in [Driver::UringPlain, Driver::Epoll] {
            let Ok(mut runtime) = Runtime::build(driver) else { continue };
            let off = Settings { tcp_keepalive_secs: 0, tcp_user_timeout_secs: 0 };
            let listener = listen("127.0.0.1:0".parse().unwrap(), 1, &off).unwrap().remove(0);
            let address = listener.local_addr().unwrap();
            let rounds = runtime.block_on(async {
                let (stop, rounds) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0_u64)));
                let (stopped, round) = (stop.clone(), rounds.clone());
                spawn(async move {
                    // never waits for anything, as a relay whose worker always has more
                    while !stopped.get() {
                        round.set(round.get() + 1);
                        give_way(round.get() % 100 == 0).await;
                    }
                });
                let listener = accept_from(listener, driver).unwrap();
                let mut client = std::net::TcpStream::connect(address).unwrap();
                let (mut reader, _writer) = listener.accept().await.unwrap();
                pause(20).await;
                client.write_all(b"x").unwrap();
                let (read, _) = reader.read(Buffer::new(0, 1)).await;
                assert_eq!(read.unwrap(), 1);
                stop.set(true);
                rounds.get()
            });
            assert!(rounds > 100, "{rounds}");
        }
    }
}
