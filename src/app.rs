//! The composition root: the one file that knows every part, starts every thread and says who talks to whom.
//!
//! Sockets are bound early and served late: the port is known (and taken) before the fleet is, and nothing is
//! accepted before the first round of probes has ended.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    admin,
    admission::{self, Admission},
    base::{self, Clock, Millis},
    config::Config,
    control, demo,
    net::{self, Driver, Limits, Needs},
    proxy, routing, shard,
    shard::Orders,
    shard::{Ending, Found, Meaning, Watchdog},
    sync,
    telemetry::{self, metrics::Metrics},
    upstream::ConnectFault,
    vllm,
    workers::{FleetHandle, ModelSettings, Registry, StoredResponses, Worker},
};

/// A proxy that runs. Dropping it does not stop it: [`Running::drain`], then [`Running::wait`].
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    driver: Driver,
    fleet: FleetHandle,
    stored: Arc<StoredResponses>,
    orders: Arc<Orders>,
    metrics: Arc<Metrics>,
    shards: Vec<JoinHandle<anyhow::Result<()>>>,
    control: control::Handle,
    /// `None`: no Redis is used.
    sync: Option<sync::Handle>,
    grace: Duration,
    /// A shard has ended.
    ended: mpsc::Receiver<()>,
}

/// Faults that tests put into a proxy.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Called on a shard with the target of every request, within its connection.
    pub on_request: Option<fn(&str)>,
    /// Called on a shard with every tick, outside of any connection: a panic ends the shard.
    pub on_tick: Option<fn()>,
    /// Called on the sync thread before every batch.
    pub on_sync: Option<fn()>,
    /// Called on a shard before every connect to a worker, which fails as it says.
    pub on_connect: Option<ConnectFault>,
}

/// Starts a proxy; returns when it accepts connections.
///
/// # Errors
/// The address is taken, io_uring was demanded and is refused, or a thread cannot be started.
pub fn start(config: Config) -> anyhow::Result<Running> {
    start_with(config, Faults::default())
}

