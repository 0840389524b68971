//! What must be known of a JSON body before a worker can be chosen, found without parsing it.
//!
//! A scanner of the top level only: it jumps from quote to quote, remembers where the values of a few keys lie and
//! decodes nothing but the model's name. It is no validator: where JSON is broken, a worker says so in vLLM's
//! words. It follows Python's `json`, which vLLM reads with: of a key that stands twice the last one counts, a key
//! may be written with escapes, a byte order mark may stand before the object.
//!
//! Time is linear in the body, nesting costs a counter and no stack.

use std::{borrow::Cow, ops::Range};

mod blocks;

use blocks::{container, string};

/// What inspection learned of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The model that is asked for.
    pub model: ModelFact,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// Whether it continues a stored response, which only one worker holds.
    pub previous_response_id: bool,
    /// Whether the response is to be stored or made in the background, so that it is never asked for twice.
    pub stores: bool,
    /// Whether a response may be asked for later: that it is to be stored is vLLM's default.
    pub storable: bool,
    /// Where the values lie that matter for routing.
    pub prompt: Ranges,
    /// Whether the object was seen from brace to brace; else `prompt` is what was found until then.
    pub complete: bool,
    /// Just behind the object's opening brace; `None`: there is no object.
    open: Option<usize>,
    /// Whether the object has a member.
    members: bool,
}

/// What a body says of its model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFact {
    /// No `model`, `null` or `""`: the served model.
    Missing,
    /// A name.
    Named {
        /// The raw value, quotes included. To be read with [`ModelFact::name`].
        value: Range<usize>,
    },
    /// A model that cannot be a name, or a body that is no JSON object: any worker answers 400.
    NotAString,
}

impl ModelFact {
    /// The name, escapes decoded, of a fact that was found in `body`. Borrowed unless it has escapes.
    pub fn name<'a>(&self, body: &'a [u8]) -> Option<Cow<'a, str>> {
        match self {
            ModelFact::Named { value } => text(body.get(value.clone())?),
            ModelFact::Missing | ModelFact::NotAString => None,
        }
    }
}

