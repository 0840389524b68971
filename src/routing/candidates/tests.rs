use super::*;
use crate::{
    routing::policies::tests::{fleet, fleet_of},
    workers::{BreakerRules, Demand, EngineStats, Health, InFlight, ModelSettings, Registry, Rest, Traits},
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
    assert_eq!(positions_on(&fleet, &tried, &Terms { now: 60_000, ..strict }), [0], "its open time is over");
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
