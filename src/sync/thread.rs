//! The sync thread: carries a [`Replica`]'s batches to Redis, and brings it what all proxies have added.
//!
//! A plain thread that blocks, and, with its [`Ear`], the only one that talks to Redis; nothing waits for it but the
//! start, and that for at most [`WARM`]. Once per interval it adds what there is to tell; the rest of the interval it
//! takes in what others tell. The interval is kept by our own monotonic clock.
//!
//! Redis may do anything at any time. What goes wrong ends the connection, is said once, and is tried again with
//! growing pauses; shards notice nothing but that they hear no more of the others. Of what shards tell
//! meanwhile the journal keeps the latest for the time after, as far as there is room.

use std::{
    any::Any,
    convert::Infallible,
    fmt,
    hash::{BuildHasher, RandomState},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{atomic::Ordering, mpsc},
    thread,
    time::Duration,
};

use crate::{
    base::{Backoff, Clock, Millis},
    sync::{
        Replica, Settings,
        ear::Ear,
        link::{Id, Link, Trouble},
        replica,
        settings::Address,
        standing::{News, Standing},
    },
    workers::Load,
};

/// What connecting and reading the stream's tail may take before the proxy serves; what is left of the tail is read
/// while it does.
const WARM: Duration = Duration::from_secs(2);

/// What the thread may take to end: an answer that it waits for, and the last words.
const END: Duration = Duration::from_secs(2);

/// Batches that are added at a time; what is beyond is in the next interval.
const MOST_BATCHES: usize = 64;

/// How often the stream's life is prolonged, in milliseconds.
const KEEP_MS: u64 = 60_000;

/// After so long in use it is not tried the more rarely for what was before, in milliseconds.
const STEADY_MS: u64 = 5000;

/// Pauses between attempts to reach Redis.
const PAUSES: Backoff = Backoff { initial_ms: 100, max_ms: 5000, multiplier: 2.0, jitter: 0.25 };

/// While Redis is away, peers and the room in the journal are looked after this often, in milliseconds.
const LOOK_MS: u64 = 250;

/// What the thread is made of.
#[derive(Debug)]
pub struct Parts {
    /// The clock of the shards.
    pub clock: Clock,
    /// Where Redis is, and how often it is told.
    pub settings: Settings,
    /// What is told and heard.
    pub replica: replica::Parts,
    /// A fault that a test puts in before every batch.
    pub fault: Option<fn()>,
}

/// The running thread. Dropping it tells the thread to stop, without waiting.
#[derive(Debug)]
pub struct Handle {
    clock: Clock,
    started: Millis,
    ready: mpsc::Receiver<Infallible>,
    stop: mpsc::Sender<Infallible>,
    ended: mpsc::Receiver<Infallible>,
    thread: thread::JoinHandle<()>,
}

impl Handle {
    /// Blocks until the tail of the stream was read, Redis turned out not to be usable, or two seconds are over since
    /// the start.
    pub fn wait_ready(&self) {
        let waited = Duration::from_millis(self.clock.millis().saturating_sub(self.started));
        // an error either way: nothing is ever sent
        self.ready.recv_timeout(WARM.saturating_sub(waited)).err();
    }

    /// Lets it say that this proxy goes, and waits for its end, if that does not take long: the name of a server may
    /// be looked up for longer than anybody wants to wait.
    pub fn stop(self) {
        drop(self.stop);
        match self.ended.recv_timeout(END) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                tracing::warn!("the sync thread does not end; the process goes without it");
            }
            _ => self.thread.join().unwrap_or_default(),
        }
    }
}

/// Starts the thread; `None` where no Redis is to be used.
///
/// # Errors
/// The thread cannot be started.
pub fn start(parts: Parts) -> std::io::Result<Option<Handle>> {
    let Some(address) = parts.settings.redis.address() else { return Ok(None) };
    let clock = parts.clock;
    let started = clock.millis();
    let (warm, ready) = mpsc::channel();
    let (stop, orders) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    let thread = thread::Builder::new().name("sync".to_owned()).spawn(move || {
        let _end: mpsc::Sender<Infallible> = end;
        Exchange::new(parts, address, warm, orders).run();
    })?;
    Ok(Some(Handle { clock, started, ready, stop, ended, thread }))
}

/// A number that no other proxy has.
pub fn instance() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// All that the thread owns.
struct Exchange {
    clock: Clock,
    interval_ms: u64,
    address: Address,
    parts: replica::Parts,
    replica: Replica,
    standing: Standing,
    link: Option<Link>,
    /// What is read, from behind `last` on.
    ear: Option<Ear>,
    /// Attempts in a row that have failed, or did not last.
    failures: u32,
    /// Since when Redis is in use; only of use while it is.
    used_since: Millis,
    /// The last entry that was read.
    last: Id,
    /// The stream is not there, and is to be made.
    create: bool,
    /// Redis has taken what it was told, and nothing was read since.
    taken: bool,
    /// When the stream's life was prolonged; `None`: not on this connection.
    kept: Option<Millis>,
    /// When the next batches are due.
    next: Millis,
    /// The first of our batches that was not read again yet, and when it was sent, in microseconds.
    sent: Option<(Id, u64)>,
    /// Dropped when there is nothing to wait for any more.
    warm: Option<mpsc::Sender<Infallible>>,
    orders: mpsc::Receiver<Infallible>,
    fault: Option<fn()>,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").field("link", &self.link).field("last", &self.last).finish_non_exhaustive()
    }
}

