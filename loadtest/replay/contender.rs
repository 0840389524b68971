//! Whom a run can be made with, by name: policies of the crate, the oracles and the reference.

use vllm_proxy::routing::{Definition, POLICIES};

use crate::{
    chance::Chance,
    chooser::{Chooser, InTurn, Mirror, Oracle, Random, Reference},
    fleet::{Driven, Told},
    proxies::Setup,
    workload::Workload,
};

/// The weights of the oracles that policies are compared with: the best of them, per scenario, is the goal.
pub(crate) const ORACLES: [f64; 3] = [1.0, 1.5, 3.0];
/// The weight of the oracle that decides what a load of 100 % is.
pub(crate) const FULL_LOAD_ORACLE: f64 = 2.0;
/// Highest weight of a miss in the reference.
const MISS_WEIGHT_MAX: f64 = 5.0;

/// One who chooses.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Contender {
    /// A policy of the crate.
    Policy(&'static Definition),
    /// All-knowing, with this weight of a request's own prefill.
    Oracle(f64),
    /// `cache_aware` in its plainest form.
    Reference(Mirror),
    /// Stand-ins for what the crate does not offer.
    Random,
    InTurn,
}

impl Contender {
    /// The one that is called so.
    pub(crate) fn named(name: &str) -> Option<Self> {
        if let Some(row) = POLICIES.iter().find(|row| row.name == name || row.aliases.contains(&name)) {
            return Some(Self::Policy(row));
        }
        match name {
            "reference" => Some(Self::Reference(Mirror::Sent)),
            "reference_pinned" => Some(Self::Reference(Mirror::Pinned)),
            "random" => Some(Self::Random),
            "round_robin" => Some(Self::InTurn),
            _ => name.strip_prefix("oracle_")?.parse().ok().map(Self::Oracle),
        }
    }

    /// Everybody: the crate's policies first, the oracles last.
    pub(crate) fn all() -> Vec<Self> {
        let policies = POLICIES.iter().map(Self::Policy);
        let missing =
            ["random", "round_robin"].into_iter().filter(|name| POLICIES.iter().all(|row| row.name != *name));
        let mut all: Vec<Self> = missing.filter_map(Self::named).chain(policies).collect();
        all.extend([Mirror::Sent, Mirror::Pinned].map(Self::Reference));
        all.extend(ORACLES.map(Self::Oracle));
        all
    }

    /// How it is called.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Policy(row) => row.name.to_owned(),
            Self::Oracle(weight) => format!("oracle_{weight}"),
            Self::Reference(Mirror::Sent) => "reference".to_owned(),
            Self::Reference(Mirror::Pinned) => "reference_pinned".to_owned(),
            Self::Random => "random".to_owned(),
            Self::InTurn => "round_robin".to_owned(),
        }
    }

    /// Whether it is one of the oracles that the others are compared with.
    pub(crate) fn is_measure(&self) -> bool {
        matches!(self, Self::Oracle(weight) if ORACLES.contains(weight))
    }

    /// Whether it needs engines that can be asked for quotes.
    pub(crate) fn foresight(&self) -> bool {
        matches!(self, Self::Oracle(_))
    }

    /// Whether what it is told of the workers changes what it does: for the others a scenario of wrong knowledge
    /// is the plain one.
    pub(crate) fn learns(&self) -> bool {
        match self {
            Self::Policy(row) => row.needs.prompt,
            Self::Reference(_) => true,
            _ => false,
        }
    }

    /// Makes one for a run. Who is no policy of the crate is one, whatever the `setup`.
    ///
    /// # Errors
    /// The proxy refuses `flags`.
    pub(crate) fn build<'a>(
        &self,
        flags: &[String],
        workload: &'a Workload,
        workers: usize,
        told: Told,
        setup: Setup,
        seed: u64,
    ) -> anyhow::Result<Box<dyn Chooser + 'a>> {
        let chance = Chance::new(seed ^ 0x5eed);
        Ok(match self {
            Self::Policy(row) => Box::new(Driven::new(row, flags, workload, workers, told, setup, chance)?),
            Self::Oracle(weight) => Box::new(Oracle { weight: *weight, chance }),
            Self::Reference(mirror) => Box::new(Reference::new(
                workload,
                workers,
                told.cache_tokens,
                MISS_WEIGHT_MAX,
                *mirror,
                chance,
            )),
            Self::Random => Box::new(Random(chance)),
            Self::InTurn => Box::new(InTurn::default()),
        })
    }
}
