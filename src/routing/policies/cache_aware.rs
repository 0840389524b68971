//! The worker that will have the least to compute before this request's first token, seen from the whole fleet.
//!
//! ```text
//! cost = queued + a × uncached + 200 × in flight + 0.01 × decoding        (tokens, times the worker's cost)
//! a    = 1.2 + mean queued / 4096, at most --cache-miss-weight-max
//! ```
//! `uncached` is what of this prompt the [`PrefixIndex`] does not find on the worker, and `queued` the same of the
//! requests that have no first token yet; both weigh a token by the context that it is computed behind. A miss
//! costs this request little and everybody behind it much, so its weight grows with the backlog: at 1 the choice
//! is greedy, and a busy fleet falls into a state where every prompt is computed everywhere (`routing.md` §0.2,
//! simulated: at 90 % load the mean time to the first token is 48 times as long). Ties are broken by chance.
//!
//! While other proxies cannot be heard, each knows only what it sent itself. So that they agree without a word, the
//! worker that a prompt's first unknown chunk names (the highest hash of both, "rendezvous") is charged
//! `--hash-credit` less of what it would have to compute (`routing.md` §4.5). While they are heard it is at most a third
//! of that, and less where they are heard more often ([`Journal::ignorance`]): what they have sent in the last moments
//! is not known yet, and who all find the same worker the least loaded one would all go there. The hash sends
//! different prompts to different workers, and equal ones to the same.
//!
//! What is not known of a prompt (a body that was not read, a prompt shorter than a chunk) is taken for uncached on
//! every worker: then the load decides alone.

use std::sync::Arc;

use super::chance;
use crate::{
    routing::{
        CacheSizes, Candidates, Definition, Journal, Needs, Outcome, Partings, Policy, PrefixIndex, Prompt,
        RouteInput, Score, Selection, Shared,
    },
    workers::{Demand, Worker},
};

/// Weight of an uncached token while nothing is queued. 1.5 gained nothing in the replay and cost 1.5 % of the p99.
const MISS_WEIGHT_MIN: f64 = 1.2;

/// Queued tokens per worker that add 1 to that weight: half of vLLM's `max_num_batched_tokens`.
const BACKLOG_TOKENS: f64 = 4096.0;

/// What a request in flight costs besides its prompt, in tokens of prefill.
const REQUEST_TOKENS: f64 = 200.0;

/// Tokens of context that make computing a token cost twice: attention grows with the context and the rest does not.
/// By operations it is 31,000 for Llama 3 8B, 30,000 for Qwen3 32B, 54,000 for Llama 3 70B.
const ATTENTION_TOKENS: f64 = 40_000.0;

/// What a token of context costs that is being decoded with, in tokens of prefill.
const DECODE_SHARE: f64 = 0.01;

pub(super) const DEFINITION: Definition = Definition {
    name: "cache_aware",
    aliases: &["prefixaware", "loadaware", "etp"],
    summary: "the worker that has least to compute: the tokens queued there and those of the prompt that are \
              not in its prefix cache",
    needs: Needs { prompt: true, session: false },
    build: |shared| Box::new(CacheAware::new(shared)),
};

struct CacheAware {
    index: Arc<PrefixIndex>,
    sizes: Arc<CacheSizes>,
    partings: Arc<Partings>,
    journal: Arc<Journal>,
    miss_weight_max: f64,
    hash_credit: f64,
    /// Of the candidates, in their order: numbers in the index, chunks found there, what is asked of them, costs.
    seats: Vec<usize>,
    depths: Vec<u32>,
    demands: Vec<Demand>,
    scores: Vec<Score>,
}

