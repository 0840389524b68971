//! Whose turn it is, and the lightest of all with ties in turn.
//!
//! Stride scheduling: each worker has a moment at which it is due, the earliest is taken, and is due again after
//! its cost. Where costs are equal that is round robin, and it stays so for every set of candidates (those of one
//! model, those that are not busy), which a counter over a list does not.

use std::{collections::HashMap, sync::Arc};

use super::{burden, chance};
use crate::{
    routing::{Candidates, RouteInput},
    workers::Worker,
};

/// When each worker is due.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// By position in the fleet, as it was at the last call.
    due: Vec<(Arc<Worker>, f64)>,
}

impl Turns {
    /// Takes the one of `among` (candidates' positions) that is due; `None` only if there is none. Its next turn
    /// comes after its cost. `random` decides where a shard begins, so that shards start apart.
    pub(super) fn take(
        &mut self,
        random: u64,
        candidates: &Candidates<'_>,
        among: &[usize],
    ) -> Option<usize> {
        self.follow(random, candidates.fleet());
        let latest = among.iter().map(|&at| self.due[at].1).fold(0.0, f64::max);
        let dearest = among.iter().map(|&at| self.due[at].0.traits().cost).fold(0.0, f64::max);
        // Those that take turns are never further apart than this. Who is was not among them for a while, and
        // has no claim on what it missed.
        let earliest = latest - dearest;
        let due = |at: usize| self.due[at].1.max(earliest);
        // who has waited longest goes first among those without a claim; else the first in the list always would
        // where one of the others is far ahead by what another set of candidates has asked of it
        let waited = |at: usize| self.due[at].1;
        let earlier = |a: usize, b: usize| due(a).total_cmp(&due(b)).then(waited(a).total_cmp(&waited(b)));
        let chosen = among.iter().copied().min_by(|&a, &b| earlier(a, b))?;
        self.due[chosen].1 = due(chosen) + self.due[chosen].0.traits().cost;
        Some(chosen)
    }

    /// Takes over a changed fleet; who stays keeps its turn.
    fn follow(&mut self, random: u64, workers: &[Arc<Worker>]) {
        if same_workers(self.due.iter().map(|(worker, _)| worker), workers) {
            return;
        }
        let before: HashMap<usize, f64> =
            self.due.drain(..).map(|(worker, due)| (worker.id(), due)).collect();
        let first =
            |worker: &Worker| chance::unit(random ^ chance::mix(worker.id() as u64)) * worker.traits().cost;
        let due = |worker: &Worker| before.get(&worker.id()).copied().unwrap_or_else(|| first(worker));
        self.due = workers.iter().map(|worker| (worker.clone(), due(worker))).collect();
    }
}

/// Whether these are still the very workers of the fleet, in its order. The ones that are kept are alive, so no
/// other worker can be where they are.
pub(super) fn same_workers<'a>(
    kept: impl ExactSizeIterator<Item = &'a Arc<Worker>>,
    workers: &[Arc<Worker>],
) -> bool {
    kept.len() == workers.len() && kept.zip(workers).all(|(kept, worker)| Arc::ptr_eq(kept, worker))
}

/// The lightest of all; who ties takes turns.
#[derive(Debug, Default)]
pub(super) struct Lightest {
    /// Positions in the fleet; only kept for its memory.
    ties: Vec<usize>,
    turns: Turns,
}

impl Lightest {
    /// The candidate of which `weight` is the least; `None` only if there is none.
    pub(super) fn choose(
        &mut self,
        input: &RouteInput<'_>,
        candidates: &Candidates<'_>,
        weight: impl Fn(&Worker) -> f64,
    ) -> Option<usize> {
        let mut least = f64::INFINITY;
        self.ties.clear();
        // Other threads count meanwhile: each weight is taken once.
        for (position, worker) in candidates.iter() {
            let weight = weight(worker);
            if weight < least {
                least = weight;
                self.ties.clear();
            }
            if weight <= least {
                self.ties.push(position);
            }
        }
        self.turns.take(input.random, candidates, &self.ties)
    }

    /// The candidate with the fewest requests in flight, cost counted.
    pub(super) fn by_requests(
        &mut self,
        input: &RouteInput<'_>,
        candidates: &Candidates<'_>,
    ) -> Option<usize> {
        self.choose(input, candidates, burden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::policies::tests::{among, fleet, fleet_of_costs};

    #[test]
    fn two_sets_of_candidates_do_not_disturb_each_other() {
        let (fleet, mut turns) = (fleet(4), Turns::default());
        let mut counts = [0; 4];
        let mut take = |set: &[usize]| {
            let mut scratch = Vec::new();
            let candidates = among(&fleet, set, &mut scratch);
            counts[turns.take(7, &candidates, set).unwrap()] += 1;
        };
        for _ in 0..10 {
            take(&[0, 1]);
            take(&[2, 3]);
            take(&[0, 1]);
            take(&[0, 1]);
        }
        assert_eq!(counts, [15, 15, 5, 5]);
    }

    #[test]
    fn nobody_starves_beside_one_that_others_keep_busy() {
        let (fleet, mut turns) = (fleet(4), Turns::default());
        let mut counts = [0; 4];
        let mut take = |set: &[usize]| {
            let mut scratch = Vec::new();
            turns.take(7, &among(&fleet, set, &mut scratch), set).unwrap()
        };
        for _ in 0..30 {
            counts[take(&[0, 1, 2, 3])] += 1;
            (0..4).for_each(|_| _ = take(&[0]));
        }
        assert_eq!(counts, [0, 10, 10, 10]);
    }

    #[test]
    fn who_was_away_does_not_catch_up() {
        let (fleet, mut turns) = (fleet(3), Turns::default());
        let mut take = |set: &[usize]| {
            let mut scratch = Vec::new();
            turns.take(7, &among(&fleet, set, &mut scratch), set).unwrap()
        };
        for _ in 0..100 {
            assert_ne!(take(&[0, 1]), 2);
        }
        let back: Vec<usize> = (0..30).map(|_| take(&[0, 1, 2])).collect();
        let turns = back.iter().filter(|&&at| at == 2).count();
        assert!((10..=11).contains(&turns), "{back:?}");
    }

    #[test]
    fn the_dear_come_less_often_and_in_between() {
        let fleet = fleet_of_costs(&[1.0, 2.0, 4.0]);
        let (mut turns, mut scratch) = (Turns::default(), Vec::new());
        let candidates = among(&fleet, &[0, 1, 2], &mut scratch);
        let taken: Vec<usize> = (0..70).map(|_| turns.take(3, &candidates, &[0, 1, 2]).unwrap()).collect();
        let count = |range: &[usize], at| range.iter().filter(|&&taken| taken == at).count();
        assert_eq!([0, 1, 2].map(|at| count(&taken, at)), [40, 20, 10]);
        for seven in taken.chunks(7) {
            assert!((3..=5).contains(&count(seven, 0)), "not spread: {taken:?}");
        }
    }
}
