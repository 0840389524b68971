//! The one place where time is read.
//!
//! Everything that decides takes a [`Millis`] as an argument, so that tests own time. Monotonic: a step
//! of the wall clock moves nothing (`faults.md` P9).

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A point in time, in milliseconds since the clock was made.
pub type Millis = u64;

/// A monotonic clock with a common origin; copies of one clock agree.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock whose zero is now.
    #[expect(clippy::disallowed_methods, reason = "this is the place where time is read")]
    pub fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// Milliseconds since the clock's origin.
    pub fn millis(&self) -> Millis {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Microseconds since the clock's origin, for durations that are measured, not decided on.
    pub fn micros(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// Milliseconds since 1970-01-01T00:00:00Z by the wall clock, for logs; nothing is decided by it.
pub fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
