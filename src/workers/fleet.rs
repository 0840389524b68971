//! What shards know of the workers: an immutable copy of the registry.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;

use crate::base::Millis;
use crate::workers::Worker;

/// Models that are looked through one after the other.
const FEW_MODELS: usize = 8;

/// One model name that clients may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// The name as the workers list it.
    pub name: String,
    /// Positions in [`Fleet::workers`], ascending.
    pub workers: Vec<usize>,
    /// Whether it is a served name of a base model (not a LoRA adapter): only these stand in vLLM's
    /// "Valid aliases".
    pub base: bool,
}

/// Which workers a model name leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Resolved<'a> {
    /// These workers may serve it: positions in [`Fleet::workers`].
    Workers {
        /// Who has the model, usable or not.
        workers: &'a [usize],
        /// The model's name, for metrics; `None` where no single model is meant.
        model: Option<&'a str>,
        /// The name that the workers know, where it differs from the client's (an alias).
        rename: Option<&'a str>,
    },
    /// No worker has such a model.
    Unknown,
}

/// The workers and their models at one moment.
#[derive(Default)]
pub struct Fleet {
    /// Every worker, usable or not, in the order of configuration.
    pub workers: Vec<Arc<Worker>>,
    /// Positions of the workers that [`Fleet::any`] does not lead to: of other kinds, perhaps.
    pub(super) others: Vec<usize>,
    /// All positions of `workers`.
    pub(super) all: Vec<usize>,
    /// Workers whose model list could not be learnt (`/v1/models` refused): they may have any model.
    pub(super) open: Vec<usize>,
    /// Every model, in order of first appearance.
    pub(super) models: Vec<Model>,
    /// Position in `models` by name.
    pub(super) by_name: HashMap<String, usize>,
    /// Alias to the model that it means.
    pub(super) aliases: HashMap<String, String>,
    /// `--default-model`, served or not.
    pub(super) default_name: String,
    /// Position in `models` of what a request without a model means.
    pub(super) default_model: Option<usize>,
    /// Body of `GET /v1/models`; empty while nothing is known.
    pub(super) models_json: Vec<u8>,
    /// Body of `GET /version`; empty while nothing is known.
    pub(super) version_json: Vec<u8>,
    /// When a worker came up last beside others that had been up before, plus one; 0: never. Of all fleets of one
    /// registry.
    pub(super) newcomer_at: Arc<AtomicU64>,
}

/// Whether the fleet can serve, and why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// At least one worker can.
    Serves,
    /// There are no workers.
    NoWorkers,
    /// No worker is up.
    NoneUp,
    /// All that are up sleep or are paused.
    AllRest,
    /// All that are up and awake have open breakers.
    BreakersOpen,
}

impl Standing {
    /// In words, for `/readyz`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Serves => "",
            Self::NoWorkers => "there are no workers",
            Self::NoneUp => "no worker is up",
            Self::AllRest => "all workers that are up are asleep or paused",
            Self::BreakersOpen => "the breakers of all workers that are up are open",
        }
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet").field("workers", &self.workers).field("models", &self.models).finish()
    }
}

impl Fleet {
    /// Whether at least one worker can serve: what `/health` says.
    pub fn standing(&self, now: Millis) -> Standing {
        let mut standing = if self.workers.is_empty() { Standing::NoWorkers } else { Standing::NoneUp };
        for worker in self.workers.iter().filter(|worker| worker.answers()) {
            if worker.could_serve(now) {
                return Standing::Serves;
            }
            // an open breaker is nearest to serving
            standing = match standing {
                Standing::BreakersOpen => standing,
                _ if worker.rests() => Standing::AllRest,
                _ => Standing::BreakersOpen,
            };
        }
        standing
    }

    /// A worker came up beside others that had been up before: it is to be given less than they are for a while.
    pub fn newcomer(&self, now: Millis) {
        self.newcomer_at.store(now + 1, Ordering::Relaxed);
    }

    /// Whether a worker came up less than `within_ms` ago beside others.
    pub fn has_newcomers(&self, now: Millis, within_ms: u64) -> bool {
        let at = self.newcomer_at.load(Ordering::Relaxed);
        at > 0 && now < (at - 1).saturating_add(within_ms)
    }

    /// Whether there is more than one server: data-parallel ranks of one share what it stores.
    pub fn has_several_servers(&self) -> bool {
        match (self.workers.first(), self.workers.last()) {
            // the ranks of a server follow each other
            (Some(first), Some(last)) => !first.shares_server(last),
            _ => false,
        }
    }

