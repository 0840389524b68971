use std::{io, sync::Arc};

use super::*;
use crate::workers::{EngineStats, Health, ModelSettings, Registry};

const REPEATABLE: Repeatable = Repeatable { always: true, generates: true, names_model: true };

/// Requests in flight of which none may be tried again but for those per second.
const FEW: u64 = 0;
const MANY: u64 = 1_000_000;

fn connect(code: i32) -> Failure {
    Failure::Connect(io::Error::from_raw_os_error(code))
}

fn refused() -> Failure {
    connect(libc::ECONNREFUSED)
}

fn lost() -> Failure {
    Failure::NoAnswer { reused: false }
}

fn stale() -> Failure {
    Failure::NoAnswer { reused: true }
}

fn refusing(status: u16, retry_after_secs: Option<u64>) -> Refusing {
    Refusing { status, retry_after_secs }
}

fn busy() -> Failure {
    Failure::Busy(refusing(503, None))
}

fn bad_gateway(retry_after_secs: Option<u64>) -> Failure {
    Failure::Status(refusing(502, retry_after_secs))
}

fn settings() -> RetrySettings {
    RetrySettings {
        retry_max_retries: 5,
        retry_initial_backoff_ms: 100,
        retry_max_backoff_ms: 30_000,
        retry_backoff_multiplier: 2.0,
        retry_jitter_factor: 0.0,
        retry_statuses: vec![502],
        disable_retries: false,
        retry_buffer_bytes: 1000,
        max_retries: None,
        retry_delay: None,
    }
}

/// So many workers, all of them up.
fn fleet(count: usize) -> Arc<Fleet> {
    let urls = (0..count).map(|n| format!("http://w{n}:1").parse().unwrap());
    let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
    fleet.workers.iter().for_each(|worker| _ = worker.set_health(Health::Up));
    fleet
}

/// An exchange on a fleet of `count` workers, each position of which may serve it.
struct Exchange {
    settings: RetrySettings,
    budget: Budget,
    fleet: Arc<Fleet>,
    positions: Vec<usize>,
}

impl Exchange {
    fn with(count: usize) -> Self {
        let positions = (0..count).collect();
        Self { settings: settings(), budget: Budget::default(), fleet: fleet(count), positions }
    }

    fn retries(&self) -> Retries<'_> {
        self.asking(REPEATABLE)
    }

    fn asking(&self, asked: Repeatable) -> Retries<'_> {
        Retries::new(&self.settings, &self.budget, &self.fleet, &self.positions, asked)
    }
}

impl Retries<'_> {
    /// An attempt at `position` fails, at `now`.
    fn fails_at(&mut self, now: Millis, position: usize, failure: &Failure) -> Next {
        self.begin(position, false);
        self.decide(failure, true, false, now, 0.5, || MANY)
    }

    fn fails(&mut self, position: usize, failure: &Failure) -> Next {
        self.fails_at(0, position, failure)
    }

    /// The same, on a fresh connection to where the last attempt was.
    fn fails_fresh(&mut self, position: usize, failure: &Failure) -> Next {
        self.begin(position, true);
        self.decide(failure, true, false, 0, 0.5, || MANY)
    }
}

#[test]
fn what_no_worker_has_seen_goes_to_another_at_once_and_costs_nothing() {
    let exchange = Exchange::with(4);
    // not even what may never be sent twice is lost with it
    for asked in [REPEATABLE, Repeatable::default()] {
        let mut retries = exchange.asking(asked);
        for position in 0..3 {
            let failure = connect([libc::ECONNREFUSED, libc::ETIMEDOUT, libc::EHOSTUNREACH][position]);
            retries.begin(position, false);
            assert_eq!(
                retries.decide(&failure, true, false, 0, 0.5, || panic!("the budget was asked")),
                Next::Another
            );
            assert!(retries.tried().contains(position));
        }
    }
}

#[test]
fn workers_that_cannot_be_reached_are_tried_again_after_pauses_that_grow() {
    let mut exchange = Exchange::with(2);
    exchange.settings.retry_max_retries = 6;
    let mut retries = exchange.retries();
    assert_eq!(retries.fails(0, &refused()), Next::Another);
    assert_eq!(retries.fails(1, &refused()), Next::Again(100));
    assert_eq!(retries.tried().count(), 0, "both may be tried again");
    assert_eq!(retries.fails(1, &refused()), Next::Another);
    assert_eq!(retries.fails(0, &refused()), Next::Again(200));
    assert_eq!(retries.fails(0, &refused()), Next::Another);
    assert_eq!(retries.fails(1, &refused()), Next::GiveUp(Without::Chance), "six attempts");
}

