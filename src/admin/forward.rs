//! What handlers do with a worker: send it a request, and pass its answer on.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header, request},
};
use hyper::body::{Frame, SizeHint};

use crate::admin::Admin;
use crate::control::{self, AttemptError};
use crate::telemetry::{Resource, metrics::Ejection};
use crate::vllm::RANK_FIELD;
use crate::workers::{Demand, Health, InFlight, Worker};

/// Fields that concern one connection only (RFC 9110 §7.6.1), and `Expect`, which the shard has dealt with.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// Sends a request and returns the answer with its head cleaned; the request counts as in flight on the worker
/// until the answer's body is dropped.
///
/// # Errors
/// Those of [`control::send`].
///
/// # Cancellation
/// Dropping the future, or the answer's body, closes the connection to the worker.
pub(super) async fn forward(
    admin: &Admin,
    worker: &Arc<Worker>,
    mut request: Request<Body>,
) -> Result<Response<Body>, AttemptError> {
    let in_flight = InFlight::begin(worker.clone(), Demand::default());
    clean(request.headers_mut());
    if let Some(rank) = worker.rank().and_then(|rank| HeaderValue::from_str(rank).ok()) {
        request.headers_mut().insert(RANK_FIELD, rank);
    }
    let sent = control::send(worker, request, admin.limits.connect).await;
    let mut response = sent.inspect_err(|error| failed(worker, error))?;
    clean(response.headers_mut());
    Ok(response.map(|body| Body::new(Held { body, _in_flight: in_flight })))
}

/// The same request with another body, for the next worker. Keeps the case of field names, which hyper has among
/// the extensions.
pub(super) fn copy(parts: &request::Parts, body: Body) -> Request<Body> {
    Request::from_parts(parts.clone(), body)
}

/// Notes an attempt that brought no answer. A worker that cannot be connected to is down; its probe will tell
/// when it is back.
pub(super) fn failed(worker: &Worker, error: &AttemptError) {
    worker.counters().transport_errors.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(worker = worker.name(), %error, "attempt of an admin request failed");
    match error {
        // this host is short of something, which says nothing of the worker (`faults.md` P3, P4)
        AttemptError::Connect(error) if Resource::of(error).is_some() => {}
        AttemptError::Connect(_) if worker.answers() => {
            worker.set_health(Health::Down);
            worker.counters().ejected(Ejection::Connect);
        }
        _ => worker.doubt(),
    }
}

/// Removes what concerns the other connection only, `Connection` and what it names.
fn clean(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // It cannot remove what the message needs (`faults.md` §2.2).
        .filter(|name| ![header::CONTENT_LENGTH, header::AUTHORIZATION, header::HOST].contains(name))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// A body that counts as a request in flight.
struct Held {
    body: Body,
    _in_flight: InFlight,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_one_connection_do_not_cross_and_the_rest_keeps_its_order() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("x-first", "1"),
            ("connection", "x-named, Authorization, close"),
            ("x-named", "2"),
            ("authorization", "Bearer k"),
            ("transfer-encoding", "chunked"),
            ("x-last", "3"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        clean(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "x-first", "x-last"]);
    }
}
