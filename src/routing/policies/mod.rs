//! The policies: a file each, and a row of [`POLICIES`].

mod least_requests;

use crate::routing::Candidates;

/// What a policy knows of a request.
#[derive(Debug, Clone, Copy)]
pub struct RouteInput {
    /// Chance: any 64 bits.
    pub random: u64,
}

/// The choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Position in [`crate::workers::Fleet::workers`].
    pub position: usize,
}

/// A way to choose a worker. Belongs to one shard; what shards share is given to it.
pub trait Policy {
    /// Chooses one of `candidates`; `None` only if there are none.
    fn choose(&mut self, input: &RouteInput, candidates: &Candidates<'_>) -> Option<Selection>;
}

/// A row of the table of policies.
pub struct Definition {
    /// As it is set and shown.
    pub name: &'static str,
    /// One line for help and README.
    pub summary: &'static str,
    /// Makes one for a shard.
    pub build: fn() -> Box<dyn Policy>,
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
    use std::sync::Arc;

    fn fleet(count: usize) -> Arc<Fleet> {
        let urls = (0..count).map(|n| format!("http://w{n}:1").parse().unwrap());
        let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
        for worker in &fleet.workers {
            worker.set_health(Health::Up);
        }
        fleet
    }

    fn choose(policy: &mut dyn Policy, fleet: &Fleet, random: u64) -> Option<usize> {
        let serving: Vec<usize> = (0..fleet.workers.len()).collect();
        let mut scratch = Vec::new();
        let candidates = Candidates::of(fleet, &serving, &Tried::none(), &mut scratch);
        policy.choose(&RouteInput { random }, &candidates).map(|selection| selection.position)
    }

    #[test]
    fn every_policy_chooses_nobody_from_an_empty_fleet() {
        for row in POLICIES {
            assert_eq!(choose(&mut *(row.build)(), &fleet(0), 7), None, "{}", row.name);
        }
    }

    #[test]
    fn every_policy_chooses_the_only_worker() {
        for row in POLICIES {
            assert_eq!(choose(&mut *(row.build)(), &fleet(1), 7), Some(0), "{}", row.name);
        }
    }

    #[test]
    fn every_policy_leaves_out_a_worker_that_is_down() {
        for row in POLICIES {
            let fleet = fleet(3);
            let mut policy = (row.build)();
            fleet.workers[1].set_health(Health::Down);
            for random in 0..100 {
                assert_ne!(choose(&mut *policy, &fleet, random), Some(1), "{}", row.name);
            }
        }
    }

    #[test]
    fn every_policy_is_fair_to_idle_workers() {
        for row in POLICIES {
            let (fleet, mut policy) = (fleet(3), (row.build)());
            let mut counts = [0; 3];
            for random in 0..300 {
                counts[choose(&mut *policy, &fleet, random).unwrap()] += 1;
            }
            assert!(counts.iter().all(|&count| count >= 60), "{}: {counts:?}", row.name);
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = POLICIES.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), POLICIES.len());
    }
}