/// As [`start`], with faults.
///
/// # Errors
/// As [`start`].
pub fn start_with(config: Config, faults: Faults) -> anyhow::Result<Running> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let allowed = cores.len().max(1);
    let count = config.shards.threads.map_or(allowed.min(shard::DEFAULT_MOST), usize::from);

    // the driver first, then the sockets: a refused ring must not cost a client its connection
    let (starting, driver) = raise_shards(&config.shards, count, &cores)?;
    let address = SocketAddr::new(config.shards.host, config.shards.port);
    let patient = config.net.patient(config.proxy.write_timeout_secs);
    let listeners = net::listen(address, count, &patient)?;
    let address = listeners.first().context("no listener")?.local_addr()?;
    let admin_listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen for the control thread")?;

    let metrics = Arc::new(Metrics::new(count, vllm::endpoints::TABLE.iter().map(|row| row.label)));
    metrics.set_io_backend(driver.backend());
    metrics.set_dropped_lines(telemetry::log::dropped);
    let in_use =
        |row: &routing::Definition| config.routing.policies().any(|policy| policy.0.name == row.name);
    metrics.set_policies(routing::POLICIES.iter().map(|row| (row.name, in_use(row))));
    let models =
        ModelSettings { aliases: config.static_aliases.clone(), default_model: config.default_model.clone() };
    let registry = Registry::with_breakers(config.workers(), models, config.breakers.breaker());
    let fleet = registry.handle();
    let stored = Arc::new(StoredResponses::default());
    let admin = Arc::new(admin_worker(registry.workers().count(), admin_listener.local_addr()?)?);
    let limits = admin::Limits {
        connect: Duration::from_secs(config.upstream.connect_timeout_secs),
        body_bytes: usize::try_from(config.proxy.max_body_bytes).unwrap_or(usize::MAX),
    };
    let clock = Clock::start();
    let control = control::start(control::Parts {
        clock,
        settings: config.control.clone(),
        registry,
        aliases: config.static_aliases.clone(),
        service: admin::service(admin_listener, metrics.clone(), limits, stored.clone()),
    })
    .context("cannot start the control thread")?;
    let (entrance, mut bells) = entrance(&config, count)?;
    // both at once: probes, and what other proxies know
    let given = Given { entrance: entrance.as_ref(), stored: &stored, fault: faults.on_sync };
    let (routing, sync) = share(&config, clock, &fleet, &metrics, given)?;
    let journal = routing.journal.clone();
    stored.tell(move |worker, response| journal.stored(worker, response));
    control.wait_ready();
    if let Some(sync) = &sync {
        sync.wait_ready();
    }

    let workers = fleet.load().workers.len();
    if workers > routing::MAX_SEATS {
        let most = routing::MAX_SEATS;
        tracing::warn!(workers, most, "the prompts of the workers beyond are not remembered");
    }
    let most_connections = check_limits(
        &metrics,
        Needs { shards: count, workers, pool_size: config.upstream.pool_size, driver },
    );
    let body_budget = admission::Budget::new(config.admission.body_memory_bytes);
    if let Some(entrance) = &entrance {
        let [waiting, slots, in_use] = [entrance, entrance, entrance].map(Arc::clone);
        let slots = move || slots.slots().map_or(0, u64::from);
        metrics.set_admission(move || waiting.waiting(), slots, move || in_use.in_use());
    }
    let held = body_budget.clone();
    metrics.set_body_bytes(move || held.held());
    let retry_budget = Arc::new(proxy::Budget::default());
    let orders = Arc::new(Orders::default());
    let (end, ended) = mpsc::channel();
    let mut shards = Vec::with_capacity(count);
    for (index, (starting, listener)) in starting.into_iter().zip(listeners).enumerate() {
        let parts = proxy::Parts {
            settings: config.proxy.clone(),
            retries: config.retries.clone(),
            retry_budget: retry_budget.clone(),
            upstream: config.upstream.clone(),
            net: config.net.patient(config.proxy.worker_write_timeout_secs),
            admission: config.admission.clone(),
            entrance: entrance.clone(),
            body_budget: body_budget.clone(),
            clock,
            fleet: fleet.clone(),
            admin: admin.clone(),
            metrics: metrics.clone(),
            shard: index,
            routing: routing.clone(),
            stored: stored.clone(),
            most_connections,
            connect_fault: faults.on_connect,
            fault: faults.on_request,
        };
        let (orders, ended) = (orders.clone(), end.clone());
        let bell = bells.next();
        let order = Start { listener, parts, bell, orders, on_tick: faults.on_tick, ended };
        starting.go.send(Order::Start(Box::new(order))).ok().context("a shard ended before it began")?;
        shards.push(starting.thread);
    }
    tracing::info!(%address, io = %driver, shards = count, workers, "listening");
    let grace = Duration::from_secs(config.shards.shutdown_grace_secs);
    Ok(Running { address, driver, fleet, stored, orders, metrics, shards, control, sync, grace, ended })
}

impl Running {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// What drives its sockets.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// What it knows of its workers.
    pub fn fleet(&self) -> &FleetHandle {
        &self.fleet
    }

    /// Which workers it remembers to have stored responses.
    pub fn stored(&self) -> &StoredResponses {
        &self.stored
    }

    /// A watchdog over its shards.
    fn watchdog(&self, now: Millis) -> Watchdog {
        Watchdog::new(self.shards.len(), now)
    }

    /// Looks whether the shards come round, counts and says it if one does not.
    fn look(&self, watchdog: &mut Watchdog, now: Millis) {
        watchdog.look(
            now,
            |shard| self.metrics.shard(shard).ticks(),
            |shard, found| match found {
                Found::Stalled(ms) => {
                    self.metrics.shard(shard).stalled();
                    tracing::warn!(shard, ms, "a shard does not come round; its connections stand still");
                }
                Found::Back(ms) => tracing::info!(shard, ms, "the shard comes round again"),
            },
        );
    }

    /// Takes no new connection from now on and lets running exchanges end.
    pub fn drain(&self) {
        self.orders.drain();
    }

    /// Waits at most `patience` for a shard to end; true if one has, which it does only after
    /// [`Running::drain`] or when it is broken.
    pub fn shard_ended_within(&self, patience: Duration) -> bool {
        !matches!(self.ended.recv_timeout(patience), Err(mpsc::RecvTimeoutError::Timeout))
    }

