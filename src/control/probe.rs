//! Probes `/health` of a worker and acts on what [`health`](super::health) decides.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::http::StatusCode;
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::base::Millis;
use crate::control::{
    Control,
    attempt::{self, AttemptError},
    chance,
    dummies::Dummies,
    health::{Change, Due, Probe, Verdict, Watch, may_eject},
};
use crate::telemetry::{
    Resource,
    metrics::{Ejection, ProbeVerdict},
};
use crate::workers::{Health, Worker};

/// How often a loop looks whether a shard has marked its worker down or doubts it: the price of having no wakers across
/// threads, a load of one atomic.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Workers that came up within so many milliseconds came up together: none of them is a newcomer beside the others.
const TOGETHER_MS: u64 = 1_000;

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
    // Late or failed, the probe finds out what is known.
    let _: Result<_, _> = timeout(control.pace.probe_limit, looked_up).await;
    let mut watch = Watch::new(control.pace.rules, control.clock.millis());
    let server = control.workers.iter().take(position).filter(|worker| worker.leads()).count();
    let mut dummies = control.plan.as_ref().map(|plan| Dummies::new(plan, server));
    let mut latch = Some(latch);
    loop {
        if worker.take_doubt() {
            watch.doubted(control.clock.millis());
            if let Some(doubts) = control.doubts.get(position) {
                doubts.notify_one();
            }
        }
        match watch.due(control.clock.millis(), worker.health()) {
            Due::Wait(wait_ms) => sleep(LOOK.min(Duration::from_millis(wait_ms))).await,
            Due::TakenOut => {
                let reason = "transport error of a request";
                tracing::warn!(worker = %worker.url(), reason, "worker is down");
                look_up_again(&control, position);
            }
            Due::Probe => {
                step(&control, position, worker, &mut watch, &mut dummies).await;
                worker.settle_doubt();
                drop(latch.take());
            }
        }
    }
}

/// One probe, and what follows from it.
async fn step(
    control: &Control,
    position: usize,
    worker: &Worker,
    watch: &mut Watch,
    dummies: &mut Option<Dummies>,
) {
    let before = worker.health();
    let busy = control.ranks(position).any(|rank| rank.in_flight() > 0);
    let began = control.clock.millis();
    let found = tokio::select! {
        found = look(control, position, worker, dummies) => found,
        // Its verdict would count for nothing.
        () = taken_out(worker, before) => return,
    };
    let Some((verdict, reason)) = found else {
        watch.skipped(control.clock.millis());
        return;
    };
    worker.counters().probed(match verdict {
        Verdict::Good => ProbeVerdict::Good,
        Verdict::Bad => ProbeVerdict::Bad,
        Verdict::Late => ProbeVerdict::Late,
    });
    let now = control.clock.millis();
    let probe = Probe { verdict, took_ms: now.saturating_sub(began), busy };
    match watch.probed(now, before, worker.health(), probe, chance()) {
        Change::None => {
            tracing::debug!(worker = %worker.url(), ?verdict, reason, "probed worker");
            if worker.health() == Health::Down {
                look_up_again(control, position);
            }
        }
        Change::Up => come_up(control, position, worker, &reason).await,
        Change::Restored => {
            worker.set_health(Health::Up);
            tracing::info!(worker = %worker.url(), reason, "worker is used again");
        }
        Change::Down(ejection) => {
            worker.set_health(Health::Down);
            worker.counters().ejected(ejection);
            tracing::warn!(worker = %worker.url(), reason, "worker is down");
            look_up_again(control, position);
        }
    }
    eject(control, worker, watch, control.clock.millis());
}

/// Has a worker used that was not before.
async fn come_up(control: &Control, position: usize, worker: &Worker, reason: &str) {
    if let Some(silent) = control.silent.get(position) {
        silent.forget();
    }
    // Another one may answer there now: what it serves and holds must be known before it is sent anything.
    tokio::join!(control.learn(position), control.scrape_first(position));
    let now = control.clock.millis();
    let others = control.workers.iter().filter(|other| other.usable());
    if others.into_iter().any(|other| now.saturating_sub(other.up_since()) > TOGETHER_MS) {
        control.fleet.load().newcomer(now);
    }
    worker.came_up(now);
    tracing::info!(worker = %worker.url(), reason, "worker is up");
}

/// Ejects a worker that is up if its last probes say so and enough others are left.
fn eject(control: &Control, worker: &Worker, watch: &mut Watch, now: Millis) {
    if !worker.usable() {
        return;
    }
    let Some(ejection) = watch.advice(now) else { return };
    let reason = match ejection {
        Ejection::ResponseTime => "its probes take too long",
        _ => "too many of its probes failed",
    };
    if !may_eject(&control.fleet.load(), worker, now, control.pace.max_ejected_share) {
        tracing::debug!(worker = %worker.url(), reason, "worker is not ejected, because too few others are left");
        return;
    }
    worker.set_health(Health::Ejected);
    worker.counters().ejected(ejection);
    let for_ms = watch.ejected(now, ejection);
    tracing::warn!(worker = %worker.url(), reason, for_ms, "worker is ejected");
}

/// Ends when a worker that was up `before` is no more.
async fn taken_out(worker: &Worker, before: Health) {
    while !matches!(before, Health::Up | Health::Ejected) || worker.answers() {
        sleep(LOOK).await;
    }
}

/// Its name may mean another address by now.
fn look_up_again(control: &Control, position: usize) {
    if let Some(lookup) = control.lookups.get(position) {
        lookup.notify_one();
    }
}

/// A probe of `/health`, and a real request where that is due. `None`: there was no descriptor, port or memory to ask
/// with, which says nothing of the worker (`faults.md` P3, P4).
async fn look(
    control: &Control,
    position: usize,
    worker: &Worker,
    dummies: &mut Option<Dummies>,
) -> Option<(Verdict, String)> {
    let found = probe(control, worker).await?;
    match dummies {
        Some(dummies) if found.0 == Verdict::Good => {
            Some(dummies.send(control, position, worker).await.unwrap_or(found))
        }
        _ => Some(found),
    }
}

async fn probe(control: &Control, worker: &Worker) -> Option<(Verdict, String)> {
    let limit = control.pace.probe_limit;
    let asked = attempt::get(worker, "/health", control.key.as_ref(), limit, BODY_BYTES).await;
    if let Err(AttemptError::Connect(error)) = &asked
        && Resource::of(error).is_some()
    {
        tracing::debug!(worker = %worker.url(), %error, "worker cannot be probed");
        return None;
    }
    Some(match asked {
        Ok((status, _)) => (verdict(status), format!("health answered {}", status.as_u16())),
        Err(AttemptError::Late) => (Verdict::Late, "health did not answer in time".to_owned()),
        // A full accept queue drops what asks to connect: that is load as well.
        Err(AttemptError::Connect(error)) if error.kind() == io::ErrorKind::TimedOut => {
            (Verdict::Late, "connect timed out".to_owned())
        }
        Err(error) => (Verdict::Bad, error.to_string()),
    })
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
