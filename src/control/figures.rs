//! When a worker's `/metrics` is read, and what its figures mean from one look to the next. No socket, no clock,
//! no chance: every method takes what it needs.
//!
//! Figures are seconds old when they are used. They say what nobody else does (how much the prefix cache holds,
//! that requests run which are not ours, that the worker was started anew) and correct nothing else: our own
//! counts are exact.

use crate::base::Millis;
use crate::vllm::{EngineReport, Figures};

/// Intervals for which the last figures are believed when no new ones come.
const KEPT_INTERVALS: u64 = 3;

/// The longest pause before a worker that refuses `/metrics` is asked again, if the interval is not longer.
const LONGEST_PAUSE_MS: u64 = 60_000;

/// Share of the interval by which a look may come earlier or later.
const JITTER: f64 = 0.1;

/// The history of one server's figures.
#[derive(Debug)]
pub(super) struct Watch {
    interval_ms: u64,
    next: Millis,
    /// The pause after the next refusal.
    pause_ms: u64,
    /// When figures last came; `None`: the last ones are believed no more.
    told_at: Option<Millis>,
    last: Epoch,
    /// By rank: requests that seemed not to be ours at the last look.
    surplus: Vec<u32>,
}

/// By what a loss of the prefix cache shows.
#[derive(Debug, Clone, Copy, Default)]
struct Epoch {
    process_start: Option<f64>,
    prefix_queries: Option<f64>,
    asleep: Option<bool>,
}

impl Epoch {
    /// Whether the cache has been lost since `before`: the process or its engine was started anew, or it fell
    /// asleep, or woke up (vLLM gives the cache's memory back in its sleep).
    fn lost_since(self, before: Self) -> bool {
        let differs =
            |now: Option<f64>, before: Option<f64>| matches!((now, before), (Some(n), Some(b)) if n != b);
        let fell = matches!((self.prefix_queries, before.prefix_queries), (Some(n), Some(b)) if n < b);
        let turned = matches!((self.asleep, before.asleep), (Some(n), Some(b)) if n != b);
        differs(self.process_start, before.process_start) || fell || turned
    }

    /// What is not told now is remembered.
    fn or(self, before: Self) -> Self {
        Self {
            process_start: self.process_start.or(before.process_start),
            prefix_queries: self.prefix_queries.or(before.prefix_queries),
            asleep: self.asleep.or(before.asleep),
        }
    }
}

/// What the figures of one rank mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Meaning {
    pub(super) figures: Figures,
    /// Requests that run on it and are not ours.
    pub(super) foreign: u32,
}

/// One rank when it was looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rank {
    /// Its number; `None`: the server has one engine, or chooses itself.
    pub(super) number: Option<u32>,
    /// Requests on it of which we know, ours and those of other proxies: the most that were seen before and after the
    /// look.
    pub(super) ours: u32,
}

impl Watch {
    /// A server of so many ranks, to be looked at every `interval_ms`.
    pub(super) fn new(interval_ms: u64, ranks: usize, now: Millis) -> Self {
        let interval_ms = interval_ms.max(1);
        Self {
            interval_ms,
            next: now,
            pause_ms: interval_ms,
            told_at: None,
            last: Epoch::default(),
            surplus: vec![0; ranks],
        }
    }

    /// Milliseconds until the next look; 0: now.
    pub(super) fn due_in(&self, now: Millis) -> u64 {
        self.next.saturating_sub(now)
    }

    /// A look began. `chance`, in 0..1, keeps servers that came up together from being looked at together for
    /// ever.
    pub(super) fn begin(&mut self, now: Millis, chance: f64) {
        self.next = now + ((self.interval_ms as f64 * (1.0 - JITTER + 2.0 * JITTER * chance)) as u64).max(1);
    }

