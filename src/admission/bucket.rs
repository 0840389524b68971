//! How many requests a second are let in: a token bucket in one atomic.
//!
//! Kept as the time at which the bucket would be full again (the generic cell rate algorithm, ITU-T I.371), so that
//! nothing has to fill it: taking a token moves that time on by the time that a token takes to come.

use std::sync::atomic::{AtomicU64, Ordering};

const NANOS: f64 = 1e9;

/// A bucket, full at first.
#[derive(Debug)]
pub struct Bucket {
    /// Nanoseconds in which one token comes.
    interval: u64,
    /// Nanoseconds of tokens that it holds besides the one that is taken.
    slack: u64,
    /// When it is full again, in nanoseconds of the caller's clock.
    full_at: AtomicU64,
}

impl Bucket {
    /// `rate` tokens come every second (greater than 0) and at most `burst` are held, at least 1.
    pub fn new(rate: f64, burst: u64) -> Self {
        // saturates: a rate below 1e-10 is one token in centuries
        let interval = ((NANOS / rate) as u64).max(1);
        let slack = interval.saturating_mul(burst.max(1) - 1);
        Self { interval, slack, full_at: AtomicU64::new(0) }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// There is none; after so many microseconds there will be.
    pub fn take(&self, now_micros: u64) -> Result<(), u64> {
        let now = now_micros.saturating_mul(1000);
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        loop {
            let missing = full_at.saturating_sub(now);
            if missing > self.slack {
                return Err((missing - self.slack).div_ceil(1000));
            }
            let next = full_at.max(now).saturating_add(self.interval);
            match self.full_at.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(other) => full_at = other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_goes_through_and_then_the_rate() {
        let bucket = Bucket::new(10.0, 3);
        assert_eq!([0, 0, 0].map(|now| bucket.take(now)), [Ok(()); 3]);
        assert_eq!(bucket.take(0), Err(100_000));
        assert_eq!(bucket.take(99_999), Err(1));
        assert_eq!(bucket.take(100_000), Ok(()));
        assert_eq!(bucket.take(100_000), Err(100_000));
        assert_eq!([10_000_000; 3].map(|now| bucket.take(now)), [Ok(()); 3], "it fills up, no further");
        assert_eq!(bucket.take(10_000_000), Err(100_000));
    }

    #[test]
    fn less_than_one_a_second_is_a_rate_too() {
        let bucket = Bucket::new(0.5, 1);
        assert_eq!(
            (bucket.take(0), bucket.take(1_999_999), bucket.take(2_000_000)),
            (Ok(()), Err(1), Ok(()))
        );
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate_and_the_wait_is_true(
            rate in 0.1f64..1000.0,
            burst in 1u64..20,
            steps in prop::collection::vec(0u64..500_000, 1..200),
        ) {
            let bucket = Bucket::new(rate, burst);
            let (mut now, mut taken) = (0, 0u64);
            for step in steps {
                now += step;
                match bucket.take(now) {
                    Ok(()) => taken += 1,
                    Err(wait) => {
                        now += wait;
                        prop_assert_eq!(bucket.take(now), Ok(()), "after {} µs", wait);
                        taken += 1;
                    }
                }
                // a token's interval is rounded down to a nanosecond
                let most = burst as f64 + now as f64 / 1e6 * rate * 1.000_001 + 0.001;
                prop_assert!(taken as f64 <= most, "{} taken, {} allowed", taken, most);
            }
        }
    }
}
