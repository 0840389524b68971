//! `GET /metrics`: the process's own metrics.

use std::sync::{Arc, atomic::Ordering};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::Response,
    routing::get,
};

use crate::admin::{Admin, Definition, respond};
use crate::telemetry::metrics::{Exposition, WorkerSample};
use crate::workers::Worker;

/// The row of this endpoint.
pub(super) const DEFINITION: Definition = Definition {
    name: "metrics",
    summary: "GET /metrics: the proxy's own metrics",
    // vLLM mounts an application there, so that every path below it answers alike.
    build: |router: Router<Arc<Admin>>| {
        router
            .route("/metrics", get(metrics))
            .route("/metrics/", get(metrics))
            .route("/metrics/{*path}", get(metrics))
    },
};

async fn metrics(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = Exposition::accepted(accept);
    let samples = admin.control.fleet().load().workers.iter().map(|worker| sample(worker)).collect();
    match admin.metrics.encode(format, samples) {
        Ok(text) => respond::made(StatusCode::OK, Some(format.content_type()), text.into_bytes()),
        Err(_) => respond::internal("the metrics could not be written"),
    }
}

fn sample(worker: &Worker) -> WorkerSample {
    let counters = worker.counters();
    WorkerSample {
        worker: worker.name().to_owned(),
        healthy: worker.usable(),
        in_flight: worker.in_flight(),
        attempts: counters.attempts.load(Ordering::Relaxed),
        transport_errors: counters.transport_errors.load(Ordering::Relaxed),
        connects: counters.connects.load(Ordering::Relaxed),
    }
}
