//! The model lists and versions of many workers, made into those of one.

use std::collections::HashMap;

use serde_json::{Map, Number, Value, json};
use thiserror::Error;

/// Largest answer of `/v1/models` that is read; a card is about 500 bytes.
pub const MODELS_BYTES: usize = 8 << 20;

/// Why the answer of a worker's `/v1/models` is not used.
#[derive(Debug, Error)]
pub enum ModelsError {
    /// Larger than [`MODELS_BYTES`].
    #[error("the model list has {0} bytes, more than {MODELS_BYTES}")]
    TooLarge(usize),
    /// Not JSON at all.
    #[error("the model list is not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    /// JSON, but not an object with an array `data`.
    #[error("the model list has no array `data`")]
    NoData,
    /// A card without a name.
    #[error("card {0} of the model list has no `id`")]
    NoId(usize),
}

/// One model as a worker lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelCard {
    /// The name that requests use; never empty.
    pub id: String,
    /// The base model, where this is an adapter.
    pub parent: Option<String>,
    /// Tokens of prompt and answer together; `None` where the worker does not say (adapters).
    pub max_model_len: Option<u64>,
    /// The whole card, its fields in the worker's order.
    pub card: Map<String, Value>,
}

impl ModelCard {
    /// Whether it is a served name of a base model: only these stand in vLLM's "Valid aliases".
    pub fn is_base(&self) -> bool {
        self.parent.is_none()
    }

    fn of(card: Map<String, Value>) -> Option<Self> {
        let text = |key: &str| card.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        Some(Self {
            id: text("id")?.to_owned(),
            parent: text("parent").map(str::to_owned),
            max_model_len: card.get("max_model_len").and_then(Value::as_u64),
            card,
        })
    }
}

/// Reads the answer of a worker's `/v1/models`.
///
/// # Errors
/// It is too large, no JSON, no list, or a card has no name. A list that cannot be trusted is not used in part.
pub fn parse_models(body: &[u8]) -> Result<Vec<ModelCard>, ModelsError> {
    if body.len() > MODELS_BYTES {
        return Err(ModelsError::TooLarge(body.len()));
    }
    let mut list: Value = serde_json::from_slice(body)?;
    let Some(Value::Array(cards)) = list.get_mut("data").map(Value::take) else {
        return Err(ModelsError::NoData);
    };
    let card = |(position, card)| match card {
        Value::Object(card) => ModelCard::of(card).ok_or(ModelsError::NoId(position)),
        _ => Err(ModelsError::NoId(position)),
    };
    cards.into_iter().enumerate().map(card).collect()
}

/// The answer of `/v1/models` of one vLLM that serves what all these workers serve.
///
/// Each model stands once, in order of first appearance, as the first worker describes it but with the smallest
/// `max_model_len` that anyone names. Behind them stand the aliases `(alias, model)` whose model is served: its
/// card with the alias for `id`, the model for `root` and no parent.
pub fn merge_models(lists: &[Vec<ModelCard>], aliases: &[(String, String)]) -> Vec<u8> {
    let mut cards: Vec<ModelCard> = Vec::new();
    let mut places: HashMap<&str, usize> = HashMap::new();
    for card in lists.iter().flatten() {
        let place = *places.entry(&card.id).or_insert(cards.len());
        match cards.get_mut(place) {
            Some(known) => shorten(known, card.max_model_len),
            None => cards.push(card.clone()),
        }
    }
    for (alias, model) in aliases {
        let Some(card) = places.get(model.as_str()).and_then(|&place| cards.get(place)) else { continue };
        let mut copy = card.clone();
        if places.contains_key(alias.as_str()) {
            continue;
        }
        places.insert(alias, cards.len());
        copy.card.insert("id".to_owned(), json!(alias));
        copy.card.insert("root".to_owned(), json!(model));
        copy.card.insert("parent".to_owned(), Value::Null);
        cards.push(copy);
    }
    let data: Vec<Value> = cards.into_iter().map(|card| Value::Object(card.card)).collect();
    json!({"object": "list", "data": data}).to_string().into_bytes()
}

