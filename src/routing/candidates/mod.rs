//! Which workers may be chosen for an attempt.

use std::sync::Arc;

use crate::{
    base::Millis,
    workers::{Fleet, Worker},
};

/// The workers that earlier attempts of an exchange have failed on.
#[derive(Debug, Clone, Default, Hash)]
pub struct Tried(Vec<usize>);

impl Tried {
    /// No attempt yet.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// The worker at `position` failed.
    pub fn add(&mut self, position: usize) {
        self.0.push(position);
    }

    /// Number of failed attempts.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether the worker at `position` failed.
    pub fn contains(&self, position: usize) -> bool {
        self.0.contains(&position)
    }
}

/// What candidates depend on besides the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The time of the choice.
    pub now: Millis,
    /// Chance: any 64 bits.
    pub random: u64,
    /// For so long a worker that came up is given less than the others; 0: not at all.
    pub slow_start_ms: u64,
    /// Whether the least bad stand in where nobody is left that should be used.
    pub panics: bool,
    /// On the worker at this position the request has a place already, so that one has room.
    pub place: Option<usize>,
}

impl Default for Terms {
    /// No slow start, and the least bad stand in.
    fn default() -> Self {
        Self { now: 0, random: 0, slow_start_ms: 0, panics: true, place: None }
    }
}

/// The workers that a policy may choose from.
#[derive(Debug)]
pub struct Candidates<'a> {
    workers: &'a [Arc<Worker>],
    /// In `workers`, ascending.
    positions: &'a [usize],
    /// Whether they only stand in.
    stand_in: bool,
    /// There would be candidates if they had not as many requests as they may.
    busy: bool,
}

/// Requests that wait in a worker from which on it is saturated, where its `/metrics` tell.
const SATURATED_WAITING: u32 = 8;

/// Requests in flight from which on a worker is saturated of which nothing is known.
const SATURATED_IN_FLIGHT: u32 = 256;

/// Share of the choices in which a worker that has just come up is a candidate.
const FIRST_SHARE: f64 = 0.1;

impl<'a> Candidates<'a> {
    /// Those of `serving` (positions in the fleet, ascending) that are up and have not been tried, whose breaker
    /// lets requests through, and who are awake; where none is left, those of them that were ejected for their probes.
    /// Where none of these is left either, the least bad stand in, unless the terms forbid it: who is up with an open
    /// breaker, then whoever is down. So the last worker is never taken out, and a wrong verdict about all of them
    /// costs one refused connect. Who sleeps or is paused never stands in: it would let the request wait for ever.
    ///
    /// Who has as many requests as it may is left out in any case: if all have there is no candidate, and
    /// [`Candidates::are_busy`]. Who has just refused or failed a request is left out while another has not.
    ///
    /// Of these only the workers of the highest priority, unless all of them are saturated; then those of the next
    /// one. Where everybody is saturated it is the highest priority again, and load decides. A worker is saturated
    /// when as many requests are in flight as it may have, others' included; where that is not told, when 8 requests
    /// wait in it; where neither is, when 256 are in flight.
    ///
    /// Of these a worker that came up lately is left out of some choices, ever fewer of them while it warms up, and
    /// only as far as another has been up for longer.
    ///
    /// `scratch` is where the positions are kept.
    pub fn of(
        fleet: &'a Fleet,
        serving: &[usize],
        tried: &Tried,
        terms: &Terms,
        scratch: &'a mut Vec<usize>,
    ) -> Self {
        let workers = &fleet.workers[..];
        let untried = || serving.iter().copied().filter(|&position| !tried.contains(position));
        scratch.clear();
        scratch.extend(untried().filter(|&position| workers[position].serves(terms.now)));
        if scratch.is_empty() {
            scratch.extend(untried().filter(|&position| workers[position].could_serve(terms.now)));
        }
        let stand_in = scratch.is_empty() && terms.panics;
        if stand_in {
            let awake = || untried().filter(|&position| !workers[position].rests());
            scratch.extend(awake().filter(|&position| workers[position].answers()));
            if scratch.is_empty() {
                scratch.extend(awake());
            }
        }
        let before = scratch.len();
        scratch.retain(|&position| !workers[position].is_full() || terms.place == Some(position));
        let busy = before > 0 && scratch.is_empty();
        forward(workers, scratch, terms.now);
        first_choice(workers, terms.place, scratch);
        if terms.slow_start_ms > 0 && fleet.has_newcomers(terms.now, terms.slow_start_ms) {
            warm_up(workers, scratch, terms);
        }
        Self { workers, positions: scratch, stand_in, busy }
    }

