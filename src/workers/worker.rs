//! One vLLM server: its place, its health, and what is running on it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use xxhash_rust::xxh3::xxh3_64;

use crate::base::Millis;
use crate::telemetry::metrics::{Ejection, ProbeVerdict};
use crate::workers::{Breaker, BreakerRules, Engine, Load, Traits, Turn, WorkerSpec, WorkerUrl, load::Cells};

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
    /// It serves, but too many of its last probes failed or were slow: it is used where nobody better is left.
    Ejected = 3,
}

impl Health {
    fn of(byte: u8) -> Self {
        match byte {
            1 => Self::Up,
            2 => Self::Down,
            3 => Self::Ejected,
            _ => Self::Unknown,
        }
    }
}

/// Why a worker that is up would let a request wait for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Rest {
    /// It sleeps: it has given its memory back.
    Asleep = 1,
    /// It is paused.
    Paused = 2,
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
    /// Times that it was taken out, by reason.
    pub ejections: [AtomicU64; Ejection::ALL.len()],
    /// Probes of its server, by verdict.
    pub probes: [AtomicU64; ProbeVerdict::ALL.len()],
}

impl WorkerCounters {
    /// It was taken out.
    pub fn ejected(&self, reason: Ejection) {
        self.ejections[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// It was probed.
    pub fn probed(&self, verdict: ProbeVerdict) {
        self.probes[verdict as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Policies that can be counted at most.
pub const MAX_POLICIES: usize = 16;

/// A line of its own, so that shards that count on different workers do not share one.
#[derive(Debug, Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// What has become of a doubt: nobody has one, somebody has, a probe is about it.
const SETTLED: u8 = 0;
const DOUBTED: u8 = 1;
const LOOKED_AT: u8 = 2;

/// What the data-parallel ranks of one server have in common: one listener, one process to be started anew.
#[derive(Debug, Default)]
struct Server {
    addresses: ArcSwap<Addresses>,
    /// A [`Health`].
    health: AtomicU8,
    /// [`Rest`]s, as bits: what it said when it was asked, other than in its `/metrics`.
    resting: AtomicU8,
    /// Somebody wants it probed.
    doubt: AtomicU8,
    /// Grows with every loss of the prefix caches.
    cache_generation: AtomicU32,
    /// Workers that are ranks of it.
    ranks: AtomicU32,
    /// When it came up last.
    up_since: AtomicU64,
    /// Until when others are preferred.
    set_back_until: AtomicU64,
}

/// One vLLM server, or one data-parallel rank of it. Shared by all threads; everything that changes is atomic.
#[derive(Debug)]
pub struct Worker {
    id: usize,
    spec: WorkerSpec,
    name: String,
    key: u64,
    rank: Option<String>,
    server: Arc<Server>,
    /// Of the server. Beside it, because it is only written to when something is wrong, and read for every choice.
    breaker: Arc<Breaker>,
    engine: Engine,
    /// Attempts that had been made on it when the breaker was last told of a failure.
    attempts_told: AtomicU64,
    load: OwnLine<Cells>,
    counters: OwnLine<WorkerCounters>,
}

impl Worker {
    /// A worker of which nothing is known but what the operator says. `id` is never given to another one in this
    /// process.
    pub fn new(id: usize, spec: WorkerSpec) -> Self {
        Self::with_breaker(id, spec, BreakerRules::default())
    }

    /// As [`Worker::new`], with a breaker of these rules.
    pub fn with_breaker(id: usize, spec: WorkerSpec, rules: BreakerRules) -> Self {
        Self::on(Arc::default(), Arc::new(Breaker::new(rules)), id, spec)
    }

    /// As [`Worker::new`], a further rank of the server that `self` is a rank of: both are reached, are down and
    /// lose their caches together.
    pub fn sibling(&self, id: usize, spec: WorkerSpec) -> Self {
        debug_assert_eq!(self.spec.url, spec.url, "a rank of another server");
        Self::on(self.server.clone(), self.breaker.clone(), id, spec)
    }

    fn on(server: Arc<Server>, breaker: Arc<Breaker>, id: usize, spec: WorkerSpec) -> Self {
        server.ranks.fetch_add(1, Ordering::Relaxed);
        let rank = spec.rank.map(|rank| rank.to_string());
        let name = match &rank {
            Some(rank) => format!("{}@{rank}", spec.url),
            None => spec.url.to_string(),
        };
        Self {
            id,
            spec,
            key: xxh3_64(name.as_bytes()),
            name,
            rank,
            server,
            breaker,
            engine: Engine::default(),
            attempts_told: AtomicU64::new(0),
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

    /// The same in every process that knows it by this name: what proxies call it among themselves.
    pub fn key(&self) -> u64 {
        self.key
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
        Health::of(self.server.health.load(Ordering::Relaxed))
    }

    /// Whether it is up.
    pub fn usable(&self) -> bool {
        self.health() == Health::Up
    }

    /// Whether its server answered the last time that it was asked.
    pub fn answers(&self) -> bool {
        matches!(self.health(), Health::Up | Health::Ejected)
    }

    /// Whether it is given requests in the ordinary way: it is up, neither sleeps nor is paused, and its breaker
    /// lets them through.
    pub fn serves(&self, now: Millis) -> bool {
        self.usable() && !self.rests() && self.breaker.admits(now)
    }

    /// As [`Worker::serves`], but also true of one that was ejected for its probes.
    pub fn could_serve(&self, now: Millis) -> bool {
        self.answers() && !self.rests() && self.breaker.admits(now)
    }

    /// The breaker of its server.
    pub fn breaker(&self) -> &Arc<Breaker> {
        &self.breaker
    }

    /// Tells the breaker of a failure.
    pub fn failed(&self, now: Millis) -> Turn {
        let attempts = self.counters().attempts.load(Ordering::Relaxed);
        let told = self.attempts_told.swap(attempts, Ordering::Relaxed);
        // what the other ranks did meanwhile is not known here; the choice makes it about the same
        let ranks = u64::from(self.server.ranks.load(Ordering::Relaxed));
        self.breaker.failed_after(now, attempts.saturating_sub(told).max(1).saturating_mul(ranks))
    }

    /// Something looks wrong with it: the control thread probes it, and learns its models anew, at once. Until
    /// that has spoken it is used as before.
    pub fn doubt(&self) {
        // what many requests doubt together is written once
        if self.server.doubt.load(Ordering::Relaxed) != DOUBTED {
            self.server.doubt.store(DOUBTED, Ordering::Relaxed);
        }
    }

    /// Whether it was doubted since this was asked last.
    pub fn take_doubt(&self) -> bool {
        self.server.doubt.load(Ordering::Relaxed) == DOUBTED && self.exchange_doubt(DOUBTED, LOOKED_AT)
    }

    /// A probe has ended: what was doubted when it began is settled.
    pub fn settle_doubt(&self) {
        self.exchange_doubt(LOOKED_AT, SETTLED);
    }

    /// Whether it is doubted, and no probe that began later has ended.
    pub fn is_doubted(&self) -> bool {
        self.server.doubt.load(Ordering::Relaxed) != SETTLED
    }

    fn exchange_doubt(&self, from: u8, to: u8) -> bool {
        self.server.doubt.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Others are preferred until then: it has just refused a request, or failed one in a way that may have been the
    /// request's doing. Without this the worker that fails fastest would look like the least loaded one.
    pub fn set_back(&self, until: Millis) {
        self.server.set_back_until.fetch_max(until, Ordering::Relaxed);
    }

    /// Whether others are preferred.
    pub fn is_set_back(&self, now: Millis) -> bool {
        now < self.server.set_back_until.load(Ordering::Relaxed)
    }

    /// Whether it sleeps or is paused.
    pub fn rests(&self) -> bool {
        self.engine.asleep() || self.server.resting.load(Ordering::Relaxed) != 0
    }

    /// Whether it rests, and in which of the two ways.
    pub fn rest(&self) -> Option<Rest> {
        let bits = self.server.resting.load(Ordering::Relaxed);
        if self.engine.asleep() || bits & Rest::Asleep as u8 != 0 {
            Some(Rest::Asleep)
        } else {
            (bits != 0).then_some(Rest::Paused)
        }
    }

    /// Takes over what its server said when it was asked; returns whether that is news.
    pub fn set_rest(&self, rest: Rest, rests: bool) -> bool {
        let bit = rest as u8;
        let before = if rests {
            self.server.resting.fetch_or(bit, Ordering::Relaxed)
        } else {
            self.server.resting.fetch_and(!bit, Ordering::Relaxed)
        };
        (before & bit != 0) != rests
    }

    /// It is up from now on, and was not before.
    pub fn came_up(&self, now: Millis) {
        self.server.up_since.store(now, Ordering::Relaxed);
        self.set_health(Health::Up);
    }

    /// When it came up last; only of use while it is up.
    pub fn up_since(&self) -> Millis {
        self.server.up_since.load(Ordering::Relaxed)
    }

    /// Sets what is believed of it and of its server's other ranks; returns what was believed before. Who comes
    /// back from being down has most likely been started anew, so going down loses the cache.
    pub fn set_health(&self, health: Health) -> Health {
        let before = Health::of(self.server.health.swap(health as u8, Ordering::Relaxed));
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

    /// Requests of this process and of the proxies that it hears of.
    pub fn known_in_flight(&self) -> u32 {
        self.in_flight().saturating_add(self.peers_load().in_flight)
    }

    /// Whether as many of our requests run on it as may at a time.
    pub fn is_full(&self) -> bool {
        self.traits().max_concurrent_requests.is_some_and(|most| self.in_flight() >= most)
    }

    /// What runs on it now.
    pub fn load(&self) -> Load {
        let foreign = Load { in_flight: self.engine.foreign(), ..Load::default() };
        self.own_load().plus(self.peers_load()).plus(foreign)
    }

    /// What this process has running on it.
    pub fn own_load(&self) -> Load {
        self.load.0.own()
    }

    /// What other proxies say that they have running on it.
    pub fn peers_load(&self) -> Load {
        self.load.0.peers()
    }

    /// Takes over what other proxies say; only ever called by one thread.
    pub fn set_peers_load(&self, load: Load) {
        self.load.0.set_peers(load);
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
    fn who_sleeps_or_is_paused_serves_nobody_until_both_are_over() {
        let worker = worker();
        worker.came_up(7);
        assert!(worker.serves(7) && worker.up_since() == 7);
        assert!(worker.set_rest(Rest::Paused, true) && !worker.set_rest(Rest::Paused, true));
        assert_eq!((worker.rest(), worker.serves(7)), (Some(Rest::Paused), false));
        assert!(worker.set_rest(Rest::Asleep, true));
        assert_eq!(worker.rest(), Some(Rest::Asleep));
        assert!(worker.set_rest(Rest::Asleep, false) && worker.set_rest(Rest::Paused, false));
        assert_eq!((worker.rest(), worker.serves(7)), (None, true));
    }

    #[test]
    fn a_doubt_is_taken_once() {
        let worker = worker();
        assert!(!worker.take_doubt());
        worker.doubt();
        worker.doubt();
        assert!(worker.take_doubt() && !worker.take_doubt());
    }

    #[test]
    fn a_doubt_is_settled_by_a_probe_that_began_after_it() {
        let worker = worker();
        assert!(!worker.is_doubted());
        worker.doubt();
        worker.settle_doubt();
        assert!(worker.is_doubted(), "that probe had begun before");
        assert!(worker.take_doubt() && worker.is_doubted());
        worker.doubt();
        worker.settle_doubt();
        assert!(worker.is_doubted(), "somebody else has doubts again");
        assert!(worker.take_doubt());
        worker.settle_doubt();
        assert!(!worker.is_doubted());
    }

    #[test]
    fn a_worker_that_fails_every_third_time_keeps_its_breaker_closed() {
        let failing = |every: u64| {
            let worker = worker();
            for attempt in 1..=60 {
                worker.counters().attempts.fetch_add(1, Ordering::Relaxed);
                if attempt % every == 0 {
                    worker.failed(attempt);
                }
            }
            worker.breaker().state()
        };
        use crate::workers::BreakerState::{Closed, Open};
        assert_eq!([failing(1), failing(2), failing(3)], [Open, Open, Closed]);
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
