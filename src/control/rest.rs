//! Whether a server sleeps or is paused, where its `/metrics` do not say so.
//!
//! `/health` of a vLLM that sleeps or is paused stays 200, and what it is sent waits for ever. Its `/is_sleeping`
//! and `/is_paused` tell; a server that does not have them (they belong to its development mode) is not asked
//! again before it was down.

use std::sync::atomic::{AtomicU8, Ordering};

use axum::{body::Bytes, http::StatusCode};
use serde::Deserialize;

use crate::control::{Control, attempt};
use crate::workers::{Rest, Worker};

/// What is read of an answer.
const BODY_BYTES: usize = 64 * 1024;

/// Which questions a server does not answer: [`Rest`]s, as bits.
#[derive(Debug, Default)]
pub(super) struct Silent(AtomicU8);

impl Silent {
    /// Another server may answer there now.
    pub(super) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn has(&self, rest: Rest) -> bool {
        self.0.load(Ordering::Relaxed) & rest as u8 != 0
    }

    fn add(&self, rest: Rest) {
        self.0.fetch_or(rest as u8, Ordering::Relaxed);
    }
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Yes,
    No,
    /// The server does not have the path, or does not let us ask.
    Nothing,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(alias = "is_sleeping", alias = "is_paused")]
    rests: bool,
}

/// `None`: an error of the moment.
fn said(status: StatusCode, body: &Bytes) -> Option<Said> {
    match status {
        StatusCode::OK => serde_json::from_slice(body).ok().map(|answer: Answer| match answer.rests {
            true => Said::Yes,
            false => Said::No,
        }),
        StatusCode::TOO_MANY_REQUESTS => None,
        _ if status.is_client_error() => Some(Said::Nothing),
        _ => None,
    }
}

impl Control {
    /// Asks the server of the worker at `position` whether it rests.
    pub(super) async fn ask_rest(&self, position: usize) {
        let Some(worker) = self.workers.get(position) else { return };
        let asleep = async {
            if worker.engine().tells_sleep() {
                self.tell(worker, Rest::Asleep, false);
            } else {
                self.ask(position, worker, "/is_sleeping", Rest::Asleep).await;
            }
        };
        tokio::join!(asleep, self.ask(position, worker, "/is_paused", Rest::Paused));
    }

    async fn ask(&self, position: usize, worker: &Worker, path: &'static str, rest: Rest) {
        let Some(silent) = self.silent.get(position).filter(|silent| !silent.has(rest)) else { return };
        let limit = self.pace.probe_limit;
        let answer = attempt::get(worker, path, self.key.as_ref(), limit, BODY_BYTES).await;
        let Ok((status, body)) = answer else { return };
        let Some(said) = said(status, &body) else { return };
        if said == Said::Nothing {
            silent.add(rest);
        }
        self.tell(worker, rest, said == Said::Yes);
    }

    fn tell(&self, worker: &Worker, rest: Rest, rests: bool) {
        if !worker.set_rest(rest, rests) {
            return;
        }
        let (worker, what) = (worker.url(), if rest == Rest::Asleep { "asleep" } else { "paused" });
        if rests {
            tracing::info!(%worker, "worker is {what}: it is sent nothing");
        } else {
            tracing::info!(%worker, "worker is no longer {what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_said_plainly_changes_anything() {
        let said = |status, body: &'static str| {
            super::said(StatusCode::from_u16(status).unwrap(), &Bytes::from_static(body.as_bytes()))
        };
        assert_eq!(said(200, r#"{"is_sleeping":true}"#), Some(Said::Yes));
        assert_eq!(said(200, r#"{"is_paused":false}"#), Some(Said::No));
        for body in ["", "[]", "{}", r#"{"is_paused":"no"}"#] {
            assert_eq!(said(200, body), None, "{body}");
        }
        assert_eq!([404, 405, 401].map(|status| said(status, "")), [Some(Said::Nothing); 3]);
        assert_eq!([429, 500, 503].map(|status| said(status, "")), [None; 3]);
    }
}
