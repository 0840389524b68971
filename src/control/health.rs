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
mod tests {
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
        assert_eq!(
            watch.probed(INTERVAL, Up, Up, probe(Verdict::Bad), MIDDLE),
            Change::Down(Ejection::Probe)
        );
        assert_eq!(watch.due(INTERVAL, Down), Due::Wait(RETRY_MS));
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
}
