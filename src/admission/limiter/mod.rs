//! The slots, and the one queue before them.
//!
//! While nobody waits, entering is one compare-and-exchange and leaving one subtraction. Only when a request has to
//! wait, and whenever something becomes free while one does, a mutex is taken around the queue. That a shard never
//! waits for another thread holds nevertheless: this is off unless a limit is set, happens only beyond that limit, and
//! the mutex is held for a walk over the queue, which wakes nobody; it ends at the first who waits for a slot when there
//! is none, and asks once for room where many wait for the same.
//!
//! Who leaves hands its slot to the first who can use it: slots and waiters are counted in one word, so that nobody who
//! arrives meanwhile can take it. A request that needs room on a worker is given that as well (a place among its
//! requests in flight) and never holds a slot while it waits for room: others whose workers have some go first.

use std::{
    fmt,
    num::NonZero,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence},
    },
};

use thiserror::Error;

use crate::{
    admission::{Bucket, Joined, Queue, Settings, Ticket, Verdict},
    workers::InFlight,
};

/// One who waits, in the word of [`Admission`]; slots in use are counted below it.
const ONE_WAITING: u64 = 1 << 32;

/// The slots in use, in that word.
const IN_USE: u64 = ONE_WAITING - 1;

/// Longest time that a client is told to stay away, in seconds.
const MAX_RETRY_AFTER_SECS: u64 = 3600;

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Reason {
    /// More come than `--rate-limit-tokens-per-second`.
    #[error("rate limit: more requests come than are let in per second")]
    RateLimit,
    /// As many are served as may be, and as many wait.
    #[error("queue full: the maximum number of concurrent requests is reached and too many are waiting")]
    QueueFull,
    /// It has waited for a slot as long as it may.
    #[error("queue timeout: the maximum number of concurrent requests was reached for too long")]
    QueueTimeout,
    /// Every worker that could serve it has as many as it may, and as many requests wait as may.
    #[error("queue full: all workers are busy and too many requests are waiting")]
    WorkersBusy,
    /// It has waited for one of these as long as it may.
    #[error("queue timeout: all workers were busy for too long")]
    WorkersTimeout,
    /// The bodies of requests take as much memory as they may.
    #[error("memory: too many bytes of request bodies are held at the moment")]
    Memory,
}

/// A request that is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct Refused {
    /// Why.
    pub reason: Reason,
    /// Seconds after which it may be tried again; at least 1.
    pub retry_after_secs: u32,
}

impl Refused {
    /// With a time in microseconds, rounded up to what a client can be told.
    pub fn after_micros(reason: Reason, micros: u64) -> Self {
        let seconds = micros.div_ceil(1_000_000).clamp(1, MAX_RETRY_AFTER_SECS);
        Self { reason, retry_after_secs: u32::try_from(seconds).unwrap_or(1) }
    }
}

/// Everybody who could be asked has as many requests as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Looks for room on a worker: takes a place, or says that none has to be taken. Called under the queue's mutex, by any
/// thread.
pub type FindRoom = Box<dyn Fn() -> Result<Option<InFlight>, Full> + Send + Sync>;

/// Where a newcomer needs room.
pub struct RoomWanted {
    /// Who can be asked: two for whom this is the same find room, or none, alike.
    pub of: u64,
    /// How it is found.
    pub find: FindRoom,
}

/// Who wants to come in.
pub struct Newcomer {
    /// Lower goes first.
    pub priority: i64,
    /// Among whom the queue is fair.
    pub key: u64,
    /// The shard that is rung for it.
    pub shard: usize,
    /// `None`: nobody who may serve it has a limit.
    pub room: Option<RoomWanted>,
}

impl Newcomer {
    fn take_room(&self) -> Result<Option<InFlight>, Full> {
        self.room.as_ref().map_or(Ok(None), |wanted| (wanted.find)())
    }

    fn room_of(&self) -> Option<u64> {
        self.room.as_ref().map(|wanted| wanted.of)
    }
}

impl fmt::Debug for Newcomer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Newcomer").field("priority", &self.priority).field("room", &self.room_of()).finish()
    }
}

impl fmt::Debug for RoomWanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RoomWanted").field("of", &self.of).finish_non_exhaustive()
    }
}

/// What has become of one who waits.
mod fate {
    pub(super) const WAITS: u8 = 0;
    pub(super) const SERVED: u8 = 1;
    pub(super) const DISPLACED: u8 = 2;
}

/// One who waits. Shared by its exchange and by whoever serves the queue.
pub struct Waiter {
    newcomer: Newcomer,
    /// Changes once, under the queue's mutex.
    fate: AtomicU8,
    /// The room that it was given, if it needs some.
    room: Mutex<Option<InFlight>>,
}

