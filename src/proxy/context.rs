//! What the exchanges of one shard share.

use std::{
    cell::{Cell, RefCell},
    hash::{BuildHasher, Hasher, RandomState},
    io,
    rc::Rc,
    sync::Arc,
};

use crate::{
    admission::{self, Admission},
    base::{Clock, Date},
    net::{self, Buffer, ShardClock, Watches},
    proxy::{Budget, RetrySettings, Settings, admit::Entrance, retry::Moment},
    routing::{Needs, Router, Shared, Terms},
    telemetry::{
        Resource,
        metrics::{AcceptError, Metrics, ShardMetrics},
    },
    upstream::{self, ConnectFault, Pool},
    workers::{Fleet, FleetHandle, StoredResponses, Worker},
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

/// What `accept(2)` says of a client that was gone, or could not be reached, before it was accepted.
const OF_THE_CLIENT: [i32; 9] = [
    libc::ECONNABORTED,
    libc::EPROTO,
    libc::ENETDOWN,
    libc::ENOPROTOOPT,
    libc::EHOSTDOWN,
    libc::ENONET,
    libc::EHOSTUNREACH,
    libc::EOPNOTSUPP,
    libc::ENETUNREACH,
];

/// What a shard's context is made of.
#[derive(Debug)]
pub struct Parts {
    /// Limits of an exchange.
    pub settings: Settings,
    /// Further attempts.
    pub retries: RetrySettings,
    /// The allowance of further attempts, one for all shards.
    pub retry_budget: Arc<Budget>,
    /// Connections to workers.
    pub upstream: upstream::Settings,
    /// TCP of the connections to workers.
    pub net: net::Settings,
    /// How much is let in at a time.
    pub admission: admission::Settings,
    /// What shards let in together; `None`: there is no limit.
    pub entrance: Option<Arc<Admission>>,
    /// Memory for bodies, of all shards.
    pub body_budget: Arc<admission::Budget>,
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
    /// Who has stored which response.
    pub stored: Arc<StoredResponses>,
    /// Connections of clients that the process serves at most.
    pub most_connections: u64,
    /// Called before every connect to a worker, for tests that need one to fail.
    pub connect_fault: Option<ConnectFault>,
    /// Called with every request's target, for tests that need a fault on a shard.
    pub fault: Option<fn(&str)>,
}

/// What the exchanges of one shard share.
pub struct Context {
    pub(super) settings: Settings,
    pub(super) retries: RetrySettings,
    pub(super) retry_budget: Arc<Budget>,
    pub(super) clock: Rc<ShardClock>,
    pub(super) watches: Watches,
    pub(super) pool: Pool,
    pub(super) buffers: Buffers,
    pub(super) admin: Arc<Worker>,
    pub(super) fault: Option<fn(&str)>,
    /// `None`: there is no limit, and everybody comes in.
    pub(super) entrance: Option<Entrance>,
    pub(super) body_budget: Arc<admission::Budget>,
    pub(super) router: RefCell<Router>,
    /// What the router has to know of a request.
    pub(super) needs: Needs,
    /// What candidates depend on, but for time and chance.
    pub(super) terms: Terms,
    pub(super) stored: Arc<StoredResponses>,
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
    most_connections: u64,
}

impl Context {
    /// The context of one shard, on that shard's thread.
    pub fn new(parts: Parts) -> Self {
        let clock = Rc::new(ShardClock::new(parts.clock));
        let router = Router::new(&parts.routing);
        let entrance = |admission| Entrance::new(admission, &parts.admission);
        Self {
            pool: Pool::new(
                &parts.upstream,
                parts.net,
                clock.clone(),
                parts.metrics.clone(),
                parts.connect_fault,
            ),
            watches: Watches::new(clock.clone()),
            clock,
            entrance: parts.entrance.map(entrance),
            body_budget: parts.body_budget,
            settings: parts.settings,
            retries: parts.retries,
            retry_budget: parts.retry_budget,
            buffers: Buffers::default(),
            admin: parts.admin,
            fault: parts.fault,
            needs: router.needs(),
            terms: parts.routing.settings.terms(),
            stored: parts.stored,
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
            most_connections: parts.most_connections,
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

    /// Position of this shard.
    pub(super) fn shard(&self) -> usize {
        self.shard
    }

    /// What shards let in together.
    pub(super) fn admission(&self) -> Option<&Admission> {
        self.entrance.as_ref().map(Entrance::admission)
    }

    /// The bell was rung: some of those who wait have been let in.
    pub fn look(&self) {
        if let Some(entrance) = &self.entrance {
            entrance.look();
        }
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

    /// What a decision about another attempt depends on now.
    pub(super) fn moment(&self) -> Moment<'_> {
        Moment { now: self.clock.now(), chance: self.chance(), metrics: &self.metrics, shard: self.shard }
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

    /// Whether as many clients are connected, to all shards, as the process serves.
    pub fn is_full(&self) -> bool {
        self.metrics.connections_open() >= self.most_connections
    }

    /// Makes room for one client by closing a connection of this shard that only waits for another request; whether
    /// there was any.
    pub fn makes_room(&self) -> bool {
        self.watches.end_idle()
    }

    /// A client could not be accepted: counts it, tells it once per episode, and lets go of what is not needed;
    /// true if descriptors are short.
    pub fn accept_failed(&self, error: &io::Error) -> bool {
        let resource = Resource::of(error);
        let reason = match (resource, error.raw_os_error()) {
            (Some(Resource::Descriptors), _) => AcceptError::Descriptors,
            (Some(Resource::Memory), _) => AcceptError::Memory,
            (_, Some(code)) if OF_THE_CLIENT.contains(&code) => AcceptError::Aborted,
            _ => AcceptError::Other,
        };
        self.metrics().accept_failed(reason);
        match resource {
            Some(resource) => self.metrics.shortages().tell(resource, self.clock.now()),
            // it concerns one client, who knows
            None if reason == AcceptError::Aborted => tracing::debug!(%error, "a client was gone before"),
            None => tracing::warn!(%error, "cannot accept a connection"),
        }
        if reason == AcceptError::Descriptors {
            self.pool.trim();
        }
        reason == AcceptError::Descriptors
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
        self.metrics().ticked();
        if self.shard == 0 {
            self.metrics.shortages().tell_over(self.clock.now());
        }
        self.watches.tick();
        self.pool.tick();
        if let Some(entrance) = &self.entrance {
            entrance.tick();
        }
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

impl Snapshot {
    /// The fleet for another thread. Its count is shared by all: only for who has to wait.
    pub(super) fn shared(&self) -> Arc<Fleet> {
        self.0.clone()
    }
}

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
