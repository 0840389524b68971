//! What each worker's cache still holds: one least-recently-used order per worker, by ticks, without a lock.
//!
//! A worker has a seat. A seat has a clock that counts what is put into the cache, in ticks of 1/[`GRAIN`] of its
//! capacity; an entry carries the tick at which it was last put or renewed; and whatever is not newer than the
//! seat's *horizon* is gone. A ring counts how many entries carry each tick, so that raising the horizon by one
//! tick, which is how something is evicted, knows how many entries that frees. Emptying a cache is raising its
//! horizon beyond every tick that was given out.
//!
//! What is being used cannot be evicted before it is put down again. So an entry may be given a tick ahead of the
//! clock, that of the time at which it will presumably be put down. If more is in use than fits, some of that is
//! evicted all the same: then the horizon passes the clock, and whoever puts something next moves the clock on.
//!
//! **Why the ring is long enough.** In a cache of C chunks an entry is gone before C others were put in after its
//! last use, which takes the clock [`GRAIN`] ticks. Renewals move the clock as well, so that what was renewed at
//! different times can go at different times; but they may go on for ever while an old entry stays, so they move
//! it the less, the fuller the ring is, and not at all when it is half full. The other half is enough for what
//! is put in. Should the capacity be told differently so often that it is not, the oldest ticks go early.
//!
//! **Races.** Whoever changes an entry (by compare and exchange, so there is one) moves its count. A count can
//! come late, behind the sweep of its cell; then the ring is wrong by that much until the clock comes near the cell
//! again and sweeps it, so that mistakes do not add up.
//! All operations are relaxed: nothing is published through these figures, they only decide what is believed.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::routing::prefix::memory;

/// Ticks that a cache's capacity is divided into: what is evicted at once is about this part of it.
pub(super) const GRAIN: u64 = 128;

/// Cells of a seat's ring, one per tick; 32 KiB, of memory that is used when the clock comes there.
const CELLS: u32 = 8192;

/// Cells in front of the clock that no tick which is held may have, so that they can be emptied before it comes.
const AHEAD: u32 = 64;

/// Ticks that an entry's may be ahead of the clock at most: a whole capacity.
const LEAD: u32 = GRAIN as u32;

/// Ticks from the horizon to the clock at most; more is evicted.
const WINDOW: u32 = CELLS - LEAD - 2 * AHEAD;

/// A tick in the fixed point of clocks: 32 bits of it are a fraction.
const TICK: u64 = 1 << 32;

/// Tries to raise a horizon that others are raising as well.
const TRIES: usize = 8;

/// Whether `tick` is later than `horizon`, on clocks that go round.
pub(super) fn later(tick: u32, horizon: u32) -> bool {
    tick.wrapping_sub(horizon).cast_signed() > 0
}

/// One seat's clock and count; a line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Clock {
    /// Fixed point, see [`TICK`].
    now: AtomicU64,
    /// Entries that are held: the sum of the ring.
    live: AtomicI64,
    /// Generation of the worker's cache that was seen last, plus one; 0: none.
    generation: AtomicU64,
}

/// The seats, by number.
#[derive(Debug)]
pub(super) struct Seats {
    clocks: Box<[Clock]>,
    /// Beside each other, because every match reads those of many seats and they change seldom.
    horizons: Box<[AtomicU32]>,
    /// [`CELLS`] for each seat: how many entries carry the tick that is the cell's number modulo [`CELLS`].
    rings: Box<[AtomicI32]>,
}

impl Seats {
    pub(super) fn new(count: usize) -> Self {
        let clock =
            |_| Clock { now: AtomicU64::new(TICK), live: AtomicI64::new(0), generation: AtomicU64::new(0) };
        Self {
            clocks: (0..count).map(clock).collect(),
            horizons: (0..count).map(|_| AtomicU32::new(0)).collect(),
            rings: memory::counts(count * CELLS as usize),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.clocks.len()
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.clocks) + size_of_val(&*self.horizons) + size_of_val(&*self.rings)
    }

