//! Which session a request belongs to.
//!
//! The first that is there of: the headers that the operator names, in their order; a field of that name in the
//! body; the body's `session_id`, `prompt_cache_key`, `user`. A request's or a trace's id is none of them: it is new
//! with every request.
//!
//! A key is a hash of the value and of where it stood, so user 7 is not session 7. The same name in a header and
//! in the body is the same place.

use std::{borrow::Cow, ops::Range};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::{
    routing::Settings,
    vllm::{Key, Ranges, json_field},
};

/// The fields of a body that name a session, whatever is set; the narrowest first.
const FIELDS: [Key; 3] = [Key::SessionId, Key::PromptCacheKey, Key::User];

/// Finds the key of a request's session.
#[derive(Debug, Clone)]
pub struct SessionKeys {
    /// In the order in which they are looked for.
    headers: Vec<Place>,
    /// Those of `headers` that may be fields of a body, besides [`FIELDS`].
    others: Vec<Place>,
    /// Of [`FIELDS`], in that order.
    fields: [u64; FIELDS.len()],
}

/// A name and what makes its values differ from those of other names.
#[derive(Debug, Clone)]
struct Place {
    name: String,
    seed: u64,
}

impl SessionKeys {
    /// Of what the operator set.
    pub fn new(settings: &Settings) -> Self {
        let place = |name: &String| Place { name: name.clone(), seed: xxh3_64(name.as_bytes()) };
        let headers: Vec<Place> = settings.session_headers.iter().map(place).collect();
        let known = |name: &str| FIELDS.iter().any(|field| field.name() == name.as_bytes());
        // Bodies are scanned once more for each of them; a name with a hyphen is a header's.
        let other = |place: &&Place| !place.name.contains('-') && !known(&place.name);
        let others = headers.iter().filter(other).cloned().collect();
        Self { headers, others, fields: FIELDS.map(|field| xxh3_64(field.name())) }
    }

    /// The key of the session that a request names; `None`: it names none. `header` gives the value of a header by
    /// its name in lower case; `body` is a JSON body as far as it is known, and where the values of its fields lie.
    pub fn of<'a>(
        &self,
        header: impl Fn(&str) -> Option<&'a [u8]>,
        body: Option<(&[u8], &Ranges)>,
    ) -> Option<u64> {
        let in_header = |place: &Place| hash(header(&place.name)?.trim_ascii(), place.seed);
        if let Some(key) = self.headers.iter().find_map(in_header) {
            return Some(key);
        }
        let (body, ranges) = body?;
        let value = |range: Option<Range<usize>>, seed| hash(&text(body.get(range?)?)?, seed);
        let other = |place: &Place| value(json_field(body, &place.name), place.seed);
        let mut fields = FIELDS.iter().zip(self.fields);
        self.others
            .iter()
            .find_map(other)
            .or_else(|| fields.find_map(|(&key, seed)| value(ranges.get(key), seed)))
    }
}

fn hash(value: &[u8], seed: u64) -> Option<u64> {
    (!value.is_empty()).then(|| xxh3_64_with_seed(value, seed))
}

