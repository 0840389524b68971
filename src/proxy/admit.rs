//! Letting a request in: the rate, a slot, room on a worker; and waiting for these where they are not to be had.
//!
//! Everything here is off unless a limit is set, and then costs a branch.

use std::{
    cell::RefCell,
    future::poll_fn,
    sync::Arc,
    task::{Poll, Waker},
};

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    admission::{
        Admission, Admitted, Entry, Newcomer, Permit, Reason, Refused, Room, Settings, Waiter, Waiting,
    },
    http::RequestFraming,
    proxy::{
        body::Body, client::Client, context::Context, inspect::Inspected, retry::Failure, serving::Serving,
    },
    routing::Tried,
    vllm::{self, Endpoint, Facts, Key, Treatment},
    workers::{Fleet, Worker},
};

/// After this time, in microseconds, a client may try again whose body there was no memory for: bodies are gone as
/// soon as their answer begins.
const MEMORY_RETRY_MICROS: u64 = 5_000_000;

/// What one shard needs to let requests in.
pub(super) struct Entrance {
    admission: Arc<Admission>,
    /// The header between whose values the queue is fair.
    fairness_header: String,
    /// Milliseconds that a request waits at most.
    timeout_ms: u64,
    /// Those who wait on this shard, and how they are woken. In no order.
    waiting: RefCell<Vec<(Arc<Waiter>, Waker)>>,
}

impl Entrance {
    pub(super) fn new(admission: Arc<Admission>, settings: &Settings) -> Self {
        Self {
            admission,
            fairness_header: settings.queue_fairness_header.clone(),
            timeout_ms: settings.queue_timeout_secs.saturating_mul(1000),
            waiting: RefCell::default(),
        }
    }

    /// What all shards let in together.
    pub(super) fn admission(&self) -> &Admission {
        &self.admission
    }

    /// The bell was rung: who has been let in is woken.
    pub(super) fn look(&self) {
        for (waiter, waker) in &*self.waiting.borrow() {
            if waiter.is_called() {
                waker.wake_by_ref();
            }
        }
    }

    /// Has the queue served anew: a worker may have become usable, which nobody tells.
    pub(super) fn tick(&self) {
        if !self.waiting.borrow().is_empty() {
            self.admission.room_made();
            self.look();
        }
    }

    /// Remembers how `waiter` is woken.
    fn remember(&self, waiter: &Arc<Waiter>, waker: &Waker) {
        let mut waiting = self.waiting.borrow_mut();
        match waiting.iter_mut().find(|(other, _)| Arc::ptr_eq(other, waiter)) {
            Some((_, known)) if known.will_wake(waker) => {}
            Some((_, known)) => *known = waker.clone(),
            None => waiting.push((waiter.clone(), waker.clone())),
        }
    }

    fn forget(&self, waiter: &Arc<Waiter>) {
        let mut waiting = self.waiting.borrow_mut();
        if let Some(at) = waiting.iter().position(|(other, _)| Arc::ptr_eq(other, waiter)) {
            waiting.swap_remove(at);
        }
    }
}

/// What a request has been given, to be held to the end of its exchange.
pub(super) struct Pass<'a> {
    permit: Option<Permit<'a>>,
    room: Option<Room<'a>>,
}

impl<'a> Pass<'a> {
    /// The place on a worker that was taken for the next attempt.
    pub(super) fn take_room(&mut self) -> Option<Room<'a>> {
        self.room.take()
    }
}

/// What decides when a request is let in that has to wait.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Claim {
    /// Lower goes first.
    priority: i64,
    /// Among whom the queue is fair.
    key: u64,
}

impl Claim {
    /// Reads it, where there may be a queue; before the body is changed.
    pub(super) fn of(client: &Client<'_>, inspected: &Inspected, body: &mut Body) -> Self {
        let Some(entrance) = &client.cx.entrance else { return Self::default() };
        let value = client.request.field(&entrance.fairness_header);
        let key = value.map_or(0, |value| xxh3_64(value.trim_ascii()));
        let priority = inspected.facts().and_then(|facts| priority(facts, body.arrived().filled()));
        Self { priority: priority.unwrap_or(0), key }
    }
}

/// vLLM's `priority` (`ChatCompletionRequest` and its like), if it is a whole number.
fn priority(facts: &Facts, body: &[u8]) -> Option<i64> {
    let value = body.get(facts.prompt.get(Key::Priority)?)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Refuses before its body is read a request for which there will hardly be a place: reading it would cost memory and
/// the client's time.
///
/// # Errors
/// The queue is full.
pub(super) fn before_body(client: &Client<'_>, endpoint: &Endpoint) -> Result<(), Failure> {
    let Some(entrance) = &client.cx.entrance else { return Ok(()) };
    let to_workers = matches!(endpoint.treatment, Treatment::Route(_));
    let most = client.cx.settings.body_peek_bytes;
    match client.request.framing() {
        RequestFraming::Length(length) if length <= most => Ok(()),
        _ if !to_workers => Ok(()),
        _ => entrance.admission.foresee().map_err(|refused| client.refused(refused)),
    }
}

/// Lets a request in, at once or when it is its turn.
///
/// # Errors
/// Too many come, or wait.
///
/// # Cancellation
/// It leaves the queue.
pub(super) async fn admit<'a>(
    client: &Client<'a>,
    endpoint: &Endpoint,
    fleet: &Fleet,
    serving: &Serving<'_>,
    claim: Claim,
) -> Result<Pass<'a>, Failure> {
    let cx = client.cx;
    let (Some(entrance), Treatment::Route(_)) = (&cx.entrance, endpoint.treatment) else {
        return Ok(Pass { permit: None, room: None });
    };
    let arrived = entrance.admission.arrives(cx.clock.exact().micros());
    arrived.map_err(|refused| client.refused(refused))?;
    if let Some(permit) = entrance.admission.try_enter() {
        return Ok(Pass { permit: Some(permit), room: None });
    }
    // rare beside the exchanges that do not wait, which should not carry its state
    Box::pin(queue(client, entrance, fleet, serving, &Tried::none(), claim)).await
}

