//! The way of one request without sockets: steps 4 to 6 of `proxy/exchange.rs`, with what they need of `proxy/admit.rs`,
//! `proxy/choice.rs` and `proxy/attempt.rs`.
//!
//! It is the only place here that repeats what the proxy does: the same methods in the same order. What these decide is
//! not repeated; sockets, bytes and their copies are left out. A client that leaves drops the future, as it does there.

use std::{
    cell::Cell,
    io,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    admission::{Admitted, Entry, Newcomer, Permit, Reason, Refused, Room},
    base::Millis,
    proxy::{
        admit::{MAX_WAITS, room_wanted},
        choice::{Means, Pick, Picked, Wanted, pick},
        exchange::{LOOK_MS, PROBE_MS},
        judge::{self, Judge},
        peek::Seen,
        respond::status_of_failure,
        retry::{Failure, Kind, Moment, Next, Refusing, Repeatable, Retries},
    },
    routing::{Outcome as Ended, Prompt, Terms, Tried},
    simulation::{
        ledger::{Counted, Decided, Nature, Outcome, Request, Waits},
        servers::State,
        world::World,
    },
    vllm::{ErrorShape, Unbegun},
    workers::{Fleet, Health, Resolved, Worker},
};

/// What a request has been given, and that it is counted.
struct Pass<'a> {
    permit: Option<(Permit<'a>, Counted<'a>)>,
    room: Option<(Room<'a>, Counted<'a>)>,
    waits: u32,
}

/// A worker for one attempt.
struct Chosen<'a> {
    world: &'a World,
    model: Option<&'a str>,
    worker: Arc<Worker>,
    unsent: bool,
    trial: Option<u64>,
    pick: Pick<'a>,
    _counted: Counted<'a>,
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        let usage = (!self.unsent).then(Default::default);
        let (worker, demand) = (&*self.worker, self.pick.demand);
        let outcome = Ended { worker, prompt: &Prompt::default(), demand, usage };
        self.world.router.borrow_mut().ended(self.model, &outcome);
        self.world.ledger.trial_ended(self.pick.position, self.trial);
    }
}

enum Attempted {
    /// With the status that is counted.
    Answered(u16),
    /// Nothing was sent to the client; whether the body is there.
    Failed(Failure, bool),
}

