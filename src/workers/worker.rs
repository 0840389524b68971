//! One vLLM server: its place, its health, and what is running on it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;

use crate::workers::{Engine, Load, Traits, WorkerSpec, WorkerUrl, load::Cells};

/// What is believed of a worker. Busy is not dead: only transport errors and probes change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Health {
    /// Nothing has been heard of it yet; it is not used.
    Unknown = 0,
    /// The last probe was good and no transport error came after it.
    Up = 1,
    /// It could not be reached, or its `/health` said no.
    Down = 2,
}

/// The addresses that a worker's host name resolved to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// In the resolver's order; empty while the name has never been resolved.
    pub list: Vec<SocketAddr>,
    /// Grows by one with every change, so that pools can tell old connections.
    pub generation: u64,
}

/// Monotonic counters of one worker, over all shards.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Attempts that were sent or tried to be sent.
    pub attempts: AtomicU64,
    /// Attempts that ended in a refused connect, a reset or a malformed answer.
    pub transport_errors: AtomicU64,
    /// Connections opened.
    pub connects: AtomicU64,
    /// Tokens of the prompts that were sent to it, as they were estimated.
    pub prompt_tokens: AtomicU64,
    /// Those of them that were believed to be in its prefix cache.
    pub predicted_cached_tokens: AtomicU64,
    /// Tokens of the prompts whose answer told how many were cached.
    pub reported_prompt_tokens: AtomicU64,
    /// Those of them that the worker found in its prefix cache.
    pub reported_cached_tokens: AtomicU64,
    /// Times that a policy chose it, by the policy's position in its table.
    pub selections: [AtomicU64; MAX_POLICIES],
}

/// Policies that can be counted at most.
pub const MAX_POLICIES: usize = 16;

/// A line of its own, so that shards that count on different workers do not share one.
#[derive(Debug, Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// What the data-parallel ranks of one server have in common: one listener, one process to be started anew.
#[derive(Debug, Default)]
struct Server {
    addresses: ArcSwap<Addresses>,
    /// A [`Health`].
    health: AtomicU8,
    /// Grows with every loss of the prefix caches.
    cache_generation: AtomicU32,
}

/// One vLLM server, or one data-parallel rank of it. Shared by all threads; everything that changes is atomic.
#[derive(Debug)]
pub struct Worker {
    id: usize,
    spec: WorkerSpec,
    name: String,
    rank: Option<String>,
    server: Arc<Server>,
    engine: Engine,
    load: OwnLine<Cells>,
    counters: OwnLine<WorkerCounters>,
}

impl Worker {
    /// A worker of which nothing is known but what the operator says. `id` is never given to another one in this
    /// process.
    pub fn new(id: usize, spec: WorkerSpec) -> Self {
        Self::on(Arc::default(), id, spec)
    }

    /// As [`Worker::new`], a further rank of the server that `self` is a rank of: both are reached, are down and
    /// lose their caches together.
    pub fn sibling(&self, id: usize, spec: WorkerSpec) -> Self {
        debug_assert_eq!(self.spec.url, spec.url, "a rank of another server");
        Self::on(self.server.clone(), id, spec)
    }

    fn on(server: Arc<Server>, id: usize, spec: WorkerSpec) -> Self {
        let rank = spec.rank.map(|rank| rank.to_string());
        let name = match &rank {
            Some(rank) => format!("{}@{rank}", spec.url),
            None => spec.url.to_string(),
        };
        Self {
            id,
            spec,
            name,
            rank,
            server,
            engine: Engine::default(),
            load: OwnLine::default(),
            counters: OwnLine::default(),
        }
    }

    /// A small number that no other worker of this process has or had: the index of per-shard tables.
    pub fn id(&self) -> usize {
        self.id
    }

    /// Where it is.
    pub fn url(&self) -> &WorkerUrl {
        &self.spec.url
    }

    /// How it is shown: its URL, and behind an `@` its data-parallel rank.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Value of `X-data-parallel-rank` for it.
    pub fn rank(&self) -> Option<&str> {
        self.rank.as_deref()
    }

    /// Whether it stands for its whole server, of which it is the only or the first rank: what concerns a server
    /// is done once.
    pub fn leads(&self) -> bool {
        self.spec.rank.is_none_or(|rank| rank == 0)
    }

    /// The number of its rank; `None` where the server chooses itself.
    pub fn rank_number(&self) -> Option<u32> {
        self.spec.rank
    }

