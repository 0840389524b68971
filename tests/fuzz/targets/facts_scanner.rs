//! The facts of a body: never a panic, the same as a real parser finds wherever there is JSON to parse, and of a
//! form the same however it is cut.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use vllm_proxy::vllm::{ModelFact, ModelField, MultipartFact, scan_json};

fuzz_target!(|body: &[u8]| {
    let facts = scan_json(body);
    for (_, range) in facts.prompt.iter() {
        assert!(body.get(range).is_some(), "a range lies outside of the body");
    }
    if let Ok(Value::Object(object)) = serde_json::from_slice(body) {
        let name = facts.model.name(body);
        match object.get("model") {
            None | Some(Value::Null) => assert_eq!(facts.model, ModelFact::Missing),
            Some(Value::String(text)) if text.is_empty() => assert_eq!(facts.model, ModelFact::Missing),
            Some(Value::String(text)) => assert_eq!(name.as_deref(), Some(text.as_str())),
            Some(_) => assert_eq!(facts.model, ModelFact::NotAString),
        }
        assert_eq!(facts.stream, object.get("stream") == Some(&Value::Bool(true)));
    }

    let whole = ModelField::new(b"b").scan(body, true);
    let mut field = ModelField::new(b"b");
    let half = body.len() / 2;
    let cut = match field.scan(&body[..half], false) {
        MultipartFact::NeedMore => field.scan(body, true),
        decided => decided,
    };
    assert_eq!(whole, cut);
});
