//! One proxy's part in the exchange of news, as values.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crossbeam_channel::Receiver;

use crate::{
    base::Millis,
    routing::{Density, Event, Shared},
    sync::{
        Claim, Quota,
        ancestry::Ancestry,
        codec::{Chunks, Header, MOST_CHUNKS, Reader, Record, State, Unreadable, Writer},
        peers::{Losses, Peer, Peers},
        roster::Roster,
    },
    telemetry::metrics::SyncFigures,
    workers::{BreakerState, FleetHandle, Health, Load, StoredResponses, Worker},
};

/// A proxy that has nothing to tell says so this often, in milliseconds.
pub const HEARTBEAT_MS: u64 = 500;

/// A peer that was not heard for so long is gone, and its load with it, in milliseconds.
pub const PEER_MS: u64 = 2500;

/// All loads are told anew so often, changed or not, in milliseconds: who has missed some has them again.
const FULL_MS: u64 = 1000;

/// A worker whose breaker a peer has opened is preferred less for so long, in milliseconds.
const SET_BACK_MS: u64 = 1000;

/// What Redis needs for an entry of a stream beside what is in it, in bytes, about.
const ENTRY_OVERHEAD: u64 = 100;

/// What an entry is taken for until some were seen, in bytes.
const ENTRY_BYTES: f64 = 1024.0;

/// Entries that the stream has room for, whatever it may take: so that who reads it is not overtaken. The largest are
/// 8 MiB.
const LEAST_ENTRIES: u64 = 128;

/// Entries that it may have at most.
const MOST_ENTRIES: u64 = 1_000_000;

/// Entries that their mean size is taken of, about.
const MEAN_OF: f64 = 256.0;

/// Links that are followed for the prompts of one batch at most: those of ten thousand ordinary ones. A batch that
/// names the longest prompt again and again costs no more.
const MOST_LINKS: usize = 1 << 18;

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
    roster: Roster,
    peers: Peers,
    ancestry: Ancestry,
    /// Number of the next batch.
    sequence: u64,
    /// When the last batch was composed.
    composed_at: Option<Millis>,
    anew: Anew,
    tour: Tour,
    /// What did not fit into the last batch.
    left_over: Option<Event>,
    /// Mean size of entries in Redis, in bytes.
    entry_bytes: f64,
    /// Position in the fleet of the workers of the batch that is being read; `None`: not ours.
    named: Vec<Option<usize>>,
    chain: Vec<u64>,
    /// Of [`MOST_LINKS`] those that are left for the batch that is being read.
    links_left: usize,
    /// What was claimed of the common limit when that was read again last.
    own_claim: Option<Claim>,
    claims: Vec<(u64, Claim)>,
    /// It was said that there is one who shares nothing with us.
    met_stranger: bool,
}

/// Whether others have been told that the stream has begun anew. Until that is read again in the stream, nothing
/// that was told is taken for known: it may have been told before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Anew {
    /// There is nothing to be told.
    Settled,
    /// The next batch says it.
    Due,
    /// The batch with this number has said it.
    Told(u64),
}

/// The look at all workers' loads. One that finds more than fits into a batch goes on with the next one.
#[derive(Debug, Default)]
struct Tour {
    /// When the last one began. Within a millisecond there is no second one, so that composing comes to an end.
    begun_at: Option<Millis>,
    /// When the last one began in which everything is told.
    full_at: Option<Millis>,
    /// Position of the worker that is looked at next; the next tour begins where this one ends, so that all get
    /// their turn.
    next: usize,
    /// Workers that this one has not looked at.
    left: usize,
    /// By position in the fleet: what was told last; `None`: it is to be told.
    told: Vec<Option<Told>>,
    /// What was claimed last of the common limit.
    claim: Option<Claim>,
}

/// Another proxy, of which a batch is being read.
#[derive(Debug, Default)]
struct Other {
    /// `None`: what it says is not of now, or not heard; only losses, prompts and responses count.
    peer: Option<Peer>,
    /// `None`: the batch was read before.
    losses: Option<Losses>,
}

/// What was told of a worker.
type Told = (Load, State, u32);

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shape = f.debug_struct("Replica");
        shape.field("instance", &self.parts.instance).field("peers", &self.peers.len());
        shape.finish_non_exhaustive()
    }
}

