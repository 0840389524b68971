//! The worker with the fewest requests in flight.
//!
//! Ties, which are the common case of a fleet with little load, go round in turn: the first in the list must
//! not become the busiest.

use crate::routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection};

pub(super) const DEFINITION: Definition = Definition {
    name: "least_requests",
    aliases: &["least_load", "least_active"],
    summary: "the worker with the fewest requests in flight; ties go round in turn",
    needs: Needs { prompt: false, session: false },
    build: |_| Box::new(LeastRequests { next: None }),
};

struct LeastRequests {
    /// Where the next tie begins to look; `None` before the first choice, so that shards start apart.
    next: Option<usize>,
}

impl Policy for LeastRequests {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        let count = candidates.iter().map(|(position, _)| position + 1).max()?;
        let next = *self.next.get_or_insert((input.random % count as u64) as usize);
        let (position, _) = candidates.iter().min_by_key(|(position, worker)| {
            let turn = if *position >= next { *position - next } else { *position + count };
            (worker.load().in_flight, turn)
        })?;
        self.next = Some(position + 1);
        Some(Selection::of(position))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        routing::{Prompt, Tried},
        workers::{Demand, Health, InFlight, ModelSettings, Registry},
    };

    #[test]
    fn the_least_busy_is_chosen_and_ties_go_round() {
        let urls = ["http://a:1", "http://b:1", "http://c:1"].map(|url| url.parse().unwrap());
        let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
        fleet.workers.iter().for_each(|worker| {
            worker.set_health(Health::Up);
        });
        let mut policy = LeastRequests { next: Some(0) };
        let (mut scratch, prompt) = (Vec::new(), Prompt::default());
        let mut choose = || {
            let candidates = Candidates::of(&fleet, &[0, 1, 2], &Tried::none(), &mut scratch);
            let input = RouteInput { random: 0, now: 0, session: None, prompt: &prompt };
            policy.choose(&input, &candidates).unwrap().position
        };
        assert_eq!([choose(), choose(), choose(), choose()], [0, 1, 2, 0]);
        let begin = |at: usize| InFlight::begin(fleet.workers[at].clone(), Demand::default());
        let busy = begin(1);
        assert_eq!([choose(), choose(), choose()], [2, 0, 2]);
        let _busier = [begin(0), begin(2)];
        drop(busy);
        assert_eq!([choose(), choose()], [1, 1]);
    }
}
