//! Whether the shards come round: each counts its ticks, and somebody else looks (`faults.md` P6).
//!
//! A shard that does not is blocked by a task, or its core is taken away. It is told, not killed: its connections
//! may still come to their ends, and nobody else could serve them.

use crate::base::Millis;

/// A shard that has not come round for so long is stalled, in milliseconds: fifty times what it should take.
const STALLED_MS: Millis = 5_000;

/// Who looks only after such a time was not running itself (stopped, or starved): then nobody was, in milliseconds.
const ASLEEP_MS: Millis = 2_000;

/// What is new about a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It has not come round for as many milliseconds.
    Stalled(Millis),
    /// It comes round again, after as many milliseconds.
    Back(Millis),
}

/// What was seen of all shards.
#[derive(Debug)]
pub struct Watchdog {
    /// Indexed by shard.
    seen: Vec<Seen>,
    looked: Millis,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    ticks: u64,
    /// When `ticks` was seen to change.
    since: Millis,
    told: bool,
}

impl Watchdog {
    /// Watches so many shards from `now` on.
    pub fn new(shards: usize, now: Millis) -> Self {
        Self { seen: vec![Seen { ticks: 0, since: now, told: false }; shards], looked: now }
    }

    /// Looks at the ticks of all shards; calls `found` for each of which something is new.
    pub fn look(&mut self, now: Millis, ticks: impl Fn(usize) -> u64, mut found: impl FnMut(usize, Found)) {
        let slept = now.saturating_sub(self.looked) >= ASLEEP_MS;
        self.looked = now;
        for (shard, seen) in self.seen.iter_mut().enumerate() {
            let ticks = ticks(shard);
            let waited = now.saturating_sub(seen.since);
            if ticks != seen.ticks {
                if seen.told {
                    found(shard, Found::Back(waited));
                }
                *seen = Seen { ticks, since: now, told: false };
            } else if slept && !seen.told {
                seen.since = now;
            } else if waited >= STALLED_MS && !seen.told {
                seen.told = true;
                found(shard, Found::Stalled(waited));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(watchdog: &mut Watchdog, now: Millis, ticks: [u64; 2]) -> Vec<(usize, Found)> {
        let mut all = Vec::new();
        watchdog.look(now, |shard| ticks[shard], |shard, found| all.push((shard, found)));
        all
    }

    #[test]
    fn p6_a_shard_that_does_not_come_round_is_told_once_and_once_when_it_is_back() {
        let mut watchdog = Watchdog::new(2, 0);
        for now in (200..10_000).step_by(200) {
            let found = look(&mut watchdog, now, [now, 7]);
            // the second shard was last seen to tick with the first look
            let expected = if now == 5_200 { vec![(1, Found::Stalled(5_000))] } else { vec![] };
            assert_eq!(found, expected, "{now}");
        }
        assert_eq!(look(&mut watchdog, 10_000, [10_000, 8]), [(1, Found::Back(9_800))]);
        assert_eq!(look(&mut watchdog, 10_200, [10_001, 9]), []);
    }

    #[test]
    fn p6_a_process_that_was_stopped_as_a_whole_has_no_stalled_shards() {
        let mut watchdog = Watchdog::new(2, 0);
        assert_eq!(look(&mut watchdog, 200, [1, 1]), []);
        assert_eq!(look(&mut watchdog, 60_000, [1, 1]), []);
        assert_eq!(look(&mut watchdog, 60_200, [2, 1]), []);
        let mut found = Vec::new();
        for now in (60_400..66_000).step_by(200) {
            found.extend(look(&mut watchdog, now, [now, 1]));
        }
        assert_eq!(found, [(1, Found::Stalled(5_000))], "but one that does not wake up with it is");
    }
}