pub(super) async fn exchange(world: &World, request: &Request) -> Outcome {
    let _account = world.begins();
    let refuse = |failure: &Failure| Outcome::Refused(status_of_failure(failure).unwrap_or(499));

    // 4. who may serve it
    let fleet = world.handle.load_full();
    let Resolved::Workers { workers: positions, model, .. } = fleet.resolve(Some(request.model)) else {
        return Outcome::UnknownModel;
    };
    let mut pass = match admit(world, request, &fleet, positions).await {
        Ok(pass) => pass,
        Err(refused) => return refuse(&Failure::NotAdmitted(refused, ErrorShape::OpenAi)),
    };

    // 5. attempts, until one is answered
    let repeatable = Repeatable { always: request.always, generates: true, names_model: true };
    let mut retries = Retries::new(&world.retries, &world.budget, &fleet, positions, repeatable);
    let mut judge = Judge::new();
    let mut fresh: Option<Chosen<'_>> = None;
    let mut last = Failure::NoWorker;
    loop {
        let on_fresh = fresh.is_some();
        let tried = retries.tried();
        let chosen = match fresh.take() {
            Some(chosen) => Ok(chosen),
            None => choose(world, &fleet, positions, model, tried, pass.room.take()),
        };
        let mut chosen = match chosen {
            Ok(chosen) => chosen,
            Err(false) => return refuse(&last),
            Err(true) => match wait_for_room(world, &mut pass, request, &fleet, positions, tried).await {
                Ok(()) => continue,
                Err(failure) => return refuse(&failure),
            },
        };
        retries.begin(chosen.pick.position, on_fresh);
        world.ledger.attempt(request, on_fresh, world.retries.retry_max_retries);
        let (failure, kept) = match attempt(world, request, &mut chosen, on_fresh, &mut retries).await {
            Attempted::Answered(status) => {
                match retries.take_passed() {
                    Some(failure) => {
                        world.ledger.failed(chosen.pick.position, &failure);
                        judge.failed(&chosen.worker, &failure, world.ticked());
                    }
                    None => judge.answered(&chosen.worker, status, world.ticked()),
                }
                return Outcome::Answered(status);
            }
            Attempted::Failed(failure, kept) => (failure, kept),
        };
        world.ledger.failed(chosen.pick.position, &failure);
        judge.failed(&chosen.worker, &failure, world.ticked());
        chosen.unsent = failure.is_unsent();

        // 6. another attempt?
        let mut next = match request.given_up.take() {
            // which was decided on then
            true => Some(retries.next(&world.moment(), &chosen.worker, &failure, kept)),
            false => decided(world, request, &chosen.worker, &failure, on_fresh, |moment| {
                Some(retries.next(moment, &chosen.worker, &failure, kept))
            }),
        };
        if next.is_some_and(|next| Retries::waits_for_probe(&failure, next)) {
            let until = (world.time.now() + PROBE_MS).min(request.deadline);
            while world.time.now() < until
                && chosen.worker.health() != Health::Down
                && chosen.worker.is_doubted()
            {
                world.time.sleep_until((world.time.now() + LOOK_MS).min(until)).await;
            }
            if world.time.now() >= request.deadline {
                return refuse(&Failure::TotalTime);
            }
            if chosen.worker.health() == Health::Down {
                next = decided(world, request, &chosen.worker, &failure, on_fresh, |moment| {
                    Some(retries.next(moment, &chosen.worker, &failure, kept))
                });
            }
        }
        if !kept {
            return refuse(&failure);
        }
        match next {
            Some(Next::Another) => {}
            Some(Next::Fresh) => {
                chosen.pick.room.in_flight.again();
                fresh = Some(chosen);
            }
            Some(Next::Again(pause_ms)) => {
                drop(chosen);
                world.time.sleep_until((world.time.now() + pause_ms).min(request.deadline)).await;
                if world.time.now() >= request.deadline {
                    return refuse(&Failure::TotalTime);
                }
            }
            _ => return refuse(&failure),
        }
        last = failure;
    }
}

/// Has `decide` decide, and the ledger look at what that is. `None`: the answer is passed on.
fn decided(
    world: &World,
    request: &Request,
    worker: &Worker,
    failure: &Failure,
    fresh: bool,
    decide: impl FnOnce(&Moment<'_>) -> Option<Next>,
) -> Option<Next> {
    let over_budget = || world.metrics.shard(0).over_budget();
    let before = over_budget();
    let died = worker.health() == Health::Down;
    let next = decide(&world.moment());
    let decided = Decided { next, over_budget: over_budget() > before, died };
    world.ledger.decided(request, failure, fresh, decided, world.ticked());
    next
}

/// `Err`: there is nobody, or (true) only nobody who has room.
fn choose<'a>(
    world: &'a World,
    fleet: &Fleet,
    positions: &[usize],
    model: Option<&'a str>,
    tried: &Tried,
    room: Option<(Room<'a>, Counted<'a>)>,
) -> Result<Chosen<'a>, bool> {
    let (prompt, draw) = (Prompt::default(), || (world.ticked(), world.time.chance.bits()));
    let means = Means {
        router: &world.router,
        scratch: &world.scratch,
        terms: world.terms,
        admission: world.admission.as_ref(),
    };
    let wanted = Wanted { model, session: None, prompt: &prompt, tried };
    // counted anew with whoever is chosen
    let room = room.map(|(room, _counted)| room);
    match pick(&means, draw, fleet, positions, &wanted, room) {
        Picked::Of(pick) => {
            let worker = pick.room.in_flight.worker().clone();
            let trial = world.ledger.picked(&worker, &pick);
            let counted = Counted::new(&world.ledger.in_flight[pick.position]);
            Ok(Chosen { world, model, worker, unsent: false, trial, pick, _counted: counted })
        }
        Picked::Busy => Err(true),
        Picked::Nobody => Err(false),
    }
}