impl Waiter {
    /// Whether it waits no longer: its task is to be woken.
    pub fn is_called(&self) -> bool {
        self.fate.load(Ordering::Acquire) != fate::WAITS
    }

    /// Whether it has been let in, though it may not have taken what it was given.
    #[cfg(test)]
    pub(crate) fn is_served(&self) -> bool {
        self.fate.load(Ordering::Acquire) == fate::SERVED
    }

    fn call(&self, fate: u8, rung: &mut Vec<usize>) {
        self.fate.store(fate, Ordering::Release);
        if !rung.contains(&self.newcomer.shard) {
            rung.push(self.newcomer.shard);
        }
    }
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("newcomer", &self.newcomer).finish_non_exhaustive()
    }
}

/// Rings a shard.
type Ring = Box<dyn Fn(usize) + Send + Sync>;

/// A line of its own: every exchange writes to it.
#[derive(Debug)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// The slots and the queue. One for all shards.
pub struct Admission {
    /// Slots in use, and those who wait times [`ONE_WAITING`]. Grows by a slot only where nobody waits, or under the
    /// queue's mutex.
    state: OwnLine<AtomicU64>,
    /// Whether there is a limit; where there is none, slots are not counted.
    limited: bool,
    /// How many slots there are, if they are limited. Less than are in use where it was lowered.
    slots: AtomicU32,
    /// Who was refused for want of a slot.
    refused: AtomicU64,
    queue: Mutex<Queue<Arc<Waiter>>>,
    queue_size: u32,
    bucket: Option<Bucket>,
    /// How long those who were served lately had waited, in microseconds; each counts a quarter.
    waited_micros: AtomicU64,
    ring: Ring,
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission")
            .field("slots", &self.slots())
            .field("in_use", &self.in_use())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

/// How it went with a newcomer.
#[derive(Debug)]
pub enum Entry<'a> {
    /// It is in.
    In(Admitted<'a>),
    /// It waits.
    Waits(Waiting<'a>),
    /// It must go.
    Refused(Refused),
}

/// What a request is given that is let in.
#[derive(Debug)]
pub struct Admitted<'a> {
    // Before the slot: with that alone a waiter who needs both could not be served.
    /// A place on a worker, if one had to be taken.
    pub room: Option<Room<'a>>,
    /// Its slot.
    pub permit: Permit<'a>,
}

/// A place among the requests in flight on a worker, until dropped: then whoever waits for it is let in.
#[derive(Debug)]
pub struct Room<'a> {
    /// The place.
    pub in_flight: InFlight,
    // behind the place, which must be free when it is told
    _made: RoomMade<'a>,
}

impl<'a> Room<'a> {
    /// A place of which `admission` is to hear when it is free.
    pub fn new(in_flight: InFlight, admission: Option<&'a Admission>) -> Self {
        // who has no limit is waited for by nobody
        let limited = in_flight.worker().traits().max_concurrent_requests.is_some();
        Self { in_flight, _made: RoomMade(admission.filter(|_| limited)) }
    }
}

/// Tells those who wait for room on a worker that there may be some.
#[derive(Debug)]
struct RoomMade<'a>(Option<&'a Admission>);

impl Drop for RoomMade<'_> {
    fn drop(&mut self) {
        if let Some(admission) = self.0 {
            admission.room_made();
        }
    }
}

impl Admission {
    /// Nobody is in. `ring` wakes a shard, by its position, which then looks who of its waiters
    /// [`Waiter::is_called`].
    pub fn new(settings: &Settings, ring: impl Fn(usize) + Send + Sync + 'static) -> Self {
        let rate = settings.rate_limit_tokens_per_second;
        let own = settings.max_concurrent_requests;
        let burst = if own > 0 { u64::from(own) } else { rate.ceil() as u64 };
        let slots = settings.slots();
        Self {
            state: OwnLine(AtomicU64::new(0)),
            limited: slots.is_some(),
            slots: AtomicU32::new(slots.map_or(0, NonZero::get)),
            refused: AtomicU64::new(0),
            queue: Mutex::new(Queue::new(settings.queue_size as usize)),
            queue_size: settings.queue_size,
            bucket: (rate > 0.0).then(|| Bucket::new(rate, burst)),
            waited_micros: AtomicU64::new(0),
            ring: Box::new(ring),
        }
    }

    /// How many slots there are; `None`: there is no limit.
    pub fn slots(&self) -> Option<u32> {
        self.limited.then(|| self.slots.load(Ordering::Relaxed))
    }

