//! What failed attempts say of their workers.
//!
//! A worker that cannot be connected to, or whose engine is dead, is out at once: no request can bring that about. It
//! is one failure each time that it goes away.
//! Any other failure may be the request's own doing: the worker is doubted, which has it probed at once, and the
//! failure is kept as a suspicion. It counts against the worker's breaker only when a worker of another server has
//! answered the same request well, so that no sequence of requests can open a breaker. A request counts at most
//! once against a server. Whoever refused or failed a request is also set back for a moment: others are preferred,
//! while there are others.

use std::sync::{Arc, atomic::Ordering};

use crate::{
    base::Millis,
    proxy::{
        failure::SET_BACK_MS,
        retry::{Failure, Refusing},
    },
    telemetry::metrics::Ejection,
    workers::{Health, Trial, Turn, Worker},
};

/// What a failure says of the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// The worker is out, whatever the request was.
    Fact(Ejection),
    /// It may be the request's doing.
    Suspicion,
    /// It should be looked at, and nothing more.
    Doubt,
    /// Nothing: the client left, a resource of ours was short, a rested connection was stale.
    Nothing,
}

impl Weight {
    fn of(failure: &Failure) -> Self {
        match failure {
            Failure::Connect(_) if failure.condemns() => Self::Fact(Ejection::Connect),
            _ if failure.condemns() => Self::Fact(Ejection::EngineDead),
            Failure::Connect(_) | Failure::NoAnswer { reused: true } => Self::Nothing,
            _ if failure.is_transport() => Self::Suspicion,
            // vLLM says neither; what stands before it does (`faults.md` §5)
            Failure::Status(Refusing { status: 502 | 504, .. }) => Self::Suspicion,
            _ if failure.doubts() => Self::Doubt,
            _ => Self::Nothing,
        }
    }
}

/// Judges the workers that one exchange was tried on.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    /// The servers that failed, by one of their workers, and whether that has been counted. As many as there are
    /// attempts.
    failed: Vec<(Arc<Worker>, bool)>,
}

impl Judge {
    /// Of an exchange that begins.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// An attempt on `worker` failed.
    pub(crate) fn failed(&mut self, worker: &Arc<Worker>, failure: &Failure, now: Millis) {
        if failure.is_transport() {
            worker.counters().transport_errors.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(worker = worker.name(), error = %failure, "an attempt failed");
        }
        if let Some(pause_ms) = failure.sets_back_ms() {
            worker.set_back(now.saturating_add(pause_ms));
        }
        match Weight::of(failure) {
            Weight::Fact(reason) => {
                let counted = std::mem::replace(self.entry(worker), true);
                // the control thread sees it, says so and probes
                if worker.set_health(Health::Down) == Health::Down {
                    // It was tried although it was out. To be away for long is no worse than to be away: it is back
                    // with its first good probe.
                    return;
                }
                worker.counters().ejected(reason);
                if !counted {
                    count(worker, now);
                }
            }
            Weight::Suspicion => {
                worker.doubt();
                self.entry(worker);
            }
            Weight::Doubt => worker.doubt(),
            Weight::Nothing => {}
        }
    }

    /// `worker` answered, and its answer was passed on.
    pub(crate) fn answered(&mut self, worker: &Arc<Worker>, status: u16, now: Millis) {
        if status >= 500 {
            worker.set_back(now.saturating_add(SET_BACK_MS));
        }
        if !(200..300).contains(&status) {
            return;
        }
        let suspects = self.failed.drain(..).filter(|(_, counted)| !counted);
        suspects.filter(|(suspect, _)| !suspect.shares_server(worker)).for_each(|(suspect, _)| {
            count(&suspect, now);
        });
    }

    /// Whether a failure of the worker's server has been counted.
    fn entry(&mut self, worker: &Arc<Worker>) -> &mut bool {
        let known = self.failed.iter().position(|(failed, _)| failed.shares_server(worker));
        let at = known.unwrap_or_else(|| {
            self.failed.push((worker.clone(), false));
            self.failed.len() - 1
        });
        &mut self.failed[at].1
    }
}

/// The answer of `worker` begins, with a status that is passed on. If it is good the trial has succeeded: what follows
/// may take long, and the next one need not wait for it.
pub(crate) fn begins(worker: &Worker, trial: &mut Trial, status: u16, now: Millis) {
    if !trial.is_probe() || !matches!(status, 101 | 200..300) {
        return;
    }
    if worker.breaker().succeeded(now) == Turn::Closed {
        tracing::info!(worker = worker.name(), "breaker of worker is closed");
    }
    *trial = Trial::unneeded();
}

