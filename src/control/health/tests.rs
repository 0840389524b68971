use super::*;
use crate::workers::{Learnt, ModelSettings, Registry};
use Health::{Down, Ejected, Unknown, Up};

const INTERVAL: u64 = 5_000;
const LATE_PROBES: u32 = 3;
const RULES: Rules = Rules {
    interval_ms: INTERVAL,
    late_probes: LATE_PROBES,
    good_probes: 1,
    window: 10,
    min_success_rate: 0.8,
    max_response_ms: 10_000,
};
/// No jitter.
const MIDDLE: f64 = 0.5;

fn probe(verdict: Verdict) -> Probe {
    Probe { verdict, took_ms: 1, busy: false }
}

/// A worker that has been up since time 0 and was probed then.
fn up() -> Watch {
    let mut watch = Watch::new(RULES, 0);
    assert_eq!(watch.probed(0, Unknown, Unknown, probe(Verdict::Good), MIDDLE), Change::Up);
    watch
}

#[test]
fn a_new_worker_is_probed_at_once_and_up_after_a_good_probe() {
    let mut watch = Watch::new(RULES, 7);
    assert_eq!(watch.due(7, Unknown), Due::Probe);
    assert_eq!(watch.probed(9, Unknown, Unknown, probe(Verdict::Good), MIDDLE), Change::Up);
    assert_eq!(watch.due(9, Up), Due::Wait(INTERVAL));
    assert_eq!(watch.due(9 + INTERVAL, Up), Due::Probe);
    assert_eq!(watch.probed(9 + INTERVAL, Up, Up, probe(Verdict::Good), MIDDLE), Change::None);
}

#[test]
fn a_new_worker_that_does_not_answer_is_down() {
    for (verdict, reason) in [(Bad, Ejection::Probe), (Late, Ejection::LateProbes)] {
        let mut watch = Watch::new(RULES, 0);
        assert_eq!(watch.probed(1, Unknown, Unknown, probe(verdict), MIDDLE), Change::Down(reason));
        assert_eq!(watch.due(1, Down), Due::Wait(RETRY_MS));
    }
}

#[test]
fn a_bad_probe_takes_a_worker_out_at_once() {
    let mut watch = up();
    assert_eq!(watch.probed(INTERVAL, Up, Up, probe(Verdict::Bad), MIDDLE), Change::Down(Ejection::Probe));
    assert_eq!(watch.due(INTERVAL, Down), Due::Wait(RETRY_MS));
}

#[test]
fn p4_a_probe_that_cannot_be_made_says_nothing() {
    let mut watch = up();
    for round in 0..100 {
        let now = INTERVAL + round * RETRY_MS;
        assert_eq!(watch.due(now, Up), Due::Probe);
        watch.skipped(now);
        assert_eq!(watch.due(now, Up), Due::Wait(RETRY_MS));
    }
    assert_eq!(watch.advice(INTERVAL), None);
    assert_eq!(
        watch.probed(99_999, Up, Up, probe(Verdict::Late), MIDDLE),
        Change::None,
        "the first late one"
    );
}

#[test]
fn busy_is_not_dead_until_it_was_late_three_times_in_a_row() {
    let mut watch = up();
    assert_eq!(watch.probed(1, Up, Up, probe(Verdict::Late), MIDDLE), Change::None);
    assert_eq!(watch.probed(2, Up, Up, probe(Verdict::Late), MIDDLE), Change::None);
    assert_eq!(watch.probed(3, Up, Up, probe(Verdict::Good), MIDDLE), Change::None);
    assert_eq!(watch.probed(4, Up, Up, probe(Verdict::Late), MIDDLE), Change::None);
    assert_eq!(watch.probed(5, Up, Up, probe(Verdict::Late), MIDDLE), Change::None);
    assert_eq!(watch.probed(6, Up, Up, probe(Verdict::Late), MIDDLE), Change::Down(Ejection::LateProbes));
    assert_eq!(watch.probed(7, Down, Down, probe(Verdict::Late), MIDDLE), Change::None);
    assert_eq!(watch.probed(8, Down, Down, probe(Verdict::Good), MIDDLE), Change::Up);
}

