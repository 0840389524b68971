//! `GET /metrics`: the process's own metrics.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::Response,
    routing::get,
};

use crate::admin::{Admin, Definition, respond};
use crate::telemetry::metrics::{Exposition, WorkerSample};
use crate::workers::{Rest, Worker};

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
    let engine = worker.engine();
    let load = worker.own_load();
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    WorkerSample {
        worker: worker.name().to_owned(),
        healthy: worker.usable(),
        breaker: worker.breaker().state() as u8,
        asleep: worker.rest() == Some(Rest::Asleep),
        paused: worker.rest() == Some(Rest::Paused),
        ejections: counters.ejections.iter().map(read).collect(),
        probes: counters.probes.iter().map(read).collect(),
        in_flight: worker.in_flight(),
        peers: worker.peers_load().in_flight,
        attempts: read(&counters.attempts),
        transport_errors: read(&counters.transport_errors),
        connects: read(&counters.connects),
        queued_tokens: load.queued_tokens,
        decode_tokens: load.decode_tokens,
        engine_running: engine.running(),
        engine_waiting: engine.waiting(),
        kv_usage: engine.kv_usage(),
        cache_tokens: engine.cache_tokens(),
        block_tokens: engine.block_tokens(),
        foreign: engine.foreign(),
        prompt_tokens: read(&counters.prompt_tokens),
        predicted_cached_tokens: read(&counters.predicted_cached_tokens),
        reported_prompt_tokens: read(&counters.reported_prompt_tokens),
        reported_cached_tokens: read(&counters.reported_cached_tokens),
        selections: counters.selections.iter().map(read).collect(),
    }
}
