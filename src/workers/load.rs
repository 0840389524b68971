//! What runs on a worker now, counted by whoever sends it something.
//!
//! Our own figures are exact and of this moment. Other proxies tell theirs through Redis, a fraction of a second late.
//! What anybody else sends to the worker is only seen through its `/metrics`, seconds late: it corrects the sum and
//! never leads it.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use crate::workers::Worker;

/// What a request asks of a worker, in tokens, as far as could be told when the worker was chosen. All zero
/// where the policy does not look at prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Those of them that the worker is believed not to hold in its prefix cache.
    pub uncached_tokens: u64,
    /// What computing these takes, in tokens at the beginning of a prompt: further behind they cost more.
    pub work_tokens: u64,
    /// Tokens of the prompt that the worker is certain to share, and up to where it may.
    pub shared_tokens: (u64, u64),
}

impl Demand {
    /// Tokens of a prompt that all cost the same.
    pub fn new(prompt_tokens: u64, uncached_tokens: u64) -> Self {
        Self { prompt_tokens, uncached_tokens, work_tokens: uncached_tokens, shared_tokens: (0, 0) }
    }

    /// Tokens that are believed to be in the worker's prefix cache.
    pub fn cached_tokens(&self) -> u64 {
        self.prompt_tokens.saturating_sub(self.uncached_tokens)
    }
}

impl Load {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            in_flight: self.in_flight.saturating_add(other.in_flight),
            queued_tokens: self.queued_tokens.saturating_add(other.queued_tokens),
            decode_tokens: self.decode_tokens.saturating_add(other.decode_tokens),
        }
    }
}

/// What runs on a worker at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests: ours, those that other proxies tell of, and what the worker's own figures say of everybody else's.
    pub in_flight: u32,
    /// Work of requests that have not had their first token, in tokens; see [`Demand::work_tokens`].
    pub queued_tokens: u64,
    /// Prompt tokens of requests that have.
    pub decode_tokens: u64,
}

/// The counters behind a [`Load`].
#[derive(Debug, Default)]
pub(super) struct Cells {
    in_flight: AtomicU32,
    queued_tokens: AtomicU64,
    decode_tokens: AtomicU64,
    /// The same of other proxies, as they tell it; written by the sync thread only.
    peers_in_flight: AtomicU32,
    peers_queued_tokens: AtomicU64,
    peers_decode_tokens: AtomicU64,
}

impl Cells {
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Our own requests only.
    pub(super) fn own(&self) -> Load {
        Load {
            in_flight: self.in_flight(),
            queued_tokens: self.queued_tokens.load(Ordering::Relaxed),
            decode_tokens: self.decode_tokens.load(Ordering::Relaxed),
        }
    }

    /// Those of other proxies.
    pub(super) fn peers(&self) -> Load {
        Load {
            in_flight: self.peers_in_flight.load(Ordering::Relaxed),
            queued_tokens: self.peers_queued_tokens.load(Ordering::Relaxed),
            decode_tokens: self.peers_decode_tokens.load(Ordering::Relaxed),
        }
    }

    pub(super) fn set_peers(&self, load: Load) {
        self.peers_in_flight.store(load.in_flight, Ordering::Relaxed);
        self.peers_queued_tokens.store(load.queued_tokens, Ordering::Relaxed);
        self.peers_decode_tokens.store(load.decode_tokens, Ordering::Relaxed);
    }
}

/// One request in flight on a worker, until dropped. The only place where its counts go down.
#[derive(Debug)]
pub struct InFlight {
    worker: Arc<Worker>,
    demand: Demand,
    decoding: bool,
}

impl InFlight {
    /// Counts one request more on `worker`, whatever its limit; its work is queued there from now on.
    pub fn begin(worker: Arc<Worker>, demand: Demand) -> Self {
        worker.cells().in_flight.fetch_add(1, Ordering::Relaxed);
        let mut begun = Self { worker, demand: Demand::default(), decoding: false };
        begun.asks(demand);
        begun
    }

    /// As [`InFlight::begin`], if `worker` has room for one more: never is a request of this kind one too many,
    /// however many shards try.
    pub fn try_begin(worker: &Arc<Worker>, demand: Demand) -> Option<Self> {
        if worker.traits().max_concurrent_requests.is_none() {
            return Some(Self::begin(worker.clone(), demand));
        }
        let mut begun = Self::reserve(worker)?;
        begun.asks(demand);
        Some(begun)
    }

    /// Takes a place on `worker` for a request of which it is not known yet what it asks, if there is room for one
    /// more.
    pub fn reserve(worker: &Arc<Worker>) -> Option<Self> {
        let most = worker.traits().max_concurrent_requests.unwrap_or(u32::MAX);
        let one_more = |count: u32| (count < most).then(|| count + 1);
        let cells = worker.cells();
        // both orders are for those who wait for room: see `admission`
        cells.in_flight.fetch_update(Ordering::SeqCst, Ordering::Relaxed, one_more).ok()?;
        Some(Self { worker: worker.clone(), demand: Demand::default(), decoding: false })
    }

