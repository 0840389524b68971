//! The bytes of request bodies that are held in memory, over all shards.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Bodies up to this size, in bytes, are not counted: the number of connections bounds them, and most requests would
/// otherwise write to a line that all shards share.
pub const FREE_BYTES: u64 = 64 * 1024;

/// How much may be held, and how much is.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    held: AtomicU64,
}

impl Budget {
    /// `limit` bytes may be held; 0: as many as come.
    pub fn new(limit: u64) -> Arc<Self> {
        let limit = if limit == 0 { u64::MAX } else { limit };
        Arc::new(Self { limit, held: AtomicU64::new(0) })
    }

    /// Bytes that may be held.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes held now.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        let fits = |held: u64| held.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }
}

/// What one request holds of a [`Budget`], until dropped.
#[derive(Debug)]
pub struct Held<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl<'a> Held<'a> {
    /// Nothing yet.
    pub fn nothing(budget: &'a Budget) -> Self {
        Self { budget, bytes: 0 }
    }

    /// Makes it that the request holds at least `bytes`; false, and no change, if the budget does not allow it.
    pub fn cover(&mut self, bytes: u64) -> bool {
        if bytes <= FREE_BYTES || bytes <= self.bytes {
            return true;
        }
        let fits = self.budget.take(bytes - self.bytes);
        if fits {
            self.bytes = bytes;
        }
        fits
    }

    /// The request holds nothing any more.
    pub fn release(&mut self) {
        if self.bytes > 0 {
            let before = self.budget.held.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
            debug_assert!(before > 0, "bytes were given back that nobody held");
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn large_bodies_are_counted_until_they_are_gone() {
        let budget = Budget::new(3 * MIB);
        let (mut one, mut two) = (Held::nothing(&budget), Held::nothing(&budget));
        assert!(one.cover(FREE_BYTES) && budget.held() == 0, "small ones are free");
        assert!(one.cover(MIB) && one.cover(2 * MIB) && one.cover(MIB));
        assert_eq!(budget.held(), 2 * MIB, "what is held grows and is not added up");
        assert!(two.cover(MIB) && !two.cover(MIB + 1) && !one.cover(3 * MIB));
        assert_eq!(budget.held(), 3 * MIB);
        drop(one);
        assert_eq!(budget.held(), MIB);
        assert!(two.cover(3 * MIB));
        two.release();
        two.release();
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn nothing_is_no_bound() {
        let budget = Budget::new(0);
        let mut held = Held::nothing(&budget);
        assert!(held.cover(u64::MAX));
        assert!(!Held::nothing(&budget).cover(MIB), "but no overflow either");
    }
}
