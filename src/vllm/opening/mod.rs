//! Whether an answer has begun to say anything, read off its first bytes: until then it may be given up, and the
//! request tried on another worker, without anybody noticing.
//!
//! A stream of vLLM may fail after its 200: with an error as its first event, with a finish `abort` before any text
//! (the server was told to end), or by ending without a word. What is certainly no text yet (the role of a chat, an
//! empty delta, the opening events of `/v1/responses` and `/v1/messages`, comments) is waited through; whatever is not
//! known counts as text. Nothing here is parsed: what is looked for has quotes in it, which within a JSON string would
//! be escaped, so what a model writes cannot be mistaken for it.

use std::sync::LazyLock;

use memchr::{memchr, memmem::Finder};
use thiserror::Error;

/// What the first bytes of an answer come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Nothing is said yet.
    NeedMore,
    /// It is an answer, or an error that the request itself has caused.
    Commit,
    /// It is none, and nothing of value is lost with it.
    Failed(Unbegun),
}

/// Why an answer is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Unbegun {
    /// An error stands where the text should begin.
    #[error("an error")]
    Error,
    /// An error that says that the server's engine is dead.
    #[error("the engine is dead")]
    EngineDead,
    /// The server ended the request (`finish_reason: "abort"`), mostly because it was told to end itself.
    #[error("aborted")]
    Aborted,
    /// It ends without having said anything.
    #[error("empty")]
    Empty,
}

/// How vLLM's message about a dead engine begins (`vllm/v1/engine/exceptions.py`).
const ENGINE_DEAD: &str = "EngineCore encountered an issue";

/// Events of which nothing was computed (`vllm/entrypoints/openai/responses/serving.py`,
/// `vllm/entrypoints/anthropic/serving.py`).
const OPENINGS: [&[u8]; 4] = [b"response.created", b"response.in_progress", b"message_start", b"ping"];

/// Events that tell of a failure.
const FAILURES: [&[u8]; 2] = [b"error", b"response.failed"];

macro_rules! finders {
    ($($name:ident = $text:expr;)+) => { $(static $name: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new($text));)+ };
}

finders! {
    DELTA = "\"delta\":{";
    TEXT = "\"text\":\"";
    FINISH = "\"finish_reason\":";
    ABORT = "\"finish_reason\":\"abort\"";
    DEAD = ENGINE_DEAD;
    CODE = "\"code\":";
}

/// What a stream of events comes to whose first bytes are `bytes`, framing taken off; `end`: there are no more.
pub fn opening_of_events(bytes: &[u8], end: bool) -> Opening {
    let (mut rest, mut name) = (bytes, &b""[..]);
    loop {
        let line = match memchr(b'\n', rest) {
            Some(at) => {
                let line = &rest[..at];
                rest = &rest[at + 1..];
                line.strip_suffix(b"\r").unwrap_or(line)
            }
            None if !end => return Opening::NeedMore,
            None if rest.is_empty() => return Opening::Failed(Unbegun::Empty),
            None => std::mem::take(&mut rest),
        };
        if line.is_empty() {
            name = b"";
        } else if let Some(value) = line.strip_prefix(b"event:") {
            name = value.trim_ascii();
        } else if let Some(data) = line.strip_prefix(b"data:") {
            match opening_of_event(name, data.trim_ascii_start()) {
                Opening::NeedMore => {}
                opening => return opening,
            }
        }
    }
}

