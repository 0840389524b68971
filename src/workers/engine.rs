//! What a worker says of itself in its `/metrics`, some seconds late.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// What was read of a worker's `/metrics` at one moment; summed over its engines. `None`: not told.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Requests that are being computed.
    pub running: Option<u32>,
    /// Requests that wait for it.
    pub waiting: Option<u32>,
    /// Share of the KV cache in use, 0 to 1; the highest of its engines.
    pub kv_usage: Option<f64>,
    /// Tokens that the KV cache holds.
    pub cache_tokens: Option<u64>,
    /// Tokens of a block: only whole blocks are cached.
    pub block_tokens: Option<u32>,
    /// Whether it sleeps.
    pub asleep: Option<bool>,
}

/// The newest [`EngineStats`], for every thread to read.
#[derive(Debug, Default)]
pub struct Engine {
    /// All of them hold the figure plus one; 0 stands for unknown.
    running: AtomicU32,
    waiting: AtomicU32,
    kv_usage_ppm: AtomicU32,
    cache_tokens: AtomicU64,
    block_tokens: AtomicU32,
    /// 0: not told, 1: awake, 2: asleep.
    asleep: AtomicU8,
    foreign: AtomicU32,
}

impl Engine {
    /// Takes over what was read. `foreign`: requests on the worker that are not ours, which the caller has made
    /// sure of.
    pub fn set(&self, stats: &EngineStats, foreign: u32) {
        let plus_one = |figure: Option<u32>| figure.map_or(0, |figure| figure.saturating_add(1));
        self.running.store(plus_one(stats.running), Ordering::Relaxed);
        self.waiting.store(plus_one(stats.waiting), Ordering::Relaxed);
        let ppm = stats.kv_usage.map(|share| (share.clamp(0.0, 1.0) * 1e6) as u32);
        self.kv_usage_ppm.store(plus_one(ppm), Ordering::Relaxed);
        // what the cache is made of does not change while the worker runs, so a gap keeps it
        if let Some(tokens) = stats.cache_tokens {
            self.cache_tokens.store(tokens.saturating_add(1), Ordering::Relaxed);
        }
        if let Some(tokens) = stats.block_tokens {
            self.block_tokens.store(tokens.saturating_add(1), Ordering::Relaxed);
        }
        self.asleep.store(stats.asleep.map_or(0, |asleep| u8::from(asleep) + 1), Ordering::Relaxed);
        self.foreign.store(foreign, Ordering::Relaxed);
    }

    /// Takes over what an answer's head says beside it (ORCA), which is younger than the last [`Engine::set`].
    pub fn set_waiting(&self, waiting: u32, kv_usage: f64) {
        self.waiting.store(waiting.saturating_add(1), Ordering::Relaxed);
        self.kv_usage_ppm.store((kv_usage.clamp(0.0, 1.0) * 1e6) as u32 + 1, Ordering::Relaxed);
    }

    /// Requests that are being computed.
    pub fn running(&self) -> Option<u32> {
        self.running.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Requests that wait in the worker.
    pub fn waiting(&self) -> Option<u32> {
        self.waiting.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Share of the KV cache in use, 0 to 1.
    pub fn kv_usage(&self) -> Option<f64> {
        self.kv_usage_ppm.load(Ordering::Relaxed).checked_sub(1).map(|ppm| f64::from(ppm) / 1e6)
    }

    /// Tokens that the KV cache holds.
    pub fn cache_tokens(&self) -> Option<u64> {
        self.cache_tokens.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Tokens of a block of the KV cache.
    pub fn block_tokens(&self) -> Option<u32> {
        self.block_tokens.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Whether it sleeps.
    pub fn asleep(&self) -> bool {
        self.asleep.load(Ordering::Relaxed) == 2
    }

    /// Whether it says if it sleeps.
    pub fn tells_sleep(&self) -> bool {
        self.asleep.load(Ordering::Relaxed) != 0
    }

    /// Requests on the worker that did not come through us.
    pub fn foreign(&self) -> u32 {
        self.foreign.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_told_is_unknown_and_a_cache_does_not_change_its_size() {
        let engine = Engine::default();
        assert_eq!((engine.running(), engine.kv_usage(), engine.cache_tokens()), (None, None, None));
        let stats = EngineStats {
            running: Some(0),
            waiting: Some(3),
            kv_usage: Some(0.5),
            cache_tokens: Some(4096),
            block_tokens: Some(16),
            asleep: Some(true),
        };
        engine.set(&stats, 2);
        assert_eq!((engine.running(), engine.waiting(), engine.foreign()), (Some(0), Some(3), 2));
        assert_eq!((engine.kv_usage(), engine.asleep()), (Some(0.5), true));
        engine.set_waiting(7, 2.0);
        assert_eq!((engine.running(), engine.waiting()), (Some(0), Some(7)), "only what it speaks of");
        assert_eq!((engine.kv_usage(), engine.cache_tokens()), (Some(1.0), Some(4096)));
        engine.set(&EngineStats::default(), 0);
        assert_eq!(
            (engine.running(), engine.cache_tokens(), engine.block_tokens()),
            (None, Some(4096), Some(16))
        );
    }
}