impl Exchange {
    fn new(
        parts: Parts,
        address: Address,
        warm: mpsc::Sender<Infallible>,
        orders: mpsc::Receiver<Infallible>,
    ) -> Self {
        let Parts { clock, settings, replica: parts, fault } = parts;
        let standing = Standing::new(settings.redis.is_expected(), clock.millis());
        parts.shared.journal.set_alone(standing.is_alone());
        Self {
            clock,
            interval_ms: settings.sync_interval_ms.max(1),
            address,
            replica: Replica::new(parts.clone()),
            parts,
            standing,
            link: None,
            ear: None,
            failures: 0,
            used_since: 0,
            last: Id::default(),
            create: false,
            taken: false,
            kept: None,
            next: 0,
            sent: None,
            warm: Some(warm),
            orders,
            fault,
        }
    }

    fn run(mut self) {
        while !self.is_over() {
            let rounds = catch_unwind(AssertUnwindSafe(|| {
                self.pause();
                if self.is_over() { Ok(()) } else { self.rounds() }
            }));
            let reason = match rounds {
                Ok(Ok(())) => break,
                Ok(Err(Trouble(reason))) => reason,
                Err(panic) => self.panicked(&*panic),
            };
            self.failed(&reason);
        }
        self.ear = None;
        if let Some(link) = self.link.take() {
            let mut last = self.batches(self.clock.millis());
            last.push(self.replica.farewell());
            let said = link.farewell(&last, self.replica.stream_entries());
            if let Err(Trouble(reason)) = said {
                tracing::debug!(reason, "Redis does not take our farewell");
            }
        }
    }

    /// Tells and listens, until something goes wrong or it is over.
    fn rounds(&mut self) -> Result<(), Trouble> {
        let mut link = match self.link.take() {
            Some(link) => link,
            None => self.open()?,
        };
        self.kept = None;
        while !self.is_over() {
            self.taken |= self.tell(&mut link)?;
            self.listen(&link)?;
            self.replica.expire(self.clock.millis());
        }
        self.link = Some(link);
        Ok(())
    }

    fn open(&mut self) -> Result<Link, Trouble> {
        let mut link = Link::open(&self.address, self.clock)?;
        if self.last != Id::default() && !link.has(self.last)? {
            // a copy that was behind, an older snapshot, or a stream that has moved on: of what was told before, nobody
            // knows what is there
            self.replica.begin_anew();
            self.read_from_start();
        }
        Ok(link)
    }

    /// What was read last is no place in the stream any more.
    fn read_from_start(&mut self) {
        self.last = Id::default();
        self.ear = None;
        self.sent = None;
    }

    /// Adds what there is to tell; true if Redis has taken something. A server that may only be read answers, too.
    fn tell(&mut self, link: &mut Link) -> Result<bool, Trouble> {
        let now = self.clock.millis();
        // after a delay the interval begins anew: nobody has to be told twice as much
        self.next = (self.next + self.interval_ms).clamp(now + 1, now + self.interval_ms);
        if let Some(fault) = self.fault {
            fault();
        }
        let batches = self.batches(now);
        let micros = self.clock.micros();
        let entries = self.replica.stream_entries();
        let mut added = link.add(&batches, entries, self.create)?;
        if added.is_none() && !batches.is_empty() && !self.create {
            // what was told before is not there either, and what peers tell from now on is all that there is
            if self.last != Id::default() {
                tracing::info!(redis = %self.address, "what proxies have told is not in Redis any more; it is told anew");
            }
            self.replica.begin_anew();
            self.create = true;
            self.read_from_start();
            let batches = self.batches(now);
            added = link.add(&batches, entries, self.create)?;
        }
        let Some(id) = added else { return Ok(false) };
        if std::mem::replace(&mut self.create, false) {
            // as soon as there is a stream, it has an end
            self.kept = None;
        }
        if id <= self.last {
            // another stream has taken the place of the one that was read, and its clock is behind
            self.read_from_start();
        }
        self.sent.get_or_insert((id, micros));
        if self.kept.is_none_or(|kept| now.saturating_sub(kept) >= KEEP_MS) {
            link.keep()?;
            self.kept = Some(now);
        }
        Ok(true)
    }

    fn batches(&mut self, now: Millis) -> Vec<Vec<u8>> {
        (0..MOST_BATCHES).map_while(|_| self.replica.compose(now)).collect()
    }