async fn admit<'a>(
    world: &'a World,
    request: &Request,
    fleet: &Arc<Fleet>,
    positions: &[usize],
) -> Result<Pass<'a>, Refused> {
    let Some(admission) = &world.admission else { return Ok(Pass { permit: None, room: None, waits: 0 }) };
    admission.arrives(world.time.now() * 1000)?;
    if let Some(permit) = admission.try_enter() {
        let permit = Some((permit, Counted::new(&world.ledger.permits)));
        return Ok(Pass { permit, room: None, waits: 0 });
    }
    queue(world, request, fleet, positions, &Tried::none()).await
}

async fn wait_for_room<'a>(
    world: &'a World,
    pass: &mut Pass<'a>,
    request: &Request,
    fleet: &Arc<Fleet>,
    positions: &[usize],
    tried: &Tried,
) -> Result<(), Failure> {
    let Some(admission) = &world.admission else { return Err(Failure::NoWorker) };
    drop(pass.permit.take());
    pass.waits += 1;
    let refused = |refused| Failure::NotAdmitted(refused, ErrorShape::OpenAi);
    if pass.waits > MAX_WAITS {
        world.ledger.gave_up_waiting();
        return Err(refused(admission.refuse(Reason::WorkersBusy)));
    }
    let waits = pass.waits;
    *pass = Pass { waits, ..queue(world, request, fleet, positions, tried).await.map_err(refused)? };
    Ok(())
}

async fn queue<'a>(
    world: &'a World,
    request: &Request,
    fleet: &Arc<Fleet>,
    positions: &[usize],
    tried: &Tried,
) -> Result<Pass<'a>, Refused> {
    let Some(admission) = &world.admission else { return Ok(Pass { permit: None, room: None, waits: 0 }) };
    let clock = world.time.shared();
    let terms = Terms { random: world.time.chance.bits(), ..world.terms };
    let room = room_wanted(fleet, positions, tried, terms, move || clock.load(Ordering::Relaxed));
    let of = room.as_ref().map(|wanted| wanted.of);
    let newcomer = Newcomer { priority: request.priority, key: request.client, shard: 0, room };
    let admitted = match admission.enter(newcomer) {
        Entry::In(admitted) => Ok(admitted),
        Entry::Refused(refused) => Err(refused),
        Entry::Waits(waiting) => {
            let mut place = waiting;
            let began = world.time.now();
            // dropped before the place, should the client leave
            let listed = world.ledger.waits(Waits {
                waiter: place.waiter().clone(),
                task: world.time.running(),
                of,
                priority: request.priority,
                since: began,
                until: began + world.queue_timeout_ms,
                joined: world.ledger.event(),
                fleet: fleet.clone(),
                positions: positions.to_vec(),
                tried: tried.clone(),
                served: Cell::new(u64::MAX),
                woken: Cell::new(false),
            });
            let until = (began + world.queue_timeout_ms).min(request.deadline);
            let called = world.time.wait(until, || place.called()).await;
            let answer = called.unwrap_or_else(|_| place.called().unwrap_or_else(|| Err(place.overdue())));
            admission.waited((world.time.now() - began) * 1000);
            drop(listed);
            answer
        }
    };
    let Admitted { permit, room } = admitted?;
    let permit = Some((permit, Counted::new(&world.ledger.permits)));
    let room = room.map(|room| {
        let counted = Counted::new(&world.ledger.in_flight[room.in_flight.worker().id()]);
        (room, counted)
    });
    Ok(Pass { permit, room, waits: 0 })
}

/// Why a worker does not go on.
enum Stopped {
    Died,
    /// The time for the head, or for everything, is over.
    Late(Failure),
}

/// Lets the worker work until `until`, on its process number `incarnation`; `head_until`: for the head only.
async fn work(
    world: &World,
    request: &Request,
    position: usize,
    incarnation: usize,
    until: Millis,
    head_until: Millis,
) -> Result<(), Stopped> {
    let server = &world.servers[position];
    loop {
        let now = world.time.now();
        let next = server.next_crash(now).unwrap_or(until).min(until).min(request.deadline).min(head_until);
        let died = || (server.incarnation(world.time.now()) != incarnation).then_some(());
        if world.time.wait(next, died).await.is_ok() {
            return Err(Stopped::Died);
        }
        let now = world.time.now();
        if now >= request.deadline {
            return Err(Stopped::Late(Failure::TotalTime));
        } else if now >= until {
            return Ok(());
        } else if now >= head_until {
            return Err(Stopped::Late(Failure::NoHead));
        }
    }
}

