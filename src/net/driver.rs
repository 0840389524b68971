//! Which kernel interface drives the sockets.
//!
//! The choice is made once for the whole process, before anything is bound, by building the real ring of
//! every shard: monoio's own choice probes with a ring of two entries and then fails where the limit on
//! locked memory allows the probe but not the real one.

use std::{fmt, io};

use monoio::{IoUringDriver, LegacyDriver, RuntimeBuilder, time::TimeDriver};

use crate::net::outbox::emptied;

/// Entries of a ring's submission queue. A full queue is flushed, not an error.
const RING_ENTRIES: u32 = 1024;

/// What the operator asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum IoChoice {
    /// io_uring where the kernel grants it, else epoll.
    #[default]
    Auto,
    /// io_uring, or the process does not start.
    Uring,
    /// epoll.
    Epoll,
}

impl IoChoice {
    /// What to try, best first.
    pub fn candidates(self) -> &'static [Driver] {
        const ALL: [Driver; 4] =
            [Driver::UringDeferred, Driver::UringCooperative, Driver::UringPlain, Driver::Epoll];
        match self {
            Self::Auto => &ALL,
            Self::Uring => &ALL[..3],
            Self::Epoll => &ALL[3..],
        }
    }
}

impl fmt::Display for IoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Epoll => "epoll",
        })
    }
}

/// What drives the sockets of this process; the same on every shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// io_uring with `SINGLE_ISSUER | DEFER_TASKRUN` (Linux 6.1).
    UringDeferred,
    /// io_uring with `COOP_TASKRUN` (Linux 5.19).
    UringCooperative,
    /// io_uring without further flags.
    UringPlain,
    /// epoll.
    Epoll,
}

impl Driver {
    /// The name in logs and in the label of the gauge: `io_uring` or `epoll`.
    pub fn backend(self) -> &'static str {
        match self {
            Self::Epoll => "epoll",
            Self::UringDeferred | Self::UringCooperative | Self::UringPlain => "io_uring",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UringDeferred => "io_uring (single_issuer, defer_taskrun)",
            Self::UringCooperative => "io_uring (coop_taskrun)",
            Self::UringPlain => "io_uring",
            Self::Epoll => "epoll",
        })
    }
}

/// The runtime of one shard. Belongs to the thread that built it.
pub enum Runtime {
    /// Over io_uring.
    Uring(monoio::Runtime<TimeDriver<IoUringDriver>>),
    /// Over epoll.
    Epoll(monoio::Runtime<TimeDriver<LegacyDriver>>),
}

impl Runtime {
    /// A runtime over `driver` for the calling thread.
    ///
    /// # Errors
    /// What the kernel said: `EPERM`, `ENOSYS`, `ENOMEM`, `EOPNOTSUPP` where io_uring is refused, `EINVAL`
    /// where it does not know a flag, `EMFILE` where descriptors are short.
    pub fn build(driver: Driver) -> io::Result<Self> {
        let mut ring = io_uring::IoUring::builder();
        match driver {
            Driver::UringDeferred => ring.setup_single_issuer().setup_defer_taskrun(),
            Driver::UringCooperative => ring.setup_coop_taskrun(),
            Driver::UringPlain | Driver::Epoll => &mut ring,
        };
        Ok(match driver {
            Driver::Epoll => Self::Epoll(RuntimeBuilder::<LegacyDriver>::new().enable_timer().build()?),
            _ => Self::Uring(
                RuntimeBuilder::<IoUringDriver>::new()
                    .with_entries(RING_ENTRIES)
                    .uring_builder(ring)
                    .enable_timer()
                    .build()?,
            ),
        })
    }

    /// Runs `main`, and with it every task that it spawns, until `main` ends.
    pub fn block_on<T>(&mut self, main: impl Future<Output = T>) -> T {
        match self {
            Self::Uring(runtime) => runtime.block_on(main),
            Self::Epoll(runtime) => runtime.block_on(emptied(main)),
        }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring(_) => "Runtime::Uring",
            Self::Epoll(_) => "Runtime::Epoll",
        })
    }
}
