use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use proptest::{collection::vec, prelude::*};
use serde_json::value::RawValue;

use super::*;
use crate::vllm::golden;

fn name(body: &str) -> Option<String> {
    scan_json(body.as_bytes()).model.name(body.as_bytes()).map(Cow::into_owned)
}

fn fact(body: impl AsRef<[u8]>) -> ModelFact {
    scan_json(body.as_ref()).model
}

/// The top level as Python reads it: the last of several equal keys, values as they stand.
#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Reference<'a>(#[serde(borrow)] HashMap<String, &'a RawValue>);

/// Holds every fact against what serde_json says of the same bytes.
fn assert_agrees(body: &str) {
    let Reference(members) = serde_json::from_str(body).unwrap();
    let facts = scan_json(body.as_bytes());
    assert!(facts.complete, "{body}");
    for &key in Key::ALL {
        let wanted = members.get(str::from_utf8(key.name()).unwrap()).map(|raw| raw.get());
        let found = facts.prompt.get(key).map(|place| &body[place]);
        assert_eq!(found, wanted, "{key:?} of {body}");
    }
    let parsed =
        |key: &str| members.get(key).map(|raw| serde_json::from_str::<serde_json::Value>(raw.get()).unwrap());
    let model = facts.model.name(body.as_bytes());
    match parsed("model") {
        Some(serde_json::Value::String(wanted)) if !wanted.is_empty() => {
            assert_eq!(model.as_deref(), Some(&*wanted), "{body}");
        }
        None | Some(serde_json::Value::Null | serde_json::Value::String(_)) => {
            assert_eq!(facts.model, ModelFact::Missing, "{body}");
        }
        Some(_) => assert_eq!(facts.model, ModelFact::NotAString, "{body}"),
    }
    if let Some(serde_json::Value::Bool(wanted)) = parsed("stream") {
        assert_eq!(facts.stream, wanted, "{body}");
    }
    assert_eq!(
        facts.previous_response_id,
        matches!(parsed("previous_response_id"), Some(serde_json::Value::String(_))),
        "{body}"
    );
}