/// Counts a failure against the worker's breaker.
fn count(worker: &Worker, now: Millis) {
    if let Turn::Opened(open_ms) = worker.failed(now) {
        worker.counters().ejected(Ejection::Breaker);
        let reason = "too many requests failed on it";
        tracing::warn!(worker = worker.name(), reason, open_ms, "breaker of worker is open");
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::workers::{BreakerRules, BreakerState, WorkerSpec};

    const NOW: Millis = 7;

    /// Two servers whose breakers open with the first failure.
    fn servers() -> [Arc<Worker>; 2] {
        let rules = BreakerRules { failures: 1, ..BreakerRules::default() };
        ["http://a:1", "http://b:1"].map(|url| {
            let worker = Worker::with_breaker(0, url.parse().unwrap(), rules);
            worker.set_health(Health::Up);
            Arc::new(worker)
        })
    }

    fn state(worker: &Worker) -> BreakerState {
        worker.breaker().state()
    }

    fn suspicions() -> [Failure; 6] {
        let refused = |status| Failure::Status(Refusing { status, retry_after_secs: None });
        [
            refused(502),
            refused(504),
            Failure::NoAnswer { reused: false },
            Failure::AnswerCut,
            Failure::AnswerBody,
            Failure::Unexpected("101 without an upgrade"),
        ]
    }

    #[test]
    fn what_the_request_may_have_caused_counts_only_when_another_worker_answers_it_well() {
        for failure in suspicions() {
            let [a, b] = servers();
            let mut judge = Judge::new();
            judge.failed(&a, &failure, NOW);
            assert!(a.usable() && a.take_doubt(), "{failure}: it is doubted, not condemned");
            judge.answered(&b, 200, NOW);
            assert_eq!([&a, &b].map(|worker| state(worker)), [BreakerState::Open, BreakerState::Closed]);
        }
    }

    #[test]
    fn no_answer_but_a_good_one_of_another_server_makes_a_suspicion_count() {
        for status in [400, 404, 429, 500, 502, 503] {
            let [a, b] = servers();
            let mut judge = Judge::new();
            judge.failed(&a, &Failure::AnswerCut, NOW);
            judge.failed(&b, &Failure::AnswerCut, NOW);
            judge.answered(&b, status, NOW);
            assert_eq!([&a, &b].map(|worker| state(worker)), [BreakerState::Closed; 2], "{status}");
        }
        let rank = |rank| WorkerSpec { rank: Some(rank), ..servers()[0].url().to_string().parse().unwrap() };
        let rules = BreakerRules { failures: 1, ..BreakerRules::default() };
        let first = Arc::new(Worker::with_breaker(0, rank(0), rules));
        let second = Arc::new(first.sibling(1, rank(1)));
        let mut judge = Judge::new();
        judge.failed(&first, &Failure::AnswerCut, NOW);
        judge.answered(&second, 200, NOW);
        assert_eq!(state(&first), BreakerState::Closed, "a rank does not speak against its own server");
    }

    #[test]
    fn a_refused_connect_counts_at_once_and_once() {
        let rules = BreakerRules { failures: 2, ..BreakerRules::default() };
        let worker = Arc::new(Worker::with_breaker(0, "http://a:1".parse().unwrap(), rules));
        worker.set_health(Health::Up);
        let refused = || Failure::Connect(io::Error::from_raw_os_error(libc::ECONNREFUSED));
        let mut judge = Judge::new();
        judge.failed(&worker, &refused(), NOW);
        judge.failed(&worker, &refused(), NOW);
        judge.answered(&servers()[1], 200, NOW);
        assert_eq!((worker.health(), state(&worker)), (Health::Down, BreakerState::Closed));
        assert_eq!(worker.counters().ejections[Ejection::Connect as usize].load(Ordering::Relaxed), 1);
        for _ in 0..10 {
            Judge::new().failed(&worker, &refused(), NOW);
        }
        assert_eq!(state(&worker), BreakerState::Closed, "it was out already");
        worker.set_health(Health::Up);
        Judge::new().failed(&worker, &refused(), NOW);
        assert_eq!(state(&worker), BreakerState::Open, "the second time that it went away");
    }

    #[test]
    fn what_is_not_the_workers_fault_counts_never() {
        let [a, b] = servers();
        let mut judge = Judge::new();
        for failure in [
            Failure::Status(Refusing { status: 500, retry_after_secs: None }),
            Failure::ClientGone,
            Failure::Late,
            Failure::RequestBody,
            Failure::NoWorker,
            Failure::NoAnswer { reused: true },
            Failure::Connect(io::Error::from_raw_os_error(libc::EMFILE)),
            Failure::Connect(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL)),
        ] {
            judge.failed(&a, &failure, NOW);
            assert!(a.usable() && !a.take_doubt(), "{failure}");
        }
        judge.answered(&b, 200, NOW);
        assert_eq!(state(&a), BreakerState::Closed);
    }

    #[test]
    fn good_answers_close_a_half_open_breaker() {
        let rules = BreakerRules { failures: 1, successes: 2, open_ms: 0, ..BreakerRules::default() };
        let worker = Arc::new(Worker::with_breaker(0, "http://a:1".parse().unwrap(), rules));
        worker.failed(0);
        let now = NOW;
        let mut trial = worker.breaker().begin(now).unwrap();
        begins(&worker, &mut trial, 404, now);
        assert!(!worker.breaker().admits(now), "it is no verdict, and the trial goes on");
        begins(&worker, &mut trial, 200, now);
        assert!(worker.breaker().admits(now), "the answer may take as long as it likes");
        assert_eq!(state(&worker), BreakerState::HalfOpen);
        begins(&worker, &mut trial, 200, now);
        assert_eq!(state(&worker), BreakerState::HalfOpen, "a trial counts once");
        let mut second = worker.breaker().begin(now).unwrap();
        begins(&worker, &mut second, 200, now);
        assert_eq!(state(&worker), BreakerState::Closed);
        begins(&worker, &mut Trial::unneeded(), 200, now);
    }
}
