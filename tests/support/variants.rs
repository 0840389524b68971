//! Every end-to-end test runs on io_uring and on epoll, with one shard and with two.

use std::sync::OnceLock;

/// What drives the sockets of a proxy under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Io {
    /// `--io uring`: the kernel must grant it.
    Uring,
    /// `--io epoll`.
    Epoll,
}

/// One of the four ways in which a proxy under test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(crate) io: Io,
    /// Number of shards.
    pub(crate) shards: usize,
}

/// Whether this kernel (or the seccomp filter around us) grants io_uring at all. Asked of the kernel, not of
/// the proxy: a proxy that wrongly falls back to epoll must fail, not be skipped.
pub(crate) fn kernel_grants_uring() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| io_uring::IoUring::new(8).is_ok())
}

impl Variant {
    /// Runs `test` in this variant, or says why not.
    pub(crate) fn run(io: Io, shards: usize, test: fn(Variant)) {
        if io == Io::Uring && !kernel_grants_uring() {
            eprintln!("skipped: this kernel refuses io_uring");
            return;
        }
        test(Variant { io, shards });
    }
}

/// Makes four tests of each function: {io_uring, epoll} × {1, 2 shards}.
macro_rules! variants {
    ($($(#[$meta:meta])* fn $name:ident($variant:ident: Variant) $body:block)*) => {$(
        $(#[$meta])*
        fn $name($variant: $crate::support::Variant) $body

        mod $name {
            use crate::support::{Io, Variant};

            #[test]
            fn uring_1() {
                Variant::run(Io::Uring, 1, super::$name);
            }

            #[test]
            fn uring_2() {
                Variant::run(Io::Uring, 2, super::$name);
            }

            #[test]
            fn epoll_1() {
                Variant::run(Io::Epoll, 1, super::$name);
            }

            #[test]
            fn epoll_2() {
                Variant::run(Io::Epoll, 2, super::$name);
            }
        }
    )*};
}

pub(crate) use variants;
