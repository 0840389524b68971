//! What the exchanges of one shard share.

use std::{
    cell::{Cell, RefCell},
    hash::{BuildHasher, Hasher, RandomState},
    rc::Rc,
    sync::Arc,
};

use crate::{
    base::{Clock, Date, Millis},
    net::{Buffer, ShardClock, Watches},
    proxy::{Budget, RetrySettings, Settings},
    routing::{Needs, Router, Shared},
    telemetry::metrics::{Metrics, ShardMetrics},
    upstream::{self, Pool},
    workers::{Fleet, FleetHandle, Worker},
};

/// Room before what is read from a client or a worker, for a head that is longer than the one it replaces.
pub(super) const HEADROOM: usize = 512;

/// Size of the read that waits for a request: most requests of a chat come whole in it, and an idle
/// connection holds no more.
pub(super) const SMALL_BYTES: usize = 4096;

/// Size of a read of a worker's answer or of a large upload.
pub(super) const LARGE_BYTES: usize = 32 * 1024;

/// Buffers kept for the next exchange, of each size.
const KEPT_BUFFERS: usize = 256;

/// How often a shard logs that the host is short of something, in milliseconds.
const WARN_MS: Millis = 10_000;

/// What a shard's context is made of.
#[derive(Debug)]
pub struct Parts {
    /// Limits of an exchange.
    pub settings: Settings,
    /// Further attempts.
    pub retries: RetrySettings,
    /// The allowance of further attempts, one for all shards.
    pub budget: Arc<Budget>,
    /// Connections to workers.
    pub upstream: upstream::Settings,
    /// The process's clock.
    pub clock: Clock,
    /// Where the newest fleet is.
    pub fleet: FleetHandle,
    /// The control thread's own endpoints, as a worker.
    pub admin: Arc<Worker>,
    /// The process's metrics.
    pub metrics: Arc<Metrics>,
    /// Position of this shard.
    pub shard: usize,
    /// What the router is built of.
    pub routing: Shared,
    /// Called with every request's target, for tests that need a fault on a shard.
    pub fault: Option<fn(&str)>,
}

/// What the exchanges of one shard share.
pub struct Context {
    pub(super) settings: Settings,
    pub(super) retries: RetrySettings,
    pub(super) budget: Arc<Budget>,
    pub(super) clock: Rc<ShardClock>,
    pub(super) watches: Watches,
    pub(super) pool: Pool,
    pub(super) buffers: Buffers,
    pub(super) admin: Arc<Worker>,
    pub(super) fault: Option<fn(&str)>,
    pub(super) router: RefCell<Router>,
    /// What the router has to know of a request.
    pub(super) needs: Needs,
    /// Where candidates are kept for the length of a choice.
    pub(super) positions: RefCell<Vec<usize>>,
    metrics: Arc<Metrics>,
    shard: usize,
    fleet: RefCell<arc_swap::Cache<FleetHandle, Arc<Fleet>>>,
    /// The newest fleet again, with a count that no other shard touches.
    own_fleet: RefCell<Rc<Snapshot>>,
    random: Cell<u64>,
    date: RefCell<(u64, Rc<str>)>,
    connections: Cell<usize>,
    warned: Cell<Option<Millis>>,
}

impl Context {
    /// The context of one shard, on that shard's thread.
    pub fn new(parts: Parts) -> Self {
        let clock = Rc::new(ShardClock::new(parts.clock));
        let router = Router::new(&parts.routing);
        Self {
            pool: Pool::new(&parts.upstream, clock.clone()),
            watches: Watches::new(clock.clone()),
            clock,
            settings: parts.settings,
            retries: parts.retries,
            budget: parts.budget,
            buffers: Buffers::default(),
            admin: parts.admin,
            fault: parts.fault,
            needs: router.needs(),
            router: RefCell::new(router),
            positions: RefCell::default(),
            metrics: parts.metrics,
            shard: parts.shard,
            own_fleet: RefCell::new(Rc::new(Snapshot(parts.fleet.load_full()))),
            fleet: RefCell::new(arc_swap::Cache::new(parts.fleet)),
            // From the operating system, so that neither shards nor proxies before the same workers choose in step;
            // anything but 0 will do.
            random: Cell::new(RandomState::new().build_hasher().finish() | 1),
            date: RefCell::new((u64::MAX, Rc::from(""))),
            connections: Cell::new(0),
            warned: Cell::new(None),
        }
    }

