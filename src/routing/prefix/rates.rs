//! How many bytes of a request a token is, learnt per model from what workers report.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use xxhash_rust::xxh3::xxh3_64;

/// Models that have a rate of their own. Two may fall on one cell and then share it.
const CELLS: usize = 256;

/// Bytes per token of a model of which nothing has been learnt: English text.
pub(super) const DEFAULT: f64 = 4.0;

/// What is believed; the rest is a mistake of somebody's.
const BELIEVED: std::ops::RangeInclusive<f64> = 0.25..=64.0;

/// As many bytes as the mean remembers: of a settled one, a prompt of this length moves it half of the way, one of a
/// tenth of it a tenth.
const MEMORY_BYTES: u64 = 256 * 1024;

/// Bytes per token of each model, shared by all shards.
///
/// What is kept is the mean of tokens per byte, weighted by the prompts' bytes: it makes the sum of all estimates
/// right, which a mean of bytes per token does not where prompts differ. Until the memory is full all prompts count
/// alike, so that the first one's peculiarity is soon forgotten.
#[derive(Debug)]
pub struct TokenRates {
    /// By the hash of the model's name: a [`Mean`]'s bits; 0: nothing is known.
    cells: [AtomicU64; CELLS],
    /// The same of all models together. Whose model is not known yet is most likely an adapter of one that is.
    all: AtomicU64,
}

/// What is known of a model.
#[derive(Clone, Copy)]
struct Mean {
    tokens_per_byte: f32,
    /// That it was learnt from, not more than [`MEMORY_BYTES`].
    bytes: u32,
}

impl Mean {
    fn of_bits(bits: u64) -> Option<Self> {
        let mean = Self { tokens_per_byte: f32::from_bits((bits >> 32) as u32), bytes: bits as u32 };
        (bits != 0).then_some(mean)
    }

    fn bits(self) -> u64 {
        u64::from(self.tokens_per_byte.to_bits()) << 32 | u64::from(self.bytes)
    }
}

impl Default for TokenRates {
    fn default() -> Self {
        Self { cells: [const { AtomicU64::new(0) }; CELLS], all: AtomicU64::new(0) }
    }
}

impl TokenRates {
    /// Bytes per token; of a model of which nothing has been learnt, what all others have in the mean.
    pub fn get(&self, model: &str) -> f64 {
        let known = |cell: &AtomicU64| Mean::of_bits(cell.load(Relaxed));
        let mean = known(self.cell(model)).or_else(|| known(&self.all));
        mean.map_or(DEFAULT, |mean| 1.0 / f64::from(mean.tokens_per_byte))
    }

    /// A prompt of `bytes` (see [`crate::routing::Prompt::rated_bytes`]) was found to have `tokens`.
    pub fn learn(&self, model: &str, bytes: u64, tokens: u64) {
        if bytes == 0 || !BELIEVED.contains(&(bytes as f64 / tokens as f64)) {
            return;
        }
        let seen = tokens as f64 / bytes as f64;
        let bytes = bytes.min(MEMORY_BYTES);
        for cell in [self.cell(model), &self.all] {
            let old = cell.load(Relaxed);
            let (mean, known) = Mean::of_bits(old)
                .map_or((seen, 0), |mean| (f64::from(mean.tokens_per_byte), u64::from(mean.bytes)));
            let new = Mean {
                tokens_per_byte: (mean + (seen - mean) * bytes as f64 / (bytes + known) as f64) as f32,
                bytes: (bytes + known).min(MEMORY_BYTES) as u32,
            };
            // who comes second is not heard
            let _ = cell.compare_exchange(old, new.bits(), Relaxed, Relaxed);
        }
    }

    fn cell(&self, model: &str) -> &AtomicU64 {
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
        rates.learn("m", 50, 25);
        assert_eq!(rates.get("m"), 2.0);
    }

    #[test]
    fn a_model_that_is_new_begins_with_what_the_others_have() {
        let rates = TokenRates::default();
        rates.learn("base", 1000, 500);
        assert_eq!(rates.get("an adapter"), 2.0);
        rates.learn("an adapter", 1000, 250);
        assert_eq!((rates.get("base"), rates.get("an adapter")), (2.0, 4.0), "they do not mix");
        assert!((rates.get("another") - 2000.0 / 750.0).abs() < 1e-6, "{}", rates.get("another"));
    }

    #[test]
    fn at_first_all_prompts_count_by_their_length() {
        let rates = TokenRates::default();
        for (bytes, tokens) in [(1000, 250), (1000, 500), (6000, 1250)] {
            rates.learn("m", bytes, tokens);
        }
        assert_eq!(rates.get("m"), 4.0, "8000 bytes were 2000 tokens");
    }

    #[test]
    fn the_sum_of_what_is_estimated_is_right_where_prompts_differ() {
        let (rates, mut estimated, mut real) = (TokenRates::default(), 0.0, 0.0);
        for turn in 0..2000 {
            let (bytes, tokens) = if turn % 2 == 0 { (3000, 2000) } else { (3000, 600) };
            if turn >= 100 {
                estimated += bytes as f64 / rates.get("m");
                real += tokens as f64;
            }
            rates.learn("m", bytes, tokens);
        }
        assert!((estimated / real - 1.0).abs() < 0.005, "{estimated} of {real}");
    }

    #[test]
    fn a_settled_mean_moves_by_the_length_of_prompts_and_never_more_than_half_of_the_way() {
        let after = |bytes| {
            let rates = TokenRates::default();
            rates.learn("m", 1 << 20, 1 << 18);
            rates.learn("m", bytes, bytes / 2);
            rates.get("m")
        };
        assert!(after(100) > 3.99 && after(100) < 4.0, "{}", after(100));
        assert!(after(26_000) > 3.6 && after(26_000) < 3.7, "{}", after(26_000));
        assert!((after(1 << 30) - 1.0 / 0.375).abs() < 1e-6, "{}", after(1 << 30));
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
