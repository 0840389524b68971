//! Learns what a worker serves, from its `/v1/models` and `/version`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{body::Bytes, http::StatusCode};
use tokio::time::sleep;

use crate::control::{
    Control,
    attempt::{self, AttemptError},
    chance,
};
use crate::vllm::{self, ModelCard};
use crate::workers::{Learnt, Registry};

/// What is read of a list of models: some ten thousand cards.
const MODELS_BYTES: usize = 8 * 1024 * 1024;

/// What is read of a version.
const VERSION_BYTES: usize = 1024 * 1024;

/// Pause after a look that failed; doubles up to the interval.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Names that stand in a log line.
const LOGGED_NAMES: usize = 20;

/// All that was learnt. Only the control thread locks it, and never across an await.
#[derive(Debug)]
pub(super) struct Book(Mutex<Pages>);

#[derive(Debug)]
struct Pages {
    registry: Registry,
    aliases: Vec<(String, String)>,
    /// By position.
    known: Vec<Known>,
}

/// What was learnt of one worker.
#[derive(Debug, Default)]
struct Known {
    learnt: Learnt,
    cards: Vec<ModelCard>,
    /// Body of its `/version`; empty while unknown.
    version: Bytes,
    /// Looks begun and the youngest one taken over: an answer that was overtaken counts for nothing.
    begun: u64,
    taken: u64,
}

/// What a look at `/v1/models` found.
enum Found {
    /// A list.
    Cards(Vec<ModelCard>),
    /// An answer that is no list, and why.
    NoList(String),
    /// Nothing that says anything, and why.
    Nothing(String),
}

