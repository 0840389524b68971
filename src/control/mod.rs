//! The control thread: what is true of the workers, learnt without haste.
//!
//! One thread with a tokio runtime of its own owns the [`Registry`]. For every server four loops run, each in
//! its own time, so that none waits for another: `probe` decides on its health, `models` learns what it serves,
//! `names` resolves its host, `scrape` reads its figures; what they learn holds for all its data-parallel ranks.
//! What they find is published as a new [`Fleet`](crate::workers::Fleet), or set in the
//! worker's atomics. Shards answer with the only thing that they know better: a transport error marks a worker
//! down or doubts it, and its loop sees that within a tenth of a second.
//!
//! The admin endpoints run on this thread too; they are handed in as a [`Service`], because this module knows
//! nothing of them.

mod attempt;
mod dummies;
mod figures;
pub(crate) mod health;
#[cfg(target_env = "gnu")]
mod memory;
mod models;
mod names;
mod probe;
mod rest;
mod scrape;
mod settings;

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::Duration,
};

use axum::http::HeaderValue;
use tokio::{
    runtime,
    sync::{Notify, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

pub(crate) use attempt::{AttemptError, MAX_FIELDS, MAX_HEAD_BYTES, collect, fetch, send};
pub use settings::Settings;

use crate::base::Clock;
use crate::workers::{FleetHandle, Registry, Worker};

use dummies::Plan;
use health::Rules;
use models::Book;
use rest::Silent;
use scrape::Scrape;

/// Lookups that may block a thread of the runtime's pool at a time; a worker has at most one.
const BLOCKING_THREADS: usize = 32;

/// What runs on the control thread besides the loops: the admin endpoints.
pub type Service = Box<dyn FnOnce(Arc<Control>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// What the control thread is made of.
pub struct Parts {
    /// The process's clock.
    pub clock: Clock,
    /// Intervals and time limits.
    pub settings: Settings,
    /// The workers.
    pub registry: Registry,
    /// Alias to model, for the merged list of models.
    pub aliases: Vec<(String, String)>,
    /// Served until the thread stops; see `admin::service`.
    pub service: Service,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("settings", &self.settings)
            .field("registry", &self.registry)
            .field("aliases", &self.aliases)
            .finish_non_exhaustive()
    }
}

/// What the parts of the control thread share.
#[derive(Debug)]
pub struct Control {
    pace: Pace,
    clock: Clock,
    /// The proxy's own key, as an `Authorization` value.
    key: Option<HeaderValue>,
    fleet: FleetHandle,
    /// In order of configuration; a position means the same here, in the fleet and in the book.
    workers: Vec<Arc<Worker>>,
    /// By position: asks for a lookup ahead of time.
    lookups: Vec<Notify>,
    /// By position: asks for a look at its models, and whether it rests, ahead of time.
    doubts: Vec<Notify>,
    /// By position: what the server is not asked any more.
    silent: Vec<Silent>,
    /// Real requests to workers; `None`: nobody is sent any.
    plan: Option<Plan>,
    /// By position; `None` where the worker does not lead its server, or nobody looks at figures.
    scrapes: Vec<Option<Scrape>>,
    book: Book,
}

/// [`Settings`] as durations. A setting of nonsense (negative, infinite) or below 10 ms counts as 10 ms.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// What a worker's probes mean.
    rules: Rules,
    /// Share of a model's workers that may be ejected for what their probes were like.
    max_ejected_share: f64,
    /// Also the limit of a look at `/v1/models`.
    probe_limit: Duration,
    models_interval: Duration,
    names_interval: Duration,
    /// `None`: nobody looks at figures.
    scrape_interval: Option<Duration>,
}

impl Pace {
    fn new(settings: &Settings) -> Self {
        Self {
            rules: Rules {
                interval_ms: millis(duration(settings.health_check_interval_secs)),
                late_probes: settings.health_check_consecutive_failures,
                good_probes: settings.health_check_success_threshold,
                window: settings.health_check_window_size,
                min_success_rate: settings.health_check_min_success_rate,
                max_response_ms: millis(duration(settings.health_check_max_response_time)),
            },
            max_ejected_share: settings.health_check_max_ejected_share,
            probe_limit: duration(settings.health_check_timeout_secs),
            models_interval: duration(settings.model_refresh_secs),
            names_interval: duration(settings.dns_refresh_secs),
            scrape_interval: Some(settings.engine_stats_interval).filter(|&s| s > 0.0).map(duration),
        }
    }

    /// What a look at figures may take.
    fn scrape_limit(&self) -> Duration {
        self.scrape_interval.map_or(self.probe_limit, |interval| interval.min(self.probe_limit))
    }
}

fn duration(seconds: f64) -> Duration {
    /// Far beyond any sensible interval, and safe to add to a point in time.
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Duration::try_from_secs_f64(seconds).unwrap_or_default().clamp(Duration::from_millis(10), YEAR)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A number in 0..1 that differs from call to call.
fn chance() -> f64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() as f64 / 2f64.powi(64)
}

impl Control {
    fn new(settings: &Settings, registry: Registry, aliases: Vec<(String, String)>, clock: Clock) -> Self {
        let workers: Vec<Arc<Worker>> = registry.workers().cloned().collect();
        let key = settings.worker_api_key.as_ref().and_then(|key| {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        let pace = Pace::new(settings);
        let scrape = |lead: &Arc<Worker>| {
            let ranks = workers.iter().filter(|worker| worker.shares_server(lead)).count();
            let interval = pace.scrape_interval.filter(|_| lead.leads())?;
            Some(Scrape::new(interval, ranks, clock.millis()))
        };
        Self {
            pace,
            clock,
            key,
            scrapes: workers.iter().map(scrape).collect(),
            fleet: registry.handle(),
            lookups: workers.iter().map(|_| Notify::new()).collect(),
            doubts: workers.iter().map(|_| Notify::new()).collect(),
            silent: workers.iter().map(|_| Silent::default()).collect(),
            plan: Plan::new(settings),
            workers,
            book: Book::new(registry, aliases),
        }
    }

    /// The newest fleet.
    pub fn fleet(&self) -> &FleetHandle {
        &self.fleet
    }

    /// Learns the models of the worker's server anew and whether it rests, and publishes what changed before it returns.
    pub async fn learn_again(&self, worker: &Arc<Worker>) {
        let leads = |known: &Arc<Worker>| known.leads() && known.shares_server(worker);
        if let Some(position) = self.workers.iter().position(leads) {
            self.learn(position).await;
        }
    }
}

/// The running control thread. Dropping it tells the thread to stop, without waiting.
#[derive(Debug)]
pub struct Handle {
    ready: std_mpsc::Receiver<()>,
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Handle {
    /// Blocks until every worker was looked at once (name, health, models), or `health_check_timeout_secs` are
    /// over.
    pub fn wait_ready(&self) {
        // An error means that the thread is gone, and nothing will get readier.
        self.ready.recv().unwrap_or_default();
    }

    /// Whether the thread has ended, which without [`Handle::stop`] it does only by a panic.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Tells the thread to stop at once (running admin requests are cut) and waits for its end.
    ///
    /// # Errors
    /// The panic that ended the thread.
    pub fn stop(self) -> thread::Result<()> {
        // An error means that it has stopped already.
        self.stop.send(()).unwrap_or_default();
        self.thread.join()
    }
}

/// Starts the control thread.
///
/// # Errors
/// If the kernel grants no thread or no epoll instance.
pub fn start(parts: Parts) -> io::Result<Handle> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("lookup")
        .build()?;
    let (ready_sender, ready) = std_mpsc::channel();
    let (stop, stopped) = oneshot::channel();
    let thread = thread::Builder::new().name("control".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                () = run(parts, ready_sender) => (),
                _ = stopped => (),
            }
        });
        // A lookup may hang for as long as the resolver likes.
        runtime.shutdown_background();
    })?;
    Ok(Handle { ready, stop, thread })
}

