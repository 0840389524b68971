//! How another thread makes a shard look: a bell.
//!
//! The shards' runtime takes no wakers from other threads, and a tick is too slow for those who wait in a queue. So a
//! shard keeps a read on one end of a socket pair, and whoever has something for it writes a byte into the other one:
//! one, however often it is rung before the shard has looked.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream as StdStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use monoio::{io::AsyncReadRent, net::UnixStream};

use crate::net::Driver;

/// Bytes read at a time; more than one only after a shard was held up between hearing and answering.
const READ_BYTES: usize = 8;

/// The outer end: any thread may ring.
#[derive(Debug)]
pub struct Ringer {
    stream: StdStream,
    rung: Arc<AtomicBool>,
}

/// The inner end, of one shard.
#[derive(Debug)]
pub struct Bell {
    stream: StdStream,
    rung: Arc<AtomicBool>,
}

/// A bell and what rings it.
///
/// # Errors
/// No descriptors are left.
pub fn bell() -> io::Result<(Ringer, Bell)> {
    let (outer, inner) = StdStream::pair()?;
    outer.set_nonblocking(true)?;
    let rung = Arc::new(AtomicBool::new(false));
    Ok((Ringer { stream: outer, rung: rung.clone() }, Bell { stream: inner, rung }))
}

impl Ringer {
    /// Makes the shard look, soon. What was written before is seen by it then.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // there is room for one byte; a shard that is gone hears nothing
            (&self.stream).write_all(&[1]).ok();
        }
    }
}

impl Bell {
    /// Calls `look` whenever the bell was rung, until the ringer is gone. To be run on its shard.
    ///
    /// # Errors
    /// The driver cannot watch the socket.
    ///
    /// # Cancellation
    /// The bell is dead.
    pub async fn listen(self, driver: Driver, mut look: impl FnMut()) -> io::Result<()> {
        // as for listeners: a ring of an older kernel gives up at once on what does not block
        self.stream.set_nonblocking(driver == Driver::Epoll)?;
        let mut stream = UnixStream::from_std(self.stream)?;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let result;
            (result, buffer) = stream.read(buffer).await;
            match result {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {
                    // before the look: who rings from now on may have come too late for it
                    self.rung.swap(false, Ordering::AcqRel);
                    look();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;
    use crate::net::Runtime;

    /// Every driver that this kernel grants.
    fn on_each_driver(test: fn(Driver, Runtime)) {
        let mut ran = 0;
        for driver in [Driver::Epoll, Driver::UringDeferred, Driver::UringCooperative, Driver::UringPlain] {
            if let Ok(runtime) = Runtime::build(driver) {
                test(driver, runtime);
                ran += 1;
            }
        }
        assert!(ran > 0, "epoll is always there");
    }

    #[test]
    fn a_shard_looks_each_time_that_another_thread_rings() {
        on_each_driver(|driver, mut runtime| {
            let (ringer, bell) = bell().unwrap();
            let (looked, looks) = mpsc::channel();
            let other = thread::spawn(move || {
                for round in 0..100 {
                    ringer.ring();
                    let look = looks.recv_timeout(Duration::from_secs(60));
                    look.unwrap_or_else(|_| panic!("{driver}: round {round} was not heard"));
                }
            });
            runtime.block_on(bell.listen(driver, || looked.send(()).unwrap())).unwrap();
            other.join().unwrap();
        });
    }

    #[test]
    fn a_bell_that_is_rung_is_not_rung_again_before_the_shard_has_looked() {
        on_each_driver(|driver, mut runtime| {
            let (ringer, bell) = bell().unwrap();
            (0..100_000).for_each(|_| ringer.ring());
            drop(ringer);
            let mut looks = 0;
            runtime.block_on(bell.listen(driver, || looks += 1)).unwrap();
            assert_eq!(looks, 1, "{driver}");
        });
    }
}
