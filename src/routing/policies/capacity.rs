//! The worker with the most capacity left, as xerrors' router scores it:
//! `(running × 3 + waiting × 1) / max_concurrent_requests`, the least first.
//!
//! That router knows only what it has last read of `/metrics`, so between two readings every request goes to the
//! same worker. Here the requests in flight lead: ours are exact and of this moment, and what was read says how
//! many there are besides and how many of all wait. The score is taken with the request that is to come, so that
//! of idle workers the larger is first, and times the worker's cost.

use super::turns::Lightest;
use crate::{
    routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection},
    workers::Worker,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "capacity",
    aliases: &[],
    summary: "the least `(running × 3 + waiting) / max_concurrent_requests`, times cost; the weights can be set",
    needs: Needs { prompt: false, session: false },
    build: |shared| {
        Box::new(Capacity {
            running_weight: shared.settings.capacity_running_weight,
            waiting_weight: shared.settings.capacity_waiting_weight,
            lightest: Lightest::default(),
        })
    },
};

/// Requests that a worker takes at once where the operator does not say: vLLM's own default of `--max-num-seqs`
/// on smaller GPUs (`vllm/engine/arg_utils.py`, usage context API server).
const MAX_CONCURRENT_REQUESTS: u32 = 256;

#[derive(Debug)]
struct Capacity {
    running_weight: f64,
    waiting_weight: f64,
    lightest: Lightest,
}

impl Policy for Capacity {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        let (running_weight, waiting_weight) = (self.running_weight, self.waiting_weight);
        let score = |worker: &Worker| {
            let (running, waiting) = running_and_waiting(worker);
            let traits = worker.traits();
            let most = traits.max_concurrent_requests.unwrap_or(MAX_CONCURRENT_REQUESTS).max(1);
            let used = (f64::from(running) + 1.0) * running_weight + f64::from(waiting) * waiting_weight;
            used / f64::from(most) * traits.cost
        };
        self.lightest.choose(input, candidates, score).map(Selection::of)
    }
}

/// What runs and what waits on a worker now. Of all that is there, as many wait as waited when it was last asked;
/// but what we have sent it is never taken for waiting: each request that is sent must weigh at once, and in full,
/// or all that come before the next reading go the same way.
fn running_and_waiting(worker: &Worker) -> (u32, u32) {
    let all = worker.load().in_flight;
    let waiting = worker.engine().waiting().unwrap_or(0).min(all);
    ((all - waiting).max(worker.in_flight()), waiting)
}

#[cfg(test)]
mod tests {
    use crate::{
        routing::policies::tests::{Bed, fleet, fleet_of},
        workers::Traits,
    };

    fn capacities(most: &[u32]) -> Vec<Traits> {
        let traits = |&most| Traits { max_concurrent_requests: Some(most), ..Traits::default() };
        most.iter().map(traits).collect()
    }

    #[test]
    fn workers_fill_in_proportion_to_their_capacity() {
        let mut bed = Bed::new("capacity", fleet_of(&capacities(&[10, 20, 30])));
        let _running: Vec<_> = (0..30).map(|_| bed.begin_chosen()).collect();
        assert_eq!(bed.in_flight(), [5, 10, 15]);
    }

    #[test]
    fn the_one_with_free_capacity_is_preferred_to_the_one_with_fewer_requests() {
        let mut bed = Bed::new("capacity", fleet_of(&capacities(&[4, 100])));
        let _running: Vec<_> = [1, 1, 1, 1, 1, 0, 0].map(|at| bed.begin(at)).into();
        assert_eq!(bed.choose(), 1);
    }

    #[test]
    fn waiting_requests_weigh_as_they_are_set_to() {
        let waiting = |flags: &[&str]| {
            let mut bed = Bed::with_flags("capacity", fleet(2), flags);
            // as many on each: here they run, there half of them wait
            bed.scraped(0, 8, 0, 8);
            bed.scraped(1, 4, 4, 8);
            bed.counts(1)
        };
        assert_eq!(waiting(&[]), [0, 1], "what waits weighs a third");
        let flags = ["--capacity-running-weight=1", "--capacity-waiting-weight=3"];
        assert_eq!(waiting(&flags), [1, 0]);
    }

    #[test]
    fn requests_between_two_readings_do_not_herd() {
        let mut bed = Bed::new("capacity", fleet(8));
        // the reading says that one is empty and the others are not; half of that is another proxy's
        (1..8).for_each(|at| bed.scraped(at, 2, 0, 2));
        let _running: Vec<_> = (0..80).map(|_| bed.begin_chosen()).collect();
        let loads = bed.in_flight();
        assert!(loads.iter().all(|load| (9..=13).contains(load)), "{loads:?}");
    }

    #[test]
    fn what_has_ended_since_the_reading_does_not_count() {
        let mut bed = Bed::new("capacity", fleet(4));
        // read while 20 of ours ran and waited on each but one; they are all gone now
        (1..4).for_each(|at| bed.scraped(at, 12, 8, 0));
        let _running: Vec<_> = (0..40).map(|_| bed.begin_chosen()).collect();
        let loads = bed.in_flight();
        assert!(loads.iter().all(|load| (8..=14).contains(load)), "{loads:?}");
    }
}
