//! When a worker is probed, and what a probe's verdict makes of it. No socket, no clock, no chance: every
//! method takes what it needs.
//!
//! ```text
//!            good probe (its models are learnt first)
//!   ┌─────────┐ ───────────────────────────────▶ ┌────┐
//!   │ Unknown │                                  │ Up │ ◀─┐ late probe, fewer than LATE_PROBES in a row
//!   └─────────┘ ──────┐             ┌─────────── └────┘ ──┘
//!        bad or late  ▼             ▼  bad probe · LATE_PROBES late ones in a row · a shard's transport error
//!                   ┌──────────────────┐
//!                   │       Down       │ ── good probe (its models are learnt first) ──▶ Up
//!                   └──────────────────┘
//! ```
//! Busy is not dead: a worker that is up and merely answers late stays up. A worker that is down is probed
//! again after [`RETRY_MS`], and then ever more slowly up to the ordinary interval. One that comes back only to
//! fail again does not start over with short pauses: it must first have been up for an interval.

use crate::base::Millis;
use crate::workers::Health;

/// Probes in a row that may run out of time before a worker that was up is taken out: with the default interval
/// and limit half a minute of silence, more than a long prefill blocks vLLM's front end.
pub(super) const LATE_PROBES: u32 = 3;

/// Pause before a worker that went down is probed again; doubles with every bad probe up to the interval.
pub(super) const RETRY_MS: u64 = 250;

/// Share of the interval by which a probe may come earlier or later, so that probes do not fall into step.
const JITTER: f64 = 0.1;

/// What a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It serves.
    Good,
    /// It says that it does not, or cannot be reached.
    Bad,
    /// It took the connection, and time was up.
    Late,
}

/// What to do about a worker after a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// Learn what it serves, then mark it up.
    Up,
    /// Mark it down.
    Down,
}

/// What to do about a worker at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Probe it now.
    Probe,
    /// Nothing before so many milliseconds have passed.
    Wait(u64),
    /// A shard marked it down since the last look; to be told once, and looked at again.
    TakenOut,
}

/// The history of one worker that decides.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    interval_ms: u64,
    /// What it was after the last look or probe.
    seen: Health,
    /// Late probes in a row.
    late: u32,
    /// The pause after the next bad verdict.
    pause_ms: u64,
    /// When it was last marked up.
    up_since: Millis,
    /// When the next probe is due.
    next: Millis,
}

impl Watch {
    /// A worker of which nothing is known, to be probed at once and every `interval_ms` from then on.
    pub(super) fn new(interval_ms: u64, now: Millis) -> Self {
        let interval_ms = interval_ms.max(1);
        Self {
            interval_ms,
            seen: Health::Unknown,
            late: 0,
            pause_ms: RETRY_MS.min(interval_ms),
            up_since: now,
            next: now,
        }
    }

    /// Looks whether something is to be done; `health` is what the worker's atomic says now.
    pub(super) fn due(&mut self, now: Millis, health: Health) -> Due {
        if self.seen == Health::Up && health == Health::Down {
            self.went_down(now);
            return Due::TakenOut;
        }
        match self.next.saturating_sub(now) {
            0 => Due::Probe,
            wait => Due::Wait(wait),
        }
    }

    /// Takes in a verdict. `before` is what the worker's atomic said when the probe began, `health` what it says
    /// now; `chance` is in 0..1.
    ///
    /// After [`Change::Up`] and [`Change::Down`] the caller does as told; the watch takes it as done.
    pub(super) fn probed(
        &mut self,
        now: Millis,
        before: Health,
        health: Health,
        verdict: Verdict,
        chance: f64,
    ) -> Change {
        if before == Health::Up && health == Health::Down {
            // A shard's error is younger than what the probe saw: `due` tells of it, and a new probe decides.
            return Change::None;
        }
        self.late = if verdict == Verdict::Late { self.late + 1 } else { 0 };
        match verdict {
            Verdict::Good => {
                self.next = now + self.jittered(chance);
                if health == Health::Up {
                    return Change::None;
                }
                self.up_since = now;
                self.seen = Health::Up;
                Change::Up
            }
            Verdict::Late if health == Health::Up && self.late < LATE_PROBES => {
                self.next = now + self.jittered(chance);
                Change::None
            }
            Verdict::Bad | Verdict::Late => {
                let was_down = health == Health::Down;
                self.went_down(now);
                if was_down { Change::None } else { Change::Down }
            }
        }
    }

