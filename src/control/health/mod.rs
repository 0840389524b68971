//! When a worker is probed, and what a probe's verdict makes of it. No socket, no clock, no chance: every
//! method takes what it needs.
//!
//! ```text
//!            good probe (its models are learnt first)
//!   ┌─────────┐ ───────────────────────────────▶ ┌────┐ ◀─┐ late probe, fewer in a row than may be
//!   │ Unknown │                                  │ Up │ ──┘
//!   └─────────┘                                  └────┘ ◀──────────────────────────────┐
//!        │                                        │  │ its window is too bad           │ its term is over, and
//!        │ bad or late    bad probe · too many    │  ▼                                 │ its window good enough
//!        │                late ones in a row ·    │ ┌─────────┐ ───────────────────────┘
//!        ▼                a shard's transport     │ │ Ejected │
//!   ┌──────────┐ ◀─────── error ──────────────────┘ └─────────┘
//!   │   Down   │ ◀────────────────────────────────────── │ the same
//!   └──────────┘ ── good probes (its models are learnt first) ──▶ Up, or Ejected while its term lasts
//! ```
//! Busy is not dead: a worker that is up and merely answers late stays up. A worker that is down is probed
//! again after [`RETRY_MS`], and then ever more slowly up to the ordinary interval. One that comes back only to
//! fail again does not start over with short pauses: it must first have been up for an interval.
//!
//! The window holds what the last probes of a worker that was up found, and nothing of the time in which it was
//! down: to be started anew is one failure, to come and go is many. What it says ejects softly: the worker stays
//! in reserve, never is more than a share of a model's workers ejected, and never the last one ([`may_eject`]).

use std::collections::VecDeque;

use crate::base::Millis;
use crate::telemetry::metrics::Ejection;
use crate::workers::{Fleet, Health, Worker};

/// Pause before a worker that went down is probed again; doubles with every bad probe up to the interval. Doubts
/// have a worker probed no more often than that.
pub(crate) const RETRY_MS: u64 = 250;

/// Share of the interval by which a probe may come earlier or later, so that probes do not fall into step.
const JITTER: f64 = 0.1;

/// How often the term of an ejection is doubled at most. The first one is an interval long.
const MOST_DOUBLINGS: u32 = 6;

/// Terms that must have passed since the last ejection for the next one to be short again: two windows of ten.
const PEACE_TERMS: u64 = 20;

/// By what a [`Watch`] judges.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rules {
    /// Between two probes of a worker that is up.
    pub(crate) interval_ms: u64,
    /// Late probes in a row that take a worker out which was up.
    pub(crate) late_probes: u32,
    /// Good probes in a row that bring back a worker that was down.
    pub(crate) good_probes: u32,
    /// Probes in the window; 0: it says nothing.
    pub(crate) window: usize,
    /// Share of good probes in the window below which a worker is ejected.
    pub(crate) min_success_rate: f64,
    /// Mean time of the answers in the window above which a worker is ejected.
    pub(crate) max_response_ms: u64,
}

/// What a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It serves.
    Good,
    /// It says that it does not, or cannot be reached.
    Bad,
    /// It took the connection, and time was up.
    Late,
}

/// One probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) verdict: Verdict,
    /// How long it took.
    pub(crate) took_ms: u64,
    /// Whether requests of ours were running on the worker: then to be late says nothing against it.
    pub(crate) busy: bool,
}

/// What to do about a worker after a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing.
    None,
    /// Learn what it serves, then mark it up.
    Up,
    /// Mark it up again: it was ejected.
    Restored,
    /// Mark it down.
    Down(Ejection),
}

/// What to do about a worker at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Probe it now.
    Probe,
    /// Nothing before so many milliseconds have passed.
    Wait(u64),
    /// A shard marked it down since the last look; to be told once, and looked at again.
    TakenOut,
}

