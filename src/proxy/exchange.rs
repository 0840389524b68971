//! The way of one request, from its head to the end of its answer.
//!
//! [`exchange`] tells it from top to bottom; what it calls computes. The steps are numbered as in the crate's
//! documentation.

use std::sync::{Arc, atomic::Ordering};

use crate::{
    http::{OutFraming, RequestFraming},
    net::Buffer,
    proxy::{
        account::Account,
        attempt::{Attempted, Manner, attempt},
        body::{self, Body},
        client::{After, Client},
        context::Context,
        inspect::{Inspected, Name, inspect},
        respond::{self, Answer},
        retry::{Failure, MAX_ATTEMPTS, Verdict},
    },
    routing::{Candidates, Outcome, Prompt, RouteInput, Selection, Tried},
    telemetry::metrics::Refusal,
    vllm::{self, Endpoint, ModelSource, Treatment},
    workers::{Demand, Fleet, Health, Resolved, Worker},
};

/// Serves one request whose head has been read; `rest` is what came behind the head.
///
/// # Cancellation
/// The attempt that runs is given up and its connection closed; everything is counted.
pub(super) async fn exchange(client: &mut Client<'_>, rest: Buffer) -> After {
    let cx = client.cx;
    let endpoint = vllm::lookup(client.request.method(), client.request.path());
    let account = Account::begin(cx, endpoint.index());
    if let Some(fault) = cx.fault {
        fault(client.request.target());
    }
    let fleet = cx.fleet();

    // 2. what is ours is answered at once
    if let Some(answer) = ours(endpoint, &fleet) {
        let peek = client.peek_bytes();
        return match body::read(client, rest, false, |so_far| so_far.len() >= peek).await {
            Ok(_) => respond(client, &account, &answer).await,
            Err(failure) => refuse(client, &account, &failure).await,
        };
    }

    // 3. as much of the body as the way depends on, and what it says
    let (mut body, inspected) = match inspect(client, rest, endpoint, &fleet).await {
        Ok(inspected) => inspected,
        Err(failure) => return refuse(client, &account, &failure).await,
    };

    // 4. who may serve it
    let mut serving = match who(endpoint, &fleet, &inspected.name, inspected.continues) {
        Ok(serving) => serving,
        Err(answer) => {
            cx.metrics().refused(Refusal::UnknownModel);
            return respond(client, &account, &answer).await;
        }
    };
    let asked = Asked::of(client, endpoint, &serving, &inspected, &mut body);
    if let Serving::Workers { rename: Some(name), .. } = serving {
        inspected.rename(&mut body, name);
    }
    let framing = framing(client.request.framing(), &body);

    // 5. attempts, until one is answered
    let mut tried = Tried::none();
    let mut fresh: Option<Chosen<'_>> = None;
    loop {
        let on_fresh = fresh.is_some();
        let chosen = fresh.take().or_else(|| choose(cx, &account, &fleet, &serving, &asked, &tried));
        let Some(mut chosen) = chosen else { return refuse(client, &account, &Failure::NoWorker).await };
        let manner = Manner {
            framing,
            fresh: on_fresh,
            other_kinds: serving.has_other_kinds(),
            demand: chosen.demand,
            listens: asked.listens,
        };
        match attempt(client, &account, &chosen.worker, body, manner).await {
            Attempted::Answered(after) => return after,
            Attempted::Refused(failure) => return refuse(client, &account, &failure).await,
            Attempted::Failed(failure, kept) => {
                judge(&chosen.worker, &failure);
                chosen.unsent = failure.is_unsent();
                // 6. another attempt?
                match (failure.verdict(), kept) {
                    (Verdict::Another(reason), Some(kept)) if tried.count() + 1 < MAX_ATTEMPTS => {
                        cx.metrics().retried(reason);
                        tried.add(chosen.position);
                        body = kept;
                    }
                    (Verdict::Fresh(reason), Some(kept)) if !on_fresh => {
                        cx.metrics().retried(reason);
                        cx.pool.forget(&chosen.worker);
                        fresh = Some(chosen);
                        body = kept;
                    }
                    (Verdict::OtherKind(reason), Some(kept)) => {
                        cx.metrics().retried(reason);
                        let positions = fleet.others();
                        serving = Serving::Workers { positions, model: None, rename: None, others: false };
                        body = kept;
                    }
                    _ => return refuse(client, &account, &failure).await,
                }
            }
        }
    }
}

/// Who may serve a request.
enum Serving<'a> {
    /// The control thread.
    Admin,
    /// These workers, which know the model by this name.
    Workers {
        positions: &'a [usize],
        /// The one model that is meant, if one is.
        model: Option<&'a str>,
        rename: Option<&'a str>,
        /// Whether the fleet's others may have the path if these do not: the request names no model.
        others: bool,
    },
}

impl Serving<'_> {
    fn has_other_kinds(&self) -> bool {
        matches!(self, Self::Workers { others: true, .. })
    }
}

/// What the choice of a worker may depend on.
struct Asked<'a> {
    model: Option<&'a str>,
    session: Option<u64>,
    /// Empty where the policy does not look at it.
    prompt: Prompt,
    /// Whether what the answer says of its tokens is of use.
    listens: bool,
}

