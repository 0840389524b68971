//! How many bytes of a request a token is, learnt per model from what workers report.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use xxhash_rust::xxh3::xxh3_64;

/// Models that have a rate of their own. Two may fall on one cell and then share it.
const CELLS: usize = 256;

/// Bytes per token of a model of which nothing has been learnt: English text.
pub(super) const DEFAULT: f64 = 4.0;

/// What is believed; the rest is a mistake of somebody's.
const BELIEVED: std::ops::RangeInclusive<f64> = 0.25..=64.0;

/// A prompt of so many bytes moves the mean half of the way, one of a tenth of it a tenth.
const HALF_BYTES: f64 = 256.0 * 1024.0;

/// Bytes per token of each model, shared by all shards.
#[derive(Debug)]
pub struct TokenRates {
    /// By the hash of the model's name: bits of an `f32`; 0: nothing is known.
    cells: [AtomicU32; CELLS],
}

impl Default for TokenRates {
    fn default() -> Self {
        Self { cells: [const { AtomicU32::new(0) }; CELLS] }
    }
}

impl TokenRates {
    /// Bytes per token.
    pub fn get(&self, model: &str) -> f64 {
        match self.cell(model).load(Relaxed) {
            0 => DEFAULT,
            bits => f64::from(f32::from_bits(bits)),
        }
    }

    /// A prompt of `bytes` (see [`crate::routing::Prompt::rated_bytes`]) was found to have `tokens`. A mean that is
    /// weighted by the prompts' length; the first one is taken as it is.
    pub fn learn(&self, model: &str, bytes: u64, tokens: u64) {
        let seen = bytes as f64 / tokens as f64;
        if bytes == 0 || !BELIEVED.contains(&seen) {
            return;
        }
        let cell = self.cell(model);
        let old = cell.load(Relaxed);
        let new = match old {
            0 => seen,
            bits => {
                let (mean, bytes) = (f64::from(f32::from_bits(bits)), bytes as f64);
                mean + (seen - mean) * bytes.min(HALF_BYTES) / (bytes.min(HALF_BYTES) + HALF_BYTES)
            }
        };
        // who comes second is not heard
        let _ = cell.compare_exchange(old, (new as f32).to_bits(), Relaxed, Relaxed);
    }

    fn cell(&self, model: &str) -> &AtomicU32 {
        &self.cells[xxh3_64(model.as_bytes()) as usize % CELLS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_replaces_the_default() {
        let rates = TokenRates::default();
        assert_eq!(rates.get("m"), 4.0);
        rates.learn("m", 50, 20);
        assert_eq!(rates.get("m"), 2.5);
        assert_eq!(rates.get("another"), 4.0);
    }

    #[test]
    fn long_prompts_count_more() {
        let after = |bytes| {
            let rates = TokenRates::default();
            rates.learn("m", 1000, 250);
            rates.learn("m", bytes, bytes / 2);
            rates.get("m")
        };
        assert!(after(100) > 3.99 && after(100) < 4.0, "{}", after(100));
        assert!(after(26_000) < 3.9, "{}", after(26_000));
        assert_eq!(after(1 << 30), 3.0, "but never more than half");
    }

    #[test]
    fn many_reports_reach_the_truth() {
        let rates = TokenRates::default();
        rates.learn("m", 40, 10);
        for _ in 0..200 {
            rates.learn("m", 24_000, 8_000);
        }
        assert!((rates.get("m") - 3.0).abs() < 0.01, "{}", rates.get("m"));
    }

    #[test]
    fn nonsense_is_not_learnt() {
        let rates = TokenRates::default();
        for (bytes, tokens) in [(0, 0), (0, 9), (9, 0), (1, 5), (6500, 100), (u64::MAX, 1), (1, u64::MAX)] {
            rates.learn("m", bytes, tokens);
            assert_eq!(rates.get("m"), DEFAULT, "{bytes} bytes, {tokens} tokens");
        }
        rates.learn("m", 1, 4);
        assert_eq!(rates.get("m"), 0.25);
    }
}