    /// Takes in what is added, until the next batches are due, and at least one page of it: with a Redis that takes longer
    /// than an interval to answer they are due already.
    fn listen(&mut self, link: &Link) -> Result<(), Trouble> {
        let ear = match self.ear.take() {
            Some(ear) => ear,
            None => self.open_ear()?,
        };
        loop {
            let left = self.next.saturating_sub(self.clock.millis());
            let Some(page) = ear.next(Duration::from_millis(left))? else { break };
            // it takes what it is told, and answers here as well: who may write there need not be allowed to read
            if std::mem::take(&mut self.taken) {
                self.works();
            }
            let now = self.clock.millis();
            for entry in page.entries {
                // before it is taken in: what cannot be is not read again
                self.last = entry.id;
                self.replica.receive(now, link.age_ms(now, entry.id), &entry.batch);
                if self.sent.is_some_and(|(id, _)| id <= entry.id) {
                    self.heard_ourselves();
                }
            }
            if page.complete {
                self.warm = None;
            }
            if now >= self.next || self.is_over() {
                break;
            }
        }
        self.ear = Some(ear);
        Ok(())
    }

    fn open_ear(&self) -> Result<Ear, Trouble> {
        let link = Link::open(&self.address, self.clock)?;
        Ear::open(link, self.last).map_err(|error| Trouble(format!("cannot start a thread: {error}")))
    }

    fn heard_ourselves(&mut self) {
        if let Some((_, sent)) = self.sent.take() {
            let lag = self.clock.micros().saturating_sub(sent);
            self.parts.figures.lag_micros.store(lag, Ordering::Relaxed);
        }
    }

    /// Redis has taken what was told, and lets us read.
    fn works(&mut self) {
        if !self.standing.is_up() {
            self.used_since = self.clock.millis();
        }
        let news = self.standing.works(self.clock.millis());
        self.tell_standing();
        let redis = &self.address;
        match news {
            Some(News::Back { away_ms }) => {
                tracing::info!(%redis, away_ms, "Redis is in use again; other proxies are heard");
            }
            Some(_) => tracing::info!(%redis, "Redis is in use; proxies on it choose as one"),
            None => {}
        }
    }

    /// Redis is not used until it is tried again.
    fn failed(&mut self, reason: &str) {
        let now = self.clock.millis();
        let lasted = self.standing.is_up() && now.saturating_sub(self.used_since) >= STEADY_MS;
        self.failures = if lasted { 1 } else { self.failures.saturating_add(1) };
        self.link = None;
        self.ear = None;
        self.warm = None;
        self.taken = false;
        self.sent = None;
        self.standing.hears(self.parts.figures.peers.load(Ordering::Relaxed));
        let news = self.standing.fails(self.clock.millis(), reason);
        self.tell_standing();
        let redis = &self.address;
        match news {
            Some(News::Lost) => {
                self.parts.figures.losses.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%redis, reason, "Redis is lost; this proxy chooses without the others until it is back");
            }
            Some(News::Nobody) => {
                tracing::info!(%redis, reason, "no Redis here; this proxy chooses by itself (--redis names one)");
            }
            Some(_) => {
                tracing::warn!(%redis, reason, "Redis cannot be used; this proxy chooses without the others until it can");
            }
            None => tracing::debug!(%redis, reason, "Redis can still not be used"),
        }
    }

    fn tell_standing(&self) {
        self.parts.figures.up.store(self.standing.is_up(), Ordering::Relaxed);
        let journal = &self.parts.shared.journal;
        journal.set_alone(self.standing.is_alone());
        journal.set_muted(!self.standing.is_up() && !self.standing.is_alone());
    }

    /// A fault of ours (or of the client's) costs what is known of the peers, not the proxy: all begins anew, behind
    /// the entry that was read last.
    fn panicked(&mut self, panic: &(dyn Any + Send)) -> String {
        let words = panic.downcast_ref::<&str>().copied();
        let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic");
        tracing::error!(panic = words, "the exchange with other proxies has panicked; it begins anew");
        for worker in &self.parts.fleet.load().workers {
            worker.set_peers_load(Load::default());
        }
        self.parts.instance = instance();
        self.replica = Replica::new(self.parts.clone());
        "a fault in this proxy".to_owned()
    }

    /// Waits before the next attempt, if the last one failed; who is not heard expires meanwhile.
    fn pause(&mut self) {
        let Some(pause) = self.failures.checked_sub(1) else { return };
        let chance = instance() as f64 / 2f64.powi(64);
        let mut left = PAUSES.pause_ms(pause, chance);
        while left > 0 {
            let look = left.min(LOOK_MS);
            left -= look;
            match self.orders.recv_timeout(Duration::from_millis(look)) {
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.replica.expire(self.clock.millis());
                    self.replica.make_room();
                }
                _ => return,
            }
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.orders.try_recv(), Err(mpsc::TryRecvError::Disconnected))
    }
}
