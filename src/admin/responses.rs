//! Stored responses, which only the worker that made them holds.
//!
//! Who that is says whoever does not answer `GET /v1/responses/{id}` with 404. The worker that is remembered to have
//! stored it ([`StoredResponses`]) is asked first; all other usable ones are asked at once where nobody is remembered,
//! where that worker does not say that it has it, or where it is slow to say so: memory makes it quicker and is never
//! taken at its word. A `GET` of a client is that question itself. A response that continues another one
//! (`previous_response_id`) goes to the holder of that: to the worker that is remembered without a question, because its
//! success is one; without a holder, any worker of the model answers the 404 in its own words.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, Uri, header, request},
    response::Response,
    routing::{get, post},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;

use crate::admin::{Admin, Definition, forward::copy, forward::forward, respond};
use crate::control::{self, AttemptError};
use crate::vllm::{Facts, Key, ResponseId, Sought, errors, scan_json};
use crate::workers::{Resolved, StoredResponses, Worker};

/// Time for the heads of all answers: looking a response up is no work, and a stream of it begins at once.
const LIMIT: Duration = Duration::from_secs(30);

/// A worker that is remembered has so much time before the others are asked as well.
const HEAD_START: Duration = Duration::from_secs(1);

/// What stands before an id in a path.
const PREFIX: &str = "/v1/responses/";

/// Type of a stream of events.
const EVENTS: &[u8] = b"text/event-stream";

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
    let id = unescaped(head.uri.path().strip_prefix(PREFIX).unwrap_or_default());
    match ask(&admin, &head, &id).await {
        Asked::Holder(_, response) => response,
        Asked::Nobody(response) => response,
    }
}

