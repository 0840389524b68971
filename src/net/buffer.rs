//! The buffer that is read into and written from.
//!
//! ```text
//! | headroom | filled: start..end | spare |
//! ```
//! Bytes are read behind `end` and written from `start..end`. A head that replaces the one which was read is
//! laid into the headroom, directly before the body, so that both leave in one send and the body never moves.

#![expect(unsafe_code, reason = "spare bytes are not initialised, and monoio's buffer traits are unsafe")]

use std::{fmt, mem::MaybeUninit};

use monoio::buf::{IoBuf, IoBufMut};

/// A block of bytes with room before and behind what it holds.
pub struct Buffer {
    mem: Box<[MaybeUninit<u8>]>,
    /// Invariant: `start <= end <= limit <= mem.len()`, and `mem[start..end]` is initialised.
    start: usize,
    end: usize,
    /// Reads never go beyond it, so that the next message's bytes stay in the socket.
    limit: usize,
}

impl Buffer {
    /// Room for `capacity` bytes behind `headroom` empty ones.
    pub fn new(headroom: usize, capacity: usize) -> Self {
        let size = headroom + capacity;
        Self { mem: Box::new_uninit_slice(size), start: headroom, end: headroom, limit: size }
    }

    /// A buffer that holds `bytes`, without headroom.
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(0, bytes.len());
        buffer.append(bytes);
        buffer
    }

    /// What it holds.
    pub fn filled(&self) -> &[u8] {
        let part = &self.mem[self.start..self.end];
        // SAFETY: bytes between start and end are initialised (invariant of the struct).
        unsafe { part.assume_init_ref() }
    }

    /// What it holds, to be changed in place.
    pub fn filled_mut(&mut self) -> &mut [u8] {
        let part = &mut self.mem[self.start..self.end];
        // SAFETY: bytes between start and end are initialised (invariant of the struct).
        unsafe { part.assume_init_mut() }
    }

    /// Number of bytes it holds.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes that can still be read behind those it holds.
    pub fn spare(&self) -> usize {
        self.limit - self.end
    }

    /// Size of the whole block, headroom included.
    pub fn capacity(&self) -> usize {
        self.mem.len()
    }

    /// Forgets what it holds and starts anew behind `headroom` bytes (less if the block is smaller).
    pub fn reset(&mut self, headroom: usize) {
        self.start = headroom.min(self.mem.len());
        self.end = self.start;
        self.limit = self.mem.len();
    }

    /// Lets reads fill at most `bytes` more.
    pub fn limit_spare(&mut self, bytes: usize) {
        self.limit = self.end.saturating_add(bytes).min(self.mem.len());
    }

    /// Makes room for `bytes` more. What it holds moves only where the allocator cannot enlarge the block in place.
    pub fn reserve(&mut self, bytes: usize) {
        let size = self.end.saturating_add(bytes);
        if size > self.mem.len() {
            let mut mem = std::mem::take(&mut self.mem).into_vec();
            mem.reserve_exact(size - mem.len());
            // SAFETY: there is room for so many, and bytes that are not initialised may have any value.
            unsafe { mem.set_len(size) };
            self.mem = mem.into_boxed_slice();
        }
        self.limit = self.mem.len();
    }

    /// Takes `count` bytes off the front; they become headroom.
    pub fn advance(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.end);
    }

    /// Takes back the last `count` bytes that were advanced over.
    pub(super) fn retreat(&mut self, count: usize) {
        debug_assert!(count <= self.start, "more was taken back than was ever held");
        self.start = self.start.saturating_sub(count);
    }

    /// Keeps the first `len` bytes only.
    pub fn truncate(&mut self, len: usize) {
        self.end = self.end.min(self.start.saturating_add(len));
    }

    /// Lays `bytes` directly before what it holds; false, and nothing changed, if the headroom is too small.
    pub fn prepend(&mut self, bytes: &[u8]) -> bool {
        let Some(start) = self.start.checked_sub(bytes.len()) else { return false };
        self.mem[start..self.start].write_copy_of_slice(bytes);
        self.start = start;
        true
    }

    /// Copies as much of `bytes` as fits behind what it holds; returns how much that was.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.mem.len() - self.end);
        self.mem[self.end..self.end + count].write_copy_of_slice(&bytes[..count]);
        self.end += count;
        self.limit = self.limit.max(self.end);
        count
    }

    /// Replaces the bytes `at` (counted from the front of what it holds) by `with`, moving whichever side is
    /// shorter and has the room; a new block is taken only if neither has.
    pub fn splice(&mut self, at: std::ops::Range<usize>, with: &[u8]) {
        let len = self.len();
        let (from, to) = (at.start.min(len), at.end.min(len));
        let (before, behind) = (from, len - to);
        let grown = with.len() as isize - (to - from) as isize;
        let front_fits = self.start as isize >= grown;
        let back_fits = self.end as isize + grown <= self.mem.len() as isize;
        if !front_fits && !back_fits {
            let mut new = Self::new(self.start, len + grown.unsigned_abs());
            new.append(&self.filled()[..from]);
            new.append(with);
            new.append(&self.filled()[to..]);
            *self = new;
            return;
        }
        if front_fits && (before <= behind || !back_fits) {
            let start = (self.start as isize - grown) as usize;
            self.mem.copy_within(self.start..self.start + before, start);
            self.start = start;
        } else {
            let tail = self.start + to;
            self.mem.copy_within(tail..self.end, (tail as isize + grown) as usize);
            self.end = (self.end as isize + grown) as usize;
        }
        let hole = self.start + before;
        self.mem[hole..hole + with.len()].write_copy_of_slice(with);
        self.limit = self.limit.max(self.end);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}..{} of {})", self.start, self.end, self.mem.len())
    }
}

