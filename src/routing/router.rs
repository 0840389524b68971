//! The policies of one shard: the default, and one for each model that has its own.

use std::collections::HashMap;

use crate::routing::{Candidates, Needs, Outcome, Policy, PolicyName, RouteInput, Selection, Shared};

/// Asks the policy that is set for a model. Belongs to one shard.
pub struct Router {
    default: Chooser,
    /// By the model's own name. Two models with a policy of the same name have nothing in common.
    of_models: HashMap<String, Chooser>,
    needs: Needs,
}

struct Chooser {
    policy: Box<dyn Policy>,
    name: PolicyName,
    /// In [`POLICIES`](super::POLICIES).
    position: usize,
}

impl Chooser {
    fn new(name: PolicyName, shared: &Shared) -> Self {
        Self { policy: (name.0.build)(shared), name, position: name.position() }
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of_models = self.of_models.iter().map(|(model, chooser)| (model, chooser.name.0.name));
        f.debug_map().entry(&"", &self.default.name.0.name).entries(of_models).finish()
    }
}

impl Router {
    /// The policies that are set.
    pub fn new(shared: &Shared) -> Self {
        let settings = &shared.settings;
        let of_model = |of: &super::ModelPolicy| (of.model.clone(), Chooser::new(of.policy, shared));
        Self {
            default: Chooser::new(settings.policy, shared),
            of_models: settings.model_policy.iter().map(of_model).collect(),
            needs: settings.needs(),
        }
    }

    /// What one or the other of the policies has to know of a request.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// Chooses one of `candidates` for a request to `model` (its own name, not an alias; `None`: to none in
    /// particular); with the position in [`POLICIES`](super::POLICIES) of the policy that chose. `None` only if
    /// there is no candidate.
    pub fn choose(
        &mut self,
        model: Option<&str>,
        input: &RouteInput<'_>,
        candidates: &Candidates<'_>,
    ) -> Option<(Selection, usize)> {
        let chooser = self.of(model);
        let selection = chooser.policy.choose(input, candidates)?;
        Some((selection, chooser.position))
    }

    /// Tells the policy of `model` what became of its choice.
    pub fn ended(&mut self, model: Option<&str>, outcome: &Outcome<'_>) {
        self.of(model).policy.ended(outcome);
    }

    fn of(&mut self, model: Option<&str>) -> &mut Chooser {
        // most fleets have one policy for all: then no name is hashed
        let model = model.filter(|_| !self.of_models.is_empty());
        model.and_then(|model| self.of_models.get_mut(model)).unwrap_or(&mut self.default)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::routing::{
        POLICIES, Prompt, Settings,
        policies::tests::{among, fleet},
    };

    fn router(flags: &[&str]) -> Router {
        Router::new(&Shared { settings: Arc::new(Settings::of_flags(flags)) })
    }

    fn choose(router: &mut Router, model: Option<&str>, session: Option<u64>) -> (usize, &'static str) {
        let (fleet, mut scratch) = (fleet(4), Vec::new());
        let candidates = among(&fleet, &[0, 1, 2, 3], &mut scratch);
        let input = RouteInput { random: 3, now: 0, session, prompt: &Prompt::default() };
        let (selection, policy) = router.choose(model, &input, &candidates).unwrap();
        (selection.position, POLICIES[policy].name)
    }

    #[test]
    fn a_model_has_its_own_policy_and_all_others_the_default() {
        let mut router = router(&["--policy=random", "--model-policy=a=p2c,b=session"]);
        for (model, policy) in [
            (Some("a"), "power_of_two"),
            (Some("b"), "consistent_hash"),
            (Some("c"), "random"),
            (Some(""), "random"),
            (None, "random"),
        ] {
            assert_eq!(choose(&mut router, model, Some(1)).1, policy, "{model:?}");
        }
        assert_eq!(router.needs(), Needs { prompt: true, session: true });
    }

    #[test]
    fn models_with_the_same_policy_do_not_share_its_state() {
        let (fleet, mut scratch) = (fleet(4), Vec::new());
        let candidates = among(&fleet, &[0, 1, 2, 3], &mut scratch);
        let prompt = Prompt::default();
        let mut router = router(&["--policy=rr", "--model-policy", "a=rr", "b=rr"]);
        let mut choose = |model| {
            let input = RouteInput { random: 3, now: 0, session: None, prompt: &prompt };
            router.choose(model, &input, &candidates).unwrap().0.position
        };
        let round: Vec<usize> = (0..4).map(|_| choose(Some("a"))).collect();
        for &position in &round {
            assert_eq!((choose(Some("b")), choose(None)), (position, position), "each begins its own round");
        }
    }

    #[test]
    fn nobody_is_chosen_where_nobody_is() {
        let (fleet, mut scratch) = (fleet(0), Vec::new());
        let candidates = among(&fleet, &[], &mut scratch);
        let input = RouteInput { random: 3, now: 0, session: None, prompt: &Prompt::default() };
        assert_eq!(router(&[]).choose(Some("m"), &input, &candidates), None);
    }
}
