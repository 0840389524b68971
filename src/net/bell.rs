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
