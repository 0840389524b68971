//! The id of a response, read as the answer to `POST /v1/responses` passes.
//!
//! vLLM writes it first: an answer begins with `{"id":"resp_…"`, a stream with the event `response.created`, whose data
//! are `{"response":{"id":"resp_…"`. Both are followed member by member, so that an `id` of something else is not
//! taken for it and another order of the members does no harm; what stands further in than `MOST_BYTES` is
//! not looked at. No validator: what is no JSON ends in nothing or in an id that nobody asks for.

use crate::vllm::facts::text;

/// Bytes of an answer that are looked at; vLLM's ids end within the first hundred.
const MOST_BYTES: usize = 4096;

/// Bytes of a string that are kept, quotes included. Ids of vLLM have 21, and clients may choose longer ones.
const MOST_TEXT: usize = 256;

/// What begins the line that holds an event's data.
const DATA: &[u8] = b"data:";

/// What came of looking for the id so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sought {
    /// It may be in what follows.
    NeedMore,
    /// There is none.
    Nothing,
    /// This one, escapes decoded.
    Id(String),
}

/// What the next byte is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lexing {
    /// A line of a stream, of which so many bytes are those of [`DATA`].
    Line(usize),
    /// A line that has no data.
    Other,
    /// JSON, outside of strings.
    Json,
    /// A string; `true`: behind a backslash.
    Text(bool),
}

/// Looks for the id of a response in the bytes of an answer, in whatever pieces they come.
#[derive(Debug)]
pub struct ResponseId {
    lexing: Lexing,
    events: bool,
    /// Bytes that may still be looked at.
    left: usize,
    /// Objects and arrays that are open.
    depth: usize,
    /// Those of them that lead to the id, all the outermost ones: the answer, or the event and its response.
    path: usize,
    /// In the innermost object of the path: a value is to come, not a key.
    value: bool,
    /// It is the value of the key that leads on.
    leads: bool,
    /// The raw string that is being read, if it is a key or a value of the path.
    raw: Vec<u8>,
}

impl ResponseId {
    /// Before the first byte of an answer, a stream of `events` or not.
    pub fn new(events: bool) -> Self {
        Self {
            lexing: if events { Lexing::Line(0) } else { Lexing::Json },
            events,
            left: MOST_BYTES,
            depth: 0,
            path: 0,
            value: false,
            leads: false,
            raw: Vec::new(),
        }
    }

    /// Looks at what comes next of the body, framing excluded. Not to be called any more once it has found something
    /// or nothing.
    pub fn push(&mut self, bytes: &[u8]) -> Sought {
        for &byte in bytes.iter().take(self.left) {
            match self.byte(byte) {
                Sought::NeedMore => {}
                found => return found,
            }
        }
        self.left = self.left.saturating_sub(bytes.len());
        if self.left == 0 { Sought::Nothing } else { Sought::NeedMore }
    }

    fn byte(&mut self, byte: u8) -> Sought {
        let ends_line = matches!(byte, b'\n' | b'\r');
        match self.lexing {
            Lexing::Line(_) | Lexing::Other if ends_line => self.lexing = Lexing::Line(0),
            Lexing::Other => {}
            Lexing::Line(seen) if DATA.get(seen) == Some(&byte) => {
                self.lexing = if seen + 1 == DATA.len() { Lexing::Json } else { Lexing::Line(seen + 1) };
            }
            Lexing::Line(_) => self.lexing = Lexing::Other,
            // the first event has no response
            Lexing::Json if ends_line && self.events => return Sought::Nothing,
            Lexing::Json => return self.structure(byte),
            Lexing::Text(escaped) => {
                self.keep(byte);
                match byte {
                    b'"' if !escaped => {
                        self.lexing = Lexing::Json;
                        return self.text_ended();
                    }
                    _ => self.lexing = Lexing::Text(byte == b'\\' && !escaped),
                }
            }
        }
        Sought::NeedMore
    }

    /// A byte of JSON outside of strings.
    fn structure(&mut self, byte: u8) -> Sought {
        let on_path = self.depth == self.path;
        match byte {
            b'"' => {
                self.lexing = Lexing::Text(false);
                self.raw.clear();
                self.keep(byte);
            }
            b'{' | b'[' => {
                let leads = self.depth == 0 || on_path && self.leads && self.path < self.length();
                if leads && byte == b'{' {
                    self.path += 1;
                    (self.value, self.leads) = (false, false);
                }
                self.depth += 1;
            }
            // an object of the path has ended, and the id was not in it
            b'}' | b']' if on_path => return Sought::Nothing,
            b'}' | b']' => self.depth -= 1,
            b':' if on_path => self.value = true,
            b',' if on_path => (self.value, self.leads) = (false, false),
            _ => {}
        }
        // what is no object has no members
        if self.path == 0 && !byte.is_ascii_whitespace() { Sought::Nothing } else { Sought::NeedMore }
    }