impl<'a> Asked<'a> {
    /// Reads what the policy needs, and nothing where it needs nothing.
    fn of(
        client: &Client<'_>,
        endpoint: &Endpoint,
        serving: &Serving<'a>,
        inspected: &'a Inspected,
        body: &mut Body,
    ) -> Self {
        let cx = client.cx;
        let mut asked = Self { model: None, session: None, prompt: Prompt::default(), listens: false };
        let Serving::Workers { model, .. } = serving else { return asked };
        asked.model = model.or_else(|| inspected.name.given());
        let router = cx.router.borrow();
        let length = body.len();
        let body = inspected.facts().map(|facts| (body.arrived().filled(), facts));
        if cx.needs.session {
            let header = |name: &str| client.request.field(name);
            asked.session = router.session(header, body.map(|(bytes, facts)| (bytes, &facts.prompt)));
        }
        if cx.needs.prompt && endpoint.prefills {
            asked.prompt = match body {
                Some((bytes, facts)) => router.prompt(bytes, facts, asked.model),
                None => router.prompt_of_length(length.unwrap_or(0), asked.model),
            };
            asked.listens = body.is_some();
        }
        asked
    }
}

/// The choice of one attempt. However the attempt ends, the router is told when this is dropped; it does not know of
/// the control thread.
struct Chosen<'a> {
    cx: &'a Context,
    asked: &'a Asked<'a>,
    account: &'a Account<'a>,
    /// In the fleet; 0 for the control thread, which is never tried twice.
    position: usize,
    worker: Arc<Worker>,
    /// What the request is expected to ask of it.
    demand: Demand,
    /// The worker has not seen the request.
    unsent: bool,
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        let usage = (!self.unsent).then(|| self.account.usage().unwrap_or_default());
        let Self { worker, demand, asked, .. } = self;
        if Arc::ptr_eq(worker, &self.cx.admin) {
            return;
        }
        let outcome = Outcome { worker, prompt: &asked.prompt, demand: *demand, usage };
        // only a panic within the router leaves it borrowed
        if let Ok(mut router) = self.cx.router.try_borrow_mut() {
            router.ended(asked.model, &outcome);
        }
    }
}

fn ours(endpoint: &Endpoint, fleet: &Fleet) -> Option<Answer> {
    match endpoint.treatment {
        Treatment::Local(what) => respond::local(what, fleet),
        _ => None,
    }
}

fn who<'a>(
    endpoint: &Endpoint,
    fleet: &'a Fleet,
    name: &Name,
    continues: bool,
) -> Result<Serving<'a>, Answer> {
    let to_admin =
        matches!(endpoint.treatment, Treatment::Admin | Treatment::Broadcast(_) | Treatment::Sticky);
    if to_admin || continues && fleet.has_several_servers() {
        return Ok(Serving::Admin);
    }
    let by_query = endpoint.treatment == Treatment::Route(ModelSource::Query);
    let others = !matches!(name, Name::Given(_)) && fleet.has_usable_others();
    let resolved = match name {
        Name::Irrelevant => fleet.any(),
        Name::Missing => fleet.resolve(None),
        Name::Given(name) => fleet.resolve(Some(name)),
    };
    // Workers may know names that they do not list, such as adapters that they load when asked to; a WebSocket may
    // tell its model later; and a path may not exist: a worker says so.
    let ours_to_refuse =
        fleet.model_matters() && endpoint.is_known() && !(by_query && *name == Name::Missing);
    match (resolved, fleet.any()) {
        (Resolved::Workers { workers, model, rename }, _) => {
            Ok(Serving::Workers { positions: workers, model, rename, others })
        }
        (Resolved::Unknown, Resolved::Workers { workers, .. }) if !ours_to_refuse => {
            Ok(Serving::Workers { positions: workers, model: None, rename: None, others })
        }
        (Resolved::Unknown, _) => {
            let name = name.given().unwrap_or(fleet.default_name());
            Err(respond::unknown_model(endpoint.error_shape, name, fleet))
        }
    }
}

fn choose<'a>(
    cx: &'a Context,
    account: &'a Account<'a>,
    fleet: &Fleet,
    serving: &Serving<'_>,
    asked: &'a Asked<'a>,
    tried: &Tried,
) -> Option<Chosen<'a>> {
    let (worker, position, demand) = match serving {
        Serving::Admin if tried.count() == 0 => (&cx.admin, 0, Demand::default()),
        Serving::Admin => return None,
        Serving::Workers { positions, .. } => {
            let mut scratch = cx.positions.borrow_mut();
            let candidates = Candidates::of(fleet, positions, tried, &mut scratch);
            let input = RouteInput {
                random: cx.random(),
                now: cx.clock.now(),
                session: asked.session,
                prompt: &asked.prompt,
            };
            let Selection { position, demand } =
                cx.router.borrow_mut().choose(asked.model, &input, &candidates)?;
            (&fleet.workers[position], position, demand)
        }
    };
    Some(Chosen { cx, asked, account, position, worker: worker.clone(), demand, unsent: false })
}

/// How the body goes to a worker: as it came, unless it was decoded or its length has changed.
fn framing(received: RequestFraming, body: &Body) -> OutFraming {
    match (received, body.len()) {
        (RequestFraming::Length(length), Some(now)) if length == now => OutFraming::AsReceived,
        (_, Some(now)) => OutFraming::Length(now),
        (_, None) => OutFraming::Chunked,
    }
}

/// Counts a failed attempt, and takes the worker out until a probe says otherwise.
fn judge(worker: &Worker, failure: &Failure) {
    if failure.is_transport() {
        worker.counters().transport_errors.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(worker = worker.name(), error = %failure, "an attempt failed");
    }
    if failure.condemns() {
        // the control thread sees it, says so and probes
        worker.set_health(Health::Down);
    }
}

async fn respond(client: &mut Client<'_>, account: &Account<'_>, answer: &Answer) -> After {
    account.answered(answer.status);
    let after = client.answer(answer).await;
    if after != After::Close {
        account.complete();
    }
    after
}

async fn refuse(client: &mut Client<'_>, account: &Account<'_>, failure: &Failure) -> After {
    match respond::failure(failure) {
        Some((answer, reason)) => {
            client.cx.metrics().refused(reason);
            respond(client, account, &answer).await
        }
        None => After::Close,
    }
}
