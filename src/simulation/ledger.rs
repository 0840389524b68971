//! The world's own books: what each request was given and went through, counted apart from the proxy's counters, and
//! the rules that both must keep.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use crate::{
    admission::Waiter,
    base::Millis,
    proxy::{
        choice::Pick,
        retry::{Failure, Next},
    },
    routing::Tried,
    simulation::time::TaskId,
    vllm::Unbegun,
    workers::{BreakerState, Fleet, Worker},
};

/// What a request does to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    Innocent,
    /// Its connection is reset, and the worker lives on.
    Resets,
    /// It always gives 500.
    Fails,
    /// The worker dies of it.
    Kills,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A worker's answer was passed on, counted as this status.
    Answered(u16),
    /// By an answer of ours.
    Refused(u16),
    UnknownModel,
    /// The client left.
    Left,
}

/// A request, and what has become of it so far.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) client: u64,
    pub(super) priority: i64,
    pub(super) model: &'static str,
    pub(super) body: String,
    pub(super) streams: bool,
    /// It may be sent again after a worker has seen it.
    pub(super) always: bool,
    pub(super) nature: Nature,
    /// How long its answer takes.
    pub(super) takes_ms: u64,
    /// When `--request-timeout-secs` are over.
    pub(super) deadline: Millis,
    pub(super) leaves_at: Millis,
    /// It came after all faults were over.
    pub(super) settled: bool,
    pub(super) story: Story,
    /// Its answer was given up before any of it was passed on.
    pub(super) given_up: Cell<bool>,
}

#[derive(Debug, Default)]
pub(super) struct Story {
    /// The workers that it was sent to, in order.
    sent: RefCell<Vec<usize>>,
    killed: RefCell<Vec<usize>>,
    attempts: Cell<u32>,
    fresh: Cell<u32>,
    /// Something of an answer has gone to the client.
    begun: Cell<bool>,
    /// It broke off after that.
    pub(super) broke: Cell<bool>,
    /// The failures of which one further attempt is made only.
    once: RefCell<Vec<Once>>,
    /// One of those came twice.
    pub(super) twice: Cell<bool>,
    pub(super) over_budget: Cell<bool>,
    /// The last failure is one after which there never is another attempt.
    pub(super) is_final: Cell<bool>,
    /// Workers that want to be left alone, until when.
    barred: RefCell<Vec<(usize, Millis)>>,
    /// The attempt that runs is one that costs of the budget.
    spends: Cell<bool>,
    outcome: Cell<Option<Outcome>>,
}

/// Failures that must not go through the whole fleet (`faults.md` §4), by what they have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Once {
    Lost,
    EngineDead,
    ModelLost,
    Aborted,
}

impl Once {
    fn of(failure: &Failure, fresh: bool) -> Option<Self> {
        Some(match failure {
            Failure::NoAnswer { reused: true } => return None,
            Failure::NoAnswer { reused: false } | Failure::AnswerCut => Self::Lost,
            Failure::Connect(_) if fresh => Self::Lost,
            Failure::EngineDead | Failure::Unbegun(Unbegun::EngineDead) => Self::EngineDead,
            Failure::ModelLost => Self::ModelLost,
            Failure::Aborted | Failure::Unbegun(Unbegun::Aborted) => Self::Aborted,
            _ => return None,
        })
    }
}

/// What was decided after a failure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decided {
    /// `None`: the answer is passed on.
    pub(super) next: Option<Next>,
    /// The budget was used up.
    pub(super) over_budget: bool,
    /// The worker was down by then.
    pub(super) died: bool,
}

/// One more, until dropped.
pub(super) struct Counted<'a>(&'a Cell<u64>);

impl<'a> Counted<'a> {
    pub(super) fn new(count: &'a Cell<u64>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// One who waits in the queue.
pub(super) struct Waits {
    pub(super) waiter: Arc<Waiter>,
    pub(super) task: TaskId,
    /// As [`crate::admission::RoomWanted::of`].
    pub(super) of: Option<u64>,
    pub(super) priority: i64,
    pub(super) since: Millis,
    pub(super) until: Millis,
    /// At which event.
    pub(super) joined: u64,
    pub(super) fleet: Arc<Fleet>,
    pub(super) positions: Vec<usize>,
    pub(super) tried: Tried,
    /// At which event it was let in; not yet: the largest number.
    pub(super) served: Cell<u64>,
    /// It was called, and its task is to be woken.
    pub(super) woken: Cell<bool>,
}

/// A line in the list of those who wait, until dropped.
pub(super) struct Listed<'a>(&'a Ledger, Arc<Waiter>);

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.waiting.borrow_mut().retain(|other| !Arc::ptr_eq(&other.waiter, &self.1));
    }
}

/// Seconds' share of the allowance of further attempts, in thousandths: 3 a second, and 3 at once.
const BURST: u64 = 3_000;