impl CacheAware {
    fn new(shared: &Shared) -> Self {
        Self {
            index: shared.index.clone(),
            sizes: shared.sizes.clone(),
            partings: shared.partings.clone(),
            journal: shared.journal.clone(),
            hash_credit: shared.settings.hash_credit,
            miss_weight_max: shared.settings.cache_miss_weight_max.max(MISS_WEIGHT_MIN),
            seats: Vec::new(),
            depths: Vec::new(),
            demands: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// Weight of a token that is not cached, now.
    fn miss_weight(&self, candidates: &Candidates<'_>) -> f64 {
        let queued: u64 = candidates.iter().map(|(_, worker)| worker.load().queued_tokens).sum();
        let mean = queued as f64 / candidates.len().max(1) as f64;
        (MISS_WEIGHT_MIN + mean / BACKLOG_TOKENS).min(self.miss_weight_max)
    }

    /// The share of what a prompt's worker would have to compute that it is not charged; 0: there are no other proxies,
    /// or they have nothing running.
    fn credit(&self, candidates: &Candidates<'_>) -> f64 {
        let peers = || candidates.iter().any(|(_, worker)| worker.peers_load().in_flight > 0);
        if self.hash_credit > 0.0 && (self.journal.is_alone() || peers()) {
            self.hash_credit * self.journal.ignorance()
        } else {
            0.0
        }
    }

    /// The position of the worker that is charged less.
    fn home(&self, prompt: &Prompt, candidates: &Candidates<'_>) -> Option<usize> {
        let known = self.depths.iter().copied().max()?;
        let chunk = prompt.chunks().get(known as usize)?;
        let place = |(_, worker): &(usize, &Worker)| chance::mix(worker.key() ^ chunk);
        candidates.iter().max_by_key(place).map(|(position, _)| position)
    }
}

impl Policy for CacheAware {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        self.seats.clear();
        self.demands.clear();
        self.scores.clear();
        for (_, worker) in candidates.iter() {
            self.index.follow(worker.id(), worker.cache_generation());
            self.seats.push(worker.id());
        }
        self.index.matched(input.prompt.chunks(), &self.seats, &mut self.depths);
        let weight = self.miss_weight(candidates);
        let credit = self.credit(candidates);
        let home = if credit > 0.0 { self.home(input.prompt, candidates) } else { None };
        let mut least = f64::INFINITY;
        for ((position, worker), &depth) in candidates.iter().zip(&self.depths) {
            let load = worker.load();
            let weight = if home == Some(position) { weight * (1.0 - credit) } else { weight };
            let demand = demand(&self.partings, input.prompt, worker, depth);
            let work = load.queued_tokens as f64
                + weight * demand.work_tokens as f64
                + REQUEST_TOKENS * (f64::from(load.in_flight) + 1.0)
                + DECODE_SHARE * load.decode_tokens as f64;
            let cost = work * worker.traits().cost;
            least = least.min(cost);
            self.demands.push(demand);
            self.scores.push(Score { position, cost });
        }
        let best = |score: &Score| score.cost <= least;
        let ties = self.scores.iter().filter(|score| best(score)).count();
        let turn = if ties > 1 { chance::below(input.random, ties) } else { 0 };
        let at = (0..self.scores.len()).filter(|&at| best(&self.scores[at])).nth(turn)?;
        let (position, worker) = candidates.get(at)?;
        let selection = Selection { position, demand: self.demands[at] };
        // Until its request ends a prompt is in use and cannot be evicted, whatever comes meanwhile.
        let room = input.prompt.chunks_per(self.sizes.tokens(worker));
        self.index.touch(worker.id(), input.prompt.chunks(), room, room);
        self.journal.sent(worker, input.prompt);
        Some(selection)
    }

    fn ended(&mut self, outcome: &Outcome<'_>) {
        let Outcome { worker, prompt, demand, usage } = *outcome;
        let Some(usage) = usage else {
            let depth = prompt.depth_of(demand.cached_tokens());
            self.index.remove(worker.id(), prompt.chunks(), depth);
            return;
        };
        // now it can be evicted, and is the last to be: vLLM frees a request's blocks when it ends
        let room = prompt.chunks_per(self.sizes.tokens(worker));
        self.index.touch(worker.id(), prompt.chunks(), room, 0);
        // it lies in the worker's cache although no prompt leads to it yet
        let generated = prompt.chunks_per(usage.completion_tokens.unwrap_or(0));
        self.index.add_pressure(worker.id(), generated, room);
        self.journal.ended(worker, prompt, generated);
        if let Some(reported) = usage.cached_tokens {
            let (certain, possible) = demand.shared_tokens;
            self.partings.learn(&(certain..possible), block(worker), reported);
        }
        if let Some(reported) = usage.cached_tokens
            && self.sizes.reported(worker, demand, reported)
        {
            worker.cache_lost();
        }
    }

    fn scores(&self) -> &[Score] {
        &self.scores
    }
}

/// What a prompt asks of a worker that holds its first `depth` chunks: only whole blocks are found, and the last
/// token is always computed.
fn demand(partings: &Partings, prompt: &Prompt, worker: &Worker, depth: u32) -> Demand {
    let prompt_tokens = prompt.tokens();
    let most = prompt_tokens.saturating_sub(1);
    let shared = prompt.shared_tokens(depth as usize);
    let found = partings.expected(&shared, block(worker)).min(most);
    let uncached_tokens = prompt_tokens - found;
    let middle = (prompt_tokens - uncached_tokens / 2) as f64;
    let work_tokens = (uncached_tokens as f64 * (1.0 + middle / ATTENTION_TOKENS)) as u64;
    Demand { prompt_tokens, uncached_tokens, work_tokens, shared_tokens: (shared.start, shared.end) }
}

/// Tokens of a block of the worker's cache.
fn block(worker: &Worker) -> u64 {
    worker.engine().block_tokens().unwrap_or(1).max(1).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        routing::{
            Settings, Usage,
            policies::tests::{among, fleet},
        },
        workers::{EngineStats, Fleet, InFlight, Load},
    };