#[test]
fn a_worker_that_stays_down_is_probed_ever_more_slowly_up_to_the_interval() {
    let mut watch = up();
    let mut now = INTERVAL;
    let mut pauses = Vec::new();
    let mut health = Up;
    for _ in 0..7 {
        watch.probed(now, health, health, probe(Verdict::Bad), MIDDLE);
        health = Down;
        let Due::Wait(pause) = watch.due(now, Down) else { panic!("no pause") };
        pauses.push(pause);
        now += pause;
        assert_eq!(watch.due(now, Down), Due::Probe);
    }
    assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000]);
}

#[test]
fn what_a_shard_took_out_is_told_once_and_probed_soon() {
    let mut watch = up();
    let now = INTERVAL - 1_000;
    assert_eq!(watch.due(now, Down), Due::TakenOut);
    assert_eq!(watch.due(now, Down), Due::Wait(RETRY_MS));
    assert_eq!(watch.due(now + RETRY_MS, Down), Due::Probe);
    assert_eq!(watch.probed(now + RETRY_MS, Down, Down, probe(Verdict::Good), MIDDLE), Change::Up);
}

#[test]
fn a_probe_that_began_before_a_shards_error_proves_nothing() {
    let mut watch = up();
    assert_eq!(watch.due(INTERVAL, Up), Due::Probe);
    assert_eq!(watch.probed(INTERVAL + 5, Up, Down, probe(Verdict::Good), MIDDLE), Change::None);
    assert_eq!(watch.due(INTERVAL + 5, Down), Due::TakenOut);
    assert_eq!(watch.due(INTERVAL + 5, Down), Due::Wait(RETRY_MS));
}

#[test]
fn flapping_lengthens_the_pauses_and_an_interval_of_peace_shortens_them() {
    let mut watch = up();
    assert_eq!(watch.due(INTERVAL, Down), Due::TakenOut);
    let mut now = INTERVAL + RETRY_MS;
    assert_eq!(watch.probed(now, Down, Down, probe(Verdict::Good), MIDDLE), Change::Up);
    now += 10;
    assert_eq!(watch.due(now, Down), Due::TakenOut);
    assert_eq!(watch.due(now, Down), Due::Wait(2 * RETRY_MS), "it was up for 10 ms only");
    now += 2 * RETRY_MS;
    assert_eq!(watch.probed(now, Down, Down, probe(Verdict::Good), MIDDLE), Change::Up);
    now += INTERVAL;
    assert_eq!(watch.due(now, Down), Due::TakenOut);
    assert_eq!(watch.due(now, Down), Due::Wait(RETRY_MS));
}

#[test]
fn jitter_stays_within_a_tenth() {
    for (chance, wait) in [(0.0, 4_500), (0.5, 5_000), (0.999_999, 5_499)] {
        let mut watch = Watch::new(RULES, 0);
        watch.probed(0, Unknown, Unknown, probe(Verdict::Good), chance);
        assert_eq!(watch.due(0, Up), Due::Wait(wait));
    }
}

#[test]
fn an_interval_shorter_than_the_first_pause_bounds_it() {
    let mut watch = Watch::new(Rules { interval_ms: 50, ..RULES }, 0);
    watch.probed(0, Unknown, Unknown, probe(Verdict::Bad), MIDDLE);
    assert_eq!(watch.due(0, Down), Due::Wait(50));
}

/// A probe every interval with these verdicts, from `now` on; the worker obeys. What became of it each time.
fn run(watch: &mut Watch, now: &mut u64, health: &mut Health, verdicts: &[Verdict]) -> Vec<Change> {
    let changes = verdicts.iter().map(|&verdict| {
        *now += INTERVAL;
        let change = watch.probed(*now, *health, *health, probe(verdict), MIDDLE);
        match change {
            Change::Up | Change::Restored => *health = Up,
            Change::Down(_) => *health = Down,
            Change::None => {}
        }
        change
    });
    changes.collect()
}

