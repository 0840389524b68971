//! The same worker for the same session.
//!
//! A key (the session, else the beginning of the prompt) has its place on a ring, and the next worker from there is
//! its own. Each worker has many places, made of its name alone: shards, restarts and other proxies agree without
//! a word. The ring is that of the whole fleet and who is no candidate is walked past, which comes to the same as
//! a ring of the candidates, but is made only when the fleet changes; so the keys of a worker that is gone, and
//! of no other, move to the next one.
//!
//! Load is bounded: who has much more than the mean is walked past too. One busy session, or a system prompt that
//! everybody has, spreads over as many workers as it needs.
//!
//! What has no key at all goes where the fewest requests are, not to one worker.

use std::{cell::OnceCell, sync::Arc};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{
    burden, chance,
    turns::{Lightest, same_workers},
};
use crate::{
    routing::{Candidates, Definition, Needs, Policy, RouteInput, Selection},
    workers::Worker,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "consistent_hash",
    aliases: &[
        "session",
        "session_hash",
        "session_affinity",
        "consistent_hashing",
        "rendezvous_hash",
        "ring_hash",
        "sticky",
        "sticky_least_loaded",
        "manual",
        "prefix_hash",
        "chwbl",
    ],
    summary: "the same worker for the same session, else for the same beginning of a prompt; on to the next one \
              where that has much more than the mean",
    needs: Needs { prompt: true, session: true },
    build: |shared| {
        Box::new(ConsistentHash {
            load_factor: shared.settings.hash_load_factor,
            ring: Ring::default(),
            keyless: Lightest::default(),
        })
    },
};

/// Chunks of a prompt (512 bytes each) that make its key: about 256 tokens, as SMG's `prefix_hash` takes.
const PREFIX_CHUNKS: usize = 2;

/// Places on the ring of a worker of cost 1: what the routers that this policy stands for have.
const PLACES: f64 = 160.0;

/// Places on the ring at most, however cheap a worker is.
const MOST_PLACES: f64 = 4096.0;

/// Load up to which nobody is walked past. Where little runs the mean is near 0 and the second request of a
/// session would go elsewhere; a vLLM batches so few at no cost, and they share their prefix.
const ALWAYS_KEPT: f64 = 4.0;

#[derive(Debug)]
struct ConsistentHash {
    /// Load, relative to the mean, beyond which a worker is walked past; 0: never.
    load_factor: f64,
    ring: Ring,
    keyless: Lightest,
}

impl Policy for ConsistentHash {
    fn choose(&mut self, input: &RouteInput<'_>, candidates: &Candidates<'_>) -> Option<Selection> {
        let Some(key) = key(input) else {
            return self.keyless.by_requests(input, candidates).map(Selection::of);
        };
        self.ring.follow(candidates.fleet());
        let from_key = || self.ring.walk(key).filter(|&position| candidates.contains(position));
        let home = from_key().next()?;
        let mean = OnceCell::new();
        let bearable = |position: &usize| {
            let burden = burden(&candidates.fleet()[*position]);
            let most = || self.load_factor * mean.get_or_init(|| mean_burden(candidates));
            self.load_factor == 0.0 || burden <= ALWAYS_KEPT || burden <= most()
        };
        // One is always below the mean, unless other threads count in between.
        let position = from_key().find(bearable).unwrap_or(home);
        Some(Selection::of(position))
    }
}

/// What decides where a request belongs.
fn key(input: &RouteInput<'_>) -> Option<u64> {
    let chunks = input.prompt.chunks();
    let prefix = || chunks.get(..PREFIX_CHUNKS).unwrap_or(chunks).last().copied();
    input.session.or_else(prefix)
}

fn mean_burden(candidates: &Candidates<'_>) -> f64 {
    let all: f64 = candidates.iter().map(|(_, worker)| burden(worker)).sum();
    all / candidates.len().max(1) as f64
}

/// The places of a fleet's workers.
#[derive(Debug, Default)]
struct Ring {
    /// By position in the fleet, as it was at the last call.
    workers: Vec<Arc<Worker>>,
    /// Where on the ring, and whose: position in the fleet. Ascending.
    places: Vec<(u64, u32)>,
}

