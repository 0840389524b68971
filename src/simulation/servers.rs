//! The workers of a world: what they do at each moment, to requests and to probes.

use std::cell::Cell;

use crate::{base::Millis, control::health::Verdict, simulation::time::Chance};

/// What a worker is like for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Good,
    /// Its process is gone.
    Refuses,
    /// It closes each connection once it has the request.
    Resets,
    /// vLLM's busy 503; with a `Retry-After` of so many seconds.
    Busy(Option<u64>),
    EngineDead,
    /// An application's 500, whatever is asked.
    Fails,
    /// No HTTP.
    Garbage,
    /// A broken chunked coding.
    BadCoding,
    /// The answer breaks off within its head.
    CutsHead,
    /// The answer breaks off after it has begun.
    CutsBody,
    Empty,
    ErrorEvent,
    /// It is being shut down: whatever runs ends with an abort.
    Aborts,
    /// It takes the connection and says nothing. Its probes are late.
    Hangs,
    /// It takes its time, in probes too.
    Slow,
    /// It takes the connection and says nothing. Its probes are good, and it says that it sleeps.
    Sleeps,
    /// Another model is served here now.
    Another,
}

use State::{
    Aborts, Another, BadCoding, Busy, CutsBody, CutsHead, Empty, EngineDead, ErrorEvent, Fails, Garbage,
    Good, Hangs, Refuses, Resets, Sleeps, Slow,
};

/// Every state but [`State::Good`].
pub(super) const FAULTS: [State; 17] = [
    Refuses,
    Refuses,
    Resets,
    Busy(None),
    Busy(Some(1)),
    EngineDead,
    Fails,
    Garbage,
    BadCoding,
    CutsHead,
    CutsBody,
    Empty,
    ErrorEvent,
    Aborts,
    Hangs,
    Slow,
    Sleeps,
];

/// One worker.
#[derive(Debug)]
pub(super) struct Server {
    /// When each state ends, ascending, and the state; good afterwards.
    spans: Vec<(Millis, State)>,
    /// When its process dies by itself, ascending.
    crashes: Vec<Millis>,
    /// Until when it is gone because a request has killed it.
    killed_until: Cell<Millis>,
    kills: Cell<usize>,
    /// The models that it serves, and those of the one that takes its place for a while.
    pub(super) models: &'static [&'static str],
}

impl Server {
    /// Good all the time.
    pub(super) fn good(models: &'static [&'static str]) -> Self {
        let (killed_until, kills) = (Cell::new(0), Cell::new(0));
        Self { spans: Vec::new(), crashes: Vec::new(), killed_until, kills, models }
    }

    /// With `faults` now and then, until `end`.
    pub(super) fn faulty(
        chance: &Chance,
        end: Millis,
        faults: &[State],
        models: &'static [&'static str],
    ) -> Self {
        let mut server = Self::good(models);
        let mut at = chance.exponential(1_500.0);
        // short and many, or long and few
        let mean = chance.pick(&[300.0, 1_500.0, 5_000.0]);
        server.spans.push((at.min(end), Good));
        while at < end {
            let fault = chance.pick(faults);
            if matches!(fault, Refuses | EngineDead) {
                server.crashes.push(at);
            }
            at += 1 + chance.exponential(mean);
            server.spans.push((at.min(end), fault));
            at += 1 + chance.exponential(mean);
            server.spans.push((at.min(end), Good));
        }
        server
    }

    pub(super) fn state(&self, now: Millis) -> State {
        if now < self.killed_until.get() {
            return Refuses;
        }
        self.spans.iter().find(|(end, _)| now < *end).map_or(Good, |(_, state)| *state)
    }

    /// When the state may be another one, if ever again.
    pub(super) fn changes(&self, now: Millis) -> Option<Millis> {
        let killed = Some(self.killed_until.get()).filter(|until| now < *until);
        killed.or_else(|| self.spans.iter().map(|(end, _)| *end).find(|end| now < *end))
    }

    /// Which process it is.
    pub(super) fn incarnation(&self, now: Millis) -> usize {
        self.kills.get() + self.crashes.iter().filter(|at| **at <= now).count()
    }

    pub(super) fn next_crash(&self, now: Millis) -> Option<Millis> {
        self.crashes.iter().copied().find(|at| *at > now)
    }

    /// A request has killed it; it is back at `until`.
    pub(super) fn killed(&self, until: Millis) {
        self.kills.set(self.kills.get() + 1);
        self.killed_until.set(until);
    }

    /// What a probe at this time finds, and how long that takes.
    pub(super) fn probed(&self, now: Millis, chance: &Chance, limit_ms: u64) -> (Verdict, u64) {
        match self.state(now) {
            Refuses => (Verdict::Bad, 1),
            EngineDead => (Verdict::Bad, 3),
            Aborts if chance.is(0.5) => (Verdict::Bad, 2),
            Hangs => (Verdict::Late, limit_ms),
            Slow => (Verdict::Good, chance.between(limit_ms / 2, limit_ms)),
            _ => (Verdict::Good, chance.between(1, 20)),
        }
    }

    /// What it serves at this time.
    pub(super) fn lists(&self, now: Millis) -> &'static [&'static str] {
        if self.state(now) == Another { &["z"] } else { self.models }
    }
}
