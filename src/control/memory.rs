//! Memory that is free but still the process's: kept for the next requests, and given back after a surge.
//!
//! By its defaults glibc gives the end of a heap back as soon as 128 KiB of it are free, and maps every large block
//! anew until one of its size was freed. With bodies of 1 MiB that was up to 60 page faults a request, a tenth of its CPU
//! time. So what is free stays; of more than [`SPARE_BYTES`] the next looks get it back.
//!
//! glibc gives the kernel back what is free at the end of a shard's heap only. After thousands of bodies there stand a
//! few small things behind them, so all of it stays: measured, 290 MiB after 4,000 bodies of 64 KiB, of which 1.5 were
//! in use. No request pays for giving it back: somebody looks now and then, and acts only where much is free
//! for longer than a moment. A heap is locked meanwhile, some milliseconds for each 100 MiB.
//!
//! Where another libc allocates (musl), nothing is done.

#![expect(unsafe_code, reason = "mallinfo2, malloc_trim and mallopt are calls of libc")]

use std::{fs, time::Duration};

/// Pause between two looks.
const LOOK: Duration = Duration::from_secs(10);

/// So much may be free and not given back, in bytes: what the next surge takes does not have to be got anew.
const SPARE_BYTES: u64 = 64 << 20;

/// Blocks from this size on are mapped for themselves and unmapped as soon as they are freed, in bytes: the most that
/// glibc allows.
const MAPPED_BYTES: usize = 32 << 20;

/// What was found by the last look.
#[derive(Debug, Default)]
struct Spare {
    /// What could not be given back the last time, in bytes.
    left: u64,
    /// Whether there was too much.
    much: bool,
}

impl Spare {
    /// Whether something is to be given back, of `free` bytes: too much was free twice in a row.
    fn look(&mut self, free: u64) -> bool {
        self.left = self.left.min(free);
        let much = free >= self.left + SPARE_BYTES;
        std::mem::replace(&mut self.much, much) && much
    }

    /// It was; so many bytes are free all the same.
    fn given_back(&mut self, free: u64) {
        *self = Self { left: free, much: false };
    }
}

/// Lets free memory be kept, and looks for as long as the control thread runs.
pub(super) async fn run() {
    keep();
    let mut spare = Spare::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(before) = free_bytes() else { continue };
        if !spare.look(before) {
            continue;
        }
        // SAFETY: it takes no pointer, and locks what it touches.
        unsafe { libc::malloc_trim(0) };
        let after = free_bytes().unwrap_or(0);
        tracing::debug!(bytes = before.saturating_sub(after), "free memory was given back");
        spare.given_back(after);
    }
}

/// From now on free memory is kept. A refusal only costs time.
fn keep() {
    let settings = [(libc::M_TRIM_THRESHOLD, SPARE_BYTES as usize), (libc::M_MMAP_THRESHOLD, MAPPED_BYTES)];
    for (setting, bytes) in settings {
        // SAFETY: it takes no pointer, and writes a number that every allocation may read at any time.
        unsafe { libc::mallopt(setting, bytes as libc::c_int) };
    }
}

/// Bytes that are resident and used for nothing, or not by way of malloc; `None` where that cannot be
/// read (there may be no descriptor).
fn free_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let resident = resident_bytes(&status)?;
    // SAFETY: it takes no pointer, and locks what it reads.
    let info = unsafe { libc::mallinfo2() };
    Some(resident.saturating_sub((info.uordblks + info.hblkhd) as u64))
}

/// `VmRSS` of `/proc/self/status` (`proc_pid_status(5)`).
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn only_what_is_free_for_longer_than_a_moment_is_given_back() {
        let mut spare = Spare::default();
        assert!(!spare.look(300 * MIB), "it may be a moment");
        assert!(!spare.look(10 * MIB));
        assert!(!spare.look(300 * MIB));
        assert!(spare.look(200 * MIB));
        spare.given_back(12 * MIB);
        for _ in 0..10 {
            assert!(!spare.look(70 * MIB), "as much may be free");
        }
    }

    #[test]
    fn what_cannot_be_given_back_is_not_tried_again_until_there_is_more() {
        let mut spare = Spare::default();
        assert!(!spare.look(300 * MIB) && spare.look(300 * MIB));
        spare.given_back(290 * MIB);
        for _ in 0..10 {
            assert!(!spare.look(300 * MIB));
        }
        assert!(!spare.look(400 * MIB) && spare.look(400 * MIB));
        spare.given_back(290 * MIB);
        assert!(!spare.look(20 * MIB), "it was in use, and is gone");
        assert!(!spare.look(90 * MIB) && spare.look(90 * MIB));
    }

    #[test]
    fn this_process_tells_what_it_holds() {
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t   11264 kB\n"), Some(11 * MIB));
        assert_eq!(resident_bytes("VmRSS: much\n"), None);
        assert!(free_bytes().is_some());
    }
}
