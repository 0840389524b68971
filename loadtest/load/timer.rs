//! Waiting for a point in time to some microseconds; the runtime's own timers come up to a millisecond late, which
//! would be part of every latency of an open loop.

use std::{io, os::fd::OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::clock::now_ns;

/// A timer of the kernel's.
#[derive(Debug)]
pub(crate) struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// # Errors
    /// The kernel refuses another file.
    pub(crate) fn new() -> io::Result<Self> {
        let file = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[expect(unsafe_code, reason = "the runtime has no other way to await a file that is not its own")]
        // SAFETY: an `OwnedFd` names the same open file until it is dropped, which the runtime does
        let file = unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) };
        Ok(Self(file?))
    }

    /// Waits until [`now_ns`] is `at_ns` or later.
    pub(crate) async fn until(&self, at_ns: u64) -> io::Result<()> {
        let seconds = i64::try_from(at_ns / 1_000_000_000).unwrap_or(i64::MAX);
        let at = Timespec { tv_sec: seconds, tv_nsec: (at_ns % 1_000_000_000) as _ };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let once = Itimerspec { it_interval: never, it_value: at };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::ABSTIME, &once)?;
        while now_ns() < at_ns {
            // it need not be read: setting it anew forgets that it was due, and the next time is a new edge
            self.0.readable().await?.clear_ready();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_never_early_and_can_be_set_again() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let timer = Timer::new().unwrap();
            for wait_ns in [0, 1_000, 1_000_000, 100, 2_000_000] {
                let at_ns = now_ns() + wait_ns;
                timer.until(at_ns).await.unwrap();
                assert!(now_ns() >= at_ns);
            }
            timer.until(1).await.unwrap();
        });
    }
}