/// Declares [`Key`]: a row is a key of the top level whose value is remembered.
macro_rules! keys {
    ($($(#[$doc:meta])* $key:ident = $name:literal,)+) => {
        /// A key of the top level whose value is remembered.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Key {
            $($(#[$doc])* $key,)+
        }

        impl Key {
            /// Every key.
            pub const ALL: &[Key] = &[$(Key::$key),+];

            /// The key as it stands in JSON.
            pub const fn name(self) -> &'static [u8] {
                match self { $(Key::$key => $name,)+ }
            }

            fn of(name: &[u8]) -> Option<Key> {
                match name { $($name => Some(Key::$key),)+ _ => None }
            }
        }
    };
}

keys! {
    /// The model.
    Model = b"model",
    /// Whether to stream.
    Stream = b"stream",
    /// The stored response that this one continues.
    PreviousResponseId = b"previous_response_id",
    /// Whether the response is stored: then it is never sent twice.
    Store = b"store",
    /// Whether the response is made in the background: then it is never sent twice.
    Background = b"background",

    /// Prompt: chat.
    Messages = b"messages",
    /// Prompt: completions.
    Prompt = b"prompt",
    /// Prompt: responses, embeddings, pooling, classification.
    Input = b"input",
    /// Prompt: Anthropic's system text.
    System = b"system",
    /// Prompt: the system text of responses.
    Instructions = b"instructions",
    /// Prompt: parts of a multi-modal one.
    Contents = b"contents",
    /// Prompt: tools, which the template writes before the messages.
    Tools = b"tools",
    /// Prompt: documents of chats and reranking.
    Documents = b"documents",
    /// Prompt: exact tokens of `/inference/v1/generate`.
    TokenIds = b"token_ids",
    /// Prompt: what documents are ranked for, or scored by generation.
    Query = b"query",
    /// Prompt: what is scored by generation.
    Items = b"items",
    /// Prompt: first side of a score.
    Queries = b"queries",
    /// Prompt: first side of a score, older name.
    Text1 = b"text_1",
    /// Prompt: second side of a score, older name.
    Text2 = b"text_2",
    /// Prompt: Cohere's embeddings.
    Texts = b"texts",
    /// Prompt: Cohere's embeddings.
    Inputs = b"inputs",
    /// Prompt: `/detokenize`.
    Tokens = b"tokens",
    /// Separates prefix caches.
    CacheSalt = b"cache_salt",

    /// A session that should stay where it is.
    SessionId = b"session_id",
    /// An end user.
    User = b"user",
    /// What the client believes to share a prefix.
    PromptCacheKey = b"prompt_cache_key",
    /// Lower goes first.
    Priority = b"priority",
}

/// The longest key, for those that are written with escapes.
const LONGEST_KEY: usize = 32;

const NONE: Range<usize> = 0..0;

/// Where the raw values of some keys lie in a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    /// By [`Key`]; empty where the key is absent (no value is empty).
    places: [Range<usize>; Key::ALL.len()],
}

impl Default for Ranges {
    fn default() -> Self {
        Self { places: [NONE; Key::ALL.len()] }
    }
}

impl Ranges {
    /// The raw value of `key`: a string with its quotes, a container with its brackets.
    pub fn get(&self, key: Key) -> Option<Range<usize>> {
        Some(self.places[key as usize].clone()).filter(|place| !place.is_empty())
    }

    /// Every key that is present, in the order of [`Key`].
    pub fn iter(&self) -> impl Iterator<Item = (Key, Range<usize>)> {
        Key::ALL.iter().filter_map(|&key| Some((key, self.get(key)?)))
    }
}

impl Facts {
    /// The edit that makes `name` the model of the body: the bytes to replace and what comes in their place.
    /// `None`: there is no object to name a model in.
    pub fn rename(&self, name: &str) -> Option<(Range<usize>, Vec<u8>)> {
        let mut bytes = Vec::with_capacity(name.len() + 16);
        if let Some(place) = self.prompt.get(Key::Model) {
            json_string(&mut bytes, name);
            return Some((place, bytes));
        }
        let open = self.open?;
        bytes.extend_from_slice(b"\"model\":");
        json_string(&mut bytes, name);
        if self.members {
            bytes.push(b',');
        }
        Some((open..open, bytes))
    }
}

/// Appends `text` as a JSON string, escaped as Python's `json.dumps` does with `ensure_ascii=False`, which is what
/// Starlette's `JSONResponse` writes.
pub fn json_string(out: &mut Vec<u8>, text: &str) {
    let written = serde_json::to_writer(&mut *out, text);
    debug_assert!(written.is_ok(), "writing into memory cannot fail");
}

/// Finds the facts of a body, which should be whole: what comes later may change every one of them.
pub fn scan_json(body: &[u8]) -> Facts {
    let mut facts = Facts {
        model: ModelFact::NotAString,
        stream: false,
        previous_response_id: false,
        stores: false,
        storable: false,
        prompt: Ranges::default(),
        complete: false,
        open: None,
        members: false,
    };
    facts.complete = members(body, &mut facts).is_some();
    let value = |key| facts.prompt.get(key).and_then(|place| body.get(place)).unwrap_or_default();
    if facts.complete {
        facts.model = model(value(Key::Model), facts.prompt.get(Key::Model));
    }
    facts.stream = truth(value(Key::Stream));
    facts.storable = facts.prompt.get(Key::Store).is_none() || truth(value(Key::Store));
    facts.stores = truth(value(Key::Store)) || truth(value(Key::Background));
    facts.previous_response_id = value(Key::PreviousResponseId).first() == Some(&b'"');
    facts
}

/// Walks over the members of the object that `body` is. `None`: it is none, or ends too early.
fn members(body: &[u8], facts: &mut Facts) -> Option<()> {
    let mut at = if body.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    at = expect(body, space(body, at), b'{')?;
    facts.open = Some(at);
    at = space(body, at);
    if body.get(at) == Some(&b'}') {
        return Some(());
    }
    facts.members = true;
    loop {
        let key = at..string(body, at)?;
        at = expect(body, space(body, key.end), b':')?;
        at = space(body, at);
        let value = at..value(body, at)?;
        at = space(body, value.end);
        if let Some(key) = key_of(body.get(key)?) {
            facts.prompt.places[key as usize] = value;
        }
        match body.get(at)? {
            b',' => at = space(body, at + 1),
            b'}' => return Some(()),
            _ => return None,
        }
    }
}

/// Where the raw value of a field of the top level lies, for names that are no [`Key`]. Of several the last one
/// counts; a name that is written with escapes is not found.
pub fn json_field(body: &[u8], name: &str) -> Option<Range<usize>> {
    let mut found = None;
    let mut at = if body.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let mut before = b'{';
    while let Some((key, value)) = next_field(body, at, before) {
        (at, before) = (value.end, b',');
        let inner = body.get(key.start + 1..key.end - 1);
        if inner == Some(name.as_bytes()) {
            found = Some(value);
        }
    }
    found
}

/// The key and the value behind the brace or comma that is to come at `at`.
fn next_field(body: &[u8], at: usize, before: u8) -> Option<(Range<usize>, Range<usize>)> {
    let at = space(body, expect(body, space(body, at), before)?);
    let key = at..string(body, at)?;
    let at = space(body, expect(body, space(body, key.end), b':')?);
    Some((key, at..value(body, at)?))
}

/// Which key a raw string is.
fn key_of(raw: &[u8]) -> Option<Key> {
    let name = raw.get(1..raw.len().checked_sub(1)?)?;
    if let Some(key) = Key::of(name) {
        return Some(key);
    }
    // an escape takes six bytes for one at most
    if name.len() > 6 * LONGEST_KEY || !name.contains(&b'\\') {
        return None;
    }
    Key::of(text(raw)?.as_bytes())
}

fn model(raw: &[u8], place: Option<Range<usize>>) -> ModelFact {
    match (raw, place) {
        (b"null" | b"\"\"", _) | (_, None) => ModelFact::Missing,
        ([b'"', ..], Some(value)) if text(raw).is_some() => ModelFact::Named { value },
        _ => ModelFact::NotAString,
    }
}

/// The text of a raw string; `None` where Python or pydantic would refuse it: not UTF-8, a control, a bad escape,
/// half of a surrogate pair.
pub(super) fn text(raw: &[u8]) -> Option<Cow<'_, str>> {
    let inner = raw.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if inner.iter().any(|&byte| byte == b'\\' || byte < b' ') {
        return serde_json::from_slice::<String>(raw).ok().map(Cow::Owned);
    }
    str::from_utf8(inner).ok().map(Cow::Borrowed)
}