#[derive(Default)]
pub(super) struct Ledger {
    /// By worker.
    pub(super) in_flight: Vec<Cell<u64>>,
    pub(super) permits: Cell<u64>,
    pub(super) exchanges: Cell<u64>,
    pub(super) waiting: RefCell<Vec<Waits>>,
    /// Further attempts that run and cost of the budget.
    pub(super) spending: Cell<u64>,
    /// Thousandths of the allowance per second that are left, and when that was.
    tokens: Cell<(u64, Millis)>,
    /// Trials of half-open breakers that run: worker, and number.
    trials: RefCell<Vec<(usize, u64)>>,
    /// Failures that may count against a worker's breaker, by worker.
    blame: Vec<Cell<u32>>,
    /// By worker: how often its breaker has opened.
    openings: Vec<Cell<u32>>,
    events: Cell<u64>,
    pub(super) requests: RefCell<Vec<Rc<Request>>>,
    /// What came to pass, so that a seed in which nothing does shows.
    pub(super) tally: Tally,
}

/// How often something happened that the rules are about.
#[derive(Debug, Default, Clone)]
pub(super) struct Tally {
    pub(super) further: Cell<u64>,
    pub(super) over_budget: Cell<u64>,
    pub(super) trials: Cell<u64>,
    pub(super) opened: Cell<u64>,
    pub(super) ejected: Cell<u64>,
    pub(super) waited: Cell<u64>,
    pub(super) gave_up_waiting: Cell<u64>,
    pub(super) kills: Cell<u64>,
    pub(super) left: Cell<u64>,
    pub(super) failed: Cell<u64>,
    pub(super) answered: Cell<u64>,
}

pub(super) fn add(count: &Cell<u64>) {
    count.set(count.get() + 1);
}

impl Ledger {
    pub(super) fn of(workers: usize) -> Self {
        let in_flight = (0..workers).map(|_| Cell::new(0)).collect();
        let [blame, openings] = [(); 2].map(|()| (0..workers).map(|_| Cell::new(0)).collect());
        Self { in_flight, blame, openings, tokens: Cell::new((BURST, 0)), ..Self::default() }
    }

    pub(super) fn event(&self) -> u64 {
        self.events.get()
    }

    pub(super) fn next_event(&self) {
        add(&self.events);
    }

    /// An attempt begins.
    pub(super) fn attempt(&self, request: &Request, fresh: bool, most: u32) {
        let story = &request.story;
        let count = if fresh { &story.fresh } else { &story.attempts };
        count.set(count.get() + 1);
        assert!(story.attempts.get() <= most, "more attempts than --retry-max-retries: {request:?}");
        assert!(story.fresh.get() <= story.attempts.get(), "one fresh connection for each: {request:?}");
    }

    /// A worker was given the request.
    pub(super) fn sent(&self, request: &Request, position: usize, now: Millis) {
        let barred = |(of, until): &(usize, Millis)| *of == position && now < *until;
        assert!(
            !request.story.barred.borrow().iter().any(barred),
            "{position} was asked before the time that it had named: {request:?}"
        );
        let mut sent = request.story.sent.borrow_mut();
        assert!(!request.story.begun.get(), "sent again after the answer had begun: {request:?}");
        assert!(request.always || sent.is_empty(), "a stateful request was sent twice: {request:?}");
        sent.push(position);
    }

    /// A worker wants to be left alone.
    pub(super) fn barred(&self, request: &Request, position: usize, until: Millis) {
        request.story.barred.borrow_mut().push((position, until));
    }

    /// A worker dies of the request.
    pub(super) fn kills(&self, request: &Request, position: usize) {
        let mut killed = request.story.killed.borrow_mut();
        killed.push(position);
        add(&self.tally.kills);
        assert!(killed.len() <= 2, "a request has killed {killed:?}");
    }

    /// The first byte of an answer goes to the client.
    pub(super) fn begun(&self, request: &Request) {
        assert!(!request.story.begun.replace(true), "two answers: {request:?}");
    }

    pub(super) fn broke(&self, request: &Request) {
        request.story.broke.set(true);
    }

    pub(super) fn gave_up_waiting(&self) {
        add(&self.tally.gave_up_waiting);
    }

