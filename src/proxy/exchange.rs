//! The way of one request, from its head to the end of its answer.
//!
//! [`exchange`] tells it from top to bottom; what it calls computes. The steps are numbered as in the crate's
//! documentation.

use std::{borrow::Cow, sync::Arc};

use crate::{
    http::{OutFraming, RequestFraming},
    net::Buffer,
    proxy::{
        account::Account,
        attempt::{Attempted, attempt},
        body::{self, Body},
        client::{After, Client},
        respond,
        retry::{Failure, MAX_ATTEMPTS, Verdict},
    },
    routing::{Candidates, RouteInput, Tried},
    vllm::{self, Endpoint, Facts, ModelFact, ModelSource, Multipart, MultipartFact, Treatment},
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

    // 3. what is ours is answered at once
    if let Treatment::Local(what) = endpoint.treatment {
        if let Some(answer) = respond::local(what, &fleet) {
            account.answered(answer.status);
            let after = match body::read(client, rest, false, |_| true).await {
                Ok(Body::Whole(_)) => client.answer(&answer).await,
                Ok(Body::Streaming(_)) => client.answer(&answer.closing()).await,
                Err(failure) => refuse(client, &account, &failure).await,
            };
            account.complete();
            return after;
        }
    }

    // 4. as much of the body as the way depends on
    let need = Need::of(endpoint, &fleet, client);
    let (mut body, facts) = match read_body(client, rest, &need).await {
        Ok(read) => read,
        Err(failure) => return refuse(client, &account, &failure).await,
    };

    // 5. facts, and who may serve it
    let to_admin = match endpoint.treatment {
        Treatment::Admin | Treatment::Broadcast(_) | Treatment::Sticky => true,
        Treatment::Local(_) | Treatment::Route(_) => facts.previous_response && fleet.workers.len() > 1,
    };
    let name = facts.name(body.arrived().filled());
    let resolved = match name {
        Name::Irrelevant => fleet.any(),
        Name::Missing => fleet.resolve(None),
        Name::Given(ref name) => fleet.resolve(Some(name)),
    };
    let Resolved::Workers { workers, rename, .. } = resolved else {
        let answer = respond::unknown_model(endpoint.error_shape, name.as_str(), &fleet);
        cx.metrics().refused(crate::telemetry::metrics::Refusal::UnknownModel);
        account.answered(answer.status);
        let after = client.answer(&answer).await;
        account.complete();
        return linger_if_unread(after, &body);
    };
    if let (Some(rename), false) = (rename, to_admin) {
        facts.splice(&mut body, rename);
    }
    let framing = framing(client, &body);

    // 6. attempts, until one is answered
    let mut tried = Tried::none();
    let mut fresh = None;
    loop {
        let position = if to_admin { None } else { fresh.take().or_else(|| choose(client, &fleet, workers, &tried)) };
        let worker: Arc<Worker> = match position {
            Some(position) => fleet.workers[position].clone(),
            None if to_admin => cx.admin.clone(),
            None => return refuse(client, &account, &Failure::NoWorker).await,
        };
        let on_fresh = tried.fresh_only();
        match attempt(client, &account, &worker, body, framing, on_fresh).await {
            Attempted::Answered(after) => return after,
            Attempted::Refused(failure) => return refuse(client, &account, &failure).await,
            Attempted::Failed(failure, kept) => {
                judge(&worker, &failure, to_admin);
                let (verdict, Some(kept)) = (failure.verdict(), kept) else {
                    return refuse(client, &account, &failure).await;
                };
                match verdict {
                    Verdict::Another(reason) if !to_admin && tried.count() + 1 < MAX_ATTEMPTS => {
                        tried.add(position.unwrap_or_default());
                        cx.metrics().retried(reason);
                    }
                    Verdict::Fresh(reason) if !on_fresh => {
                        cx.pool.forget(&worker);
                        tried.set_fresh_only();
                        fresh = position;
                        cx.metrics().retried(reason);
                    }
                    _ => return refuse(client, &account, &failure).await,
                }
                body = kept;
            }
        }
    }
}
