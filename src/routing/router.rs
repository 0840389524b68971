//! The policies of one shard: the default, and one for each model that has its own.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    routing::{
        Candidates, Needs, Outcome, Policy, PolicyName, Prompt, RouteInput, Score, Selection, SessionKeys,
        Shared, TokenRates,
    },
    vllm::{Facts, Ranges},
};

/// Tokens that a prompt is taken for at most of which only the length is known. What is longer than the context of
/// nearly all models is mostly images, and would keep everybody else away from its worker for nothing.
const UNREAD_TOKENS: u64 = 128 * 1024;

/// Asks the policy that is set for a model. Belongs to one shard.
pub struct Router {
    default: Chooser,
    /// By the model's own name. Two models with a policy of the same name have nothing in common.
    of_models: HashMap<String, Chooser>,
    needs: Needs,
    sessions: SessionKeys,
    rates: Arc<TokenRates>,
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
            sessions: SessionKeys::new(settings),
            rates: shared.rates.clone(),
        }
    }

    /// What one or the other of the policies has to know of a request.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// The session that a request names.
    pub fn session<'a>(
        &self,
        header: impl Fn(&str) -> Option<&'a [u8]>,
        body: Option<(&[u8], &Ranges)>,
    ) -> Option<u64> {
        self.sessions.of(header, body)
    }

    /// The prompt in a body.
    pub fn prompt(&self, body: &[u8], facts: &Facts, model: Option<&str>) -> Prompt {
        let (mut prompt, model) = (Prompt::default(), model.unwrap_or_default());
        prompt.read(body, facts, model, self.rates.get(model));
        prompt
    }

    /// A prompt of which only the length is known, in bytes: it has a size, up to a long context, and nothing
    /// that could be found again.
    pub fn prompt_of_length(&self, bytes: u64, model: Option<&str>) -> Prompt {
        let rate = self.rates.get(model.unwrap_or_default());
        let bytes = (bytes as f64).min(UNREAD_TOKENS as f64 * rate);
        Prompt::new(Vec::new(), bytes as u64, (bytes / rate) as u64)
    }

    /// Chooses one of `candidates` for a request to `model` (its own name, not an alias; `None`: to none in
    /// particular), and counts the choice on the worker. `None` only if there is no candidate.
    pub fn choose(
        &mut self,
        model: Option<&str>,
        input: &RouteInput<'_>,
        candidates: &Candidates<'_>,
    ) -> Option<Selection> {
        let chooser = self.of(model);
        let selection = chooser.policy.choose(input, candidates)?;
        let (_, worker) = candidates.iter().find(|(position, _)| *position == selection.position)?;
        let (counters, demand) = (worker.counters(), selection.demand);
        if let Some(count) = counters.selections.get(chooser.position) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if demand.prompt_tokens > 0 {
            counters.prompt_tokens.fetch_add(demand.prompt_tokens, Ordering::Relaxed);
            counters.predicted_cached_tokens.fetch_add(demand.cached_tokens(), Ordering::Relaxed);
        }
        tracing::debug!(
            worker = worker.name(),
            model,
            policy = chooser.name.0.name,
            prompt_tokens = demand.prompt_tokens,
            cached_tokens = demand.cached_tokens(),
            scores = %Scores(chooser.policy.scores(), candidates),
            "chose a worker"
        );
        Some(selection)
    }

    /// Tells the policy of `model` what became of its choice, and learns from what the worker reported.
    pub fn ended(&mut self, model: Option<&str>, outcome: &Outcome<'_>) {
        let usage = outcome.usage.unwrap_or_default();
        if let (Some(tokens), Some(bytes)) = (usage.prompt_tokens, outcome.prompt.rated_bytes()) {
            self.rates.learn(model.unwrap_or_default(), bytes, tokens);
        }
        if let (Some(tokens), Some(cached)) = (usage.prompt_tokens, usage.cached_tokens) {
            let counters = outcome.worker.counters();
            counters.reported_prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
            counters.reported_cached_tokens.fetch_add(cached.min(tokens), Ordering::Relaxed);
        }
        self.of(model).policy.ended(outcome);
    }

    fn of(&mut self, model: Option<&str>) -> &mut Chooser {
        // most fleets have one policy for all: then no name is hashed
        let model = model.filter(|_| !self.of_models.is_empty());
        model.and_then(|model| self.of_models.get_mut(model)).unwrap_or(&mut self.default)
    }
}

/// What the candidates of a choice were worth, as it is logged.
struct Scores<'a>(&'a [Score], &'a Candidates<'a>);

impl fmt::Display for Scores<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, Score { position, cost }) in self.0.iter().enumerate() {
            let worker = self.1.iter().find(|(candidate, _)| candidate == position);
            let name = worker.map_or("", |(_, worker)| worker.name());
            write!(f, "{}{name}={cost:.0}", if at == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::{
        POLICIES, Prompt, Settings,
        policies::tests::{among, fleet},
    };

    fn router(flags: &[&str]) -> Router {
        Router::new(&Shared::new(Settings::of_flags(flags), 4))
    }

    fn choose(router: &mut Router, model: Option<&str>, session: Option<u64>) -> (usize, &'static str) {
        let (fleet, mut scratch) = (fleet(4), Vec::new());
        let candidates = among(&fleet, &[0, 1, 2, 3], &mut scratch);
        let input = RouteInput { random: 3, now: 0, session, prompt: &Prompt::default() };
        let selection = router.choose(model, &input, &candidates).unwrap();
        let counts = &fleet.workers[selection.position].counters().selections;
        let policy = counts.iter().position(|count| count.load(Ordering::Relaxed) == 1).unwrap();
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
            router.choose(model, &input, &candidates).unwrap().position
        };
        let round: Vec<usize> = (0..4).map(|_| choose(Some("a"))).collect();
        for &position in &round {
            assert_eq!((choose(Some("b")), choose(None)), (position, position), "each begins its own round");
        }
    }

    #[test]
    fn a_body_that_is_not_read_counts_by_its_length_up_to_a_long_context() {
        let tokens = |bytes| router(&[]).prompt_of_length(bytes, Some("m")).tokens();
        assert_eq!([0, 4_000, 1 << 20, u64::MAX].map(tokens), [0, 1_000, UNREAD_TOKENS, UNREAD_TOKENS]);
    }

    #[test]
    fn nobody_is_chosen_where_nobody_is() {
        let (fleet, mut scratch) = (fleet(0), Vec::new());
        let candidates = among(&fleet, &[], &mut scratch);
        let input = RouteInput { random: 3, now: 0, session: None, prompt: &Prompt::default() };
        assert_eq!(router(&[]).choose(Some("m"), &input, &candidates), None);
    }
}