    /// The models known, in order of first appearance.
    pub fn models(&self) -> &[Model] {
        &self.models
    }

    /// What a request that names no model asks for, as the operator named it; empty if he did not.
    pub fn default_name(&self) -> &str {
        &self.default_name
    }

    /// The names that vLLM's 404 lists: the base models, then the aliases of what is served.
    pub fn valid_names(&self) -> impl Iterator<Item = &str> {
        let base = self.models.iter().filter(|model| model.base).map(|model| model.name.as_str());
        let served = self.aliases.iter().filter(|(_, model)| self.by_name.contains_key(*model));
        let mut aliases: Vec<&str> = served.map(|(alias, _)| alias.as_str()).collect();
        aliases.sort_unstable();
        base.chain(aliases)
    }

    /// Body of `GET /v1/models`; `None` when a worker has to be asked instead.
    pub fn models_json(&self) -> Option<&[u8]> {
        (!self.models_json.is_empty() && self.open.is_empty()).then_some(&self.models_json[..])
    }

    /// Body of `GET /version`; `None` when a worker has to be asked instead.
    pub fn version_json(&self) -> Option<&[u8]> {
        (!self.version_json.is_empty()).then_some(&self.version_json[..])
    }

    /// Whether a request's model decides where it may go or what is sent, so that its body must be read first.
    /// Where every worker has every model it does not, and an unknown one is refused by a worker.
    pub fn model_matters(&self) -> bool {
        !self.aliases.is_empty()
            || self.models.iter().any(|model| model.workers.len() != self.workers.len())
            || self.default_model.is_some_and(|at| !self.models[at].base)
    }

    /// For what does not depend on a model, or whose model cannot be read: the workers of the default model,
    /// else of the first one. Workers of other kinds may lack the path (a chat server knows no embeddings): the
    /// answer must not depend on chance, and where these do not have it the [`Fleet::others`] are asked.
    pub fn any(&self) -> Resolved<'_> {
        Resolved::Workers { workers: self.front(), model: None, rename: None }
    }

    pub(super) fn front(&self) -> &[usize] {
        let front = self.default_model.or_else(|| self.models.iter().position(|model| model.base));
        front.map_or(&self.all, |at| &self.models[at].workers)
    }

    /// The workers that [`Fleet::any`] does not lead to. What they are asked for they may know although the
    /// others do not.
    pub fn others(&self) -> &[usize] {
        &self.others
    }

    /// Whether one of [`Fleet::others`] can be asked. One that is down, or was never reached, knows nothing: its
    /// refusal must not stand for the answer of those that are there.
    pub fn has_usable_others(&self) -> bool {
        self.others.iter().any(|&at| self.workers[at].answers())
    }

    /// Who serves `name`; `None` stands for a request that names no model (missing, `null` or `""`).
    pub fn resolve(&self, name: Option<&str>) -> Resolved<'_> {
        let name = name.filter(|name| !name.is_empty());
        let Some(name) = name else {
            return match self.default_model {
                // an adapter is nobody's default, so it must be named to the worker
                Some(at) => self.model(at, (!self.models[at].base).then_some(&*self.models[at].name)),
                None if self.models.is_empty() => self.any(),
                None => Resolved::Unknown,
            };
        };
        if let Some(at) = self.position(name) {
            return self.model(at, None);
        }
        if let Some(meant) = self.aliases.get(name) {
            return match self.position(meant) {
                Some(at) => self.model(at, Some(meant)),
                None => self.unlisted(Some(meant)),
            };
        }
        self.unlisted(None)
    }

    /// Where in `models` the model of this name is.
    fn position(&self, name: &str) -> Option<usize> {
        // to compare a few names is faster than to hash one
        if self.models.len() <= FEW_MODELS {
            return self.models.iter().position(|model| model.name == name);
        }
        self.by_name.get(name).copied()
    }

    fn model<'a>(&'a self, at: usize, rename: Option<&'a str>) -> Resolved<'a> {
        let model = &self.models[at];
        Resolved::Workers { workers: &model.workers, model: Some(&model.name), rename }
    }

    /// A name that no list contains: workers without a list may still have it; while nothing at all is known,
    /// everything may.
    fn unlisted<'a>(&'a self, rename: Option<&'a str>) -> Resolved<'a> {
        if self.models.is_empty() {
            Resolved::Workers { workers: &self.all, model: None, rename }
        } else if self.open.is_empty() {
            Resolved::Unknown
        } else {
            Resolved::Workers { workers: &self.open, model: None, rename }
        }
    }
}

/// The newest fleet, swapped whole.
pub type FleetHandle = Arc<ArcSwap<Fleet>>;
