//! What must hold of every policy, and what the tests of each are made with.

use super::*;
use crate::{
    routing::{PolicyName, Terms, Tried},
    workers::{EngineStats, Fleet, Health, InFlight, ModelSettings, Registry, Traits, WorkerSpec},
};

fn fleet_with(specs: impl IntoIterator<Item = WorkerSpec>) -> Arc<Fleet> {
    let fleet = Registry::new(specs, ModelSettings::default()).handle().load_full();
    for worker in &fleet.workers {
        worker.set_health(Health::Up);
    }
    fleet
}

/// Workers that are all up.
pub(in crate::routing) fn fleet(count: usize) -> Arc<Fleet> {
    fleet_of(&vec![Traits::default(); count])
}

pub(in crate::routing) fn fleet_of(traits: &[Traits]) -> Arc<Fleet> {
    fleet_with(traits.iter().enumerate().map(|(number, traits)| {
        let spec: WorkerSpec = format!("http://w{number}:1").parse().unwrap();
        WorkerSpec { traits: traits.clone(), ..spec }
    }))
}

pub(in crate::routing) fn fleet_of_costs(costs: &[f64]) -> Arc<Fleet> {
    fleet_of(&costs.iter().map(|&cost| Traits { cost, ..Traits::default() }).collect::<Vec<_>>())
}

pub(in crate::routing) fn fleet_named(hosts: &[&str]) -> Arc<Fleet> {
    fleet_with(hosts.iter().map(|host| format!("http://{host}:1").parse().unwrap()))
}

/// The candidates that these positions make.
pub(in crate::routing) fn among<'a>(
    fleet: &'a Fleet,
    serving: &[usize],
    scratch: &'a mut Vec<usize>,
) -> Candidates<'a> {
    Candidates::of(fleet, serving, &Tried::none(), &Terms::default(), scratch)
}

/// A policy and what it chooses from.
pub(in crate::routing) struct Bed {
    policy: Box<dyn Policy>,
    pub(in crate::routing) fleet: Arc<Fleet>,
    /// Who has the model; empty: everybody.
    pub(in crate::routing) serving: Vec<usize>,
    /// Grows by one with every choice.
    pub(in crate::routing) random: u64,
    pub(in crate::routing) prompt: Prompt,
}

impl Bed {
    pub(in crate::routing) fn new(name: &str, fleet: Arc<Fleet>) -> Self {
        Self::with_flags(name, fleet, &[])
    }

    pub(in crate::routing) fn with_flags(name: &str, fleet: Arc<Fleet>, flags: &[&str]) -> Self {
        let row = POLICIES.iter().find(|row| row.name == name).expect("a policy");
        let policy = (row.build)(&Shared::new(Settings::of_flags(flags), 64));
        Self { policy, fleet, serving: Vec::new(), random: 0, prompt: Prompt::default() }
    }

    fn selected(&mut self, session: Option<u64>) -> Option<Selection> {
        let all: Vec<usize> = (0..self.fleet.workers.len()).collect();
        let serving = if self.serving.is_empty() { &all } else { &self.serving };
        let mut scratch = Vec::new();
        let candidates = among(&self.fleet, serving, &mut scratch);
        let input = RouteInput { random: self.random, now: 0, session, prompt: &self.prompt };
        self.random += 1;
        self.policy.choose(&input, &candidates)
    }

    pub(in crate::routing) fn choose_for(&mut self, session: Option<u64>) -> usize {
        self.selected(session).expect("somebody is there").position
    }

    pub(in crate::routing) fn choose(&mut self) -> usize {
        self.choose_for(None)
    }

    /// How often each is chosen while nothing runs.
    pub(in crate::routing) fn counts(&mut self, choices: usize) -> Vec<usize> {
        let mut counts = vec![0; self.fleet.workers.len()];
        (0..choices).for_each(|_| counts[self.choose()] += 1);
        counts
    }

    pub(in crate::routing) fn begin(&self, position: usize) -> InFlight {
        InFlight::begin(self.fleet.workers[position].clone(), Demand::default())
    }

    pub(in crate::routing) fn begin_chosen_for(&mut self, session: Option<u64>) -> InFlight {
        let position = self.choose_for(session);
        self.begin(position)
    }

    pub(in crate::routing) fn begin_chosen(&mut self) -> InFlight {
        self.begin_chosen_for(None)
    }

    pub(in crate::routing) fn in_flight(&self) -> Vec<u32> {
        self.fleet.workers.iter().map(|worker| worker.in_flight()).collect()
    }

    /// What was read of a worker's `/metrics`.
    pub(in crate::routing) fn scraped(&self, position: usize, running: u32, waiting: u32, foreign: u32) {
        let stats = EngineStats { running: Some(running), waiting: Some(waiting), ..EngineStats::default() };
        self.fleet.workers[position].engine().set(&stats, foreign);
    }
}

#[test]
fn every_policy_chooses_nobody_from_an_empty_fleet() {
    for row in POLICIES {
        for session in [None, Some(7)] {
            assert_eq!(Bed::new(row.name, fleet(0)).selected(session), None, "{}", row.name);
        }
    }
}

#[test]
fn every_policy_chooses_the_only_worker() {
    for row in POLICIES {
        for session in [None, Some(7)] {
            assert_eq!(Bed::new(row.name, fleet(1)).choose_for(session), 0, "{}", row.name);
        }
    }
}

#[test]
fn every_policy_leaves_out_a_worker_that_is_down() {
    for row in POLICIES {
        let mut bed = Bed::new(row.name, fleet(3));
        bed.fleet.workers[1].set_health(Health::Down);
        for session in (0..50).map(Some).chain([None; 50]) {
            assert_ne!(bed.choose_for(session), 1, "{}", row.name);
        }
    }
}

