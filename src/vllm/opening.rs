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
        return match (DEAD.find(data), is_the_clients_fault(data)) {
            (Some(_), _) => Opening::Failed(Unbegun::EngineDead),
            (None, true) => Opening::Commit,
            (None, false) => Opening::Failed(Unbegun::Error),
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

/// Whether the body of a 500 says that the engine is dead: nothing will be served until the server is started anew.
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
mod tests {
    use super::*;
    use crate::{http::ChunkTracker, vllm::golden};

    fn whole(events: &str) -> Opening {
        opening_of_events(events.as_bytes(), true)
    }

    /// The events of a golden stream.
    fn stream(name: &str) -> Vec<u8> {
        let mut body = golden::case(name).answer_body().to_vec();
        let decoded = ChunkTracker::new().decode(&mut body).unwrap();
        assert!(decoded.done && decoded.data > 0, "{name}");
        body.truncate(decoded.data);
        body
    }

    /// Bytes after which the verdict falls, growing byte by byte, and the verdict.
    fn falls(bytes: &[u8]) -> (usize, Opening) {
        let mut lengths = 0..bytes.len();
        let fallen = lengths.find_map(|length| match opening_of_events(&bytes[..length], false) {
            Opening::NeedMore => None,
            opening => Some((length, opening)),
        });
        fallen.unwrap_or_else(|| (bytes.len(), opening_of_events(bytes, true)))
    }

    #[test]
    fn golden_streams_begin_with_their_first_text_and_not_before() {
        for (name, first) in [
            ("py-0.32-default/chat_stream", "\"content\":\"1\"}"),
            ("py-0.32-default/completions_stream", "\"text\":\"\u{fffd}["),
            ("py-0.32-default/messages_stream", "event: content_block_start\ndata: "),
            ("py-0.32-default/responses_stream", "event: response.output_item.added\ndata: "),
            ("py-0.32-overload/stream_term", "\"content\":\"\\u001e\"}"),
            ("py-0.32-overload/stream_kill", "\"content\":\"\\u001e\"}"),
        ] {
            let bytes = stream(name);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let at = memchr::memmem::find(&bytes, first.as_bytes());
            let at = at.or_else(|| text.find(first)).unwrap_or_else(|| panic!("{name}: no {first}"));
            let (length, opening) = falls(&bytes);
            assert_eq!(opening, Opening::Commit, "{name}");
            let line_end = at + bytes[at + first.len() - 6..].iter().position(|&b| b == b'\n').unwrap();
            assert!(length > at, "{name}: committed at {length}, before the first text at {at}");
            assert!(
                length <= line_end + first.len() + 2000,
                "{name}: committed at {length}, long after {at}"
            );
        }
    }

    #[test]
    fn a_golden_stream_that_ends_before_its_first_text_has_failed() {
        let role = stream("py-0.32-overload/stream_term");
        let role = &role[..memchr::memmem::find(&role, b"\n\n").unwrap() + 2];
        let with = |name: &str, last: usize| {
            let bytes = stream(name);
            // the last events, [DONE] among them
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let events: Vec<&str> = text.split_inclusive("\n\n").collect();
            [role, events[events.len() - last..].concat().as_bytes()].concat()
        };
        let aborted = with("py-0.32-overload/stream_term", 2);
        assert_eq!(falls(&aborted).1, Opening::Failed(Unbegun::Aborted), "{}", aborted.escape_ascii());
        let killed = with("py-0.32-overload/stream_kill", 2);
        assert_eq!(falls(&killed).1, Opening::Failed(Unbegun::EngineDead), "{}", killed.escape_ascii());
        assert_eq!(opening_of_events(role, false), Opening::NeedMore);
        assert_eq!(opening_of_events(role, true), Opening::Failed(Unbegun::Empty));
    }

    #[test]
    fn what_says_nothing_is_waited_through() {
        for nothing in [
            "",
            ": ping\n\n",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"},\"finish_reason\":null}]}\r\n\r\n",
            "data: {\"choices\":[{\"delta\":{\"content\":null,\"tool_calls\":[],\"reasoning\":null},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":null}]}\n\n",
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"content\":[\"x\"]}}\n\n",
            "event: ping\ndata: {\"type\":\"ping\"}\n\n",
            "event: response.created\ndata: {\"response\":{}}\n\nevent: response.in_progress\ndata: {}\n\n",
            "id: 1\nretry: 5\n\n",
        ] {
            assert_eq!(opening_of_events(nothing.as_bytes(), false), Opening::NeedMore, "{nothing}");
            assert_eq!(whole(nothing), Opening::Failed(Unbegun::Empty), "{nothing}");
        }
        assert_eq!(whole("data: [DONE]\n\n"), Opening::Failed(Unbegun::Empty));
    }

    #[test]
    fn whatever_says_something_or_is_unknown_is_committed() {
        for something in [
            "data: {\"choices\":[{\"delta\":{\"content\":\"a\"},\"finish_reason\":null}]}\n",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"a\"},\"finish_reason\":\"abort\"}]}\n",
            "data: {\"choices\":[{\"delta\":{\"content\":null,\"reasoning_content\":\"hm\"},\"finish_reason\":null}]}\n",
            "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0}]},\"finish_reason\":null}]}\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"\"}},{\"delta\":{\"content\":\"b\"}}]}\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":\"stop\"}]}\n",
            "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n",
            "data: {\"choices\":[],\"usage\":{}}\n",
            "data: {}\n",
            "data:x\n",
            "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"content_block\":{\"type\":\"text\",\"text\":\"a\"}}\n",
            "data: {\"choices\":[{\"delta\":{\"content",
        ] {
            assert_eq!(whole(something), Opening::Commit, "{something}");
        }
    }

    #[test]
    fn an_error_in_place_of_text_fails_unless_the_request_is_at_fault() {
        let error = |code: &str| format!("data: {{\"error\": {{\"message\": \"x\", \"code\": {code}}}}}\n\n");
        for code in ["500", "503", "429", "408", "null"] {
            assert_eq!(whole(&error(code)), Opening::Failed(Unbegun::Error), "{code}");
        }
        for code in ["400", "404", "422"] {
            assert_eq!(whole(&error(code)), Opening::Commit, "{code}");
        }
        for named in [
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"internal_error\"}}\n\n",
            "event: response.created\ndata: {}\n\nevent: response.failed\ndata: {}\n\n",
        ] {
            assert_eq!(whole(named), Opening::Failed(Unbegun::Error), "{named}");
        }
        let late = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"error\":{}}\n\n";
        assert_eq!(whole(late), Opening::Commit, "it has begun");
    }

    #[test]
    fn no_cut_of_the_bytes_changes_the_verdict() {
        for name in ["chat_stream", "completions_stream", "messages_stream", "responses_stream"] {
            let bytes = stream(&format!("py-0.32-default/{name}"));
            let (length, opening) = falls(&bytes);
            for longer in length..bytes.len() {
                assert_eq!(opening_of_events(&bytes[..longer], false), opening, "{name} {longer}");
            }
        }
    }

    #[test]
    fn golden_bodies_are_known_for_what_they_are() {
        let body = |name: &str| golden::case(name).answer_body().to_vec();
        assert!(is_aborted(&body("py-0.32-overload/nonstream_term")));
        assert!(!is_aborted(&body("py-0.32-default/chat")));
        assert!(!is_aborted(br#"{"content":"\"finish_reason\":\"abort\""}"#), "a model may write so");
        for dead in ["py-0.32-overload/nonstream_kill", "py-0.32-enginedead/embeddings"] {
            assert!(is_engine_dead(&body(dead)), "{dead}");
        }
        assert!(!is_engine_dead(&body("py-0.32-overload/overload")));
        assert!(!is_engine_dead(br#"{"error":{"message":"he said EngineCore encountered an issue"}}"#));
        assert!(is_busy(&body("py-0.32-overload/overload")));
        assert!(!is_busy(b"<html>503</html>") && !is_busy(b"") && !is_busy(b"no healthy upstream"));
        for gone in ["py-0.32-stateful/lora_chat_missing", "py-0.32-default/messages_unknown_model"] {
            assert!(is_unknown_model(&body(gone)), "{gone}");
        }
        assert!(!is_unknown_model(&body("py-0.32-default/not_found")));
    }
}
