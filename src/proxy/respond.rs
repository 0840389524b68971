//! The answers that we make ourselves, in the shape of vLLM's Python front end (`vllm-surface.md` §3.1).
//!
//! [`failure`] turns a failure into its answer; nothing else does.

use std::borrow::Cow;

use crate::{
    admission::{Reason, Refused},
    base::Millis,
    http::RequestError,
    proxy::retry::Failure,
    telemetry::{
        Resource,
        metrics::{Break, Refusal},
    },
    vllm::{Endpoint, ErrorShape, Local, errors},
    workers::{Fleet, Standing},
};

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// Seconds after which a client may try again when no worker is up: the time of a few probes.
const RETRY_AFTER_SECS: u32 = 5;

/// The same when all are busy.
const BUSY_SECS: u32 = 1;

/// What is said when the time for draining is over.
const PARTING: &str = "The proxy is shutting down. Please try again.";

/// An answer of ours.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    content_type: Option<&'static str>,
    body: Cow<'static, [u8]>,
    retry_after_secs: Option<u32>,
    allow: Option<&'static str>,
    /// Whether the connection ends with it.
    pub(super) close: bool,
}

impl Answer {
    fn json(status: u16, body: Vec<u8>) -> Self {
        Self { status, content_type: Some(JSON), body: Cow::Owned(body), ..Self::default() }
    }

    fn error(status: u16, message: &str) -> Self {
        let kind = errors::status_phrase(status);
        Self::json(status, errors::openai(message, kind, None, status))
    }

    fn text(status: u16, text: &'static str) -> Self {
        let body = Cow::Borrowed(text.as_bytes());
        Self { status, content_type: Some(TEXT), body, close: true, ..Self::default() }
    }

    fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Appends head and body, in uvicorn's order of fields. To a HEAD request no body is sent.
    pub(super) fn write(
        &self,
        out: &mut Vec<u8>,
        date: &str,
        keep_alive: bool,
        to_http10: bool,
        to_head: bool,
    ) {
        let mut push = |parts: &[&str]| parts.iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
        let status = self.status.to_string();
        push(&["HTTP/1.1 ", &status, " ", errors::status_phrase(self.status), "\r\ndate: ", date]);
        push(&["\r\nserver: vllm-proxy\r\n"]);
        if let Some(allow) = self.allow {
            push(&["allow: ", allow, "\r\n"]);
        }
        let length = format!("content-length: {}\r\n", self.body.len());
        match self.content_type {
            None => push(&[&length]),
            // the text comes from below FastAPI, which writes the two the other way round
            Some(TEXT) => push(&["content-type: ", TEXT, "\r\n", &length]),
            Some(kind) => push(&[&length, "content-type: ", kind, "\r\n"]),
        }
        if let Some(seconds) = self.retry_after_secs {
            push(&["retry-after: ", &seconds.to_string(), "\r\n"]);
        }
        if self.content_type != Some(TEXT) {
            push(&["vary: Origin\r\n"]);
        }
        if !keep_alive {
            push(&["connection: close\r\n"]);
        } else if to_http10 {
            push(&["connection: keep-alive\r\n"]);
        }
        push(&["\r\n"]);
        if !to_head {
            out.extend_from_slice(&self.body);
        }
    }
}

