//! The policies: a file each, and a row of [`POLICIES`].

mod cache_aware;
mod capacity;
mod chance;
mod consistent_hash;
mod least_requests;
mod power_of_two;
mod random;
mod round_robin;
mod turns;

use std::sync::Arc;

use crate::{
    base::Millis,
    routing::{CacheSizes, Candidates, Journal, Partings, PrefixIndex, Prompt, Settings, TokenRates},
    vllm::Usage,
    workers::{Demand, Worker},
};

/// What a policy knows of a request.
#[derive(Debug, Clone, Copy)]
pub struct RouteInput<'a> {
    /// Chance: any 64 bits.
    pub random: u64,
    /// The time of the choice.
    pub now: Millis,
    /// Hash of the session that the request belongs to; `None`: it names none, or the policy does not need it.
    pub session: Option<u64>,
    /// The prompt; empty where it is unknown or the policy does not need it.
    pub prompt: &'a Prompt,
}

/// The choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Position in [`crate::workers::Fleet::workers`].
    pub position: usize,
    /// What the request is expected to ask of that worker.
    pub demand: Demand,
}

impl Selection {
    /// A choice that says nothing of the prompt.
    pub fn of(position: usize) -> Self {
        Self { position, demand: Demand::default() }
    }
}

/// What a candidate was worth in a choice; the least is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Position in [`crate::workers::Fleet::workers`].
    pub position: usize,
    /// In a unit of the policy's own.
    pub cost: f64,
}

/// What became of a request, told to the policy that chose its worker.
#[derive(Debug, Clone, Copy)]
pub struct Outcome<'a> {
    /// The worker it ran on.
    pub worker: &'a Worker,
    /// The prompt that was chosen for.
    pub prompt: &'a Prompt,
    /// What was expected when it was chosen.
    pub demand: Demand,
    /// What the worker's answer says; `None`: the attempt could not even be sent, so the worker knows nothing of
    /// the prompt.
    pub usage: Option<Usage>,
}

/// A way to choose a worker. Belongs to one shard; what shards share is given to it when it is built. Pure: time
/// and chance are in the [`RouteInput`].
pub trait Policy {
    /// Chooses one of `candidates`; `None` only if there are none.
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection>;

    /// Takes in what became of a choice. Called once for each, however it ended.
    fn ended(&mut self, _outcome: &Outcome<'_>) {}

    /// What the candidates of the last choice were worth, for the log; empty where a policy does not weigh them.
    fn scores(&self) -> &[Score] {
        &[]
    }
}

/// What a policy has to know of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Its prompt.
    pub prompt: bool,
    /// Its session.
    pub session: bool,
}

/// What policies are built of: the same for all shards.
#[derive(Debug, Clone)]
pub struct Shared {
    /// What the operator set.
    pub settings: Arc<Settings>,
    /// Which prompts workers hold in their prefix caches.
    pub index: Arc<PrefixIndex>,
    /// How much of prompts workers hold.
    pub sizes: Arc<CacheSizes>,
    /// How many bytes a token has.
    pub rates: Arc<TokenRates>,
    /// Where in a chunk prompts part.
    pub partings: Arc<Partings>,
    /// What other proxies are told.
    pub journal: Arc<Journal>,
}

impl Shared {
    /// For shards that serve before `workers` workers.
    pub fn new(settings: Settings, workers: usize) -> Self {
        Self::with_journal(settings, workers, Journal::default())
    }

    /// As [`Shared::new`], where other proxies are told by this journal.
    pub fn with_journal(settings: Settings, workers: usize, journal: Journal) -> Self {
        let wanted = settings.needs().prompt;
        let bytes = if wanted { settings.prefix_index_bytes } else { 0 };
        Self {
            index: Arc::new(PrefixIndex::new(usize::try_from(bytes).unwrap_or(usize::MAX), workers)),
            sizes: Arc::new(CacheSizes::new(settings.worker_cache_tokens, workers)),
            rates: Arc::new(TokenRates::default()),
            partings: Arc::new(Partings::default()),
            journal: Arc::new(journal),
            settings: Arc::new(settings),
        }
    }
}

/// A row of the table of policies.
pub struct Definition {
    /// As it is set and shown.
    pub name: &'static str,
    /// Other names that it may be set by: those of other routers.
    pub aliases: &'static [&'static str],
    /// One line for help and README.
    pub summary: &'static str,
    /// What it has to know of a request.
    pub needs: Needs,
    /// Makes one for a shard.
    pub build: fn(&Shared) -> Box<dyn Policy>,
}

impl std::fmt::Debug for Definition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Every policy there is.
pub static POLICIES: &[Definition] = &[
    cache_aware::DEFINITION,
    least_requests::DEFINITION,
    round_robin::DEFINITION,
    random::DEFINITION,
    power_of_two::DEFINITION,
    capacity::DEFINITION,
    consistent_hash::DEFINITION,
];

/// Requests in flight on a worker with the one that is to come, times its cost.
fn burden(worker: &Worker) -> f64 {
    (f64::from(worker.load().in_flight) + 1.0) * worker.traits().cost
}

#[cfg(test)]
pub(in crate::routing) mod tests;
