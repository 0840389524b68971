//! By chance.

use super::chance;
use crate::{
    routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection},
    workers::Worker,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "random",
    aliases: &[],
    summary: "by chance; a worker of cost 2 half as often",
    needs: Needs { prompt: false, session: false },
    build: |_| Box::new(Random),
};

#[derive(Debug)]
struct Random;

impl Policy for Random {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        let share = |worker: &Worker| 1.0 / worker.traits().cost;
        let all: f64 = candidates.iter().map(|(_, worker)| share(worker)).sum();
        let mut left = chance::unit(input.random) * all;
        let hit = candidates.iter().find(|(_, worker)| {
            left -= share(worker);
            left < 0.0
        });
        // what rounding leaves over is the last one's
        let last = candidates.positions().last().copied();
        hit.map(|(position, _)| position).or(last).map(Selection::of)
    }
}

#[cfg(test)]
mod tests {
    use crate::routing::policies::tests::{Bed, fleet, fleet_of_costs};

    #[test]
    fn eight_workers_have_an_eighth_each_within_a_tenth_of_it() {
        let mut bed = Bed::new("random", fleet(8));
        let counts = bed.counts(40_000);
        assert!(counts.iter().all(|count| (4_500..5_500).contains(count)), "{counts:?}");
    }

    #[test]
    fn shares_are_the_inverse_of_costs() {
        let mut bed = Bed::new("random", fleet_of_costs(&[1.0, 2.0, 0.5]));
        let counts = bed.counts(35_000);
        for (count, expected) in counts.iter().zip([10_000_usize, 5_000, 20_000]) {
            assert!(count.abs_diff(expected) < expected / 10, "{counts:?}");
        }
    }
}
