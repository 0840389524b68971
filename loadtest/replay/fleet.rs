//! Drives a policy of the crate as a shard does: the same fleet, candidates, load counters and outcomes, with
//! virtual time.

use std::sync::Arc;

use anyhow::Context as _;
use vllm_proxy::{
    config::Config,
    routing::{Candidates, Definition, Outcome, Policy, RouteInput, Shared, Terms, Tried, Usage},
    workers::{EngineStats, Fleet, Health, InFlight, ModelSettings, Registry},
};

use crate::{
    chance::{Chance, hash},
    chooser::Chooser,
    engine::Engine,
    workload::Workload,
};

/// Tokens of a block of vLLM's KV cache on CUDA.
const BLOCK_TOKENS: u32 = 16;

/// What the proxy is told of its workers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Told {
    /// Tokens of a worker's cache, right or wrong.
    pub(crate) cache_tokens: u64,
    /// Whether workers run with `--enable-prompt-tokens-details`.
    pub(crate) cached: bool,
}

/// A policy of the crate with all that it needs.
pub(crate) struct Driven<'a> {
    workload: &'a Workload,
    policy: Box<dyn Policy>,
    fleet: Arc<Fleet>,
    told: Told,
    serving: Vec<usize>,
    scratch: Vec<usize>,
    /// By request, of those that run.
    in_flight: Vec<Option<InFlight>>,
    chance: Chance,
}

impl<'a> Driven<'a> {
    /// Builds the policy of this row with `flags` of the proxy's command line.
    ///
    /// # Errors
    /// The proxy refuses the flags.
    pub(crate) fn new(
        row: &Definition,
        flags: &[String],
        workload: &'a Workload,
        workers: usize,
        told: Told,
        chance: Chance,
    ) -> anyhow::Result<Self> {
        let flags = ["--policy", row.name].into_iter().map(str::to_owned).chain(flags.iter().cloned());
        let settings = Config::from_flags(flags).context("the flags for the proxy")?.routing;
        let shared = Shared::new(settings, workers);
        let urls: Result<Vec<_>, _> = (0..workers).map(|at| format!("http://w{at}:1").parse()).collect();
        let fleet = Registry::new(urls?, ModelSettings::default()).handle().load_full();
        let stats = stats(told, None);
        for worker in &fleet.workers {
            worker.set_health(Health::Up);
            worker.engine().set(&stats, 0);
        }
        Ok(Self {
            workload,
            policy: (row.build)(&shared),
            fleet,
            told,
            serving: (0..workers).collect(),
            scratch: Vec::new(),
            in_flight: workload.requests.iter().map(|_| None).collect(),
            chance,
        })
    }
}

fn stats(told: Told, engine: Option<&Engine<'_>>) -> EngineStats {
    let count = |figure: usize| u32::try_from(figure).unwrap_or(u32::MAX);
    EngineStats {
        running: Some(engine.map_or(0, |engine| count(engine.running()))),
        waiting: Some(engine.map_or(0, |engine| count(engine.waiting()))),
        kv_usage: Some(engine.map_or(0.0, Engine::usage)),
        cache_tokens: Some(told.cache_tokens),
        block_tokens: Some(BLOCK_TOKENS),
        asleep: Some(false),
    }
}

impl Chooser for Driven<'_> {
    fn choose(&mut self, now: f64, request: u32, _engines: &[Engine<'_>]) -> usize {
        let data = &self.workload.requests[request as usize];
        let candidates =
            Candidates::of(&self.fleet, &self.serving, &Tried::none(), &Terms::default(), &mut self.scratch);
        let input = RouteInput {
            random: self.chance.bits(),
            now: (now * 1000.0) as u64,
            session: Some(hash(data.session)),
            prompt: &data.index,
        };
        let Some(selection) = self.policy.choose(&input, &candidates) else { return 0 };
        let worker = self.fleet.workers[selection.position].clone();
        self.in_flight[request as usize] = Some(InFlight::begin(worker, selection.demand));
        selection.position
    }

    fn first_token(&mut self, request: u32) {
        if let Some(guard) = &mut self.in_flight[request as usize] {
            guard.first_token();
        }
    }

    fn ended(&mut self, request: u32, cached: u32) {
        let data = &self.workload.requests[request as usize];
        let Some(guard) = self.in_flight[request as usize].take() else { return };
        let usage = Usage {
            prompt_tokens: Some(u64::from(data.prompt)),
            cached_tokens: self.told.cached.then_some(u64::from(cached)),
            completion_tokens: Some(u64::from(data.output)),
        };
        self.policy.ended(&Outcome {
            worker: guard.worker(),
            prompt: &data.index,
            demand: guard.demand(),
            usage: Some(usage),
        });
    }

    fn scraped(&mut self, engines: &[Engine<'_>]) {
        for (worker, engine) in self.fleet.workers.iter().zip(engines) {
            worker.engine().set(&stats(self.told, Some(engine)), 0);
        }
    }

    fn cache_lost(&mut self, worker: usize) {
        self.fleet.workers[worker].cache_lost();
    }
}
