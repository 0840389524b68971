//! What every worker must do or be asked: sleep, load an adapter, reset a cache, tell its load.
//!
//! The request goes to every worker of its model at once, and the row of vLLM's table says how one answer is made
//! of theirs. Workers that are down are left out unless all are. A worker that cannot be reached fails a request
//! that changes something; of one that only reads, the others' answers are enough. A server with data-parallel
//! ranks is asked once: it passes the request on to its engines itself.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::Response,
    routing::{MethodRouter, on},
};
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::Value;

use crate::admin::{Admin, Definition, forward, methods, respond};
use crate::control::{self, AttemptError};
use crate::vllm::{self, Aggregate, Treatment, endpoints::TABLE};
use crate::workers::Worker;

/// The row of these endpoints.
pub(super) const DEFINITION: Definition = Definition {
    name: "broadcast",
    summary: "vLLM's paths that concern every worker: all are asked, one answer is made of theirs",
    build,
};

/// Time that all workers together have: putting weights to sleep, or updating them, takes minutes.
const LIMIT: Duration = Duration::from_secs(600);

/// Largest request. These carry names and settings, not data; it is kept once, however many workers there are.
const REQUEST_BYTES: usize = 64 * 1024 * 1024;

/// Largest answer of one worker.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// What of a request's head reaches the workers.
const FIELDS: [header::HeaderName; 3] = [header::CONTENT_TYPE, header::AUTHORIZATION, header::ACCEPT];

fn build(router: Router<Arc<Admin>>) -> Router<Arc<Admin>> {
    TABLE.iter().fold(router, |router, row| match (row.treatment, methods(row.methods)) {
        (Treatment::Broadcast(rule), Some(filter)) => {
            let handler = move |State(admin): State<Arc<Admin>>, request: Request| async move {
                broadcast(&admin, rule, row.empties_cache, request).await
            };
            let route: MethodRouter<Arc<Admin>> = on(filter, handler);
            router.route(row.path, route)
        }
        _ => router,
    })
}

async fn broadcast(admin: &Admin, rule: Aggregate, empties_cache: bool, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let limit = REQUEST_BYTES.min(admin.limits.body_bytes);
    let body = match control::collect(body, limit).await {
        Ok(body) => body,
        Err(AttemptError::TooLarge(_)) => return respond::too_large(limit),
        Err(_) => return respond::broken_request(),
    };
    let model = model(&body);
    let workers = admin.servers(model.as_deref());
    if workers.is_empty() {
        return respond::no_worker();
    }
    let headers = fields(&head.headers);
    let asked = workers.iter().map(|worker| ask(worker, &head.method, &head.uri, &headers, &body));
    let answers = join_all(asked).await;
    if empties_cache {
        // Also when another worker fails: each that has done it believes what it was told.
        let done = workers.iter().zip(&answers).filter(|(_, answer)| has_done(answer));
        done.for_each(|(worker, _)| worker.cache_lost());
    }
    if changes_models(head.uri.path()) || changes_rest(head.uri.path()) {
        // Whoever loads an adapter uses it with the next request; who sleeps is sent none.
        join_all(workers.iter().map(|worker| admin.control.learn_again(worker))).await;
    }
    if answers.iter().all(nobody_there) {
        return respond::no_worker();
    }
    answer(rule, only_good(&head.method, answers))
}

type Answer = Result<(String, u16, Vec<u8>), (String, AttemptError)>;

async fn ask(worker: &Worker, method: &Method, uri: &Uri, headers: &HeaderMap, body: &Bytes) -> Answer {
    let mut request = Request::new(Body::from(body.clone()));
    *request.method_mut() = method.clone();
    *request.uri_mut() = uri.clone();
    *request.headers_mut() = headers.clone();
    let name = worker.name().to_owned();
    match control::fetch(worker, request, LIMIT, ANSWER_BYTES).await {
        Ok(response) => Ok((name, response.status().as_u16(), response.into_body().to_vec())),
        Err(error) => {
            forward::failed(worker, &error);
            Err((name, error))
        }
    }
}

