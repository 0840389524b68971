//! How many tokens of prompts the prefix cache of each worker holds.
//!
//! A worker tells it in its `/metrics`; where it does not, the operator's word counts. Both may be off: the cache
//! is shared with requests that run, with speculative decoding, with others' traffic. What answers report as cached
//! corrects it, a little with every surprise, and shows when a cache was emptied without our knowledge.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::workers::{Demand, Worker};

/// Change with every surprise. What is there although nobody believed it is seldom seen, because requests for it go
/// elsewhere; so one such report weighs more.
const SHRINK: f64 = 0.99;
const GROW: f64 = 1.03;

/// How far reports may correct a size that the worker told, and one that was guessed. Too large a size costs little
/// and too small a one much (`routing.md` §4.4), and a miss has other causes than the size, so what was told is
/// never made smaller: with that a busy fleet took 1.5 times the oracle's time instead of 1.2 (replay, `mix` at 90 %).
const TOLD: (f64, f64) = (1.0, 2.0);
const GUESSED: (f64, f64) = (0.5, 10.0);

/// A report that differs by less than this share of the prompt is no surprise: chunks are no blocks, and the
/// tokens of a prompt are an estimate.
const SURPRISE: f64 = 0.25;

/// After so many reports in a row of less than a quarter of what was predicted the cache is taken for lost.
const LOST_AFTER: u32 = 3;

/// Predictions below this, in tokens, are too small to conclude from.
const LEAST_TOKENS: u64 = 512;

/// The sizes, by [`Worker::id`]; shared by all shards.
#[derive(Debug)]
pub struct CacheSizes {
    guess_tokens: u64,
    cells: Box<[Cell]>,
}

#[derive(Debug)]
struct Cell {
    /// The bits of an f32 that the size is multiplied by. Of two changes at once one may be lost.
    factor: AtomicU32,
    /// Reports in a row that were far below what was predicted.
    misses: AtomicU32,
    /// [`Worker::cache_generation`] when something was reported last.
    generation: AtomicU32,
    /// Reports to come from requests that were chosen before the cache was lost: they say nothing of what came after.
    stale: AtomicU32,
}

impl CacheSizes {
    /// Sizes of so many workers, each `guess_tokens` until it tells more.
    pub fn new(guess_tokens: u64, workers: usize) -> Self {
        let cell = || Cell {
            factor: AtomicU32::new(1.0_f32.to_bits()),
            misses: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            stale: AtomicU32::new(0),
        };
        Self { guess_tokens, cells: (0..workers).map(|_| cell()).collect() }
    }

    /// Tokens of prompts that the worker's prefix cache holds; 0: it has none.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive factor near 1")]
    pub fn tokens(&self, worker: &Worker) -> u64 {
        let tokens = worker.engine().cache_tokens().unwrap_or(self.guess_tokens);
        match self.cells.get(worker.id()) {
            Some(cell) => (tokens as f64 * f64::from(factor(cell))) as u64,
            None => tokens,
        }
    }

    /// Takes in how many tokens the worker found in its cache for a request of this `demand`. True: by now it is
    /// clear that the cache was lost.
    pub fn reported(&self, worker: &Worker, demand: Demand, cached_tokens: u64) -> bool {
        let Some(cell) = self.cells.get(worker.id()) else { return false };
        let generation = worker.cache_generation();
        if cell.generation.swap(generation, Ordering::Relaxed) != generation {
            cell.stale.store(worker.in_flight(), Ordering::Relaxed);
            cell.misses.store(0, Ordering::Relaxed);
        }
        let fewer = |stale: u32| stale.checked_sub(1);
        if cell.stale.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok() {
            return false;
        }
        let predicted = demand.cached_tokens();
        let surprise = (cached_tokens as f64 - predicted as f64) / demand.prompt_tokens.max(1) as f64;
        let (least, most) = if worker.engine().cache_tokens().is_some() { TOLD } else { GUESSED };
        if surprise.abs() > SURPRISE {
            let step = if surprise > 0.0 { GROW } else { SHRINK };
            let factor = (f64::from(factor(cell)) * step).clamp(least, most);
            #[expect(clippy::cast_possible_truncation, reason = "half of the digits will do")]
            cell.factor.store((factor as f32).to_bits(), Ordering::Relaxed);
        }
        if predicted < LEAST_TOKENS {
            return false;
        }
        if cached_tokens >= predicted / 4 {
            cell.misses.store(0, Ordering::Relaxed);
            return false;
        }
        if cell.misses.fetch_add(1, Ordering::Relaxed) + 1 < LOST_AFTER {
            return false;
        }
        cell.misses.store(0, Ordering::Relaxed);
        true
    }
}

fn factor(cell: &Cell) -> f32 {
    f32::from_bits(cell.factor.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::EngineStats;

    const HIT: Demand =
        Demand { prompt_tokens: 10_000, uncached_tokens: 2_000, work_tokens: 2_000, shared_tokens: (0, 0) };

    fn worker() -> Worker {
        Worker::new(0, "http://a:1".parse().unwrap())
    }

    fn tell(worker: &Worker, tokens: u64) {
        worker.engine().set(&EngineStats { cache_tokens: Some(tokens), ..EngineStats::default() }, 0);
    }

    #[test]
    fn what_the_worker_tells_wins_over_the_guess() {
        let (sizes, worker) = (CacheSizes::new(500, 1), worker());
        assert_eq!(sizes.tokens(&worker), 500);
        tell(&worker, 9_000);
        assert_eq!(sizes.tokens(&worker), 9_000);
        let stranger = Worker::new(7, "http://b:1".parse().unwrap());
        assert_eq!(sizes.tokens(&stranger), 500, "one that is in no table has the guess");
        assert!(!sizes.reported(&stranger, HIT, 0));
    }

    #[test]
    fn reports_correct_a_guess_far_and_a_told_size_little() {
        let (sizes, worker) = (CacheSizes::new(1_000_000, 1), worker());
        for _ in 0..1000 {
            sizes.reported(&worker, Demand::new(10_000, 10_000), 9_000);
        }
        assert_eq!(sizes.tokens(&worker), 10_000_000, "everything is found although little was expected");
        tell(&worker, 1_000_000);
        sizes.reported(&worker, HIT, 0);
        assert_eq!(sizes.tokens(&worker), 2_000_000);
        for _ in 0..1000 {
            sizes.reported(&worker, HIT, 0);
        }
        assert_eq!(sizes.tokens(&worker), 1_000_000, "it is never taken for less than it told");
    }

    #[test]
    fn what_was_predicted_changes_nothing() {
        let (sizes, worker) = (CacheSizes::new(1_000_000, 1), worker());
        for cached in [8_000, 7_000, 10_000] {
            assert!(!sizes.reported(&worker, HIT, cached));
        }
        assert_eq!(sizes.tokens(&worker), 1_000_000);
    }

    #[test]
    fn three_misses_in_a_row_mean_a_lost_cache() {
        let (sizes, worker) = (CacheSizes::new(1_000_000, 1), worker());
        let told = [0, 0, 8_000, 0, 0, 0, 0].map(|cached| sizes.reported(&worker, HIT, cached));
        assert_eq!(told, [false, false, false, false, false, true, false]);
        let small = Demand::new(400, 0);
        assert!((0..10).all(|_| !sizes.reported(&worker, small, 0)), "too small to conclude from");
    }
}
