//! One proxy's part in the exchange of news, as values.

use std::{fmt, sync::Arc};

use crossbeam_channel::Receiver;

use crate::{
    base::Millis,
    routing::{Event, Shared},
    sync::Quota,
    telemetry::metrics::SyncFigures,
    workers::{FleetHandle, StoredResponses},
};

/// A proxy that has nothing to tell says so this often, in milliseconds.
pub const HEARTBEAT_MS: u64 = 500;

/// A peer that was not heard for so long is gone, and its load with it, in milliseconds.
pub const PEER_MS: u64 = 2500;

/// What a [`Replica`] is made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Any number that no other proxy has.
    pub instance: u64,
    /// What shards write into the journal of `shared`.
    pub events: Receiver<Event>,
    /// What prompts are known by; what peers sent goes there.
    pub shared: Shared,
    /// The workers.
    pub fleet: FleetHandle,
    /// Who has stored which response.
    pub stored: Arc<StoredResponses>,
    /// This proxy's part of a limit that all share; `None`: there is none.
    pub quota: Option<Arc<Quota>>,
    /// What is counted.
    pub figures: Arc<SyncFigures>,
    /// What the stream may take in Redis, in bytes, about.
    pub stream_bytes: u64,
}

/// What one proxy tells, and what it makes of what the others tell. Pure: time is an argument.
pub struct Replica {
    parts: Parts,
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("instance", &self.parts.instance).finish_non_exhaustive()
    }
}

impl Replica {
    /// Nothing was told yet, and nothing heard.
    pub fn new(parts: Parts) -> Self {
        Self { parts }
    }

    /// The next batch to be added to the stream. `None`: there is nothing new, and something was told less than
    /// [`HEARTBEAT_MS`] ago. To be called until then: what does not fit into one batch is in the next.
    pub fn compose(&mut self, _now: Millis) -> Option<Vec<u8>> {
        None
    }

    /// Takes in an entry of the stream, one after the other, own ones included. `age_ms`: how long ago it was added, as
    /// far as is known: of what is older than a peer's life only prompts count. What cannot be read is counted and
    /// skipped.
    pub fn receive(&mut self, _now: Millis, _age_ms: u64, _entry: &[u8]) {}

    /// Forgets peers that are gone.
    pub fn expire(&mut self, _now: Millis) {}

    /// The stream was not there any more when the last batch was to be added: what was told before nobody can read.
    pub fn begin_anew(&mut self) {}

    /// The last words: peers need not wait until this proxy's load expires.
    pub fn farewell(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// Entries that the stream may have so that it does not take more than [`Parts::stream_bytes`].
    pub fn stream_entries(&self) -> u64 {
        1
    }
}
