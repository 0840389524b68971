//! Which worker holds which chunks of which prompts: one table of fixed size, shared by all shards without locks.
//!
//! An entry says that one worker holds one chunk, in one word:
//!
//! ```text
//! 63          42 41        35 34  32 31            0
//! ┌─────────────┬────────────┬──────┬───────────────┐
//! │ tag: 22 bits│ group: 7   │ slot │ tick: 32      │    0: no entry (a tag is never 0)
//! │ of the hash │  the seat's upper and lower bits  │
//! └─────────────┴────────────┴──────┴───────────────┘
//! ```
//!
//! Eight entries are a cache line, two lines a pair. The entries of one chunk for the eight seats of a group lie in
//! one pair, preferably in its one line, so that eight workers are asked by reading one line. What a seat still
//! holds is decided by its tick ([`Seats`]); an entry that is not held any more stays until its place is needed.
//! When a pair is full, the entry goes that is oldest by its own seat's clock.
//!
//! A word is read and written as a whole, and written by compare and exchange only. So a race between shards
//! can lose a touch, and never makes a match of what was not put. What is wrong once in a while is a tag that
//! another chunk of the same pair has as well: 2⁻²² for each of at most sixteen entries, so that one of some ten
//! thousand matches is too deep.
//!
//! All operations are relaxed: a word stands for itself, and nothing else is read because of it.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::routing::prefix::{
    STRIDE, memory,
    seat::{Pass, Seats, later},
};

/// Seats of a group, and entries of a line.
const GROUP: usize = 8;

/// Words of a pair of lines.
const PAIR: usize = 2 * GROUP;

/// Seats at most: what ten bits can number.
pub const MAX_SEATS: usize = 1 << SEAT_BITS;

const SEAT_BITS: u32 = 10;
const SLOT_BITS: u32 = 3;
const TICK_BITS: u32 = 32;
const TAG_BITS: u32 = 22;

/// What was touched so few ticks ago is not written again; 1.6 % of the capacity. It keeps a prompt that comes
/// again and again from being written by every shard.
const RECENT: u32 = 2;

/// Chunks that may press at once: 8 GiB of text.
const MAX_PRESSURE: u64 = 1 << 24;

/// 2⁶⁴ divided by the golden ratio, odd: spreads what differs in a few bits only.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Chunks that have to be missing before a depth is held for too deep: of what other proxies sent so few are known.
const NEAR: usize = STRIDE;

/// Chunks that are asked for ahead of the one that is looked at: as many misses are under way at once.
const AHEAD: usize = 12;

/// Which worker holds which chunks. A worker is known by its seat, a small number.
pub struct PrefixIndex {
    /// The table begins at `offset`: at a multiple of a pair's size.
    words: Box<[AtomicU64]>,
    offset: usize,
    pairs: usize,
    seats: Seats,
}

/// Where the entries of a chunk for a group are, and what they have above their slot.
#[derive(Clone, Copy)]
struct Place {
    pair: usize,
    /// The line of the pair that is preferred: 0 or 1.
    line: usize,
    /// Tag and group.
    key: u64,
    chunk: u64,
}

/// What the seats of one group are asked.
struct Query<'a> {
    chunks: &'a [u64],
    group: usize,
    /// By slot.
    horizons: [u32; GROUP],
}

impl PrefixIndex {
    /// A table of at most `bytes` (in whole pairs of lines; less than one: an index that never matches) for seats
    /// below `seats`, of which there are [`MAX_SEATS`] at most. The memory is used as it fills.
    pub fn new(bytes: usize, seats: usize) -> Self {
        const PAIR_BYTES: usize = PAIR * size_of::<AtomicU64>();
        let pairs = bytes / PAIR_BYTES;
        // one pair more than is used, so that the first can begin at a multiple of its size: a type of that
        // alignment would make the allocator write every page
        let words = memory::words(if pairs == 0 { 0 } else { (pairs + 1) * PAIR });
        let offset = words.as_ptr().align_offset(PAIR_BYTES).min(PAIR);
        let seats = if pairs == 0 { 0 } else { seats.min(MAX_SEATS) };
        Self { words, offset, pairs, seats: Seats::new(seats) }
    }