use Verdict::{Bad, Good, Late};

#[test]
fn u23_a_worker_that_comes_and_goes_is_ejected_for_ever_longer() {
    let (mut watch, mut now, mut health) = (up(), 0, Up);
    run(&mut watch, &mut now, &mut health, &[Bad, Good, Bad]);
    assert_eq!(watch.advice(now), None, "four probes are too few");
    run(&mut watch, &mut now, &mut health, &[Good]);
    assert_eq!((watch.advice(now), health), (Some(Ejection::SuccessRate), Up));
    assert_eq!(watch.ejected(now, Ejection::SuccessRate), INTERVAL);
    health = Ejected;
    let changes = run(&mut watch, &mut now, &mut health, &[Good; 5]);
    assert_eq!(changes, [vec![Change::None; 4], vec![Change::Restored]].concat(), "two of ten were bad");
    assert_eq!(watch.advice(now), None);
    run(&mut watch, &mut now, &mut health, &[Bad, Good, Bad, Good]);
    assert_eq!(watch.advice(now), None, "two of ten");
    run(&mut watch, &mut now, &mut health, &[Bad, Good]);
    assert_eq!(watch.advice(now), Some(Ejection::SuccessRate));
    assert_eq!(watch.ejected(now, Ejection::SuccessRate), 2 * INTERVAL, "again");
    health = Ejected;
    now += 100 * INTERVAL;
    run(&mut watch, &mut now, &mut health, &[Good; 10]);
    assert_eq!(health, Up);
    assert_eq!(watch.ejected(now, Ejection::SuccessRate), INTERVAL, "after a long peace");
}

#[test]
fn u23_to_go_down_does_not_shorten_a_term() {
    let mut watch = up();
    assert_eq!(watch.ejected(0, Ejection::SuccessRate), INTERVAL);
    let down = watch.probed(10, Ejected, Ejected, probe(Bad), MIDDLE);
    assert_eq!(down, Change::Down(Ejection::Probe));
    assert_eq!(watch.probed(300, Down, Down, probe(Good), MIDDLE), Change::Up);
    assert_eq!(watch.advice(300), Some(Ejection::SuccessRate));
    assert_eq!(watch.ejected(300, Ejection::SuccessRate), INTERVAL - 300, "what is left of it");
    assert_eq!(watch.probed(INTERVAL, Ejected, Ejected, probe(Good), MIDDLE), Change::Restored);
}

#[test]
fn to_be_started_anew_is_one_failure_however_long_it_took() {
    let (mut watch, mut now, mut health) = (up(), 0, Up);
    run(&mut watch, &mut now, &mut health, &[Good; 3]);
    run(&mut watch, &mut now, &mut health, &[Bad; 50]);
    run(&mut watch, &mut now, &mut health, &[Good]);
    assert_eq!((health, watch.advice(now)), (Up, None));
}

#[test]
fn u10_late_probes_of_a_busy_worker_do_not_eject_it() {
    let slow = |busy| {
        let mut watch = up();
        for at in 1..=20 {
            let verdict = if at % 2 == 0 { Late } else { Good };
            let probe = Probe { verdict, took_ms: 5_000, busy };
            assert_eq!(watch.probed(at * INTERVAL, Up, Up, probe, MIDDLE), Change::None);
        }
        watch.advice(20 * INTERVAL)
    };
    assert_eq!(slow(true), None);
    assert_eq!(slow(false), Some(Ejection::SuccessRate), "it has nothing else to do");
}

#[test]
fn answers_that_take_too_long_eject_by_the_mean_of_the_window() {
    let mut watch = Watch::new(Rules { max_response_ms: 1_000, ..RULES }, 0);
    let mut advice = Vec::new();
    for took_ms in [4_000, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500] {
        watch.probed(0, Up, Up, Probe { verdict: Good, took_ms, busy: false }, MIDDLE);
        advice.push(watch.advice(0).is_some());
    }
    let wanted = [false, false, false, false, true, true, false, false, false, false, false];
    assert_eq!(advice, wanted, "five are enough, and one slow one is soon outweighed");
}

