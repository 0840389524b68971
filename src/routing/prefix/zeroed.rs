//! Memory that is zero and not touched until it is used: the kernel gives a page at its first write, so a table
//! costs what is stored in it.

#![expect(unsafe_code, reason = "std has zeroed boxes only as memory that may not be initialised")]

use std::sync::atomic::{AtomicI32, AtomicU64};

/// So many words, all 0.
pub(super) fn words(count: usize) -> Box<[AtomicU64]> {
    let words = Box::<[AtomicU64]>::new_zeroed_slice(count);
    // SAFETY: an AtomicU64 has the representation of a u64, of which all zeros is a value.
    unsafe { words.assume_init() }
}

/// So many counts, all 0.
pub(super) fn counts(count: usize) -> Box<[AtomicI32]> {
    let counts = Box::<[AtomicI32]>::new_zeroed_slice(count);
    // SAFETY: an AtomicI32 has the representation of an i32, of which all zeros is a value.
    unsafe { counts.assume_init() }
}
