//! The memory of the table: zero and not touched until it is used, in huge pages, and asked for before it is needed.

#![expect(unsafe_code, reason = "zeroed boxes may not be initialised for std, and hints take pointers")]

use std::sync::atomic::{AtomicI32, AtomicU64};

/// A huge page, in bytes: of x86-64, and of arm64 with ordinary ones of 4 KiB.
const HUGE_PAGE: usize = 2 << 20;

/// So many words, all 0, in huge pages where it is large: it is read all over, and with ordinary pages nearly every read
/// is a search for its page first. The kernel gives a page at its first write; since what is stored lies anywhere, a few
/// hundred chunks are enough for all of 64 MiB.
pub(super) fn words(count: usize) -> Box<[AtomicU64]> {
    let words = Box::<[AtomicU64]>::new_zeroed_slice(count);
    // SAFETY: an AtomicU64 has the representation of a u64, of which all zeros is a value.
    let words = unsafe { words.assume_init() };
    if let Some(aligned) = words.get(words.as_ptr().align_offset(HUGE_PAGE)..) {
        let bytes = size_of_val(aligned) / HUGE_PAGE * HUGE_PAGE;
        // SAFETY: it is a hint, about memory that there is; a refusal only costs time.
        unsafe { libc::madvise(aligned.as_ptr().cast_mut().cast(), bytes, libc::MADV_HUGEPAGE) };
    }
    words
}

/// So many counts, all 0.
pub(super) fn counts(count: usize) -> Box<[AtomicI32]> {
    let counts = Box::<[AtomicI32]>::new_zeroed_slice(count);
    // SAFETY: an AtomicI32 has the representation of an i32, of which all zeros is a value.
    unsafe { counts.assume_init() }
}

/// Tells the processor that `word` will be read soon. Reads of a large table are misses; asked for ahead, several
/// are under way at once, which makes a match four times as fast (`index/match_all/12k`).
pub(super) fn soon(word: &AtomicU64) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: it is a hint, and the address is that of a word that there is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(word.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}
