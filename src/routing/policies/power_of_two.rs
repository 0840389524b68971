//! The lighter of two that chance picks.
//!
//! Nearly as even as looking at all of them, and proxies that know nothing of each other do not all run to the
//! same worker.

use super::{burden, chance};
use crate::routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection};

pub(super) const DEFINITION: Definition = Definition {
    name: "power_of_two",
    aliases: &["p2c", "power_of_two_choices", "pow_2"],
    summary: "of two workers that chance picks the one with fewer requests in flight, times its cost",
    needs: Needs { prompt: false, session: false },
    build: |_| Box::new(PowerOfTwo),
};

#[derive(Debug)]
struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        let count = candidates.len();
        if count < 2 {
            return candidates.get(0).map(|(position, _)| Selection::of(position));
        }
        let first = chance::below(input.random, count);
        let second = chance::below(chance::again(input.random), count - 1);
        // the two differ; which of them comes first is chance as well, so ties fall to either
        let second = if second >= first { second + 1 } else { second };
        let ((first, one), (second, other)) = (candidates.get(first)?, candidates.get(second)?);
        Some(Selection::of(if burden(other) < burden(one) { second } else { first }))
    }
}

#[cfg(test)]
mod tests {
    use crate::routing::policies::tests::{Bed, fleet, fleet_of_costs};

    #[test]
    fn the_busiest_of_all_is_never_chosen() {
        let mut bed = Bed::new("power_of_two", fleet(3));
        let _busy = [bed.begin(1), bed.begin(1), bed.begin(2)];
        let counts = bed.counts(3_000);
        assert_eq!(counts[1], 0, "{counts:?}");
        assert!(counts[0].abs_diff(2_000) < 150, "it wins each of its two pairs of three: {counts:?}");
    }

    #[test]
    fn ties_fall_to_all_alike() {
        let counts = Bed::new("power_of_two", fleet(8)).counts(40_000);
        assert!(counts.iter().all(|count| (4_500..5_500).contains(count)), "{counts:?}");
    }

    #[test]
    fn load_is_nearly_as_even_as_if_all_were_looked_at() {
        let mut bed = Bed::new("power_of_two", fleet(16));
        let _running: Vec<_> = (0..1_600).map(|_| bed.begin_chosen()).collect();
        let loads = bed.in_flight();
        assert!(loads.iter().all(|load| (96..=104).contains(load)), "{loads:?}");
    }

    #[test]
    fn a_worker_of_twice_the_cost_runs_about_half_as_many() {
        let mut bed = Bed::new("power_of_two", fleet_of_costs(&[1.0, 2.0, 1.0, 2.0]));
        let _running: Vec<_> = (0..600).map(|_| bed.begin_chosen()).collect();
        let loads = bed.in_flight();
        assert!(
            loads.iter().zip([200_u32, 100, 200, 100]).all(|(load, due)| load.abs_diff(due) < 10),
            "{loads:?}"
        );
    }
}