/// The history of one worker that decides.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    rules: Rules,
    /// What it was after the last look or probe.
    seen: Health,
    /// Late probes in a row.
    late: u32,
    /// Good probes in a row while it was down.
    good: u32,
    /// The pause after the next bad verdict.
    pause_ms: u64,
    /// When it was last marked up.
    up_since: Millis,
    /// When it was last probed.
    probed_at: Millis,
    /// When the next probe is due.
    next: Millis,
    /// The last verdicts, oldest first: whether it was good, and how long it took.
    window: VecDeque<(bool, u64)>,
    /// The last ejection.
    ejection: Option<Term>,
}

/// An ejection.
#[derive(Debug, Clone, Copy)]
struct Term {
    reason: Ejection,
    until: Millis,
    length_ms: u64,
    doublings: u32,
}

impl Watch {
    /// A worker of which nothing is known, to be probed at once and every interval from then on.
    pub(crate) fn new(rules: Rules, now: Millis) -> Self {
        let rules = Rules { interval_ms: rules.interval_ms.max(1), ..rules };
        Self {
            rules,
            seen: Health::Unknown,
            late: 0,
            good: 0,
            pause_ms: RETRY_MS.min(rules.interval_ms),
            up_since: now,
            probed_at: now,
            next: now,
            window: VecDeque::with_capacity(rules.window),
            ejection: None,
        }
    }

    /// Looks whether something is to be done; `health` is what the worker's atomic says now.
    pub(crate) fn due(&mut self, now: Millis, health: Health) -> Due {
        if answers(self.seen) && health == Health::Down {
            self.note(false, 0);
            self.went_down(now);
            return Due::TakenOut;
        }
        match self.next.saturating_sub(now) {
            0 => Due::Probe,
            wait => Due::Wait(wait),
        }
    }

    /// Somebody doubts the worker: it is probed at once, unless it has just been.
    pub(crate) fn doubted(&mut self, now: Millis) {
        if answers(self.seen) {
            self.next = self.next.min(now.max(self.probed_at + RETRY_MS));
        }
    }

    /// A probe could not be made, which says nothing: the next one is made soon.
    pub(super) fn skipped(&mut self, now: Millis) {
        self.next = now + RETRY_MS.min(self.rules.interval_ms);
    }

    /// Takes in a probe. `before` is what the worker's atomic said when the probe began, `health` what it says
    /// now; `chance` is in 0..1.
    ///
    /// Whatever is returned, the caller does as told; the watch takes it as done.
    pub(crate) fn probed(
        &mut self,
        now: Millis,
        before: Health,
        health: Health,
        probe: Probe,
        chance: f64,
    ) -> Change {
        self.probed_at = now;
        if answers(before) && health == Health::Down {
            // A shard's error is younger than what the probe saw: `due` tells of it, and a new probe decides.
            return Change::None;
        }
        let Probe { verdict, took_ms, busy } = probe;
        let good = verdict == Verdict::Good;
        self.late = if verdict == Verdict::Late { self.late + 1 } else { 0 };
        self.good = if good { self.good + 1 } else { 0 };
        if good || answers(health) && !(verdict == Verdict::Late && busy) {
            self.note(good, took_ms);
        }
        match verdict {
            Verdict::Good => self.was_good(now, health, chance),
            Verdict::Late if answers(health) && self.late < self.rules.late_probes => {
                self.next = now + self.jittered(chance);
                Change::None
            }
            Verdict::Bad | Verdict::Late => {
                let was_down = health == Health::Down;
                let reason = if verdict == Verdict::Bad { Ejection::Probe } else { Ejection::LateProbes };
                self.went_down(now);
                if was_down { Change::None } else { Change::Down(reason) }
            }
        }
    }

    fn was_good(&mut self, now: Millis, health: Health, chance: f64) -> Change {
        self.next = now + self.jittered(chance);
        match health {
            Health::Up => Change::None,
            Health::Ejected if self.advice(now).is_some() => Change::None,
            Health::Ejected => {
                self.seen = Health::Up;
                Change::Restored
            }
            Health::Down if self.good < self.rules.good_probes => {
                self.next = now + RETRY_MS.min(self.rules.interval_ms);
                Change::None
            }
            Health::Down | Health::Unknown => {
                self.up_since = now;
                self.seen = Health::Up;
                Change::Up
            }
        }
    }

