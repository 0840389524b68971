//! Which workers may be chosen for an attempt.

use std::sync::Arc;

use crate::workers::{Fleet, Worker};

/// The workers that earlier attempts of an exchange have failed on.
#[derive(Debug, Clone, Default, Hash)]
pub struct Tried(Vec<usize>);

impl Tried {
    /// No attempt yet.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// The worker at `position` failed.
    pub fn add(&mut self, position: usize) {
        self.0.push(position);
    }

    /// Number of failed attempts.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether the worker at `position` failed.
    pub fn contains(&self, position: usize) -> bool {
        self.0.contains(&position)
    }
}

/// The workers that a policy may choose from.
#[derive(Debug)]
pub struct Candidates<'a> {
    workers: &'a [Arc<Worker>],
    /// In `workers`, ascending.
    positions: &'a [usize],
    /// There would be candidates if they had not as many requests as they may.
    busy: bool,
}

/// Requests that wait in a worker from which on it is saturated, where its `/metrics` tell.
const SATURATED_WAITING: u32 = 8;

/// Requests in flight from which on a worker is saturated of which nothing is known.
const SATURATED_IN_FLIGHT: u32 = 256;

impl<'a> Candidates<'a> {
    /// Those of `serving` (positions in the fleet, ascending) that are usable and have not been tried. Where none
    /// is left, the unusable ones stand in: the last worker is never taken out, and a wrong verdict about all of
    /// them costs one refused connect. Who sleeps is left out while another is awake, and who has as many requests as
    /// it may in any case: if all have there is no candidate, and [`Candidates::are_busy`].
    ///
    /// Of these only the workers of the highest priority, unless all of them are saturated; then those of the next
    /// one. Where everybody is saturated it is the highest priority again, and load decides. A worker is saturated
    /// when as many requests are in flight as it may have, others' included; where that is not told, when 8 requests
    /// wait in it; where neither is, when 256 are in flight.
    ///
    /// `scratch` is where the positions are kept.
    pub fn of(fleet: &'a Fleet, serving: &[usize], tried: &Tried, scratch: &'a mut Vec<usize>) -> Self {
        Self::with_place(fleet, serving, tried, None, scratch)
    }

    /// As [`Candidates::of`]; on the worker at `place` the request has a place already, so that one has room.
    pub fn with_place(
        fleet: &'a Fleet,
        serving: &[usize],
        tried: &Tried,
        place: Option<usize>,
        scratch: &'a mut Vec<usize>,
    ) -> Self {
        let workers = &fleet.workers[..];
        let untried = || serving.iter().copied().filter(|&position| !tried.contains(position));
        scratch.clear();
        scratch.extend(untried().filter(|&position| workers[position].usable()));
        if scratch.is_empty() {
            scratch.extend(untried());
        }
        awake(workers, scratch);
        let before = scratch.len();
        scratch.retain(|&position| !workers[position].is_full() || place == Some(position));
        let busy = before > 0 && scratch.is_empty();
        first_choice(workers, place, scratch);
        Self { workers, positions: scratch, busy }
    }

    /// Whether there is nobody to choose only because everybody has as many requests as it may.
    pub fn are_busy(&self) -> bool {
        self.busy
    }

    /// The candidates with their positions in the fleet, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &'a Worker)> {
        self.positions.iter().map(|&position| (position, &*self.workers[position]))
    }

    /// The candidate number `index`, of [`Candidates::len`], with its position in the fleet.
    pub fn get(&self, index: usize) -> Option<(usize, &'a Worker)> {
        self.positions.get(index).map(|&position| (position, &*self.workers[position]))
    }

    /// The candidates' positions in the fleet, ascending.
    pub fn positions(&self) -> &'a [usize] {
        self.positions
    }

    /// Whether the worker at this position in the fleet is a candidate.
    pub fn contains(&self, position: usize) -> bool {
        let all = self.positions.len() == self.workers.len();
        if all { position < self.workers.len() } else { self.positions.binary_search(&position).is_ok() }
    }

    /// Number of candidates.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there is nobody to choose.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// All workers of the fleet, candidates or not; positions are those in it.
    pub fn fleet(&self) -> &'a [Arc<Worker>] {
        self.workers
    }
}

