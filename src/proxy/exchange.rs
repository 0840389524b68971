//! The way of one request, from its head to the end of its answer.
//!
//! [`exchange`] tells it from top to bottom; what it calls computes. The steps are numbered as in the crate's
//! documentation.

use crate::{
    http::{OutFraming, RequestFraming},
    net::Buffer,
    proxy::{
        account::Account,
        admit::{self, Claim, admit},
        attempt::{Attempted, Manner, attempt},
        body::{self, Body},
        choice::{Asked, Choice, Chosen, choose},
        client::{After, Client},
        inspect::inspect,
        judge::judge,
        respond::{self, Answer},
        retry::{Failure, MAX_ATTEMPTS, Verdict},
        serving::{Serving, who},
    },
    routing::Tried,
    telemetry::metrics::Refusal,
    vllm::{self, Endpoint, Treatment},
    workers::Fleet,
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

    if let Err(failure) = admit::before_body(client, endpoint) {
        return refuse(client, &account, &failure).await;
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
    let claim = Claim::of(client, &inspected, &mut body);
    if let Serving::Workers { rename: Some(name), .. } = serving {
        inspected.rename(&mut body, name);
    }
    let framing = framing(client.request.framing(), &body);

    let mut pass = match admit(client, endpoint, &fleet, &serving, claim).await {
        Ok(pass) => pass,
        Err(failure) => return refuse(client, &account, &failure).await,
    };

    // 5. attempts, until one is answered
    let mut tried = Tried::none();
    let mut fresh: Option<Chosen<'_>> = None;
    loop {
        let on_fresh = fresh.is_some();
        let chosen = match fresh.take() {
            Some(chosen) => Choice::Of(chosen),
            None => choose(cx, &account, &fleet, &serving, &asked, &tried, pass.take_room()),
        };
        let mut chosen = match chosen {
            Choice::Of(chosen) => chosen,
            Choice::Nobody => return refuse(client, &account, &Failure::NoWorker).await,
            Choice::Busy => {
                let waited = admit::wait_for_room(client, &mut pass, &fleet, &serving, &tried, claim);
                match Box::pin(waited).await {
                    Ok(()) => continue,
                    Err(failure) => return refuse(client, &account, &failure).await,
                }
            }
        };
        let manner = Manner {
            framing,
            fresh: on_fresh,
            other_kinds: serving.has_other_kinds(),
            listens: asked.listens,
        };
        match attempt(client, &account, &chosen.worker, &mut chosen.room.in_flight, body, manner).await {
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
                        chosen.room.in_flight.again();
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

fn ours(endpoint: &Endpoint, fleet: &Fleet) -> Option<Answer> {
    match endpoint.treatment {
        Treatment::Local(what) => respond::local(what, fleet),
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
            client.cx.metrics().refused(reason);
            respond(client, account, &answer).await
        }
        None => After::Close,
    }
}