#[test]
fn every_policy_follows_a_fleet_that_changes() {
    for row in POLICIES {
        let mut bed = Bed::new(row.name, fleet(5));
        for count in [5, 2, 7, 1] {
            bed.fleet = fleet(count);
            let mut chosen: Vec<usize> = (0..200).map(|key| bed.choose_for(Some(key))).collect();
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen, (0..count).collect::<Vec<_>>(), "{}", row.name);
        }
    }
}

#[test]
fn every_policy_chooses_only_who_has_the_model() {
    for row in POLICIES {
        let mut bed = Bed::new(row.name, fleet(6));
        bed.serving = vec![1, 4];
        let mut chosen: Vec<usize> = (0..100).map(|key| bed.choose_for(Some(key))).collect();
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!(chosen, [1, 4], "{}", row.name);
    }
}

#[test]
fn every_policy_is_fair_to_idle_workers() {
    for row in POLICIES {
        let counts = Bed::new(row.name, fleet(3)).counts(300);
        assert!(counts.iter().all(|&count| count >= 60), "{}: {counts:?}", row.name);
    }
}

#[test]
fn every_policy_gives_a_worker_of_twice_the_cost_less() {
    for row in POLICIES {
        let mut bed = Bed::new(row.name, fleet_of_costs(&[1.0, 2.0, 1.0]));
        let mut counts = [0; 3];
        let running: Vec<_> = (0..400).map(|key| bed.begin_chosen_for(Some(key))).collect();
        running.iter().for_each(|request| counts[request.worker().id()] += 1);
        assert!(counts[1] > 30 && counts[1] * 10 < counts[0].min(counts[2]) * 8, "{}: {counts:?}", row.name);
    }
}

#[test]
fn every_policy_ignores_what_became_of_a_choice_of_no_use_to_it() {
    for row in POLICIES {
        let mut bed = Bed::new(row.name, fleet(2));
        let worker = bed.fleet.workers[0].clone();
        let outcome =
            Outcome { worker: &worker, prompt: &Prompt::default(), demand: Demand::default(), usage: None };
        bed.policy.ended(&outcome);
        assert!(bed.choose() < 2);
    }
}

#[test]
fn no_name_means_two_policies() {
    let names = |row: &'static Definition| row.aliases.iter().chain([&row.name]);
    for row in POLICIES {
        for name in names(row) {
            assert_eq!(name.parse::<PolicyName>().map(|policy| policy.0.name), Ok(row.name), "{name}");
        }
    }
}

#[test]
fn every_policy_keeps_to_the_rules_whatever_happens() {
    for row in POLICIES {
        for seed in 0..24 {
            simulate(row.name, seed);
        }
    }
}

/// Workers come, go, sleep and change their health, requests begin and end; nobody is chosen who must not be.
fn simulate(name: &str, seed: u64) {
    let mut state = seed;
    let mut draw = move |count: usize| {
        state = chance::again(state);
        chance::below(state, count)
    };
    let worker = |draw: &mut dyn FnMut(usize) -> usize| Traits {
        priority: draw(8) as i32 / 7,
        cost: [0.25, 1.0, 1.0, 3.0][draw(4)],
        max_concurrent_requests: [None, Some(3)][draw(2)],
    };
    let mut bed = Bed::new(name, fleet(3));
    let mut choices = 0;
    let mut running: Vec<InFlight> = Vec::new();
    for step in 0..400 {
        let count = bed.fleet.workers.len();
        match draw(16) {
            0 if step % 7 == 0 => {
                let count = draw(7);
                bed.fleet = fleet_of(&(0..count).map(|_| worker(&mut draw)).collect::<Vec<_>>());
            }
            1 if count > 0 => {
                let health = [Health::Up, Health::Up, Health::Down, Health::Unknown][draw(4)];
                bed.fleet.workers[draw(count)].set_health(health);
            }
            2 if count > 0 => {
                let asleep = Some(draw(2) == 0);
                let stats = EngineStats { waiting: Some(draw(12) as u32), asleep, ..EngineStats::default() };
                bed.fleet.workers[draw(count)].engine().set(&stats, draw(5) as u32);
            }
            3..8 if !running.is_empty() => drop(running.swap_remove(draw(running.len()))),
            _ => {
                bed.random = draw(usize::MAX) as u64;
                let chunks: Vec<u64> = (0..draw(4)).map(|_| draw(3) as u64 + 1).collect();
                let length = chunks.len() as u64;
                bed.prompt = Prompt::new(chunks, length * 512, length * 128);
                let session = [None, Some(draw(5) as u64)][draw(2)];
                let all: Vec<usize> = (0..count).collect();
                let mut scratch = Vec::new();
                let candidates = among(&bed.fleet, &all, &mut scratch);
                let (allowed, busy) = (candidates.positions().to_vec(), candidates.are_busy());
                let chosen = bed.selected(session).map(|selection| selection.position);
                let all_rest = bed.fleet.workers.iter().all(|worker| worker.rests());
                assert_eq!(chosen.is_none(), all_rest || busy, "{name}, seed {seed}, step {step}");
                let Some(chosen) = chosen else { continue };
                assert!(
                    allowed.contains(&chosen),
                    "{name}, seed {seed}, step {step}: {chosen} of {allowed:?}"
                );
                choices += 1;
                assert!(!bed.fleet.workers[chosen].is_full(), "{name}, seed {seed}, step {step}");
                running.push(bed.begin(chosen));
            }
        }
    }
    assert!(choices > 10, "{name}, seed {seed}: only {choices} choices");
}

#[test]
fn every_policy_can_be_counted() {
    assert!(POLICIES.len() <= crate::workers::MAX_POLICIES);
}
