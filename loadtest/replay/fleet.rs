//! Drives a policy of the crate as a shard does: the same fleet, candidates, load counters and outcomes, with
//! virtual time. Several proxies know of each other what they tell, and what the workers' metrics show.

use std::sync::Arc;

use anyhow::Context as _;
use vllm_proxy::{
    config::Config,
    routing::{Candidates, Definition, Journal, Outcome, Policy, RouteInput, Shared, Terms, Tried, Usage},
    workers::{EngineStats, Fleet, Health, InFlight, ModelSettings, Registry},
};

use crate::{
    chance::{Chance, hash},
    chooser::Chooser,
    engine::Engine,
    proxies::{Exchange, JOURNAL_EVENTS, Member, Setup, Sharing, Traffic},
    run::SCRAPE_S,
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

/// A policy of the crate in one or several proxies, with all that they need.
pub(crate) struct Driven<'a> {
    workload: &'a Workload,
    proxies: Vec<Proxy>,
    exchange: Option<Exchange>,
    told: Told,
    serving: Vec<usize>,
    scratch: Vec<usize>,
    /// By request, of those that run: its proxy, and what it asks there.
    in_flight: Vec<Option<(usize, InFlight)>>,
    /// Whom a request comes to.
    spray: Chance,
}

/// One proxy, with its own picture of the workers.
struct Proxy {
    policy: Box<dyn Policy>,
    fleet: Arc<Fleet>,
    chance: Chance,
    /// By worker: requests on it that no proxy was known to have sent when its metrics were read last.
    surplus: Vec<u32>,
    /// When it reads the workers' metrics next, in seconds; infinity: when the run says so.
    scrape: f64,
}

impl Proxy {
    fn scraped(&mut self, told: Told, engines: &[Engine<'_>]) {
        for ((worker, engine), surplus) in self.fleet.workers.iter().zip(engines).zip(&mut self.surplus) {
            let stats = stats(told, Some(engine));
            let there = stats.running.unwrap_or(0).saturating_add(stats.waiting.unwrap_or(0));
            let unknown = there.saturating_sub(worker.known_in_flight());
            // as the control thread does it (`control::figures`)
            let before = std::mem::replace(surplus, unknown);
            worker.engine().set(&stats, unknown.min(before));
        }
    }
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
        setup: Setup,
        chance: Chance,
    ) -> anyhow::Result<Self> {
        let flags = ["--policy", row.name].into_iter().map(str::to_owned).chain(flags.iter().cloned());
        let settings = Config::from_flags(flags).context("the flags for the proxy")?.routing;
        let mut spray = Chance::new(chance.clone().bits());
        let (mut proxies, mut members) = (Vec::new(), Vec::new());
        for at in 0..setup.proxies {
            let (journal, events) = match setup.sharing {
                Sharing::IntervalMs(interval_ms) => Journal::open(JOURNAL_EVENTS, interval_ms),
                Sharing::Isolated | Sharing::Alone => (Journal::default(), crossbeam_channel::never()),
            };
            journal.set_alone(setup.sharing == Sharing::Alone);
            let shared = Shared::with_journal(settings.clone(), workers, journal);
            let urls: Result<Vec<_>, _> = (0..workers).map(|at| format!("http://w{at}:1").parse()).collect();
            let handle = Registry::new(urls?, ModelSettings::default()).handle();
            let fleet = handle.load_full();
            let stats = stats(told, None);
            for worker in &fleet.workers {
                worker.set_health(Health::Up);
                worker.engine().set(&stats, 0);
            }
            proxies.push(Proxy {
                policy: (row.build)(&shared),
                fleet,
                chance: if at == 0 { chance.clone() } else { Chance::new(spray.bits()) },
                surplus: vec![0; workers],
                scrape: if at == 0 { f64::INFINITY } else { spray.between(0.0, SCRAPE_S) },
            });
            members.push(Member { shared, events, fleet: handle });
        }
        let exchange = match setup.sharing {
            Sharing::IntervalMs(interval_ms) => Some(Exchange::new(interval_ms, members, &mut spray)),
            Sharing::Isolated | Sharing::Alone => None,
        };
        Ok(Self {
            workload,
            proxies,
            exchange,
            told,
            serving: (0..workers).collect(),
            scratch: Vec::new(),
            in_flight: workload.requests.iter().map(|_| None).collect(),
            spray,
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
        let at = if self.proxies.len() > 1 { self.spray.below(self.proxies.len()) } else { 0 };
        let Proxy { policy, fleet, chance, .. } = &mut self.proxies[at];
        let candidates =
            Candidates::of(fleet, &self.serving, &Tried::none(), &Terms::default(), &mut self.scratch);
        let input = RouteInput {
            random: chance.bits(),
            now: (now * 1000.0) as u64,
            session: Some(hash(data.session)),
            prompt: &data.index,
        };
        let Some(selection) = policy.choose(&input, &candidates) else { return 0 };
        let worker = fleet.workers[selection.position].clone();
        self.in_flight[request as usize] = Some((at, InFlight::begin(worker, selection.demand)));
        selection.position
    }

    fn first_token(&mut self, request: u32) {
        if let Some((_, guard)) = &mut self.in_flight[request as usize] {
            guard.first_token();
        }
    }

    fn ended(&mut self, request: u32, cached: u32) {
        let data = &self.workload.requests[request as usize];
        let Some((at, guard)) = self.in_flight[request as usize].take() else { return };
        let usage = Usage {
            prompt_tokens: Some(u64::from(data.prompt)),
            cached_tokens: self.told.cached.then_some(u64::from(cached)),
            completion_tokens: Some(u64::from(data.output)),
        };
        self.proxies[at].policy.ended(&Outcome {
            worker: guard.worker(),
            prompt: &data.index,
            demand: guard.demand(),
            usage: Some(usage),
        });
    }

    fn scraped(&mut self, engines: &[Engine<'_>]) {
        let told = self.told;
        let with_all = self.proxies.iter_mut().filter(|proxy| proxy.scrape.is_infinite());
        with_all.for_each(|proxy| proxy.scraped(told, engines));
    }

    fn due(&self) -> f64 {
        let scrape = self.proxies.iter().map(|proxy| proxy.scrape).fold(f64::INFINITY, f64::min);
        self.exchange.as_ref().map_or(scrape, |exchange| scrape.min(exchange.due() as f64 / 1000.0))
    }

    fn go_on(&mut self, now: f64, engines: &[Engine<'_>]) {
        for proxy in self.proxies.iter_mut().filter(|proxy| proxy.scrape <= now) {
            proxy.scraped(self.told, engines);
            proxy.scrape += SCRAPE_S;
        }
        if let Some(exchange) = &mut self.exchange {
            // a beat is a whole number, and must not be rounded to before itself
            exchange.go_on((now * 1000.0).round() as u64);
        }
    }

    fn traffic(&self) -> Traffic {
        self.exchange.as_ref().map_or_else(Traffic::default, Exchange::traffic)
    }

    fn cache_lost(&mut self, worker: usize) {
        for proxy in &self.proxies {
            proxy.fleet.workers[worker].cache_lost();
        }
    }
}