/// What the event of this name (empty: it has none) and this data comes to.
fn opening_of_event(name: &[u8], data: &[u8]) -> Opening {
    if OPENINGS.contains(&name) {
        return Opening::NeedMore;
    }
    let fails = FAILURES.contains(&name) || data.starts_with(b"{\"error\":");
    if fails {
        return if is_the_clients_fault(data) {
            Opening::Commit
        } else if is_engine_dead(data) {
            Opening::Failed(Unbegun::EngineDead)
        } else {
            Opening::Failed(Unbegun::Error)
        };
    }
    if data == b"[DONE]" {
        return Opening::Failed(Unbegun::Empty);
    }
    match says_something(data) {
        None | Some(true) => Opening::Commit,
        Some(false) => match FINISH.find(data).and_then(|at| data.get(at + FINISH.needle().len()..)) {
            Some(finish) if finish.starts_with(b"\"abort\"") => Opening::Failed(Unbegun::Aborted),
            // an answer may be empty
            Some(finish) if !finish.starts_with(b"null") => Opening::Commit,
            _ => Opening::NeedMore,
        },
    }
}

/// Whether an event of a chat or a completion holds text, a call or the like; `None`: it is neither.
fn says_something(data: &[u8]) -> Option<bool> {
    let mut rest = data;
    let mut found = None;
    while let Some(at) = DELTA.find(rest) {
        rest = rest.get(at + DELTA.needle().len()..)?;
        if delta_says_something(rest) {
            return Some(true);
        }
        found = Some(false);
    }
    if found.is_none() {
        let at = TEXT.find(data)?;
        return Some(data.get(at + TEXT.needle().len()) != Some(&b'"'));
    }
    found
}

/// Whether the object behind whose brace `rest` begins holds more than a role, and values that are empty.
fn delta_says_something(mut rest: &[u8]) -> bool {
    const ROLE: &[u8] = b"\"role\":\"";
    const EMPTY: [&[u8]; 3] = [b"\"\"", b"null", b"[]"];
    loop {
        rest = match rest.first() {
            Some(b'}') => return false,
            Some(b',') => &rest[1..],
            _ => rest,
        };
        let value = match rest.strip_prefix(ROLE) {
            Some(role) => memchr(b'"', role).and_then(|quote| role.get(quote + 1..)),
            None => {
                let colon = memchr(b':', rest);
                let value = colon.and_then(|colon| rest.get(colon + 1..));
                value.and_then(|value| EMPTY.iter().find_map(|empty| value.strip_prefix(*empty)))
            }
        };
        let Some(behind) = value else { return true };
        rest = behind;
    }
}

/// Whether an error is the request's own, so that every other worker would say the same.
fn is_the_clients_fault(error: &[u8]) -> bool {
    let code = CODE.find(error).and_then(|at| error.get(at + CODE.needle().len()..));
    match code.map(<[u8]>::trim_ascii_start) {
        Some([b'4', rest @ ..]) => !rest.starts_with(b"08") && !rest.starts_with(b"29"),
        _ => false,
    }
}

/// Whether an answer that is one JSON document was ended by the server before its time.
pub fn is_aborted(body: &[u8]) -> bool {
    ABORT.find(body).is_some()
}

/// Whether the body of a 500, or an event, says that the engine is dead: nothing will be served until the server is
/// started anew. Its message must begin so: further behind may stand what a client has written.
pub fn is_engine_dead(body: &[u8]) -> bool {
    const MESSAGE: &[u8] = b"\"message\":";
    DEAD.find(body).is_some_and(|at| {
        let before = body[..at].strip_suffix(b"\"").map(<[u8]>::trim_ascii_end);
        before.is_some_and(|before| before.ends_with(MESSAGE))
    })
}

/// Whether the body of a 503 is vLLM's: the server has too much to do, is paused or scales, and is well.
pub fn is_busy(body: &[u8]) -> bool {
    body.trim_ascii_start().starts_with(b"{") && memchr::memmem::find(body, b"\"error\":").is_some()
}

/// Whether the body of a 404 says that there is no such model (and not that there is no such path or response).
pub fn is_unknown_model(body: &[u8]) -> bool {
    let says = |text: &[u8]| memchr::memmem::find(body, text).is_some();
    says(b"\"NotFoundError\"") && says(b"\"The model ")
}

#[cfg(test)]
mod tests;
