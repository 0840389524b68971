//! Stored responses, which only the worker that made them holds.
//!
//! Who that is nobody remembers: all usable workers are asked at once with `GET /v1/responses/{id}`, and whoever
//! does not answer 404 holds it. A `GET` of a client is that question itself. A response that continues another
//! one (`previous_response_id`) goes to the holder of that; without one, any worker of the model answers the 404 in
//! its own words.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, Uri, header, request},
    response::Response,
    routing::{get, post},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::timeout;

use crate::admin::{Admin, Definition, forward::copy, forward::forward, respond};
use crate::control::{self, AttemptError};
use crate::vllm::{Facts, Key, errors, scan_json};
use crate::workers::{Resolved, Worker};

/// Time for the heads of all answers: looking a response up is no work, and a stream of it begins at once.
const LIMIT: Duration = Duration::from_secs(30);

/// The row of these endpoints.
pub(super) const DEFINITION: Definition = Definition {
    name: "responses",
    summary: "stored responses: found on the worker that holds them",
    build: |router: Router<Arc<Admin>>| {
        router
            .route("/v1/responses", post(continued))
            .route("/v1/responses/{id}", get(stored))
            .route("/v1/responses/{id}/cancel", post(cancel))
    },
};

/// `GET /v1/responses/{id}`.
async fn stored(State(admin): State<Arc<Admin>>, request: Request) -> Response {
    let (head, _) = request.into_parts();
    match ask(&admin, &head).await {
        Asked::Holder(_, response) => response,
        Asked::Nobody(response) => response,
    }
}

/// `POST /v1/responses/{id}/cancel`.
async fn cancel(State(admin): State<Arc<Admin>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let Some(stored) = head.uri.path().strip_suffix("/cancel") else { return respond::not_found() };
    let Some(question) = question(&head, stored) else { return respond::not_found() };
    match ask(&admin, &question).await {
        Asked::Holder(holder, answer) => {
            drop(answer);
            send_on(&admin, &holder, copy(&head, body)).await
        }
        Asked::Nobody(response) => response,
    }
}

/// `POST /v1/responses` with a `previous_response_id`.
async fn continued(State(admin): State<Arc<Admin>>, request: Request) -> Response {
    let (mut head, body) = request.into_parts();
    let limit = admin.limits.body_bytes;
    let body = match control::collect(body, limit).await {
        Ok(body) => body,
        Err(AttemptError::TooLarge(_)) => return respond::too_large(limit),
        Err(_) => return respond::broken_request(),
    };
    let facts = scan_json(&body);
    let question =
        previous(&facts, &body).and_then(|id| question(&head, &format!("/v1/responses/{}", escaped(&id))));
    let (workers, body) = candidates(&admin, &facts, body);
    head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    if let Some(question) = question
        && let Asked::Holder(holder, answer) = ask(&admin, &question).await
    {
        drop(answer);
        return send_on(&admin, &admin.least_busy(holder), copy(&head, Body::from(body))).await;
    }
    for worker in workers {
        match forward(&admin, &worker, copy(&head, Body::from(body.clone()))).await {
            Ok(response) => return response,
            // Nothing was sent: the next one may be asked.
            Err(AttemptError::Connect(_) | AttemptError::Unresolved) => (),
            Err(error) => return respond::attempt(&error),
        }
    }
    respond::no_worker()
}

async fn send_on(admin: &Admin, holder: &Arc<Worker>, request: Request<Body>) -> Response {
    forward(admin, holder, request).await.unwrap_or_else(|error| respond::attempt(&error))
}

/// What came of asking for a stored response.
enum Asked {
    /// Who holds it, and its answer.
    Holder(Arc<Worker>, Response),
    /// Nobody; what to say then.
    Nobody(Response),
}

