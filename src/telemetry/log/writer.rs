//! The thread that writes records, the bounded queue before it, and the count of what was lost.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

/// Records that wait to be written; more are dropped. At the usual 300 bytes each, 1.2 MB.
const QUEUED_RECORDS: usize = 4096;

/// How long the end of the process waits for what is queued. `tracing-appender` itself waits 1.1 s at most,
/// unless stdout is stuck.
const LAST_WORDS: Duration = Duration::from_millis(1500);

/// What was lost, by cause.
#[derive(Debug, Clone)]
pub(super) struct Counts {
    queue_full: ErrorCounter,
    failed_writes: Arc<AtomicU64>,
}

impl Counts {
    /// Records that were lost for any reason.
    pub(super) fn dropped(&self) -> u64 {
        let full = u64::try_from(self.queue_full.dropped_lines()).unwrap_or(u64::MAX);
        full.saturating_add(self.failed_writes.load(Ordering::Relaxed))
    }
}

/// Owns the thread; dropping it writes out what is queued, within [`LAST_WORDS`].
#[derive(Debug)]
pub(super) struct WriterThread {
    /// `None` only while it is being dropped.
    guard: Option<WorkerGuard>,
    counts: Counts,
}

impl WriterThread {
    /// Starts the thread; what is written to the returned queue reaches `to`, or is dropped and counted.
    pub(super) fn start(to: impl Write + Send + 'static) -> (NonBlocking, Self) {
        let failed_writes = Arc::new(AtomicU64::new(0));
        let to = CountFailures { to, failed: failed_writes.clone() };
        let (queue, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(QUEUED_RECORDS)
            .lossy(true)
            .thread_name("log")
            .finish(to);
        let counts = Counts { queue_full: queue.error_counter(), failed_writes };
        (queue, Self { guard: Some(guard), counts })
    }

    /// The counts, which outlive the thread.
    pub(super) fn counts(&self) -> Counts {
        self.counts.clone()
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        // With a full queue and a stuck stdout the guard's own drop prints to stdout, which then blocks for
        // good, or panics. On a thread of its own it can do neither to the end of the process.
        let Some(guard) = self.guard.take() else { return };
        let (done, wait) = mpsc::channel();
        let spawned = thread::Builder::new().name("log-end".to_owned()).spawn(move || {
            drop(guard);
            // Nobody listens any more after the time limit.
            let _ = done.send(());
        });
        if spawned.is_ok() {
            // Disconnected or timed out: what is lost then is lost.
            let _ = wait.recv_timeout(LAST_WORDS);
        }
    }
}

/// Counts records whose write failed, and goes on: a later one may succeed (a log disk that was full).
struct CountFailures<W> {
    to: W,
    failed: Arc<AtomicU64>,
}

impl<W: Write> Write for CountFailures<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_all(buf).map(|()| buf.len())
    }

    fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        if self.to.write_all(buf).is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