    /// Takes in what was told; true if the prefix caches have been lost since the last time.
    pub(super) fn told(&mut self, now: Millis, report: &EngineReport) -> bool {
        self.told_at = Some(now);
        self.pause_ms = self.interval_ms;
        let total = report.total();
        let epoch = Epoch {
            process_start: report.process_start,
            prefix_queries: total.prefix_queries,
            asleep: total.asleep,
        };
        let lost = epoch.lost_since(self.last);
        self.last = epoch.or(self.last);
        lost
    }

    /// What the report means for one rank, the one at position `at` of its server. A rank without series of its
    /// own is given the figures of all; whose requests those are cannot be told.
    ///
    /// Between the worker's answer and our look at our own counts requests come and go, so that a surplus counts
    /// only when it was there twice in a row, and then the smaller one.
    pub(super) fn meaning(&mut self, at: usize, rank: Rank, report: &EngineReport) -> Meaning {
        let own = match rank.number {
            Some(number) => report.engine(number),
            None => Some(report.total()),
        };
        let Some(figures) = own else { return Meaning { figures: report.total(), foreign: 0 } };
        let running = figures.running.unwrap_or(0).saturating_add(figures.waiting.unwrap_or(0));
        let surplus = running.saturating_sub(rank.ours);
        let before = self.surplus.get_mut(at).map_or(0, |before| std::mem::replace(before, surplus));
        Meaning { figures, foreign: surplus.min(before) }
    }

    /// The worker answered that it does not tell (404, 401 …): it is asked ever more rarely.
    pub(super) fn refused(&mut self, now: Millis) -> bool {
        self.next = now + self.pause_ms;
        self.pause_ms = (self.pause_ms * 2).min(LONGEST_PAUSE_MS.max(self.interval_ms));
        self.failed(now)
    }

