//! What a world is like: drawn from its seed.

use crate::{
    base::Millis,
    control::health,
    proxy::RetrySettings,
    simulation::{
        ledger::Nature,
        servers::{FAULTS, State},
        time::Chance,
    },
    workers::BreakerRules,
};

/// The four kinds of worlds; each has rules of its own for how requests may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Everything fails in every way.
    Storm,
    /// One worker is good all the time, and nothing is limited.
    OneGood,
    /// All workers are good, and one client is poisonous.
    Poison,
    /// More come than there is room for, and some workers fail.
    Crowd,
}

#[derive(Debug)]
pub(super) struct Rules {
    pub(super) kind: Kind,
    pub(super) workers: usize,
    /// By worker.
    pub(super) models: Vec<&'static [&'static str]>,
    pub(super) faults: &'static [State],
    /// So many of the workers have none.
    pub(super) always_good: usize,
    pub(super) poisons: &'static [Nature],
    /// `--max-concurrent-requests`.
    pub(super) slots: u32,
    pub(super) queue: u32,
    /// `max_concurrent_requests`, by worker; none at all, or of the first ones.
    pub(super) caps: Vec<u32>,
    pub(super) breaker: BreakerRules,
    pub(super) health: health::Rules,
    pub(super) max_ejected_share: f64,
    pub(super) retries: RetrySettings,
    pub(super) policy: &'static str,
    pub(super) slow_start_ms: u64,
    /// How often this host has no port for a connection.
    pub(super) short_of_ports: f64,
    pub(super) response_timeout_ms: u64,
    pub(super) request_timeout_ms: u64,
    /// Mean time from one request to the next.
    pub(super) arrival_ms: f64,
    /// Mean time that an answer takes.
    pub(super) takes_ms: f64,
    /// When the first request comes.
    pub(super) begin_ms: Millis,
}

const INTERVAL_MS: u64 = 500;
const OPEN_MS: u64 = 500;
const NEVER: u64 = 1 << 40;

/// Faults of workers that are only passing, and of which none takes a request with it.
const LIGHT: [State; 5] =
    [State::Refuses, State::Busy(None), State::Busy(Some(1)), State::Empty, State::Slow];

impl Rules {
    pub(super) fn of(seed: u64, chance: &Chance) -> Self {
        let kind = [Kind::Storm, Kind::OneGood, Kind::Poison, Kind::Crowd][(seed % 4) as usize];
        let workers = chance.between(2, 5) as usize;
        let policy = chance.pick(&["least_requests", "round_robin", "random", "power_of_two"]);
        let both: &[&str] = &["a", "b"];
        let mut rules = Self {
            kind,
            workers,
            models: vec![both; workers],
            faults: &[],
            always_good: 0,
            poisons: &[],
            slots: 0,
            queue: 0,
            caps: Vec::new(),
            breaker: BreakerRules {
                failures: chance.pick(&[1, 2, 5]),
                successes: chance.pick(&[1, 2]),
                open_ms: OPEN_MS,
                window_ms: 4_000,
            },
            health: health::Rules {
                interval_ms: INTERVAL_MS,
                late_probes: 2,
                good_probes: chance.pick(&[1, 1, 2]),
                window: 10,
                min_success_rate: 0.8,
                max_response_ms: 300,
            },
            max_ejected_share: 0.5,
            retries: retries(chance),
            policy,
            slow_start_ms: chance.pick(&[0, 0, 2_000]),
            short_of_ports: 0.0,
            response_timeout_ms: NEVER,
            request_timeout_ms: NEVER,
            arrival_ms: chance.pick(&[20.0, 60.0, 200.0]),
            takes_ms: chance.pick(&[20.0, 150.0]),
            // the first probes are over
            begin_ms: 100,
        };
        match kind {
            Kind::Storm => {
                let only: [&'static [&'static str]; 3] = [both, &["a"], &["b"]];
                rules.models.iter_mut().skip(1).for_each(|models| *models = chance.pick(&only));
                rules.faults = if chance.is(0.5) { &FAULTS } else { &ALL };
                rules.poisons = &[Nature::Innocent, Nature::Resets, Nature::Fails, Nature::Kills];
                if chance.is(0.5) {
                    rules.crowd(chance);
                }
                rules.short_of_ports = chance.pick(&[0.0, 0.02]);
                rules.response_timeout_ms = chance.pick(&[NEVER, 1_000]);
                rules.request_timeout_ms = chance.pick(&[NEVER, 3_000]);
                rules.begin_ms = chance.between(0, 100);
            }
            Kind::OneGood => {
                rules.faults = &FAULTS;
                rules.always_good = 1;
                rules.poisons = &[Nature::Resets, Nature::Fails];
            }
            Kind::Poison => rules.poisons = &[Nature::Resets, Nature::Fails],
            Kind::Crowd => {
                rules.crowd(chance);
                rules.arrival_ms = chance.pick(&[10.0, 20.0]);
                rules.takes_ms = 150.0;
                rules.faults = if chance.is(0.5) { &LIGHT } else { &FAULTS };
                rules.always_good = chance.between(0, 2) as usize;
            }
        }
        rules
    }

    fn crowd(&mut self, chance: &Chance) {
        self.slots = chance.pick(&[0, 3, 6]);
        self.queue = chance.pick(&[2, 10, 40]) as u32;
        if self.slots == 0 || chance.is(0.6) {
            // of all workers, or of the first ones
            let count = if chance.is(0.7) { self.workers } else { 1 };
            self.caps = (0..count).map(|_| chance.between(1, 4) as u32).collect();
        }
    }

    /// After so long everybody must be well again: the longest term of an ejection, a window of good probes, and the
    /// longest time that a breaker is open; twice, because a server may be half-open while it is ejected.
    pub(super) fn recovery_ms(&self) -> u64 {
        2 * (64 * INTERVAL_MS + 12 * INTERVAL_MS + 8 * OPEN_MS)
    }
}

/// As [`FAULTS`], and another model in a worker's place.
const ALL: [State; 4] = [State::Another, State::Refuses, State::Hangs, State::CutsHead];

fn retries(chance: &Chance) -> RetrySettings {
    RetrySettings {
        retry_max_retries: 5,
        retry_initial_backoff_ms: 20,
        retry_max_backoff_ms: 2_000,
        retry_backoff_multiplier: 1.5,
        retry_jitter_factor: 0.2,
        retry_statuses: if chance.is(0.2) { vec![404] } else { Vec::new() },
        disable_retries: false,
        retry_buffer_bytes: 1 << 20,
        max_retries: None,
        retry_delay: None,
    }
}
