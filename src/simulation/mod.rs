//! Whole worlds from seeds: breakers, health, further attempts and admission together, over random histories of faults.
//!
//! What decides is the real thing: [`crate::workers`], [`crate::routing`], `proxy::retry`, `proxy::judge`,
//! `proxy::choice`, [`crate::proxy::Budget`], [`crate::admission`] and `control::health`. Simulated is what is around
//! them: workers, clients, time and chance; and the order in which an exchange and a probe call them, which is repeated
//! in `exchange.rs` and `world.rs` because it cannot be had without sockets. `ledger.rs` keeps books of its own and holds
//! them against the proxy's after every event.
//!
//! `VLLM_PROXY_SIMULATION_SEEDS=n` runs the first `n` seeds, `VLLM_PROXY_SIMULATION_SEED=s` that one alone.

mod exchange;
mod ledger;
mod rules;
mod servers;
mod time;
mod world;

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

use ledger::Tally;
use world::World;

/// Seeds of the ordinary suite.
const SEEDS: u64 = 256;

#[expect(clippy::disallowed_methods, reason = "a test is told by the environment how long to run")]
fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// What came to pass in the world of this seed; panics where a rule does not hold.
fn live(seed: u64) -> Tally {
    let world = World::new(seed);
    let lived = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = lived {
        eprintln!(
            "seed {seed} failed at {} ms. Alone: VLLM_PROXY_SIMULATION_SEED={seed} cargo test --lib simulation\n{:?}",
            world.time.now(),
            world.rules
        );
        // what is left would fail once more when it is dropped
        #[expect(clippy::mem_forget, reason = "a failed test has better things to say")]
        std::mem::forget(world);
        std::panic::resume_unwind(panic);
    }
    world.ledger.tally.clone()
}

#[test]
fn whatever_happens_every_request_ends_once_and_no_limit_is_passed() {
    let seeds = match number("VLLM_PROXY_SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("VLLM_PROXY_SIMULATION_SEEDS").unwrap_or(SEEDS),
    };
    let many = seeds.end - seeds.start >= SEEDS;
    let total = Tally::default();
    for seed in seeds {
        total.add(&live(seed));
    }
    println!("{total:?}");
    if many {
        assert!(
            total.all().iter().all(|count| count.get() > 0),
            "a rule was never put to the test: {total:?}"
        );
    }
}

impl Tally {
    fn all(&self) -> [&Cell<u64>; 10] {
        let Self { further, over_budget, trials, opened, ejected, waited, .. } = self;
        let Self { kills, left, failed, answered, .. } = self;
        [further, over_budget, trials, opened, ejected, waited, kills, left, failed, answered]
    }

    fn add(&self, other: &Self) {
        for (count, more) in self.all().into_iter().zip(other.all()) {
            count.set(count.get() + more.get());
        }
    }
}
