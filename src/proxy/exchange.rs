//! The way of one request, from its head to the end of its answer.
//!
//! [`serve`] tells it from top to bottom; what it calls computes. The steps are numbered as in the crate's
//! documentation. Steps 4 to 6 stand once more in `simulation/exchange.rs`, without sockets: who changes the order of
//! what is called here changes it there.

use std::pin::pin;

use crate::{
    http::{OutFraming, RequestFraming},
    net::{Buffer, Parting, pause},
    proxy::{
        account::Account,
        admit::{self, Claim, admit},
        attempt::{Attempted, Manner, attempt},
        body::{self, Body},
        choice::{Asked, Choice, Chosen, choose},
        client::{After, Client},
        context::Context,
        inspect::{Inspected, inspect},
        judge::Judge,
        respond::{self, Answer},
        retry::{Failure, Next, Repeatable, Retries},
        serving::{Serving, who},
    },
    telemetry::metrics::Refusal,
    vllm::{self, Endpoint, ModelSource, Treatment},
    workers::{Fleet, Health, Worker},
};

/// How long a request that was lost with its connection waits for the probe that says whether its worker is gone, and
/// how often it looks, in milliseconds. The control thread looks ten times a second for whom to probe; a probe of
/// a server that is gone, or well, takes no time.
pub(crate) const PROBE_MS: u64 = 2000;
pub(crate) const LOOK_MS: u64 = 20;

/// Serves one request whose head has been read; `rest` is what came behind the head.
///
/// # Cancellation
/// The attempt that runs is given up and its connection closed; everything is counted.
pub(super) async fn exchange(client: &mut Client<'_>, rest: Buffer) -> After {
    let cx = client.cx;
    let endpoint = vllm::lookup(client.request.method(), client.request.path());
    let account = Account::begin(cx, endpoint.index());
    let watch = client.outlet.watch.clone();
    watch.set_parting(Parting::Unanswered);
    let served = {
        let serving = pin!(serve(client, &account, endpoint, rest));
        watch.unless_cut(serving).await
    };
    match served {
        Some(after) => after,
        None => refuse(client, &account, &Failure::Draining).await,
    }
}