    /// Whether they only stand in for those that should be used, of whom none is left: their breakers have no say.
    pub fn stand_in(&self) -> bool {
        self.stand_in
    }

    /// Whether there is nobody to choose only because everybody has as many requests as it may.
    pub fn are_busy(&self) -> bool {
        self.busy
    }

    /// The candidates with their positions in the fleet, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &'a Worker)> {
        self.positions.iter().map(|&position| (position, &*self.workers[position]))
    }

    /// The candidate number `index`, of [`Candidates::len`], with its position in the fleet.
    pub fn get(&self, index: usize) -> Option<(usize, &'a Worker)> {
        self.positions.get(index).map(|&position| (position, &*self.workers[position]))
    }

    /// The candidates' positions in the fleet, ascending.
    pub fn positions(&self) -> &'a [usize] {
        self.positions
    }

    /// Whether the worker at this position in the fleet is a candidate.
    pub fn contains(&self, position: usize) -> bool {
        let all = self.positions.len() == self.workers.len();
        if all { position < self.workers.len() } else { self.positions.binary_search(&position).is_ok() }
    }

    /// Number of candidates.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there is nobody to choose.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// All workers of the fleet, candidates or not; positions are those in it.
    pub fn fleet(&self) -> &'a [Arc<Worker>] {
        self.workers
    }
}

/// Leaves out who is set back, unless all are.
fn forward(workers: &[Arc<Worker>], positions: &mut Vec<usize>, now: Millis) {
    let set_back = |position: &usize| workers[*position].is_set_back(now);
    if positions.iter().any(set_back) && !positions.iter().all(set_back) {
        positions.retain(|position| !set_back(position));
    }
}

/// Leaves out some of those that have been up for less than the longest, by chance.
fn warm_up(workers: &[Arc<Worker>], positions: &mut Vec<usize>, terms: &Terms) {
    let whole = terms.slow_start_ms as f64;
    let share = |position: usize| {
        let age = terms.now.saturating_sub(workers[position].up_since()) as f64;
        FIRST_SHARE + (1.0 - FIRST_SHARE) * (age / whole).min(1.0)
    };
    let most = positions.iter().map(|&position| share(position)).fold(0.0, f64::max);
    positions.retain(|&position| chance(terms.random, position) * most < share(position));
}

/// In 0..1, for each position another one (splitmix64).
fn chance(random: u64, position: usize) -> f64 {
    let mut bits = random.wrapping_add((position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ bits >> 31) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Leaves those of the highest priority of which not all are saturated; if all are, those of the highest.
fn first_choice(workers: &[Arc<Worker>], place: Option<usize>, positions: &mut Vec<usize>) {
    let priority = |position: usize| workers[position].traits().priority;
    let Some(highest) = positions.iter().copied().map(priority).max() else { return };
    if positions.iter().all(|&position| priority(position) == highest) {
        return;
    }
    // that of the first worker which is not saturated, by priority
    let has_room = |position: usize| place == Some(position) || !saturated(&workers[position]);
    let free = positions.iter().copied().filter(|&position| has_room(position));
    let level = free.map(priority).max().unwrap_or(highest);
    positions.retain(|&position| priority(position) == level);
}

fn saturated(worker: &Worker) -> bool {
    let in_flight = worker.load().in_flight;
    match (worker.traits().max_concurrent_requests, worker.engine().waiting()) {
        (Some(most), _) => in_flight >= most,
        (None, Some(waiting)) => waiting >= SATURATED_WAITING,
        (None, None) => in_flight >= SATURATED_IN_FLIGHT,
    }
}

#[cfg(test)]
mod tests;