    /// Whether both are ranks of one server, or the same worker.
    pub fn shares_server(&self, other: &Worker) -> bool {
        Arc::ptr_eq(&self.server, &other.server)
    }

    /// What the operator says of it.
    pub fn traits(&self) -> &Traits {
        &self.spec.traits
    }

    /// The addresses to connect to.
    pub fn addresses(&self) -> arc_swap::Guard<Arc<Addresses>> {
        self.server.addresses.load()
    }

    /// Takes over what the resolver said; an empty answer changes nothing (`faults.md` U24). True if the set
    /// of addresses changed.
    pub fn resolved(&self, mut list: Vec<SocketAddr>) -> bool {
        list.dedup();
        let old = self.server.addresses.load();
        let same = list.len() == old.list.len() && list.iter().all(|a| old.list.contains(a));
        if list.is_empty() || same {
            return false;
        }
        self.server.addresses.store(Arc::new(Addresses { list, generation: old.generation + 1 }));
        true
    }

    /// What is believed of it now.
    pub fn health(&self) -> Health {
        match self.server.health.load(Ordering::Relaxed) {
            1 => Health::Up,
            2 => Health::Down,
            _ => Health::Unknown,
        }
    }

    /// Whether it takes requests in the ordinary way.
    pub fn usable(&self) -> bool {
        self.health() == Health::Up
    }

    /// Sets what is believed of it and of its server's other ranks; returns what was believed before. Who comes
    /// back from being down has most likely been started anew, so going down loses the cache.
    pub fn set_health(&self, health: Health) -> Health {
        let before = match self.server.health.swap(health as u8, Ordering::Relaxed) {
            1 => Health::Up,
            2 => Health::Down,
            _ => Health::Unknown,
        };
        if health == Health::Down && before != Health::Down {
            self.cache_lost();
        }
        before
    }

    /// Its prefix cache is empty, and those of its server's other ranks: it was started anew, slept, or was told
    /// to.
    pub fn cache_lost(&self) {
        self.server.cache_generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Changes whenever its prefix cache was lost.
    pub fn cache_generation(&self) -> u32 {
        self.server.cache_generation.load(Ordering::Relaxed)
    }

    /// What it says of itself.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Requests of this process that run on it now.
    pub fn in_flight(&self) -> u32 {
        self.load.0.in_flight()
    }

    /// Whether as many of our requests run on it as may at a time.
    pub fn is_full(&self) -> bool {
        self.traits().max_concurrent_requests.is_some_and(|most| self.in_flight() >= most)
    }

    /// What runs on it now.
    pub fn load(&self) -> Load {
        let own = self.load.0.load();
        Load { in_flight: own.in_flight.saturating_add(self.engine.foreign()), ..own }
    }

    pub(super) fn cells(&self) -> &Cells {
        &self.load.0
    }

    /// Its counters.
    pub fn counters(&self) -> &WorkerCounters {
        &self.counters.0
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    fn worker() -> Worker {
        Worker::new(0, "http://a:1".parse().unwrap())
    }

    #[test]
    fn an_empty_answer_of_the_resolver_keeps_the_last_good_one() {
        let worker = worker();
        let one: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let two: SocketAddr = "127.0.0.2:1".parse().unwrap();
        assert!(worker.resolved(vec![one, two]));
        assert!(!worker.resolved(vec![]));
        assert!(!worker.resolved(vec![two, one]), "another order is no change");
        assert_eq!(worker.addresses().list, [one, two]);
        assert!(worker.resolved(vec![two]));
        assert_eq!(worker.addresses().generation, 2);
    }

    #[test]
    fn ranks_of_one_server_are_down_together_and_counted_apart() {
        let spec = |rank| WorkerSpec { rank: Some(rank), ..WorkerSpec::from_str("http://a:1").unwrap() };
        let first = Arc::new(Worker::new(0, spec(0)));
        let second = first.sibling(1, spec(1));
        assert_eq!((first.name(), second.name()), ("http://a:1@0", "http://a:1@1"));
        assert!(first.leads() && !second.leads() && first.shares_server(&second));
        first.set_health(Health::Up);
        assert!(second.usable());
        second.set_health(Health::Down);
        assert!(!first.usable());
        assert_eq!((first.cache_generation(), second.cache_generation()), (1, 1));
        let _running = crate::workers::InFlight::begin(first.clone(), crate::workers::Demand::default());
        assert_eq!((first.in_flight(), second.in_flight()), (1, 0));
        assert!(worker().leads() && !worker().shares_server(&first));
    }
}