/// Runs everything; ends only with a panic of one of its parts.
async fn run(parts: Parts, ready: std_mpsc::Sender<()>) {
    let Parts { settings, clock, registry, aliases, service } = parts;
    let control = Arc::new(Control::new(&settings, registry, aliases, clock));
    let mut tasks = JoinSet::new();
    tasks.spawn(service(control.clone()));
    #[cfg(target_env = "gnu")]
    tasks.spawn(memory::run());
    let (latch, mut released) = mpsc::channel(1);
    let leads = |position: &usize| control.workers.get(*position).is_some_and(|worker| worker.leads());
    for position in (0..control.workers.len()).filter(leads) {
        let (resolved, looked_up) = oneshot::channel();
        tasks.spawn(names::run(control.clone(), position, resolved));
        tasks.spawn(probe::run(control.clone(), position, looked_up, latch.clone()));
        tasks.spawn(models::run(control.clone(), position));
        tasks.spawn(scrape::run(control.clone(), position));
    }
    drop(latch);
    let first_round = control.pace.probe_limit;
    tasks.spawn(async move {
        // Nobody sends: it is over when every worker's latch is dropped, or it takes too long.
        let _: Result<Option<_>, _> = timeout(first_round, released.recv()).await;
        // An error means that nobody waits.
        ready.send(()).unwrap_or_default();
    });
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!("a task of the control thread panicked");
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
