//! Whether another attempt is made: decided here and nowhere else.

use crate::{
    base::Millis,
    http::{ResponseFraming, ResponseHead},
    proxy::{
        RetrySettings,
        budget::{Budget, Spent},
    },
    routing::Tried,
    telemetry::metrics::{Metrics, Retry},
    vllm::{self, Unbegun},
    workers::{Fleet, Health, Resolved, Worker},
};

pub(crate) use crate::proxy::failure::{Failure, Refusing};

/// The moment of a decision, and where it is counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment<'a> {
    pub(crate) now: Millis,
    /// Chance, from 0 to below 1.
    pub(crate) chance: f64,
    /// Knows the requests that run in the process.
    pub(crate) metrics: &'a Metrics,
    /// Position of the shard that counts.
    pub(crate) shard: usize,
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Tell the client: the failure, or the answer that was held.
    GiveUp(Without),
    /// Try another worker at once.
    Another,
    /// Try the same worker at once, on a fresh connection.
    Fresh,
    /// Try a worker of another kind.
    OtherKind,
    /// Every worker was tried: try one of them again after so many milliseconds.
    Again(u64),
}

/// Why no further attempt is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Without {
    /// It would change nothing, or do something twice.
    Use,
    /// There are no attempts or no workers left.
    Chance,
    /// There are too many over all traffic.
    Budget,
}

/// What the body of an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A stream of events.
    Events,
    /// One JSON document.
    Json,
    Other,
}

impl Kind {
    /// As the head says. What is empty is no stream and should have been a document (`faults.md` U14).
    pub(crate) fn of(answer: &ResponseHead) -> Self {
        const JSON: &[u8] = b"application/json";
        let kind = answer.content_type().unwrap_or_default();
        match kind.get(..JSON.len()) {
            Some(essence) if essence.eq_ignore_ascii_case(JSON) => Self::Json,
            _ if answer.is_event_stream() => Self::Events,
            _ if answer.framing() == ResponseFraming::Length(0) => Self::Json,
            _ => Self::Other,
        }
    }
}

/// What a worker's answer has to be asked before it is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    /// Whether a stream of events begins.
    Begins,
    /// Whether a document is there, and was not broken off.
    Whole,
    /// Whether a 503 is that of a busy vLLM.
    Busy,
    /// Whether a 500 is that of a dead engine.
    EngineDead,
    /// Whether a 404 is about the model.
    ModelLost,
    /// Nothing more: its status is one of `--retry-statuses`.
    Nothing,
}

/// What is known of the further attempts of one exchange.
#[derive(Debug)]
pub(crate) struct Retries<'a> {
    settings: &'a RetrySettings,
    budget: &'a Budget,
    fleet: &'a Fleet,
    asked: Repeatable,
    /// Who may serve the request: positions in the fleet; empty where only the control thread may.
    serving: &'a [usize],
    tried: Tried,
    /// Attempts that have begun, without those on a fresh connection in place of a stale one.
    attempts: u32,
    pauses: u32,
    /// A bit for each [`Retry`] that is given one further attempt only and has had it.
    had: u32,
    /// The worker of the attempt that runs, and whether it stands in for a stale connection.
    position: usize,
    fresh: bool,
    /// Who wants to be left alone, until when.
    barred: Vec<(usize, Millis)>,
    spent: Option<Spent<'a>>,
    /// What was decided of an answer before it was given up.
    decided: Option<Next>,
    /// What is wrong with the answer that was passed on.
    passed: Option<Failure>,
}

/// What a request lets be done with it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Repeatable {
    /// It may be sent again after a worker has seen it.
    pub(crate) always: bool,
    /// Its answer is generated text, which tells why it ended.
    pub(crate) generates: bool,
    /// Its body may name a model.
    pub(crate) names_model: bool,
}

/// What another attempt costs and may have.
#[derive(Debug, Clone, Copy)]
struct Terms {
    /// It is counted against the budget: the worker has been given work.
    costs: bool,
    /// An exchange gets one such attempt.
    once: bool,
    /// The workers that were tried may be tried again.
    again: bool,
    /// Only on a worker that is usable: there is an answer that would be lost.
    usable: bool,
}

impl Failure {
    fn terms(&self, fresh: bool) -> Terms {
        let answered = Terms { costs: true, once: false, again: false, usable: true };
        match self {
            // what died under a request and cannot even be reached any more may have died of it
            Self::Connect(_) if fresh => Terms { costs: false, once: true, again: false, usable: false },
            Self::Connect(_) => Terms { costs: false, once: false, again: true, usable: false },
            // a request that kills a worker must not go through the whole fleet
            Self::NoAnswer { .. } | Self::AnswerCut => {
                Terms { costs: true, once: true, again: false, usable: false }
            }
            Self::Status(_) => Terms { again: true, ..answered },
            Self::ModelLost => Terms { once: true, ..answered },
            // Who ends takes all its requests with it, more than the budget could bear, and each moves on but once.
            Self::EngineDead | Self::Aborted | Self::Unbegun(Unbegun::EngineDead | Unbegun::Aborted) => {
                Terms { costs: false, once: true, ..answered }
            }
            _ => answered,
        }
    }