    /// A policy before two workers, and the prompts that it is asked about.
    struct Bed {
        policy: CacheAware,
        fleet: Arc<Fleet>,
        random: u64,
    }

    /// A prompt of so many chunks of 128 tokens; prompts with the same seed begin alike.
    fn prompt(seed: u64, chunks: u64) -> Prompt {
        let hash = |chunk: u64| chance::mix(seed << 32 | chunk) | 1;
        Prompt::new((0..chunks).map(hash).collect(), chunks * 512, chunks * 128)
    }

    impl Bed {
        fn new(workers: usize) -> Self {
            let flags = ["--prefix-index-bytes=1048576", "--worker-cache-tokens=100000"];
            let policy = CacheAware::new(&Shared::new(Settings::of_flags(&flags), workers));
            Self { policy, fleet: fleet(workers), random: 0 }
        }

        fn choose(&mut self, prompt: &Prompt) -> Selection {
            let (all, mut scratch): (Vec<usize>, _) = ((0..self.fleet.workers.len()).collect(), Vec::new());
            let candidates = among(&self.fleet, &all, &mut scratch);
            self.random += 1;
            let input = RouteInput { random: self.random, now: 0, session: None, prompt };
            self.policy.choose(&input, &candidates).expect("somebody is there")
        }

        fn begin(&self, selection: Selection) -> InFlight {
            InFlight::begin(self.fleet.workers[selection.position].clone(), selection.demand)
        }

        fn ended(&mut self, selection: Selection, prompt: &Prompt, usage: Option<Usage>) {
            let worker = &self.fleet.workers[selection.position];
            self.policy.ended(&Outcome { worker, prompt, demand: selection.demand, usage });
        }
    }

    #[test]
    fn a_prompt_goes_where_it_is_known_and_a_longer_one_as_well() {
        let mut bed = Bed::new(4);
        for seed in 0..20 {
            let home = bed.choose(&prompt(seed, 10));
            assert_eq!((home.demand.prompt_tokens, home.demand.uncached_tokens), (1280, 1280));
            assert_eq!(home.demand.work_tokens, 1300, "the middle one is behind 640 others");
            let next = bed.choose(&prompt(seed, 15));
            assert_eq!(next.position, home.position);
            // the tenth chunk is found, the eleventh is not: somewhere in it they part
            assert_eq!(next.demand.uncached_tokens, 640 - 64);
        }
    }

    #[test]
    fn the_last_token_and_what_fills_no_block_is_always_computed() {
        let mut bed = Bed::new(1);
        bed.choose(&prompt(1, 10));
        assert_eq!(bed.choose(&prompt(1, 10)).demand.uncached_tokens, 1);
        let stats = EngineStats { block_tokens: Some(500), ..EngineStats::default() };
        bed.fleet.workers[0].engine().set(&stats, 0);
        assert_eq!(bed.choose(&prompt(1, 10)).demand.cached_tokens(), 1000);
    }

    #[test]
    fn a_backlog_outweighs_a_hit_when_it_is_larger_than_the_miss() {
        let mut bed = Bed::new(2);
        let known = prompt(1, 10);
        let home = bed.choose(&known).position;
        let mut queued = Vec::new();
        loop {
            let next = bed.choose(&known);
            if next.position != home {
                break;
            }
            // a hit asks for a token and its place in the batch
            queued.push(bed.begin(next));
            assert!(queued.len() < 20, "1300 tokens at 1.2 are worth some eight requests");
        }
        assert!(queued.len() > 7, "{}", queued.len());
    }