    /// The newest fleet.
    pub(super) fn fleet(&self) -> Rc<Snapshot> {
        let mut cache = self.fleet.borrow_mut();
        let newest = cache.load();
        let mut own = self.own_fleet.borrow_mut();
        if !Arc::ptr_eq(newest, &own.0) {
            *own = Rc::new(Snapshot(newest.clone()));
        }
        own.clone()
    }

    /// Where this shard counts.
    pub(super) fn metrics(&self) -> &ShardMetrics {
        self.metrics.shard(self.shard)
    }

    /// Chance (xorshift64).
    pub(super) fn random(&self) -> u64 {
        let mut bits = self.random.get();
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        self.random.set(bits);
        bits
    }

    /// Chance, from 0 to below 1.
    pub(super) fn chance(&self) -> f64 {
        (self.random() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether a shortage may be logged now: once in `WARN_MS` is enough, however many requests meet it.
    pub(super) fn may_warn(&self) -> bool {
        let now = self.clock.now();
        let may = self.warned.get().is_none_or(|at| now.saturating_sub(at) >= WARN_MS);
        if may {
            self.warned.set(Some(now));
        }
        may
    }

    /// Requests that run in this process now, on whatever shard.
    pub(super) fn in_flight(&self) -> u64 {
        self.metrics.in_flight()
    }

    /// The `date` of an answer, made once a second.
    pub(super) fn date(&self) -> Rc<str> {
        let second = self.clock.now() / 1000;
        let mut date = self.date.borrow_mut();
        if date.0 != second {
            *date = (second, Date::now().http().into());
        }
        date.1.clone()
    }

    /// Connections of clients that are open.
    pub fn connections(&self) -> usize {
        self.connections.get()
    }

    pub(super) fn connection_opened(&self) {
        self.connections.set(self.connections.get() + 1);
        self.metrics().connection_opened();
    }

    pub(super) fn connection_closed(&self) {
        self.connections.set(self.connections.get() - 1);
        self.metrics().connection_closed();
    }

    /// From now on no exchange begins: idle connections close, busy ones after their answer.
    pub fn drain(&self) {
        self.watches.drain();
    }

    /// From now on every connection ends where it stands.
    pub fn cut(&self) {
        self.watches.cut();
    }

    /// What has to happen every [`crate::net::TICK_MS`].
    pub fn tick(&self) {
        self.watches.tick();
        self.pool.tick();
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("shard", &self.shard).finish_non_exhaustive()
    }
}

/// A fleet that one shard holds. Exchanges count their use of it here: the fleet's own count would be a line
/// that all shards write to with every request.
pub(super) struct Snapshot(Arc<Fleet>);

impl std::ops::Deref for Snapshot {
    type Target = Fleet;

    fn deref(&self) -> &Fleet {
        &self.0
    }
}

/// Buffers that have been used and will be again.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    small: RefCell<Vec<Buffer>>,
    large: RefCell<Vec<Buffer>>,
}

impl Buffers {
    /// An empty buffer for the first read of a request.
    pub(super) fn small(&self) -> Buffer {
        self.small.borrow_mut().pop().unwrap_or_else(|| Buffer::new(HEADROOM, SMALL_BYTES))
    }

    /// An empty buffer for an answer.
    pub(super) fn large(&self) -> Buffer {
        self.large.borrow_mut().pop().unwrap_or_else(|| Buffer::new(HEADROOM, LARGE_BYTES))
    }

    /// Takes a buffer back that nobody needs any more.
    pub(super) fn recycle(&self, mut buffer: Buffer) {
        let list = match buffer.capacity() - HEADROOM.min(buffer.capacity()) {
            SMALL_BYTES => &self.small,
            LARGE_BYTES => &self.large,
            _ => return,
        };
        let mut list = list.borrow_mut();
        if list.len() < KEPT_BUFFERS {
            buffer.reset(HEADROOM);
            list.push(buffer);
        }
    }
}
