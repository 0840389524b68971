//! Reads `/metrics` of a server and acts on what [`figures`](super::figures) makes of it.
//!
//! One look serves all ranks of the server. A server that is down is not asked; the look with which it comes up
//! is part of its probe, so that what its cache holds is known before it is sent anything.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{body::Bytes, http::StatusCode};
use tokio::time::{sleep, timeout};

use crate::base::Millis;
use crate::control::{
    Control,
    attempt::{self, AttemptError},
    chance,
    figures::{Rank, Watch},
    probe::LOOK,
};
use crate::vllm::{Figures, parse_engines};
use crate::workers::{EngineStats, Worker};

/// What is read of a `/metrics`: a hundred times what an idle vLLM says, and room for many engines.
const METRICS_BYTES: usize = 4 * 1024 * 1024;

/// What a server that comes up may take for its first figures before it is used without them.
const FIRST_LIMIT: Duration = Duration::from_secs(1);

/// A server's figures as they are known. Only the control thread locks it, and never across an await.
#[derive(Debug)]
pub(super) struct Scrape(Mutex<Watch>);

impl Scrape {
    pub(super) fn new(interval: Duration, ranks: usize, now: Millis) -> Self {
        let interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        Self(Mutex::new(Watch::new(interval_ms, ranks, now)))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Watch) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Looks at the figures of the server led by the worker at `position`, every interval while it is up.
pub(super) async fn run(control: Arc<Control>, position: usize) {
    let (Some(worker), Some(Some(scrape))) = (control.workers.get(position), control.scrapes.get(position))
    else {
        return;
    };
    loop {
        let wait_ms = scrape.with(|watch| watch.due_in(control.clock.millis()));
        if wait_ms > 0 {
            sleep(Duration::from_millis(wait_ms)).await;
        } else if worker.answers() {
            control.scrape(position).await;
        } else {
            sleep(LOOK).await;
        }
    }
}

impl Control {
    /// The first look at a server that comes up, which does not keep it from its work for long.
    pub(super) async fn scrape_first(&self, position: usize) {
        // What is late comes with the next look.
        let _: Result<(), _> = timeout(FIRST_LIMIT, self.scrape(position)).await;
    }

    /// Looks once at the figures of the server led by the worker at `position`.
    async fn scrape(&self, position: usize) {
        let (Some(lead), Some(Some(scrape))) = (self.workers.get(position), self.scrapes.get(position))
        else {
            return;
        };
        let ranks: Vec<&Arc<Worker>> = self.ranks(position).collect();
        scrape.with(|watch| watch.begin(self.clock.millis(), chance()));
        let before: Vec<u32> = ranks.iter().map(|rank| rank.known_in_flight()).collect();
        let limit = self.pace.scrape_limit();
        let answer = attempt::get(lead, "/metrics", self.key.as_ref(), limit, METRICS_BYTES).await;
        let now = self.clock.millis();
        match answer {
            Ok((StatusCode::OK, text)) => scrape.with(|watch| tell(watch, now, &ranks, &before, &text)),
            answer => {
                let too_old = scrape.with(|watch| missed(watch, now, &answer));
                let (reason, name) = (reason(&answer), lead.url());
                tracing::debug!(worker = %name, reason, "figures of worker could not be read");
                if too_old {
                    ranks.iter().for_each(|rank| rank.engine().set(&EngineStats::default(), 0));
                    tracing::info!(worker = %name, reason, "figures of worker are unknown from now on");
                }
            }
        }
    }

    /// The ranks of the server that the worker at `position` leads, which follow it.
    pub(super) fn ranks(&self, position: usize) -> impl Iterator<Item = &Arc<Worker>> {
        let from = self.workers.get(position..).unwrap_or_default();
        from.iter().take_while(move |rank| from.first().is_some_and(|lead| rank.shares_server(lead)))
    }
}

/// Takes over what was read.
fn tell(watch: &mut Watch, now: Millis, ranks: &[&Arc<Worker>], before: &[u32], text: &Bytes) {
    let report = parse_engines(text);
    if watch.told(now, &report)
        && let Some(lead) = ranks.first()
    {
        lead.cache_lost();
        tracing::info!(worker = %lead.url(), "worker was started anew, slept or woke: its prefix cache is empty");
    }
    for (at, (worker, before)) in ranks.iter().zip(before).enumerate() {
        let ours = worker.known_in_flight().max(*before);
        let rank = Rank { number: worker.rank_number(), ours };
        let meaning = watch.meaning(at, rank, &report);
        worker.engine().set(&stats(&meaning.figures), meaning.foreign);
    }
}

/// Takes in that nothing came; whether the last figures are too old.
fn missed(watch: &mut Watch, now: Millis, answer: &Result<(StatusCode, Bytes), AttemptError>) -> bool {
    match answer {
        // 429 passes
        Ok((status, _)) if status.is_client_error() && *status != StatusCode::TOO_MANY_REQUESTS => {
            watch.refused(now)
        }
        Err(AttemptError::TooLarge(_)) => watch.refused(now),
        Ok(_) | Err(_) => watch.failed(now),
    }
}

fn reason(answer: &Result<(StatusCode, Bytes), AttemptError>) -> String {
    match answer {
        Ok((status, _)) => format!("/metrics answered {}", status.as_u16()),
        Err(error) => error.to_string(),
    }
}

fn stats(figures: &Figures) -> EngineStats {
    EngineStats {
        running: figures.running,
        waiting: figures.waiting,
        kv_usage: figures.kv_usage,
        cache_tokens: figures.cache_tokens,
        block_tokens: figures.block_tokens,
        asleep: figures.asleep,
    }
}