    /// What another attempt is counted as among those that an exchange gets one of.
    fn once(&self, fresh: bool) -> u32 {
        let reason = match self {
            Self::Connect(_) if fresh => Some(Retry::ConnectionLost),
            _ => self.reason(),
        };
        reason.map_or(0, |reason| 1 << reason as u32)
    }
}

impl<'a> Retries<'a> {
    /// Before the first attempt. `serving` are positions in the fleet, ascending; none: the control thread.
    pub(crate) fn new(
        settings: &'a RetrySettings,
        budget: &'a Budget,
        fleet: &'a Fleet,
        serving: &'a [usize],
        asked: Repeatable,
    ) -> Self {
        Self {
            settings,
            budget,
            fleet,
            asked,
            serving,
            tried: Tried::none(),
            attempts: 0,
            pauses: 0,
            had: 0,
            position: 0,
            fresh: false,
            barred: Vec::new(),
            spent: None,
            decided: None,
            passed: None,
        }
    }

    /// The workers that must not be chosen now.
    pub(crate) fn tried(&self) -> &Tried {
        &self.tried
    }

    /// Others may serve the request from now on.
    pub(crate) fn serve(&mut self, serving: &'a [usize]) {
        self.serving = serving;
        self.tried = Tried::none();
    }

    /// An attempt on the worker at `position` begins; `fresh`: because a connection was stale.
    pub(crate) fn begin(&mut self, position: usize, fresh: bool) {
        (self.position, self.fresh) = (position, fresh);
        self.attempts += u32::from(!fresh);
    }

    /// Whether a body of so many bytes is kept for another attempt.
    pub(crate) fn keeps(&self, body_bytes: usize) -> bool {
        self.asked.always && body_bytes as u64 <= self.settings.retry_buffer_bytes
    }

    /// What an answer of this kind has to be asked before it is passed on, and whether it is worth waiting for what
    /// says so: whether another attempt can be made at all (but for the budget, which is not asked before it is
    /// needed). The last of several attempts is only looked at, so that it is counted for what it is; and a dead
    /// engine is to be known whoever meets it.
    pub(crate) fn question(&self, status: u16, kind: Kind) -> Option<(Question, bool)> {
        let question = match status {
            200 if self.asked.generates && kind == Kind::Events => Question::Begins,
            200 if self.asked.generates && kind == Kind::Json => Question::Whole,
            200..400 => return None,
            _ if self.settings.is_retried(status) => Question::Nothing,
            429 | 503 => Question::Busy,
            500 => Question::EngineDead,
            404 if self.asked.names_model => Question::ModelLost,
            _ => return None,
        };
        let again = question == Question::Nothing;
        let holds = self.asked.always && self.has_attempts() && (again || self.leaves(true));
        // a look at what is there anyway costs little, and tells a failure from a success
        let looks = match question {
            Question::Begins | Question::Whole | Question::EngineDead => true,
            _ => self.asked.always && self.attempts > 1,
        };
        (holds || looks).then_some((question, holds))
    }

    /// Whether the answer is generated text, which is never empty.
    pub(crate) fn generates(&self) -> bool {
        self.asked.generates
    }

    /// Whether this body names a model that workers have listed, so that a worker that knows it not has lost it.
    pub(crate) fn is_listed(&self, body: &[u8]) -> bool {
        let facts = vllm::scan_json(body);
        let name = facts.model.name(body);
        let Some(name) = name else { return false };
        matches!(self.fleet.resolve(Some(&name)), Resolved::Workers { model: Some(_), .. })
    }

    /// Decides before an answer is given up: whether it is. If so the allowance for another attempt is taken, and
    /// [`Retries::next`] says the same.
    pub(crate) fn gives_up(
        &mut self,
        at: &Moment<'_>,
        worker: &Worker,
        failure: &Failure,
        kept: bool,
    ) -> bool {
        let next = self.counted(at, worker, failure, kept);
        self.decided = (!matches!(next, Next::GiveUp(_))).then_some(next);
        self.decided.is_some()
    }

    /// The answer is passed on although it is this failure.
    pub(crate) fn passed(&mut self, failure: Failure) {
        self.passed = Some(failure);
    }

    /// What the answer was that was passed on, if it was a failure.
    pub(crate) fn take_passed(&mut self) -> Option<Failure> {
        self.passed.take()
    }

    /// Whether it is worth waiting for what a probe says of the worker: if it has died, another attempt costs nothing.
    pub(crate) fn waits_for_probe(failure: &Failure, next: Next) -> bool {
        next == Next::GiveUp(Without::Budget)
            && matches!(failure, Failure::NoAnswer { .. } | Failure::AnswerCut)
    }

