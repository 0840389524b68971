//! The policies: a file each, and a row of [`POLICIES`].

mod least_requests;

use std::sync::Arc;

use crate::{
    base::Millis,
    routing::{Candidates, Prompt, Settings},
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

    /// Takes in what became of a choice. Not called for every request: an answer may not tell.
    fn ended(&mut self, outcome: &Outcome<'_>) {
        let _ = outcome;
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
pub static POLICIES: &[Definition] = &[least_requests::DEFINITION];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        routing::Tried,
        workers::{Fleet, Health, ModelSettings, Registry},
    };

    fn fleet(count: usize) -> Arc<Fleet> {
        let urls = (0..count).map(|n| format!("http://w{n}:1").parse().unwrap());
        let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
        for worker in &fleet.workers {
            worker.set_health(Health::Up);
        }
        fleet
    }

    fn build(row: &Definition) -> Box<dyn Policy> {
        (row.build)(&Shared { settings: Arc::new(Settings::of_flags(&[])) })
    }

    fn choose(policy: &mut dyn Policy, fleet: &Fleet, random: u64) -> Option<usize> {
        let serving: Vec<usize> = (0..fleet.workers.len()).collect();
        let mut scratch = Vec::new();
        let candidates = Candidates::of(fleet, &serving, &Tried::none(), &mut scratch);
        let prompt = Prompt::default();
        let input = RouteInput { random, now: 0, session: None, prompt: &prompt };
        policy.choose(&input, &candidates).map(|selection| selection.position)
    }

    #[test]
    fn every_policy_chooses_nobody_from_an_empty_fleet() {
        for row in POLICIES {
            assert_eq!(choose(&mut *build(row), &fleet(0), 7), None, "{}", row.name);
        }
    }

    #[test]
    fn every_policy_chooses_the_only_worker() {
        for row in POLICIES {
            assert_eq!(choose(&mut *build(row), &fleet(1), 7), Some(0), "{}", row.name);
        }
    }

    #[test]
    fn every_policy_leaves_out_a_worker_that_is_down() {
        for row in POLICIES {
            let fleet = fleet(3);
            let mut policy = build(row);
            fleet.workers[1].set_health(Health::Down);
            for random in 0..100 {
                assert_ne!(choose(&mut *policy, &fleet, random), Some(1), "{}", row.name);
            }
        }
    }

    #[test]
    fn every_policy_is_fair_to_idle_workers() {
        for row in POLICIES {
            let (fleet, mut policy) = (fleet(3), build(row));
            let mut counts = [0; 3];
            for random in 0..300 {
                counts[choose(&mut *policy, &fleet, random).unwrap()] += 1;
            }
            assert!(counts.iter().all(|&count| count >= 60), "{}: {counts:?}", row.name);
        }
    }

    #[test]
    fn names_are_unique() {
        let all = || POLICIES.iter().flat_map(|row| row.aliases.iter().chain([&row.name]));
        let mut names: Vec<&str> = all().copied().collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all().count());
    }

    #[test]
    fn every_policy_can_be_counted() {
        assert!(POLICIES.len() <= crate::workers::MAX_POLICIES);
    }
}