    /// Waits until every thread has ended. After [`Running::drain`] that is when the last exchange has, or
    /// when `--shutdown-grace-secs` are over.
    ///
    /// # Errors
    /// A shard failed or panicked.
    pub fn wait(self) -> anyhow::Result<()> {
        let clock = Clock::start();
        let mut left = self.shards.len();
        while left > 0 {
            let grace = self.grace.saturating_sub(Duration::from_millis(clock.millis()));
            match self.ended.recv_timeout(grace) {
                Ok(()) => left -= 1,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    tracing::warn!("the grace is over; running exchanges are cut");
                    self.orders.give_up();
                    break;
                }
            }
        }
        let mut result = Ok(());
        for shard in self.shards {
            match shard.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => result = Err(error),
                Err(_) => result = Err(anyhow::anyhow!("a shard panicked")),
            }
        }
        // after the shards: their last requests have ended, and peers are told so
        if let Some(sync) = self.sync {
            sync.stop();
        }
        match self.control.stop() {
            Ok(()) => result,
            Err(_) => Err(anyhow::anyhow!("the control thread panicked")),
        }
    }
}

/// Workers of the demo: enough to see that requests spread.
const DEMO_WORKERS: usize = 3;

/// How often a running process looks whether a shard has ended that should not have.
const LOOK: Duration = Duration::from_millis(200);

/// Starts a proxy and serves until SIGTERM or SIGINT; then drains it. A second signal ends it at once.
///
/// # Errors
/// As [`start`]; a shard that ended unasked; a second signal.
pub fn run(config: Config) -> anyhow::Result<()> {
    run_until_signal(config, |_| Ok(()))
}

/// Serves before three fake workers of our own, and prints how to try it.
///
/// # Errors
/// As [`run`]; the fake workers cannot be started; stdout is closed.
pub fn demo(config: Config) -> anyhow::Result<()> {
    let workers = demo::start_workers(DEMO_WORKERS).context("cannot start the fake workers")?;
    let servers = workers.urls().iter().cloned().map(Into::into).collect();
    let mut config = Config { worker_urls: servers, ..config };
    if matches!(config.sync.redis, sync::Server::Local) {
        // toys are shared with nobody who does not ask for it
        config.sync.redis = sync::Server::None;
    }
    run_until_signal(config, |address| {
        let mut out = std::io::stdout();
        let shown = out
            .write_all(b"One streamed answer, through the proxy:\n\n  ")
            .and_then(|()| demo::show(address, &mut out))
            .and_then(|()| out.write_all(format!("\n{}", demo::text(address, &workers)).as_bytes()));
        match shown {
            // who reads has read enough (`| head -1`)
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            shown => shown.context("cannot show a streamed answer"),
        }
    })
}

fn run_until_signal(
    config: Config,
    started: impl FnOnce(SocketAddr) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let signals = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _entered = signals.enter();
    // caught from the first moment on, so that a signal during the start is not lost
    let mut signals_to_end = Signals::catch()?;
    raise_open_files();
    let running = start(config)?;
    started(running.addr())?;
    signals.block_on(async {
        let clock = Clock::start();
        let mut ending = Ending::default();
        let mut watchdog = running.watchdog(clock.millis());
        loop {
            tokio::select! {
                () = signals_to_end.next() => break,
                () = tokio::time::sleep(LOOK) => {
                    if running.shard_ended_within(Duration::ZERO) {
                        bail!("a shard has ended; its connections are lost");
                    }
                    running.look(&mut watchdog, clock.millis());
                }
            }
        }
        ending.signal(clock.millis());
        tracing::info!("draining: running exchanges are finished, no new ones are taken");
        running.drain();
        let (tell, mut ended) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("drain".to_owned()).spawn(move || tell.send(running.wait()).ok())?;
        loop {
            tokio::select! {
                () = signals_to_end.next() => if ending.signal(clock.millis()) == Meaning::EndAtOnce {
                    bail!("ended at once by a second signal");
                },
                result = &mut ended => return result.context("draining failed")?,
            }
        }
    })
}

/// The signals of the process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether it was said what becomes of SIGHUP.
    told: bool,
}