#[test]
fn an_unusable_worker_is_good_enough_where_nothing_is_lost_but_no_answer_is_given_up_for_it() {
    let exchange = Exchange::with(2);
    exchange.fleet.workers[1].set_health(Health::Down);
    assert_eq!(exchange.retries().fails(0, &refused()), Next::Another);
    assert_eq!(exchange.retries().fails(0, &lost()), Next::Another);
    assert_eq!(exchange.retries().fails(0, &busy()), Next::GiveUp(Without::Chance));
    let mut retries = exchange.retries();
    retries.begin(0, false);
    assert_eq!(retries.question(503, Kind::Json), None);
    exchange.fleet.workers[1].set_health(Health::Up);
    let sleeps = |asleep| {
        exchange.fleet.workers[1]
            .engine()
            .set(&EngineStats { asleep: Some(asleep), ..EngineStats::default() }, 0);
    };
    sleeps(true);
    assert_eq!(retries.question(503, Kind::Json), None, "it would never answer");
    sleeps(false);
    assert_eq!(retries.question(503, Kind::Json), Some((Question::Busy, true)));
}

#[test]
fn a_stale_connection_is_made_good_by_a_fresh_one_to_the_same_worker() {
    let exchange = Exchange::with(1);
    let mut retries = exchange.retries();
    assert_eq!(retries.fails(0, &stale()), Next::Fresh);
    assert_eq!(retries.attempts, 1);
    assert_eq!(retries.fails_fresh(0, &lost()), Next::GiveUp(Without::Chance));
    assert_eq!(retries.attempts, 1, "it stands in for the first");
    let not_repeatable = Repeatable { always: false, ..REPEATABLE };
    assert_eq!(exchange.asking(not_repeatable).fails(0, &stale()), Next::GiveUp(Without::Use));
}

#[test]
fn a_request_that_kills_workers_meets_two_of_them_whatever_their_death_looks_like() {
    let exchange = Exchange::with(9);
    let mut retries = exchange.retries();
    assert_eq!(retries.fails(0, &lost()), Next::Another);
    assert_eq!(retries.fails(1, &Failure::AnswerCut), Next::GiveUp(Without::Chance));
    // on connections that had rested: dead, and then nobody listens any more
    let mut retries = exchange.retries();
    assert_eq!(retries.fails(0, &stale()), Next::Fresh);
    assert_eq!(retries.fails_fresh(0, &refused()), Next::Another);
    assert_eq!(retries.fails(1, &stale()), Next::Fresh);
    assert_eq!(retries.fails_fresh(1, &refused()), Next::GiveUp(Without::Chance));
    // one of each
    let mut retries = exchange.retries();
    assert_eq!(retries.fails(0, &lost()), Next::Another);
    assert_eq!(retries.fails(1, &stale()), Next::Fresh);
    assert_eq!(retries.fails_fresh(1, &refused()), Next::GiveUp(Without::Chance));
}

#[test]
fn what_a_worker_may_have_done_is_not_sent_again_unless_it_is_repeatable() {
    let exchange = Exchange::with(3);
    let asked = Repeatable { always: false, ..REPEATABLE };
    for failure in [lost(), stale(), busy(), bad_gateway(None), Failure::EngineDead, Failure::AnswerCut] {
        assert_eq!(exchange.asking(asked).fails(0, &failure), Next::GiveUp(Without::Use), "{failure}");
    }
    let mut retries = exchange.asking(asked);
    assert_eq!(retries.fails(0, &stale()), Next::GiveUp(Without::Use));
    assert_eq!(retries.fails_fresh(0, &refused()), Next::GiveUp(Without::Use), "the first may have seen it");
    retries.begin(0, false);
    assert_eq!(
        retries.question(500, Kind::Json),
        Some((Question::EngineDead, false)),
        "to be known, not given up"
    );
    assert_eq!(retries.question(200, Kind::Events), Some((Question::Begins, false)));
    for status in [404, 429, 502, 503] {
        assert_eq!(retries.question(status, Kind::Events), None, "{status}");
    }
}

#[test]
fn without_the_body_nothing_is_tried_again() {
    let exchange = Exchange::with(3);
    for failure in [refused(), lost(), stale(), busy()] {
        let mut retries = exchange.retries();
        retries.begin(0, false);
        assert_eq!(retries.decide(&failure, false, false, 0, 0.5, || MANY), Next::GiveUp(Without::Use));
    }
    let (kept, other) = (exchange.retries(), exchange.asking(Repeatable::default()));
    assert_eq!([kept.keeps(1000), kept.keeps(1001), other.keeps(0)], [true, false, false]);
}