/// `POST /v1/responses/{id}/cancel`.
async fn cancel(State(admin): State<Arc<Admin>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let Some(stored) = head.uri.path().strip_suffix("/cancel") else { return respond::not_found() };
    let Some(question) = question(&head, stored) else { return respond::not_found() };
    let id = unescaped(stored.strip_prefix(PREFIX).unwrap_or_default());
    match ask(&admin, &question, &id).await {
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
    let question = previous(&facts, &body)
        .and_then(|id| Some((question(&head, &format!("{PREFIX}{}", escaped(&id)))?, id)));
    let (workers, body) = candidates(&admin, &facts, body);
    head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    let request = || copy(&head, Body::from(body.clone()));
    let passed = |worker, answer| if facts.storable { storing(&admin, worker, answer) } else { answer };
    if let Some((question, id)) = question {
        // Who has it begins at once: a success needs no question, and no second worker that stores.
        let mut refused = None;
        if let Some(server) = admin.remembered(&admin.servers(None), StoredResponses::hash(&id)) {
            let worker = admin.least_busy(server);
            match forward(&admin, &worker, request()).await {
                Ok(answer) if answer.status().is_success() => return passed(worker, answer),
                Ok(answer) => refused = Some((worker, answer)),
                Err(AttemptError::Connect(_) | AttemptError::Unresolved) => (),
                Err(error) => return respond::attempt(&error),
            }
        }
        if let Asked::Holder(holder, answer) = ask(&admin, &question, &id).await {
            drop(answer);
            if let Some((_, refusal)) = refused.filter(|(worker, _)| worker.shares_server(&holder)) {
                return refusal;
            }
            let holder = admin.least_busy(holder);
            let answer = send_on(&admin, &holder, request()).await;
            return passed(holder, answer);
        }
    }
    for worker in workers {
        match forward(&admin, &worker, request()).await {
            Ok(answer) => return passed(worker, answer),
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

/// Sends the head, without a body, to the usable servers (their ranks share what is stored): to the one that is
/// remembered for the response, and to the others if that does not decide within [`HEAD_START`]. The first answer that
/// is neither a 404 nor a 5xx decides; the others are dropped. Without one, a 5xx or a silence comes before a 404,
/// because it may be the holder's; a worker that cannot be reached holds nothing any more.
async fn ask(admin: &Admin, head: &request::Parts, id: &str) -> Asked {
    let id = StoredResponses::hash(id);
    let mut others = admin.servers(None);
    let question = |worker: Arc<Worker>| async move {
        let answer = timeout(LIMIT, forward(admin, &worker, copy(head, Body::empty()))).await;
        (worker, answer.unwrap_or(Err(AttemptError::Late)))
    };
    let first = admin.remembered(&others, id);
    others.retain(|server| first.as_ref().is_none_or(|first| !Arc::ptr_eq(server, first)));
    let mut asked: FuturesUnordered<_> = first.into_iter().map(question).collect();
    let (mut missing, mut unclear, mut failed) = (None, None, None);
    loop {
        let patience = if others.is_empty() { LIMIT } else { HEAD_START };
        let (worker, answer) = match timeout(patience, asked.next()).await {
            Ok(Some(answered)) => answered,
            Ok(None) if others.is_empty() => break,
            Ok(None) | Err(_) => {
                asked.extend(others.drain(..).map(question));
                continue;
            }
        };
        match answer {
            Ok(answer) if answer.status() == StatusCode::NOT_FOUND => {
                if missing.is_none() || !is_no_such_path(&answer) {
                    missing = Some(answer);
                }
            }
            Ok(answer) if answer.status().is_server_error() => unclear = Some(answer),
            Ok(answer) => {
                if answer.status().is_success() {
                    admin.stored.put(id, worker.id());
                }
                return Asked::Holder(worker, answer);
            }
            Err(error @ AttemptError::Late) => unclear = Some(respond::attempt(&error)),
            Err(error) => failed = Some(respond::attempt(&error)),
        }
    }
    Asked::Nobody(unclear.or(missing).or(failed).unwrap_or_else(respond::no_worker))
}

impl Admin {
    /// The one of `servers` that is remembered to have stored the response.
    fn remembered(&self, servers: &[Arc<Worker>], response: u64) -> Option<Arc<Worker>> {
        let id = self.stored.get(response)?;
        let fleet = self.control.fleet().load();
        let holder = fleet.workers.iter().find(|worker| worker.id() == id)?;
        servers.iter().find(|server| server.shares_server(holder)).cloned()
    }
}

/// Reads along in an answer of `worker`, and remembers that it has stored the response.
fn storing(admin: &Admin, worker: Arc<Worker>, answer: Response) -> Response {
    if answer.status() != StatusCode::OK || answer.headers().contains_key(header::CONTENT_ENCODING) {
        return answer;
    }
    let kind = answer.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let events = kind.get(..EVENTS.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS));
    let id = Some(ResponseId::new(events));
    answer.map(|body| Body::new(Storing { body, id, stored: admin.stored.clone(), worker }))
}

/// The body of a response that may be stored.
struct Storing {
    body: Body,
    /// Until the id has come.
    id: Option<ResponseId>,
    stored: Arc<StoredResponses>,
    worker: Arc<Worker>,
}

impl Storing {
    /// A part of the body is about to be passed on.
    fn part(&mut self, bytes: &[u8]) {
        let Some(id) = &mut self.id else { return };
        match id.push(bytes) {
            Sought::NeedMore => return,
            Sought::Nothing => {}
            Sought::Id(id) => self.stored.made(StoredResponses::hash(&id), &self.worker),
        }
        self.id = None;
    }
}

impl HttpBody for Storing {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            self.part(bytes);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
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

/// What a segment of a path says.
fn unescaped(segment: &str) -> String {
    let (mut text, mut rest) = (Vec::with_capacity(segment.len()), segment.as_bytes());
    while let Some((&first, behind)) = rest.split_first() {
        let escaped = behind.get(..2).filter(|_| first == b'%').and_then(|digits| {
            let digits = str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
            u8::from_str_radix(digits, 16).ok()
        });
        text.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { behind.get(2..).unwrap_or_default() } else { behind };
    }
    String::from_utf8_lossy(&text).into_owned()
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

    #[test]
    fn an_id_in_a_path_is_the_one_in_a_body() {
        for id in ["resp_1-a.b", "a/../b?c#d é%41", "..", "%", "%4", "%zz"] {
            assert_eq!(unescaped(&escaped(id)), id);
        }
        assert_eq!(unescaped("resp%5F1%5f%+1%2"), "resp_1_%+1%2");
        assert_eq!(unescaped("%ff"), "\u{fffd}");
    }
}