/// Sends the head, without a body, to all usable servers (their ranks share what is stored). The first answer that
/// is neither a 404 nor a 5xx decides; the others are dropped. Without one, a 5xx or a silence comes before a 404,
/// because it may be the holder's; a worker that cannot be reached holds nothing any more.
async fn ask(admin: &Admin, head: &request::Parts) -> Asked {
    let workers = admin.servers(None);
    let mut asked: FuturesUnordered<_> = workers
        .iter()
        .map(|worker| async move {
            let answer = timeout(LIMIT, forward(admin, worker, copy(head, Body::empty()))).await;
            (worker, answer.unwrap_or(Err(AttemptError::Late)))
        })
        .collect();
    let (mut missing, mut unclear, mut failed) = (None, None, None);
    while let Some((worker, answer)) = asked.next().await {
        match answer {
            Ok(answer) if answer.status() == StatusCode::NOT_FOUND => {
                if missing.is_none() || !is_no_such_path(&answer) {
                    missing = Some(answer);
                }
            }
            Ok(answer) if answer.status().is_server_error() => unclear = Some(answer),
            Ok(answer) => return Asked::Holder(worker.clone(), answer),
            Err(error @ AttemptError::Late) => unclear = Some(respond::attempt(&error)),
            Err(error) => failed = Some(respond::attempt(&error)),
        }
    }
    Asked::Nobody(unclear.or(missing).or(failed).unwrap_or_else(respond::no_worker))
}

/// Whether the worker does not even have the path: one of another kind, whose 404 says nothing of the response.
fn is_no_such_path(answer: &Response) -> bool {
    let length = errors::detail("Not Found").len();
    answer.headers().get(header::CONTENT_LENGTH).is_some_and(|value| *value == HeaderValue::from(length))
}

/// The head of `GET path` in the name of the client that sent `head`.
fn question(head: &request::Parts, path: &str) -> Option<request::Parts> {
    let mut question = Request::new(()).into_parts().0;
    question.method = Method::GET;
    question.uri = path.parse::<Uri>().ok()?;
    for name in [header::AUTHORIZATION, header::HOST] {
        if let Some(value) = head.headers.get(&name) {
            question.headers.insert(name, value.clone());
        }
    }
    Some(question)
}

/// The id of the response that the body continues.
fn previous(facts: &Facts, body: &[u8]) -> Option<String> {
    let value = body.get(facts.prompt.get(Key::PreviousResponseId)?)?;
    serde_json::from_slice::<String>(value).ok().filter(|id| !id.is_empty())
}

/// `text` as one segment of a path.
fn escaped(text: &str) -> String {
    use std::fmt::Write;
    let mut segment = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) || byte == b'.' && text.len() > 2 {
            segment.push(char::from(byte));
        } else {
            write!(segment, "%{byte:02X}").unwrap_or_default();
        }
    }
    segment
}

/// The workers of the body's model, least busy first, and the body as they know the model.
fn candidates(admin: &Admin, facts: &Facts, body: Bytes) -> (Vec<Arc<Worker>>, Bytes) {
    let name = facts.model.name(&body);
    let fleet = admin.control.fleet().load();
    let rename = match fleet.resolve(name.as_deref()) {
        Resolved::Workers { rename, .. } => rename,
        Resolved::Unknown => None,
    };
    let servers = admin.servers(name.as_deref().filter(|name| !name.is_empty()));
    let mut workers: Vec<_> = servers.into_iter().map(|lead| admin.least_busy(lead)).collect();
    workers.sort_by_key(|worker| worker.in_flight());
    let edit = rename.and_then(|rename| facts.rename(rename));
    let body = match edit {
        Some((place, name)) => {
            let parts = [body.get(..place.start), Some(&name[..]), body.get(place.end..)];
            Bytes::from(parts.map(Option::unwrap_or_default).concat())
        }
        None => body.clone(),
    };
    (workers, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_id_counts_and_escapes_are_read() {
        let id = |body: &str| previous(&scan_json(body.as_bytes()), body.as_bytes());
        assert_eq!(
            id(r#"{"previous_response_id":"a","previous_response_id":"resp\u005f1"}"#).as_deref(),
            Some("resp_1")
        );
        assert_eq!(id(r#"{"previous_response_id":null}"#), None);
        assert_eq!(id(r#"{"input":{"previous_response_id":"x"}}"#), None);
    }

    #[test]
    fn an_id_cannot_leave_its_segment() {
        assert_eq!(escaped("resp_1-a.b"), "resp_1-a.b");
        assert_eq!(escaped("a/../b?c#d é"), "a%2F..%2Fb%3Fc%23d%20%C3%A9");
        assert_eq!(escaped(".."), "%2E%2E");
    }
}