/// What pydantic takes for true in a field of type bool (pydantic 2, "conversion table").
fn truth(raw: &[u8]) -> bool {
    let inner = match raw {
        [b'"', inner @ .., b'"'] => inner,
        b"true" | b"1" | b"1.0" => return true,
        _ => return false,
    };
    [&b"true"[..], b"1", b"on", b"t", b"y", b"yes"].iter().any(|word| inner.eq_ignore_ascii_case(word))
}

fn space(body: &[u8], at: usize) -> usize {
    let rest = body.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count()
}

fn expect(body: &[u8], at: usize, byte: u8) -> Option<usize> {
    (*body.get(at)? == byte).then_some(at + 1)
}

/// End of the value that begins at `at`.
fn value(body: &[u8], at: usize) -> Option<usize> {
    match body.get(at)? {
        b'"' => string(body, at),
        b'{' | b'[' => container(body, at),
        _ => scalar(body, at),
    }
}

/// End of the number or word that begins at `at`.
fn scalar(body: &[u8], at: usize) -> Option<usize> {
    let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b':' | b'"' | b' ' | b'\t' | b'\n' | b'\r');
    let length = body.get(at..)?.iter().position(ends)?;
    (length > 0).then_some(at + length)
}

#[cfg(test)]
mod tests;
