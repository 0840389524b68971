//! The answers that admin endpoints make themselves, in vLLM's shapes (`faults.md` §1).

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};

use crate::base::Date;
use crate::control::AttemptError;
use crate::vllm::errors;

/// A path that is no endpoint here.
pub(super) fn not_found() -> Response {
    json(StatusCode::NOT_FOUND, errors::detail("Not Found"))
}

/// A method that the path does not have; axum adds `allow`.
pub(super) fn method_not_allowed() -> Response {
    json(StatusCode::METHOD_NOT_ALLOWED, errors::detail("Method Not Allowed"))
}

/// The request's body is over the limit.
pub(super) fn too_large(limit: usize) -> Response {
    failure(StatusCode::PAYLOAD_TOO_LARGE, &format!("The request body is larger than {limit} bytes."))
}

/// The request's body broke off. Hardly anybody is there to read it.
pub(super) fn broken_request() -> Response {
    failure(StatusCode::BAD_REQUEST, "The request body is not complete.")
}

/// No worker is configured, or none can be connected to.
pub(super) fn no_worker() -> Response {
    let mut response =
        failure(StatusCode::SERVICE_UNAVAILABLE, "No worker can be reached. Please try again later.");
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// A fault of ours.
pub(super) fn internal(message: &str) -> Response {
    failure(StatusCode::INTERNAL_SERVER_ERROR, message)
}

/// An attempt that brought no answer.
pub(super) fn attempt(error: &AttemptError) -> Response {
    let (status, body) = attempt_body(error);
    json(status, body)
}

/// Status and body for an attempt that brought no answer. Which worker it was stays in the log.
pub(super) fn attempt_body(error: &AttemptError) -> (StatusCode, Vec<u8>) {
    let (status, message) = match error {
        AttemptError::Late => (StatusCode::GATEWAY_TIMEOUT, "A worker did not answer in time."),
        AttemptError::Unresolved | AttemptError::Connect(_) => {
            (StatusCode::BAD_GATEWAY, "A worker cannot be reached.")
        }
        AttemptError::Transport(_)
        | AttemptError::Body(_)
        | AttemptError::TooLarge(_)
        | AttemptError::Target => (StatusCode::BAD_GATEWAY, "A worker's answer cannot be used."),
    };
    (status, body(status, message))
}

/// `{"error":{…}}` as vLLM words plain HTTP errors: the status' phrase is the type.
fn failure(status: StatusCode, message: &str) -> Response {
    json(status, body(status, message))
}

fn body(status: StatusCode, message: &str) -> Vec<u8> {
    let code = status.as_u16();
    errors::openai(message, errors::status_phrase(code), None, code)
}

fn json(status: StatusCode, body: Vec<u8>) -> Response {
    made(status, Some("application/json"), body)
}

/// An answer of ours, its fields in the order of vLLM's Python front end (`vllm-surface.md` §3.1).
pub(super) fn made(status: StatusCode, content_type: Option<&'static str>, body: Vec<u8>) -> Response {
    let length = body.len();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let fields = response.headers_mut();
    if let Ok(date) = HeaderValue::try_from(Date::now().http()) {
        fields.insert(header::DATE, date);
    }
    fields.insert(header::SERVER, HeaderValue::from_static("vllm-proxy"));
    fields.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if let Some(content_type) = content_type {
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    fields.insert(header::VARY, HeaderValue::from_static("Origin"));
    response
}
