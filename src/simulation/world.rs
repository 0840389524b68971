//! One world: workers that fail, clients that come and go, the control thread's probes, and the rules that hold at every
//! moment.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    admission::{self, Admission},
    base::Millis,
    control::health::{Change, Due, Probe, Watch, may_eject},
    net::TICK_MS,
    proxy::{Budget, RetrySettings, retry::Moment},
    routing::{Candidates, Router, Settings, Shared, Terms},
    simulation::{
        exchange::exchange,
        ledger::{Counted, Ledger, Nature, Outcome, Request, Story, Waits, add},
        rules::{Kind, Rules},
        servers::{Server, State},
        time::Time,
    },
    telemetry::metrics::Metrics,
    workers::{BreakerState, FleetHandle, Health, Learnt, ModelSettings, Registry, Rest, Worker, WorkerSpec},
};

/// How often a probe's loop looks, as in `control/probe.rs`.
const LOOK_MS: u64 = 100;

/// Workers that came up within so many milliseconds came up together, as there.
const TOGETHER_MS: u64 = 1_000;

/// Between two looks at a worker's models, and at whether it rests.
const LEARN_MS: u64 = 2_000;

/// The limit of a probe.
const PROBE_MS: u64 = 1_000;

/// How long faults last, in all.
const STORM_MS: u64 = 12_000;

/// For how long every request must be answered, once all workers are well.
const CALM_MS: u64 = 2_000;

/// After so long nobody may be there any more who came before.
const DRAIN_MS: u64 = 8_000;

pub(super) struct World {
    pub(super) time: Time,
    pub(super) rules: Rules,
    pub(super) servers: Vec<Server>,
    pub(super) retries: RetrySettings,
    pub(super) budget: Budget,
    pub(super) metrics: Metrics,
    pub(super) admission: Option<Admission>,
    pub(super) queue_timeout_ms: u64,
    pub(super) router: RefCell<Router>,
    pub(super) scratch: RefCell<Vec<usize>>,
    pub(super) terms: Terms,
    pub(super) handle: FleetHandle,
    pub(super) ledger: Ledger,
    registry: RefCell<Registry>,
    workers: Vec<Arc<Worker>>,
    /// What was learnt of each worker's models.
    learnt: RefCell<Vec<&'static [&'static str]>>,
    /// The shard's bell.
    rung: Arc<AtomicBool>,
    /// The shard's clock: the time of its last tick.
    ticked: Cell<Millis>,
    /// What each breaker did at the last event.
    breakers: RefCell<Vec<BreakerState>>,
    clients: Cell<Clients>,
}

/// What clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clients {
    /// As the rules of the world say.
    Come,
    /// One after the other, patient and innocent, while workers recover.
    Wait,
    /// As before, and all of them are served.
    Settle,
    Stay,
}

impl World {
    pub(super) fn new(seed: u64) -> Rc<Self> {
        let time = Time::new(seed);
        let rules = Rules::of(seed, &time.chance);
        let cap = |at: usize| match rules.caps.get(at) {
            Some(most) => format!("http://w{at}:1#max_concurrent_requests={most}"),
            None => format!("http://w{at}:1"),
        };
        let specs: Vec<WorkerSpec> = (0..rules.workers).map(|at| cap(at).parse().unwrap()).collect();
        let registry = Registry::with_breakers(specs, ModelSettings::default(), rules.breaker);
        let servers = (0..rules.workers).map(|at| {
            let models = rules.models[at];
            match rules.faults {
                [] => Server::good(models),
                _ if at < rules.always_good => Server::good(models),
                faults => Server::faulty(&time.chance, STORM_MS, faults, models),
            }
        });
        let rung = Arc::new(AtomicBool::new(false));
        let bell = rung.clone();
        let limits = admission::Settings {
            max_concurrent_requests: rules.slots,
            fleet_max_concurrent_requests: 0,
            queue_size: rules.queue,
            queue_timeout_secs: 2,
            rate_limit_tokens_per_second: 0.0,
            queue_fairness_header: String::new(),
            body_memory_bytes: 0,
        };
        let entrance = limits.limits(!rules.caps.is_empty());
        let settings = Settings::of_flags(&["--policy", rules.policy]);
        let workers: Vec<Arc<Worker>> = registry.workers().cloned().collect();
        Rc::new(Self {
            servers: servers.collect(),
            retries: rules.retries.clone(),
            budget: Budget::default(),
            metrics: Metrics::new(1, []),
            admission: entrance
                .then(|| Admission::new(&limits, move |_| bell.store(true, Ordering::Relaxed))),
            queue_timeout_ms: limits.queue_timeout_secs * 1_000,
            router: RefCell::new(Router::new(&Shared::new(settings, rules.workers))),
            scratch: RefCell::default(),
            terms: Terms { slow_start_ms: rules.slow_start_ms, ..Terms::default() },
            handle: registry.handle(),
            ledger: Ledger::of(rules.workers),
            registry: RefCell::new(registry),
            learnt: RefCell::new(vec![&[]; rules.workers]),
            breakers: RefCell::new(vec![BreakerState::Closed; rules.workers]),
            rung,
            workers,
            ticked: Cell::new(0),
            clients: Cell::new(Clients::Come),
            time,
            rules,
        })
    }

