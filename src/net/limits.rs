//! What the host allows the process, and what of it is too little: told once at the start, in a line for each.
//!
//! [`Limits::read`] asks the kernel; what is made of that is pure.

use std::fs;

use rustix::process::{Resource, getrlimit};

use crate::net::{Driver, socket::BACKLOG};

/// Below so many open files a busy proxy runs dry.
const FEW_OPEN_FILES: u64 = 10_000;

/// Open files of the process that are neither a client's nor a worker's: the log, the control thread's runtime
/// and listener, its own probes beside those of the workers.
const OWN_FILES: u64 = 64;

/// Open files of a shard beside connections: its ring or epoll set, its listener, its reserve, its wakers.
const FILES_PER_SHARD: u64 = 8;

/// Open files of the control thread for a worker: a probe, and a look at its metrics.
const FILES_PER_WORKER: u64 = 2;

/// Locked memory of a ring of 1024 entries, in bytes, rounded up: 64 for each entry, twice as many completions
/// of 16, and the indices.
const RING_BYTES: u64 = 128 * 1024;

/// From this kernel on rings are no longer counted as locked memory (`io_uring_setup(2)`).
const RINGS_UNCOUNTED: (u32, u32) = (5, 12);

/// What the host allows. `None`: it does not say, or there is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Open files of the process (`RLIMIT_NOFILE`).
    pub open_files: Option<u64>,
    /// Locked memory, in bytes (`RLIMIT_MEMLOCK`).
    pub locked_bytes: Option<u64>,
    /// Connections that wait to be accepted, of one listener (`net.core.somaxconn`).
    pub backlog: Option<u64>,
    /// Ports for connections to one address of a worker (`net.ipv4.ip_local_port_range`).
    pub ports: Option<u64>,
    /// Major and minor version of the kernel.
    pub kernel: Option<(u32, u32)>,
}

/// What the configuration could need.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// Number of shards.
    pub shards: usize,
    /// Number of workers.
    pub workers: usize,
    /// Kept connections of a shard to a worker (`--pool-size`).
    pub pool_size: usize,
    /// What drives the sockets.
    pub driver: Driver,
}

/// A limit that is too low.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLow {
    /// What the kernel calls it.
    pub name: &'static str,
    /// What it is.
    pub value: u64,
    /// What it should be at least.
    pub needed: u64,
    /// What is to be done.
    pub remedy: &'static str,
}

impl Limits {
    /// Asks the kernel. Files of `/proc` are read: not on a shard.
    pub fn read() -> Self {
        let proc = |name: &str| fs::read_to_string(format!("/proc/sys/{name}")).unwrap_or_default();
        Self {
            open_files: getrlimit(Resource::Nofile).current,
            locked_bytes: getrlimit(Resource::Memlock).current,
            backlog: proc("net/core/somaxconn").trim().parse().ok(),
            ports: ports(&proc("net/ipv4/ip_local_port_range")),
            kernel: kernel(&proc("kernel/osrelease")),
        }
    }

    /// What is lower than `needs` could need; nothing where all is well.
    pub fn too_low(&self, needs: &Needs) -> Vec<TooLow> {
        let rings_count =
            needs.driver != Driver::Epoll && self.kernel.is_some_and(|version| version < RINGS_UNCOUNTED);
        let pools = (needs.shards * needs.pool_size) as u64;
        let checks = [
            (
                "RLIMIT_NOFILE",
                self.open_files,
                FEW_OPEN_FILES.max(2 * needs.own_files()),
                "raise the limit of open files (ulimit -n, LimitNOFILE, --ulimit nofile)",
            ),
            (
                "RLIMIT_MEMLOCK",
                self.locked_bytes.filter(|_| rings_count),
                needs.shards as u64 * RING_BYTES,
                "raise the limit of locked memory in bytes (ulimit -l, LimitMEMLOCK)",
            ),
            (
                "net.core.somaxconn",
                self.backlog,
                u64::from(BACKLOG.unsigned_abs()),
                "raise it with sysctl: clients that come at once are dropped beyond it",
            ),
            (
                "net.ipv4.ip_local_port_range",
                self.ports,
                2 * pools,
                "widen it with sysctl, or lower --pool-size: each connection to a worker takes a port",
            ),
        ];
        let low = |(name, value, needed, remedy): (_, Option<u64>, _, _)| {
            value.filter(|value| *value < needed).map(|value| TooLow { name, value, needed, remedy })
        };
        checks.into_iter().filter_map(low).collect()
    }

