//! Probes `/health` of a worker and acts on what [`health`](super::health) decides.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::http::StatusCode;
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::control::{
    Control,
    attempt::{self, AttemptError},
    chance,
    health::{Change, Due, Verdict, Watch},
};
use crate::workers::{Health, Worker};

/// How often a loop looks whether a shard has marked its worker down: the price of having no wakers across
/// threads, a load of one atomic.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// What is read of a probe's body; `/health` has none.
const BODY_BYTES: usize = 1024 * 1024;

/// Watches over the worker at `position`, beginning when its name was looked up. `latch` is dropped when the
/// first verdict is in force.
pub(super) async fn run(
    control: Arc<Control>,
    position: usize,
    looked_up: oneshot::Receiver<()>,
    latch: mpsc::Sender<Infallible>,
) {
    let Some(worker) = control.workers.get(position) else { return };
    let interval_ms = u64::try_from(control.pace.probe_interval.as_millis()).unwrap_or(u64::MAX);
    // Late or failed, the probe finds out what is known.
    let _: Result<_, _> = timeout(control.pace.probe_limit, looked_up).await;
    let mut watch = Watch::new(interval_ms, control.clock.millis());
    let mut latch = Some(latch);
    loop {
        match watch.due(control.clock.millis(), worker.health()) {
            Due::Wait(wait_ms) => sleep(LOOK.min(Duration::from_millis(wait_ms))).await,
            Due::TakenOut => {
                let reason = "transport error of a request";
                tracing::warn!(worker = %worker.url(), reason, "worker is down");
                look_up_again(&control, position);
            }
            Due::Probe => {
                step(&control, position, worker, &mut watch).await;
                drop(latch.take());
            }
        }
    }
}

/// One probe, and what follows from it.
async fn step(control: &Control, position: usize, worker: &Worker, watch: &mut Watch) {
    let before = worker.health();
    let (verdict, reason) = tokio::select! {
        found = probe(control, worker) => found,
        // Its verdict would count for nothing.
        () = taken_out(worker, before) => return,
    };
    let now = control.clock.millis();
    match watch.probed(now, before, worker.health(), verdict, chance()) {
        Change::None => {
            tracing::debug!(worker = %worker.url(), ?verdict, reason, "probed worker");
            if worker.health() == Health::Down {
                look_up_again(control, position);
            }
        }
        Change::Up => {
            // Another one may answer there now: what it serves and holds must be known before it is sent
            // anything.
            tokio::join!(control.learn(position), control.scrape_first(position));
            worker.set_health(Health::Up);
            tracing::info!(worker = %worker.url(), reason, "worker is up");
        }
        Change::Down => {
            worker.set_health(Health::Down);
            tracing::warn!(worker = %worker.url(), reason, "worker is down");
            look_up_again(control, position);
        }
    }
}

/// Ends when a worker that was up `before` is no more.
async fn taken_out(worker: &Worker, before: Health) {
    while before != Health::Up || worker.health() == Health::Up {
        sleep(LOOK).await;
    }
}

/// Its name may mean another address by now.
fn look_up_again(control: &Control, position: usize) {
    if let Some(lookup) = control.lookups.get(position) {
        lookup.notify_one();
    }
}

async fn probe(control: &Control, worker: &Worker) -> (Verdict, String) {
    let limit = control.pace.probe_limit;
    match attempt::get(worker, "/health", control.key.as_ref(), limit, BODY_BYTES).await {
        Ok((status, _)) => (verdict(status), format!("health answered {}", status.as_u16())),
        Err(AttemptError::Late) => (Verdict::Late, "health did not answer in time".to_owned()),
        // A full accept queue drops what asks to connect: that is load as well.
        Err(AttemptError::Connect(error)) if error.kind() == io::ErrorKind::TimedOut => {
            (Verdict::Late, "connect timed out".to_owned())
        }
        Err(error) => (Verdict::Bad, error.to_string()),
    }
}

/// vLLM answers 200, and 503 when its engine is dead. Any other answer than a 5xx comes from a server that serves:
/// a 404 from one that has no `/health`, a 401 from one that wants a key.
fn verdict(status: StatusCode) -> Verdict {
    if status.is_server_error() { Verdict::Bad } else { Verdict::Good }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_server_error_is_bad() {
        let verdicts = [200, 401, 404, 500, 503].map(|status| verdict(StatusCode::from_u16(status).unwrap()));
        use Verdict::{Bad, Good};
        assert_eq!(verdicts, [Good, Good, Good, Bad, Bad]);
    }
}
