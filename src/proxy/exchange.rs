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
        inspect::{Name, inspect},
        respond::{self, Answer},
        retry::{Failure, MAX_ATTEMPTS, Verdict},
    },
    routing::{Candidates, Prompt, RouteInput, Tried},
    telemetry::metrics::Refusal,
    vllm::{self, Endpoint, ModelSource, Treatment},
    workers::{Fleet, Health, Resolved, Worker},
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
    if let Serving::Workers { rename: Some(name), .. } = serving {
        inspected.rename(&mut body, name);
    }
    let framing = framing(client.request.framing(), &body);

    // 5. attempts, until one is answered
    let mut tried = Tried::none();
    let mut fresh: Option<Chosen> = None;
    loop {
        let on_fresh = fresh.is_some();
        let manner = Manner { framing, fresh: on_fresh, other_kinds: serving.has_other_kinds() };
        let chosen = fresh.take().or_else(|| choose(client, &fleet, &serving, &tried));
        let Some(chosen) = chosen else { return refuse(client, &account, &Failure::NoWorker).await };
        match attempt(client, &account, &chosen.worker, body, manner).await {
            Attempted::Answered(after) => return after,
            Attempted::Refused(failure) => return refuse(client, &account, &failure).await,
            Attempted::Failed(failure, kept) => {
                judge(&chosen.worker, &failure);
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
                        serving = Serving::Workers { positions: fleet.others(), rename: None, others: false };
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

/// The choice of one attempt.
struct Chosen {
    /// In the fleet; 0 for the control thread, which is never tried twice.
    position: usize,
    worker: Arc<Worker>,
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
    if to_admin || continues && fleet.workers.len() > 1 {
        return Ok(Serving::Admin);
    }
    let by_query = endpoint.treatment == Treatment::Route(ModelSource::Query);
    let others = !matches!(name, Name::Given(_)) && fleet.has_usable_others();
    let resolved = match name {
        Name::Irrelevant => fleet.any(),
        Name::Missing => fleet.resolve(None),
        Name::Given(name) => fleet.resolve(Some(name)),
    };
    match resolved {
        Resolved::Workers { workers, rename, .. } => {
            Ok(Serving::Workers { positions: workers, rename, others })
        }
        Resolved::Unknown if endpoint.is_known() && !(by_query && *name == Name::Missing) => {
            let name = if let Name::Given(name) = name { name } else { fleet.default_name() };
            Err(respond::unknown_model(endpoint.error_shape, name, fleet))
        }
        // a WebSocket may tell its model later, and a path may not exist: a worker says so
        Resolved::Unknown => match fleet.any() {
            Resolved::Workers { workers, .. } => {
                Ok(Serving::Workers { positions: workers, rename: None, others })
            }
            Resolved::Unknown => Ok(Serving::Workers { positions: &[], rename: None, others }),
        },
    }
}

fn choose(client: &Client<'_>, fleet: &Fleet, serving: &Serving<'_>, tried: &Tried) -> Option<Chosen> {
    let cx = client.cx;
    match serving {
        Serving::Admin if tried.count() == 0 => Some(Chosen { position: 0, worker: cx.admin.clone() }),
        Serving::Admin => None,
        Serving::Workers { positions, .. } => {
            let mut scratch = cx.positions.borrow_mut();
            let candidates = Candidates::of(fleet, positions, tried, &mut scratch);
            let prompt = Prompt::default();
            let now = cx.clock.now();
            let input = RouteInput { random: cx.random(), now, session: None, prompt: &prompt };
            let position = cx.policy.borrow_mut().choose(&input, &candidates)?.position;
            Some(Chosen { position, worker: fleet.workers[position].clone() })
        }
    }
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
