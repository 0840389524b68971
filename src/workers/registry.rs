//! The mutable truth of which workers exist and what they serve. Owned by the control thread.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64},
};

use crate::workers::{BreakerRules, Fleet, FleetHandle, Model, Worker, WorkerSpec};

/// What the operator said about model names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelSettings {
    /// Alias to model: clients may use the alias, workers are sent the model's name.
    pub aliases: Vec<(String, String)>,
    /// What a request without a model means; `None`: the only model there is.
    pub default_model: Option<String>,
}

/// What was learnt of a worker's models.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Learnt {
    /// It has not been reached yet.
    #[default]
    Nothing,
    /// It answers, but does not tell its models (401, 404 …): it may have any.
    Open,
    /// Names of its models, and for each whether it is a base model (not an adapter).
    Models(Vec<(String, bool)>),
}

/// Workers, their models and the bodies made of them; publishes a [`Fleet`] after every change.
#[derive(Debug)]
pub struct Registry {
    settings: ModelSettings,
    /// In order of configuration.
    entries: Vec<(Arc<Worker>, Learnt)>,
    models_json: Vec<u8>,
    version_json: Vec<u8>,
    newcomer_at: Arc<AtomicU64>,
    handle: FleetHandle,
}

impl Registry {
    /// A registry of these workers, in that order; of each nothing is known yet. The ranks of a server follow
    /// each other.
    pub fn new(specs: impl IntoIterator<Item = WorkerSpec>, settings: ModelSettings) -> Self {
        Self::with_breakers(specs, settings, BreakerRules::default())
    }

    /// As [`Registry::new`], with breakers of these rules.
    pub fn with_breakers(
        specs: impl IntoIterator<Item = WorkerSpec>,
        settings: ModelSettings,
        rules: BreakerRules,
    ) -> Self {
        let mut entries: Vec<(Arc<Worker>, Learnt)> = Vec::new();
        for (id, spec) in specs.into_iter().enumerate() {
            let sibling = entries.last().filter(|(last, _)| spec.rank.is_some() && *last.url() == spec.url);
            let worker = match sibling {
                Some((last, _)) => last.sibling(id, spec),
                None => Worker::with_breaker(id, spec, rules),
            };
            entries.push((Arc::new(worker), Learnt::Nothing));
        }
        let mut registry = Self {
            settings,
            entries,
            models_json: Vec::new(),
            version_json: Vec::new(),
            newcomer_at: Arc::default(),
            handle: FleetHandle::default(),
        };
        registry.publish();
        registry
    }

    /// Where shards read the fleet.
    pub fn handle(&self) -> FleetHandle {
        self.handle.clone()
    }

    /// The workers, in order of configuration.
    pub fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.entries.iter().map(|(worker, _)| worker)
    }

    /// Takes over what was learnt of the worker at `position`, for all ranks of its server. Nothing is published
    /// before [`Registry::publish`].
    pub fn learnt(&mut self, position: usize, learnt: Learnt) {
        let Some((asked, _)) = self.entries.get(position) else { return };
        let asked = asked.clone();
        for (worker, known) in &mut self.entries {
            if worker.shares_server(&asked) {
                *known = learnt.clone();
            }
        }
    }

    /// The bodies of `GET /v1/models` and `GET /version`, made of the workers' own.
    pub fn set_bodies(&mut self, models_json: Vec<u8>, version_json: Vec<u8>) {
        self.models_json = models_json;
        self.version_json = version_json;
    }

    /// Makes a fleet of the present state and hands it to everybody.
    pub fn publish(&mut self) {
        self.handle.store(Arc::new(self.fleet()));
    }

    fn fleet(&self) -> Fleet {
        let mut models: Vec<Model> = Vec::new();
        let mut by_name: HashMap<String, usize> = HashMap::new();
        for (_, learnt) in &self.entries {
            let Learnt::Models(names) = learnt else { continue };
            for (name, base) in names {
                let at = *by_name.entry(name.clone()).or_insert_with(|| {
                    models.push(Model { name: name.clone(), workers: Vec::new(), base: *base });
                    models.len() - 1
                });
                models[at].base |= base;
            }
        }
        for model in &mut models {
            model.workers = positions(&self.entries, |learnt| match learnt {
                Learnt::Nothing => false,
                Learnt::Open => true,
                Learnt::Models(names) => names.iter().any(|(name, _)| *name == model.name),
            });
        }
        let default_model = match &self.settings.default_model {
            Some(name) => by_name.get(name).copied(),
            None => only_base(&models),
        };
        let mut fleet = Fleet {
            others: Vec::new(),
            workers: self.workers().cloned().collect(),
            all: (0..self.entries.len()).collect(),
            open: positions(&self.entries, |learnt| *learnt == Learnt::Open),
            models,
            by_name,
            aliases: self.settings.aliases.iter().cloned().collect(),
            default_name: self.settings.default_model.clone().unwrap_or_default(),
            default_model,
            models_json: self.models_json.clone(),
            version_json: self.version_json.clone(),
            newcomer_at: self.newcomer_at.clone(),
        };
        fleet.others = fleet.all.iter().copied().filter(|at| !fleet.front().contains(at)).collect();
        fleet
    }
}