    /// The time as a shard knows it.
    pub(super) fn ticked(&self) -> Millis {
        self.ticked.get()
    }

    pub(super) fn moment(&self) -> Moment<'_> {
        Moment { now: self.ticked(), chance: self.time.chance.unit(), metrics: &self.metrics, shard: 0 }
    }

    /// An exchange begins, until what is returned is dropped.
    pub(super) fn begins(&self) -> impl Drop + '_ {
        struct Account<'a>(&'a World, Option<Counted<'a>>);
        impl Drop for Account<'_> {
            fn drop(&mut self) {
                self.0.metrics.shard(0).ended();
                drop(self.1.take());
            }
        }
        self.metrics.shard(0).began();
        Account(self, Some(Counted::new(&self.ledger.exchanges)))
    }

    /// Lets it run: faults, recovery, calm, and an end.
    pub(super) fn run(self: &Rc<Self>) {
        for position in 0..self.rules.workers {
            self.time.spawn(0, watch_over(self.clone(), position));
            self.time.spawn(0, learn_now_and_then(self.clone(), position));
        }
        self.time.spawn(0, tick(self.clone()));
        self.time.spawn(self.rules.begin_ms, clients_come(self.clone()));
        self.until(STORM_MS, || false);
        self.clients.set(Clients::Wait);
        let healed = self.time.now();
        self.until(healed + self.rules.recovery_ms(), || self.is_well());
        let sick = || self.workers.iter().map(|worker| (worker.health(), worker.breaker()));
        assert!(self.is_well(), "not all workers are well again: {:?}", sick().collect::<Vec<_>>());
        self.clients.set(Clients::Settle);
        self.until(self.time.now() + CALM_MS, || false);
        self.clients.set(Clients::Stay);
        self.until(self.time.now() + DRAIN_MS, || self.ledger.all_ended());
        assert!(self.ledger.all_ended(), "somebody waits for ever");
        assert_eq!((self.ledger.spending.get(), self.ledger.permits.get()), (0, 0));
        self.time.clear();
    }

    /// Goes on until `end`, or until it is `enough`.
    fn until(&self, end: Millis, enough: impl Fn() -> bool) {
        while !enough() && self.time.step(end) {
            self.listen();
            self.check();
            self.ledger.next_event();
        }
    }

    /// Wakes whoever was let in, a little later: a bell takes its time.
    fn listen(&self) {
        if self.rung.swap(false, Ordering::Relaxed) {
            self.look();
        }
    }

    fn look(&self) {
        for waits in self.ledger.waiting.borrow().iter().filter(|waits| waits.waiter.is_called()) {
            if !waits.woken.replace(true) {
                self.time.wake(waits.task, self.time.now() + self.time.chance.between(0, 3));
            }
        }
    }

    fn is_well(&self) -> bool {
        let well = |(at, worker): (usize, &Arc<Worker>)| {
            self.servers[at].state(self.time.now()) == State::Good
                && worker.usable()
                && !worker.rests()
                && worker.breaker().state() == BreakerState::Closed
                && self.learnt.borrow()[at] == self.servers[at].models
        };
        self.workers.iter().enumerate().all(well)
            && self.ledger.exchanges.get() <= 1
            && self.ledger.waiting.borrow().is_empty()
    }

    /// What must hold at every moment.
    fn check(&self) {
        let ledger = &self.ledger;
        let waiting = ledger.waiting.borrow();
        let called = waiting.iter().filter(|waits| waits.waiter.is_served()).count() as u64;
        for (position, worker) in self.workers.iter().enumerate() {
            let (real, own) = (u64::from(worker.in_flight()), ledger.in_flight[position].get());
            // who was called and has not been woken holds a place of one or the other
            assert!(own <= real && real <= own + called, "{real} in flight on {position}, not {own}");
            if let Some(most) = self.rules.caps.get(position) {
                assert!(real <= u64::from(*most), "{real} in flight on {position}, {most} may be");
            }
            self.check_breaker(position, worker);
        }
        assert_eq!(self.metrics.in_flight(), ledger.exchanges.get(), "exchanges");
        assert_eq!(self.budget.running(), ledger.spending.get(), "further attempts that cost");
        let Some(admission) = &self.admission else { return };
        if self.rules.slots > 0 {
            let used = admission.in_use();
            assert!(used <= u64::from(self.rules.slots), "{used} slots are in use");
            assert_eq!(used, ledger.permits.get() + called, "slots in use");
        }
        for waits in waiting.iter().filter(|waits| waits.waiter.is_served()) {
            waits.served.set(waits.served.get().min(ledger.event()));
        }
        let waits = |waits: &&Waits| !waits.waiter.is_called();
        let count = waiting.iter().filter(waits).count() as u64;
        assert_eq!(admission.waiting(), count, "who waits");
        assert!(count <= u64::from(self.rules.queue), "{count} wait");
        for waits in waiting.iter().filter(waits) {
            self.check_waits(waits, &waiting);
        }
    }

    fn check_breaker(&self, position: usize, worker: &Worker) {
        let state = worker.breaker().state();
        let before = std::mem::replace(&mut self.breakers.borrow_mut()[position], state);
        if state != BreakerState::HalfOpen {
            self.ledger.overtaken(position);
        }
        if (before, state) == (BreakerState::Closed, BreakerState::Open) {
            self.ledger.opened(position, self.rules.breaker.failures);
            assert!(self.rules.kind != Kind::Poison, "one client has opened the breaker of {position}");
        }
    }

    /// Of one who waits: nobody whom it goes before was let in while it waited, and it does not wait for what is there.
    fn check_waits(&self, waits: &Waits, all: &[Waits]) {
        let now = self.time.now();
        assert!(now <= waits.until, "it waits for longer than it may");
        for other in all.iter().filter(|other| other.waiter.is_served() && other.of == waits.of) {
            let overtaken = waits.joined < other.served.get() && waits.priority < other.priority;
            let (own, its) = (waits.priority, other.priority);
            assert!(!overtaken, "{its} was let in before {own}, which waits since {}", waits.since);
        }
        let free = self.admission.as_ref().is_none_or(|admission| {
            self.rules.slots == 0 || admission.in_use() < u64::from(self.rules.slots)
        });
        assert!(!(free && waits.of.is_none()), "a slot is free and somebody waits for one");
    }

    /// The same for room on workers, after everybody was looked at.
    fn check_room(&self) {
        let Some(admission) = &self.admission else { return };
        let free = self.rules.slots == 0 || admission.in_use() < u64::from(self.rules.slots);
        for waits in self.ledger.waiting.borrow().iter() {
            if !free || waits.waiter.is_called() {
                continue;
            }
            let terms = Terms { now: self.time.now(), ..Terms::default() };
            let mut scratch = Vec::new();
            let Waits { fleet, positions, tried, .. } = waits;
            let candidates = Candidates::of(fleet, positions, tried, &terms, &mut scratch);
            assert!(candidates.is_empty(), "there is room, and somebody waits for it");
        }
    }

    /// Takes over which models a worker has, and whether it rests.
    fn learn(&self, position: usize) {
        let (server, worker) = (&self.servers[position], &self.workers[position]);
        let now = self.time.now();
        if matches!(server.state(now), State::Refuses | State::Hangs) {
            return;
        }
        worker.set_rest(Rest::Asleep, server.state(now) == State::Sleeps);
        let models = server.lists(now);
        let before = std::mem::replace(&mut self.learnt.borrow_mut()[position], models);
        if before != models {
            let names = models.iter().map(|name| ((*name).to_owned(), true)).collect();
            let mut registry = self.registry.borrow_mut();
            registry.learnt(position, Learnt::Models(names));
            registry.publish();
            if !before.is_empty() {
                worker.breaker().forget();
                worker.cache_lost();
            }
        }
    }

    fn request(&self) -> Request {
        let (chance, now) = (&self.time.chance, self.time.now());
        let settled = self.clients.get() == Clients::Settle;
        let calm = self.clients.get() != Clients::Come;
        let client = chance.between(0, 4);
        // the first client is the poisonous one
        let nature = match self.rules.poisons {
            [] => Nature::Innocent,
            poisons if client == 0 && !calm => chance.pick(poisons),
            _ => Nature::Innocent,
        };
        let model = if chance.is(0.8) { "a" } else { "b" };
        Request {
            client,
            priority: chance.between(0, 4) as i64 - 1,
            model,
            body: format!("{{\"messages\":[],\"model\":\"{model}\"}}"),
            streams: chance.is(0.5),
            always: chance.is(0.85),
            nature,
            takes_ms: if calm { 10 } else { chance.exponential(self.rules.takes_ms) },
            deadline: now.saturating_add(if calm { DRAIN_MS / 2 } else { self.rules.request_timeout_ms }),
            leaves_at: match !calm && chance.is(0.15) {
                true => now + chance.exponential(200.0),
                false => Millis::MAX,
            },
            settled,
            story: Story::default(),
            given_up: Cell::new(false),
        }
    }

    /// How a request may end.
    fn judge(&self, request: &Request, outcome: Outcome) {
        if request.settled {
            assert_eq!(outcome, Outcome::Answered(200), "after all faults were over: {request:?}");
        }
        if request.nature != Nature::Innocent || outcome == Outcome::Left {
            return;
        }
        let story = &request.story;
        match self.rules.kind {
            Kind::Poison => {
                assert_eq!(outcome, Outcome::Answered(200), "an innocent request: {request:?}");
            }
            Kind::OneGood => {
                let (Outcome::Answered(status) | Outcome::Refused(status)) = outcome else { return };
                let excused = !request.always
                    || story.twice.get()
                    || story.is_final.get()
                    || story.broke.get()
                    || story.over_budget.get();
                assert!(excused || !matches!(status, 502 | 503), "{outcome:?}: {request:?}");
            }
            Kind::Storm | Kind::Crowd => {}
        }
    }
}

