//! One after the other.
//!
//! Each shard begins at a place of its own; a worker that costs twice as much has its turn half as often, spread
//! and not in bursts.

use super::turns::Turns;
use crate::routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection};

pub(super) const DEFINITION: Definition = Definition {
    name: "round_robin",
    aliases: &["rr"],
    summary: "one after the other; a worker of cost 2 half as often",
    needs: Needs { prompt: false, session: false },
    build: |_| Box::new(RoundRobin::default()),
};

#[derive(Debug, Default)]
struct RoundRobin(Turns);

impl Policy for RoundRobin {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        self.0.take(input.random, candidates, candidates.positions()).map(Selection::of)
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        routing::policies::tests::{Bed, fleet},
        workers::Health,
    };

    #[test]
    fn every_worker_has_its_turn_in_every_round() {
        let mut bed = Bed::new("round_robin", fleet(5));
        for _ in 0..20 {
            let mut round: Vec<usize> = (0..5).map(|_| bed.choose()).collect();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn shards_start_apart() {
        let first = |random| {
            let mut bed = Bed::new("round_robin", fleet(8));
            bed.random = random;
            bed.choose()
        };
        let mut firsts: Vec<usize> = (0..64).map(first).collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert!(firsts.len() >= 6, "64 shards start at {firsts:?} only");
    }

    #[test]
    fn a_worker_that_goes_and_comes_does_not_stop_the_round() {
        let mut bed = Bed::new("round_robin", fleet(3));
        let count = |bed: &mut Bed, rounds: usize| {
            let mut counts = [0; 3];
            (0..rounds).for_each(|_| counts[bed.choose()] += 1);
            counts
        };
        assert_eq!(count(&mut bed, 30), [10, 10, 10]);
        bed.fleet.workers[0].set_health(Health::Down);
        assert_eq!(count(&mut bed, 30), [0, 15, 15]);
        bed.fleet.workers[0].set_health(Health::Up);
        let back = count(&mut bed, 30);
        assert!(back.iter().all(|turns| (9..=11).contains(turns)), "it does not catch up: {back:?}");
    }
}