impl Ring {
    /// Takes over a changed fleet. True if it has changed.
    fn follow(&mut self, workers: &[Arc<Worker>]) -> bool {
        if same_workers(self.workers.iter(), workers) {
            return false;
        }
        self.workers = workers.to_vec();
        self.places.clear();
        for (worker, position) in workers.iter().zip(0..) {
            let places = (PLACES / worker.traits().cost).round().clamp(1.0, MOST_PLACES) as u64;
            let place = |number| (xxh3_64_with_seed(worker.name().as_bytes(), number), position);
            self.places.extend((0..places).map(place));
        }
        self.places.sort_unstable();
        true
    }

    /// Positions in the fleet, from a key's place on and once around: each as often as it has places.
    fn walk(&self, key: u64) -> impl Iterator<Item = usize> {
        let key = chance::mix(key);
        let from = self.places.partition_point(|&(place, _)| place < key);
        let (before, behind) = self.places.split_at(from);
        behind.iter().chain(before).map(|&(_, position)| position as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        routing::{
            Prompt,
            policies::tests::{Bed, fleet, fleet_named, fleet_of_costs},
        },
        workers::Health,
    };

    const KEYS: u64 = 10_000;

    fn homes(bed: &mut Bed) -> Vec<usize> {
        (0..KEYS).map(|key| bed.choose_for(Some(key))).collect()
    }

    #[test]
    fn a_session_stays_where_it_is() {
        let mut bed = Bed::new("consistent_hash", fleet(8));
        assert_eq!(homes(&mut bed), homes(&mut bed));
    }

    #[test]
    fn sessions_are_spread_over_eight_workers_within_a_quarter_of_the_mean() {
        let mut bed = Bed::new("consistent_hash", fleet(8));
        let mut counts = [0_u64; 8];
        homes(&mut bed).into_iter().for_each(|home| counts[home] += 1);
        let (mean, most) = (KEYS / 8, KEYS / 8 / 4);
        assert!(counts.iter().all(|count| count.abs_diff(mean) <= most), "{counts:?}");
    }

    #[test]
    fn a_worker_of_twice_the_cost_is_home_of_half_as_many() {
        let mut bed = Bed::new("consistent_hash", fleet_of_costs(&[1.0, 1.0, 2.0, 2.0]));
        let mut counts = [0_u64; 4];
        homes(&mut bed).into_iter().for_each(|home| counts[home] += 1);
        let dear = (counts[2] + counts[3]) as f64 / KEYS as f64;
        assert!((0.27..0.40).contains(&dear), "a third was due: {counts:?}");
    }

    #[test]
    fn a_worker_that_is_down_moves_its_own_keys_only_and_gets_them_back() {
        let mut bed = Bed::new("consistent_hash", fleet(8));
        let before = homes(&mut bed);
        bed.fleet.workers[3].set_health(Health::Down);
        let during = homes(&mut bed);
        assert!(before.iter().zip(&during).all(|(home, now)| if *home == 3 {
            *now != 3
        } else {
            home == now
        }));
        let mut heirs: Vec<usize> =
            before.iter().zip(&during).filter(|(home, _)| **home == 3).map(|(_, now)| *now).collect();
        heirs.sort_unstable();
        heirs.dedup();
        assert_eq!(heirs.len(), 7, "they are spread over all others");
        bed.fleet.workers[3].set_health(Health::Up);
        assert_eq!(homes(&mut bed), before);
    }

    #[test]
    fn a_worker_that_is_removed_or_added_moves_its_own_keys_only() {
        let names = |bed: &mut Bed| -> Vec<String> {
            homes(bed).into_iter().map(|home| bed.fleet.workers[home].name().to_owned()).collect()
        };
        let mut bed = Bed::new("consistent_hash", fleet_named(&["a", "b", "c", "d", "e"]));
        let five = names(&mut bed);
        // in another order, too: only names count
        bed.fleet = fleet_named(&["e", "d", "b", "a"]);
        let four = names(&mut bed);
        let moved = five.iter().zip(&four).filter(|(before, after)| before != after);
        assert!(moved.clone().all(|(before, _)| before == "http://c:1"));
        assert_eq!(moved.count(), five.iter().filter(|home| *home == "http://c:1").count());
        bed.fleet = fleet_named(&["a", "b", "c", "d", "e"]);
        assert_eq!(names(&mut bed), five);
    }

    #[test]
    fn a_model_of_few_workers_has_the_ring_of_these() {
        let mut bed = Bed::new("consistent_hash", fleet_named(&["a", "b", "c", "d"]));
        bed.serving = vec![1, 3];
        let mut alone = Bed::new("consistent_hash", fleet_named(&["b", "d"]));
        let of_four: Vec<usize> = homes(&mut bed).into_iter().map(|home| home / 2).collect();
        assert_eq!(of_four, homes(&mut alone));
    }

    #[test]
    fn the_ring_is_made_anew_only_when_the_fleet_changes() {
        let (one, other) = (fleet(3), fleet(3));
        let mut ring = Ring::default();
        assert!(ring.follow(&one.workers));
        one.workers[0].set_health(Health::Down);
        assert!(!ring.follow(&one.workers));
        assert!(!ring.follow(&one.workers.clone()), "a new list of the same workers is no change");
        assert!(ring.follow(&other.workers), "other workers at the same places are");
        assert_eq!(ring.places.len(), 3 * 160);
        assert!(ring.places.is_sorted());
    }

    #[test]
    fn one_busy_session_spreads_under_load_but_not_without() {
        let mut bed = Bed::new("consistent_hash", fleet(8));
        let few: Vec<_> = (0..4).map(|_| bed.begin_chosen_for(Some(7))).collect();
        assert_eq!(bed.in_flight().into_iter().max(), Some(4), "so few stay together");
        let many: Vec<_> = (0..396).map(|_| bed.begin_chosen_for(Some(7))).collect();
        let loads = bed.in_flight();
        assert_eq!(loads.iter().sum::<u32>(), 400);
        // the mean of 50 with the one to come, and a quarter
        assert!(loads.iter().all(|load| *load <= 64), "{loads:?}");
        assert!(loads.iter().any(|load| *load >= 60), "its home has as much as it may: {loads:?}");
        drop((few, many));
        let home = bed.choose_for(Some(7));
        assert!((0..100).all(|_| bed.choose_for(Some(7)) == home));
    }

    #[test]
    fn without_a_factor_load_does_not_matter() {
        let mut bed = Bed::with_flags("consistent_hash", fleet(4), &["--hash-load-factor=0"]);
        let _running: Vec<_> = (0..100).map(|_| bed.begin_chosen_for(Some(7))).collect();
        assert_eq!(bed.in_flight().into_iter().max(), Some(100));
    }

    #[test]
    fn others_keep_their_home_while_one_session_overflows() {
        let mut bed = Bed::new("consistent_hash", fleet(8));
        let before = homes(&mut bed);
        let full = before[7];
        let _running: Vec<_> = (0..40).map(|_| bed.begin(full)).collect();
        let after = homes(&mut bed);
        assert!(before.iter().zip(&after).all(|(home, now)| *home == full || home == now));
        assert!(after.iter().all(|now| *now != full));
    }

    #[test]
    fn prompts_that_begin_alike_go_together_and_a_session_outranks_them() {
        let mut bed = Bed::new("consistent_hash", fleet(8));
        let mut home = |session, chunks: &[u64]| {
            bed.prompt = Prompt::new(chunks.to_vec(), 0, 0);
            bed.choose_for(session)
        };
        let alike = home(None, &[1, 2, 3]);
        assert!((0..50).all(|rest| home(None, &[1, 2, rest]) == alike));
        let mut others: Vec<usize> = (0..50).map(|second| home(None, &[1, second])).collect();
        others.sort_unstable();
        others.dedup();
        assert!(others.len() >= 6, "{others:?}");
        let session = home(Some(99), &[]);
        assert!((0..50).all(|chunk| home(Some(99), &[chunk, chunk]) == session));
    }

    #[test]
    fn what_has_no_key_is_spread() {
        let mut bed = Bed::new("consistent_hash", fleet(4));
        assert_eq!(bed.counts(40), [10, 10, 10, 10]);
    }
}
