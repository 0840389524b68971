//! Time limits without a timer for each of them.
//!
//! An exchange passes through many phases, each with a limit, and nearly none is ever reached. So a limit is
//! one store into a cell; a shard looks at all its cells ten times a second and wakes the tasks whose time is
//! over. Limits are late by up to [`TICK_MS`], which none of them minds.
//!
//! Phases may lie within each other and beside each other: each knows its own deadline, and the watch keeps the
//! earliest of them, for the wake-up alone. A phase that has ended may leave its deadline behind; that costs one
//! needless wake-up.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    os::fd::RawFd,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll, Waker},
};

use pin_project_lite::pin_project;

use crate::{
    base::{Clock, Millis},
    net::socket::has_hung_up,
};

/// How often a shard looks at its limits, in milliseconds.
pub const TICK_MS: u64 = 100;

/// The time of a shard, read once per tick: exact to [`TICK_MS`], free to ask.
#[derive(Debug)]
pub struct ShardClock {
    clock: Clock,
    now: Cell<Millis>,
}

impl ShardClock {
    /// Follows `clock`.
    pub fn new(clock: Clock) -> Self {
        Self { clock, now: Cell::new(clock.millis()) }
    }

    /// The time of the last tick.
    pub fn now(&self) -> Millis {
        self.now.get()
    }

    /// Whether no timer has been looked at for longer than it should take.
    pub fn is_late(&self) -> bool {
        self.clock.millis() > self.now.get().saturating_add(2 * TICK_MS)
    }

    /// The exact clock.
    pub fn exact(&self) -> Clock {
        self.clock
    }
}

/// The limit is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

/// What besides its time ends a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// Nothing.
    InTime,
    /// Draining: nobody waits for anything in it.
    Drained,
    /// Everything being cut: there is something to be said before the end.
    Cut,
}

/// What a task does when everything is cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Parting {
    /// It ends where it stands.
    #[default]
    Silent,
    /// It has said nothing yet to a request: [`Watch::unless_cut`] gives it up, so that this can be said.
    Unanswered,
    /// It says its last words, or what it says ends by itself soon.
    Speaking,
}

/// How long a task that has something to say may live on after everything was cut, in milliseconds.
const PARTING_MS: u64 = 1000;

/// The limits of the phases that one task is in.
#[derive(Debug)]
pub struct Watch {
    clock: Rc<ShardClock>,
    /// When the task is woken at the latest: not after the earliest deadline of its phases. `Millis::MAX` while
    /// there is none.
    deadline: Cell<Millis>,
    /// When every phase ends, whatever its own limit; `Millis::MAX` while there is no such limit.
    total: Cell<Millis>,
    /// Phases that were found waiting; wraps around.
    waits: Cell<u32>,
    /// What the task does when everything is cut.
    parting: Cell<Parting>,
    /// Whether draining ends the phase at once.
    idle: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    draining: Rc<Cell<bool>>,
    /// When everything was cut; `Millis::MAX` until then.
    cut: Rc<Cell<Millis>>,
    /// The client's socket, while nothing is read from it.
    unread: Cell<Option<RawFd>>,
    /// The client went away while nothing was read from it, or its place is needed.
    gone: Cell<bool>,
}