    /// Why a worker that answers had better be left alone now. It is if [`may_eject`] says so; then
    /// [`Watch::ejected`] is told.
    pub(crate) fn advice(&self, now: Millis) -> Option<Ejection> {
        if let Some(term) = self.ejection.filter(|term| now < term.until) {
            return Some(term.reason);
        }
        let count = self.window.len();
        if count == 0 || count < self.rules.window.div_ceil(2) {
            return None;
        }
        let good = self.window.iter().filter(|(good, _)| *good).count();
        let took: u64 = self.window.iter().map(|(_, took_ms)| took_ms).sum();
        if (good as f64) < self.rules.min_success_rate * count as f64 {
            Some(Ejection::SuccessRate)
        } else if took > self.rules.max_response_ms.saturating_mul(count as u64) {
            Some(Ejection::ResponseTime)
        } else {
            None
        }
    }

    /// It was ejected: not for less than an interval, and for twice as long as the last time if that was not long
    /// ago. Returns the length of the term that is left, in milliseconds.
    pub(crate) fn ejected(&mut self, now: Millis, reason: Ejection) -> u64 {
        self.seen = Health::Ejected;
        let term = match self.ejection {
            Some(term) if now < term.until => term,
            last => {
                let peace = |last: &Term| last.length_ms.saturating_mul(PEACE_TERMS);
                let again = last.filter(|last| now.saturating_sub(last.until) < peace(last));
                let doublings = again.map_or(0, |last| (last.doublings + 1).min(MOST_DOUBLINGS));
                let length_ms = self.rules.interval_ms << doublings;
                Term { reason, until: now + length_ms, length_ms, doublings }
            }
        };
        self.ejection = Some(term);
        term.until - now
    }

    fn note(&mut self, good: bool, took_ms: u64) {
        if self.rules.window == 0 {
            return;
        }
        if self.window.len() >= self.rules.window {
            self.window.pop_front();
        }
        self.window.push_back((good, took_ms));
    }

    /// Plans the probe of a worker that is down.
    fn went_down(&mut self, now: Millis) {
        let interval_ms = self.rules.interval_ms;
        if answers(self.seen) && now.saturating_sub(self.up_since) >= interval_ms {
            self.pause_ms = RETRY_MS.min(interval_ms);
        }
        self.seen = Health::Down;
        self.late = 0;
        self.good = 0;
        self.next = now + self.pause_ms;
        self.pause_ms = (self.pause_ms * 2).min(interval_ms);
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive factor near 1 of a number of milliseconds"
    )]
    fn jittered(&self, chance: f64) -> u64 {
        ((self.rules.interval_ms as f64 * (1.0 - JITTER + 2.0 * JITTER * chance)) as u64).max(1)
    }
}

fn answers(health: Health) -> bool {
    matches!(health, Health::Up | Health::Ejected)
}

/// Whether the server of `worker` may be ejected for what its probes were like: of every model that it serves
/// (where none is known: of the fleet) another worker can serve, and with it no more than `share` are ejected.
pub(crate) fn may_eject(fleet: &Fleet, worker: &Worker, now: Millis, share: f64) -> bool {
    let all: Vec<usize> = (0..fleet.workers.len()).collect();
    let of_models = fleet.models().iter().map(|model| &model.workers[..]);
    let groups = if fleet.models().is_empty() { vec![&all[..]] } else { of_models.collect() };
    let at = |position: &usize| fleet.workers.get(*position);
    groups.into_iter().all(|group| {
        let (own, others): (Vec<_>, Vec<_>) =
            group.iter().filter_map(at).partition(|other| other.shares_server(worker));
        let ejected = others.iter().filter(|other| other.health() == Health::Ejected).count() + own.len();
        let another = others.iter().any(|other| other.serves(now));
        own.is_empty() || another && ejected as f64 <= share * (own.len() + others.len()) as f64
    })
}

#[cfg(test)]
mod tests;
