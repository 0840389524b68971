//! What a failed attempt says of its worker.

use std::sync::atomic::Ordering;

use crate::{
    proxy::retry::Failure,
    workers::{Health, Worker},
};

/// Counts a failed attempt, and takes the worker out until a probe says otherwise.
pub(super) fn judge(worker: &Worker, failure: &Failure) {
    if failure.is_transport() {
        worker.counters().transport_errors.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(worker = worker.name(), error = %failure, "an attempt failed");
    }
    if failure.condemns() {
        // the control thread sees it, says so and probes
        worker.set_health(Health::Down);
    } else if failure.doubts() {
        worker.doubt();
    }
}
