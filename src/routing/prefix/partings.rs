//! Where in a chunk prompts part: how much is shared beyond the last whole chunk that was found.
//!
//! The index knows whole chunks, and what follows them is a guess. Who sends ever new questions after the same text
//! parts anywhere; a chat that grows by short turns shares all but its last one, and what was generated comes back
//! cached. That is a property of the traffic, so it is learnt from it, where answers report cached tokens.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// The share of a chunk that is believed until more is known: prompts part in its middle.
const MIDDLE: f32 = 0.5;

/// The first reports count as in a mean over all of them and what was believed before, later ones as in a mean over
/// so many.
const REPORTS: u64 = 64;

/// Shares beyond this come from something else, such as prompts whose place in the cache was not known.
const MOST: f32 = 4.0;

/// The learnt shares; shared by all shards. Of two reports at once one may be lost.
#[derive(Debug)]
pub struct Partings {
    /// The share of the chunk behind those that were found: the lower half is an f32, the upper one counts reports.
    behind: AtomicU64,
    /// The same where not even the first chunk was found.
    first: AtomicU64,
}

impl Default for Partings {
    fn default() -> Self {
        Self {
            behind: AtomicU64::new(MIDDLE.to_bits().into()),
            first: AtomicU64::new(0.0_f32.to_bits().into()),
        }
    }
}

impl Partings {
    /// Tokens that are expected to be found of a prompt which shares `range.start` tokens for certain and parts before
    /// `range.end`. Of what is certain whole blocks of `block` tokens are found; what blocks cost of the rest is in
    /// the reports that are learnt from.
    pub fn expected(&self, range: &Range<u64>, block: u64) -> u64 {
        let span = range.end.saturating_sub(range.start) as f64;
        let share = f64::from(share_of(self.cell(range).load(Ordering::Relaxed)));
        let found = range.start as f64 + share * span;
        let certain = range.start / block.max(1) * block.max(1);
        if span == 0.0 { certain } else { certain.max(found.max(0.0) as u64) }
    }

    /// So many tokens were found of it.
    #[expect(clippy::cast_possible_truncation, reason = "half of the digits will do")]
    pub fn learn(&self, range: &Range<u64>, block: u64, found: u64) {
        let span = range.end.saturating_sub(range.start) as f64;
        // less than what is shared for certain was not parted from but evicted
        if span < 1.0 || found + block < range.start {
            return;
        }
        let share = ((found as f64 - range.start as f64) / span) as f32;
        if share.abs() > MOST {
            return;
        }
        let cell = self.cell(range);
        let old = cell.load(Ordering::Relaxed);
        let reports = ((old >> 32) + 1).min(REPORTS);
        let new = share_of(old) + (share - share_of(old)) / (reports + 1) as f32;
        cell.store(reports << 32 | u64::from(new.to_bits()), Ordering::Relaxed);
    }

    fn cell(&self, range: &Range<u64>) -> &AtomicU64 {
        if range.start == 0 { &self.first } else { &self.behind }
    }
}

/// The share in a cell.
fn share_of(cell: u64) -> f32 {
    f32::from_bits((cell & u64::from(u32::MAX)) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn until_more_is_known_prompts_part_in_the_middle_and_nothing_is_shared_without_a_chunk() {
        let partings = Partings::default();
        assert_eq!(partings.expected(&(512..640), 1), 576);
        assert_eq!(partings.expected(&(600..600), 128), 512, "only whole blocks are there");
        assert_eq!(partings.expected(&(0..128), 16), 0);
    }

    #[test]
    fn the_sum_of_what_is_expected_becomes_the_sum_of_what_is_found() {
        for (parts_at, block) in [(0.9, 16), (0.1, 1), (0.5, 128), (1.6, 16)] {
            let partings = Partings::default();
            let (mut expected, mut found) = (0, 0);
            for n in 0..4000_u64 {
                let range = 1000 + n % 500..1400 + n % 500;
                let truly = range.start + (400.0 * parts_at) as u64;
                let blocks = truly / block * block;
                if n >= 100 {
                    expected += partings.expected(&range, block);
                    found += blocks;
                }
                partings.learn(&range, block, blocks);
            }
            let off = (expected as f64 - found as f64).abs() / found as f64;
            assert!(off < 0.01, "{parts_at} {block}: {expected} for {found}");
        }
    }

    #[test]
    fn what_was_evicted_or_came_from_elsewhere_teaches_nothing() {
        let partings = Partings::default();
        for _ in 0..100 {
            partings.learn(&(5000..5400), 16, 0);
            partings.learn(&(500..600), 16, 90_000);
            partings.learn(&(500..500), 16, 500);
        }
        assert_eq!(partings.expected(&(500..600), 1), 550);
    }

    #[test]
    fn what_shares_no_whole_chunk_is_learnt_by_itself() {
        let partings = Partings::default();
        for _ in 0..1000 {
            partings.learn(&(0..400), 1, 200);
        }
        assert!((198..=200).contains(&partings.expected(&(0..400), 1)));
        assert_eq!(partings.expected(&(512..640), 1), 576);
    }
}
