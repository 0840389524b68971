//! Structured logging to stdout: one record per event, as bracket text, JSON or YAML.
//!
//! ```text
//! shard, control thread ── tracing ──▶ RecordLayer: format into a buffer ──▶ bounded queue ──▶ thread "log" ──▶ stdout
//! ```
//!
//! Logging never blocks who logs and never ends the process: a full queue (a stdout that nobody reads) drops
//! the record, a failed write (closed pipe, full disk) loses it, and both are counted by [`dropped`]. The
//! process writes to a duplicate of file descriptor 1, so that Rust's own locked and line-buffered stdout,
//! which may block, is not on the way. There is no way to switch logging off, by design: errors are always
//! told, with all details.
//!
//! It does not write access logs, rotate files or colour anything but a terminal.

mod format;
mod layer;
mod record;
mod settings;
mod writer;

use std::{
    fs::File,
    io::{self, IsTerminal},
    os::fd::AsFd,
    sync::OnceLock,
};

use thiserror::Error;
use tracing_subscriber::layer::SubscriberExt;

use layer::RecordLayer;
use writer::{Counts, WriterThread};

pub use settings::{Format, ParseLevelError, Settings, Verbosity};

/// The counts of the one writer that [`init`] started.
static COUNTS: OnceLock<Counts> = OnceLock::new();

/// Why logging could not be set up.
#[derive(Debug, Error)]
pub enum InitError {
    /// The descriptor of stdout could not be duplicated.
    #[error("stdout cannot be used for logs")]
    Stdout(#[from] io::Error),
    /// Somebody else in this process has set up tracing.
    #[error("logging is already set up")]
    Taken(#[from] tracing::subscriber::SetGlobalDefaultError),
}

/// Keeps the thread that writes; its drop waits, for a bounded time, until what is queued has been written.
#[derive(Debug)]
#[must_use = "records are lost as soon as the guard is dropped"]
pub struct Guard {
    _thread: WriterThread,
}

/// Sends every event of the process to stdout, as `settings` say, until the guard is dropped.
///
/// # Errors
/// Fails if stdout cannot be duplicated (out of descriptors), or if it was called before.
pub fn init(settings: &Settings) -> Result<Guard, InitError> {
    let stdout = io::stdout();
    let terminal = stdout.is_terminal();
    let file = File::from(stdout.as_fd().try_clone_to_owned()?);
    let (writer, thread) = WriterThread::start(file);
    let counts = thread.counts();
    let layer = RecordLayer::new(settings, terminal, writer);
    let level = settings.effective().level_filter();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(level).with(layer))?;
    // The subscriber can be set once only, so nobody can have been here before.
    COUNTS.get_or_init(|| counts);
    Ok(Guard { _thread: thread })
}

/// Records that were lost since the start of the process: the queue was full or the write failed.
pub fn dropped() -> u64 {
    COUNTS.get().map_or(0, Counts::dropped)
}

#[cfg(test)]
mod tests;
