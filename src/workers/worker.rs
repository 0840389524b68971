//! One vLLM server: its place, its health, and what is running on it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;

use crate::workers::WorkerUrl;

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
}

/// A line of its own, so that shards that count on different workers do not share one.
#[derive(Debug, Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// One vLLM server. Shared by all threads; everything that changes is atomic.
#[derive(Debug)]
pub struct Worker {
    id: usize,
    url: WorkerUrl,
    addresses: ArcSwap<Addresses>,
    health: AtomicU8,
    in_flight: OwnLine<AtomicU32>,
    counters: OwnLine<WorkerCounters>,
}

impl Worker {
    /// A worker of which nothing is known but its URL. `id` is never given to another one in this process.
    pub fn new(id: usize, url: WorkerUrl) -> Self {
        Self {
            id,
            url,
            addresses: ArcSwap::default(),
            health: AtomicU8::new(Health::Unknown as u8),
            in_flight: OwnLine::default(),
            counters: OwnLine::default(),
        }
    }

    /// A small number that no other worker of this process has or had: the index of per-shard tables.
    pub fn id(&self) -> usize {
        self.id
    }

    /// Where it is.
    pub fn url(&self) -> &WorkerUrl {
        &self.url
    }

    /// The addresses to connect to.
    pub fn addresses(&self) -> arc_swap::Guard<Arc<Addresses>> {
        self.addresses.load()
    }

    /// Takes over what the resolver said; an empty answer changes nothing (`faults.md` U24). True if the set
    /// of addresses changed.
    pub fn resolved(&self, mut list: Vec<SocketAddr>) -> bool {
        list.dedup();
        let old = self.addresses.load();
        let same = list.len() == old.list.len() && list.iter().all(|a| old.list.contains(a));
        if list.is_empty() || same {
            return false;
        }
        self.addresses.store(Arc::new(Addresses { list, generation: old.generation + 1 }));
        true
    }

    /// What is believed of it now.
    pub fn health(&self) -> Health {
        match self.health.load(Ordering::Relaxed) {
            1 => Health::Up,
            2 => Health::Down,
            _ => Health::Unknown,
        }
    }

    /// Whether it takes requests in the ordinary way.
    pub fn usable(&self) -> bool {
        self.health() == Health::Up
    }

    /// Sets what is believed of it; returns what was believed before.
    pub fn set_health(&self, health: Health) -> Health {
        match self.health.swap(health as u8, Ordering::Relaxed) {
            1 => Health::Up,
            2 => Health::Down,
            _ => Health::Unknown,
        }
    }

    /// Requests of this process that run on it now.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.0.load(Ordering::Relaxed)
    }

    /// Its counters.
    pub fn counters(&self) -> &WorkerCounters {
        &self.counters.0
    }
}

/// One request in flight on a worker, until dropped. The only place where the count goes down.
#[derive(Debug)]
pub struct InFlight(Arc<Worker>);

impl InFlight {
    /// Counts one request more on `worker`.
    pub fn begin(worker: Arc<Worker>) -> Self {
        worker.in_flight.0.fetch_add(1, Ordering::Relaxed);
        worker.counters.0.attempts.fetch_add(1, Ordering::Relaxed);
        Self(worker)
    }

    /// The worker it runs on.
    pub fn worker(&self) -> &Arc<Worker> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let before = self.0.in_flight.0.fetch_sub(1, Ordering::Relaxed);
        debug_assert!(before > 0, "a request ended on a worker where none was in flight");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker() -> Worker {
        Worker::new(0, "http://a:1".parse().unwrap())
    }

    #[test]
    fn in_flight_ends_with_the_guard() {
        let worker = Arc::new(worker());
        let (one, two) = (InFlight::begin(worker.clone()), InFlight::begin(worker.clone()));
        assert_eq!(worker.in_flight(), 2);
        drop(one);
        drop(two);
        assert_eq!(worker.in_flight(), 0);
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
}