/// Whether the worker says that it has done what it was asked: `/reset_prefix_cache` of a busy one answers 200
/// and `{"success":false}`.
fn has_done(answer: &Answer) -> bool {
    #[derive(Deserialize)]
    struct Done {
        success: Option<Value>,
    }
    let Ok((_, 200..300, body)) = answer else { return false };
    let success = serde_json::from_slice(body).ok().and_then(|done: Done| done.success);
    success != Some(Value::Bool(false))
}

/// Whether the worker could not be reached, and so has done nothing.
fn nobody_there(answer: &Answer) -> bool {
    matches!(answer, Err((_, AttemptError::Connect(_) | AttemptError::Unresolved)))
}

/// The answers that count, failures as the errors they would be for a client.
fn only_good(method: &Method, answers: Vec<Answer>) -> Vec<(String, u16, Vec<u8>)> {
    let reads = *method == Method::GET && answers.iter().any(Result::is_ok);
    let told = answers.into_iter().filter(|answer| !reads || answer.is_ok());
    told.map(|answer| {
        answer.unwrap_or_else(|(name, error)| {
            tracing::warn!(worker = name, %error, "worker did not take part in a broadcast");
            let (status, body) = respond::attempt_body(&error);
            (name, status.as_u16(), body)
        })
    })
    .collect()
}

fn answer(rule: Aggregate, answers: Vec<(String, u16, Vec<u8>)>) -> Response {
    let (status, body, content_type) = vllm::aggregate(rule, &answers);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    respond::made(status, content_type, body)
}

fn fields(headers: &HeaderMap) -> HeaderMap {
    FIELDS.iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect()
}

/// The model whose workers are meant, if the body names one.
fn model(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Names {
        model: Option<Value>,
        base_model_name: Option<Value>,
    }
    let names: Names = serde_json::from_slice(body).ok()?;
    let name = |value: Option<Value>| Some(value?.as_str()?.to_owned());
    name(names.model).or(name(names.base_model_name)).filter(|name| !name.is_empty())
}

/// Whether the workers' lists of models may be others afterwards.
fn changes_models(path: &str) -> bool {
    path.contains("lora_adapter") || path.starts_with("/adapters")
}

/// Whether the workers may rest, or no longer rest, afterwards.
fn changes_rest(path: &str) -> bool {
    matches!(path, "/sleep" | "/wake_up" | "/pause" | "/resume")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_may_name_the_model_or_its_base() {
        assert_eq!(model(br#"{"model":"m"}"#).as_deref(), Some("m"));
        assert_eq!(model(br#"{"base_model_name":"m","lora_name":"l"}"#).as_deref(), Some("m"));
        for body in ["", "[]", "{}", r#"{"model":""}"#, r#"{"model":5}"#, "\u{feff}{"] {
            assert_eq!(model(body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn only_a_2xx_that_does_not_deny_it_is_done() {
        let done = |status, body: &str| has_done(&Ok(("a".to_owned(), status, body.as_bytes().to_vec())));
        assert!(done(200, r#"{"success":true}"#) && done(200, "") && done(202, "[1]") && done(200, "{}"));
        assert!(!done(200, r#"{"success":false}"#) && !done(500, r#"{"success":true}"#));
        assert!(!has_done(&Err(("a".to_owned(), AttemptError::Late))));
    }

    #[test]
    fn an_unreachable_worker_spoils_a_change_but_not_a_look() {
        let answers =
            || vec![Ok(("a".to_owned(), 200, vec![])), Err(("b".to_owned(), AttemptError::Unresolved))];
        let statuses = |method| only_good(&method, answers()).iter().map(|a| a.1).collect::<Vec<_>>();
        assert_eq!(statuses(Method::GET), [200]);
        assert_eq!(statuses(Method::POST), [200, 502]);
        let none = only_good(&Method::GET, vec![Err(("b".to_owned(), AttemptError::Late))]);
        assert_eq!(none[0].1, 504);
    }
}