/// An answer: its head, and what of its body comes at once and later.
struct Reply {
    status: u16,
    retry_after_secs: Option<u64>,
    kind: Kind,
    first: &'static str,
    rest: &'static str,
}

impl Reply {
    fn json(status: u16, first: &'static str) -> Self {
        Self { status, retry_after_secs: None, kind: Kind::Json, first, rest: "" }
    }

    fn of(state: State, streams: bool, slowly: bool) -> Self {
        const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n";
        const ABORT: &str =
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"abort\"}]}\n\ndata: [DONE]\n\n";
        const ERROR: &str =
            "data: {\"error\":{\"message\":\"x\",\"type\":\"InternalServerError\",\"code\":500}}\n\n";
        const WHOLE: &str = r#"{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}"#;
        const ABORTED: &str = r#"{"choices":[{"message":{"content":"x"},"finish_reason":"abort"}]}"#;
        let events = |first, rest| Self { kind: Kind::Events, rest, ..Self::json(200, first) };
        match (state, streams) {
            (State::Busy(retry_after_secs), _) => {
                let busy = r#"{"error":{"message":"x","type":"Service Unavailable","code":503}}"#;
                Self { retry_after_secs, ..Self::json(503, busy) }
            }
            (State::EngineDead, _) => Self::json(500, DEAD),
            (State::Fails, _) | (State::ErrorEvent, false) => Self::json(500, FAILED),
            (State::Another, _) => Self::json(404, UNKNOWN),
            (State::Empty, true) => events("", ""),
            (State::Empty, false) => Self::json(200, ""),
            (State::ErrorEvent, true) => events(ROLE, ERROR),
            (State::Aborts, true) => events(ROLE, ABORT),
            (State::Aborts, false) => Self::json(200, ABORTED),
            (_, true) if slowly => events(ROLE, TEXT),
            (_, true) => events(TEXT, ""),
            (_, false) => Self::json(200, WHOLE),
        }
    }
}

const DEAD: &str = r#"{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.","type":"InternalServerError","param":null,"code":500}}"#;
const FAILED: &str = r#"{"error":{"message":"x","type":"InternalServerError","param":null,"code":500}}"#;
const UNKNOWN: &str =
    r#"{"error":{"message":"The model `a` does not exist.","type":"NotFoundError","code":404}}"#;

/// The head of an answer, or why none comes.
async fn answer(
    world: &World,
    request: &Request,
    position: usize,
    incarnation: usize,
    reused: bool,
    head_until: Millis,
) -> Result<Reply, Failure> {
    let (server, time) = (&world.servers[position], &world.time);
    let no_answer = Failure::NoAnswer { reused };
    let stopped = |stopped| match stopped {
        Stopped::Died => Failure::NoAnswer { reused },
        Stopped::Late(failure) => failure,
    };
    if !server.lists(time.now()).contains(&request.model) {
        return Ok(Reply::of(State::Another, request.streams, false));
    }
    match request.nature {
        Nature::Innocent => {}
        Nature::Resets => return Err(no_answer),
        Nature::Fails => return Ok(Reply::json(500, FAILED)),
        Nature::Kills => {
            world.ledger.kills(request, position);
            server.killed(time.now() + time.chance.between(500, 3_000));
            time.wake_all();
            return Err(no_answer);
        }
    }
    let state = loop {
        match server.state(time.now()) {
            State::Hangs | State::Sleeps => {
                let until = server.changes(time.now()).unwrap_or(Millis::MAX);
                work(world, request, position, incarnation, until, head_until).await.map_err(stopped)?;
                if time.chance.is(0.3) {
                    return Err(no_answer);
                }
            }
            state => break state,
        }
    };
    let ms = if state == State::Slow { time.chance.between(300, 900) } else { time.chance.between(1, 30) };
    work(world, request, position, incarnation, time.now() + ms, head_until).await.map_err(stopped)?;
    match state {
        State::Resets | State::Refuses => Err(no_answer),
        State::Garbage => Err(Failure::Unexpected("garbage")),
        State::BadCoding => Err(Failure::AnswerBody),
        State::CutsHead => Err(Failure::AnswerCut),
        state => Ok(Reply::of(state, request.streams, time.chance.is(0.5))),
    }
}