// SAFETY: the block is on the heap and does not move with the struct; `start..end` is initialised.
unsafe impl IoBuf for Buffer {
    fn read_ptr(&self) -> *const u8 {
        self.mem[self.start..self.end].as_ptr().cast()
    }

    fn bytes_init(&self) -> usize {
        self.len()
    }
}

// SAFETY: `write_ptr` points to `bytes_total` bytes of the block behind what is held; `set_init` is told how
// many of them were written.
unsafe impl IoBufMut for Buffer {
    fn write_ptr(&mut self) -> *mut u8 {
        self.mem[self.end..self.limit].as_mut_ptr().cast()
    }

    fn bytes_total(&mut self) -> usize {
        self.spare()
    }

    unsafe fn set_init(&mut self, count: usize) {
        self.end = (self.end + count).min(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_laid_before_the_body_without_moving_it() {
        let mut buffer = Buffer::new(8, 16);
        buffer.append(b"oldhead|body");
        buffer.advance(8);
        let body = buffer.filled().as_ptr();
        assert!(buffer.prepend(b"a longer head|"));
        assert_eq!(buffer.filled(), b"a longer head|body");
        assert_eq!(buffer.filled()[14..].as_ptr(), body);
        assert!(!buffer.prepend(b"too much"));
        assert_eq!(buffer.filled(), b"a longer head|body");
    }

    #[test]
    fn reads_stop_at_the_limit() {
        let mut buffer = Buffer::new(0, 10);
        buffer.limit_spare(3);
        assert_eq!(buffer.spare(), 3);
        assert_eq!(buffer.bytes_total(), 3);
        buffer.reset(0);
        assert_eq!(buffer.spare(), 10);
    }

    #[test]
    fn a_block_that_is_enlarged_keeps_what_it_holds_and_what_is_before_it() {
        let mut buffer = Buffer::new(8, 4);
        buffer.append(b"body");
        assert_eq!(buffer.spare(), 0);
        buffer.reserve(100_000);
        assert_eq!(buffer.spare(), 100_000);
        assert!(buffer.prepend(b"the head"));
        assert_eq!(buffer.append(&[b'.'; 100_000]), 100_000);
        assert_eq!(&buffer.filled()[..14], b"the headbody..");
        buffer.limit_spare(0);
        buffer.reserve(0);
        assert_eq!((buffer.spare(), buffer.len()), (0, 100_012));
    }

    #[test]
    fn a_splice_agrees_with_the_naive_one_wherever_it_is_and_whatever_room_there_is() {
        let text: Vec<u8> = (b'a'..=b'z').collect();
        for (headroom, tail) in [(0, 0), (3, 0), (0, 3), (40, 40)] {
            for from in [0, 1, 13, 25, 26] {
                for width in [0, 1, 5] {
                    for with in ["", "X", "XYZ", "0123456789"] {
                        let to = (from + width).min(text.len());
                        let mut buffer = Buffer::new(headroom, text.len() + tail);
                        buffer.append(&text);
                        buffer.splice(from..to, with.as_bytes());
                        let naive = [&text[..from], with.as_bytes(), &text[to..]].concat();
                        assert_eq!(
                            buffer.filled(),
                            naive,
                            "{from}..{to} by {with:?}, room {headroom}/{tail}"
                        );
                    }
                }
            }
        }
    }
}