    /// How many objects lead to the id.
    fn length(&self) -> usize {
        if self.events { 2 } else { 1 }
    }

    fn keep(&mut self, byte: u8) {
        if self.depth == self.path && self.raw.len() < MOST_TEXT {
            self.raw.push(byte);
        }
    }

    /// The string that was read is a key or a value of the path, or of something else.
    fn text_ended(&mut self) -> Sought {
        if self.depth != self.path {
            return Sought::NeedMore;
        }
        // of one that does not fit the end is missing
        let text = if self.raw.len() < MOST_TEXT { text(&self.raw) } else { None };
        let inmost = self.path == self.length();
        match (self.value, self.leads && inmost) {
            (false, _) => self.leads = text.as_deref() == Some(if inmost { "id" } else { "response" }),
            (true, false) => {}
            (true, true) => {
                let id = text.filter(|id| !id.is_empty());
                return id.map_or(Sought::Nothing, |id| Sought::Id(id.into_owned()));
            }
        }
        Sought::NeedMore
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample};
    use serde_json::Value;

    use super::*;
    use crate::{http::ChunkTracker, vllm::golden};

    /// What is found in `pieces`.
    fn sought<'a>(events: bool, pieces: impl IntoIterator<Item = &'a [u8]>) -> Sought {
        let mut id = ResponseId::new(events);
        pieces
            .into_iter()
            .map(|piece| id.push(piece))
            .find(|found| *found != Sought::NeedMore)
            .unwrap_or(Sought::NeedMore)
    }

    /// What is found in `text`, in one piece, in single bytes and in any two pieces.
    fn found(events: bool, text: &str) -> Sought {
        let whole = sought(events, [text.as_bytes()]);
        assert_eq!(sought(events, text.as_bytes().chunks(1)), whole, "{text}");
        for cut in 0..text.len().min(300) {
            let (before, after) = text.as_bytes().split_at(cut);
            assert_eq!(sought(events, [before, after]), whole, "{text} at {cut}");
        }
        whole
    }

    fn id(id: &str) -> Sought {
        Sought::Id(id.to_owned())
    }

    #[test]
    fn golden_answers_have_their_id() {
        let body = |name: &str| {
            let case = golden::case(name);
            String::from_utf8(case.answer_body().to_vec()).unwrap()
        };
        for (name, wanted) in [
            ("py-0.32-default/responses", "resp_9eec723a2ec4efa6"),
            ("py-0.32-stateful/resp_store", "resp_968f740e5a61d701"),
            ("py-0.32-stateful/resp_bg", "resp_9bf0362b68b152b2"),
            ("py-0.32-stateful/resp_prev", "resp_8f420aff73474db0"),
        ] {
            assert_eq!(found(false, &body(name)), id(wanted), "{name}");
        }
        assert_eq!(found(false, &body("py-0.32-stateful/resp_prev_unknown")), Sought::Nothing);
    }

    #[test]
    fn the_golden_stream_has_its_id_in_its_first_event() {
        let case = golden::case("py-0.32-default/responses_stream");
        let mut data = Vec::new();
        ChunkTracker::new().track_data(case.answer_body(), |run| data.extend_from_slice(run)).unwrap();
        let text = String::from_utf8(data).unwrap();
        assert_eq!(found(true, &text), id("resp_874b18513974765c"));
        let first = text.split_once("\n\n").unwrap().0;
        assert!(first.starts_with("event: response.created\n") && first.len() < MOST_BYTES);
        assert_eq!(found(true, first), id("resp_874b18513974765c"));
    }

    #[test]
    fn an_id_of_something_else_is_not_the_responses() {
        for before in [
            r#""output":[{"id":"msg_1"},{"id":"msg_2","x":["id",{"id":"y"}]}],"#,
            r#""tools":[{"type":"function","id":"t"}],"metadata":{"id":"m","response":{"id":"n"}},"#,
            r#""instructions":"\"id\":\"x\"","note":"{\"id\":","id2":"x","object":"id","n":1,"#,
            r#""response":{"id":"inner"},"previous_response_id":"resp_0","#,
        ] {
            assert_eq!(found(false, &format!(r#"{{{before}"id":"resp_1"}}"#)), id("resp_1"), "{before}");
            let event = format!(
                "data: {{\"type\":\"response.created\",\"item\":{{{before}\"z\":1}},\"id\":\"e\",\"response\":{{{before}\"id\":\"resp_1\"}}}}\n\n"
            );
            assert_eq!(found(true, &event), id("resp_1"), "{event}");
        }
    }

    #[test]
    fn spaces_and_escapes_are_read_as_json_has_them() {
        for text in [
            " {\n \"id\" : \"resp_1\"}",
            r#"{"object": "response", "\u0069d": "resp\u005f1" }"#,
            "{\t\"a\\\\\":\"\\\"}\",\"id\":\"resp_1\"",
        ] {
            assert_eq!(found(false, text), id("resp_1"), "{text}");
        }
        assert_eq!(found(false, r#"{"id":"a\"b\\"}"#), id("a\"b\\"));
    }

    #[test]
    fn comments_and_other_fields_may_come_before_the_first_data() {
        let data = r#"data:{"response":{"id":"resp_1"}}"#;
        for before in ["", ": ping\n\n", "event: x\r\nid: 7\r\n", ":\rdat: 1\rdata\r", "xdata: {}\n\n"] {
            assert_eq!(found(true, &format!("{before}{data}\n\n")), id("resp_1"), "{before:?}");
        }
        for other in
            ["data: {\"error\":{}}\n\n", "data: [DONE]\n\n", "data: {\"response\":\"id\"}\n\n", "data:\n"]
        {
            assert_eq!(
                found(true, &format!("{other}{data}\n\n")),
                Sought::Nothing,
                "only the first: {other}"
            );
        }
    }

    #[test]
    fn what_has_no_id_that_is_a_text_has_none() {
        for text in
            ["[]", "7", "null", "\"id\"", "{}", r#"{"id":7}"#, r#"{"id":null,"a":"b"}"#, r#"{"id":""}"#, "}"]
        {
            assert_eq!(found(false, text), Sought::Nothing, "{text}");
        }
        for text in [r#"{"id":["x"]}"#, r#"{"id":{"id":"x"}}"#] {
            assert_eq!(found(false, text), Sought::Nothing, "{text}");
        }
        assert_eq!(found(false, r#"{"id":"resp_"#), Sought::NeedMore);
        assert_eq!(found(true, "event: response.created\ndata: {\"resp"), Sought::NeedMore);
    }

    #[test]
    fn no_more_is_looked_at_or_kept_than_is_said() {
        let far = |bytes: usize| format!(r#"{{"a":"{}","id":"resp_1"}}"#, "x".repeat(bytes));
        assert_eq!(found(false, &far(MOST_BYTES - 64)), id("resp_1"));
        assert_eq!(found(false, &far(MOST_BYTES)), Sought::Nothing);
        let long = |bytes: usize| format!(r#"{{"id":"{}"}}"#, "i".repeat(bytes));
        assert_eq!(found(false, &long(MOST_TEXT - 3)), id(&"i".repeat(MOST_TEXT - 3)));
        for bytes in [MOST_TEXT - 2, MOST_TEXT - 1, MOST_TEXT, MOST_TEXT + 50] {
            assert_eq!(found(false, &long(bytes)), Sought::Nothing, "{bytes}");
        }
        let quotes = format!(r#"{{"id":"{}"}}"#, r#"\""#.repeat(MOST_TEXT));
        assert_eq!(found(false, &quotes), Sought::Nothing);
        assert_eq!(found(false, &"[".repeat(MOST_BYTES)), Sought::Nothing);
        let deep = format!(r#"{{"a":{}"#, "[".repeat(2 * MOST_BYTES));
        assert_eq!(found(false, &deep), Sought::Nothing);
    }

    /// JSON of few words, so that they meet.
    fn value() -> impl Strategy<Value = Value> {
        let word = || sample::select(vec!["id", "response", "x", "\"", "\\", "{", "a\n", "é", ""]);
        let leaf =
            prop_oneof![word().prop_map(Value::from), Just(Value::Null), any::<i8>().prop_map(Value::from)];
        leaf.prop_recursive(4, 24, 5, move |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Value::from),
                vec((word(), inner), 0..5).prop_map(|members| {
                    Value::Object(members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
                }),
            ]
        })
    }

    /// What a parser finds.
    fn parsed(value: &Value) -> Sought {
        let id = value.as_object().and_then(|answer| answer.get("id")).and_then(Value::as_str);
        id.filter(|id| !id.is_empty()).map_or(Sought::Nothing, |id| Sought::Id(id.to_owned()))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_parser_finds_the_same(value in value(), size in 1_usize..9) {
            let text = serde_json::to_string(&value).unwrap() + "\n";
            let pieces = || text.as_bytes().chunks(size);
            let plain = sought(false, pieces().chain([&[b' '; MOST_BYTES][..]]));
            prop_assert_eq!(plain, parsed(&value), "{}", text);
            let event = format!("event: response.created\ndata: {text}\n");
            let wanted = value.as_object().and_then(|event| event.get("response")).map_or(Sought::Nothing, parsed);
            prop_assert_eq!(sought(true, event.as_bytes().chunks(size)), wanted, "{}", event);
        }

        #[test]
        fn whatever_comes_is_looked_at(
            words in vec(sample::select(vec![
                "{", "}", "[", "]", "\"", "\\", ":", ",", "id", "response", "data:", "\n", "\r", " ", "\u{1}", "7",
            ]), 0..60),
            events in any::<bool>(),
            size in 1_usize..9,
        ) {
            let text = words.concat();
            prop_assert_eq!(sought(events, text.as_bytes().chunks(size)), sought(events, [text.as_bytes()]));
        }
    }
}