    /// `None`: there is no such seat.
    pub(super) fn horizon(&self, seat: usize) -> Option<u32> {
        Some(self.horizons.get(seat)?.load(Relaxed))
    }

    /// Whether an entry of this seat and tick is held.
    pub(super) fn holds(&self, seat: usize, tick: u32) -> bool {
        self.horizon(seat).is_some_and(|horizon| later(tick, horizon))
    }

    /// Ticks since `tick` on the seat's own clock: parts of its capacity, comparable between seats.
    pub(super) fn age(&self, seat: usize, tick: u32) -> u32 {
        let now = self.clocks.get(seat).map_or(0, |clock| whole(clock.now.load(Relaxed)));
        // a clock that was read before the entry was made is behind it
        if later(now, tick) { now.wrapping_sub(tick) } else { 0 }
    }

    pub(super) fn live(&self, seat: usize) -> u64 {
        let live = self.clocks.get(seat).map_or(0, |clock| clock.live.load(Relaxed));
        u64::try_from(live).unwrap_or(0)
    }

    /// One entry of this tick is gone otherwise than by the horizon.
    pub(super) fn forget(&self, seat: usize, tick: u32) {
        self.count(seat, tick, -1);
    }

    /// Everything that the seat holds is gone.
    pub(super) fn clear(&self, seat: usize) {
        if let Some(clock) = self.clocks.get(seat) {
            // who is putting something at this moment does so at a tick that is gone with the rest
            let last = whole(clock.now.fetch_add(TICK * u64::from(LEAD + 1), Relaxed)).wrapping_add(LEAD);
            self.raise(seat, last);
            // also what was counted too late
            self.sweep(seat, last, CELLS);
        }
    }

    /// Clears the seat if the generation of the worker's cache is a later one than the last that was seen.
    pub(super) fn follow(&self, seat: usize, generation: u32) {
        let Some(cell) = self.clocks.get(seat).map(|clock| &clock.generation) else { return };
        let mut seen = cell.load(Relaxed);
        for _ in 0..TRIES {
            // truncation is meant: generations go round at 32 bits
            let newer = later(generation, (seen.wrapping_sub(1) & u64::from(u32::MAX)) as u32);
            if seen != 0 && !newer {
                return;
            }
            match cell.compare_exchange(seen, u64::from(generation) + 1, Relaxed, Relaxed) {
                Ok(0) => return,
                Ok(_) => return self.clear(seat),
                Err(other) => seen = other,
            }
        }
    }

    /// Adds to the entries of a tick and to what is held; nothing if that tick has been swept.
    fn count(&self, seat: usize, tick: u32, entries: i32) {
        if let (Some(clock), true) = (self.clocks.get(seat), entries != 0 && self.holds(seat, tick)) {
            self.cell(seat, tick).fetch_add(entries, Relaxed);
            clock.live.fetch_add(entries.into(), Relaxed);
        }
    }

    /// Of a seat that there is.
    fn cell(&self, seat: usize, tick: u32) -> &AtomicI32 {
        &self.rings[seat * CELLS as usize + (tick % CELLS) as usize]
    }

    /// Raises the horizon of a seat that there is; who raises it sweeps the cells that fall behind.
    fn raise(&self, seat: usize, to: u32) {
        let mut horizon = self.horizons[seat].load(Relaxed);
        for _ in 0..TRIES {
            if !later(to, horizon) {
                return;
            }
            match self.horizons[seat].compare_exchange(horizon, to, Relaxed, Relaxed) {
                Ok(_) => return self.sweep(seat, to, to.wrapping_sub(horizon)),
                Err(other) => horizon = other,
            }
        }
    }

