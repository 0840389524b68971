//! Times in buckets that grow with them: of bounded size, and exact to half a percent.

use serde_json::{Value, json};

/// Buckets of each power of two are 2 to this power.
const PRECISION: u32 = 7;
/// The longest time that is told from longer ones: 18 minutes.
const LONGEST_NS: u64 = (1 << 40) - 1;
const BUCKETS: usize = ((40 - 1 - PRECISION as usize) << PRECISION) + (2 << PRECISION);

/// How often each time was seen.
#[derive(Debug, Clone)]
pub(crate) struct Histogram {
    /// Indexed by [`bucket`].
    counts: Box<[u64]>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { counts: vec![0; BUCKETS].into(), count: 0, sum_ns: 0, max_ns: 0 }
    }

    pub(crate) fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// The time that this share of all times does not exceed; 0 if there are none.
    pub(crate) fn percentile_ns(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let reached = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        reached.map_or(0, |index| middle(index).min(self.max_ns))
    }

    /// Whether there is no time at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What is reported, in microseconds; nulls if there is nothing.
    pub(crate) fn report_us(&self) -> Value {
        let us = |ns: f64| (!self.is_empty()).then(|| (ns / 100.0).round() / 10.0);
        let at = |share: f64| us(self.percentile_ns(share) as f64);
        json!({
            "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999),
            "max": us(self.max_ns as f64), "mean": us(self.sum_ns as f64 / self.count as f64),
        })
    }
}

/// Which bucket a time falls into: short times have one each, longer ones share it with those that differ by less
/// than 1/128.
fn bucket(ns: u64) -> usize {
    let ns = ns.min(LONGEST_NS);
    let shift = (ns | 1).ilog2().saturating_sub(PRECISION);
    ((shift as usize) << PRECISION) + (ns >> shift) as usize
}

/// The middle of a bucket.
fn middle(index: usize) -> u64 {
    let shift = (index >> PRECISION).saturating_sub(1);
    let low = ((index - (shift << PRECISION)) as u64) << shift;
    low + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;

    #[test]
    fn a_bucket_is_off_by_less_than_half_a_percent() {
        let mut ns = 1;
        while ns <= LONGEST_NS {
            for near in [ns - 1, ns, ns + 1, ns + ns / 3] {
                let off = middle(bucket(near)).abs_diff(near.min(LONGEST_NS));
                assert!(off * 200 <= near, "{near} is off by {off}");
            }
            ns = ns * 3 / 2 + 1;
        }
        assert_eq!(bucket(LONGEST_NS), BUCKETS - 1);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_agree_with_the_sorted_times() {
        let (mut chance, mut histogram, mut times) = (Chance::new(7), Histogram::new(), Vec::new());
        for _ in 0..10_000 {
            let ns = chance.exponential(80_000.0) as u64;
            histogram.record(ns);
            times.push(ns);
        }
        times.sort_unstable();
        for share in [0.01_f64, 0.5, 0.9, 0.99, 0.999, 1.0] {
            let exact = times[(share * 10_000.0).ceil() as usize - 1];
            let told = histogram.percentile_ns(share);
            assert!(told.abs_diff(exact) * 200 <= exact, "{share}: {told} instead of {exact}");
        }
        assert_eq!(histogram.report_us()["max"], (*times.last().unwrap() as f64 / 100.0).round() / 10.0);
    }

    #[test]
    fn nothing_recorded_is_null() {
        let report = Histogram::new().report_us();
        assert!(report.as_object().unwrap().values().all(Value::is_null), "{report}");
        assert_eq!(Histogram::new().percentile_ns(0.5), 0);
    }
}