/// What the shard answers itself from the fleet; `None` where a worker has to be asked.
pub(super) fn local(what: Local, fleet: &Fleet, now: Millis, draining: bool) -> Option<Answer> {
    match what {
        Local::Health | Local::Ping => {
            let status = if fleet.standing(now) == Standing::Serves { 200 } else { 503 };
            Some(Answer { status, ..Answer::default() })
        }
        Local::Live => Some(Answer::json(200, br#"{"status":"alive"}"#.to_vec())),
        Local::Ready => Some(match fleet.standing(now) {
            _ if draining => not_ready("draining").closing(),
            Standing::Serves => Answer::json(200, br#"{"status":"ready"}"#.to_vec()),
            standing => not_ready(standing.reason()),
        }),
        Local::Models => fleet.models_json().map(|body| Answer::json(200, body.to_vec())),
        Local::Version => fleet.version_json().map(|body| Answer::json(200, body.to_vec())),
    }
}

fn not_ready(reason: &str) -> Answer {
    Answer::json(503, format!(r#"{{"status":"not ready","reason":"{reason}"}}"#).into_bytes())
}

/// vLLM's 404 for a model that it does not serve.
pub(super) fn unknown_model(shape: ErrorShape, name: &str, fleet: &Fleet) -> Answer {
    Answer::json(404, errors::unknown_model(shape, name, fleet.valid_names()))
}

/// The status that is counted for an answer that broke off, and the code in the event that says so.
pub(super) fn status_of(reason: Break) -> u16 {
    match reason {
        Break::IdleTimeout | Break::TotalTimeout => 504,
        Break::Draining => 503,
        Break::WorkerBroke | Break::BadCoding | Break::Empty | Break::SlowClient | Break::WorkerError => 502,
    }
}

/// The events with which a stream ends that broke off.
pub(super) fn last_events(endpoint: &Endpoint, reason: Break) -> Vec<u8> {
    let message = match reason {
        Break::IdleTimeout => "The worker has sent nothing for too long.",
        Break::TotalTimeout => "The request took longer than it may.",
        Break::Draining => PARTING,
        Break::BadCoding => "The worker's answer is malformed from here on.",
        Break::Empty => "The worker's answer is empty. Please try again.",
        Break::WorkerBroke | Break::SlowClient | Break::WorkerError => {
            "The worker broke off its answer. Please try again."
        }
    };
    errors::stream(endpoint, message, status_of(reason))
}

/// To a client for which there is no room.
pub(super) fn crowded() -> Answer {
    let mut answer = Answer::error(503, "Too many clients are connected. Please try again later.").closing();
    answer.retry_after_secs = Some(RETRY_AFTER_SECS);
    answer
}

/// To a request for which no connection to a worker can be made, through no fault of the worker.
fn out_of(resource: Resource) -> Answer {
    let what = resource.label();
    let mut answer = Answer::error(
        503,
        &format!("The proxy is out of {what} for connections to workers. Please try again later."),
    );
    answer.retry_after_secs = Some(RETRY_AFTER_SECS);
    answer
}

/// The answer to a failure, and the reason that is counted; `None` when there is nobody to answer.
pub(super) fn failure(failure: &Failure) -> Option<(Answer, Refusal)> {
    if let Failure::Connect(error) = failure
        && let Some(resource) = Resource::of(error)
    {
        return Some((out_of(resource), Refusal::Overload));
    }
    Some(match failure {
        Failure::Request(error) => return Some(request(*error)),
        Failure::RequestBody => (Answer::text(400, errors::INVALID_REQUEST_TEXT), Refusal::Malformed),
        Failure::BodyTooLarge { .. } => {
            (Answer::error(413, &failure.to_string()).closing(), Refusal::BodyTooLarge)
        }
        Failure::Late => (Answer::text(408, "Request Timeout"), Refusal::ClientTimeout),
        Failure::ClientGone => return None,
        Failure::NotAdmitted(refused, shape) => not_admitted(*refused, *shape),
        Failure::Draining => {
            let mut answer = Answer::error(503, PARTING).closing();
            answer.retry_after_secs = Some(RETRY_AFTER_SECS);
            (answer, Refusal::Draining)
        }
        Failure::NoWorker | Failure::Connect(_) | Failure::NoSuchPath => {
            let mut answer = Answer::error(
                503,
                "No worker that could serve this request can be reached. Please try again later.",
            );
            answer.retry_after_secs = Some(RETRY_AFTER_SECS);
            (answer, Refusal::NoWorker)
        }
        Failure::NoHead | Failure::Unread | Failure::Stalled => {
            (Answer::error(504, &format!("The worker failed: {failure}.")), Refusal::WorkerTimeout)
        }
        Failure::TotalTime => {
            (Answer::error(504, "The request took longer than it may."), Refusal::RequestTimeout)
        }
        Failure::Busy(_) | Failure::Status(_) => {
            let mut answer = Answer::error(503, "All workers are busy. Please try again later.");
            answer.retry_after_secs = Some(BUSY_SECS);
            (answer, Refusal::Overload)
        }
        Failure::NoAnswer { .. }
        | Failure::EngineDead
        | Failure::ModelLost
        | Failure::Unbegun(_)
        | Failure::Aborted
        | Failure::BadAnswer(_)
        | Failure::AnswerCut
        | Failure::AnswerBody
        | Failure::Unexpected(_) => {
            (Answer::error(502, &format!("The worker failed: {failure}.")), Refusal::BadAnswer)
        }
    })
}

/// The status of the answer to a failure.
#[cfg(test)]
pub(crate) fn status_of_failure(of: &Failure) -> Option<u16> {
    failure(of).map(|(answer, _)| answer.status)
}

/// vLLM's type of a plain HTTP error, whatever the form.
fn not_admitted(refused: Refused, shape: ErrorShape) -> (Answer, Refusal) {
    let Refused { reason, retry_after_secs } = refused;
    let (status, refusal) = match reason {
        Reason::RateLimit => (429, Refusal::RateLimit),
        Reason::QueueFull => (429, Refusal::QueueFull),
        Reason::QueueTimeout => (429, Refusal::QueueTimeout),
        Reason::WorkersBusy => (503, Refusal::WorkersBusy),
        Reason::WorkersTimeout => (503, Refusal::WorkersTimeout),
        Reason::Memory => (503, Refusal::BodyMemory),
    };
    let message = format!("The request was not accepted, {reason}. Please try again later.");
    let kind = errors::status_phrase(status);
    let mut answer = Answer::json(status, errors::shaped(shape, &message, kind, None, status));
    answer.retry_after_secs = Some(retry_after_secs);
    (answer, refusal)
}

fn request(error: RequestError) -> (Answer, Refusal) {
    match error {
        RequestError::Malformed => (Answer::text(400, errors::INVALID_REQUEST_TEXT), Refusal::Malformed),
        RequestError::Version => (Answer::text(505, "HTTP Version Not Supported"), Refusal::Malformed),
        RequestError::TargetTooLong => (Answer::text(414, "URI Too Long"), Refusal::HeadTooLarge),
        RequestError::HeadTooLarge | RequestError::TooManyFields => {
            (Answer::text(431, "Request Header Fields Too Large"), Refusal::HeadTooLarge)
        }
        RequestError::Method => {
            let mut answer = Answer::json(405, errors::detail("Method Not Allowed")).closing();
            answer.allow = Some("DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT");
            (answer, Refusal::UnknownPath)
        }
    }
}
