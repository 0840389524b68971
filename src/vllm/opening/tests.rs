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
        assert!(length <= line_end + first.len() + 2000, "{name}: committed at {length}, long after {at}");
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

#[test]
fn what_a_client_has_written_kills_no_engine() {
    let event = |code: u16, message: &str| {
        let event = format!("data: {{\"error\": {{\"message\": \"{message}\", \"code\": {code}}}}}\n\n");
        opening_of_events(event.as_bytes(), true)
    };
    let dead = "EngineCore encountered an issue. See stack trace";
    assert_eq!(event(500, dead), Opening::Failed(Unbegun::EngineDead));
    assert_eq!(event(500, &format!("invalid grammar: {dead}")), Opening::Failed(Unbegun::Error));
    assert_eq!(event(400, &format!("invalid grammar: {dead}")), Opening::Commit);
    assert_eq!(event(400, dead), Opening::Commit, "it was the request's own");
}