#[test]
fn the_last_of_two_models_counts() {
    assert_eq!(name(r#"{"model":"a","model":"b","messages":[]}"#).as_deref(), Some("b"));
    assert_eq!(fact(r#"{"model":"a","model":null}"#), ModelFact::Missing);
    assert_eq!(fact(r#"{"model":"a","model":7}"#), ModelFact::NotAString);
}

#[test]
fn key_and_name_may_be_escaped() {
    assert_eq!(name(r#"{"\u006dod\u0065l":"tiny"}"#).as_deref(), Some("tiny"));
    assert_eq!(name(r#"{"model":"a\"b\\\/\n\u00e9\ud83d\ude00"}"#).as_deref(), Some("a\"b\\/\né😀"));
    assert_eq!(name(r#"{"model\\":"no","\"model":"no"}"#), None);
}

#[test]
fn a_name_without_escapes_is_borrowed() {
    let body = r#"{"model":"größe"}"#.as_bytes();
    assert!(matches!(scan_json(body).model.name(body), Some(Cow::Borrowed("größe"))));
}

#[test]
fn no_model_null_and_the_empty_name_are_the_same() {
    for body in ["{}", " { } ", r#"{"model":null}"#, r#"{"model":""}"#, r#"{"messages":[{"model":"x"}]}"#] {
        assert_eq!(fact(body), ModelFact::Missing, "{body}");
    }
}

#[test]
fn what_cannot_be_a_name_goes_to_a_worker() {
    let bodies: [&[u8]; 10] = [
        br#"{"model":5}"#,
        br#"{"model":["m"]}"#,
        br#"{"model":{"model":"m"}}"#,
        br#"{"model":true}"#,
        br#"{"model":"\ud800"}"#,
        br#"{"model":"\udc00\ud800"}"#,
        br#"{"model":"\x"}"#,
        b"{\"model\":\"\xff\"}",
        b"{\"model\":\"\xed\xa0\x80\"}",
        b"{\"model\":\"a\nb\"}",
    ];
    for body in bodies {
        assert_eq!(fact(body), ModelFact::NotAString, "{}", String::from_utf8_lossy(body));
    }
}

#[test]
fn what_is_no_object_or_ends_early_goes_to_a_worker() {
    let bodies: [&[u8]; 14] = [
        b"",
        b" ",
        b"[]",
        br#"[{"model":"m"}]"#,
        b"7",
        br#""model""#,
        b"null",
        b"\0\0\0",
        br#"{"model":"#,
        br#"{"model":"m""#,
        br#"{"model":"m","#,
        br#"{"model":"m" "stream":true}"#,
        br#"{"model" "m"}"#,
        br#"{model:"m"}"#,
    ];
    for body in bodies {
        let facts = scan_json(body);
        assert_eq!((facts.model, facts.complete), (ModelFact::NotAString, false), "{}", body.escape_ascii());
    }
}

#[test]
fn a_byte_order_mark_space_and_bytes_behind_the_object_are_passed_over() {
    assert_eq!(name("\u{feff}{\"model\":\"m\"}").as_deref(), Some("m"));
    assert_eq!(name(" \t\r\n{ \"model\" :\n\"m\" , \"stream\" : true\t} xyz }{").as_deref(), Some("m"));
}

#[test]
fn strings_hide_quotes_brackets_and_keys() {
    let body =
        r#"{"messages":[{"content":"\"}]},\"model\":\"no\",\\"},["\\\\\""]],"model":"m","stream":true}"#;
    assert_agrees(body);
    assert_eq!(name(body).as_deref(), Some("m"));
}

#[test]
fn a_quote_or_backslash_is_found_at_any_distance() {
    for filler in ["x", "!", "#", "[", "]", "\u{1}", "é", "\u{a2}", "\u{dc}"] {
        for length in 0..70 {
            let plain = filler.repeat(length);
            for text in
                [plain.clone(), format!("{plain}\\\"{plain}"), format!("{plain}\\\\"), format!("\\\"{plain}")]
            {
                let body = format!(r#"{{"a":"{text}","model":"m"}}"#);
                assert_eq!(name(&body).as_deref(), Some("m"), "{body}");
            }
        }
    }
}

#[test]
fn stream_is_read_as_pydantic_does() {
    for yes in ["true", "1", "1.0", r#""true""#, r#""YES""#, r#""on""#] {
        assert!(scan_json(format!(r#"{{"stream":{yes}}}"#).as_bytes()).stream, "{yes}");
    }
    for no in ["false", "0", "null", r#""""#, r#""off""#, "2", "[true]"] {
        assert!(!scan_json(format!(r#"{{"stream":{no}}}"#).as_bytes()).stream, "{no}");
    }
}

#[test]
fn deep_nesting_takes_no_stack() {
    let depth = 1_000_000;
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let body = format!(r#"{{"messages":{}0{},"model":"m"}}"#, open.repeat(depth), close.repeat(depth));
        assert_eq!(name(&body).as_deref(), Some("m"));
        assert_eq!(fact(&body[..body.len() - 20]), ModelFact::NotAString);
        assert_eq!(fact(format!(r#"{{"messages":{}"#, open.repeat(depth))), ModelFact::NotAString);
    }
}

#[test]
fn huge_numbers_words_and_many_keys_are_passed_over() {
    let digits = "9".repeat(1 << 20);
    assert_eq!(name(&format!(r#"{{"a":-{digits}.{digits}e{digits},"model":"m"}}"#)).as_deref(), Some("m"));
    assert_eq!(name(r#"{"a":NaN,"b":-Infinity,"model":"m"}"#).as_deref(), Some("m"), "Python reads these");
    let many: String = (0..100_000).map(|n| format!(r#""key{n}":{n},"#)).collect();
    assert_eq!(name(&format!(r#"{{{many}"model":"m"}}"#)).as_deref(), Some("m"));
    let long = r"\u006d".repeat(100_000);
    assert_eq!(name(&format!(r#"{{"{long}":"no","model":"m"}}"#)).as_deref(), Some("m"));
}

#[test]
fn cut_at_any_byte_it_neither_panics_nor_invents() {
    let body = r#"{"a":[{"b":"\"\u00e9"},-1.5e3,null],"m\u006fdel":"t\u0069ny","stream":true,"tools":[[]]}"#;
    assert_eq!(name(body).as_deref(), Some("tiny"));
    for end in 0..body.len() {
        let facts = scan_json(&body.as_bytes()[..end]);
        assert_eq!((facts.model, facts.complete), (ModelFact::NotAString, false), "cut at {end}");
    }
    for at in 0..body.len() {
        for byte in [0, b'"', b'\\', b'{', b'}', b'[', b']', b',', b':', 0x7f, 0xff] {
            let mut damaged = body.as_bytes().to_vec();
            damaged[at] = byte;
            let facts = scan_json(&damaged);
            let named = facts.model.name(&damaged).is_some();
            assert_eq!(named, matches!(facts.model, ModelFact::Named { .. }));
            assert!(facts.prompt.iter().all(|(_, place)| damaged.get(place).is_some()));
        }
    }
}

#[test]
fn a_model_is_renamed_in_place_or_put_first() {
    let renamed = |body: &str| {
        let (place, bytes) = scan_json(body.as_bytes()).rename("n\"é")?;
        let mut body = body.as_bytes().to_vec();
        body.splice(place, bytes);
        Some(String::from_utf8(body).unwrap())
    };
    assert_eq!(renamed(r#"{"a":1,"model":"m"}"#).unwrap(), r#"{"a":1,"model":"n\"é"}"#);
    assert_eq!(renamed(r#"{"model":"m","model":null}"#).unwrap(), r#"{"model":"m","model":"n\"é"}"#);
    assert_eq!(renamed(r#"{ "a":1}"#).unwrap(), r#"{"model":"n\"é", "a":1}"#);
    assert_eq!(renamed("{ }").unwrap(), r#"{"model":"n\"é" }"#);
    assert_eq!(renamed("[]"), None);
}

#[test]
fn escapes_are_those_of_python() {
    let mut out = Vec::new();
    json_string(&mut out, "\"\\/\u{8}\u{c}\n\r\t\u{0}\u{1f}\u{7f}é😀\u{2028}");
    let wanted = "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\u{7f}é😀\u{2028}\"";
    assert_eq!(str::from_utf8(&out).unwrap(), wanted);
}

#[test]
fn golden_requests_name_the_model_that_the_server_saw() {
    let mut named = 0;
    for case in golden::all() {
        let json = case.header("content-type").is_some_and(|kind| kind.starts_with("application/json"));
        if !json || case.request_body().is_empty() || case.header("transfer-encoding").is_some() {
            continue;
        }
        let body = str::from_utf8(case.request_body()).unwrap();
        match serde_json::from_str::<serde_json::Value>(body) {
            Ok(serde_json::Value::Object(_)) => assert_agrees(body),
            _ => assert!(!matches!(fact(body), ModelFact::Missing), "{}", case.name),
        }
        let refused = case.answer_body().starts_with(b"{\"error\":{\"message\":\"The model `nope`");
        assert_eq!(refused, case.status() == 404 && name(body).as_deref() == Some("nope") && refused);
        named += usize::from(name(body).is_some());
    }
    assert!(named > 80, "{named}");
    let body = |name| golden::case(&format!("py-0.32-default/{name}")).request_body().to_vec();
    let doubled = body("chat_dup_model_key");
    assert_eq!(scan_json(&doubled).model.name(&doubled).as_deref(), Some("nope"));
    for missing in ["chat_no_model", "chat_null_model", "chat_empty_model"] {
        assert_eq!(fact(body(missing)), ModelFact::Missing, "{missing}");
    }
    for unreadable in ["chat_int_model", "chat_bad_json", "chat_empty_body", "chat_json_array"] {
        assert_eq!(fact(body(unreadable)), ModelFact::NotAString, "{unreadable}");
    }
    assert!(scan_json(&body("chat_stream")).stream && !scan_json(&body("chat")).stream);
}

#[test]
fn the_shared_edge_vectors_are_read_as_they_say() {
    let vectors = std::fs::read_to_string(golden::shared().join("corpora/own_edge_vectors.jsonl")).unwrap();
    let mut bodies = HashMap::new();
    for line in vectors.lines() {
        let vector: serde_json::Value = serde_json::from_str(line).unwrap();
        let raw = STANDARD.decode(vector["raw_b64"].as_str().unwrap()).unwrap();
        if let Some(end) = memchr::memmem::find(&raw, b"\r\n\r\n") {
            let id = vector["id"].as_str().unwrap().to_owned();
            assert!(!scan_json(&raw).complete, "a head is no object");
            bodies.insert(id, raw[end + 4..].to_vec());
        }
    }
    let model = |id: &str| {
        let body = &bodies[id];
        scan_json(body).model.name(body).map(Cow::into_owned)
    };
    assert_eq!(model("own/body-utf8-bom").as_deref(), Some("m"));
    assert_eq!(model("own/body-dup-model-key").as_deref(), Some("b"));
    assert_eq!(model("own/body-model-escaped").as_deref(), Some("m"));
    assert_eq!(fact(&bodies["own/body-no-model"]), ModelFact::Missing);
    for id in ["own/body-not-json", "own/body-model-nonstring", "own/body-nul"] {
        assert_eq!(fact(&bodies[id]), ModelFact::NotAString, "{id}");
    }
    assert!(scan_json(&bodies["own/body-deep-nest"]).complete);
}

/// A JSON string as some client may write it: any character plain or as an escape.
fn json_text() -> impl Strategy<Value = String> {
    vec((any::<char>(), 0..3_u8), 0..40).prop_map(|chars| {
        let mut out = String::from("\"");
        for (char, form) in chars {
            let mut units = [0; 2];
            match (form, char) {
                (0, char) if char >= ' ' && char != '"' && char != '\\' => out.push(char),
                (1, '"' | '\\') => out.extend(['\\', char]),
                _ => {
                    for unit in char.encode_utf16(&mut units) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
            }
        }
        out.push('"');
        out
    })
}

/// A value, with space in it wherever JSON allows it.
fn json_value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        json_text(),
        Just("null".to_owned()),
        Just("true".to_owned()),
        Just("false".to_owned()),
        any::<i64>().prop_map(|number| number.to_string()),
        Just("-1.5e-300".to_owned()),
        Just("\"\"".to_owned()),
        vec(0..200_000_u32, 0..60).prop_map(|ids| serde_json::to_string(&ids).unwrap()),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            vec((inner.clone(), spaces()), 0..6).prop_map(|items| {
                let items: Vec<String> = items.iter().map(|(item, s)| format!("{s}{item}{s}")).collect();
                format!("[{}]", items.join(","))
            }),
            vec((json_text(), inner, spaces()), 0..6).prop_map(|items| object(&items)),
        ]
    })
}

fn spaces() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just(""), 1 => Just(" "), 1 => Just("\r\n\t ")]
}

fn object(members: &[(String, String, &str)]) -> String {
    let members: Vec<String> =
        members.iter().map(|(key, value, s)| format!("{s}{key}{s}:{s}{value}{s}")).collect();
    format!("{{{}}}", members.join(","))
}

/// A key: one of ours, now and then written with escapes, or any text.
fn json_key() -> impl Strategy<Value = String> {
    let known = proptest::sample::select(Key::ALL).prop_map(|key| str::from_utf8(key.name()).unwrap());
    prop_oneof![
        6 => known.clone().prop_map(|key| format!("\"{key}\"")),
        2 => (known, any::<u32>()).prop_map(|(key, mask)| {
            let escaped = key.chars().enumerate().map(|(at, char)| match mask >> (at % 32) & 1 {
                0 => char.to_string(),
                _ => format!("\\u{:04X}", u32::from(char)),
            });
            format!("\"{}\"", escaped.collect::<String>())
        }),
        3 => json_text(),
        2 => Just("\"model\"".to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn facts_of_any_object_are_what_serde_json_says(
        members in vec((json_key(), json_value(), spaces()), 0..12),
    ) {
        let body = object(&members);
        assert_agrees(&body);
        for end in (0..body.len()).step_by(body.len() / 16 + 1) {
            prop_assert!(!scan_json(&body.as_bytes()[..end]).complete);
        }
    }

    #[test]
    fn any_bytes_are_survived(body in vec(any::<u8>(), 0..300), structural in any::<bool>()) {
        let mut body = body;
        if structural {
            for byte in &mut body {
                *byte = br#"{}[]",:\ um1"#[usize::from(*byte) % 12];
            }
            body.splice(0..0, *b"{\"model\":");
        }
        let facts = scan_json(&body);
        let named = facts.model.name(&body).is_some();
        prop_assert_eq!(named, matches!(facts.model, ModelFact::Named { .. }));
    }
}

#[test]
fn a_field_of_any_name_is_found_at_the_top_level_only() {
    let field = |body: &'static str| json_field(body.as_bytes(), "flow").map(|place| &body[place]);
    assert_eq!(field(r#"{"a":{"flow":1},"flow" : "x y" ,"b":[]}"#), Some(r#""x y""#));
    assert_eq!(field("\u{feff} {\"flow\":1,\"flow\":[{}]}"), Some("[{}]"), "the last one counts");
    assert_eq!(field(r#"{"flow":7,"b":"#), Some("7"), "cut off behind it");
    for body in
        ["", "[]", "{}", "{", r#"{"flow"}"#, r#"{"flow":"#, r#"{"flow":"x"#, r#"{"flows":1,"flo":2,"":3}"#]
    {
        assert_eq!(field(body), None, "{body}");
    }
}

#[test]
fn a_response_is_kept_unless_its_request_says_no() {
    let storable = |body: &str| scan_json(body.as_bytes()).storable;
    for body in
        [r#"{"input":"x"}"#, r#"{"store":true}"#, r#"{"store":"yes"}"#, r#"{"store":false,"store":1}"#]
    {
        assert!(storable(body), "{body}");
    }
    for body in
        [r#"{"store":false}"#, r#"{"store":null}"#, r#"{"store":"off"}"#, r#"{"store":true,"store":0}"#]
    {
        assert!(!storable(body), "{body}");
    }
}