impl Watch {
    /// Tells whether the client's socket is read; while it is not, every tick asks the kernel whether the
    /// client is still there.
    pub(super) fn reading(&self, unread: Option<RawFd>) {
        self.unread.set(unread);
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    fn look(&self) {
        if self.unread.get().is_some_and(has_hung_up) {
            self.gone.set(true);
        }
    }

    /// Whose task is woken when a limit is over, or when everything is cut. To be called from the task's root
    /// with every poll; cheap when nothing has changed.
    pub fn belongs_to(&self, waker: &Waker) {
        let mut known = self.waker.borrow_mut();
        if known.as_ref().is_none_or(|known| !known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
    }

    /// Whether the task must end at once: everything is cut, its client has gone unnoticed, or has to.
    pub fn is_cut(&self) -> bool {
        if self.gone.get() {
            return true;
        }
        let cut = self.cut.get();
        let silent = self.parting.get() == Parting::Silent;
        cut != Millis::MAX && (silent || self.clock.now() >= cut.saturating_add(PARTING_MS))
    }

    /// What the task does when everything is cut; while it has something to say it is given a moment for that, and a
    /// phase of [`Watch::stream_until`] or [`Watch::unless_cut`] tells it when.
    pub fn set_parting(&self, parting: Parting) {
        self.parting.set(parting);
    }

    /// Something is said to the client: it is too late for an answer in its place.
    pub fn speaks(&self) {
        if self.parting.get() == Parting::Unanswered {
            self.parting.set(Parting::Speaking);
        }
    }

    /// Whether everything was cut, and what is still to be said must be said now.
    pub fn is_ending(&self) -> bool {
        self.cut.get() != Millis::MAX
    }

    /// From now on every phase ends in `millis` milliseconds at the latest; 0 takes that limit away.
    pub fn set_total(&self, millis: u64) {
        self.total.set(self.deadline_in(millis));
    }

    /// Whether the limit of [`Watch::set_total`] is over.
    pub fn is_total_over(&self) -> bool {
        self.clock.now() >= self.total.get()
    }

    /// Changes whenever a phase has to wait: a task in which it never does keeps the shard for itself.
    pub fn waits(&self) -> u32 {
        self.waits.get()
    }

    /// Runs `phase` for at most `millis` milliseconds; 0 is no limit.
    ///
    /// # Errors
    /// [`Elapsed`] when the time is over, or that of [`Watch::set_total`].
    ///
    /// # Cancellation
    /// As `phase`.
    pub fn limit<T, F: Future<Output = T>>(&self, millis: u64, phase: F) -> Limited<'_, F> {
        self.phase(self.deadline_in(millis), Ends::InTime, phase)
    }

    /// As [`Watch::limit`], and draining ends the phase too: nobody waits for anything in it.
    ///
    /// # Errors
    /// [`Elapsed`] when the time is over or the shard drains.
    ///
    /// # Cancellation
    /// As `phase`.
    pub fn idle<T, F: Future<Output = T>>(&self, millis: u64, phase: F) -> Limited<'_, F> {
        self.phase(self.deadline_in(millis), Ends::Drained, phase)
    }

    /// Runs `phase` until `deadline` at most, or until everything is cut.
    ///
    /// # Errors
    /// [`Elapsed`] at the deadline, when the time of [`Watch::set_total`] is over, and when everything is cut.
    ///
    /// # Cancellation
    /// As `phase`.
    pub fn stream_until<T, F: Future<Output = T>>(&self, deadline: Millis, phase: F) -> Limited<'_, F> {
        self.phase(deadline, Ends::Cut, phase)
    }

    /// Runs `exchange` to its end; `None` if everything was cut while nothing had been said.
    ///
    /// # Cancellation
    /// As `exchange`, which is not polled any more after `None`.
    pub async fn unless_cut<T>(&self, mut exchange: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        poll_fn(|context| {
            if self.is_ending() && self.parting.get() == Parting::Unanswered {
                return Poll::Ready(None);
            }
            exchange.as_mut().poll(context).map(Some)
        })
        .await
    }

    fn phase<F>(&self, deadline: Millis, ends: Ends, phase: F) -> Limited<'_, F> {
        Limited { watch: self, deadline: deadline.min(self.total.get()), ends, phase }
    }

    /// The moment `millis` milliseconds from now; 0 is never.
    pub fn deadline_in(&self, millis: u64) -> Millis {
        if millis == 0 { Millis::MAX } else { self.clock.now().saturating_add(millis) }
    }

    /// Whether `deadline` has come.
    pub fn is_over(&self, deadline: Millis) -> bool {
        self.clock.now() >= deadline
    }

    fn wake_by(&self, deadline: Millis) {
        if deadline < self.deadline.get() {
            self.deadline.set(deadline);
        }
    }

    /// Whether the task has to look at its limits. Its phases say anew when they are to be looked at again.
    fn is_due(&self) -> bool {
        let over = self.clock.now() >= self.deadline.get();
        if over {
            self.deadline.set(Millis::MAX);
        }
        over || self.idle.get() && self.draining.get() || self.gone.get() || self.is_ending()
    }
}