/// Requests that come as if by chance.
async fn clients_come(world: Rc<World>) {
    while world.clients.get() != Clients::Stay {
        let request = Rc::new(world.request());
        world.ledger.requests.borrow_mut().push(request.clone());
        world.time.spawn(world.time.now(), client(world.clone(), request));
        let pause = match world.clients.get() {
            Clients::Come => world.time.chance.exponential(world.rules.arrival_ms),
            _ => 100,
        };
        world.time.sleep(pause).await;
    }
}

/// One client with one request, who may leave at any time.
async fn client(world: Rc<World>, request: Rc<Request>) {
    let outcome = {
        let mut running = Box::pin(exchange(&world, &request));
        let mut poll = || {
            // it may leave in the very moment in which it is called
            if world.time.now() >= request.leaves_at {
                return None;
            }
            let waker = std::task::Waker::noop();
            match running.as_mut().poll(&mut std::task::Context::from_waker(waker)) {
                std::task::Poll::Ready(outcome) => Some(outcome),
                std::task::Poll::Pending => None,
            }
        };
        world.time.wait(request.leaves_at, &mut poll).await.unwrap_or(Outcome::Left)
    };
    world.ledger.ended(&request, outcome);
    world.judge(&request, outcome);
}

/// What a shard does every so often.
async fn tick(world: Rc<World>) {
    loop {
        world.time.sleep(TICK_MS).await;
        world.ticked.set(world.time.now());
        if let Some(admission) = &world.admission
            && !world.ledger.waiting.borrow().is_empty()
        {
            admission.room_made();
            world.look();
            world.check_room();
        }
    }
}

