//! Letting a request in: the rate, a slot, room on a worker; and waiting for these where they are not to be had.
//!
//! Everything here is off unless a limit is set, and then costs a branch.

use std::{
    cell::RefCell,
    future::poll_fn,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    task::{Poll, Waker},
};

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    admission::{
        Admission, Admitted, Entry, Full, Newcomer, Permit, Reason, Refused, Room, RoomWanted, Settings,
        Waiter, Waiting,
    },
    base::Millis,
    http::RequestFraming,
    proxy::{
        body::Body,
        client::Client,
        context::{Context, Snapshot},
        inspect::Inspected,
        retry::Failure,
        serving::Serving,
    },
    routing::{Candidates, Terms, Tried},
    vllm::{self, Endpoint, Facts, Key, Treatment},
    workers::{Fleet, InFlight},
};

/// After this time, in microseconds, a client may try again whose body there was no memory for: bodies are gone as
/// soon as their answer begins.
const MEMORY_RETRY_MICROS: u64 = 5_000_000;

/// How often a request waits for room at most: each attempt may.
pub(crate) const MAX_WAITS: u32 = 16;

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
    /// How often it has waited for room.
    waits: u32,
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
        _ => entrance.admission.foresee().map_err(|refused| client.not_admitted(refused)),
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
    fleet: &Snapshot,
    serving: &Serving<'_>,
    claim: Claim,
) -> Result<Pass<'a>, Failure> {
    let cx = client.cx;
    let (Some(entrance), Treatment::Route(_)) = (&cx.entrance, endpoint.treatment) else {
        return Ok(Pass { permit: None, room: None, waits: 0 });
    };
    let arrived = entrance.admission.arrives(cx.clock.exact().micros());
    arrived.map_err(|refused| client.not_admitted(refused))?;
    if let Some(permit) = entrance.admission.try_enter() {
        return Ok(Pass { permit: Some(permit), room: None, waits: 0 });
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
    fleet: &Snapshot,
    serving: &Serving<'_>,
    tried: &Tried,
    claim: Claim,
) -> Result<(), Failure> {
    // a worker's limit is a reason to have an entrance
    let Some(entrance) = &client.cx.entrance else { return Err(Failure::NoWorker) };
    drop(pass.permit.take());
    // what was found free may be taken again before it is used, but not for ever
    pass.waits += 1;
    if pass.waits > MAX_WAITS {
        return Err(client.not_admitted(entrance.admission.refuse(Reason::WorkersBusy)));
    }
    let waits = pass.waits;
    *pass = Pass { waits, ..queue(client, entrance, fleet, serving, tried, claim).await? };
    Ok(())
}

async fn queue<'a>(
    client: &Client<'a>,
    entrance: &'a Entrance,
    fleet: &Snapshot,
    serving: &Serving<'_>,
    tried: &Tried,
    claim: Claim,
) -> Result<Pass<'a>, Failure> {
    let cx = client.cx;
    let Claim { priority, key } = claim;
    let room = match serving {
        Serving::Workers { positions, .. } => {
            let (clock, terms) = (cx.clock.exact(), Terms { random: cx.random(), ..cx.terms });
            room_wanted(&fleet.shared(), positions, tried, terms, move || clock.millis())
        }
        Serving::Admin => None,
    };
    let newcomer = Newcomer { priority, key, shard: cx.shard(), room };
    let admitted = match entrance.admission.enter(newcomer) {
        Entry::In(admitted) => Ok(admitted),
        Entry::Refused(refused) => Err(refused),
        Entry::Waits(waiting) => {
            let mut place = Place::new(cx, entrance, waiting);
            let called = client.outlet.watch.limit(entrance.timeout_ms, place.called()).await;
            let answer = called.unwrap_or_else(|_| place.give_up());
            entrance.admission.waited(place.waited_micros());
            answer
        }
    };
    let Admitted { permit, room } = admitted.map_err(|refused| client.not_admitted(refused))?;
    Ok(Pass { permit: Some(permit), room, waits: 0 })
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

    fn waited_micros(&self) -> u64 {
        self.cx.clock.exact().micros().saturating_sub(self.began_micros)
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
        self.cx.metrics().queued(self.waited_micros());
        self.entrance.forget(self.waiting.waiter());
    }
}

/// How the room is found that a request needs, at a time that `now` tells; `None`: nobody who may serve it has a limit.
pub(crate) fn room_wanted(
    fleet: &Arc<Fleet>,
    positions: &[usize],
    tried: &Tried,
    terms: Terms,
    now: impl Fn() -> Millis + Send + Sync + 'static,
) -> Option<RoomWanted> {
    let limited = |&position: &usize| fleet.workers[position].traits().max_concurrent_requests.is_some();
    if !positions.iter().any(limited) {
        return None;
    }
    let mut hash = DefaultHasher::new();
    (Arc::as_ptr(fleet).addr(), positions, tried).hash(&mut hash);
    let (fleet, positions, tried) = (fleet.clone(), positions.to_vec(), tried.clone());
    let find = move || find_room(&fleet, &positions, &tried, &Terms { now: now(), ..terms });
    Some(RoomWanted { of: hash.finish(), find: Box::new(find) })
}