/// Leaves out who sleeps, unless all do.
fn awake(workers: &[Arc<Worker>], positions: &mut Vec<usize>) {
    let asleep = |position: &usize| workers[*position].engine().asleep();
    if positions.iter().any(asleep) && !positions.iter().all(asleep) {
        positions.retain(|position| !asleep(position));
    }
}

/// Leaves those of the highest priority of which not all are saturated; if all are, those of the highest.
fn first_choice(workers: &[Arc<Worker>], place: Option<usize>, positions: &mut Vec<usize>) {
    let priority = |position: usize| workers[position].traits().priority;
    let Some(highest) = positions.iter().copied().map(priority).max() else { return };
    if positions.iter().all(|&position| priority(position) == highest) {
        return;
    }
    // that of the first worker which is not saturated, by priority
    let has_room = |position: usize| place == Some(position) || !saturated(&workers[position]);
    let free = positions.iter().copied().filter(|&position| has_room(position));
    let level = free.map(priority).max().unwrap_or(highest);
    positions.retain(|&position| priority(position) == level);
}

fn saturated(worker: &Worker) -> bool {
    let in_flight = worker.load().in_flight;
    match (worker.traits().max_concurrent_requests, worker.engine().waiting()) {
        (Some(most), _) => in_flight >= most,
        (None, Some(waiting)) => waiting >= SATURATED_WAITING,
        (None, None) => in_flight >= SATURATED_IN_FLIGHT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        routing::policies::tests::{fleet, fleet_of},
        workers::{Demand, EngineStats, Health, InFlight, ModelSettings, Registry, Traits},
    };

    fn positions(fleet: &Fleet, tried: &Tried) -> Vec<usize> {
        let mut scratch = Vec::new();
        let serving: Vec<usize> = (0..fleet.workers.len()).collect();
        Candidates::of(fleet, &serving, tried, &mut scratch).positions().to_vec()
    }

    fn begin(fleet: &Fleet, position: usize, count: usize) -> Vec<InFlight> {
        (0..count).map(|_| InFlight::begin(fleet.workers[position].clone(), Demand::default())).collect()
    }

    /// Two of priority 1 and two of priority 0; who is in between takes two requests.
    fn two_levels() -> Arc<Fleet> {
        let traits = |priority, most| Traits { priority, max_concurrent_requests: most, ..Traits::default() };
        fleet_of(&[traits(0, None), traits(1, Some(2)), traits(1, Some(2)), traits(0, None)])
    }

    #[test]
    fn the_unusable_stand_in_when_nobody_else_is_left() {
        let urls = ["http://a:1", "http://b:1", "http://c:1"].map(|url| url.parse().unwrap());
        let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
        let mut tried = Tried::none();
        assert_eq!(positions(&fleet, &tried), [0, 1, 2], "nothing is known of anybody");
        fleet.workers[1].set_health(Health::Up);
        fleet.workers[2].set_health(Health::Down);
        assert_eq!(positions(&fleet, &tried), [1]);
        tried.add(1);
        assert_eq!(positions(&fleet, &tried), [0, 2]);
        tried.add(0);
        tried.add(2);
        assert!(positions(&fleet, &tried).is_empty(), "nobody is tried twice");
    }

    #[test]
    fn candidates_are_found_by_position_and_by_number() {
        let (fleet, mut scratch) = (fleet(4), Vec::new());
        let candidates = Candidates::of(&fleet, &[1, 3], &Tried::none(), &mut scratch);
        assert_eq!((candidates.len(), candidates.positions()), (2, &[1, 3][..]));
        assert_eq!([0, 1, 2, 3, 4].map(|at| candidates.contains(at)), [false, true, false, true, false]);
        assert_eq!(candidates.get(1).map(|(position, worker)| (position, worker.id())), Some((3, 3)));
        assert!(candidates.get(2).is_none());
        let all = Candidates::of(&fleet, &[0, 1, 2, 3], &Tried::none(), &mut scratch);
        assert_eq!([0, 3, 4].map(|at| all.contains(at)), [true, true, false]);
    }

    #[test]
    fn who_sleeps_is_chosen_only_when_all_do() {
        let fleet = fleet(2);
        let sleep = |at: usize| {
            fleet.workers[at].engine().set(&EngineStats { asleep: Some(true), ..EngineStats::default() }, 0);
        };
        sleep(0);
        assert_eq!(positions(&fleet, &Tried::none()), [1]);
        let mut tried = Tried::none();
        tried.add(1);
        assert_eq!(positions(&fleet, &tried), [0]);
        sleep(1);
        assert_eq!(positions(&fleet, &Tried::none()), [0, 1]);
    }

    #[test]
    fn the_lower_priority_is_taken_when_all_of_the_higher_are_saturated() {
        let fleet = two_levels();
        let none = Tried::none();
        assert_eq!(positions(&fleet, &none), [1, 2]);
        let _one = begin(&fleet, 1, 2);
        assert_eq!(positions(&fleet, &none), [2], "the other is not saturated");
        let other = begin(&fleet, 2, 2);
        assert_eq!(positions(&fleet, &none), [0, 3]);
        let _low = (begin(&fleet, 0, 256), begin(&fleet, 3, 256));
        assert_eq!(positions(&fleet, &none), [0, 3], "who has as many as it may gets no more");
        drop(other);
        assert_eq!(positions(&fleet, &none), [2]);
    }

    #[test]
    fn a_place_on_a_worker_of_high_priority_is_not_given_away() {
        let fleet = two_levels();
        let (_one, _other) = (begin(&fleet, 1, 2), begin(&fleet, 2, 2));
        let mut scratch = Vec::new();
        let all = Candidates::with_place(&fleet, &[0, 1, 2, 3], &Tried::none(), Some(2), &mut scratch);
        assert_eq!(all.positions(), [2]);
    }

    #[test]
    fn load_decides_where_all_are_saturated_that_have_no_limit() {
        let level = |priority| Traits { priority, ..Traits::default() };
        let fleet = fleet_of(&[level(0), level(1)]);
        let _all = (begin(&fleet, 0, 256), begin(&fleet, 1, 256));
        assert_eq!(positions(&fleet, &Tried::none()), [1]);
    }

    #[test]
    fn where_all_have_as_many_as_they_may_there_is_nobody_until_one_ends() {
        let limited = Traits { max_concurrent_requests: Some(1), ..Traits::default() };
        let fleet = fleet_of(&[limited.clone(), limited]);
        let mut scratch = Vec::new();
        let one = begin(&fleet, 0, 1);
        assert_eq!(positions(&fleet, &Tried::none()), [1]);
        let _other = begin(&fleet, 1, 1);
        let all = Candidates::of(&fleet, &[0, 1], &Tried::none(), &mut scratch);
        assert!(all.is_empty() && all.are_busy());
        let mut with_place = |place| {
            let all = Candidates::with_place(&fleet, &[0, 1], &Tried::none(), Some(place), &mut scratch);
            (all.positions().to_vec(), all.are_busy())
        };
        assert_eq!(with_place(1), (vec![1], false), "its place is taken for it");
        drop(one);
        assert_eq!(with_place(1), (vec![0, 1], false), "and the policy may choose another");
        assert_eq!(positions(&fleet, &Tried::none()), [0]);
        let nobody = Candidates::of(&fleet, &[], &Tried::none(), &mut scratch);
        assert!(nobody.is_empty() && !nobody.are_busy());
    }

    #[test]
    fn the_lower_priority_is_taken_when_all_of_the_higher_are_down_or_tried() {
        let fleet = two_levels();
        let mut tried = Tried::none();
        fleet.workers[1].set_health(Health::Down);
        tried.add(2);
        assert_eq!(positions(&fleet, &tried), [0, 3]);
        fleet.workers[0].set_health(Health::Down);
        tried.add(3);
        assert_eq!(positions(&fleet, &tried), [1], "of those that stand in, too");
    }

    #[test]
    fn a_worker_with_a_queue_is_saturated_however_few_are_ours() {
        let level = |priority| Traits { priority, ..Traits::default() };
        let fleet = fleet_of(&[level(1), level(0)]);
        let waiting = |waiting| {
            let stats = EngineStats { waiting: Some(waiting), ..EngineStats::default() };
            fleet.workers[0].engine().set(&stats, 0);
            positions(&fleet, &Tried::none())
        };
        assert_eq!((waiting(7), waiting(8)), (vec![0], vec![1]));
    }
}
