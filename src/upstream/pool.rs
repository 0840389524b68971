//! The idle connections of one shard.
//!
//! Last in, first out: what was used last is least likely to have been closed. uvicorn and vLLM's Rust front
//! end close an idle connection after 5.0 s, so ours are younger than that; and while one rests its
//! next read is under way: whatever comes before the next request is not its answer.

use std::{cell::RefCell, io, net::SocketAddr, rc::Rc, sync::Arc, sync::atomic::Ordering};

use crate::{
    base::Millis,
    net::{self, Buffer, ReadAhead, ReadHalf, ShardClock, Watch, WriteHalf, connect, pause},
    telemetry::{Resource, metrics::Metrics},
    upstream::Settings,
    workers::Worker,
};

/// After connections were closed for want of descriptors, the kernel is given this long to close them, in
/// milliseconds: under io_uring it does so beside us.
const TRIM_PAUSE_MS: u64 = 5;

/// A fault that tests put before every connect.
pub type ConnectFault = fn(SocketAddr) -> io::Result<()>;

/// An open connection to a worker.
#[derive(Debug)]
pub struct Connection {
    /// What comes from the worker.
    pub reader: ReadAhead,
    /// What goes to the worker.
    pub writer: WriteHalf,
    /// Whether an exchange has ended on it before, so that the worker may have closed it meanwhile.
    pub reused: bool,
    peer: SocketAddr,
    /// Of the worker's addresses when it was last seen that `peer` is one of them.
    generation: u64,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Millis,
}

/// The idle connections of one shard, by worker.
#[derive(Debug)]
pub struct Pool {
    connect_ms: u64,
    idle_ms: Millis,
    net: net::Settings,
    size: usize,
    clock: Rc<ShardClock>,
    metrics: Arc<Metrics>,
    fault: Option<ConnectFault>,
    /// Indexed by [`Worker::id`]; oldest first.
    idle: RefCell<Vec<Vec<Idle>>>,
}

impl Pool {
    /// An empty pool.
    pub fn new(
        settings: &Settings,
        net: net::Settings,
        clock: Rc<ShardClock>,
        metrics: Arc<Metrics>,
        fault: Option<ConnectFault>,
    ) -> Self {
        Self {
            connect_ms: settings.connect_timeout_secs.saturating_mul(1000),
            idle_ms: settings.pool_idle_timeout_secs.saturating_mul(1000),
            net,
            size: settings.pool_size,
            clock,
            metrics,
            fault,
            idle: RefCell::default(),
        }
    }

    /// An idle connection to `worker` that is not known to be closed.
    pub fn take(&self, worker: &Worker) -> Option<Connection> {
        let now = self.clock.now();
        let mut idle = self.idle.borrow_mut();
        let list = idle.get_mut(worker.id())?;
        while let Some(Idle { mut connection, since }) = list.pop() {
            let rested = now.saturating_sub(since);
            if rested >= self.idle_ms {
                // the others are older still
                list.clear();
                return None;
            }
            // a FIN, or bytes that no request has asked for and the next answer must not begin with
            if connection.reader.is_quiet() && connection.belongs_to(worker) {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps `connection`, on which an exchange with `worker` has ended cleanly. The next read on it begins at
    /// once, into `buffer`.
    pub fn put(&self, worker: &Worker, mut connection: Connection, buffer: Buffer) {
        if self.size == 0 || self.idle_ms == 0 {
            return;
        }
        connection.reused = true;
        connection.reader.arm(buffer);
        let mut idle = self.idle.borrow_mut();
        if idle.len() <= worker.id() {
            idle.resize_with(worker.id() + 1, Vec::new);
        }
        let list = &mut idle[worker.id()];
        if list.len() >= self.size {
            list.remove(0);
        }
        list.push(Idle { connection, since: self.clock.now() });
    }

    /// Closes what has rested too long. To be called every tick.
    pub fn tick(&self) {
        let now = self.clock.now();
        for list in self.idle.borrow_mut().iter_mut() {
            let old = list.partition_point(|idle| now.saturating_sub(idle.since) >= self.idle_ms);
            list.drain(..old);
        }
    }

    /// Closes every idle connection to `worker`: one of them was found dead.
    pub fn forget(&self, worker: &Worker) {
        if let Some(list) = self.idle.borrow_mut().get_mut(worker.id()) {
            list.clear();
        }
    }

    /// Closes every idle connection, because descriptors are short; how many there were.
    pub fn trim(&self) -> usize {
        self.idle.borrow_mut().iter_mut().map(|list| list.drain(..).count()).sum()
    }

    /// Opens a connection to one of the worker's addresses, trying each in turn, each for no longer than
    /// `--connect-timeout-secs`.
    ///
    /// # Errors
    /// The last address' error, `TimedOut` if its time was over; `NotFound` while the worker's name has not
    /// been resolved.
    ///
    /// # Cancellation
    /// The attempt is given up; nothing leaks.
    pub async fn open(&self, worker: &Arc<Worker>, watch: &Watch) -> io::Result<Connection> {
        let addresses = worker.addresses();
        let mut error = io::Error::new(io::ErrorKind::NotFound, "the name of the worker is not resolved");
        let count = addresses.list.len();
        let turn = worker.counters().connects.fetch_add(1, Ordering::Relaxed) as usize;
        for n in 0..count {
            let peer = addresses.list[(turn + n) % count];
            let mut connected = self.connect(peer, watch).await;
            let short = connected.as_ref().err().and_then(Resource::of);
            if let Some(resource) = short {
                self.metrics.shortages().tell(resource, self.clock.now());
            }
            if short == Some(Resource::Descriptors) && self.trim() > 0 {
                pause(TRIM_PAUSE_MS).await;
                connected = self.connect(peer, watch).await;
            }
            match connected {
                Ok((reader, writer)) => {
                    let reader = ReadAhead::new(reader);
                    let generation = addresses.generation;
                    return Ok(Connection { reader, writer, reused: false, peer, generation });
                }
                Err(failed) => error = failed,
            }
        }
        Err(error)
    }

    async fn connect(&self, peer: SocketAddr, watch: &Watch) -> io::Result<(ReadHalf, WriteHalf)> {
        if let Some(fault) = self.fault {
            fault(peer)?;
        }
        let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "connecting took too long"));
        watch.limit(self.connect_ms, connect(peer, &self.net)).await.unwrap_or_else(late)
    }
}

impl Connection {
    /// Whether its address is still one of the worker's.
    fn belongs_to(&mut self, worker: &Worker) -> bool {
        let addresses = worker.addresses();
        if addresses.generation != self.generation && addresses.list.contains(&self.peer) {
            self.generation = addresses.generation;
        }
        addresses.generation == self.generation
    }
}