/// A place on the candidate that has the least in flight, relative to its limit; none where one has no limit, and none
/// where there is nobody at all, which the choice will tell. The policy may choose another one that has room.
///
/// # Errors
/// All of them have as many requests as they may.
fn find_room(
    fleet: &Fleet,
    positions: &[usize],
    tried: &Tried,
    terms: &Terms,
) -> Result<Option<InFlight>, Full> {
    let mut scratch = Vec::new();
    let candidates = Candidates::of(fleet, positions, tried, terms, &mut scratch);
    if candidates.are_busy() {
        return Err(Full);
    }
    let mut best: Option<(u64, usize)> = None;
    for (position, worker) in candidates.iter() {
        let Some(most) = worker.traits().max_concurrent_requests else { return Ok(None) };
        let load = (u64::from(worker.in_flight()) << 32) / u64::from(most.max(1));
        if best.is_none_or(|(least, _)| load < least) {
            best = Some((load, position));
        }
    }
    let Some((_, position)) = best else { return Ok(None) };
    // another shard may have been quicker; then its end comes here again
    InFlight::reserve(&fleet.workers[position]).map(Some).ok_or(Full)
}

impl Client<'_> {
    /// The failure of a request that is not let in, in the words of its endpoint.
    pub(super) fn not_admitted(&self, refused: Refused) -> Failure {
        let (method, path) = (self.request.method(), self.request.path());
        Failure::NotAdmitted(refused, vllm::lookup(method, path).error_shape)
    }

    /// Makes sure that so many bytes of the request's body may be held.
    ///
    /// # Errors
    /// The memory for all bodies is used up, or would not even suffice for this one.
    pub(super) fn hold(&mut self, bytes: usize) -> Result<(), Failure> {
        if self.held.cover(bytes as u64) {
            return Ok(());
        }
        let limit = self.cx.body_budget.limit();
        if bytes as u64 > limit {
            return Err(Failure::BodyTooLarge { limit });
        }
        Err(self.not_admitted(Refused::after_micros(Reason::Memory, MEMORY_RETRY_MICROS)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::{Demand, EngineStats, Health, ModelSettings, Registry};

    /// All usable; the limits as they stand behind the URLs.
    fn fleet(limits: &[&str]) -> Arc<Fleet> {
        let specs =
            limits.iter().enumerate().map(|(at, limit)| format!("http://w{at}:1{limit}").parse().unwrap());
        let fleet = Registry::new(specs, ModelSettings::default()).handle().load_full();
        for worker in &fleet.workers {
            worker.set_health(Health::Up);
        }
        fleet
    }

    fn found(fleet: &Fleet, tried: &Tried) -> Result<Option<(usize, InFlight)>, Full> {
        let all: Vec<usize> = (0..fleet.workers.len()).collect();
        let found = find_room(fleet, &all, tried, &Terms::default())?;
        Ok(found.map(|place| (place.worker().id(), place)))
    }

    #[test]
    fn room_is_found_where_there_is_most_and_not_on_who_is_down_or_was_tried() {
        let fleet = fleet(&[
            "#max_concurrent_requests=2",
            "#max_concurrent_requests=4",
            "#max_concurrent_requests=9",
        ]);
        fleet.workers[2].set_health(Health::Down);
        let none = Tried::none();
        let places: Vec<_> = (0..6).map(|_| found(&fleet, &none).unwrap().expect("room")).collect();
        assert_eq!([0, 1, 2].map(|at: usize| fleet.workers[at].in_flight()), [2, 4, 0]);
        assert_eq!(found(&fleet, &none).map(|_| ()), Err(Full));
        fleet.workers[2].set_health(Health::Up);
        assert_eq!(found(&fleet, &none).unwrap().map(|(id, _)| id), Some(2));
        let mut tried = Tried::none();
        tried.add(2);
        assert_eq!(found(&fleet, &tried).map(|_| ()), Err(Full));
        drop(places);
        tried.add(0);
        tried.add(1);
        assert!(found(&fleet, &tried).unwrap().is_none(), "nobody is left, which is not for waiting");
    }

    #[test]
    fn who_has_no_limit_gives_room_only_while_it_may_be_chosen() {
        let fleet = fleet(&["#max_concurrent_requests=1", ""]);
        let none = Tried::none();
        assert!(found(&fleet, &none).unwrap().is_none(), "no place has to be taken");
        let _running = InFlight::begin(fleet.workers[0].clone(), Demand::default());
        let asleep = EngineStats { asleep: Some(true), ..EngineStats::default() };
        fleet.workers[1].engine().set(&asleep, 0);
        assert_eq!(found(&fleet, &none).map(|_| ()), Err(Full), "it sleeps, and the other is awake and full");
        fleet.workers[1].set_health(Health::Down);
        assert_eq!(found(&fleet, &none).map(|_| ()), Err(Full), "it is down");
        fleet.workers[1].engine().set(&EngineStats { asleep: Some(false), ..EngineStats::default() }, 0);
        fleet.workers[0].set_health(Health::Down);
        assert!(found(&fleet, &none).unwrap().is_none(), "both stand in");
    }
}
