//! What this host may run out of, counted, and told once per episode instead of once per connection.
//!
//! A process that is short of something is short of it thousands of times a second. An episode begins with the
//! first time and ends when there was none for [`QUIET_MS`]. All threads share one count: it is written only
//! when something has gone wrong already.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::base::Millis;

/// An episode is over when so long nothing was short, in milliseconds.
pub const QUIET_MS: Millis = 10_000;

/// What can be short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// File descriptors, of the process or of the host.
    Descriptors,
    /// Ports for connections to workers.
    Ports,
    /// The kernel's memory for sockets.
    Memory,
}

impl Resource {
    /// All of them, each at the position of its discriminant.
    pub const ALL: [Self; 3] = [Self::Descriptors, Self::Ports, Self::Memory];

    /// The word of the metric label and of the log.
    pub fn label(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Ports => "ports",
            Self::Memory => "memory",
        }
    }

    /// What an operator may do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Descriptors => "raise the limit of open files (ulimit -n, LimitNOFILE) or fs.file-max",
            Self::Ports => "widen net.ipv4.ip_local_port_range, or give workers several addresses",
            Self::Memory => "raise net.ipv4.tcp_mem, or the memory limit of the container",
        }
    }

    /// What is short when the kernel says this of a new socket or connection; `None`: it speaks of something
    /// else (`accept(2)`, `connect(2)`, `socket(2)`).
    pub fn of(error: &io::Error) -> Option<Self> {
        match error.raw_os_error()? {
            libc::EMFILE | libc::ENFILE => Some(Self::Descriptors),
            libc::EADDRNOTAVAIL => Some(Self::Ports),
            libc::ENOBUFS | libc::ENOMEM => Some(Self::Memory),
            _ => None,
        }
    }
}

/// How often each resource was short.
#[derive(Debug, Default)]
pub struct Shortages {
    /// Indexed by the resource.
    each: [Shortage; Resource::ALL.len()],
}

#[derive(Debug, Default)]
struct Shortage {
    /// Since the process began.
    total: AtomicU64,
    /// `total` when the episode began.
    before: AtomicU64,
    /// One more than when it was short last, in milliseconds; 0: there is no episode.
    last: AtomicU64,
}

impl Shortages {
    /// Counts one; true if an episode begins with it.
    pub fn happened(&self, resource: Resource, now: Millis) -> bool {
        let shortage = &self.each[resource as usize];
        let before = shortage.total.fetch_add(1, Ordering::Relaxed);
        let begins = shortage.last.swap(now.saturating_add(1), Ordering::Relaxed) == 0;
        if begins {
            shortage.before.store(before, Ordering::Relaxed);
        }
        begins
    }

    /// Counts one, and logs it if an episode begins with it.
    pub fn tell(&self, resource: Resource, now: Millis) {
        if self.happened(resource, now) {
            let (what, remedy) = (resource.label(), resource.remedy());
            tracing::warn!(
                "out of {what}: clients are turned away or wait until there are some again; {remedy}"
            );
        }
    }

    /// Logs the end of episodes that are over. To be called now and then.
    pub fn tell_over(&self, now: Millis) {
        while let Some((resource, times)) = self.over(now) {
            tracing::info!(times, "there are {} again", resource.label());
        }
    }

    /// An episode that is over, and how often the resource was short in it. Each is told once.
    pub fn over(&self, now: Millis) -> Option<(Resource, u64)> {
        Resource::ALL.into_iter().find_map(|resource| {
            let shortage = &self.each[resource as usize];
            let last = shortage.last.load(Ordering::Relaxed);
            if last == 0 || now.saturating_add(1).saturating_sub(last) < QUIET_MS {
                return None;
            }
            // two may look at once, and it may begin anew meanwhile
            shortage.last.compare_exchange(last, 0, Ordering::Relaxed, Ordering::Relaxed).ok()?;
            Some((resource, self.total(resource).saturating_sub(shortage.before.load(Ordering::Relaxed))))
        })
    }

    /// How often the resource was short since the process began.
    pub fn total(&self, resource: Resource) -> u64 {
        self.each[resource as usize].total.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p3_an_episode_is_told_when_it_begins_and_when_it_is_over() {
        let shortages = Shortages::default();
        assert_eq!(shortages.over(0), None);
        assert!(shortages.happened(Resource::Descriptors, 0));
        for now in 1..=500 {
            assert!(!shortages.happened(Resource::Descriptors, now));
        }
        assert_eq!(shortages.over(500 + QUIET_MS - 1), None);
        assert_eq!(shortages.over(500 + QUIET_MS), Some((Resource::Descriptors, 501)));
        assert_eq!(shortages.over(500 + QUIET_MS), None, "told twice");
        assert!(shortages.happened(Resource::Descriptors, 20_000), "a new episode");
        assert_eq!(shortages.over(20_000 + QUIET_MS), Some((Resource::Descriptors, 1)));
        assert_eq!(shortages.total(Resource::Descriptors), 502);
    }

    #[test]
    fn p4_what_is_short_is_told_apart() {
        let shortages = Shortages::default();
        assert!(shortages.happened(Resource::Ports, 5) && shortages.happened(Resource::Memory, 5));
        assert_eq!(shortages.over(5 + QUIET_MS), Some((Resource::Ports, 1)));
        assert_eq!(shortages.over(5 + QUIET_MS), Some((Resource::Memory, 1)));
        assert_eq!(shortages.total(Resource::Descriptors), 0);
        for (at, resource) in Resource::ALL.into_iter().enumerate() {
            assert_eq!(resource as usize, at);
        }
    }

    #[test]
    fn the_kernels_word_names_what_is_short() {
        let of = |code| Resource::of(&io::Error::from_raw_os_error(code));
        assert_eq!([libc::EMFILE, libc::ENFILE].map(of), [Some(Resource::Descriptors); 2]);
        assert_eq!(of(libc::EADDRNOTAVAIL), Some(Resource::Ports));
        assert_eq!([libc::ENOBUFS, libc::ENOMEM].map(of), [Some(Resource::Memory); 2]);
        assert_eq!([libc::ECONNREFUSED, libc::ETIMEDOUT, libc::ECONNABORTED].map(of), [None; 3]);
        assert_eq!(Resource::of(&io::Error::other("no code")), None);
    }
}