    /// It was decided what to do after a failure.
    pub(super) fn decided(
        &self,
        request: &Request,
        failure: &Failure,
        fresh: bool,
        Decided { next, over_budget, died }: Decided,
        now: Millis,
    ) {
        let story = &request.story;
        if let Some(once) = Once::of(failure, fresh) {
            let known = story.once.borrow().contains(&once);
            story.twice.set(story.twice.get() || known);
            let again = matches!(next, Some(Next::Another | Next::Again(_)));
            if again {
                story.once.borrow_mut().push(once);
            }
            assert!(!(known && again), "a second further attempt after {failure}: {request:?}");
        }
        story.is_final.set(matches!(
            failure,
            Failure::BadAnswer(_) | Failure::AnswerBody | Failure::Unexpected(_) | Failure::NoHead
        ));
        // whose worker has ended moves on for nothing
        let ended = matches!(
            failure,
            Failure::Connect(_)
                | Failure::EngineDead
                | Failure::Aborted
                | Failure::Unbegun(Unbegun::EngineDead | Unbegun::Aborted)
        );
        let costs = !(ended || died && Once::of(failure, fresh).is_some());
        let may = || (self.spending.get() + 1) * 5 <= self.exchanges.get();
        match next {
            _ if over_budget => {
                self.spent(request);
                story.over_budget.set(true);
                add(&self.tally.over_budget);
                assert!(!may() && self.left(now) < 1_000, "the budget was not used up: {request:?}");
            }
            Some(Next::Another | Next::Again(_)) => {
                self.spent(request);
                add(&self.tally.further);
                if costs {
                    let left = self.left(now);
                    assert!(may() || left >= 1_000, "a further attempt beyond the budget: {request:?}");
                    if !may() {
                        self.tokens.set((left - 1_000, now));
                    }
                    story.spends.set(true);
                    add(&self.spending);
                }
            }
            _ => {}
        }
    }

    /// A worker failed: what may count are transport errors and dead engines, and nothing else.
    pub(super) fn failed(&self, position: usize, failure: &Failure) {
        let counts = matches!(
            failure,
            Failure::Connect(_)
                | Failure::NoAnswer { reused: false }
                | Failure::AnswerCut
                | Failure::AnswerBody
                | Failure::Unexpected(_)
                | Failure::EngineDead
                | Failure::Unbegun(Unbegun::EngineDead)
        );
        if counts {
            self.blame[position].set(self.blame[position].get() + 1);
        }
    }

    /// The closed breaker of a worker has opened: each time that takes so many failures. One may count long after it
    /// was, when another worker has answered.
    pub(super) fn opened(&self, position: usize, failures: u32) {
        add(&self.tally.opened);
        let opened = &self.openings[position];
        opened.set(opened.get() + 1);
        let (blame, opened) = (self.blame[position].get(), opened.get());
        assert!(
            blame >= failures * opened,
            "the breaker of {position} has opened {opened} times after {blame} failures"
        );
    }

    fn left(&self, now: Millis) -> u64 {
        let (tokens, at) = self.tokens.get();
        (tokens + 3 * (now - at)).min(BURST)
    }

    /// The further attempt has ended, if it was one that costs.
    pub(super) fn spent(&self, request: &Request) {
        if request.story.spends.replace(false) {
            self.spending.set(self.spending.get() - 1);
        }
    }

    /// A worker was chosen. Returns the number of its trial.
    pub(super) fn picked(&self, worker: &Worker, pick: &Pick<'_>) -> Option<u64> {
        let (state, trial) = (worker.breaker().state(), pick.trial.is_probe());
        let regular = match state {
            BreakerState::Closed => true,
            BreakerState::Open => pick.stand_in,
            BreakerState::HalfOpen => pick.stand_in || trial,
        };
        assert!(regular, "{} was chosen although its breaker is {state:?}", worker.name());
        assert!(!worker.rests(), "{} was chosen although it rests", worker.name());
        if !trial {
            return None;
        }
        let mut trials = self.trials.borrow_mut();
        let running = trials.iter().any(|(position, _)| *position == pick.position);
        assert!(!running, "two trials at a time on {}", worker.name());
        add(&self.tally.trials);
        trials.push((pick.position, self.tally.trials.get()));
        trials.last().map(|(_, number)| *number)
    }

    pub(super) fn trial_ended(&self, position: usize, trial: Option<u64>) {
        let Some(trial) = trial else { return };
        self.trials.borrow_mut().retain(|running| *running != (position, trial));
    }

    /// The breaker of this worker is not half-open: trials that still run are none any more.
    pub(super) fn overtaken(&self, position: usize) {
        self.trials.borrow_mut().retain(|(other, _)| *other != position);
    }

    pub(super) fn waits(&self, waits: Waits) -> Listed<'_> {
        add(&self.tally.waited);
        let listed = Listed(self, waits.waiter.clone());
        self.waiting.borrow_mut().push(waits);
        listed
    }

    /// A request has ended.
    pub(super) fn ended(&self, request: &Request, outcome: Outcome) {
        self.spent(request);
        let before = request.story.outcome.replace(Some(outcome));
        assert_eq!(before, None, "ended twice: {request:?}");
        add(match outcome {
            Outcome::Left => &self.tally.left,
            Outcome::Answered(200) => &self.tally.answered,
            _ => &self.tally.failed,
        });
    }

    /// Whether every request has ended.
    pub(super) fn all_ended(&self) -> bool {
        self.requests.borrow().iter().all(|request| request.story.outcome.get().is_some())
    }
}
