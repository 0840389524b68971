//! Who chooses: what a run asks, and the simulator's own choosers that real policies are compared with.
//!
//! The oracles know everything that the model knows: exact caches, what those who wait will bring into them, and
//! the cost of every queue. They minimise the wait plus `a` times the request's own prefill; the weight decides how
//! much is paid now for those who come later. They are greedy all the same, so no bound: where workers are unequal
//! they crowd the fast ones, and a policy that goes where prompts are known can beat them.

use crate::{
    cache::BlockCache,
    chance::Chance,
    engine::Engine,
    proxies::Traffic,
    workload::{Request, Workload},
};

/// Chooses workers and hears what becomes of the requests.
pub(crate) trait Chooser {
    /// The worker for a request that comes now.
    fn choose(&mut self, now: f64, request: u32, engines: &[Engine<'_>]) -> usize;

    /// A request has its first token.
    fn first_token(&mut self, request: u32) {
        let _ = request;
    }

    /// A request has ended; so many of its tokens were found in the worker's cache.
    fn ended(&mut self, request: u32, cached: u32) {
        let _ = (request, cached);
    }

    /// What the workers' metrics say now.
    fn scraped(&mut self, engines: &[Engine<'_>]) {
        let _ = engines;
    }

    /// When [`Chooser::go_on`] is to be called next, in seconds; infinity: never.
    fn due(&self) -> f64 {
        f64::INFINITY
    }

    /// Does what is due now besides.
    fn go_on(&mut self, now: f64, engines: &[Engine<'_>]) {
        let _ = (now, engines);
    }

    /// What proxies told each other so far.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    /// A worker was seen to lose its cache.
    fn cache_lost(&mut self, worker: usize) {
        let _ = worker;
    }
}

/// Any worker.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) Chance);

impl Chooser for Random {
    fn choose(&mut self, _now: f64, _request: u32, engines: &[Engine<'_>]) -> usize {
        self.0.below(engines.len())
    }
}

/// The next worker.
#[derive(Debug, Default)]
pub(crate) struct InTurn(usize);

impl Chooser for InTurn {
    fn choose(&mut self, _now: f64, _request: u32, engines: &[Engine<'_>]) -> usize {
        self.0 = (self.0 + 1) % engines.len();
        self.0
    }
}

/// All-knowing.
#[derive(Debug)]
pub(crate) struct Oracle {
    /// How much a second of the request's own prefill weighs against a second of waiting.
    pub(crate) weight: f64,
    pub(crate) chance: Chance,
}

impl Chooser for Oracle {
    fn choose(&mut self, now: f64, request: u32, engines: &[Engine<'_>]) -> usize {
        let cost = |engine: &Engine<'_>| {
            let quote = engine.quote(now, request);
            quote.wait_s + quote.own_s + (self.weight - 1.0) * quote.work_s
        };
        least(engines.iter().map(cost), &mut self.chance)
    }
}

/// Where the least of these is; one by chance where several are.
fn least(costs: impl Iterator<Item = f64>, chance: &mut Chance) -> usize {
    let (mut best, mut ties, mut chosen) = (f64::INFINITY, 0, 0);
    for (at, cost) in costs.enumerate() {
        if cost < best {
            (best, ties, chosen) = (cost, 1, at);
        } else if cost == best {
            ties += 1;
            if chance.below(ties) == 0 {
                chosen = at;
            }
        }
    }
    chosen
}

/// How the reference keeps its picture of what a worker's cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mirror {
    /// A prompt is used when it is sent.
    Sent,
    /// As in the worker: a prompt is in use until its request ends, so that it cannot be evicted, and is freed then,
    /// with what was generated.
    Pinned,
}

/// The algorithm that `cache_aware` is meant to be, in its plainest form: an exact LRU of each worker's prompts
/// as the mirror of its cache. What the policy is measured by when its index is in doubt.
#[derive(Debug)]
pub(crate) struct Reference<'a> {
    workload: &'a Workload,
    mirror: Mirror,
    /// Highest weight of a miss.
    miss_weight_max: f64,
    workers: Vec<Believed>,
    /// By request, of those that run.
    running: Vec<Option<Sent>>,
    chance: Chance,
}

/// What the reference believes of a worker.
#[derive(Debug)]
struct Believed {
    cache: BlockCache,
    /// Uncached tokens of prompts without a first token.
    queued: u64,
    in_flight: u32,
    /// Tokens of prompts in decode.
    decoding: u64,
}

/// A request on its way.
#[derive(Debug)]
struct Sent {
    worker: usize,
    uncached: u32,
    /// Its blocks in the mirror, if they are pinned.
    nodes: Vec<u32>,
}

impl<'a> Reference<'a> {
    pub(crate) fn new(
        workload: &'a Workload,
        workers: usize,
        cache_tokens: u64,
        miss_weight_max: f64,
        mirror: Mirror,
        chance: Chance,
    ) -> Self {
        let believed =
            |_| Believed { cache: BlockCache::new(cache_tokens), queued: 0, in_flight: 0, decoding: 0 };
        Self {
            workload,
            mirror,
            miss_weight_max,
            workers: (0..workers).map(believed).collect(),
            running: workload.requests.iter().map(|_| None).collect(),
            chance,
        }
    }

    fn uncached(&self, worker: &Believed, data: &Request) -> u32 {
        let found = worker.cache.matching(&data.blocks) as u32 * self.workload.block_tokens;
        data.prompt - found.min(data.prompt)
    }

    /// Puts a prompt into the mirror; returns the blocks that stay pinned.
    fn send(&mut self, worker: usize, data: &Request) -> Vec<u32> {
        let (cache, size) = (&mut self.workers[worker].cache, self.workload.block_tokens);
        let matching = cache.matching(&data.blocks);
        let held = (matching as u32 * size).min(data.prompt);
        // what waits there can be more than the worker holds
        let Some(mut nodes) = cache.admit(&data.blocks[..matching], u64::from(data.prompt - held)) else {
            return Vec::new();
        };
        for (at, id) in data.blocks.iter().enumerate().skip(matching) {
            nodes.push(cache.fill(*id, size.min(data.prompt - at as u32 * size)));
        }
        if self.mirror == Mirror::Sent {
            cache.release(&std::mem::take(&mut nodes), 0);
        }
        nodes
    }
}

impl Chooser for Reference<'_> {
    fn choose(&mut self, _now: f64, request: u32, engines: &[Engine<'_>]) -> usize {
        let data = &self.workload.requests[request as usize];
        debug_assert_eq!(engines.len(), self.workers.len());
        let backlog = self.workers.iter().map(|worker| worker.queued).sum::<u64>() as f64;
        let weight = (1.5 + backlog / self.workers.len() as f64 / 4096.0).min(self.miss_weight_max);
        let costs = self.workers.iter().map(|worker| {
            worker.queued as f64
                + weight * f64::from(self.uncached(worker, data))
                + 200.0 * f64::from(worker.in_flight)
                + 0.02 * worker.decoding as f64
        });
        let mut chance = self.chance.clone();
        let chosen = least(costs, &mut chance);
        self.chance = chance;
        let uncached = self.uncached(&self.workers[chosen], data);
        let nodes = self.send(chosen, data);
        self.workers[chosen].queued += u64::from(uncached);
        self.workers[chosen].in_flight += 1;
        self.running[request as usize] = Some(Sent { worker: chosen, uncached, nodes });
        chosen
    }

    fn first_token(&mut self, request: u32) {
        if let Some(sent) = &self.running[request as usize] {
            let worker = &mut self.workers[sent.worker];
            worker.queued -= u64::from(sent.uncached);
            worker.decoding += u64::from(self.workload.requests[request as usize].prompt);
        }
    }

    fn ended(&mut self, request: u32, _cached: u32) {
        let Some(sent) = self.running[request as usize].take() else { return };
        let (worker, data) = (&mut self.workers[sent.worker], &self.workload.requests[request as usize]);
        worker.in_flight -= 1;
        worker.decoding -= u64::from(data.prompt);
        if self.mirror == Mirror::Pinned {
            let generated = worker.cache.admit(&[], u64::from(data.output)).map_or(0, |_| data.output);
            worker.cache.release(&sent.nodes, generated);
        }
    }

    fn cache_lost(&mut self, worker: usize) {
        self.workers[worker].cache.flush();
    }
}
