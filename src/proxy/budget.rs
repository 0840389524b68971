//! How many further attempts may be made over all traffic, so that failing workers are not failed harder.
//!
//! One for all shards; it is touched only when another attempt is wanted that costs a worker anything.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::Millis;

/// Further attempts may be this share of the requests in flight: one in so many.
const ONE_IN: u64 = 5;

/// Beyond that share so many are let through per second, and so many at once.
const PER_SECOND: u64 = 3;
const BURST: u64 = 3;

/// The allowance is kept in parts of a millisecond, of which one attempt takes a thousand.
const COST: u64 = 1000;

/// The allowance of further attempts (`faults.md` §4): 20 % of the requests in flight, or else 3 per second.
#[derive(Debug, Default)]
pub struct Budget {
    /// Further attempts that run now.
    running: AtomicU64,
    /// When the allowance per second will be whole again, in milliseconds times [`PER_SECOND`].
    whole_at: AtomicU64,
}

impl Budget {
    /// A further attempt, if it may be made, until what is returned is dropped. `in_flight` counts the requests
    /// that run now, the one that asks included.
    pub(super) fn begin(&self, now: Millis, in_flight: u64) -> Option<Spent<'_>> {
        let running = self.running.fetch_add(1, Ordering::Relaxed) + 1;
        let spent = Spent(self);
        // dropped, and so given back, where neither allows it
        (running.saturating_mul(ONE_IN) <= in_flight || self.take(now)).then_some(spent)
    }

    /// Further attempts that run now.
    #[cfg(test)]
    pub(crate) fn running(&self) -> u64 {
        self.running.load(Ordering::Relaxed)
    }

    /// Takes one of those that are allowed per second.
    fn take(&self, now: Millis) -> bool {
        let now = now.saturating_mul(PER_SECOND);
        let taken = self.whole_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |whole_at| {
            let next = whole_at.max(now) + COST;
            (next - now <= BURST * COST).then_some(next)
        });
        taken.is_ok()
    }
}

/// A further attempt that runs.
#[derive(Debug)]
pub(super) struct Spent<'a>(&'a Budget);

impl Drop for Spent<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_five_requests_may_be_tried_again() {
        let budget = Budget::default();
        let some: Vec<_> = (0..4).map(|_| budget.begin(0, 20)).collect();
        assert!(some.iter().all(Option::is_some));
        assert_eq!(budget.whole_at.load(Ordering::Relaxed), 0, "the allowance per second was not touched");
        let beyond: Vec<_> = (0..4).map(|_| budget.begin(0, 20)).collect();
        assert_eq!(beyond.iter().flatten().count(), 3, "the burst, and no more");
        drop((some, beyond));
        assert_eq!(budget.running.load(Ordering::Relaxed), 0);
        assert!(budget.begin(0, 20).is_some(), "who has ended makes room");
    }

    #[test]
    fn a_lonely_request_is_tried_again_three_times_a_second() {
        let budget = Budget::default();
        let mut made = 0;
        for now in 0..10_000 {
            made += usize::from(budget.begin(now, 1).is_some());
        }
        // the burst, and then three for each second
        assert_eq!(made, 3 + 29);
    }

    #[test]
    fn a_refusal_costs_nothing() {
        let budget = Budget::default();
        for _ in 0..1000 {
            drop(budget.begin(5, 0));
        }
        assert_eq!(budget.running.load(Ordering::Relaxed), 0);
        assert!(budget.begin(5 + 333, 0).is_none(), "a third of a second is not over yet");
        assert!(budget.begin(5 + 334, 0).is_some());
    }

    #[test]
    fn threads_do_not_overdraw_it() {
        let budget = Budget::default();
        let mut spent: Vec<Spent<'_>> = std::thread::scope(|scope| {
            let spend = || (0..200).filter_map(|_| budget.begin(0, 50)).collect::<Vec<_>>();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(spend)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        // those that were refused while they were counted may have kept others out
        assert!(spent.len() <= 10 + 3, "{}", spent.len());
        while let Some(more) = budget.begin(0, 50) {
            spent.push(more);
        }
        assert_eq!(spent.len(), 10 + 3);
    }
}