/// What a raw JSON value says: a string without its quotes and escapes, a number as it is written. `None`: it can
/// be nobody's name.
fn text(raw: &[u8]) -> Option<Cow<'_, [u8]>> {
    match raw {
        [b'"', inner @ .., b'"'] if !inner.contains(&b'\\') => Some(inner.into()),
        [b'"', ..] => serde_json::from_slice::<String>(raw).ok().map(|text| text.into_bytes().into()),
        [b'-' | b'0'..=b'9', ..] => Some(raw.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vllm::scan_json;

    fn key(flags: &[&str], headers: &[(&str, &str)], body: &str) -> Option<u64> {
        let keys = SessionKeys::new(&Settings::of_flags(flags));
        let header = |name: &str| {
            let found = headers.iter().find(|(header, _)| *header == name);
            found.map(|(_, value)| value.as_bytes())
        };
        let facts = scan_json(body.as_bytes());
        keys.of(header, Some((body.as_bytes(), &facts.prompt)))
    }

    fn of_headers(headers: &[(&str, &str)]) -> Option<u64> {
        key(&[], headers, "{}")
    }

    fn of_body(body: &str) -> Option<u64> {
        key(&[], &[], body)
    }

    #[test]
    fn a_request_that_names_no_session_has_no_key() {
        let id = ("x-request-id", "1");
        let headers =
            [id, ("x-correlation-id", "1"), ("x-trace-id", "1"), ("traceparent", "1"), ("x-user-id", " ")];
        assert_eq!(key(&[], &headers, r#"{"model":"m","request_id":"1","x-session-id":"1"}"#), None);
        for body in
            ["", "[]", "7", r#"{"user":null,"session_id":"","prompt_cache_key":[]}"#, r#"{"user":true}"#]
        {
            assert_eq!(of_body(body), None, "{body}");
        }
        let keys = SessionKeys::new(&Settings::of_flags(&[]));
        assert_eq!(keys.of(|_| None, None), None);
    }

    #[test]
    fn the_first_header_of_the_list_wins_then_the_narrowest_field() {
        let session = of_headers(&[("x-session-id", "s")]);
        assert!(session.is_some());
        assert_eq!(of_headers(&[("x-user-id", "u"), ("x-session-id", "s")]), session);
        let full = r#"{"user":"u","prompt_cache_key":"p","session_id":"i"}"#;
        assert_eq!(key(&[], &[("x-session-id", "s")], full), session);
        assert_eq!(of_body(full), of_body(r#"{"session_id":"i"}"#));
        assert_eq!(of_body(r#"{"user":"u","prompt_cache_key":"p"}"#), of_body(r#"{"prompt_cache_key":"p"}"#));
        assert_eq!(key(&[], &[("x-session-id", "")], full), of_body(full), "an empty header names nothing");
    }

    #[test]
    fn the_same_text_at_another_place_is_another_session() {
        let mut keys = vec![
            of_headers(&[("x-session-id", "7")]),
            of_headers(&[("x-user-id", "7")]),
            of_headers(&[("x-user-id", "8")]),
            of_body(r#"{"session_id":"7"}"#),
            of_body(r#"{"prompt_cache_key":"7"}"#),
            of_body(r#"{"user":"7"}"#),
        ];
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 6);
        assert!(keys.iter().all(Option::is_some));
    }

    #[test]
    fn escapes_and_spaces_do_not_make_another_session() {
        assert_eq!(of_body(r#"{"user":"\u00e4\/b"}"#), of_body("{\"user\": \"ä/b\" }"));
        assert_eq!(of_body(r#"{"user":5}"#), of_body(r#"{"user":"5"}"#));
        assert_eq!(of_headers(&[("x-user-id", " 5 ")]), of_headers(&[("x-user-id", "5")]));
    }

    #[test]
    fn a_name_that_the_operator_chose_is_looked_for_in_the_body_as_well() {
        let flags = ["--session-key", "tenant,x-flow"];
        let body = r#"{"user":"u","x-flow":"f","tenant":"t"}"#;
        let tenant = key(&flags, &[], body);
        assert_eq!(tenant, key(&flags, &[("tenant", "t")], "{}"), "one name is one place");
        assert_ne!(tenant, of_body(body));
        assert_eq!(key(&flags, &[("x-flow", "f")], body), key(&flags, &[("x-flow", "f")], "{}"));
        let without = r#"{"user":"u","x-flow":"f"}"#;
        assert_eq!(key(&flags, &[], without), of_body(without), "a name with a hyphen is a header's");
        let user = ["--session-key", "user"];
        assert_eq!(key(&user, &[("user", "u")], "{}"), of_body(r#"{"user":"u"}"#));
    }
}
