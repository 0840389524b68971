//! An allocator that counts what one thread asks it for.

#![expect(unsafe_code, reason = "an allocator cannot be made without")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    // neither is made nor ended, so that asking for it allocates nothing
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

/// From now on the calling thread's allocations count, and what it makes larger.
pub(crate) fn count_this_thread() {
    COUNTED.set(true);
}

/// How many there were so far on all threads that count.
pub(crate) fn count() -> u64 {
    COUNT.load(Ordering::SeqCst)
}

struct Counting;

fn asked() {
    if COUNTED.get() {
        COUNT.fetch_add(1, Ordering::SeqCst);
    }
}

// SAFETY: the system's allocator, asked for the same things.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        asked();
        // SAFETY: whoever calls keeps what GlobalAlloc demands, of which nothing is changed here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        asked();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        asked();
        // SAFETY: as above.
        unsafe { System.realloc(old, layout, bytes) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}