    /// Empties the cells of `count` ticks that end with `last`, of a seat that there is.
    fn sweep(&self, seat: usize, last: u32, count: u32) {
        let mut freed = 0;
        for back in 0..count.min(CELLS) {
            let cell = self.cell(seat, last.wrapping_sub(back));
            if cell.load(Relaxed) != 0 {
                freed += i64::from(cell.swap(0, Relaxed));
            }
        }
        if freed != 0 {
            self.clocks[seat].live.fetch_sub(freed, Relaxed);
        }
    }

    /// Raises the horizon of a seat that there is until it holds no more than `capacity`.
    fn evict(&self, seat: usize, capacity: i64) {
        let clock = &self.clocks[seat];
        for _ in 0..CELLS {
            if clock.live.load(Relaxed) <= capacity {
                return;
            }
            let next = self.horizons[seat].load(Relaxed).wrapping_add(1);
            let last = whole(clock.now.load(Relaxed)).wrapping_add(LEAD);
            if !later(last, next) {
                return;
            }
            self.raise(seat, next);
        }
    }

    /// Moves the clock of a seat behind its horizon, should that have passed it: when more is in use than fits, what
    /// is ahead of the clock is evicted as well, and what is put then must still count.
    fn catch_up(&self, seat: usize) {
        let (Some(clock), Some(horizon)) = (self.clocks.get(seat), self.horizon(seat)) else { return };
        let now = whole(clock.now.load(Relaxed));
        if !later(now, horizon) {
            let missing = horizon.wrapping_add(1).wrapping_sub(now);
            let before = clock.now.fetch_add(u64::from(missing) * TICK, Relaxed);
            let now = whole(before).wrapping_add(missing);
            self.sweep(seat, now.wrapping_add(LEAD + AHEAD), missing);
        }
    }

    /// Raises the horizon of a seat that there is over ticks that nothing carries. What is being put now may not
    /// be counted yet, so the latest quarter of the ring is left alone.
    fn creep(&self, seat: usize, now: u32) {
        let mut to = self.horizons[seat].load(Relaxed);
        if !later(now, to) {
            // who evicts at this moment has passed the clock
            return;
        }
        let mut left = now.wrapping_sub(to).saturating_sub(CELLS / 4).min(CELLS);
        while left > 0 && self.cell(seat, to.wrapping_add(1)).load(Relaxed) <= 0 {
            to = to.wrapping_add(1);
            left -= 1;
        }
        self.raise(seat, to);
    }

    /// Begins to put something into a seat that holds `capacity` chunks, which will be in use until `lead` more were
    /// put in. `None`: there is no such seat, or it can hold nothing.
    pub(super) fn pass(&self, seat: usize, capacity: u64, lead: u64) -> Option<Pass<'_>> {
        self.catch_up(seat);
        let clock = self.clocks.get(seat)?.now.load(Relaxed);
        let step = (GRAIN * TICK).checked_div(capacity)?.max(1);
        let lead = (step * lead.min(capacity)).min(u64::from(LEAD) * TICK);
        let capacity = i64::try_from(capacity).unwrap_or(i64::MAX);
        let mut pass = Pass {
            seats: self,
            seat,
            capacity,
            step,
            lead,
            clock,
            pending: 0,
            placed: 0,
            left: 0,
            left_tick: 0,
            move_step: 0,
            weight: 1,
        };
        self.creep(seat, whole(clock));
        pass.look_at_room();
        Some(pass)
    }
}

/// The whole ticks of a clock.
fn whole(clock: u64) -> u32 {
    (clock / TICK) as u32
}

/// One putting of chunks into one seat: gives out ticks, and gathers counts, so that shared figures are written
/// once per tick and not once per chunk.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    seats: &'a Seats,
    seat: usize,
    capacity: i64,
    /// What a chunk that is put moves the clock.
    step: u64,
    /// What one that is renewed moves it.
    move_step: u64,
    /// Chunks that an entry stands for.
    weight: u32,
    /// By how much the entries' ticks are ahead of the clock.
    lead: u64,
    /// The clock as it was read last.
    clock: u64,
    /// By how much it has to be moved.
    pending: u64,
    /// Entries that carry the present tick and are not counted yet.
    placed: i32,
    /// Entries that carried `left_tick` and are not taken off yet.
    left: i32,
    left_tick: u32,
}

