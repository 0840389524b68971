//! Simulated time and chance, and the tasks that wait for either: a world's only executor.
//!
//! Nothing runs beside anything else. What is due at one moment runs in an order that chance gives, so that seeds
//! differ in their interleavings too.

use std::{
    cell::{Cell, RefCell},
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use crate::base::Millis;

/// Chance from a seed (splitmix64).
#[derive(Debug)]
pub(super) struct Chance(Cell<u64>);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(Cell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1)))
    }

    /// Any 64 bits.
    pub(super) fn bits(&self) -> u64 {
        self.0.set(self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let mut bits = self.0.get();
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// From 0 to below 1.
    pub(super) fn unit(&self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether something of this probability happens.
    pub(super) fn is(&self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// From `from` to below `to`.
    pub(super) fn between(&self, from: u64, to: u64) -> u64 {
        from + self.bits() % (to - from).max(1)
    }

    /// Exponentially distributed with this mean.
    pub(super) fn exponential(&self, mean: f64) -> u64 {
        (-(1.0 - self.unit()).ln() * mean) as u64
    }

    pub(super) fn pick<T: Copy>(&self, among: &[T]) -> T {
        among[self.between(0, among.len() as u64) as usize]
    }
}

/// The limit is over.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Elapsed;

pub(super) type TaskId = u64;
type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The clock, and who is to be woken when.
pub(super) struct Time {
    /// Shared with what admission is given to look for room.
    now: Arc<AtomicU64>,
    pub(super) chance: Chance,
    /// When, by chance which first, and who.
    due: RefCell<BinaryHeap<Reverse<(Millis, u64, TaskId)>>>,
    running: Cell<TaskId>,
    last: Cell<TaskId>,
    born: RefCell<Vec<(TaskId, Task)>>,
    tasks: RefCell<BTreeMap<TaskId, Task>>,
}

impl Time {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            now: Arc::default(),
            chance: Chance::new(seed),
            due: RefCell::default(),
            running: Cell::new(0),
            last: Cell::new(0),
            born: RefCell::default(),
            tasks: RefCell::default(),
        }
    }

    pub(super) fn now(&self) -> Millis {
        self.now.load(Ordering::Relaxed)
    }

    /// The clock, for other threads.
    pub(super) fn shared(&self) -> Arc<AtomicU64> {
        self.now.clone()
    }

    /// The task that runs.
    pub(super) fn running(&self) -> TaskId {
        self.running.get()
    }

    /// Has `task` polled at `at`.
    pub(super) fn wake(&self, task: TaskId, at: Millis) {
        self.due.borrow_mut().push(Reverse((at, self.chance.bits(), task)));
    }

    /// Has everybody polled now.
    pub(super) fn wake_all(&self) {
        let all: Vec<TaskId> = self.tasks.borrow().keys().copied().collect();
        for task in all {
            self.wake(task, self.now());
        }
    }

    pub(super) fn spawn(&self, at: Millis, task: impl Future<Output = ()> + 'static) {
        self.last.set(self.last.get() + 1);
        self.born.borrow_mut().push((self.last.get(), Box::pin(task)));
        self.wake(self.last.get(), at);
    }

    /// Waits for what `ready` tells, but not beyond `until`. It is asked whenever the task is polled.
    pub(super) async fn wait<T>(
        &self,
        until: Millis,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<T, Elapsed> {
        let mut registered = false;
        poll_fn(move |_| {
            if let Some(ready) = ready() {
                return Poll::Ready(Ok(ready));
            }
            if self.now() >= until {
                return Poll::Ready(Err(Elapsed));
            }
            if !std::mem::replace(&mut registered, true) {
                self.wake(self.running(), until);
            }
            Poll::Pending
        })
        .await
    }

    pub(super) async fn sleep_until(&self, until: Millis) {
        let never = || None::<()>;
        assert_eq!(self.wait(until, never).await, Err(Elapsed));
    }

    pub(super) async fn sleep(&self, ms: u64) {
        self.sleep_until(self.now() + ms).await;
    }

    /// Goes on to the next moment at which somebody is due, and runs who that is; false if that is not before `end`.
    pub(super) fn step(&self, end: Millis) -> bool {
        let next = self.due.borrow_mut().pop();
        let Some(Reverse((at, order, id))) = next else { return false };
        if at >= end {
            self.due.borrow_mut().push(Reverse((at, order, id)));
            return false;
        }
        self.now.store(at.max(self.now()), Ordering::Relaxed);
        self.tasks.borrow_mut().extend(self.born.borrow_mut().drain(..));
        let task = self.tasks.borrow_mut().remove(&id);
        let Some(mut task) = task else { return true };
        self.running.set(id);
        if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.tasks.borrow_mut().insert(id, task);
        }
        true
    }

    /// Drops whatever has not ended.
    pub(super) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
        self.born.borrow_mut().clear();
    }
}
