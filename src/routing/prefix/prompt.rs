//! A prompt as the prefix index sees it.

use std::ops::Range;

use memchr::memchr_iter;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::{
    routing::prefix::{STRIDE, digest, media, rates},
    vllm::{Facts, Key},
};

/// Bytes of a chunk: the grain of what is found again. Half the size costs twice the look-ups and finds an eighth
/// of a kilobyte more on average.
pub const CHUNK_BYTES: usize = 512;

/// Chunks of a prompt that are known at most: 16 MiB of it. What follows is counted and cannot be found again.
pub const MAX_CHUNKS: usize = 16 * 1024 * 1024 / CHUNK_BYTES;

/// Bits of the number that a chunk is known by: enough to tell those of a fleet from each other, and few enough to
/// be told to other proxies.
pub const CHUNK_BITS: u32 = 48;

/// Chunks that an image counts as, about a thousand tokens: between what models make of small and of large ones.
const MEDIUM_CHUNKS: usize = 8;

/// The values of a chat in the order in which templates write them. What grows is last.
const CHAT: &[Key] = &[Key::Tools, Key::Documents, Key::System, Key::Instructions, Key::Messages];

/// The values of everything else: of those that a request has, the one that several requests have in common is
/// first. Documents are behind the query that they are ranked for. `tokens` is missing: nothing is computed of it.
const OTHER: &[Key] = &[
    Key::Tools,
    Key::System,
    Key::Instructions,
    Key::Query,
    Key::Queries,
    Key::Text1,
    Key::Prompt,
    Key::Input,
    Key::Contents,
    Key::TokenIds,
    Key::Items,
    Key::Documents,
    Key::Text2,
    Key::Texts,
    Key::Inputs,
];

/// A prompt: hashes of its chunks, each chained to the one before it, and how many tokens it is believed to have.
/// Empty where nothing of it is known.
///
/// A prompt is the raw values of the body's keys that make it, in the order in which templates write them (tools,
/// documents, system, instructions, and what grows: the messages, the prompt …). They are hashed as they stand in the
/// JSON, so that nothing is decoded or copied: two bodies share chunks if the same client library wrote them. A
/// chunk's hash says everything that is before it, and which model and which `cache_salt` it is for.
///
/// Every value begins a chunk of its own. The rest of a value that does not fill a chunk goes into the chain
/// without a hash of its own; the rest of the last value goes nowhere, nor does its closing bracket or quote, so that
/// a prompt that grows at its end keeps all its chunks.
///
/// Several prompts of one request (`"prompt": ["a", "b"]`) are one after the other: what they have in common with
/// others is seen of the first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    /// In the prompt's order. None is 0, and none has more than [`CHUNK_BITS`].
    chunks: Vec<u64>,
    /// Where chunks do not follow on the one before: number of the chunk, and the bytes before it. Ascending;
    /// empty: chunks follow on each other from the beginning.
    joints: Vec<(usize, u64)>,
    /// Of the prompt's values; an image counts as [`MEDIUM_CHUNKS`].
    bytes: u64,
    tokens: u64,
    /// See [`Prompt::rated_bytes`].
    rated_bytes: Option<u64>,
    /// Where images are in a value; only kept for its memory.
    media: Vec<Range<usize>>,
}

impl Prompt {
    /// A prompt of these chunks, each of them [`CHUNK_BYTES`] of its `bytes`, and so many tokens.
    pub fn new(chunks: Vec<u64>, bytes: u64, tokens: u64) -> Self {
        let chunks = chunks.into_iter().map(known_by).collect();
        Self { chunks, bytes, tokens, rated_bytes: Some(bytes), ..Self::default() }
    }