async fn serve(client: &mut Client<'_>, account: &Account<'_>, endpoint: &Endpoint, rest: Buffer) -> After {
    let cx = client.cx;
    if let Some(fault) = cx.fault {
        fault(client.request.target());
    }
    let fleet = cx.fleet();

    // 2. what is ours is answered at once
    if let Some(answer) = ours(cx, endpoint, &fleet) {
        let peek = client.peek_bytes();
        return match body::read(client, rest, false, |so_far| so_far.len() >= peek).await {
            Ok(_) => respond(client, account, &answer).await,
            Err(failure) => refuse(client, account, &failure).await,
        };
    }

    if let Err(failure) = admit::before_body(client, endpoint) {
        return refuse(client, account, &failure).await;
    }

    // 3. as much of the body as the way depends on, and what it says
    let (mut body, inspected) = match inspect(client, rest, endpoint, &fleet).await {
        Ok(inspected) => inspected,
        Err(failure) => return refuse(client, account, &failure).await,
    };

    // 4. who may serve it
    let mut serving = match who(endpoint, &fleet, &inspected.name, inspected.continues) {
        Ok(serving) => serving,
        Err(answer) => {
            client.refused(Refusal::UnknownModel, &"no worker has the model");
            return respond(client, account, &answer).await;
        }
    };
    let asked = Asked::of(client, endpoint, &serving, &inspected, &mut body);
    let claim = Claim::of(client, &inspected, &mut body);
    if let Serving::Workers { rename: Some(name), .. } = serving {
        inspected.rename(&mut body, name);
    }
    let framing = framing(client.request.framing(), &body);

    let mut pass = match admit(client, endpoint, &fleet, &serving, claim).await {
        Ok(pass) => pass,
        Err(failure) => return refuse(client, account, &failure).await,
    };

    // 5. attempts, until one is answered
    let asked_for = repeatable(client, endpoint, &inspected);
    let mut retries = Retries::new(&cx.retries, &cx.retry_budget, &fleet, serving.positions(), asked_for);
    let mut judge = Judge::new();
    let mut fresh: Option<Chosen<'_>> = None;
    let mut last = Failure::NoWorker;
    loop {
        let on_fresh = fresh.is_some();
        let tried = retries.tried();
        let chosen = match fresh.take() {
            Some(chosen) => Choice::Of(chosen),
            None => choose(cx, account, &fleet, &serving, &asked, tried, pass.take_room()),
        };
        let mut chosen = match chosen {
            Choice::Of(chosen) => chosen,
            Choice::Nobody => return refuse(client, account, &last).await,
            Choice::Busy => {
                let waited = admit::wait_for_room(client, &mut pass, &fleet, &serving, tried, claim);
                match Box::pin(waited).await {
                    Ok(()) => continue,
                    Err(failure) => return refuse(client, account, &failure).await,
                }
            }
        };
        retries.begin(chosen.position, on_fresh);
        let manner = Manner {
            framing,
            fresh: on_fresh,
            other_kinds: serving.has_other_kinds(),
            listens: asked.listens,
            // what the control thread passes on it has read itself
            storable: inspected.storable && !matches!(serving, Serving::Admin),
            ours: matches!(serving, Serving::Admin),
        };
        let (failure, kept) = match attempt(client, account, &mut chosen, body, manner, &mut retries).await {
            Attempted::Answered(after) => {
                match retries.take_passed() {
                    Some(failure) => judge.failed(chosen.worker, &failure, cx.clock.now()),
                    None => judge.answered(chosen.worker, account.status(), cx.clock.now()),
                }
                return after;
            }
            Attempted::Refused(failure) => return refuse(client, account, &failure).await,
            Attempted::Failed(failure, kept) => (failure, kept),
        };
        judge.failed(chosen.worker, &failure, cx.clock.now());
        chosen.unsent = failure.is_unsent();

        // 6. another attempt? The waits are in boxes: they are rare, and a timer wants lines of its own.
        let mut next = retries.next(&cx.moment(), chosen.worker, &failure, kept.is_some());
        if Retries::waits_for_probe(&failure, next) {
            match client.outlet.watch.limit(PROBE_MS, Box::pin(has_died(chosen.worker))).await {
                Ok(true) => next = retries.next(&cx.moment(), chosen.worker, &failure, kept.is_some()),
                Ok(false) => {}
                Err(_) if client.outlet.watch.is_total_over() => {
                    return refuse(client, account, &Failure::TotalTime).await;
                }
                Err(_) => {}
            }
        }
        let Some(kept) = kept else { return refuse(client, account, &failure).await };
        body = kept;
        match next {
            Next::GiveUp(_) => return refuse(client, account, &failure).await,
            Next::Another => {}
            Next::Fresh => {
                cx.pool.forget(chosen.worker);
                chosen.room.in_flight.again();
                fresh = Some(chosen);
            }
            Next::OtherKind => {
                let positions = fleet.others();
                serving = Serving::Workers { positions, model: None, rename: None, others: false };
                retries.serve(positions);
            }
            Next::Again(pause_ms) => {
                // its load is not there while it is waited for
                drop(chosen);
                if client.outlet.watch.limit(0, Box::pin(pause(pause_ms))).await.is_err() {
                    return refuse(client, account, &Failure::TotalTime).await;
                }
            }
        }
        last = failure;
    }
}

/// Waits for the probe that its failure has brought about: whether the worker is gone.
async fn has_died(worker: &Worker) -> bool {
    while worker.health() != Health::Down {
        if !worker.is_doubted() {
            return false;
        }
        pause(LOOK_MS).await;
    }
    true
}

/// What may be done with a request (`faults.md` §4).
fn repeatable(client: &Client<'_>, endpoint: &Endpoint, inspected: &Inspected) -> Repeatable {
    let request = &client.request;
    let reads = matches!(request.method(), "GET" | "HEAD");
    // what the body of one that may be stored says is only known where it was read
    let stores = endpoint.may_store && inspected.facts().is_none_or(|facts| facts.stores);
    let always = (endpoint.repeatable && !stores || reads) && request.upgrade().is_none();
    let speech = endpoint.treatment == Treatment::Route(ModelSource::Multipart);
    let names_model = endpoint.treatment == Treatment::Route(ModelSource::Json);
    Repeatable { always, generates: endpoint.generates() || speech, names_model }
}

fn ours(cx: &Context, endpoint: &Endpoint, fleet: &Fleet) -> Option<Answer> {
    match endpoint.treatment {
        Treatment::Local(what) => respond::local(what, fleet, cx.clock.now(), cx.watches.draining()),
        _ => None,
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
            client.refused(reason, failure);
            respond(client, account, &answer).await
        }
        None => After::Close,
    }
}
