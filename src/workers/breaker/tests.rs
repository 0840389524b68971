use super::*;

const RULES: BreakerRules = BreakerRules { failures: 4, successes: 2, open_ms: 1_000, window_ms: 10_000 };

fn breaker() -> Arc<Breaker> {
    Arc::new(Breaker::new(RULES))
}

/// One that opened at `now`.
fn open(now: Millis) -> Arc<Breaker> {
    let breaker = breaker();
    let turns: Vec<Turn> = (0..4).map(|_| breaker.failed(now)).collect();
    assert_eq!(turns, [Turn::None, Turn::None, Turn::None, Turn::Opened(1_000)]);
    breaker
}

/// Closes a breaker whose open time is over.
fn close(breaker: &Arc<Breaker>, now: Millis) {
    for turn in [Turn::None, Turn::Closed] {
        let trial = breaker.begin(now).unwrap();
        assert!(trial.is_probe());
        assert_eq!(breaker.succeeded(now), turn);
    }
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[test]
fn it_opens_with_so_many_failures_within_the_window() {
    let breaker = breaker();
    for at in [0, 4_000, 8_000, 10_001] {
        assert_eq!(breaker.failed(at), Turn::None, "{at}");
    }
    assert!(breaker.admits(10_001), "the first is out of the window");
    assert_eq!(breaker.failed(14_000), Turn::Opened(1_000), "the last four lie in it");
    assert!(!breaker.admits(14_000) && breaker.begin(14_000).is_none());
}

#[test]
fn failures_that_are_less_than_half_of_the_attempts_open_nothing() {
    let breaker = breaker();
    for _ in 0..100 {
        assert_eq!(breaker.failed_after(5, 3), Turn::None, "every third");
    }
    let breaker = self::breaker();
    for _ in 0..3 {
        assert_eq!(breaker.failed_after(5, 2), Turn::None);
    }
    assert_eq!(breaker.failed_after(5, 2), Turn::Opened(1_000), "every second");
}

#[test]
fn a_half_open_breaker_admits_one_request() {
    let breaker = open(0);
    assert!(!breaker.admits(999) && breaker.begin(999).is_none());
    assert!(breaker.admits(1_000));
    let trial = breaker.begin(1_000).unwrap();
    assert!(trial.is_probe() && breaker.state() == BreakerState::HalfOpen);
    assert!(!breaker.admits(1_000) && breaker.begin(5_000).is_none());
    drop(trial);
    assert!(breaker.admits(1_000), "no verdict frees the place");
    assert_eq!(breaker.state(), BreakerState::HalfOpen);
}

#[test]
fn successes_close_it_and_what_was_before_is_forgotten() {
    let breaker = open(0);
    close(&breaker, 1_000);
    assert!(!breaker.begin(1_000).unwrap().is_probe());
    for _ in 0..3 {
        assert_eq!(breaker.failed(1_001), Turn::None);
    }
}

#[test]
fn a_failed_trial_opens_it_for_twice_as_long_up_to_eight_times() {
    let breaker = open(0);
    let mut now = 1_000;
    for open_ms in [2_000, 4_000, 8_000, 8_000] {
        let trial = breaker.begin(now).unwrap();
        assert_eq!(breaker.failed(now), Turn::Opened(open_ms));
        drop(trial);
        assert!(!breaker.admits(now + open_ms - 1), "the trial that failed has no place to free");
        now += open_ms;
        assert!(breaker.admits(now));
    }
}

#[test]
fn opening_again_within_the_window_doubles_and_later_does_not() {
    let breaker = open(0);
    close(&breaker, 1_000);
    (0..3).for_each(|_| assert_eq!(breaker.failed(2_000), Turn::None));
    assert_eq!(breaker.failed(2_000), Turn::Opened(2_000));
    close(&breaker, 4_000);
    (0..3).for_each(|_| assert_eq!(breaker.failed(20_000), Turn::None));
    assert_eq!(breaker.failed(20_000), Turn::Opened(1_000));
}

#[test]
fn a_success_of_a_closed_or_open_breaker_counts_for_nothing() {
    let breaker = breaker();
    assert_eq!(breaker.succeeded(0), Turn::None);
    let breaker = open(0);
    for _ in 0..10 {
        assert_eq!(breaker.succeeded(0), Turn::None);
    }
    assert_eq!(breaker.state(), BreakerState::Open);
}

#[test]
fn a_trial_that_was_overtaken_frees_nobodys_place() {
    let breaker = open(0);
    let first = breaker.begin(1_000).unwrap();
    assert_eq!(breaker.failed(1_000), Turn::Opened(2_000));
    let second = breaker.begin(3_000).unwrap();
    drop(first);
    assert!(!breaker.admits(3_000), "the second runs");
    drop(second);
    assert!(breaker.admits(3_000));
}

#[test]
fn a_breaker_without_failures_to_count_never_opens() {
    let breaker = Arc::new(Breaker::new(BreakerRules { failures: 0, ..RULES }));
    for _ in 0..100 {
        assert_eq!(breaker.failed(0), Turn::None);
    }
    assert!(breaker.begin(0).is_some());
}

#[test]
fn what_is_forgotten_opens_nothing() {
    let breaker = open(0);
    breaker.forget();
    assert!(breaker.admits(0));
    assert_eq!(breaker.failed(1), Turn::None);
}

#[test]
fn attempts_are_counted_beyond_the_end_of_their_bits() {
    let breaker = breaker();
    breaker.failed_after(0, Mark::ATTEMPTS - 1);
    for _ in 0..3 {
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.failed_after(0, 2);
    }
    assert_eq!(breaker.state(), BreakerState::Open);
}

/// What a breaker must do, by a list of all failures.
#[derive(Debug, Default)]
struct Model {
    attempts: u64,
    /// Time and attempt.
    failures: Vec<(Millis, u64)>,
    open_until: Option<Millis>,
    half_open: bool,
    successes: u32,
    doublings: u32,
    closed_at: Option<Millis>,
}

impl Model {
    fn failed(&mut self, now: Millis, attempts: u64) {
        self.attempts += attempts;
        self.failures.push((now, self.attempts));
        let count = RULES.failures as usize;
        let last = self.failures.len().checked_sub(count).map(|at| self.failures[at]);
        let too_much = last.is_some_and(|(at, attempt)| {
            now - at <= RULES.window_ms && self.attempts - attempt < 2 * count as u64
        });
        let soon = self.closed_at.is_some_and(|at| now - at <= RULES.window_ms);
        if self.half_open || self.open_until.is_none() && too_much {
            self.doublings = if self.half_open || soon { (self.doublings + 1).min(3) } else { 0 };
            self.open_until = Some(now + (RULES.open_ms << self.doublings));
            self.half_open = false;
        }
    }

    fn succeeded(&mut self, now: Millis) {
        if self.half_open {
            self.successes += 1;
            if self.successes == RULES.successes {
                self.half_open = false;
                self.failures.clear();
                self.closed_at = Some(now);
            }
        }
    }

    /// Whether a request may begin.
    fn begin(&mut self, now: Millis) -> bool {
        if self.open_until.is_some_and(|until| now >= until) {
            (self.open_until, self.half_open, self.successes) = (None, true, 0);
        }
        self.open_until.is_none()
    }
}

#[test]
fn it_agrees_with_a_list_of_all_failures_over_random_histories() {
    for seed in 1..=256_u64 {
        let mut bits = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = |below: u64| {
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            bits % below
        };
        let (breaker, mut model, mut now) = (breaker(), Model::default(), 1);
        let mut turns = 0;
        for step in 0..500 {
            now += draw(2) * draw(3_000);
            let at = format!("seed {seed}, step {step}");
            let trial = breaker.begin(now);
            assert_eq!(trial.is_some(), model.begin(now), "{at}");
            let turn = match draw(3) {
                0 => {
                    let attempts = 1 + draw(3);
                    model.failed(now, attempts);
                    breaker.failed_after(now, attempts)
                }
                1 => {
                    model.succeeded(now);
                    breaker.succeeded(now)
                }
                _ => Turn::None,
            };
            turns += usize::from(turn != Turn::None);
            drop(trial);
            let state = match (model.open_until, model.half_open) {
                (Some(_), _) => BreakerState::Open,
                (None, true) => BreakerState::HalfOpen,
                (None, false) => BreakerState::Closed,
            };
            assert_eq!(breaker.state(), state, "{at}");
        }
        assert!(turns > 2, "seed {seed}: nothing happened");
    }
}

/// However many threads ask at once, never do two hold a trial, and all of them agree on how it ended.
#[test]
fn of_many_threads_one_has_the_trial() {
    use std::sync::atomic::AtomicUsize;
    let breaker = Arc::new(Breaker::new(BreakerRules { successes: u32::MAX, ..RULES }));
    (0..3).for_each(|_| assert_eq!(breaker.failed(0), Turn::None));
    assert_eq!(breaker.failed(0), Turn::Opened(1_000));
    let (holders, held, opened) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (breaker, holders, held, opened) = (&breaker, &holders, &held, &opened);
            scope.spawn(move || {
                for round in 0..2_000_u64 {
                    // far beyond every open time so far
                    let now = (round + 1) * 100_000;
                    let Some(trial) = breaker.begin(now) else { continue };
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two trials");
                    held.fetch_add(1, Ordering::Relaxed);
                    if (round + thread) % 3 == 0 {
                        breaker.succeeded(now);
                    }
                    holders.fetch_sub(1, Ordering::SeqCst);
                    if round % 100 == 99 && matches!(breaker.failed(now), Turn::Opened(_)) {
                        opened.fetch_add(1, Ordering::Relaxed);
                    }
                    drop(trial);
                }
            });
        }
    });
    assert!(held.load(Ordering::Relaxed) > 0 && opened.load(Ordering::Relaxed) > 0);
    assert!(breaker.admits(u64::MAX >> 24), "nobody has left his place taken");
    assert_ne!(breaker.state(), BreakerState::Closed);
}