    /// Clients that may be connected: each may need a connection to a worker too, so half of the open files that
    /// are not needed otherwise; at least one.
    pub fn most_connections(&self, needs: &Needs) -> u64 {
        let files = self.open_files.unwrap_or(u64::MAX);
        // where there are hardly any, nobody's needs are met in full
        (files.saturating_sub(needs.own_files().min(files / 2)) / 2).max(1)
    }
}

impl Needs {
    /// Open files beside those of exchanges.
    fn own_files(&self) -> u64 {
        OWN_FILES + FILES_PER_SHARD * self.shards as u64 + FILES_PER_WORKER * self.workers as u64
    }
}

/// Open files of this process.
pub fn open_files() -> u64 {
    const FILES: &str = "/proc/self/fd";
    // from Linux 6.2 on the size of the folder is their number
    let size = fs::metadata(FILES).map_or(0, |folder| std::os::unix::fs::MetadataExt::size(&folder));
    if size > 0 {
        return size;
    }
    // one of them is open for the count itself
    fs::read_dir(FILES).map_or(0, |files| files.count().saturating_sub(1) as u64)
}

/// `32768\t60999`
fn ports(text: &str) -> Option<u64> {
    let mut bounds = text.split_whitespace().map_while(|bound| bound.parse::<u64>().ok());
    let (low, high) = (bounds.next()?, bounds.next()?);
    (high >= low).then(|| high - low + 1)
}

/// `6.1.0-13-amd64`
fn kernel(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let end = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
    Some((major, minor.get(..end)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs = Needs { shards: 4, workers: 8, pool_size: 512, driver: Driver::UringPlain };

    fn ample() -> Limits {
        Limits {
            open_files: Some(1_048_576),
            locked_bytes: Some(64 << 20),
            backlog: Some(4096),
            ports: Some(28_232),
            kernel: Some((5, 10)),
        }
    }

    fn names(limits: &Limits, needs: &Needs) -> Vec<&'static str> {
        limits.too_low(needs).iter().map(|low| low.name).collect()
    }

    #[test]
    fn nothing_is_said_when_all_is_well_or_unknown() {
        assert_eq!(ample().too_low(&NEEDS), []);
        assert_eq!(Limits::default().too_low(&NEEDS), []);
    }

    #[test]
    fn p3_each_limit_that_is_too_low_is_named_with_what_is_needed() {
        let few = Limits { open_files: Some(1024), ..ample() };
        let told = few.too_low(&NEEDS);
        assert_eq!((told[0].name, told[0].value, told[0].needed), ("RLIMIT_NOFILE", 1024, 10_000));
        assert_eq!(told.len(), 1);
        let short = Limits { backlog: Some(128), ports: Some(4095), ..ample() };
        assert_eq!(names(&short, &NEEDS), ["net.core.somaxconn", "net.ipv4.ip_local_port_range"]);
        let many = Needs { workers: 10_000, ..NEEDS };
        assert_eq!(names(&Limits { open_files: Some(10_000), ..ample() }, &many), ["RLIMIT_NOFILE"]);
    }

    #[test]
    fn locked_memory_matters_to_rings_of_old_kernels_only() {
        let locked = Limits { locked_bytes: Some(64 * 1024), ..ample() };
        assert_eq!(names(&locked, &NEEDS), ["RLIMIT_MEMLOCK"]);
        assert_eq!(locked.too_low(&Needs { driver: Driver::Epoll, ..NEEDS }), []);
        assert_eq!(Limits { kernel: Some((5, 12)), ..locked }.too_low(&NEEDS), []);
    }

    #[test]
    fn p3_half_of_the_open_files_are_left_for_connections_to_workers() {
        let most = |files| Limits { open_files: files, ..ample() }.most_connections(&NEEDS);
        assert_eq!(most(Some(1024)), (1024 - 64 - 32 - 16) / 2);
        assert_eq!(most(Some(64)), 16);
        assert_eq!(most(Some(0)), 1);
        assert!(most(None) > 1 << 60);
    }

    #[test]
    fn the_kernels_files_are_understood_or_left_alone() {
        assert_eq!(ports("32768\t60999\n"), Some(28_232));
        assert_eq!([ports(""), ports("5"), ports("9 5"), ports("a b")], [None; 4]);
        assert_eq!(kernel("6.1.0-13-amd64\n"), Some((6, 1)));
        assert_eq!(kernel("5.4-rc1"), Some((5, 4)));
        assert_eq!([kernel(""), kernel("6"), kernel("x.1")], [None; 3]);
    }

    #[test]
    fn open_files_are_counted() {
        let before = open_files();
        let more: Vec<_> = (0..50).map(|_| std::os::unix::net::UnixDatagram::unbound()).collect();
        assert!(before > 0 && open_files() >= before + 25, "{before} {}", open_files());
        drop(more);
    }
}
