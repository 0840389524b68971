//! Who chooses: what a run asks, and the simulator's own choosers that real policies are compared with.
//!
//! The oracles know everything that the model knows: exact caches, what those who wait will bring into them, and
//! the cost of every queue. They minimise the wait plus `a` times the request's own prefill; the weight decides how
//! much is paid now for those who come later.

use crate::{
    cache::BlockCache,
    chance::Chance,
    engine::Engine,
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
            quote.wait_s + self.weight * quote.own_s
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

/// The algorithm that `cache_aware` is meant to be, in its plainest form: an exact LRU of each worker's prompts
/// as the mirror of its cache. What the policy is measured by when its index is in doubt.
#[derive(Debug)]
pub(crate) struct Reference<'a> {
    workload: &'a Workload,
    /// Highest weight of a miss.
    miss_weight_max: f64,
    mirrors: Vec<BlockCache>,
    queued: Vec<u64>,
    in_flight: Vec<u32>,
    decoding: Vec<u64>,
    /// Worker and uncached tokens by request.
    running: Vec<(usize, u32)>,
    chance: Chance,
}

impl<'a> Reference<'a> {
    pub(crate) fn new(
        workload: &'a Workload,
        workers: usize,
        cache_tokens: u64,
        miss_weight_max: f64,
        chance: Chance,
    ) -> Self {
        Self {
            workload,
            miss_weight_max,
            mirrors: (0..workers).map(|_| BlockCache::new(cache_tokens)).collect(),
            queued: vec![0; workers],
            in_flight: vec![0; workers],
            decoding: vec![0; workers],
            running: vec![(0, 0); workload.requests.len()],
            chance,
        }
    }

    fn missing(&self, worker: usize, data: &Request) -> u32 {
        let found = self.mirrors[worker].matching(&data.blocks) as u32 * self.workload.block_tokens;
        data.prompt - found.min(data.prompt)
    }

    fn touch(&mut self, worker: usize, data: &Request) {
        let (mirror, size) = (&mut self.mirrors[worker], self.workload.block_tokens);
        let matching = mirror.matching(&data.blocks);
        let held = (matching as u32 * size).min(data.prompt);
        let Some(mut nodes) = mirror.admit(&data.blocks[..matching], u64::from(data.prompt - held)) else {
            return;
        };
        for (at, id) in data.blocks.iter().enumerate().skip(matching) {
            nodes.push(mirror.fill(*id, size.min(data.prompt - at as u32 * size)));
        }
        mirror.release(&nodes, 0);
    }
}

impl Chooser for Reference<'_> {
    fn choose(&mut self, _now: f64, request: u32, engines: &[Engine<'_>]) -> usize {
        let data = &self.workload.requests[request as usize];
        let workers = engines.len();
        let backlog = self.queued.iter().sum::<u64>() as f64 / workers as f64;
        let weight = (1.5 + backlog / 4096.0).min(self.miss_weight_max);
        let missing: Vec<u32> = (0..workers).map(|worker| self.missing(worker, data)).collect();
        let costs = (0..workers).map(|worker| {
            self.queued[worker] as f64
                + weight * f64::from(missing[worker])
                + 200.0 * f64::from(self.in_flight[worker])
                + 0.02 * self.decoding[worker] as f64
        });
        let chosen = least(costs, &mut self.chance);
        self.queued[chosen] += u64::from(missing[chosen]);
        self.in_flight[chosen] += 1;
        self.running[request as usize] = (chosen, missing[chosen]);
        self.touch(chosen, data);
        chosen
    }

    fn first_token(&mut self, request: u32) {
        let (worker, missing) = self.running[request as usize];
        self.queued[worker] -= u64::from(missing);
        self.decoding[worker] += u64::from(self.workload.requests[request as usize].prompt);
    }

    fn ended(&mut self, request: u32, _cached: u32) {
        let (worker, _) = self.running[request as usize];
        self.in_flight[worker] -= 1;
        self.decoding[worker] -= u64::from(self.workload.requests[request as usize].prompt);
    }

    fn cache_lost(&mut self, worker: usize) {
        self.mirrors[worker].flush();
    }
}