fn positions(entries: &[(Arc<Worker>, Learnt)], keep: impl Fn(&Learnt) -> bool) -> Vec<usize> {
    entries.iter().enumerate().filter(|(_, (_, learnt))| keep(learnt)).map(|(at, _)| at).collect()
}

/// The one base model that every worker with base models has first, or `None` where they differ: adapters and
/// further served names do not make a fleet ambiguous.
fn only_base(models: &[Model]) -> Option<usize> {
    let first = models.iter().position(|model| model.base)?;
    let same = models.iter().filter(|model| model.base).all(|model| model.workers == models[first].workers);
    same.then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::{Health, Resolved, Rest, Standing};

    fn registry(settings: ModelSettings) -> Registry {
        Registry::new(["http://a:1", "http://b:1"].map(|url| url.parse().unwrap()), settings)
    }

    fn models(names: &[&str]) -> Learnt {
        Learnt::Models(names.iter().map(|name| ((*name).to_owned(), !name.starts_with("lora"))).collect())
    }

    fn workers<'a>(resolved: &Resolved<'a>) -> &'a [usize] {
        match resolved {
            Resolved::Workers { workers, .. } => workers,
            Resolved::Unknown => &[],
        }
    }

    #[test]
    fn a_request_goes_to_those_who_have_its_model() {
        let mut registry = registry(ModelSettings::default());
        registry.learnt(0, models(&["m", "lora-x"]));
        registry.learnt(1, models(&["n"]));
        registry.publish();
        let fleet = registry.handle().load_full();
        assert_eq!(workers(&fleet.resolve(Some("m"))), [0]);
        assert_eq!(workers(&fleet.resolve(Some("lora-x"))), [0]);
        assert_eq!(workers(&fleet.resolve(Some("n"))), [1]);
        assert_eq!(fleet.resolve(Some("o")), Resolved::Unknown);
        assert_eq!(fleet.resolve(None), Resolved::Unknown, "two models and no default");
        assert!(fleet.model_matters());
        assert_eq!(fleet.valid_names().collect::<Vec<_>>(), ["m", "n"]);
    }

    #[test]
    fn u22_a_fleet_says_whether_it_can_serve_and_why_not() {
        let none: [WorkerSpec; 0] = [];
        let empty = Registry::new(none, ModelSettings::default()).handle().load_full();
        assert_eq!(empty.standing(0), Standing::NoWorkers);
        let fleet = registry(ModelSettings::default()).handle().load_full();
        let [a, b] = [0, 1].map(|at| &fleet.workers[at]);
        assert_eq!(fleet.standing(0), Standing::NoneUp);
        a.came_up(0);
        b.set_health(Health::Down);
        assert_eq!(fleet.standing(0), Standing::Serves);
        a.set_rest(Rest::Paused, true);
        assert_eq!(fleet.standing(0), Standing::AllRest);
        b.came_up(0);
        while b.breaker().admits(0) {
            b.breaker().failed(0);
        }
        assert_eq!(fleet.standing(0), Standing::BreakersOpen);
        assert_eq!(fleet.standing(60_000), Standing::Serves, "its open time is over");
        a.set_rest(Rest::Paused, false);
        a.set_health(Health::Ejected);
        assert_eq!(fleet.standing(0), Standing::Serves, "it is used where nobody better is left");
    }

    #[test]
    fn what_one_rank_serves_all_ranks_of_its_server_serve() {
        let specs: Vec<WorkerSpec> = ["http://a:1", "http://b:1"]
            .iter()
            .flat_map(|url| url.parse::<WorkerSpec>().unwrap().ranks(2))
            .collect();
        let mut registry = Registry::new(specs, ModelSettings::default());
        registry.learnt(0, models(&["m"]));
        registry.learnt(2, models(&["n"]));
        registry.publish();
        let fleet = registry.handle().load_full();
        assert_eq!(workers(&fleet.resolve(Some("m"))), [0, 1]);
        assert_eq!(workers(&fleet.resolve(Some("n"))), [2, 3]);
        let names: Vec<&str> = fleet.workers.iter().map(|worker| worker.name()).collect();
        assert_eq!(names, ["http://a:1@0", "http://a:1@1", "http://b:1@0", "http://b:1@1"]);
        fleet.workers[1].set_health(crate::workers::Health::Up);
        let usable: Vec<bool> = fleet.workers.iter().map(|worker| worker.usable()).collect();
        assert_eq!(usable, [true, true, false, false]);
    }

    #[test]
    fn what_names_no_model_goes_to_one_kind_of_worker() {
        let mut registry = registry(ModelSettings::default());
        registry.learnt(0, models(&["chat"]));
        registry.learnt(1, models(&["embed"]));
        registry.publish();
        assert_eq!(workers(&registry.handle().load().any()), [0], "the first model's");
        assert_eq!(registry.handle().load().others(), [1]);
        registry.settings.default_model = Some("embed".into());
        registry.publish();
        assert_eq!(workers(&registry.handle().load().any()), [1], "the default model's");
    }

    #[test]
    fn one_model_everywhere_is_the_default_and_needs_no_body() {
        let mut registry = registry(ModelSettings::default());
        registry.learnt(0, models(&["m"]));
        registry.learnt(1, models(&["m"]));
        registry.publish();
        let fleet = registry.handle().load_full();
        assert_eq!(workers(&fleet.resolve(None)), [0, 1]);
        assert_eq!(workers(&fleet.resolve(Some(""))), [0, 1]);
        assert!(!fleet.model_matters());
    }

    #[test]
    fn two_served_names_of_one_model_are_no_choice() {
        let mut registry = registry(ModelSettings::default());
        registry.learnt(0, models(&["m", "m-alias"]));
        registry.learnt(1, models(&["m", "m-alias"]));
        registry.publish();
        let fleet = registry.handle().load_full();
        assert_eq!(workers(&fleet.resolve(None)), [0, 1]);
        assert!(!fleet.model_matters(), "every worker has both");
    }

    #[test]
    fn an_adapter_as_the_default_must_be_named_to_the_worker() {
        let default_model = Some("lora-x".to_owned());
        let mut registry = registry(ModelSettings { aliases: vec![], default_model });
        registry.learnt(0, models(&["m", "lora-x"]));
        registry.learnt(1, models(&["m", "lora-x"]));
        registry.publish();
        let fleet = registry.handle().load_full();
        let resolved = fleet.resolve(None);
        let rename = Some("lora-x");
        assert_eq!(resolved, Resolved::Workers { workers: &[0, 1], model: rename, rename });
        assert!(fleet.model_matters());
    }

    #[test]
    fn an_alias_leads_to_its_model_and_is_renamed() {
        let mut registry =
            registry(ModelSettings { aliases: vec![("gpt-4".into(), "m".into())], default_model: None });
        registry.learnt(0, models(&["m"]));
        registry.learnt(1, models(&["m"]));
        registry.publish();
        let fleet = registry.handle().load_full();
        let resolved = fleet.resolve(Some("gpt-4"));
        assert_eq!(resolved, Resolved::Workers { workers: &[0, 1], model: Some("m"), rename: Some("m") });
        assert!(fleet.model_matters());
    }

    #[test]
    fn who_does_not_tell_its_models_may_have_any() {
        let mut registry = registry(ModelSettings::default());
        registry.learnt(0, models(&["m"]));
        registry.learnt(1, Learnt::Open);
        registry.publish();
        let fleet = registry.handle().load_full();
        assert_eq!(workers(&fleet.resolve(Some("m"))), [0, 1]);
        assert_eq!(workers(&fleet.resolve(Some("other"))), [1]);
        assert_eq!(fleet.models_json(), None);
    }

    #[test]
    fn while_nothing_is_known_no_model_is_called_unknown() {
        let fleet = registry(ModelSettings::default()).handle().load_full();
        assert_eq!(workers(&fleet.resolve(Some("m"))), [0, 1]);
        assert_eq!(fleet.standing(0), crate::workers::Standing::NoneUp);
    }
}