/// Waits for room on a worker, where every candidate has as many requests as it may. The slot is given back meanwhile:
/// who can be served by others goes first.
///
/// # Errors
/// Too many wait, or it took too long.
///
/// # Cancellation
/// It leaves the queue.
pub(super) async fn wait_for_room<'a>(
    client: &Client<'a>,
    pass: &mut Pass<'a>,
    fleet: &Fleet,
    serving: &Serving<'_>,
    tried: &Tried,
    claim: Claim,
) -> Result<(), Failure> {
    // a worker's limit is a reason to have an entrance
    let Some(entrance) = &client.cx.entrance else { return Err(Failure::NoWorker) };
    drop(pass.permit.take());
    *pass = queue(client, entrance, fleet, serving, tried, claim).await?;
    Ok(())
}

async fn queue<'a>(
    client: &Client<'a>,
    entrance: &'a Entrance,
    fleet: &Fleet,
    serving: &Serving<'_>,
    tried: &Tried,
    claim: Claim,
) -> Result<Pass<'a>, Failure> {
    let cx = client.cx;
    let Claim { priority, key } = claim;
    let workers = limited(fleet, serving, tried);
    let newcomer = Newcomer { priority, key, shard: cx.shard(), workers };
    let admitted = match entrance.admission.enter(newcomer) {
        Entry::In(admitted) => Ok(admitted),
        Entry::Refused(refused) => Err(refused),
        Entry::Waits(waiting) => {
            let mut place = Place::new(cx, entrance, waiting);
            let called = client.outlet.watch.limit(entrance.timeout_ms, place.called()).await;
            called.unwrap_or_else(|_| place.give_up())
        }
    };
    let Admitted { permit, room } = admitted.map_err(|refused| client.refused(refused))?;
    Ok(Pass { permit: Some(permit), room })
}

/// One who waits on this shard.
struct Place<'a> {
    cx: &'a Context,
    entrance: &'a Entrance,
    waiting: Waiting<'a>,
    began_micros: u64,
}

impl<'a> Place<'a> {
    fn new(cx: &'a Context, entrance: &'a Entrance, waiting: Waiting<'a>) -> Self {
        Self { cx, entrance, waiting, began_micros: cx.clock.exact().micros() }
    }

    /// # Cancellation
    /// Nothing is lost; the place is kept until it is dropped.
    async fn called(&mut self) -> Result<Admitted<'a>, Refused> {
        poll_fn(|context| {
            // before the look: who is called after it finds the waker
            self.entrance.remember(self.waiting.waiter(), context.waker());
            self.waiting.called().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// It has waited long enough; it may have been called at the last moment.
    fn give_up(&mut self) -> Result<Admitted<'a>, Refused> {
        self.waiting.called().unwrap_or_else(|| Err(self.waiting.overdue()))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let micros = self.cx.clock.exact().micros().saturating_sub(self.began_micros);
        self.cx.metrics().queued(micros);
        self.entrance.admission.waited(micros);
        self.entrance.forget(self.waiting.waiter());
    }
}

/// The workers that may serve it, if all of these have a limit: with one that has none there is always room.
fn limited(fleet: &Fleet, serving: &Serving<'_>, tried: &Tried) -> Vec<Arc<Worker>> {
    let Serving::Workers { positions, .. } = serving else { return Vec::new() };
    let untried = || positions.iter().filter(|&&position| !tried.contains(position));
    let workers = || untried().filter_map(|&position| fleet.workers.get(position));
    let capped = |worker: &Arc<Worker>| worker.traits().max_concurrent_requests.is_some();
    if workers().all(capped) { workers().cloned().collect() } else { Vec::new() }
}

impl Client<'_> {
    /// The failure of a request that is not let in, in the words of its endpoint.
    pub(super) fn refused(&self, refused: Refused) -> Failure {
        let (method, path) = (self.request.method(), self.request.path());
        tracing::debug!(method, path, reason = %refused, "a request was not let in");
        Failure::NotAdmitted(refused, vllm::lookup(method, path).error_shape)
    }

    /// Makes sure that so many bytes of the request's body may be held.
    ///
    /// # Errors
    /// The memory for all bodies is used up.
    pub(super) fn hold(&mut self, bytes: usize) -> Result<(), Failure> {
        if self.held.cover(bytes as u64) {
            return Ok(());
        }
        Err(self.refused(Refused::after_micros(Reason::Memory, MEMORY_RETRY_MICROS)))
    }
}