    /// Reads the prompt of a body anew; its memory is used again. `bytes_per_token` is what the model has
    /// ([`crate::routing::TokenRates`]); what is no rate is taken for the default.
    pub fn read(&mut self, body: &[u8], facts: &Facts, model: &str, bytes_per_token: f64) {
        self.chunks.clear();
        self.joints.clear();
        let value = |key| value(body, facts, key);
        let mut reading = Reading {
            prompt: self,
            chain: xxh3_64_with_seed(value(Key::CacheSalt).unwrap_or_default(), xxh3_64(model.as_bytes())),
            bytes: 0,
            rated: 0,
            exact: 0,
            media: false,
        };
        let order = if value(Key::Messages).is_some() { CHAT } else { OTHER };
        let mut values = order.iter().filter_map(|&key| Some((key, value(key)?))).peekable();
        while let Some((key, value)) = values.next() {
            reading.value(key, value, values.peek().is_none());
        }
        let Reading { bytes, rated, exact, media, .. } = reading;
        let rate = if bytes_per_token > 0.0 { bytes_per_token } else { rates::DEFAULT };
        self.bytes = bytes;
        // saturates, also where the rate is infinite
        self.tokens = exact.saturating_add((rated as f64 / rate).ceil() as u64);
        self.rated_bytes = Some(rated).filter(|_| exact == 0 && !media && rated > 0);
    }

    /// The chained hashes of its chunks, of [`CHUNK_BITS`] each; none is 0.
    pub fn chunks(&self) -> &[u64] {
        &self.chunks
    }

    /// Those of its chunks that other proxies are told: every [`STRIDE`]th, and the last one; and how many chunks that
    /// one stands for.
    pub fn sparse(&self) -> (impl ExactSizeIterator<Item = u64>, u32) {
        let groups = self.chunks.chunks(STRIDE);
        let tail = groups.clone().next_back().map_or(0, <[u64]>::len);
        // no group is empty
        (groups.map(|group| group.last().copied().unwrap_or_default()), tail as u32)
    }

    /// Tokens that it is believed to have; known where it is given as tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Bytes of its values; an image counts as many as text of as many tokens would have.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its bytes, if their number and that of its tokens say how many a token has ([`crate::routing::TokenRates::learn`]):
    /// they do not where it is given as tokens or has images.
    pub fn rated_bytes(&self) -> Option<u64> {
        self.rated_bytes
    }

    /// Tokens of its first `depth` chunks, with what lies between them; never more than [`Prompt::tokens`].
    pub fn tokens_of(&self, depth: usize) -> u64 {
        let depth = depth.min(self.chunks.len());
        if depth == 0 || self.bytes == 0 {
            return 0;
        }
        let after = self.joints.partition_point(|&(chunk, _)| chunk < depth);
        let (chunk, bytes) = after.checked_sub(1).map_or((0, 0), |last| self.joints[last]);
        let bytes = bytes + (depth - chunk) as u64 * CHUNK_BYTES as u64;
        scale(self.tokens, bytes, self.bytes).min(self.tokens)
    }

    /// Between how many and how many tokens it has in common with a prompt that shares its first `depth` chunks and
    /// no more of them: from the end of the last to the end of the one that was not found, or the prompt's own.
    /// What shares no chunk may still share some of the first.
    pub fn shared_tokens(&self, depth: usize) -> Range<u64> {
        let least = self.tokens_of(depth);
        match depth {
            depth if depth < self.chunks.len() => least..self.tokens_of(depth + 1),
            _ => least..self.tokens,
        }
    }

    /// The most chunks that have no more than `tokens` tokens.
    pub fn depth_of(&self, tokens: u64) -> usize {
        let (mut least, mut most) = (0, self.chunks.len());
        while least < most {
            let middle = least + (most - least).div_ceil(2);
            if self.tokens_of(middle) <= tokens { least = middle } else { most = middle - 1 }
        }
        least
    }

    /// Chunks that a cache of `tokens` tokens holds, if all of them are as dense as this prompt's.
    pub fn chunks_per(&self, tokens: u64) -> u64 {
        if self.tokens == 0 || self.bytes == 0 {
            return (tokens as f64 * rates::DEFAULT) as u64 / CHUNK_BYTES as u64;
        }
        scale(tokens, self.bytes, self.tokens.saturating_mul(CHUNK_BYTES as u64))
    }
}

