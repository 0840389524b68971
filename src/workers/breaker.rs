//! The circuit breaker of one server. No lock, no clock: every method takes `now`.
//!
//! ```text
//!          `failures` failures within the window,
//!          at least half of the attempts since the first of them
//!  ┌────────┐ ───────────────────────────────────▶ ┌──────┐
//!  │ closed │                                      │ open │ ◀─────────┐
//!  └────────┘                                      └──────┘           │
//!      ▲                                               │ open time    │ failure
//!      │ `successes` successes                         ▼ is over      │
//!      │                                         ┌───────────┐        │
//!      └──────────────────────────────────────── │ half-open │ ───────┘
//!                                                └───────────┘
//!                                              one trial at a time
//! ```
//! The window slides for real and costs successes nothing: it is a ring of the last failures, each with its time
//! and with how many attempts had been made by then. A server that opens again soon after it closed, or fails its
//! trial, stays open twice as long as before, up to [`MOST_DOUBLINGS`] times.
//!
//! What counts as a failure is not decided here; see `proxy/judge.rs`.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use crate::base::Millis;

/// Failures that a breaker can be told to wait for.
pub const MOST_FAILURES: u32 = 1024;

/// How often the open time is doubled at most: up to 8 times as long.
const MOST_DOUBLINGS: u32 = 3;

/// When a breaker opens and closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerRules {
    /// Failures within the window that open it, 1 to [`MOST_FAILURES`]; 0: it never opens.
    pub failures: u32,
    /// Successes that close it while it is half-open; 0 counts as 1.
    pub successes: u32,
    /// How long it is open before it lets a trial through, in milliseconds.
    pub open_ms: u64,
    /// Length of the window, in milliseconds.
    pub window_ms: u64,
}

impl Default for BreakerRules {
    /// vllm-router's.
    fn default() -> Self {
        Self { failures: 10, successes: 3, open_ms: 60_000, window_ms: 120_000 }
    }
}

/// What a breaker does at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BreakerState {
    /// Lets everything through.
    Closed = 0,
    /// Refuses everything.
    Open = 1,
    /// Lets one request through at a time.
    HalfOpen = 2,
}

/// What a verdict did to a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Nothing that shows.
    None,
    /// It is open from now on, for so many milliseconds.
    Opened(u64),
    /// It is closed from now on.
    Closed,
}

/// The breaker of one server; its data-parallel ranks share it.
#[derive(Debug)]
pub struct Breaker {
    /// A [`Word`]; 0: closed. Nobody writes to it while all is well, so every shard has its line at hand.
    word: AtomicU64,
    rules: BreakerRules,
    /// The last failures, as [`Mark`]s; as many as open the breaker.
    ring: Box<[AtomicU64]>,
    /// Failures ever written to the ring.
    written: AtomicU64,
    /// Attempts made up to the last failure.
    attempts: AtomicU64,
    /// How often the open time was doubled when it opened last.
    doublings: AtomicU32,
    /// When it last closed; only of use once it was open.
    closed_at: AtomicU64,
}

/// What a [`Breaker`] is doing, in one word that is exchanged as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Closed,
    /// Until this moment.
    Open(Millis),
    HalfOpen {
        /// Whether a trial runs.
        trial: bool,
        /// Successes so far.
        successes: u32,
        /// Differs from one opening to the next, so that a trial that was overtaken frees nobody's place.
        epoch: u32,
    },
}

const KIND_BITS: u32 = 2;
const KIND: u64 = (1 << KIND_BITS) - 1;
const OPEN: u64 = 1;
const FREE: u64 = 2;
const TRIAL: u64 = 3;

