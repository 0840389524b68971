//! Which kernel interface drives the sockets.

use std::fmt;

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
