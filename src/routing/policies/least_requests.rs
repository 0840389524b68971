//! The worker with the fewest requests in flight.
//!
//! Counted with the request that is to come and times the worker's cost, so that one of cost 2 has half as many.
//! Ties, which are the common case of a fleet with little load, go round in turn: the first in the list must not
//! become the busiest.

use super::turns::Lightest;
use crate::routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection};

pub(super) const DEFINITION: Definition = Definition {
    name: "least_requests",
    aliases: &[
        "least_request",
        "least_load",
        "least_loaded",
        "least_active",
        "least_connections",
        "least_conn",
    ],
    summary: "the worker with the fewest requests in flight, times its cost; ties go round in turn",
    needs: Needs { prompt: false, session: false },
    build: |_| Box::new(LeastRequests::default()),
};

#[derive(Debug, Default)]
struct LeastRequests(Lightest);

impl Policy for LeastRequests {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        self.0.by_requests(input, candidates).map(Selection::of)
    }
}

#[cfg(test)]
mod tests {
    use crate::routing::policies::tests::{Bed, fleet, fleet_of_costs};

    #[test]
    fn the_least_busy_is_chosen_and_ties_go_round() {
        let mut bed = Bed::new("least_requests", fleet(3));
        let mut round = [bed.choose(), bed.choose(), bed.choose()];
        round.sort_unstable();
        assert_eq!(round, [0, 1, 2]);
        let busy = bed.begin(1);
        let idle = [bed.choose(), bed.choose(), bed.choose(), bed.choose()];
        assert!(idle == [0, 2, 0, 2] || idle == [2, 0, 2, 0], "{idle:?}");
        let _busier = [bed.begin(0), bed.begin(2)];
        drop(busy);
        assert_eq!([bed.choose(), bed.choose()], [1, 1]);
    }

    #[test]
    fn a_worker_of_twice_the_cost_runs_half_as_many() {
        let mut bed = Bed::new("least_requests", fleet_of_costs(&[1.0, 2.0, 1.0]));
        let running: Vec<_> = (0..50).map(|_| bed.begin_chosen()).collect();
        assert_eq!(bed.in_flight(), [20, 10, 20]);
        drop(running);
        assert_eq!(bed.in_flight(), [0, 0, 0]);
    }

    #[test]
    fn what_others_have_sent_counts() {
        let mut bed = Bed::new("least_requests", fleet(2));
        bed.scraped(0, 5, 0, 5);
        assert_eq!(bed.counts(10), [0, 10]);
    }
}