async fn learn_now_and_then(world: Rc<World>, position: usize) {
    loop {
        world.time.sleep(LEARN_MS).await;
        world.learn(position);
    }
}

/// The control thread's watch over one worker: the steps of `control/probe.rs`.
async fn watch_over(world: Rc<World>, position: usize) {
    let (time, worker) = (&world.time, &world.workers[position]);
    let mut watch = Watch::new(world.rules.health, time.now());
    loop {
        if worker.take_doubt() {
            watch.doubted(time.now());
            world.learn(position);
        }
        match watch.due(time.now(), worker.health()) {
            Due::Wait(wait_ms) => time.sleep(LOOK_MS.min(wait_ms)).await,
            Due::TakenOut => {}
            Due::Probe => {
                probe(&world, position, &mut watch).await;
                worker.settle_doubt();
            }
        }
    }
}

async fn probe(world: &World, position: usize, watch: &mut Watch) {
    let (time, worker) = (&world.time, &world.workers[position]);
    let (before, busy, began) = (worker.health(), worker.in_flight() > 0, time.now());
    let (verdict, took_ms) = world.servers[position].probed(began, &time.chance, PROBE_MS);
    while time.now() < began + took_ms {
        time.sleep_until((began + took_ms).min(time.now() + LOOK_MS)).await;
        if matches!(before, Health::Up | Health::Ejected) && !worker.answers() {
            return;
        }
    }
    let now = time.now();
    let probe = Probe { verdict, took_ms, busy };
    match watch.probed(now, before, worker.health(), probe, time.chance.unit()) {
        Change::None => {}
        Change::Up => {
            time.sleep(time.chance.between(1, 10)).await;
            world.learn(position);
            let now = time.now();
            let others = world.workers.iter().filter(|other| other.usable());
            if others.into_iter().any(|other| now.saturating_sub(other.up_since()) > TOGETHER_MS) {
                world.handle.load().newcomer(now);
            }
            worker.came_up(now);
        }
        Change::Restored => _ = worker.set_health(Health::Up),
        Change::Down(_) => _ = worker.set_health(Health::Down),
    }
    if worker.usable()
        && let Some(ejection) = watch.advice(time.now())
        && may_eject(&world.handle.load(), worker, time.now(), world.rules.max_ejected_share)
    {
        worker.set_health(Health::Ejected);
        add(&world.ledger.tally.ejected);
        watch.ejected(time.now(), ejection);
    }
}