    /// What to do after a failed attempt on `worker`; `kept`: the body is there.
    pub(crate) fn next(&mut self, at: &Moment<'_>, worker: &Worker, failure: &Failure, kept: bool) -> Next {
        let decided = self.decided.take();
        decided.unwrap_or_else(|| self.counted(at, worker, failure, kept))
    }

    /// Decides, counts and tells.
    fn counted(&mut self, at: &Moment<'_>, worker: &Worker, failure: &Failure, kept: bool) -> Next {
        let died = worker.health() == Health::Down;
        let next = self.decide(failure, kept, died, at.now, at.chance, || at.metrics.in_flight());
        let metrics = at.metrics.shard(at.shard);
        let Some(reason) = failure.reason() else { return next };
        match next {
            Next::GiveUp(Without::Use) => {}
            Next::GiveUp(Without::Chance) => metrics.retries_exhausted(reason),
            Next::GiveUp(Without::Budget) => metrics.retry_over_budget(),
            Next::Another | Next::Fresh | Next::OtherKind | Next::Again(_) => metrics.retried(reason),
        }
        tracing::debug!(
            worker = worker.name(),
            reason = reason.label(),
            attempts = self.attempts,
            next = ?next,
            "decided on another attempt"
        );
        next
    }

    fn decide(
        &mut self,
        failure: &Failure,
        kept: bool,
        died: bool,
        now: Millis,
        chance: f64,
        in_flight: impl FnOnce() -> u64,
    ) -> Next {
        if failure.reason().is_none() || !kept {
            return Next::GiveUp(Without::Use);
        }
        match failure {
            // nothing was done
            Failure::NoSuchPath => return Next::OtherKind,
            // a worker that closes an idle connection has not read the request
            Failure::NoAnswer { reused: true } if self.asked.always && !self.fresh => return Next::Fresh,
            _ => {}
        }
        let terms = failure.terms(self.fresh);
        let unseen = failure.is_unsent() && !self.fresh;
        if !unseen && !self.asked.always {
            return Next::GiveUp(Without::Use);
        }
        if let Failure::Busy(Refusing { retry_after_secs: Some(seconds), .. })
        | Failure::Status(Refusing { retry_after_secs: Some(seconds), .. }) = failure
        {
            self.barred.push((self.position, now.saturating_add(seconds.saturating_mul(1000))));
        }
        let once = if terms.once { failure.once(self.fresh) } else { 0 };
        if self.had & once != 0 || !self.has_attempts() {
            return Next::GiveUp(Without::Chance);
        }
        let pause = match self.leaves(terms.usable) {
            true => None,
            false if terms.again => match self.pause(now, chance) {
                Some(pause) => Some(pause),
                None => return Next::GiveUp(Without::Chance),
            },
            false => return Next::GiveUp(Without::Chance),
        };
        // what was spent on the attempt that has ended comes first
        self.spent = None;
        // what has died cannot be made worse, nor can it be asked more than once
        if terms.costs && !(died && terms.once) {
            self.spent = self.budget.begin(now, in_flight());
            if self.spent.is_none() {
                return Next::GiveUp(Without::Budget);
            }
        }
        self.had |= once;
        match pause {
            None => {
                self.tried.add(self.position);
                Next::Another
            }
            Some(pause) => {
                self.pauses += 1;
                self.tried = Tried::none();
                for &position in self.serving {
                    if self.barred_until(position) > now.saturating_add(pause) {
                        self.tried.add(position);
                    }
                }
                Next::Again(pause)
            }
        }
    }

    fn has_attempts(&self) -> bool {
        self.attempts < self.settings.attempts()
    }

    /// Whether there is a worker that was not tried; `usable`: one that takes requests in the ordinary way.
    fn leaves(&self, usable: bool) -> bool {
        self.serving.iter().any(|&position| {
            position != self.position
                && !self.tried.contains(position)
                && (!usable || self.fleet.workers.get(position).is_some_and(|worker| is_well(worker)))
        })
    }

    /// How long to wait before those that were tried are tried again; `None`: one of them would have to be asked
    /// before the time that it has named, or the wait would be too long.
    fn pause(&self, now: Millis, chance: f64) -> Option<u64> {
        let pause = self.settings.backoff().pause_ms(self.pauses, chance);
        let waits = self.serving.iter().map(|&position| self.barred_until(position).saturating_sub(now));
        let wait = pause.max(waits.min().unwrap_or(0));
        (wait <= pause.max(self.settings.retry_max_backoff_ms)).then_some(wait)
    }

    fn barred_until(&self, position: usize) -> Millis {
        let until = self.barred.iter().filter(|(barred, _)| *barred == position).map(|(_, until)| *until);
        until.max().unwrap_or(0)
    }
}

/// Whether an answer in hand may be given up for what this worker will say: one that sleeps would say nothing.
fn is_well(worker: &Worker) -> bool {
    worker.usable() && !worker.rests()
}

#[cfg(test)]
mod tests;