/// The number that a chunk with this hash is known by.
fn known_by(hash: u64) -> u64 {
    (hash & ((1 << CHUNK_BITS) - 1)).max(1)
}

/// `number` times `over` divided by `under`, which is not 0.
fn scale(number: u64, over: u64, under: u64) -> u64 {
    match number.checked_mul(over) {
        Some(product) => product / under,
        None => u64::try_from(u128::from(number) * u128::from(over) / u128::from(under)).unwrap_or(u64::MAX),
    }
}

/// The raw value of a key; `None` also where it is `null`, which is as if it was not there.
fn value<'a>(body: &'a [u8], facts: &Facts, key: Key) -> Option<&'a [u8]> {
    body.get(facts.prompt.get(key)?).filter(|value| *value != b"null")
}

/// A prompt while it is read.
struct Reading<'a> {
    prompt: &'a mut Prompt,
    /// Stands for everything that was read before.
    chain: u64,
    bytes: u64,
    /// Those of them whose tokens are estimated.
    rated: u64,
    /// Tokens that were counted.
    exact: u64,
    /// Whether there are images.
    media: bool,
}

impl Reading<'_> {
    /// Takes in the value of a key; the last one ends with what can grow.
    fn value(&mut self, key: Key, value: &[u8], last: bool) {
        // a number that no chunk's hash is likely to be
        self.link(!(key as u64));
        let begun = self.bytes;
        let mut media = std::mem::take(&mut self.prompt.media);
        media.clear();
        let tokens = token_count(value);
        if tokens == 0 {
            media::find(value, &mut media);
        }
        let mut from = 0;
        for medium in &media {
            self.text(&value[from..medium.start], false);
            self.medium(&value[medium.clone()]);
            from = medium.end;
        }
        self.text(&value[from..], last);
        self.media |= !media.is_empty();
        self.prompt.media = media;
        self.exact += tokens;
        if tokens == 0 {
            self.rated += self.bytes - begun;
        }
    }

    fn text(&mut self, text: &[u8], last: bool) {
        self.join();
        self.bytes += text.len() as u64;
        // where it grows there is now a bracket or a quote
        let text = if last { text.split_last().map_or(text, |(_, rest)| rest) } else { text };
        let (chunks, rest) = text.as_chunks::<CHUNK_BYTES>();
        let room = MAX_CHUNKS.saturating_sub(self.prompt.chunks.len());
        self.prompt.chunks.reserve(chunks.len().min(room));
        for chunk in chunks.iter().take(room) {
            self.push(digest::of(chunk));
        }
        if !last {
            self.link(xxh3_64(rest));
        }
    }

    fn medium(&mut self, medium: &[u8]) {
        self.join();
        self.bytes += (MEDIUM_CHUNKS * CHUNK_BYTES) as u64;
        let hash = xxh3_64(medium);
        let room = MAX_CHUNKS.saturating_sub(self.prompt.chunks.len());
        for _ in 0..MEDIUM_CHUNKS.min(room) {
            self.push(hash);
        }
    }

    /// What comes next begins a chunk; that the first does needs no joint.
    fn join(&mut self) {
        if self.bytes > 0 {
            self.prompt.joints.push((self.prompt.chunks.len(), self.bytes));
        }
    }

    fn push(&mut self, hash: u64) {
        self.link(hash);
        self.prompt.chunks.push(known_by(self.chain));
    }

    fn link(&mut self, hash: u64) {
        self.chain = xxh3_64_with_seed(&hash.to_le_bytes(), self.chain).max(1);
    }
}

/// How many numbers there are in an array, or an array of arrays, of numbers; 0: it is none.
fn token_count(value: &[u8]) -> u64 {
    let mut brackets = 0;
    for byte in value {
        match byte {
            b'[' => brackets += 1,
            b' ' | b'\t' | b'\n' | b'\r' => {}
            // between two numbers there is a comma, also where the first ends one array and the second begins
            // the next
            b'0'..=b'9' if brackets > 0 => return memchr_iter(b',', value).count() as u64 + 1,
            _ => return 0,
        }
    }
    0
}
