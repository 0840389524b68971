//! Time limits without a timer for each of them.
//!
//! An exchange passes through many phases, each with a limit, and nearly none is ever reached. So a limit is
//! one store into a cell; a shard looks at all its cells ten times a second and wakes the tasks whose time is
//! over. Limits are late by up to [`TICK_MS`], which none of them minds.

use std::{
    cell::{Cell, RefCell},
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

    /// The exact clock.
    pub fn exact(&self) -> Clock {
        self.clock
    }
}

/// The limit is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

/// The limit of the phase that one task is in.
#[derive(Debug)]
pub struct Watch {
    clock: Rc<ShardClock>,
    /// `Millis::MAX` while there is no limit.
    deadline: Cell<Millis>,
    /// Whether draining ends the phase at once.
    idle: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    draining: Rc<Cell<bool>>,
    cut: Rc<Cell<bool>>,
    /// The client's socket, while nothing is read from it.
    unread: Cell<Option<RawFd>>,
    /// The client went away while nothing was read from it.
    gone: Cell<bool>,
}

impl Watch {
    /// Tells whether the client's socket is read; while it is not, every tick asks the kernel whether the
    /// client is still there.
    pub(super) fn reading(&self, unread: Option<RawFd>) {
        self.unread.set(unread);
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

    /// Whether the task must end at once: everything is cut, or its client has gone unnoticed.
    pub fn is_cut(&self) -> bool {
        self.cut.get() || self.gone.get()
    }

    /// Runs `phase` for at most `millis` milliseconds; 0 is no limit.
    ///
    /// # Errors
    /// [`Elapsed`] when the time is over.
    ///
    /// # Cancellation
    /// As `phase`.
    pub fn limit<T, F: Future<Output = T>>(&self, millis: u64, phase: F) -> Limited<'_, F> {
        Limited { watch: self, deadline: self.deadline_in(millis), idle: false, phase }
    }

    /// As [`Watch::limit`], and draining ends the phase too: nobody waits for anything in it.
    ///
    /// # Errors
    /// [`Elapsed`] when the time is over or the shard drains.
    ///
    /// # Cancellation
    /// As `phase`.
    pub fn idle<T, F: Future<Output = T>>(&self, millis: u64, phase: F) -> Limited<'_, F> {
        Limited { watch: self, deadline: self.deadline_in(millis), idle: true, phase }
    }

    fn deadline_in(&self, millis: u64) -> Millis {
        if millis == 0 { Millis::MAX } else { self.clock.now().saturating_add(millis) }
    }

    fn over(&self) -> bool {
        self.clock.now() >= self.deadline.get() || self.idle.get() && self.draining.get()
    }
}

pin_project! {
    /// A phase with a limit. Written by hand because an `async fn` would hold the phase twice, and every
    /// exchange is made of such phases.
    #[derive(Debug)]
    pub struct Limited<'a, F> {
        watch: &'a Watch,
        deadline: Millis,
        idle: bool,
        #[pin]
        phase: F,
    }
}

impl<F: Future> Future for Limited<'_, F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(value) = this.phase.poll(context) {
            this.watch.deadline.set(Millis::MAX);
            this.watch.idle.set(false);
            return Poll::Ready(Ok(value));
        }
        this.watch.deadline.set(*this.deadline);
        this.watch.idle.set(*this.idle);
        this.watch.belongs_to(context.waker());
        if this.watch.over() { Poll::Ready(Err(Elapsed)) } else { Poll::Pending }
    }
}

/// All watches of a shard.
#[derive(Debug)]
pub struct Watches {
    clock: Rc<ShardClock>,
    draining: Rc<Cell<bool>>,
    cut: Rc<Cell<bool>>,
    watches: RefCell<Vec<Weak<Watch>>>,
}

impl Watches {
    /// None yet.
    pub fn new(clock: Rc<ShardClock>) -> Self {
        Self { clock, draining: Rc::default(), cut: Rc::default(), watches: RefCell::default() }
    }

    /// A watch for one task, forgotten when dropped.
    pub fn watch(&self) -> Rc<Watch> {
        let watch = Rc::new(Watch {
            clock: self.clock.clone(),
            deadline: Cell::new(Millis::MAX),
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

    /// From now on every task ends; all are woken by the next tick.
    pub fn cut(&self) {
        self.cut.set(true);
    }

    /// Takes the time and wakes whose limit is over. To be called every [`TICK_MS`].
    pub fn tick(&self) {
        self.clock.now.set(self.clock.clock.millis());
        self.watches.borrow_mut().retain(|watch| {
            let Some(watch) = watch.upgrade() else { return false };
            watch.look();
            let due = watch.over() || watch.is_cut();
            if let (true, Some(waker)) = (due, watch.waker.borrow().as_ref()) {
                waker.wake_by_ref();
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::pending, pin::pin};

    fn poll<T>(task: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        task.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn watches() -> Watches {
        Watches::new(Rc::new(ShardClock::new(Clock::start())))
    }

    #[test]
    fn a_phase_ends_when_its_time_is_over_and_not_before() {
        let watches = watches();
        let watch = watches.watch();
        let mut phase = pin!(watch.limit(50, pending::<()>()));
        assert_eq!(poll(phase.as_mut()), Poll::Pending);
        watches.clock.now.set(watches.clock.now() + 49);
        assert_eq!(poll(phase.as_mut()), Poll::Pending);
        watches.clock.now.set(watches.clock.now() + 1);
        assert_eq!(poll(phase.as_mut()), Poll::Ready(Err(Elapsed)));
    }

    #[test]
    fn no_limit_is_no_limit() {
        let watches = watches();
        let watch = watches.watch();
        let mut phase = pin!(watch.limit(0, pending::<()>()));
        watches.clock.now.set(Millis::MAX - 1);
        assert_eq!(poll(phase.as_mut()), Poll::Pending);
    }

    #[test]
    fn draining_ends_idle_phases_only() {
        let watches = watches();
        let (one, two) = (watches.watch(), watches.watch());
        let mut idle = pin!(one.idle(1_000_000, pending::<()>()));
        let mut busy = pin!(two.limit(1_000_000, pending::<()>()));
        assert_eq!(poll(idle.as_mut()), Poll::Pending);
        assert_eq!(poll(busy.as_mut()), Poll::Pending);
        watches.drain();
        assert_eq!(poll(idle.as_mut()), Poll::Ready(Err(Elapsed)));
        assert_eq!(poll(busy.as_mut()), Poll::Pending);
    }

    #[test]
    fn a_dropped_watch_is_forgotten() {
        let watches = watches();
        let watch = watches.watch();
        watches.tick();
        assert_eq!(watches.watches.borrow().len(), 1);
        drop(watch);
        watches.tick();
        assert_eq!(watches.watches.borrow().len(), 0);
    }
}