    #[test]
    fn the_weight_of_a_miss_grows_with_the_backlog_up_to_its_bound() {
        let bed = Bed::new(2);
        let all = [0, 1];
        let weight = || {
            let mut scratch = Vec::new();
            bed.policy.miss_weight(&among(&bed.fleet, &all, &mut scratch))
        };
        assert_eq!(weight(), 1.2);
        let demand = Demand::new(16_384, 16_384);
        let one = InFlight::begin(bed.fleet.workers[0].clone(), demand);
        assert_eq!(weight(), 3.2, "8192 queued in the mean");
        let _more: Vec<_> = (0..9).map(|_| InFlight::begin(bed.fleet.workers[1].clone(), demand)).collect();
        assert_eq!(weight(), 10.0);
        drop(one);
        assert_eq!(weight(), 10.0);
    }

    #[test]
    fn who_lost_its_cache_has_nothing() {
        let mut bed = Bed::new(2);
        let home = bed.choose(&prompt(1, 10)).position;
        bed.fleet.workers[home].cache_lost();
        assert_eq!(bed.choose(&prompt(1, 10)).demand.cached_tokens(), 0);
    }

    #[test]
    fn what_was_never_sent_is_not_there() {
        let mut bed = Bed::new(2);
        let home = bed.choose(&prompt(1, 4));
        let longer = bed.choose(&prompt(1, 10));
        bed.ended(longer, &prompt(1, 10), None);
        let again = bed.choose(&prompt(1, 10));
        assert_eq!((again.position, again.demand.cached_tokens()), (home.position, 4 * 128 + 64));
    }

    #[test]
    fn three_reports_of_nothing_mean_that_the_cache_was_lost() {
        let mut bed = Bed::new(1);
        let known = prompt(1, 100);
        bed.choose(&known);
        let reported = |tokens| Some(Usage { cached_tokens: Some(tokens), ..Usage::default() });
        for _ in 0..2 {
            let hit = bed.choose(&known);
            bed.ended(hit, &known, reported(0));
        }
        let hit = bed.choose(&known);
        assert!(hit.demand.cached_tokens() > 10_000);
        bed.ended(hit, &known, reported(0));
        assert_eq!(bed.choose(&known).demand.cached_tokens(), 0);
    }

    #[test]
    fn generated_text_takes_the_place_of_prompts() {
        let mut bed = Bed::new(1);
        let (old, other) = (prompt(1, 100), prompt(2, 10));
        let selection = bed.choose(&old);
        bed.ended(selection, &old, Some(Usage::default()));
        let selection = bed.choose(&other);
        // 100,000 tokens fit
        let usage = Usage { completion_tokens: Some(95_000), ..Usage::default() };
        bed.ended(selection, &other, Some(usage));
        let left = bed.choose(&old).demand.cached_tokens();
        assert!(left < 100 * 128 / 2, "{left}");
    }

    #[test]
    fn a_worker_without_a_prefix_cache_has_nothing() {
        let mut bed = Bed::new(1);
        let stats = EngineStats { cache_tokens: Some(0), ..EngineStats::default() };
        bed.fleet.workers[0].engine().set(&stats, 0);
        bed.choose(&prompt(1, 10));
        assert_eq!(bed.choose(&prompt(1, 10)).demand.cached_tokens(), 0);
    }

    #[test]
    fn the_worker_that_the_hash_names_is_charged_less_if_there_are_other_proxies() {
        let charged = |alone: bool, peers: u32| {
            let mut bed = Bed::new(4);
            bed.policy.journal = Arc::new(Journal::open(9, 200).0);
            bed.policy.journal.set_alone(alone);
            let load = Load { in_flight: peers, ..Load::default() };
            bed.fleet.workers.iter().for_each(|worker| worker.set_peers_load(load));
            bed.choose(&prompt(1, 10));
            let mut costs: Vec<f64> = bed.policy.scores().iter().map(|score| score.cost).collect();
            costs.sort_by(f64::total_cmp);
            (costs[3] - costs[0], costs[3] - costs[1])
        };
        let credit = |alone, peers| {
            let (one, others) = charged(alone, peers);
            assert_eq!(others, 0.0, "one worker is charged less");
            one.round()
        };
        assert_eq!(credit(false, 0), 0.0, "nobody else has anything running");
        assert_eq!(credit(true, 0), 234.0, "0.15 of 1300 tokens at 1.2");
        assert_eq!(credit(false, 1), 78.0, "a third of it");
        assert_eq!(credit(true, 1), 234.0);
    }

    #[test]
    fn every_candidate_is_scored() {
        let mut bed = Bed::new(3);
        let home = bed.choose(&prompt(1, 10)).position;
        bed.choose(&prompt(1, 10));
        let scores = bed.policy.scores();
        assert_eq!(scores.len(), 3);
        assert!(
            scores.iter().all(|score| score.position == home || score.cost > scores[home].cost),
            "{scores:?}"
        );
    }
}