    /// Says what a request asks that has a place already, before it is sent; once.
    pub fn asks(&mut self, demand: Demand) {
        debug_assert_eq!(self.demand, Demand::default(), "a request says once what it asks");
        if demand.work_tokens > 0 {
            self.worker.cells().queued_tokens.fetch_add(demand.work_tokens, Ordering::Relaxed);
        }
        self.worker.counters().attempts.fetch_add(1, Ordering::Relaxed);
        self.demand = demand;
    }

    /// It is sent to the same worker once more.
    pub fn again(&self) {
        self.worker.counters().attempts.fetch_add(1, Ordering::Relaxed);
    }

    /// The first token has come: its prompt is not queued any more. Further calls do nothing.
    pub fn first_token(&mut self) {
        if std::mem::replace(&mut self.decoding, true) || self.demand == Demand::default() {
            return;
        }
        let cells = self.worker.cells();
        cells.queued_tokens.fetch_sub(self.demand.work_tokens, Ordering::Relaxed);
        cells.decode_tokens.fetch_add(self.demand.prompt_tokens, Ordering::Relaxed);
    }

    /// The worker it runs on.
    pub fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// What it was expected to ask of the worker.
    pub fn demand(&self) -> Demand {
        self.demand
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let cells = self.worker.cells();
        let before = cells.in_flight.fetch_sub(1, Ordering::Relaxed);
        debug_assert!(before > 0, "a request ended on a worker where none was in flight");
        if self.demand == Demand::default() {
            return;
        }
        let (cell, tokens) = if self.decoding {
            (&cells.decode_tokens, self.demand.prompt_tokens)
        } else {
            (&cells.queued_tokens, self.demand.work_tokens)
        };
        let before = cell.fetch_sub(tokens, Ordering::Relaxed);
        debug_assert!(before >= tokens, "a worker's tokens fell below zero");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: Demand =
        Demand { prompt_tokens: 100, uncached_tokens: 30, work_tokens: 30, shared_tokens: (0, 0) };

    #[test]
    fn everything_ends_with_the_guard() {
        let worker = Arc::new(Worker::new(0, "http://a:1".parse().unwrap()));
        let (one, mut two) =
            (InFlight::begin(worker.clone(), DEMAND), InFlight::begin(worker.clone(), DEMAND));
        two.first_token();
        two.first_token();
        assert_eq!(worker.load(), Load { in_flight: 2, queued_tokens: 30, decode_tokens: 100 });
        drop(one);
        assert_eq!(worker.load(), Load { in_flight: 1, queued_tokens: 0, decode_tokens: 100 });
        drop(two);
        assert_eq!(worker.load(), Load::default());
    }

    #[test]
    fn a_limit_holds_however_many_threads_try() {
        let spec = "http://a:1#max_concurrent_requests=3".parse().unwrap();
        let worker = Arc::new(Worker::new(0, spec));
        let begun = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let Some(_in_flight) = InFlight::try_begin(&worker, DEMAND) else { continue };
                        begun.fetch_add(1, Ordering::Relaxed);
                        assert!(worker.in_flight() <= 3, "{}", worker.in_flight());
                    }
                });
            }
        });
        assert!(begun.into_inner() >= 2000, "one thread alone always has room");
        assert_eq!(worker.load(), Load::default());
        let places: Vec<_> = (0..5).filter_map(|_| InFlight::reserve(&worker)).collect();
        assert_eq!((places.len(), worker.is_full()), (3, true));
        assert!(InFlight::try_begin(&worker, DEMAND).is_none());
        let _forced = InFlight::begin(worker.clone(), DEMAND);
        assert_eq!(worker.in_flight(), 4, "what has to go to this worker goes");
    }

    #[test]
    fn what_a_place_is_taken_for_is_said_later() {
        let worker = Arc::new(Worker::new(0, "http://a:1".parse().unwrap()));
        let mut place = InFlight::reserve(&worker).unwrap();
        assert_eq!(worker.load(), Load { in_flight: 1, ..Load::default() });
        assert_eq!(worker.counters().attempts.load(Ordering::Relaxed), 0);
        place.asks(DEMAND);
        assert_eq!(worker.load(), Load { in_flight: 1, queued_tokens: 30, decode_tokens: 0 });
        assert_eq!(worker.counters().attempts.load(Ordering::Relaxed), 1);
        drop(place);
        assert_eq!(worker.load(), Load::default());
    }

    #[test]
    fn a_request_of_unknown_demand_is_counted_as_one() {
        let worker = Arc::new(Worker::new(0, "http://a:1".parse().unwrap()));
        let mut guard = InFlight::begin(worker.clone(), Demand::default());
        guard.first_token();
        assert_eq!(worker.load(), Load { in_flight: 1, ..Load::default() });
    }
}