impl Pass<'_> {
    /// What an entry has to carry that is put now.
    pub(super) fn tick(&self) -> u32 {
        whole(self.clock.wrapping_add(self.lead))
    }

    /// Whether what is put was in use until now.
    pub(super) fn is_end(&self) -> bool {
        self.lead == 0
    }

    /// What is put from now on stands for so many chunks each. What is taken off for it may have stood for fewer or
    /// more: what that makes wrong ends when its tick is swept.
    pub(super) fn weigh(&mut self, chunks: u32) {
        self.weight = chunks;
    }

    /// An entry was put that was not held before.
    pub(super) fn inserted(&mut self) {
        self.placed += self.weight.cast_signed();
        self.advance(self.step * u64::from(self.weight));
    }

    /// So many entries more were put.
    pub(super) fn inserted_many(&mut self, mut count: u64) {
        while count > 0 {
            // as many as do not move the clock by more than a tick, the last of them included
            let few = (TICK / self.step).clamp(1, count).min(1 << 16);
            count -= few;
            self.placed += few as i32;
            self.advance(few * self.step);
        }
    }

    /// An entry that carried `from` was renewed.
    pub(super) fn moved(&mut self, from: u32) {
        if from != self.left_tick {
            self.take_off();
            self.left_tick = from;
        }
        self.left += self.weight.cast_signed();
        self.placed += self.weight.cast_signed();
        self.advance(self.move_step * u64::from(self.weight));
    }

    /// Counts everything, and evicts what is too much.
    pub(super) fn end(mut self) {
        self.sync();
        self.seats.evict(self.seat, self.capacity);
    }

    fn advance(&mut self, step: u64) {
        self.pending += step;
        if whole(self.clock.wrapping_add(self.lead).wrapping_add(self.pending)) != self.tick() {
            self.sync();
        }
    }

    fn sync(&mut self) {
        self.take_off();
        let placed = std::mem::take(&mut self.placed);
        self.seats.count(self.seat, self.tick(), placed);
        let pending = std::mem::take(&mut self.pending);
        if pending == 0 {
            return;
        }
        let before = self.seats.clocks[self.seat].now.fetch_add(pending, Relaxed);
        self.clock = before.wrapping_add(pending);
        let now = whole(self.clock);
        let passed = now.wrapping_sub(whole(before));
        if now.wrapping_sub(self.seats.horizons[self.seat].load(Relaxed)) > WINDOW {
            self.seats.raise(self.seat, now.wrapping_sub(WINDOW));
        }
        self.seats.sweep(self.seat, now.wrapping_add(LEAD + AHEAD), passed.min(AHEAD));
        self.look_at_room();
    }

    fn take_off(&mut self) {
        let left = std::mem::take(&mut self.left);
        if left > 0 {
            self.seats.count(self.seat, self.left_tick, -left);
        }
    }

    fn look_at_room(&mut self) {
        let horizon = self.seats.horizons[self.seat].load(Relaxed);
        let room = (CELLS / 2).saturating_sub(whole(self.clock).wrapping_sub(horizon));
        self.move_step = self.step * u64::from(room) / u64::from(CELLS / 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_horizon_that_has_passed_the_clock_does_not_run_on() {
        let seats = Seats::new(1);
        seats.raise(0, 50);
        seats.creep(0, 10);
        assert_eq!(seats.horizon(0), Some(50));
        seats.creep(0, CELLS / 4 + 60);
        assert_eq!(seats.horizon(0), Some(60), "over what nothing carries, up to the latest quarter");
    }
}