fn shorten(known: &mut ModelCard, other: Option<u64>) {
    let shortest = known.max_model_len.into_iter().chain(other).min();
    if let Some(length) = shortest.filter(|_| shortest != known.max_model_len) {
        known.max_model_len = shortest;
        known.card.insert("max_model_len".to_owned(), Value::Number(Number::from(length)));
    }
}

/// Of the answers of `/version`, the one with the lowest version, as it is; the first of equals. `None`: none of
/// them names a version.
pub fn lowest_version(bodies: &[Vec<u8>]) -> Option<Vec<u8>> {
    let versions = bodies.iter().filter_map(|body| {
        let answer: Value = serde_json::from_slice(body).ok()?;
        Some((version_order(answer.get("version")?.as_str()?), body))
    });
    versions.min_by(|(one, _), (other, _)| one.cmp(other)).map(|(_, body)| body.clone())
}

/// One part of a version, its rank first: a release number, or a mark such as `rc1`. Marks before the release are
/// smaller than its end; the mark behind it is larger, but smaller than a further number (PEP 440).
type VersionPart = (i8, u64);

const NUMBER: i8 = 2;
const END: VersionPart = (0, 0);

/// A key that orders versions by their numbers. What stands behind `+` names a build and does not count.
fn version_order(version: &str) -> Vec<VersionPart> {
    let release = version.trim().trim_start_matches(['v', 'V']).split('+').next().unwrap_or_default();
    let mut parts = Vec::new();
    let mut rest = release;
    while let Some(first) = rest.chars().next() {
        let digits = |text: &str| text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
        let letters = rest.find(|char: char| !char.is_ascii_alphabetic()).unwrap_or(rest.len());
        let (mark, behind) = rest.split_at(letters);
        let (number, behind) = behind.split_at(digits(behind));
        let rank = match mark.to_ascii_lowercase().as_str() {
            "" => NUMBER,
            "post" | "rev" | "r" => 1,
            "rc" | "c" => -1,
            "b" | "beta" => -2,
            "a" | "alpha" => -3,
            _ => -4,
        };
        if !mark.is_empty() || !number.is_empty() {
            parts.push((rank, number.parse().unwrap_or(if number.is_empty() { 0 } else { u64::MAX })));
            rest = behind;
        } else {
            rest = rest.get(first.len_utf8()..).unwrap_or_default();
        }
    }
    // 0.32 is 0.32.0
    let numbers = parts.iter().take_while(|(rank, _)| *rank == NUMBER).count();
    let zeros = parts.iter().take(numbers).rev().take_while(|(_, number)| *number == 0).count();
    parts.drain(numbers - zeros..numbers);
    parts.push(END);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vllm::golden;

    fn golden_models(name: &str) -> Vec<u8> {
        golden::case(name).answer_body().to_vec()
    }

    fn list(cards: &str) -> Vec<ModelCard> {
        parse_models(format!(r#"{{"object":"list","data":[{cards}]}}"#).as_bytes()).unwrap()
    }

    fn merged(lists: &[Vec<ModelCard>], aliases: &[(&str, &str)]) -> String {
        let aliases: Vec<(String, String)> =
            aliases.iter().map(|(alias, model)| ((*alias).to_owned(), (*model).to_owned())).collect();
        String::from_utf8(merge_models(lists, &aliases)).unwrap()
    }

    #[test]
    fn golden_lists_come_back_byte_for_byte() {
        for name in [
            "py-0.32-default/get_v1_models",
            "py-0.32-extras/get_v1_models",
            "py-0.32-stateful/lora_models",
            "py-0.32-embed/embed_models",
        ] {
            let body = golden_models(name);
            let cards = parse_models(&body).unwrap();
            let twice = [cards.clone(), cards];
            assert_eq!(merged(&twice[..1], &[]).as_bytes(), body, "{name}");
            assert_eq!(merged(&twice, &[]).as_bytes(), body, "{name} from two workers");
        }
    }

    #[test]
    fn golden_adapters_have_a_parent_and_no_length() {
        let cards = parse_models(&golden_models("py-0.32-stateful/lora_models")).unwrap();
        let short: Vec<_> =
            cards.iter().map(|card| (card.id.as_str(), card.parent.as_deref(), card.max_model_len)).collect();
        assert_eq!(short, [("tiny-chat", None, Some(2048)), ("lo1", Some("tiny-chat"), None)]);
        assert!(cards[0].is_base() && !cards[1].is_base());
    }

    #[test]
    fn the_smallest_length_that_is_known_wins() {
        let one = list(r#"{"id":"a","max_model_len":4096,"x":1.50},{"id":"b","max_model_len":null}"#);
        let two = list(r#"{"id":"c"},{"id":"b","max_model_len":7},{"id":"a","max_model_len":2048,"y":2}"#);
        assert_eq!(
            merged(&[one, two], &[]),
            r#"{"object":"list","data":[{"id":"a","max_model_len":2048,"x":1.50},{"id":"b","max_model_len":7},{"id":"c"}]}"#
        );
    }

    #[test]
    fn an_alias_is_a_copy_with_its_own_name() {
        let cards = list(r#"{"id":"a","root":"/m","parent":"p","max_model_len":1},{"id":"b"}"#);
        assert_eq!(
            merged(&[cards], &[("gpt", "a"), ("gone", "x"), ("b", "a"), ("gpt", "b")]),
            concat!(
                r#"{"object":"list","data":[{"id":"a","root":"/m","parent":"p","max_model_len":1},{"id":"b"},"#,
                r#"{"id":"gpt","root":"a","parent":null,"max_model_len":1}]}"#
            )
        );
    }

    #[test]
    fn no_workers_serve_no_models() {
        assert_eq!(merged(&[], &[("a", "b")]), r#"{"object":"list","data":[]}"#);
    }

    #[test]
    fn garbage_is_no_list() {
        for garbage in [
            "",
            "[]",
            "null",
            "{}",
            r#"{"data":{}}"#,
            r#"{"data":[1]}"#,
            r#"{"data":[{"id":""}]}"#,
            r#"{"data":[{"id":"a"},{"id":5}]}"#,
            "<html>",
            r#"{"data":[]"#,
        ] {
            assert!(parse_models(garbage.as_bytes()).is_err(), "{garbage}");
        }
        assert!(parse_models("[".repeat(1 << 20).as_bytes()).is_err());
        assert!(matches!(parse_models(&vec![b' '; MODELS_BYTES + 1]), Err(ModelsError::TooLarge(_))));
        assert!(parse_models(br#"{"data":[]}"#).unwrap().is_empty());
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let ascending = [
            "0.9.2",
            "0.10.0.dev3+gabc",
            "0.10.0a1",
            "0.10.0b2",
            "0.10.0rc1",
            "0.10.0rc2",
            "0.10.0",
            "0.10.0.post1",
            "0.10.1",
            "v0.32",
            "1.0",
        ];
        for pair in ascending.windows(2) {
            assert!(version_order(pair[0]) < version_order(pair[1]), "{pair:?}");
        }
        assert_eq!(version_order("0.32"), version_order("v0.32.0+cpu"));
        assert!(version_order("0.32.99999999999999999999") > version_order("0.32.1"));
    }

    #[test]
    fn the_lowest_version_is_answered_as_its_worker_said_it() {
        let golden = golden_models("py-0.32-default/get_version");
        let rust = br#"{"version":"0.33.0","rust_frontend_version":"1"}"#.to_vec();
        let garbage = b"{}".to_vec();
        assert_eq!(lowest_version(&[garbage.clone(), rust.clone(), golden.clone()]), Some(golden));
        assert_eq!(lowest_version(&[garbage.clone(), rust.clone()]), Some(rust));
        assert_eq!(lowest_version(&[garbage]), None);
    }
}