    /// Changes how many slots there are, where there is a limit. More: whoever waits for one is let in. Fewer, even
    /// none: nobody is until enough of those who are in have ended.
    pub fn set_slots(&self, slots: u32) {
        // before the look who waits: who joins after that finds the new number
        self.slots.store(slots, Ordering::SeqCst);
        self.room_made();
    }

    /// How many were refused for want of a slot, since the start.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Slots in use; 0 where they are not limited.
    pub fn in_use(&self) -> u64 {
        self.state.0.load(Ordering::Relaxed) & IN_USE
    }

    /// How many wait.
    pub fn waiting(&self) -> u64 {
        self.state.0.load(Ordering::Relaxed) / ONE_WAITING
    }

    /// Counts an arrival.
    ///
    /// # Errors
    /// There are too many at the moment.
    pub fn arrives(&self, now_micros: u64) -> Result<(), Refused> {
        match self.bucket.as_ref().map(|bucket| bucket.take(now_micros)) {
            Some(Err(wait)) => Err(Refused::after_micros(Reason::RateLimit, wait)),
            _ => Ok(()),
        }
    }

    /// Whether a newcomer would be refused for certain, or nearly so: for who would cost much before that is asked.
    ///
    /// # Errors
    /// It would.
    pub fn foresee(&self) -> Result<(), Refused> {
        let state = self.state.0.load(Ordering::Relaxed);
        let full = self.slots().is_some_and(|slots| state & IN_USE >= u64::from(slots))
            && state / ONE_WAITING >= u64::from(self.queue_size);
        if full { Err(self.refuse(Reason::QueueFull)) } else { Ok(()) }
    }

    /// A slot, if one is free and nobody waits.
    pub fn try_enter(&self) -> Option<Permit<'_>> {
        let Some(slots) = self.slots() else {
            let nobody_waits = self.state.0.load(Ordering::Relaxed) < ONE_WAITING;
            return nobody_waits.then(|| Permit(self));
        };
        // whoever waits makes the word larger than any number of slots
        self.add_slot(|state| state < u64::from(slots)).then(|| Permit(self))
    }

    /// Lets a newcomer in whom nobody who waits comes before, or makes it wait.
    pub fn enter(&self, newcomer: Newcomer) -> Entry<'_> {
        let mut queue = self.lock();
        // Who waits and could be served would be now, so what is left nobody who waits can use.
        let mut rung = self.serve(&mut queue);
        let entry = match self.take(&newcomer) {
            Ok(room) => Entry::In(self.admitted(room)),
            Err(_) => {
                let (priority, key) = (newcomer.priority, newcomer.key);
                let fate = AtomicU8::new(fate::WAITS);
                let waiter = Arc::new(Waiter { newcomer, fate, room: Mutex::default() });
                match queue.join(priority, key, waiter.clone()) {
                    Ok(Joined { ticket, displaced }) => {
                        if let Some(other) = displaced {
                            self.state.0.fetch_sub(ONE_WAITING, Ordering::SeqCst);
                            other.call(fate::DISPLACED, &mut rung);
                        }
                        self.state.0.fetch_add(ONE_WAITING, Ordering::SeqCst);
                        // Whoever left before that did not see it wait; see `room_made`.
                        fence(Ordering::SeqCst);
                        rung.extend(self.serve(&mut queue));
                        Entry::Waits(Waiting { admission: self, waiter, ticket, over: false })
                    }
                    Err(waiter) => Entry::Refused(self.refuse(self.why(&waiter.newcomer, false))),
                }
            }
        };
        drop(queue);
        self.ring(&rung);
        entry
    }

    /// Room was made on a worker, or one has become usable, or there are more slots: whoever waits for that is let in. Cheap while nobody waits.
    pub fn room_made(&self) {
        fence(Ordering::SeqCst);
        if self.state.0.load(Ordering::SeqCst) >= ONE_WAITING {
            let rung = self.serve(&mut self.lock());
            self.ring(&rung);
        }
    }

    /// Takes note of how long one has waited who did not leave by itself.
    pub fn waited(&self, micros: u64) {
        let before = self.waited_micros.load(Ordering::Relaxed);
        // a lost update does no harm to an estimate
        self.waited_micros.store(before - before / 4 + micros / 4, Ordering::Relaxed);
    }

    /// A refusal with an estimate of when there will be a place.
    pub fn refuse(&self, reason: Reason) -> Refused {
        if reason == Reason::QueueFull {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        Refused::after_micros(reason, self.waited_micros.load(Ordering::Relaxed))
    }

    /// What a newcomer does not get in for.
    fn why(&self, newcomer: &Newcomer, waited: bool) -> Reason {
        let slots_full = self.slots().is_some_and(|slots| self.in_use() >= u64::from(slots));
        match (slots_full || newcomer.room.is_none(), waited) {
            (true, false) => Reason::QueueFull,
            (true, true) => Reason::QueueTimeout,
            (false, false) => Reason::WorkersBusy,
            (false, true) => Reason::WorkersTimeout,
        }
    }

    fn admitted(&self, room: Option<InFlight>) -> Admitted<'_> {
        Admitted { room: room.map(|place| Room::new(place, Some(self))), permit: Permit(self) }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<Arc<Waiter>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_slot(&self, allowed: impl Fn(u64) -> bool) -> bool {
        let one_more = |state: u64| allowed(state).then_some(state + 1);
        self.state.0.fetch_update(Ordering::SeqCst, Ordering::Relaxed, one_more).is_ok()
    }

    /// A slot and, if it needs that, room; under the queue's mutex.
    fn take(&self, newcomer: &Newcomer) -> Result<Option<InFlight>, Verdict> {
        let free = |slots| self.add_slot(|state| state & IN_USE < u64::from(slots));
        if !self.slots().is_none_or(free) {
            return Err(Verdict::Enough);
        }
        newcomer.take_room().map_err(|Full| {
            if self.limited {
                self.state.0.fetch_sub(1, Ordering::SeqCst);
            }
            Verdict::Passed
        })
    }

    /// Lets in who can be. The shards that must hear of it are returned, to be rung without the mutex.
    fn serve(&self, queue: &mut Queue<Arc<Waiter>>) -> Vec<usize> {
        let mut rung = Vec::new();
        // most of those who are passed wait for the same workers as the one before
        let mut full = None;
        queue.serve(|waiter| {
            if full.is_some() && full == waiter.newcomer.room_of() {
                return Verdict::Passed;
            }
            let room = match self.take(&waiter.newcomer) {
                Ok(room) => room,
                Err(verdict) => {
                    full = waiter.newcomer.room_of();
                    return verdict;
                }
            };
            self.state.0.fetch_sub(ONE_WAITING, Ordering::SeqCst);
            *waiter.room.lock().unwrap_or_else(PoisonError::into_inner) = room;
            waiter.call(fate::SERVED, &mut rung);
            Verdict::Served
        });
        rung
    }

    fn ring(&self, shards: &[usize]) {
        for &shard in shards {
            (self.ring)(shard);
        }
    }

    /// A slot is given back, to the first who waits and can use it.
    fn leave(&self) {
        if !self.limited {
            return;
        }
        let before = self.state.0.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before & IN_USE > 0, "a slot was given back that nobody had");
        if before >= ONE_WAITING {
            let rung = self.serve(&mut self.lock());
            self.ring(&rung);
        }
    }
}

