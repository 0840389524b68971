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
mod tests;