pin_project! {
    /// A phase with a limit. Written by hand because an `async fn` would hold the phase twice, and every
    /// exchange is made of such phases.
    #[derive(Debug)]
    pub struct Limited<'a, F> {
        watch: &'a Watch,
        deadline: Millis,
        ends: Ends,
        #[pin]
        phase: F,
    }
}

impl<F: Future> Future for Limited<'_, F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let watch = *this.watch;
        let idle = *this.ends == Ends::Drained;
        if let Poll::Ready(value) = this.phase.poll(context) {
            if idle {
                watch.idle.set(false);
            }
            return Poll::Ready(Ok(value));
        }
        watch.waits.set(watch.waits.get().wrapping_add(1));
        let over = watch.is_over(*this.deadline)
            || match this.ends {
                Ends::InTime => false,
                Ends::Drained => watch.draining.get(),
                Ends::Cut => watch.is_ending(),
            };
        if idle {
            watch.idle.set(!over);
        }
        if over {
            return Poll::Ready(Err(Elapsed));
        }
        watch.wake_by(*this.deadline);
        watch.belongs_to(context.waker());
        Poll::Pending
    }
}

/// All watches of a shard.
#[derive(Debug)]
pub struct Watches {
    clock: Rc<ShardClock>,
    draining: Rc<Cell<bool>>,
    cut: Rc<Cell<Millis>>,
    watches: RefCell<Vec<Weak<Watch>>>,
    /// How many of them were asked to make room since the last tick.
    looked_at: Cell<usize>,
}

impl Watches {
    /// None yet.
    pub fn new(clock: Rc<ShardClock>) -> Self {
        let cut = Rc::new(Cell::new(Millis::MAX));
        Self { clock, draining: Rc::default(), cut, watches: RefCell::default(), looked_at: Cell::default() }
    }

    /// A watch for one task, forgotten when dropped.
    pub fn watch(&self) -> Rc<Watch> {
        let watch = Rc::new(Watch {
            clock: self.clock.clone(),
            deadline: Cell::new(Millis::MAX),
            total: Cell::new(Millis::MAX),
            waits: Cell::new(0),
            parting: Cell::default(),
            idle: Cell::new(false),
            waker: RefCell::default(),
            draining: self.draining.clone(),
            cut: self.cut.clone(),
            unread: Cell::new(None),
            gone: Cell::new(false),
        });
        self.watches.borrow_mut().push(Rc::downgrade(&watch));
        watch
    }

    /// Whether the shard drains.
    pub fn draining(&self) -> bool {
        self.draining.get()
    }

    /// From now on idle phases end; they are woken by the next tick.
    pub fn drain(&self) {
        self.draining.set(true);
    }

    /// From now on every task ends, after its last words if it has any; all are woken by the next tick.
    pub fn cut(&self) {
        if self.cut.get() == Millis::MAX {
            self.cut.set(self.clock.now());
        }
    }

    /// Ends a task that waits for nothing that has begun ([`Watch::idle`]), the oldest of them; false if there is none.
    /// All tasks are looked at once per tick, however often this is asked.
    pub fn end_idle(&self) -> bool {
        let watches = self.watches.borrow();
        for watch in watches.iter().skip(self.looked_at.get()) {
            self.looked_at.set(self.looked_at.get() + 1);
            if let Some(watch) = watch.upgrade()
                && watch.idle.get()
                && !watch.gone.replace(true)
            {
                watch.wake();
                return true;
            }
        }
        false
    }

    /// Takes the time and wakes whose limit is over. To be called every [`TICK_MS`].
    pub fn tick(&self) {
        self.clock.now.set(self.clock.clock.millis());
        self.looked_at.set(0);
        self.watches.borrow_mut().retain(|watch| {
            let Some(watch) = watch.upgrade() else { return false };
            watch.look();
            if watch.is_due() {
                watch.wake();
            }
            true
        });
    }
}

#[cfg(test)]
mod tests;