impl Book {
    pub(super) fn new(registry: Registry, aliases: Vec<(String, String)>) -> Self {
        let known = registry.workers().map(|_| Known::default()).collect();
        Self(Mutex::new(Pages { registry, aliases, known }))
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a look that begins now.
    fn begin(&self, position: usize) -> u64 {
        let mut pages = self.pages();
        pages.known.get_mut(position).map_or(0, |known| {
            known.begun += 1;
            known.begun
        })
    }

    /// The first model of the worker at `position` that is no adapter.
    pub(super) fn first_model(&self, position: usize) -> Option<String> {
        let pages = self.pages();
        let cards = &pages.known.get(position)?.cards;
        cards.iter().find(|card| card.parent.is_none()).map(|card| card.id.clone())
    }

    /// Takes over what look number `look` found, and publishes it if it is news.
    fn take(&self, position: usize, look: u64, found: Found, version: Option<Bytes>) -> News {
        let mut pages = self.pages();
        let pages = &mut *pages;
        let Some(known) = pages.known.get_mut(position).filter(|known| look >= known.taken) else {
            return News::default();
        };
        known.taken = look;
        let cards = match found {
            Found::Cards(cards) => Some((Learnt::Models(names(&cards)), cards)),
            Found::NoList(_) => Some((Learnt::Open, Vec::new())),
            Found::Nothing(_) => None,
        };
        let mut changed = false;
        let mut news = News::default();
        if let Some((learnt, cards)) = cards {
            if known.learnt != learnt {
                news.another |= others(&known.learnt, &learnt);
                pages.registry.learnt(position, learnt.clone());
                known.learnt = learnt.clone();
                news.learnt = Some(learnt);
            }
            changed = known.cards != cards || news.learnt.is_some();
            known.cards = cards;
        }
        if let Some(version) = version {
            changed |= known.version != version;
            news.another |= !known.version.is_empty() && known.version != version;
            known.version = version;
        }
        if changed {
            pages.publish();
        }
        news
    }
}

/// What a look brought to light.
#[derive(Debug, Default)]
struct News {
    /// Its models, if they are not what they were.
    learnt: Option<Learnt>,
    /// Another server answers there than before.
    another: bool,
}

/// Whether both are lists, of other base models. Adapters come and go.
fn others(before: &Learnt, now: &Learnt) -> bool {
    let base = |learnt: &Learnt| match learnt {
        Learnt::Models(names) => Some(names.iter().filter(|(_, base)| *base).cloned().collect::<Vec<_>>()),
        Learnt::Nothing | Learnt::Open => None,
    };
    matches!((base(before), base(now)), (Some(before), Some(now)) if before != now)
}

impl Pages {
    fn publish(&mut self) {
        let listed = self.known.iter().filter(|known| matches!(known.learnt, Learnt::Models(_)));
        let cards: Vec<Vec<ModelCard>> = listed.map(|known| known.cards.clone()).collect();
        let models = if cards.is_empty() { Vec::new() } else { vllm::merge_models(&cards, &self.aliases) };
        let versions = self.known.iter().filter(|known| !known.version.is_empty());
        let versions: Vec<Vec<u8>> = versions.map(|known| known.version.to_vec()).collect();
        self.registry.set_bodies(models, vllm::lowest_version(&versions).unwrap_or_default());
        self.registry.publish();
    }
}

fn names(cards: &[ModelCard]) -> Vec<(String, bool)> {
    cards.iter().map(|card| (card.id.clone(), card.parent.is_none())).collect()
}

impl Control {
    /// Looks at what the worker at `position` serves, and whether it rests; false if it did not tell its models.
    pub(super) async fn learn(&self, position: usize) -> bool {
        let Some(worker) = self.workers.get(position) else { return false };
        let look = self.book.begin(position);
        let limit = self.pace.probe_limit;
        let key = self.key.as_ref();
        let (models, version, ()) = tokio::join!(
            attempt::get(worker, "/v1/models", key, limit, MODELS_BYTES),
            attempt::get(worker, "/version", key, limit, VERSION_BYTES),
            self.ask_rest(position),
        );
        let found = found(models);
        let version = match version {
            Ok((StatusCode::OK, body)) => Some(body),
            _ => None,
        };
        let (told, reason) = match &found {
            Found::Cards(_) => (true, String::new()),
            Found::NoList(reason) => (true, reason.clone()),
            Found::Nothing(reason) => (false, reason.clone()),
        };
        let url = worker.url();
        let News { learnt, another } = self.book.take(position, look, found, version);
        if another {
            worker.cache_lost();
            worker.breaker().forget();
            tracing::info!(worker = %url, "another server answers there: what was known of its prefix cache is void");
        }
        match learnt {
            Some(Learnt::Models(names)) => {
                let models: Vec<&str> = names.iter().take(LOGGED_NAMES).map(|(name, _)| &name[..]).collect();
                tracing::info!(worker = %url, count = names.len(), ?models, "models of worker learnt");
            }
            Some(Learnt::Open | Learnt::Nothing) => {
                tracing::warn!(worker = %url, reason, "worker does not tell its models; it may be asked for any");
            }
            None if !told => tracing::debug!(worker = %url, reason, "models of worker could not be learnt"),
            None => (),
        }
        told
    }
}

fn found(answer: Result<(StatusCode, Bytes), AttemptError>) -> Found {
    match answer {
        Ok((StatusCode::OK, body)) => match vllm::parse_models(&body) {
            Ok(cards) => Found::Cards(cards),
            Err(error) => Found::NoList(format!("its list of models cannot be read: {error}")),
        },
        // Starting, scaling, overloaded: that passes.
        Ok((status, _)) if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            Found::Nothing(format!("/v1/models answered {}", status.as_u16()))
        }
        Ok((status, _)) => Found::NoList(format!("/v1/models answered {}", status.as_u16())),
        Err(error @ AttemptError::TooLarge(_)) => Found::NoList(error.to_string()),
        Err(error) => Found::Nothing(error.to_string()),
    }
}

/// Looks at the models of the worker at `position` every interval, while it is up. The first look, and the one
/// after it was down, are part of its probe.
pub(super) async fn run(control: Arc<Control>, position: usize) {
    let Some(worker) = control.workers.get(position) else { return };
    let interval = control.pace.models_interval;
    let mut retry = FIRST_PAUSE;
    let mut pause = FIRST_PAUSE;
    loop {
        let rest = sleep(pause.min(interval).mul_f64(0.9 + 0.2 * chance()));
        let doubted = async {
            // doubts may be many
            sleep(FIRST_PAUSE.min(interval)).await;
            match control.doubts.get(position) {
                Some(doubts) => doubts.notified().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = rest => (),
            () = doubted => (),
        }
        pause = interval;
        if !worker.answers() {
            continue;
        }
        if control.learn(position).await {
            retry = FIRST_PAUSE;
        } else {
            pause = retry;
            retry = (retry * 2).min(interval);
        }
    }
}