#[test]
fn a_window_of_nothing_judges_nobody() {
    let mut watch = Watch::new(Rules { window: 0, ..RULES }, 0);
    for _ in 0..20 {
        watch.probed(0, Up, Up, probe(Bad), MIDDLE);
    }
    assert_eq!(watch.advice(0), None);
}

#[test]
fn a_worker_that_was_down_needs_its_good_probes_in_a_row() {
    let mut watch = Watch::new(Rules { good_probes: 3, ..RULES }, 0);
    assert_eq!(
        watch.probed(0, Unknown, Unknown, probe(Good), MIDDLE),
        Change::Up,
        "nothing is known against it"
    );
    watch.probed(1, Up, Up, probe(Bad), MIDDLE);
    let changes: Vec<Change> =
        [Good, Good, Bad, Good, Good, Good].map(|v| watch.probed(2, Down, Down, probe(v), MIDDLE)).into();
    assert_eq!(changes, [vec![Change::None; 5], vec![Change::Up]].concat());
}

#[test]
fn a_doubt_brings_the_probe_forward_but_not_all_the_time() {
    let mut watch = up();
    watch.doubted(1_000);
    assert_eq!(watch.due(1_000, Up), Due::Probe);
    assert_eq!(watch.probed(1_010, Up, Up, probe(Good), MIDDLE), Change::None);
    watch.doubted(1_020);
    assert_eq!(watch.due(1_020, Up), Due::Wait(RETRY_MS - 10));
    watch.probed(2_000, Up, Up, probe(Bad), MIDDLE);
    let Due::Wait(pause) = watch.due(2_000, Down) else { panic!("no pause") };
    watch.doubted(2_000);
    assert_eq!(watch.due(2_000, Down), Due::Wait(pause), "it is out already");
}

/// Whether the first of so many workers may be ejected where these are not up.
fn may(count: usize, share: f64, others: &[(usize, Health)]) -> bool {
    let urls = (0..count).map(|at| format!("http://w{at}:1").parse().unwrap());
    let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
    fleet.workers.iter().for_each(|worker| worker.came_up(0));
    others.iter().for_each(|&(at, health)| {
        fleet.workers[at].set_health(health);
    });
    may_eject(&fleet, &fleet.workers[0], 0, share)
}

#[test]
fn u23_no_more_than_a_share_is_ejected_and_never_the_last_one() {
    assert!(!may(1, 1.0, &[]), "the only one");
    assert!(may(2, 0.5, &[]) && !may(2, 0.4, &[]));
    assert!(!may(2, 1.0, &[(1, Down)]), "the last one that is up");
    assert!(may(4, 0.5, &[(1, Ejected)]) && !may(4, 0.5, &[(1, Ejected), (2, Ejected)]));
    assert!(may(4, 0.5, &[(1, Down), (2, Down)]), "hard facts do not count");
    assert!(!may(4, 0.0, &[]));
}

#[test]
fn the_share_is_that_of_each_model() {
    let urls = (0..4).map(|at| format!("http://w{at}:1").parse().unwrap());
    let mut registry = Registry::new(urls, ModelSettings::default());
    let models =
        |names: &[&str]| Learnt::Models(names.iter().map(|name| ((*name).to_owned(), true)).collect());
    for (at, names) in [&["a", "b"][..], &["a"], &["a"], &["b"]].into_iter().enumerate() {
        registry.learnt(at, models(names));
    }
    registry.publish();
    let fleet = registry.handle().load_full();
    fleet.workers.iter().for_each(|worker| worker.came_up(0));
    assert!(may_eject(&fleet, &fleet.workers[0], 0, 0.5));
    fleet.workers[3].set_health(Down);
    assert!(!may_eject(&fleet, &fleet.workers[0], 0, 0.5), "nobody else has b");
    assert!(may_eject(&fleet, &fleet.workers[1], 0, 0.5));
}