impl Replica {
    /// Nothing was told yet, and nothing heard.
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            roster: Roster::default(),
            peers: Peers::default(),
            ancestry: Ancestry::default(),
            sequence: 1,
            composed_at: None,
            anew: Anew::Settled,
            tour: Tour::default(),
            left_over: None,
            entry_bytes: ENTRY_BYTES,
            named: Vec::new(),
            chain: Vec::new(),
            links_left: MOST_LINKS,
            own_claim: None,
            claims: Vec::new(),
            met_stranger: false,
        }
    }

    /// The next batch to be added to the stream. `None`: there is nothing new, and something was told less than
    /// [`HEARTBEAT_MS`] ago. To be called until then: what does not fit into one batch is in the next.
    ///
    /// Loads are looked at once per millisecond at most.
    pub fn compose(&mut self, now: Millis) -> Option<Vec<u8>> {
        self.follow_fleet();
        let header = self.header(false);
        let mut batch = Writer::new(header, self.roster.workers().len());
        self.tour(now, &mut batch);
        let events = self.write_events(&mut batch);
        let silent = self.composed_at.is_none_or(|at| now.saturating_sub(at) >= HEARTBEAT_MS);
        if batch.is_empty() && !silent && !header.begins_anew {
            return None;
        }
        if header.begins_anew {
            self.anew = Anew::Told(header.sequence);
        }
        self.sequence += 1;
        self.composed_at = Some(now);
        let batch = batch.finish();
        count(&self.parts.figures.bytes_sent, batch.len() as u64);
        count(&self.parts.figures.events_sent, events);
        Some(batch)
    }

    /// Takes in an entry of the stream, one after the other, own ones included. `age_ms`: how long ago it was added, as
    /// far as is known: of what is older than a peer's life only what was sent, stored and lost counts. What cannot be
    /// read is counted and skipped.
    pub fn receive(&mut self, now: Millis, age_ms: u64, entry: &[u8]) {
        self.follow_fleet();
        let bytes = entry.len() as u64 + ENTRY_OVERHEAD;
        self.ancestry.advance(bytes);
        self.entry_bytes += (bytes as f64 - self.entry_bytes) / MEAN_OF;
        let (header, reader) = match Reader::open(entry) {
            Ok(opened) => opened,
            Err(unreadable) => return self.skipped(unreadable),
        };
        // every reader does so at the same place of the stream
        if header.begins_anew {
            self.ancestry.clear();
        }
        if header.instance == self.parts.instance {
            self.echoed(&header);
            self.read(now, reader, &mut None);
            // what is claimed is this proxy's from here on, as far as others have left it in the stream up to here
            self.settle(now);
            return;
        }
        count(&self.parts.figures.bytes_received, entry.len() as u64);
        let Header { instance, sequence, .. } = header;
        let peer = self.peers.take(instance, sequence, now, age_ms);
        let losses = self.peers.take_losses(instance, sequence);
        let mut other = Some(Other { peer, losses });
        let events = self.read(now, reader, &mut other);
        let Other { peer, losses } = other.unwrap_or_default();
        if let Some(peer) = peer {
            self.peers.put(instance, peer);
        }
        if let Some(losses) = losses {
            self.peers.put_losses(instance, losses);
        }
        if header.farewell {
            self.peers.remove(header.instance);
        }
        self.publish();
        // the last: who sees them counted finds them, and the load that came with them, in use
        count(&self.parts.figures.events_received, events);
    }

    /// Forgets peers that are gone.
    pub fn expire(&mut self, now: Millis) {
        self.follow_fleet();
        self.peers.expire(now);
        self.publish();
        self.settle(now);
    }

    /// Nothing can be told now: of what is to be told the oldest goes, so that there is room for the latest.
    pub fn make_room(&self) {
        self.parts.shared.journal.make_room(&self.parts.events);
    }

    /// The stream was not there any more when the last batch was to be added: what was told before nobody can read.
    pub fn begin_anew(&mut self) {
        self.anew = Anew::Due;
        // also loads, to whoever begins to read now
        self.tour.full_at = None;
    }

    /// The last words: peers need not wait until this proxy's load expires.
    pub fn farewell(&mut self) -> Vec<u8> {
        let batch = Writer::new(self.header(true), 0).finish();
        self.sequence += 1;
        count(&self.parts.figures.bytes_sent, batch.len() as u64);
        batch
    }

    /// Entries that the stream may have so that it does not take more than [`Parts::stream_bytes`].
    pub fn stream_entries(&self) -> u64 {
        let entries = self.parts.stream_bytes as f64 / self.entry_bytes.max(1.0);
        (entries as u64).clamp(LEAST_ENTRIES, MOST_ENTRIES)
    }

    /// Bytes of the stream that everybody can be expected to have read, whenever they began: half of what is kept, so
    /// that nothing depends on how well the other half is estimated.
    fn known_bytes(&self) -> u64 {
        let kept = (self.stream_entries() as f64 * self.entry_bytes) as u64;
        kept.min(self.parts.stream_bytes) / 2
    }

    fn header(&self, farewell: bool) -> Header {
        Header {
            begins_anew: self.anew == Anew::Due,
            farewell,
            instance: self.parts.instance,
            sequence: self.sequence,
        }
    }

    fn follow_fleet(&mut self) {
        let Some(moved) = self.roster.follow(&self.parts.fleet) else { return };
        moved.left.iter().for_each(|worker| worker.set_peers_load(Load::default()));
        self.peers.moved(&moved);
        self.peers.tell(self.roster.workers());
        (self.tour.next, self.tour.left) = (0, 0);
        self.tour.told = vec![None; moved.from.len()];
    }

    /// Writes what has changed of workers' loads and of what is claimed of the common limit.
    fn tour(&mut self, now: Millis, batch: &mut Writer) {
        let (workers, tour) = (self.roster.workers(), &mut self.tour);
        if tour.left == 0 && tour.begun_at != Some(now) {
            if tour.full_at.is_none_or(|at| now.saturating_sub(at) >= FULL_MS) {
                tour.full_at = Some(now);
                tour.told.fill(None);
                tour.claim = None;
            }
            (tour.begun_at, tour.left) = (Some(now), workers.len());
            let claim = self.parts.quota.as_ref().map(|quota| quota.claim());
            if let Some(slots) = claim.filter(|_| claim != tour.claim) {
                batch.slots(slots);
                tour.claim = claim;
            }
        }
        while tour.left > 0 {
            let position = tour.next % workers.len().max(1);
            if let (Some(worker), Some(told)) = (workers.get(position), tour.told.get_mut(position)) {
                let (load, state) = (worker.own_load(), State::of(worker));
                let losses = self.roster.own_losses(position);
                if *told != Some((load, state, losses)) {
                    if !batch.load((position, worker.key()), load, state, losses) {
                        return;
                    }
                    *told = Some((load, state, losses));
                }
            }
            tour.next = position + 1;
            tour.left -= 1;
        }
    }

    /// Writes events until there are no more or the batch is full; returns how many.
    fn write_events(&mut self, batch: &mut Writer) -> u64 {
        let mut written = 0;
        while let Some(event) = self.left_over.take().or_else(|| self.parts.events.try_recv().ok()) {
            if !self.write_event(batch, &event) {
                self.left_over = Some(event);
                break;
            }
            written += 1;
        }
        written
    }

    /// Writes an event unless it does not fit. What concerns a worker that is gone is dropped.
    fn write_event(&self, batch: &mut Writer, event: &Event) -> bool {
        let (Event::Sent { worker, .. } | Event::Ended { worker, .. } | Event::Stored { worker, .. }) = event;
        let position = self.roster.by_id(*worker);
        let Some((position, worker)) = position.and_then(|at| Some((at, self.roster.worker(at)?))) else {
            return true;
        };
        let at = (position, worker.key());
        match event {
            Event::Sent { density, chunks, .. } => {
                let told = match self.anew {
                    Anew::Settled => self.ancestry.told(chunks, self.known_bytes()),
                    Anew::Due | Anew::Told(_) => 0,
                };
                let (known, new) = chunks.split_at_checked(told).unwrap_or((&[], chunks));
                batch.sent(at, *density, known.last().copied(), new)
            }
            Event::Ended { density, last, generated, .. } => batch.ended(at, *density, *last, *generated),
            Event::Stored { response, .. } => batch.stored(at, *response),
        }
    }

    /// One of our own batches was read again.
    fn echoed(&mut self, header: &Header) {
        if let Anew::Told(told) = self.anew {
            self.anew = match header.sequence {
                sequence if sequence < told => self.anew,
                sequence if sequence == told => Anew::Settled,
                // that batch was lost
                _ => Anew::Due,
            };
        }
    }

    /// Takes in the records of a batch, whose worth depends on whose they are: own ones (`None`), and those that were read
    /// before, only say what the others know now. Returns how many events were new.
    fn read(&mut self, now: Millis, mut reader: Reader<'_>, other: &mut Option<Other>) -> u64 {
        let own = other.is_none();
        let new = other.as_ref().is_some_and(|other| other.losses.is_some());
        self.named.clear();
        self.links_left = MOST_LINKS;
        let mut events = 0;
        loop {
            let record = match reader.next() {
                Ok(Some(record)) => record,
                Ok(None) => break,
                Err(unreadable) => {
                    self.skipped(unreadable);
                    break;
                }
            };
            match record {
                Record::Worker(key) => self.named.push(self.roster.by_key(key)),
                Record::Load { worker, load, state, losses } => {
                    if let (Some(position), Some(other)) = (self.position(worker), other.as_mut()) {
                        self.hear(now, other, position, (load, state, losses));
                    }
                }
                Record::Slots(claim) if own => self.own_claim = Some(claim),
                Record::Slots(claim) => {
                    if let Some(peer) = other.as_mut().and_then(|other| other.peer.as_mut()) {
                        peer.claims(claim);
                    }
                }
                Record::Sent { worker, density, parent, chunks } => {
                    self.sent(self.position(worker).filter(|_| new), density, parent, chunks);
                    events += 1;
                }
                Record::Ended { worker, density, last, generated } => {
                    self.ended(self.position(worker).filter(|_| new), density, last, generated);
                    events += 1;
                }
                Record::Stored { worker, response } => {
                    let worker = self.position(worker).and_then(|position| self.roster.worker(position));
                    if let Some(worker) = worker.filter(|_| new) {
                        self.parts.stored.put(response, worker.id());
                    }
                    events += 1;
                }
            }
        }
        let ours = self.named.iter().any(Option::is_some);
        if let Some(peer) = other.as_mut().and_then(|other| other.peer.as_mut())
            && !self.named.is_empty()
            && peer.names(ours)
            && !std::mem::replace(&mut self.met_stranger, true)
        {
            tracing::warn!(
                "another proxy on this Redis names none of this proxy's workers; with it nothing is shared (the \
                 same worker needs the same URL everywhere)"
            );
        }
        if new { events } else { 0 }
    }

    /// Position in the fleet of a worker of the batch that is being read; `None`: it is not ours.
    fn position(&self, number: usize) -> Option<usize> {
        self.named.get(number).copied().flatten()
    }

    /// Another proxy tells of a worker.
    fn hear(&mut self, now: Millis, other: &mut Other, position: usize, (load, state, losses): Told) {
        if let Some(peer) = &mut other.peer {
            self.peers.set_load(peer, position, load);
            let before = peer.thinks(position, state);
            if let Some(worker) = self.roster.worker(position) {
                advise(worker, before, state, now);
            }
        }
        let server = self.roster.server_of(position);
        if other.losses.as_mut().is_some_and(|before| before.grow(server, losses)) {
            self.roster.lost_elsewhere(position);
        }
    }

    /// A prompt was sent to the worker at `position`; `None`: that is known, or it is none of ours.
    fn sent(&mut self, position: Option<usize>, density: Density, parent: Option<u64>, chunks: Chunks<'_>) {
        let mut before = parent.unwrap_or(0);
        for chunk in chunks.iter() {
            self.ancestry.put(chunk, before);
            before = chunk;
        }
        let Some(worker) = position.and_then(|position| self.roster.worker(position)) else { return };
        self.chain.clear();
        let (chain, left) = (&mut self.chain, &mut self.links_left);
        // without its beginning nobody could find it
        if parent.is_none_or(|parent| self.ancestry.chain(parent, left, chain)) {
            chain.extend(chunks.iter());
            chain.truncate(MOST_CHUNKS);
            self.parts.shared.heard_sent(worker, density, chain);
        }
    }

    /// The request of a prompt has ended on the worker at `position`.
    fn ended(&mut self, position: Option<usize>, density: Density, last: u64, generated: u32) {
        let Some(worker) = position.and_then(|position| self.roster.worker(position)) else { return };
        self.chain.clear();
        // also of what is not known, the generated text lies there
        self.ancestry.chain(last, &mut self.links_left, &mut self.chain);
        self.parts.shared.heard_ended(worker, density, &self.chain, generated);
    }

    /// Says what the peers make together, as far as that has changed.
    fn publish(&mut self) {
        self.peers.tell(self.roster.workers());
        self.parts.figures.peers.store(self.peers.len() as u64, Relaxed);
    }

    /// Takes this proxy's part of the common limit.
    fn settle(&mut self, now: Millis) {
        let Some(quota) = &self.parts.quota else { return };
        if self.parts.shared.journal.is_alone() {
            quota.alone(now);
        } else {
            self.peers.claims(&mut self.claims);
            quota.settle(now, (self.parts.instance, self.own_claim), &self.claims);
        }
    }

    fn skipped(&self, unreadable: Unreadable) {
        let figures = &self.parts.figures;
        count(
            match unreadable {
                Unreadable::Version => &figures.skipped_version,
                Unreadable::Malformed => &figures.skipped_malformed,
            },
            1,
        );
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Relaxed);
}

/// What a peer says of a worker is no verdict: where it newly thinks worse of it than we do, we look ourselves.
fn advise(worker: &Worker, before: Option<State>, says: State, now: Millis) {
    let fell = says.health == Health::Down
        && before.is_none_or(|before| before.health != Health::Down)
        && worker.health() != Health::Down;
    let rests = says.rest.is_some()
        && before.is_none_or(|before| before.rest != says.rest)
        && worker.rest() != says.rest;
    let opened = says.breaker == BreakerState::Open
        && before.is_none_or(|before| before.breaker != BreakerState::Open);
    if opened {
        worker.set_back(now.saturating_add(SET_BACK_MS));
    }
    if fell || rests || opened {
        worker.doubt();
    }
}

#[cfg(test)]
mod tests;