impl Signals {
    /// From now on no signal ends the process but those that [`Signals::next`] waits for, and SIGKILL, SIGQUIT and
    /// those of a crash.
    fn catch() -> std::io::Result<Self> {
        for kind in [SignalKind::user_defined1(), SignalKind::user_defined2()] {
            // caught once, they are caught for good, whether anybody listens or not
            drop(signal(kind)?);
        }
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            told: false,
        })
    }

    /// The next SIGTERM or SIGINT.
    ///
    /// # Cancellation
    /// Nothing is lost.
    async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => if !std::mem::replace(&mut self.told, true) {
                    tracing::info!("SIGHUP is ignored: there is nothing to read anew");
                },
            }
        }
    }
}

/// Makes room for as many connections as the host allows, and says so.
fn raise_open_files() {
    if let Some(before) = base::raise_open_files() {
        let now = Limits::read().open_files;
        let now = now.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string());
        tracing::info!("open files: the limit was raised from {before} to the hard one, {now}");
    }
}

/// Says what limits of the host are too low; returns how many clients may be connected.
fn check_limits(metrics: &Metrics, needs: Needs) -> u64 {
    let limits = Limits::read();
    for low in limits.too_low(&needs) {
        let net::TooLow { name, value, needed, remedy } = low;
        tracing::warn!(value, needed, "{name} is low: {remedy}");
    }
    let most_connections = limits.most_connections(&needs);
    let most = limits.open_files.unwrap_or(u64::MAX);
    metrics.set_open_files(most, most_connections, net::open_files);
    most_connections
}

/// What else the proxies share, and what a test puts into that.
struct Given<'a> {
    /// Where what is let in is limited.
    entrance: Option<&'a Arc<Admission>>,
    stored: &'a Arc<StoredResponses>,
    fault: Option<fn()>,
}

/// What shards choose by, and, where there is a Redis, the thread that shares it with other proxies.
fn share(
    config: &Config,
    clock: Clock,
    fleet: &FleetHandle,
    metrics: &Metrics,
    given: Given<'_>,
) -> anyhow::Result<(routing::Shared, Option<sync::Handle>)> {
    let workers = fleet.load().workers.len();
    if matches!(config.sync.redis, sync::Server::None) {
        return Ok((routing::Shared::new(config.routing.clone(), workers), None));
    }
    let (journal, events) = routing::Journal::open(sync::EVENTS, config.sync.sync_interval_ms);
    let shared = routing::Shared::with_journal(config.routing.clone(), workers, journal);
    let figures = Arc::new(telemetry::metrics::SyncFigures::default());
    let journal = shared.journal.clone();
    metrics.set_sync(figures.clone(), move || journal.dropped());
    let limit = config.admission.fleet_max_concurrent_requests;
    let quota =
        given.entrance.filter(|_| limit > 0).map(|entrance| sync::Quota::new(limit, entrance.clone()));
    let replica = sync::Parts {
        instance: sync::instance(),
        events,
        shared: shared.clone(),
        fleet: fleet.clone(),
        stored: given.stored.clone(),
        quota: quota.map(Arc::new),
        figures,
        stream_bytes: config.sync.redis_stream_bytes,
    };
    let parts = sync::ThreadParts { clock, settings: config.sync.clone(), replica, fault: given.fault };
    let thread = sync::start(parts).context("cannot start the sync thread")?;
    Ok((shared, thread))
}

/// What shards let in together, and a bell for each of them; nothing where there is no limit.
fn entrance(
    config: &Config,
    shards: usize,
) -> anyhow::Result<(Option<Arc<Admission>>, std::vec::IntoIter<net::Bell>)> {
    let capped = config.worker_urls.iter().any(|server| server.traits.max_concurrent_requests.is_some());
    if !config.admission.limits(capped) {
        return Ok((None, Vec::new().into_iter()));
    }
    let bells: Result<Vec<_>, _> = (0..shards).map(|_| net::bell()).collect();
    let (ringers, bells): (Vec<net::Ringer>, Vec<net::Bell>) =
        bells.context("cannot make a bell for a shard")?.into_iter().unzip();
    let ring = move |shard: usize| {
        if let Some(ringer) = ringers.get(shard) {
            ringer.ring();
        }
    };
    Ok((Some(Arc::new(Admission::new(&config.admission, ring))), bells.into_iter()))
}