/// A slot, until dropped.
#[derive(Debug)]
pub struct Permit<'a>(&'a Admission);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A place in the queue, until dropped: whoever gives up waiting leaves at once, and passes on what it was given
/// meanwhile.
#[derive(Debug)]
pub struct Waiting<'a> {
    admission: &'a Admission,
    waiter: Arc<Waiter>,
    ticket: Ticket,
    /// It is in, or has left.
    over: bool,
}

impl<'a> Waiting<'a> {
    /// What tells that it was served.
    pub fn waiter(&self) -> &Arc<Waiter> {
        &self.waiter
    }

    /// What it was given, or that others have displaced it; once.
    pub fn called(&mut self) -> Option<Result<Admitted<'a>, Refused>> {
        if self.over {
            return None;
        }
        let called = match self.waiter.fate.load(Ordering::Acquire) {
            fate::WAITS => return None,
            fate::DISPLACED => Err(self.refusal(false)),
            _ => {
                let room = self.waiter.room.lock().unwrap_or_else(PoisonError::into_inner).take();
                Ok(self.admission.admitted(room))
            }
        };
        self.over = true;
        Some(called)
    }

    /// What it is told when it has waited long enough.
    pub fn overdue(&self) -> Refused {
        self.refusal(true)
    }

    fn refusal(&self, waited: bool) -> Refused {
        self.admission.refuse(self.admission.why(&self.waiter.newcomer, waited))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut queue = self.admission.lock();
        if queue.leave(self.ticket).is_some() {
            // nobody was held up by it, so nobody else is served now
            self.admission.state.0.fetch_sub(ONE_WAITING, Ordering::SeqCst);
            return;
        }
        drop(queue);
        drop(self.called());
    }
}

#[cfg(test)]
mod tests;