#[test]
fn dead_engines_lost_models_and_whole_aborted_answers_get_one_further_attempt() {
    let exchange = Exchange::with(5);
    let aborted = Failure::Unbegun(Unbegun::Aborted);
    for failure in [Failure::EngineDead, Failure::ModelLost, Failure::Aborted, aborted] {
        let mut retries = exchange.retries();
        assert_eq!(retries.fails(0, &failure), Next::Another, "{failure}");
        assert_eq!(retries.fails(1, &failure), Next::GiveUp(Without::Chance), "{failure}");
    }
    // each kind for itself, and an engine that dies in a stream is no other kind
    let mut retries = exchange.retries();
    assert_eq!(retries.fails(0, &Failure::EngineDead), Next::Another);
    assert_eq!(retries.fails(1, &Failure::Aborted), Next::Another);
    assert_eq!(retries.fails(2, &Failure::Unbegun(Unbegun::EngineDead)), Next::GiveUp(Without::Chance));
}

#[test]
fn who_moves_on_because_its_worker_has_ended_is_not_counted_against_the_budget() {
    let exchange = Exchange::with(3);
    let ends = |failure: &Failure, died: bool| {
        let mut retries = exchange.retries();
        retries.begin(0, false);
        let asked = std::cell::Cell::new(false);
        let next = retries.decide(failure, true, died, 0, 0.5, || {
            asked.set(true);
            MANY
        });
        assert_eq!(next, Next::Another, "{failure}");
        asked.get()
    };
    for failure in [Failure::EngineDead, Failure::Aborted, Failure::Unbegun(Unbegun::Aborted)] {
        assert!(!ends(&failure, false), "{failure}");
    }
    for failure in [lost(), Failure::AnswerCut] {
        assert!(ends(&failure, false) && !ends(&failure, true), "{failure}: as long as it may be alive");
    }
    assert!(ends(&busy(), true), "it has answered after all");
}

#[test]
fn what_gets_one_further_attempt_gets_no_second_one_where_a_connection_was_stale() {
    let exchange = Exchange::with(9);
    for failure in [Failure::EngineDead, Failure::ModelLost, Failure::Aborted] {
        let mut retries = exchange.retries();
        assert_eq!(retries.fails(0, &stale()), Next::Fresh);
        assert_eq!(retries.fails_fresh(0, &failure), Next::Another, "{failure}");
        assert_eq!(retries.fails(1, &failure), Next::GiveUp(Without::Chance), "{failure}");
        let mut retries = exchange.retries();
        assert_eq!(retries.fails(0, &stale()), Next::Fresh);
        assert_eq!(retries.fails_fresh(0, &failure), Next::Another, "{failure}");
        assert_eq!(retries.fails(1, &lost()), Next::Another, "that is something else than {failure}");
    }
}

#[test]
fn busy_workers_are_each_asked_once_and_streams_that_fail_too() {
    for failure in [busy(), Failure::Unbegun(Unbegun::Empty), Failure::Unbegun(Unbegun::Error)] {
        let exchange = Exchange::with(3);
        let mut retries = exchange.retries();
        assert_eq!(retries.fails(0, &failure), Next::Another);
        assert_eq!(retries.fails(2, &failure), Next::Another);
        assert_eq!(retries.fails(1, &failure), Next::GiveUp(Without::Chance), "its own answer is passed on");
    }
}

#[test]
fn statuses_that_were_asked_for_are_tried_on_the_same_workers_again() {
    let exchange = Exchange::with(1);
    let mut retries = exchange.retries();
    let pauses: Vec<Next> = (0..5).map(|_| retries.fails(0, &bad_gateway(None))).collect();
    let expected = [100, 200, 400, 800].map(Next::Again);
    assert_eq!(pauses[..4], expected);
    assert_eq!(pauses[4], Next::GiveUp(Without::Chance));
}

#[test]
fn a_worker_is_not_asked_before_the_time_that_it_has_named() {
    let exchange = Exchange::with(2);
    let mut retries = exchange.retries();
    assert_eq!(retries.fails_at(1000, 0, &bad_gateway(Some(10))), Next::Another);
    assert_eq!(retries.fails_at(1000, 1, &bad_gateway(None)), Next::Again(100));
    assert!(retries.tried().contains(0) && !retries.tried().contains(1), "only the other one");
    assert_eq!(
        retries.fails_at(1100, 1, &bad_gateway(Some(20))),
        Next::Again(9900),
        "until the first one is free"
    );
    assert!(!retries.tried().contains(0) && retries.tried().contains(1));
    let mut retries = exchange.retries();
    assert_eq!(retries.fails_at(0, 0, &bad_gateway(Some(31))), Next::Another);
    assert_eq!(
        retries.fails_at(0, 1, &bad_gateway(Some(u64::MAX))),
        Next::GiveUp(Without::Chance),
        "too long to wait"
    );
}