    /// Plans the probe of a worker that is down.
    fn went_down(&mut self, now: Millis) {
        if self.seen == Health::Up && now.saturating_sub(self.up_since) >= self.interval_ms {
            self.pause_ms = RETRY_MS.min(self.interval_ms);
        }
        self.seen = Health::Down;
        self.late = 0;
        self.next = now + self.pause_ms;
        self.pause_ms = (self.pause_ms * 2).min(self.interval_ms);
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive factor near 1 of a number of milliseconds"
    )]
    fn jittered(&self, chance: f64) -> u64 {
        ((self.interval_ms as f64 * (1.0 - JITTER + 2.0 * JITTER * chance)) as u64).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Health::{Down, Unknown, Up};

    const INTERVAL: u64 = 5_000;
    /// No jitter.
    const MIDDLE: f64 = 0.5;

    /// A worker that has been up since time 0 and was probed then.
    fn up() -> Watch {
        let mut watch = Watch::new(INTERVAL, 0);
        assert_eq!(watch.probed(0, Unknown, Unknown, Verdict::Good, MIDDLE), Change::Up);
        watch
    }

    #[test]
    fn a_new_worker_is_probed_at_once_and_up_after_a_good_probe() {
        let mut watch = Watch::new(INTERVAL, 7);
        assert_eq!(watch.due(7, Unknown), Due::Probe);
        assert_eq!(watch.probed(9, Unknown, Unknown, Verdict::Good, MIDDLE), Change::Up);
        assert_eq!(watch.due(9, Up), Due::Wait(INTERVAL));
        assert_eq!(watch.due(9 + INTERVAL, Up), Due::Probe);
        assert_eq!(watch.probed(9 + INTERVAL, Up, Up, Verdict::Good, MIDDLE), Change::None);
    }

    #[test]
    fn a_new_worker_that_does_not_answer_is_down() {
        for verdict in [Verdict::Bad, Verdict::Late] {
            let mut watch = Watch::new(INTERVAL, 0);
            assert_eq!(watch.probed(1, Unknown, Unknown, verdict, MIDDLE), Change::Down);
            assert_eq!(watch.due(1, Down), Due::Wait(RETRY_MS));
        }
    }

    #[test]
    fn a_bad_probe_takes_a_worker_out_at_once() {
        let mut watch = up();
        assert_eq!(watch.probed(INTERVAL, Up, Up, Verdict::Bad, MIDDLE), Change::Down);
        assert_eq!(watch.due(INTERVAL, Down), Due::Wait(RETRY_MS));
    }

    #[test]
    fn busy_is_not_dead_until_it_was_late_three_times_in_a_row() {
        let mut watch = up();
        assert_eq!(watch.probed(1, Up, Up, Verdict::Late, MIDDLE), Change::None);
        assert_eq!(watch.probed(2, Up, Up, Verdict::Late, MIDDLE), Change::None);
        assert_eq!(watch.probed(3, Up, Up, Verdict::Good, MIDDLE), Change::None);
        assert_eq!(watch.probed(4, Up, Up, Verdict::Late, MIDDLE), Change::None);
        assert_eq!(watch.probed(5, Up, Up, Verdict::Late, MIDDLE), Change::None);
        assert_eq!(watch.probed(6, Up, Up, Verdict::Late, MIDDLE), Change::Down);
        assert_eq!(watch.probed(7, Down, Down, Verdict::Late, MIDDLE), Change::None);
        assert_eq!(watch.probed(8, Down, Down, Verdict::Good, MIDDLE), Change::Up);
    }

    #[test]
    fn a_worker_that_stays_down_is_probed_ever_more_slowly_up_to_the_interval() {
        let mut watch = up();
        let mut now = INTERVAL;
        let mut pauses = Vec::new();
        let mut health = Up;
        for _ in 0..7 {
            watch.probed(now, health, health, Verdict::Bad, MIDDLE);
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
        assert_eq!(watch.probed(now + RETRY_MS, Down, Down, Verdict::Good, MIDDLE), Change::Up);
    }

    #[test]
    fn a_probe_that_began_before_a_shards_error_proves_nothing() {
        let mut watch = up();
        assert_eq!(watch.due(INTERVAL, Up), Due::Probe);
        assert_eq!(watch.probed(INTERVAL + 5, Up, Down, Verdict::Good, MIDDLE), Change::None);
        assert_eq!(watch.due(INTERVAL + 5, Down), Due::TakenOut);
        assert_eq!(watch.due(INTERVAL + 5, Down), Due::Wait(RETRY_MS));
    }

    #[test]
    fn flapping_lengthens_the_pauses_and_an_interval_of_peace_shortens_them() {
        let mut watch = up();
        assert_eq!(watch.due(INTERVAL, Down), Due::TakenOut);
        let mut now = INTERVAL + RETRY_MS;
        assert_eq!(watch.probed(now, Down, Down, Verdict::Good, MIDDLE), Change::Up);
        now += 10;
        assert_eq!(watch.due(now, Down), Due::TakenOut);
        assert_eq!(watch.due(now, Down), Due::Wait(2 * RETRY_MS), "it was up for 10 ms only");
        now += 2 * RETRY_MS;
        assert_eq!(watch.probed(now, Down, Down, Verdict::Good, MIDDLE), Change::Up);
        now += INTERVAL;
        assert_eq!(watch.due(now, Down), Due::TakenOut);
        assert_eq!(watch.due(now, Down), Due::Wait(RETRY_MS));
    }

    #[test]
    fn jitter_stays_within_a_tenth() {
        for (chance, wait) in [(0.0, 4_500), (0.5, 5_000), (0.999_999, 5_499)] {
            let mut watch = Watch::new(INTERVAL, 0);
            watch.probed(0, Unknown, Unknown, Verdict::Good, chance);
            assert_eq!(watch.due(0, Up), Due::Wait(wait));
        }
    }

    #[test]
    fn an_interval_shorter_than_the_first_pause_bounds_it() {
        let mut watch = Watch::new(50, 0);
        watch.probed(0, Unknown, Unknown, Verdict::Bad, MIDDLE);
        assert_eq!(watch.due(0, Down), Due::Wait(50));
    }
}