    /// Memory that it may take, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words) + self.seats.bytes()
    }

    /// How many of the leading chunks each of `seats` holds; `depths` is filled anew, in their order. Takes least
    /// where `seats` is ascending.
    ///
    /// A chunk's hash stands for everything before it, and the end of a prompt goes before its beginning: who holds a
    /// chunk holds those before it. So the depth is searched by halving, in as many steps as the number of chunks
    /// has digits, and a chunk that is missing because its place was needed makes no match shorter.
    pub fn matched(&self, chunks: &[u64], seats: &[usize], depths: &mut Vec<u32>) {
        depths.clear();
        for run in seats.chunk_by(|one, other| one / GROUP == other / GROUP) {
            let (mut wanted, mut horizons, mut found) = (0_u8, [0; GROUP], [0; GROUP]);
            for &seat in run {
                if let Some(horizon) = self.seats.horizon(seat) {
                    wanted |= 1 << (seat % GROUP);
                    horizons[seat % GROUP] = horizon;
                }
            }
            let group = run.first().map_or(0, |seat| seat / GROUP);
            self.halve(&Query { chunks, group, horizons }, 0..chunks.len(), wanted, &mut found);
            depths.extend(run.iter().map(|seat| found[seat % GROUP]));
        }
    }

    /// Finds the depth of each of `slots`, all of which hold what is before `span` and none what is behind it. Calls
    /// itself when they part, so seven times at most.
    fn halve(&self, query: &Query<'_>, mut span: Range<usize>, mut slots: u8, found: &mut [u32; GROUP]) {
        while slots != 0 && !span.is_empty() {
            // the first chunk first: most often nobody has it
            let middle = if span.start == 0 { 0 } else { span.start + span.len() / 2 };
            let near = query.chunks.get(middle..span.end.min(middle + NEAR)).unwrap_or_default();
            let mut held = 0;
            for &chunk in near {
                held |= self.holders(self.place(chunk, query.group), slots, &query.horizons);
                if held == slots {
                    break;
                }
            }
            if held != slots && held != 0 {
                self.halve(query, span.start..middle, slots & !held, found);
            }
            if held == 0 {
                span.end = middle;
            } else {
                slots = held;
                span.start = middle + 1;
            }
        }
        while slots != 0 {
            found[slots.trailing_zeros() as usize] = u32::try_from(span.start).unwrap_or(u32::MAX);
            slots &= slots - 1;
        }
    }

    /// Those of the wanted slots that hold a chunk, as bits.
    fn holders(&self, place: Place, wanted: u8, horizons: &[u32; GROUP]) -> u8 {
        let mut held = 0_u8;
        for line in self.lines(place) {
            // first who is meant at all, without branches: which of the eight it is cannot be predicted
            let mut meant = 0_u8;
            for (at, word) in line.iter().enumerate() {
                meant |= u8::from(word.load(Relaxed) >> (TICK_BITS + SLOT_BITS) == place.key) << at;
            }
            while meant != 0 {
                let entry = line[meant.trailing_zeros() as usize].load(Relaxed);
                held |= u8::from(later(tick(entry), horizons[slot(entry)])) << slot(entry);
                meant &= meant - 1;
            }
            if wanted & !held == 0 {
                break;
            }
        }
        held & wanted
    }

    /// A prompt is being computed at `seat`, whose cache holds `capacity` chunks: its chunks, as far as they fit,
    /// are put there or renewed. The deepest is the first to go, as vLLM frees a request's blocks from its end
    /// (`vllm/v1/core/kv_cache_manager.py`, `free`).
    ///
    /// What is in use cannot go: `lead` is how many chunks will presumably be put there until this use ends, and 0
    /// where it has ended.
    pub fn touch(&self, seat: usize, chunks: &[u64], capacity: u64, lead: u64) {
        self.put_all(seat, chunks, (1, 1), capacity, lead);
    }

    /// As [`PrefixIndex::touch`], of a prompt of which only every [`STRIDE`]th chunk and the last one are known: each
    /// stands for those before it, the last one for `tail` chunks.
    pub fn touch_sparse(&self, seat: usize, chunks: &[u64], tail: u32, capacity: u64, lead: u64) {
        self.put_all(seat, chunks, (STRIDE as u32, tail.clamp(1, STRIDE as u32)), capacity, lead);
    }

    /// Puts chunks, each of which stands for so many, and the last one for so many.
    fn put_all(&self, seat: usize, chunks: &[u64], (each, tail): (u32, u32), capacity: u64, lead: u64) {
        let fit = usize::try_from(capacity / u64::from(each)).unwrap_or(usize::MAX);
        let whole = fit >= chunks.len();
        let chunks = chunks.get(..fit).unwrap_or(chunks);
        if chunks.is_empty() {
            return;
        }
        let Some(mut pass) = self.seats.pass(seat, capacity, lead) else { return };
        // what lies before a chunk that was written is written as well, so that it does not go first
        let mut recent = RECENT;
        pass.weigh(if whole { tail } else { each });
        for (at, &chunk) in chunks.iter().enumerate().rev() {
            if let Some(&chunk) = at.checked_sub(AHEAD).and_then(|ahead| chunks.get(ahead)) {
                // a new one may go to either
                for line in self.lines(self.place(chunk, seat / GROUP)) {
                    memory::soon(&line[0]);
                }
            }
            if self.put(chunk, seat, recent, &mut pass) {
                recent = 0;
            }
            pass.weigh(each);
        }
        pass.end();
    }

    /// So many chunks more are in the cache of `seat` that no prompt can find, such as generated text.
    pub fn add_pressure(&self, seat: usize, chunks: u64, capacity: u64) {
        if chunks == 0 {
            return;
        }
        if let Some(mut pass) = self.seats.pass(seat, capacity, 0) {
            pass.inserted_many(chunks.min(capacity).min(MAX_PRESSURE));
            pass.end();
        }
    }

    /// The chunks from `from_depth` on have not come to `seat` after all. Also what another request put there in the
    /// meantime is forgotten; if that one was longer, what is behind still says that it was there.
    pub fn remove(&self, seat: usize, chunks: &[u64], from_depth: usize) {
        if self.seats.horizon(seat).is_none() {
            return;
        }
        for &chunk in chunks.get(from_depth..).unwrap_or_default() {
            if let Some((word, entry)) = self.entry(self.place(chunk, seat / GROUP), seat)
                && word.compare_exchange(entry, 0, Relaxed, Relaxed).is_ok()
            {
                self.seats.forget(seat, tick(entry));
            }
        }
    }

    /// The cache of `seat` is empty, or its worker is gone. Costs the same however much it held.
    pub fn clear(&self, seat: usize) {
        self.seats.clear(seat);
    }

    /// Clears `seat` if the generation of its worker's cache ([`crate::workers::Worker::cache_generation`]) is a
    /// later one than the last that was told. The first one is only remembered.
    pub fn follow(&self, seat: usize, generation: u32) {
        self.seats.follow(seat, generation);
    }

    /// Chunks that `seat` holds, those included that no prompt can find.
    pub fn held(&self, seat: usize) -> u64 {
        self.seats.live(seat)
    }

    /// Every word of the table.
    #[cfg(test)]
    pub(super) fn entries(&self) -> impl Iterator<Item = u64> {
        let table = &self.words[self.offset..self.offset + self.pairs * PAIR];
        table.iter().map(|word| word.load(Relaxed))
    }

    /// Puts a chunk, or renews it unless it is not older than `recent` ticks. True if it was written.
    fn put(&self, chunk: u64, seat: usize, recent: u32, pass: &mut Pass<'_>) -> bool {
        let place = self.place(chunk, seat / GROUP);
        let tick_now = pass.tick();
        let new = ((place.key << SLOT_BITS | (seat % GROUP) as u64) << TICK_BITS) | u64::from(tick_now);
        let (word, old) = self.entry(place, seat).unwrap_or_else(|| self.vacancy(place));
        let own = same_holder(old, new);
        let held = old != 0 && self.seats.holds(seat_of(old), tick(old));
        let early = !later(tick_now, tick(old).wrapping_add(recent));
        let late = later(tick(old), tick_now.wrapping_add(recent));
        if own && held && early && !(late && pass.is_end()) {
            return false;
        }
        // who comes second has lost a touch, and whoever came first has counted
        if word.compare_exchange(old, new, Relaxed, Relaxed).is_err() {
            return true;
        }
        match (own, held) {
            (true, true) => pass.moved(tick(old)),
            (false, true) => {
                self.seats.forget(seat_of(old), tick(old));
                pass.inserted();
            }
            (_, false) => pass.inserted(),
        }
        true
    }

    /// The entry of a seat at a place. Should a race have made two, the other one is left to age.
    fn entry(&self, place: Place, seat: usize) -> Option<(&AtomicU64, u64)> {
        let holder = place.key << SLOT_BITS | (seat % GROUP) as u64;
        let words = self.lines(place).into_iter().flatten();
        let mut entries = words.map(|word| (word, word.load(Relaxed)));
        entries.find(|(_, entry)| entry >> TICK_BITS == holder)
    }

    /// Where a new entry may be written: where there is none, else over one that is not held any more, else over
    /// the oldest.
    fn vacancy(&self, place: Place) -> (&AtomicU64, u64) {
        let [first, second] = self.lines(place);
        let mut oldest = (&first[0], 0, None);
        for word in first.iter().chain(second) {
            let entry = word.load(Relaxed);
            if entry == 0 || !self.seats.holds(seat_of(entry), tick(entry)) {
                return (word, entry);
            }
            // of those that are equally old any, not always the first: that may be the newest
            let age = self.seats.age(seat_of(entry), tick(entry));
            let age = Some((age, (entry ^ place.chunk).wrapping_mul(SPREAD)));
            if age > oldest.2 {
                oldest = (word, entry, age);
            }
        }
        (oldest.0, oldest.1)
    }

    fn place(&self, chunk: u64, group: usize) -> Place {
        let spread = (chunk ^ (group as u64).wrapping_mul(SPREAD)).wrapping_mul(SPREAD);
        // the upper bits choose the pair, the lower ones are the tag
        let pair = ((u128::from(spread) * self.pairs as u128) >> 64) as usize;
        let line = (chunk >> TAG_BITS & 1) as usize;
        let tag = (chunk & ((1 << TAG_BITS) - 1)).max(1);
        Place { pair, line, key: tag << (SEAT_BITS - SLOT_BITS) | group as u64, chunk }
    }

    /// The pair of a place, its preferred line first.
    fn lines(&self, place: Place) -> [&[AtomicU64; GROUP]; 2] {
        let [first, second] = &self.words[self.offset..].as_chunks().0.as_chunks().0[place.pair];
        if place.line == 0 { [first, second] } else { [second, first] }
    }
}

impl std::fmt::Debug for PrefixIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shape = f.debug_struct("PrefixIndex");
        shape.field("bytes", &self.bytes()).field("seats", &self.seats.len()).finish_non_exhaustive()
    }
}

fn tick(entry: u64) -> u32 {
    (entry & u64::from(u32::MAX)) as u32
}

fn slot(entry: u64) -> usize {
    (entry >> TICK_BITS) as usize % GROUP
}

fn seat_of(entry: u64) -> usize {
    (entry >> TICK_BITS) as usize % MAX_SEATS
}

/// Whether two entries are of the same chunk and seat.
fn same_holder(one: u64, other: u64) -> bool {
    one >> TICK_BITS == other >> TICK_BITS
}