    /// No figures came. True, once, when the last ones are too old.
    pub(super) fn failed(&mut self, now: Millis) -> bool {
        let kept_ms = self.interval_ms.saturating_mul(KEPT_INTERVALS);
        if self.told_at.is_none_or(|told| now.saturating_sub(told) < kept_ms) {
            return false;
        }
        self.told_at = None;
        self.surplus.fill(0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vllm::parse_engines;

    const INTERVAL: u64 = 5_000;
    const ONLY: Option<u32> = None;

    fn watch() -> Watch {
        Watch::new(INTERVAL, 1, 0)
    }

    fn report(text: &str) -> EngineReport {
        parse_engines(text.as_bytes())
    }

    fn running(count: u32) -> EngineReport {
        report(&format!("vllm:num_requests_running {count}"))
    }

    fn foreign(watch: &mut Watch, on_worker: u32, ours: u32) -> u32 {
        watch.meaning(0, Rank { number: ONLY, ours }, &running(on_worker)).foreign
    }

    #[test]
    fn a_look_is_due_at_once_and_then_every_interval() {
        let mut watch = watch();
        assert_eq!(watch.due_in(0), 0);
        watch.begin(10, 0.5);
        assert_eq!((watch.due_in(10), watch.due_in(INTERVAL + 10)), (INTERVAL, 0));
    }

    #[test]
    fn only_what_is_there_twice_is_foreign_and_then_the_smaller() {
        let mut watch = watch();
        assert_eq!(foreign(&mut watch, 5, 2), 0, "once may be chance");
        assert_eq!(foreign(&mut watch, 6, 2), 3);
        assert_eq!(foreign(&mut watch, 3, 2), 1);
        assert_eq!(foreign(&mut watch, 2, 2), 0);
        assert_eq!(foreign(&mut watch, 1, 9), 0, "ours that it has finished already");
        assert_eq!(foreign(&mut watch, 7, 2), 0);
    }

    #[test]
    fn waiting_requests_are_foreign_too() {
        let mut watch = watch();
        let busy = report("vllm:num_requests_running 1\nvllm:num_requests_waiting 4");
        let look = |watch: &mut Watch| watch.meaning(0, Rank { number: ONLY, ours: 2 }, &busy).foreign;
        assert_eq!((look(&mut watch), look(&mut watch)), (0, 3));
    }

    #[test]
    fn a_rank_has_its_own_figures_and_its_own_history() {
        let mut watch = Watch::new(INTERVAL, 2, 0);
        let two =
            report("vllm:num_requests_running{engine=\"0\"} 3\nvllm:num_requests_running{engine=\"1\"} 8");
        let mut look = |at: usize| {
            let number = Some(at as u32);
            let meaning = watch.meaning(at, Rank { number, ours: 1 }, &two);
            (meaning.figures.running, meaning.foreign)
        };
        assert_eq!([look(0), look(1)], [(Some(3), 0), (Some(8), 0)]);
        assert_eq!([look(0), look(1)], [(Some(3), 2), (Some(8), 7)]);
    }

    #[test]
    fn figures_of_all_ranks_make_nobodys_requests_foreign() {
        let mut watch = Watch::new(INTERVAL, 2, 0);
        for _ in 0..3 {
            let meaning = watch.meaning(1, Rank { number: Some(1), ours: 0 }, &running(9));
            assert_eq!((meaning.figures.running, meaning.foreign), (Some(9), 0));
        }
    }

    #[test]
    fn a_cache_is_lost_by_a_new_process_a_counter_that_fell_and_sleep() {
        let text = |start: u32, queries: u32, awake: u32| {
            report(&format!(
                "process_start_time_seconds {start}\nvllm:prefix_cache_queries_total{{engine=\"0\"}} {queries}\n\
                 vllm:engine_sleep_state{{engine=\"0\",sleep_state=\"awake\"}} {awake}"
            ))
        };
        let mut watch = watch();
        assert!(!watch.told(0, &text(1, 100, 1)), "the first look knows of none before");
        assert!(!watch.told(0, &text(1, 100, 1)));
        assert!(!watch.told(0, &text(1, 200, 1)));
        assert!(watch.told(0, &text(2, 300, 1)), "another process");
        assert!(watch.told(0, &text(2, 299, 1)), "the counter fell");
        assert!(watch.told(0, &text(2, 299, 0)), "asleep");
        assert!(!watch.told(0, &text(2, 299, 0)));
        assert!(watch.told(0, &text(2, 299, 1)), "awake");
        assert!(!watch.told(0, &EngineReport::default()), "nothing is told");
        assert!(watch.told(0, &text(3, 299, 1)), "what was told before is remembered");
    }

    #[test]
    fn the_last_figures_are_believed_for_three_intervals() {
        let mut watch = watch();
        assert!(!watch.failed(0), "there are none");
        watch.told(1_000, &running(1));
        assert!(!watch.failed(INTERVAL));
        assert!(!watch.failed(3 * INTERVAL + 999));
        assert!(watch.failed(3 * INTERVAL + 1_000));
        assert!(!watch.failed(4 * INTERVAL), "told once");
    }

    #[test]
    fn who_refuses_is_asked_ever_more_rarely() {
        let mut watch = watch();
        let mut now = 0;
        let mut pauses = Vec::new();
        for _ in 0..6 {
            watch.begin(now, 0.5);
            watch.refused(now);
            pauses.push(watch.due_in(now));
            now += watch.due_in(now);
        }
        assert_eq!(pauses, [5_000, 10_000, 20_000, 40_000, 60_000, 60_000]);
        watch.begin(now, 0.5);
        watch.told(now, &running(1));
        assert_eq!(watch.due_in(now), INTERVAL);
        let mut slow = Watch::new(120_000, 1, 0);
        slow.refused(0);
        slow.refused(0);
        assert_eq!(slow.due_in(0), 120_000, "never sooner than the interval");
    }

    #[test]
    fn a_surplus_from_before_a_silence_counts_for_nothing() {
        let mut watch = watch();
        watch.told(0, &running(5));
        assert_eq!(foreign(&mut watch, 5, 0), 0);
        assert!(watch.failed(3 * INTERVAL));
        assert_eq!(foreign(&mut watch, 5, 0), 0);
    }
}