impl Word {
    fn pack(self) -> u64 {
        match self {
            Self::Closed => 0,
            Self::Open(until) => until << KIND_BITS | OPEN,
            Self::HalfOpen { trial, successes, epoch } => {
                let successes = u64::from(successes.min((1 << 30) - 1));
                let kind = if trial { TRIAL } else { FREE };
                u64::from(epoch) << 32 | successes << KIND_BITS | kind
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "fields of a packed word")]
    fn unpack(bits: u64) -> Self {
        match bits & KIND {
            OPEN => Self::Open(bits >> KIND_BITS),
            0 => Self::Closed,
            kind => Self::HalfOpen {
                trial: kind == TRIAL,
                successes: (bits as u32) >> KIND_BITS,
                epoch: (bits >> 32) as u32,
            },
        }
    }
}

/// One failure in the ring: when, in 40 bits (34 years), and at which attempt, in the lowest 24 of its bits: more
/// than fit into any window.
#[derive(Debug, Clone, Copy)]
struct Mark(u64);

impl Mark {
    const ATTEMPT_BITS: u32 = 24;
    const ATTEMPTS: u64 = (1 << Self::ATTEMPT_BITS) - 1;

    /// Never 0, which stands for no failure.
    fn new(now: Millis, attempt: u64) -> Self {
        Self((now + 1) << Self::ATTEMPT_BITS | attempt & Self::ATTEMPTS)
    }

    fn at(self) -> Option<Millis> {
        (self.0 >> Self::ATTEMPT_BITS).checked_sub(1)
    }

    /// Attempts from this one to `attempt`, both included.
    fn attempts_to(self, attempt: u64) -> u64 {
        (attempt.wrapping_sub(self.0) & Self::ATTEMPTS) + 1
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new(BreakerRules::default())
    }
}

impl Breaker {
    /// A closed breaker.
    pub fn new(rules: BreakerRules) -> Self {
        let length = rules.failures.min(MOST_FAILURES);
        Self {
            word: AtomicU64::new(0),
            rules,
            ring: (0..length).map(|_| AtomicU64::new(0)).collect(),
            written: AtomicU64::new(0),
            attempts: AtomicU64::new(0),
            doublings: AtomicU32::new(0),
            closed_at: AtomicU64::new(0),
        }
    }

    fn word(&self) -> Word {
        Word::unpack(self.word.load(Ordering::Relaxed))
    }

