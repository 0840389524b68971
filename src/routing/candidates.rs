//! Which workers may be chosen for an attempt.

use std::sync::Arc;

use crate::{
    base::Millis,
    workers::{Fleet, Worker},
};

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

/// What candidates depend on besides the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The time of the choice.
    pub now: Millis,
    /// Chance: any 64 bits.
    pub random: u64,
    /// For so long a worker that came up is given less than the others; 0: not at all.
    pub slow_start_ms: u64,
    /// Whether the least bad stand in where nobody is left that should be used.
    pub panics: bool,
    /// On the worker at this position the request has a place already, so that one has room.
    pub place: Option<usize>,
}

impl Default for Terms {
    /// No slow start, and the least bad stand in.
    fn default() -> Self {
        Self { now: 0, random: 0, slow_start_ms: 0, panics: true, place: None }
    }
}

/// The workers that a policy may choose from.
#[derive(Debug)]
pub struct Candidates<'a> {
    workers: &'a [Arc<Worker>],
    /// In `workers`, ascending.
    positions: &'a [usize],
    /// Whether they only stand in.
    stand_in: bool,
    /// There would be candidates if they had not as many requests as they may.
    busy: bool,
}

/// Requests that wait in a worker from which on it is saturated, where its `/metrics` tell.
const SATURATED_WAITING: u32 = 8;

/// Requests in flight from which on a worker is saturated of which nothing is known.
const SATURATED_IN_FLIGHT: u32 = 256;

/// Share of the choices in which a worker that has just come up is a candidate.
const FIRST_SHARE: f64 = 0.1;

impl<'a> Candidates<'a> {
    /// Those of `serving` (positions in the fleet, ascending) that are up and have not been tried, whose breaker
    /// lets requests through, and who are awake; where none is left, those of them that were ejected for their probes.
    /// Where none of these is left either, the least bad stand in, unless the terms forbid it: who is up with an open
    /// breaker, then whoever is down. So the last worker is never taken out, and a wrong verdict about all of them
    /// costs one refused connect. Who sleeps or is paused never stands in: it would let the request wait for ever.
    ///
    /// Who has as many requests as it may is left out in any case: if all have there is no candidate, and
    /// [`Candidates::are_busy`]. Who has just refused or failed a request is left out while another has not.
    ///
    /// Of these only the workers of the highest priority, unless all of them are saturated; then those of the next
    /// one. Where everybody is saturated it is the highest priority again, and load decides. A worker is saturated
    /// when as many requests are in flight as it may have, others' included; where that is not told, when 8 requests
    /// wait in it; where neither is, when 256 are in flight.
    ///
    /// Of these a worker that came up lately is left out of some choices, ever fewer of them while it warms up, and
    /// only as far as another has been up for longer.
    ///
    /// `scratch` is where the positions are kept.
    pub fn of(
        fleet: &'a Fleet,
        serving: &[usize],
        tried: &Tried,
        terms: &Terms,
        scratch: &'a mut Vec<usize>,
    ) -> Self {
        let workers = &fleet.workers[..];
        let untried = || serving.iter().copied().filter(|&position| !tried.contains(position));
        scratch.clear();
        scratch.extend(untried().filter(|&position| workers[position].serves(terms.now)));
        if scratch.is_empty() {
            scratch.extend(untried().filter(|&position| workers[position].could_serve(terms.now)));
        }
        let stand_in = scratch.is_empty() && terms.panics;
        if stand_in {
            let awake = || untried().filter(|&position| !workers[position].rests());
            scratch.extend(awake().filter(|&position| workers[position].answers()));
            if scratch.is_empty() {
                scratch.extend(awake());
            }
        }
        let before = scratch.len();
        scratch.retain(|&position| !workers[position].is_full() || terms.place == Some(position));
        let busy = before > 0 && scratch.is_empty();
        forward(workers, scratch, terms.now);
        first_choice(workers, terms.place, scratch);
        if terms.slow_start_ms > 0 && fleet.has_newcomers(terms.now, terms.slow_start_ms) {
            warm_up(workers, scratch, terms);
        }
        Self { workers, positions: scratch, stand_in, busy }
    }