/// The control thread's endpoints as a worker: its id follows those of the real ones.
fn admin_worker(id: usize, address: SocketAddr) -> anyhow::Result<Worker> {
    let worker = Worker::new(id, format!("http://{address}").parse()?);
    worker.resolved(vec![address]);
    Ok(worker)
}

/// A shard's thread that has its runtime and waits for the rest.
struct Starting {
    go: mpsc::Sender<Order>,
    result: mpsc::Receiver<std::io::Result<()>>,
    thread: JoinHandle<anyhow::Result<()>>,
}

enum Order {
    /// Build a runtime over this driver, in place of the one there is.
    Build(Driver),
    Start(Box<Start>),
}

struct Start {
    listener: TcpListener,
    parts: proxy::Parts,
    bell: Option<net::Bell>,
    orders: Arc<Orders>,
    on_tick: Option<fn()>,
    ended: mpsc::Sender<()>,
}

/// Starts the shards' threads and has each build its runtime over the first driver that works for all of them.
fn raise_shards(
    settings: &shard::Settings,
    count: usize,
    cores: &[core_affinity::CoreId],
) -> anyhow::Result<(Vec<Starting>, Driver)> {
    let mut starting = Vec::with_capacity(count);
    for index in 0..count {
        let (go, orders) = mpsc::channel();
        let (report, result) = mpsc::channel();
        let pinned = !settings.no_pin && count <= cores.len();
        let core = if pinned { cores.get(index).copied() } else { None };
        let thread = std::thread::Builder::new()
            .name(format!("shard-{index}"))
            .spawn(move || shard_thread(&orders, &report, core))
            .context("cannot start a shard's thread")?;
        starting.push(Starting { go, result, thread });
    }
    let mut refusal = None;
    for &driver in settings.io.candidates() {
        match build_all(&starting, driver) {
            Ok(()) => {
                if let (Driver::Epoll, Some(error)) = (driver, &refusal) {
                    tracing::info!(%error, "io backend: epoll, because io_uring is refused");
                }
                return Ok((starting, driver));
            }
            Err(error) => refusal = Some(error),
        }
    }
    let error = refusal.map_or_else(|| "no driver".to_owned(), |error| error.to_string());
    bail!("--io {}: the kernel refuses it: {error}", settings.io)
}

fn build_all(starting: &[Starting], driver: Driver) -> std::io::Result<()> {
    let gone = || std::io::Error::other("a shard's thread is gone");
    for shard in starting {
        shard.go.send(Order::Build(driver)).map_err(|_| gone())?;
    }
    // every answer is taken, so that the next driver's are not mistaken for these
    let results: Vec<_> = starting.iter().map(|shard| shard.result.recv().map_err(|_| gone())?).collect();
    results.into_iter().collect()
}

fn shard_thread(
    orders: &mpsc::Receiver<Order>,
    report: &mpsc::Sender<std::io::Result<()>>,
    core: Option<core_affinity::CoreId>,
) -> anyhow::Result<()> {
    let mut runtime = None;
    let mut driver = Driver::Epoll;
    while let Ok(order) = orders.recv() {
        match order {
            Order::Build(candidate) => {
                driver = candidate;
                // the old ring goes before the new one comes: both might not fit
                drop(runtime.take());
                let built = shard::prepare(driver, core).map(|built| runtime = Some(built));
                report.send(built).ok().context("nobody waits for this shard")?;
            }
            Order::Start(start) => {
                let runtime = runtime.context("a shard was started before its runtime was built")?;
                let Start { listener, parts, bell, orders, on_tick, ended } = *start;
                let _tell = TellEnd(ended);
                return shard::run(runtime, driver, listener, parts, bell, orders, on_tick)
                    .context("a shard failed");
            }
        }
    }
    // the process gives up before it began
    Ok(())
}

/// Tells that a shard has ended, even by a panic.
struct TellEnd(mpsc::Sender<()>);

impl Drop for TellEnd {
    fn drop(&mut self) {
        // nobody listens when the process is going down anyway
        self.0.send(()).ok();
    }
}