    fn exchange(&self, from: Word, to: Word) -> bool {
        let (from, to) = (from.pack(), to.pack());
        self.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Whether a request may go to the server: one load while it is closed. Who goes must have
    /// [`Breaker::begin`] agree.
    pub fn admits(&self, now: Millis) -> bool {
        match self.word() {
            Word::Closed => true,
            Word::Open(until) => now >= until,
            Word::HalfOpen { trial, .. } => !trial,
        }
    }

    /// What it does now. Open until a trial begins, which may be later than its open time.
    pub fn state(&self) -> BreakerState {
        match self.word() {
            Word::Closed => BreakerState::Closed,
            Word::Open(_) => BreakerState::Open,
            Word::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// A request goes to the server. `None`: it may not, or somebody else was faster with the only trial there is.
    pub fn begin(self: &Arc<Self>, now: Millis) -> Option<Trial> {
        loop {
            let word = self.word();
            let (successes, epoch) = match word {
                Word::Closed => return Some(Trial(None)),
                Word::Open(until) if now >= until => (0, self.next_epoch()),
                Word::HalfOpen { trial: false, successes, epoch } => (successes, epoch),
                Word::Open(_) | Word::HalfOpen { .. } => return None,
            };
            if self.exchange(word, Word::HalfOpen { trial: true, successes, epoch }) {
                return Some(Trial(Some((self.clone(), epoch))));
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "it only has to differ")]
    fn next_epoch(&self) -> u32 {
        self.written.load(Ordering::Relaxed) as u32
    }

    /// A request failed, and all attempts since the last failure did so too.
    pub fn failed(&self, now: Millis) -> Turn {
        self.failed_after(now, 1)
    }

    /// A request failed, `attempts` attempts after the failure before it, this one included.
    pub fn failed_after(&self, now: Millis, attempts: u64) -> Turn {
        if self.ring.is_empty() {
            return Turn::None;
        }
        let attempt = self.attempts.fetch_add(attempts, Ordering::Relaxed).wrapping_add(attempts);
        let place = self.written.fetch_add(1, Ordering::Relaxed);
        let length = self.ring.len() as u64;
        let slot = |place: u64| usize::try_from(place % length).ok().and_then(|at| self.ring.get(at));
        if let Some(slot) = slot(place) {
            slot.store(Mark::new(now, attempt).0, Ordering::Relaxed);
        }
        // what is overwritten next is the oldest
        let oldest = slot(place + 1).map_or(0, |slot| slot.load(Ordering::Relaxed));
        let word = self.word();
        match word {
            Word::Closed if self.is_too_much(now, attempt, Mark(oldest)) => self.open(now, word),
            Word::HalfOpen { .. } => self.open(now, word),
            Word::Closed | Word::Open(_) => Turn::None,
        }
    }

    fn is_too_much(&self, now: Millis, attempt: u64, oldest: Mark) -> bool {
        let Some(first) = oldest.at() else { return false };
        let recent = now.saturating_sub(first) <= self.rules.window_ms;
        recent && oldest.attempts_to(attempt) <= 2 * self.ring.len() as u64
    }

    /// Opens it, unless somebody else has done something to it since it was `word`.
    fn open(&self, now: Millis, word: Word) -> Turn {
        let before = self.doublings.load(Ordering::Relaxed);
        let again = match word {
            Word::Closed => {
                let closed_at = self.closed_at.load(Ordering::Relaxed);
                closed_at > 0 && now.saturating_sub(closed_at) <= self.rules.window_ms
            }
            _ => true,
        };
        let doublings = if again { (before + 1).min(MOST_DOUBLINGS) } else { 0 };
        let open_ms = self.rules.open_ms << doublings;
        if !self.exchange(word, Word::Open(now + open_ms)) {
            return Turn::None;
        }
        self.doublings.store(doublings, Ordering::Relaxed);
        Turn::Opened(open_ms)
    }

    /// A request was answered well. Costs one load, and counts for nothing, unless it is half-open.
    pub fn succeeded(&self, now: Millis) -> Turn {
        loop {
            let word = self.word();
            let Word::HalfOpen { trial, successes, epoch } = word else { return Turn::None };
            let successes = successes + 1;
            let closes = successes >= self.rules.successes.max(1);
            let next = if closes { Word::Closed } else { Word::HalfOpen { trial, successes, epoch } };
            if closes {
                // before it closes: what is counted from then on belongs to the new window
                self.ring.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
                self.closed_at.store(now.max(1), Ordering::Relaxed);
            }
            if self.exchange(word, next) {
                return if closes { Turn::Closed } else { Turn::None };
            }
        }
    }

    /// Another server answers there now: what was counted says nothing of it.
    pub fn forget(&self) {
        self.ring.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
        self.word.store(Word::Closed.pack(), Ordering::Release);
    }
}

/// Leave to send one request. While the breaker is half-open it holds the only place there is; dropping it frees
/// the place and counts nothing: the verdict is told by [`Breaker::succeeded`] or [`Breaker::failed`].
#[derive(Debug)]
#[must_use = "the place is free again when this is dropped"]
pub struct Trial(Option<(Arc<Breaker>, u32)>);

impl Trial {
    /// Leave that needs no breaker's.
    pub fn unneeded() -> Self {
        Self(None)
    }

    /// Whether much depends on how it goes.
    pub fn is_probe(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let Some((breaker, own)) = self.0.take() else { return };
        // whoever opened or closed it meanwhile has freed the place
        while let word @ Word::HalfOpen { trial: true, successes, epoch } = breaker.word()
            && epoch == own
        {
            if breaker.exchange(word, Word::HalfOpen { trial: false, successes, epoch }) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
}
