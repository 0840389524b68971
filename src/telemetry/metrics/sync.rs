//! What is counted of the exchange with other proxies.

use std::sync::atomic::{AtomicBool, AtomicU64};

/// Figures of the sync thread: written by it, read by a scrape. Counters are monotonic.
#[derive(Debug, Default)]
pub struct SyncFigures {
    /// Whether Redis is in use now.
    pub up: AtomicBool,
    /// How long the last of our own batches took from being sent to being read again, in microseconds.
    pub lag_micros: AtomicU64,
    /// Other proxies that are heard.
    pub peers: AtomicU64,
    /// Bytes of batches that were added to the stream.
    pub bytes_sent: AtomicU64,
    /// Bytes of batches of others that were read.
    pub bytes_received: AtomicU64,
    /// Events that were added to the stream.
    pub events_sent: AtomicU64,
    /// Events of others that were read.
    pub events_received: AtomicU64,
    /// Batches that were skipped: of another version.
    pub skipped_version: AtomicU64,
    /// Batches that were skipped: they cannot be read.
    pub skipped_malformed: AtomicU64,
    /// Times that Redis was lost.
    pub losses: AtomicU64,
}