    /// Whether they only stand in for those that should be used, of whom none is left: their breakers have no say.
    pub fn stand_in(&self) -> bool {
        self.stand_in
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

/// Leaves out who is set back, unless all are.
fn forward(workers: &[Arc<Worker>], positions: &mut Vec<usize>, now: Millis) {
    let set_back = |position: &usize| workers[*position].is_set_back(now);
    if positions.iter().any(set_back) && !positions.iter().all(set_back) {
        positions.retain(|position| !set_back(position));
    }
}

/// Leaves out some of those that have been up for less than the longest, by chance.
fn warm_up(workers: &[Arc<Worker>], positions: &mut Vec<usize>, terms: &Terms) {
    let whole = terms.slow_start_ms as f64;
    let share = |position: usize| {
        let age = terms.now.saturating_sub(workers[position].up_since()) as f64;
        FIRST_SHARE + (1.0 - FIRST_SHARE) * (age / whole).min(1.0)
    };
    let most = positions.iter().map(|&position| share(position)).fold(0.0, f64::max);
    positions.retain(|&position| chance(terms.random, position) * most < share(position));
}

/// In 0..1, for each position another one (splitmix64).
fn chance(random: u64, position: usize) -> f64 {
    let mut bits = random.wrapping_add((position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ bits >> 31) >> 11) as f64 / (1_u64 << 53) as f64
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
        workers::{
            BreakerRules, Demand, EngineStats, Health, InFlight, ModelSettings, Registry, Rest, Traits,
        },
    };

    fn positions(fleet: &Fleet, tried: &Tried) -> Vec<usize> {
        positions_on(fleet, tried, &Terms::default())
    }

    fn positions_on(fleet: &Fleet, tried: &Tried, terms: &Terms) -> Vec<usize> {
        let mut scratch = Vec::new();
        let serving: Vec<usize> = (0..fleet.workers.len()).collect();
        Candidates::of(fleet, &serving, tried, terms, &mut scratch).positions().to_vec()
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
    fn who_is_set_back_is_chosen_when_nobody_else_is_left_or_its_time_is_over() {
        let fleet = fleet(3);
        let at = |now, tried: &Tried| positions_on(&fleet, tried, &Terms { now, ..Terms::default() });
        let none = Tried::none();
        fleet.workers[0].set_back(100);
        fleet.workers[0].set_back(50);
        assert_eq!((at(99, &none), at(100, &none)), (vec![1, 2], vec![0, 1, 2]));
        let mut tried = Tried::none();
        tried.add(1);
        tried.add(2);
        assert_eq!(at(99, &tried), [0], "it is no worse than nobody");
        fleet.workers[1].set_back(100);
        fleet.workers[2].set_back(100);
        assert_eq!(at(99, &none), [0, 1, 2], "all are alike");
    }

    #[test]
    fn candidates_are_found_by_position_and_by_number() {
        let (fleet, mut scratch) = (fleet(4), Vec::new());
        let candidates = Candidates::of(&fleet, &[1, 3], &Tried::none(), &Terms::default(), &mut scratch);
        assert_eq!((candidates.len(), candidates.positions()), (2, &[1, 3][..]));
        assert_eq!([0, 1, 2, 3, 4].map(|at| candidates.contains(at)), [false, true, false, true, false]);
        assert_eq!(candidates.get(1).map(|(position, worker)| (position, worker.id())), Some((3, 3)));
        assert!(candidates.get(2).is_none());
        let all = Candidates::of(&fleet, &[0, 1, 2, 3], &Tried::none(), &Terms::default(), &mut scratch);
        assert_eq!([0, 3, 4].map(|at| all.contains(at)), [true, true, false]);
    }

    #[test]
    fn u18_who_sleeps_or_is_paused_is_never_chosen() {
        let fleet = fleet(2);
        let stats = EngineStats { asleep: Some(true), ..EngineStats::default() };
        fleet.workers[0].engine().set(&stats, 0);
        assert_eq!(positions(&fleet, &Tried::none()), [1]);
        let mut tried = Tried::none();
        tried.add(1);
        assert!(positions(&fleet, &tried).is_empty(), "it does not stand in");
        fleet.workers[1].set_rest(Rest::Paused, true);
        assert!(positions(&fleet, &Tried::none()).is_empty());
        fleet.workers[1].set_rest(Rest::Paused, false);
        assert_eq!(positions(&fleet, &Tried::none()), [1]);
    }

    /// Opens the breaker of a worker at time 0.
    fn trip(worker: &Worker) {
        (0..BreakerRules::default().failures).for_each(|_| {
            worker.breaker().failed(0);
        });
        assert!(!worker.breaker().admits(0));
    }

    #[test]
    fn u22_the_least_bad_stand_in_unless_that_is_forbidden() {
        let fleet = fleet(4);
        let at = |now| Terms { now, ..Terms::default() };
        trip(&fleet.workers[0]);
        fleet.workers[1].set_health(Health::Ejected);
        fleet.workers[2].set_health(Health::Down);
        let mut tried = Tried::none();
        let mut scratch = Vec::new();
        let serving = [0, 1, 2, 3];
        let ordinary = Candidates::of(&fleet, &serving, &tried, &at(0), &mut scratch);
        assert_eq!((ordinary.positions(), ordinary.stand_in()), (&[3][..], false));
        tried.add(3);
        let strict = Terms { panics: false, ..at(0) };
        assert_eq!(positions_on(&fleet, &tried, &strict), [1], "to be ejected is no reason to refuse");
        tried.add(1);
        assert!(positions_on(&fleet, &tried, &strict).is_empty());
        let bad = Candidates::of(&fleet, &serving, &tried, &at(0), &mut scratch);
        assert_eq!((bad.positions(), bad.stand_in()), (&[0][..], true));
        tried.add(0);
        assert_eq!(positions_on(&fleet, &tried, &at(0)), [2], "then who is down");
        let mut tried = Tried::none();
        tried.add(3);
        tried.add(1);
        assert_eq!(
            positions_on(&fleet, &tried, &Terms { now: 60_000, ..strict }),
            [0],
            "its open time is over"
        );
    }

    /// How often of 10,000 choices each worker is a candidate.
    fn shares(fleet: &Fleet, now: Millis, slow_start_ms: u64) -> Vec<f64> {
        let mut counts = vec![0_u32; fleet.workers.len()];
        for random in 0..10_000_u64 {
            let random = random.wrapping_mul(0x2545_f491_4f6c_dd1d);
            let terms = Terms { now, random, slow_start_ms, ..Terms::default() };
            let chosen = positions_on(fleet, &Tried::none(), &terms);
            assert!(!chosen.is_empty());
            chosen.into_iter().for_each(|at| counts[at] += 1);
        }
        counts.into_iter().map(|count| f64::from(count) / 10_000.0).collect()
    }

    #[test]
    fn u21_who_came_up_is_a_candidate_ever_more_often() {
        let fleet = fleet(3);
        fleet.workers[0].came_up(0);
        fleet.workers[1].came_up(100_000);
        fleet.workers[2].came_up(115_000);
        assert_eq!(shares(&fleet, 115_000, 30_000), [1.0, 1.0, 1.0], "nobody was told of a newcomer");
        fleet.newcomer(115_000);
        let near = |now: Millis, wanted: [f64; 3]| {
            let got = shares(&fleet, now, 30_000);
            let close = got.iter().zip(wanted).all(|(got, wanted)| (got - wanted).abs() < 0.02);
            assert!(close, "{got:?}, not {wanted:?}");
        };
        near(115_000, [1.0, 0.55, 0.1]);
        near(130_000, [1.0, 1.0, 0.55]);
        near(145_000, [1.0, 1.0, 1.0]);
        assert_eq!(shares(&fleet, 115_000, 0), [1.0, 1.0, 1.0], "it is off");
    }

    #[test]
    fn u21_a_fleet_that_starts_together_is_not_thinned() {
        let fleet = fleet(2);
        fleet.workers.iter().for_each(|worker| worker.came_up(5));
        fleet.newcomer(5);
        assert_eq!(shares(&fleet, 5, 30_000), [1.0, 1.0]);
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
        let all = Candidates::of(
            &fleet,
            &[0, 1, 2, 3],
            &Tried::none(),
            &Terms { place: Some(2), ..Terms::default() },
            &mut scratch,
        );
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
        let all = Candidates::of(&fleet, &[0, 1], &Tried::none(), &Terms::default(), &mut scratch);
        assert!(all.is_empty() && all.are_busy());
        let mut with_place = |place| {
            let all = Candidates::of(
                &fleet,
                &[0, 1],
                &Tried::none(),
                &Terms { place: Some(place), ..Terms::default() },
                &mut scratch,
            );
            (all.positions().to_vec(), all.are_busy())
        };
        assert_eq!(with_place(1), (vec![1], false), "its place is taken for it");
        drop(one);
        assert_eq!(with_place(1), (vec![0, 1], false), "and the policy may choose another");
        assert_eq!(positions(&fleet, &Tried::none()), [0]);
        let nobody = Candidates::of(&fleet, &[], &Tried::none(), &Terms::default(), &mut scratch);
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