async fn attempt(
    world: &World,
    request: &Request,
    chosen: &mut Chosen<'_>,
    fresh: bool,
    retries: &mut Retries<'_>,
) -> Attempted {
    let (time, position, worker) = (&world.time, chosen.pick.position, chosen.worker.clone());
    let server = &world.servers[position];
    let kept = retries.keeps(request.body.len());
    let reused = kept && !fresh && time.chance.is(0.7);
    if server.state(time.now()) == State::Refuses {
        return Attempted::Failed(Failure::Connect(io::Error::from_raw_os_error(libc::ECONNREFUSED)), true);
    }
    if !reused && !request.settled && time.chance.is(world.rules.short_of_ports) {
        let short = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
        return Attempted::Failed(Failure::Connect(short), true);
    }
    if reused && time.chance.is(0.03) {
        return Attempted::Failed(Failure::NoAnswer { reused }, kept);
    }
    world.ledger.sent(request, position, time.now());
    let incarnation = server.incarnation(time.now());
    let head_until = time.now().saturating_add(world.rules.response_timeout_ms);
    let reply = match answer(world, request, position, incarnation, reused, head_until).await {
        Ok(reply) => reply,
        Err(failure @ Failure::TotalTime) => return Attempted::Failed(failure, false),
        Err(failure) => return Attempted::Failed(failure, kept),
    };

    let Reply { status, retry_after_secs, kind, first, rest } = reply;
    let refusing = Refusing { status, retry_after_secs };
    let question = retries.question(status, kind);
    let holds = kept && question.is_some_and(|(_, holds)| holds);
    let look = |body: &str, end: bool| {
        question.map_or(Seen::Pass, |(question, _)| question.look(body.as_bytes(), end, refusing))
    };
    let mut seen = look(first, rest.is_empty());
    if holds && matches!(seen, Seen::NeedMore) {
        let until = time.now() + time.chance.between(1, 50);
        match work(world, request, position, incarnation, until, Millis::MAX).await {
            Ok(()) => {}
            Err(Stopped::Died) => return Attempted::Failed(Failure::AnswerCut, kept),
            Err(Stopped::Late(failure)) => return Attempted::Failed(failure, kept),
        }
        seen = look(&format!("{first}{rest}"), true);
    }
    if matches!(seen, Seen::Poor(Failure::ModelLost)) && !retries.is_listed(request.body.as_bytes()) {
        seen = Seen::Pass;
    }
    if let (Seen::Poor(Failure::Busy(_) | Failure::Status(_)), Some(seconds)) = (&seen, retry_after_secs) {
        world.ledger.barred(request, position, world.ticked() + 1_000 * seconds);
    }
    let mut counted = status;
    if let Seen::Poor(failure) = seen {
        let next = decided(world, request, &worker, &failure, fresh, |moment| {
            // what it is is told again by `next`
            retries.gives_up(moment, &worker, &failure, kept).then_some(Next::Another)
        });
        if next.is_some() {
            request.given_up.set(true);
            return Attempted::Failed(failure, kept);
        }
        if matches!(failure, Failure::Unbegun(Unbegun::Empty)) {
            return Attempted::Failed(failure, false);
        }
        counted = failure.counted_as(status);
        retries.passed(failure);
    }

    world.ledger.begun(request);
    judge::begins(&worker, &mut chosen.pick.trial, counted, world.ticked());
    if !chosen.pick.trial.is_probe() {
        world.ledger.trial_ended(position, chosen.trial.take());
    }
    let until = time.now() + if status == 200 { request.takes_ms } else { 0 };
    let cut = server.state(time.now()) == State::CutsBody && status == 200;
    let relayed = work(world, request, position, incarnation, until, Millis::MAX).await;
    if relayed.is_err() || cut {
        if !matches!(relayed, Err(Stopped::Late(_))) {
            worker.doubt();
        }
        world.ledger.broke(request);
        counted = 502;
    }
    Attempted::Answered(counted)
}