#[test]
fn the_budget_is_asked_for_what_costs_a_worker_something_and_given_back() {
    let exchange = Exchange::with(9);
    let retry = |retries: &mut Retries<'_>, position| {
        retries.begin(position, false);
        retries.decide(&busy(), true, false, 0, 0.5, || FEW)
    };
    let mut running: Vec<Retries<'_>> = (0..3).map(|_| exchange.retries()).collect();
    for retries in &mut running {
        assert_eq!(retry(retries, 0), Next::Another);
    }
    let mut fourth = exchange.retries();
    assert_eq!(retry(&mut fourth, 0), Next::GiveUp(Without::Budget));
    assert_eq!(fourth.fails(0, &refused()), Next::Another, "what costs nothing needs none");
    drop(running);
    let mut fifth = exchange.retries();
    fifth.begin(0, false);
    assert_eq!(
        fifth.decide(&busy(), true, false, 0, 0.5, || 5),
        Next::Another,
        "one of five requests in flight"
    );
}

#[test]
fn an_answer_is_asked_what_its_status_calls_for() {
    let exchange = Exchange::with(2);
    let mut retries = exchange.retries();
    retries.begin(0, false);
    for (status, kind, question) in [
        (200, Kind::Events, Some(Question::Begins)),
        (200, Kind::Json, Some(Question::Whole)),
        (200, Kind::Other, None),
        (204, Kind::Json, None),
        (301, Kind::Json, None),
        (400, Kind::Json, None),
        (404, Kind::Json, Some(Question::ModelLost)),
        (408, Kind::Json, None),
        (429, Kind::Json, Some(Question::Busy)),
        (500, Kind::Json, Some(Question::EngineDead)),
        (501, Kind::Json, None),
        (502, Kind::Json, Some(Question::Nothing)),
        (503, Kind::Json, Some(Question::Busy)),
        (504, Kind::Json, None),
    ] {
        assert_eq!(retries.question(status, kind), question.map(|question| (question, true)), "{status}");
    }
    let mut other = exchange.asking(Repeatable { always: true, ..Repeatable::default() });
    other.begin(0, false);
    assert_eq!((other.question(200, Kind::Json), other.question(404, Kind::Json)), (None, None));
    // the last one is only looked at
    retries.begin(1, false);
    retries.tried.add(0);
    assert_eq!(retries.question(200, Kind::Events), Some((Question::Begins, false)));
}

#[test]
fn further_attempts_can_be_counted_in_both_ways_and_switched_off() {
    let with = |change: fn(&mut RetrySettings)| {
        let mut settings = settings();
        change(&mut settings);
        settings
    };
    assert_eq!(settings().attempts(), 5);
    assert_eq!(with(|s| s.max_retries = Some(4)).attempts(), 5);
    assert_eq!(with(|s| s.max_retries = Some(0)).attempts(), 1);
    assert_eq!(with(|s| s.disable_retries = true).attempts(), 1);
    let fixed = with(|s| s.retry_delay = Some(1.5)).backoff();
    assert_eq!([fixed.pause_ms(0, 0.0), fixed.pause_ms(9, 1.0)], [1500, 1500]);
}

#[test]
fn what_the_client_caused_is_never_tried_again_and_condemns_nobody() {
    let exchange = Exchange::with(3);
    for failure in
        [Failure::RequestBody, Failure::ClientGone, Failure::Late, Failure::BodyTooLarge { limit: 1 }]
    {
        assert_eq!(exchange.retries().fails(0, &failure), Next::GiveUp(Without::Use));
        assert!(!failure.condemns() && !failure.is_transport() && !failure.doubts());
    }
}

#[test]
fn a_shortage_of_ours_is_not_the_workers_fault() {
    for code in [libc::EMFILE, libc::EADDRNOTAVAIL] {
        assert!(!connect(code).condemns() && !connect(code).doubts());
    }
    assert!(refused().condemns());
    assert!(!stale().condemns() && !stale().doubts());
}

#[test]
fn only_the_unreachable_and_the_dead_are_out_at_once() {
    for failure in [lost(), Failure::AnswerCut, Failure::ModelLost, Failure::Unbegun(Unbegun::Empty)] {
        assert!(!failure.condemns() && failure.doubts(), "{failure}");
    }
    assert!(Failure::EngineDead.condemns() && Failure::Unbegun(Unbegun::EngineDead).condemns());
    assert!(!busy().condemns() && !busy().doubts(), "busy is not dead");
}
