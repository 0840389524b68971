//! What is replayed: requests with their times, lengths, sessions and the blocks of their prompts.
//!
//! Times are those at speed 1; a run divides them. A block is named by a number; two prompts that begin alike
//! have the same numbers as far as they do, so a number stands for all of the prompt up to there.

use std::{collections::HashMap, path::Path};

use anyhow::{Context as _, bail};
use vllm_proxy::routing::Prompt;

use crate::chance::{Chance, Zipf, hash};

/// Bytes of a token's text.
const TOKEN_BYTES: u64 = 4;
/// Tokens of a chunk of the proxy's prefix index, which has 512 bytes.
const CHUNK_TOKENS: u32 = 128;
/// Tokens of a block of the Mooncake traces.
const TRACE_BLOCK_TOKENS: u32 = 512;
/// Requests of a trace are only told apart by this many seconds, so they are spread over them.
const TRACE_BUCKET_S: f64 = 3.0;
/// Tokens of a prompt after which a generated session asks no more: a prompt must fit into a worker.
const LONGEST_TOKENS: u32 = 100_000;
/// Length of generated workloads at speed 1.
const HOUR_S: f64 = 3600.0;

/// One request.
#[derive(Debug)]
pub(crate) struct Request {
    /// Seconds from the start at speed 1.
    pub(crate) arrival_s: f64,
    /// Tokens of its prompt; at least 1.
    pub(crate) prompt: u32,
    /// Tokens that are generated; at least 1.
    pub(crate) output: u32,
    /// Whose it is.
    pub(crate) session: u64,
    /// The blocks of its prompt; the last one may be partial.
    pub(crate) blocks: Vec<u32>,
    /// The prompt as the proxy sees it.
    pub(crate) index: Prompt,
}

/// Requests in the order of their arrival.
#[derive(Debug)]
pub(crate) struct Workload {
    /// Tokens of a block.
    pub(crate) block_tokens: u32,
    pub(crate) requests: Vec<Request>,
}

impl Workload {
    /// When the last request comes, at speed 1.
    pub(crate) fn duration_s(&self) -> f64 {
        self.requests.last().map_or(0.0, |request| request.arrival_s)
    }

    /// Requests per second at speed 1.
    pub(crate) fn rate(&self) -> f64 {
        self.requests.len() as f64 / self.duration_s()
    }

    /// One line for people.
    pub(crate) fn summary(&self) -> String {
        let count = self.requests.len() as u64;
        let output: u64 = self.requests.iter().map(|request| u64::from(request.output)).sum();
        format!(
            "{count} requests, {} tokens in and {} out on average, {:.1} % of the former seen before",
            self.prompt_tokens() / count,
            output / count,
            self.reusable() * 100.0
        )
    }

    /// Tokens of all prompts.
    pub(crate) fn prompt_tokens(&self) -> u64 {
        self.requests.iter().map(|request| u64::from(request.prompt)).sum()
    }

    /// Share of the prompts' tokens that one cache without a limit would find.
    pub(crate) fn reusable(&self) -> f64 {
        let mut seen = std::collections::HashSet::new();
        let mut found = 0;
        for request in &self.requests {
            let blocks = request.blocks.iter().take_while(|id| seen.contains(*id)).count() as u32;
            found += u64::from((blocks * self.block_tokens).min(request.prompt - 1));
            seen.extend(request.blocks.iter().copied());
        }
        found as f64 / self.prompt_tokens() as f64
    }

    /// The same with prompts as the proxy reads them: what fills no chunk has none. Where several proxies are compared it
    /// matters, for a prompt's last chunk is always told, and is of use only if a longer prompt has it too.
    pub(crate) fn in_whole_chunks(mut self) -> Self {
        for request in &mut self.requests {
            let whole = (request.prompt / CHUNK_TOKENS) as usize;
            let chunks = request.index.chunks().iter().copied().take(whole).collect();
            request.index = Prompt::new(chunks, request.index.bytes(), request.index.tokens());
        }
        self
    }

    /// Twice the requests in the same time: a second copy whose prompts and sessions are its own and that is half
    /// the length ahead, so that the copies' bursts do not meet.
    pub(crate) fn doubled(&self) -> Self {
        let length = self.duration_s();
        let blocks = self.requests.iter().flat_map(|request| &request.blocks).max().map_or(0, |id| id + 1);
        let copy = |request: &Request, second: bool| {
            let shift = if second { length / 2.0 } else { 0.0 };
            let ids = request.blocks.iter().map(|id| id + if second { blocks } else { 0 }).collect();
            let arrival_s = (request.arrival_s + shift) % (length + f64::EPSILON * length);
            let session = if second { hash(request.session ^ 0xc0b1) } else { request.session };
            Draft { arrival_s, prompt: request.prompt, output: request.output, session, blocks: ids }
        };
        let drafts = self.requests.iter().flat_map(|request| [copy(request, false), copy(request, true)]);
        workload(self.block_tokens, drafts.collect())
    }
}

/// A request before its prompt is made.
struct Draft {
    arrival_s: f64,
    prompt: u32,
    output: u32,
    session: u64,
    blocks: Vec<u32>,
}

fn workload(block_tokens: u32, mut drafts: Vec<Draft>) -> Workload {
    drafts.sort_by(|one, two| one.arrival_s.total_cmp(&two.arrival_s));
    let finish = |draft: Draft| Request {
        arrival_s: draft.arrival_s,
        prompt: draft.prompt,
        output: draft.output,
        session: draft.session,
        index: index(&draft.blocks, block_tokens, draft.prompt),
        blocks: draft.blocks,
    };
    Workload { block_tokens, requests: drafts.into_iter().map(finish).collect() }
}

/// The prompt as the proxy's index would have it: chained hashes of chunks.
fn index(blocks: &[u32], block_tokens: u32, tokens: u32) -> Prompt {
    let per_block = u64::from(block_tokens / CHUNK_TOKENS);
    let chunks =
        blocks.iter().flat_map(|id| (0..per_block).map(move |part| hash(u64::from(*id) * 4 + part + 1)));
    let chunks = chunks.take(tokens.div_ceil(CHUNK_TOKENS) as usize).collect();
    Prompt::new(chunks, u64::from(tokens) * TOKEN_BYTES, u64::from(tokens))
}

/// Reads a trace of Mooncake's form: a line of JSON per request with `timestamp` (ms), `input_length`,
/// `output_length` and `hash_ids` of blocks of 512 tokens.
///
/// # Errors
/// The file cannot be read, or a line is no such request.
pub(crate) fn read_trace(path: &Path, seed: u64) -> anyhow::Result<Workload> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut chance = Chance::new(seed);
    let (mut drafts, mut sessions) = (Vec::new(), HashMap::new());
    for (number, line) in text.lines().enumerate() {
        let mut draft = read_line(line).with_context(|| format!("line {}", number + 1))?;
        draft.arrival_s += chance.between(0.0, TRACE_BUCKET_S);
        draft.session = continued(&draft.blocks, number as u64, &mut sessions);
        drafts.push(draft);
    }
    if drafts.is_empty() {
        bail!("{} has no requests", path.display());
    }
    Ok(workload(TRACE_BLOCK_TOKENS, drafts))
}

fn read_line(line: &str) -> anyhow::Result<Draft> {
    #[derive(serde::Deserialize)]
    struct Line {
        timestamp: f64,
        input_length: u32,
        output_length: u32,
        hash_ids: Vec<u32>,
    }
    let line: Line = serde_json::from_str(line)?;
    if line.hash_ids.len() != line.input_length.div_ceil(TRACE_BLOCK_TOKENS) as usize
        || line.input_length == 0
    {
        bail!("{} blocks do not make {} tokens", line.hash_ids.len(), line.input_length);
    }
    Ok(Draft {
        arrival_s: line.timestamp / 1000.0,
        prompt: line.input_length,
        output: line.output_length.max(1),
        session: 0,
        blocks: line.hash_ids,
    })
}

/// The session of a request whose trace does not name one: that of the last request that shares more with it than
/// the first block, which is the application's.
fn continued(blocks: &[u32], own: u64, sessions: &mut HashMap<u32, u64>) -> u64 {
    let session = blocks.iter().skip(1).rev().find_map(|id| sessions.get(id).copied()).unwrap_or(own);
    sessions.extend(blocks.iter().skip(1).map(|id| (*id, session)));
    session
}

/// What sessions of a generated workload are made of.
#[derive(Debug, Clone)]
pub(crate) struct Mould {
    /// Requests, about.
    pub(crate) requests: usize,
    /// Seconds that they take at speed 1.
    pub(crate) length_s: f64,
    /// Applications: each has a system prompt of its own.
    pub(crate) tools: usize,
    /// How unequally they are used.
    pub(crate) zipf: f64,
    /// Tokens of their system prompts: least and most.
    pub(crate) system: (f64, f64),
    /// Requests of a session: mean, and whether all have just so many.
    pub(crate) turns: (f64, bool),
    /// Tokens that a user adds: mean, and sigma of the logarithm.
    pub(crate) user: (f64, f64),
    /// Share of turns that bring a document, and its tokens' mean.
    pub(crate) document: (f64, f64),
    /// Tokens of an answer: mean, and sigma of the logarithm.
    pub(crate) output: (f64, f64),
    /// Seconds between the requests of a session at speed 1, mean.
    pub(crate) pause_s: f64,
    /// Share of sessions that use no application's prompt and ask once.
    pub(crate) lone: f64,
}

/// Sessions of four requests over 60 tools with long system prompts: most of a prompt is known somewhere.
pub(crate) const AGENT: Mould = Mould {
    requests: 28_000,
    length_s: HOUR_S,
    tools: 60,
    zipf: 1.0,
    system: (2000.0, 10_000.0),
    turns: (4.0, true),
    user: (1000.0, 0.6),
    document: (0.0, 0.0),
    output: (250.0, 0.7),
    pause_s: 60.0,
    lone: 0.0,
};

/// The same with few tools, of which one has most of the requests.
pub(crate) const HOT: Mould = Mould { tools: 6, zipf: 2.0, system: (5000.0, 10_000.0), ..AGENT };

/// Agents of other numbers, which no parameter was tuned on.
pub(crate) const AGENT2: Mould = Mould { tools: 200, zipf: 0.8, system: (1000.0, 15_000.0), ..AGENT };

/// Chats of all kinds: short ones, long ones, with documents, and lone long questions that share nothing.
pub(crate) const MIX: Mould = Mould {
    requests: 14_000,
    length_s: HOUR_S,
    tools: 24,
    zipf: 1.2,
    system: (100.0, 3000.0),
    turns: (5.0, false),
    user: (450.0, 1.0),
    document: (0.12, 12_000.0),
    output: (350.0, 0.9),
    pause_s: 75.0,
    lone: 0.2,
};

/// Makes a workload.
pub(crate) fn generate(mould: &Mould, seed: u64) -> Workload {
    let mut chance = Chance::new(seed);
    let mut blocks = Blocks { next: 0 };
    let zipf = Zipf::new(mould.tools, mould.zipf);
    let tools: Vec<Text> = (0..mould.tools)
        .map(|_| blocks.grown(&Text::default(), chance.between(mould.system.0, mould.system.1) as u32))
        .collect();
    let mut drafts = Vec::with_capacity(mould.requests);
    let mut session = 0;
    while drafts.len() < mould.requests {
        session += 1;
        let lone = chance.share() < mould.lone;
        let mut text = if lone { Text::default() } else { tools[zipf.draw(&mut chance)].clone() };
        let mut arrival_s = chance.between(0.0, mould.length_s);
        for _ in 0..turns(mould, lone, &mut chance) {
            let document = lone || chance.share() < mould.document.0;
            let mut added = chance.log_normal(mould.user.0, mould.user.1, 20.0, 8000.0);
            if document {
                added += chance.log_normal(mould.document.1, 0.7, 1000.0, 60_000.0);
            }
            text = blocks.grown(&text, added as u32);
            let output = chance.log_normal(mould.output.0, mould.output.1, 4.0, 2000.0) as u32;
            drafts.push(Draft {
                arrival_s,
                prompt: text.tokens,
                output,
                session,
                blocks: text.blocks.clone(),
            });
            text = blocks.grown(&text, output);
            arrival_s += 2.0 + chance.exponential(mould.pause_s);
            if text.tokens > LONGEST_TOKENS {
                break;
            }
        }
    }
    // a session that begins late is cut, or the load would fade out
    drafts.retain(|draft| draft.arrival_s < mould.length_s);
    workload(CHUNK_TOKENS, drafts)
}

fn turns(mould: &Mould, lone: bool, chance: &mut Chance) -> usize {
    match mould.turns {
        _ if lone => 1,
        (mean, true) => mean as usize,
        (mean, false) => (1.0 + chance.exponential(mean - 1.0)).round().min(40.0) as usize,
    }
}

/// A prompt that grows.
#[derive(Debug, Clone, Default)]
struct Text {
    tokens: u32,
    /// Each full but the last.
    blocks: Vec<u32>,
}

/// Gives out names of blocks.
struct Blocks {
    next: u32,
}

impl Blocks {
    /// `text` with more tokens behind it: its last block, if partial, becomes another one.
    fn grown(&mut self, text: &Text, tokens: u32) -> Text {
        let tokens = text.tokens + tokens.max(1);
        let kept = (text.tokens / CHUNK_TOKENS) as usize;
        let mut blocks = text.blocks[..kept].to_vec();
        let needed = tokens.div_ceil(CHUNK_TOKENS) as usize;
        blocks.extend((kept..needed).map(|at| self.next + (at - kept) as u32));
        self.next += (needed - kept) as u32;
        Text { tokens, blocks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_workload() {
        let mould = Mould { requests: 500, ..MIX };
        let key = |seed| {
            let made = generate(&mould, seed);
            made.requests.iter().map(|r| (r.prompt, r.arrival_s.to_bits())).collect::<Vec<_>>()
        };
        assert_eq!(key(3), key(3));
        assert_ne!(key(3), key(4));
    }

    #[test]
    fn a_text_that_grows_keeps_its_full_blocks() {
        let mut blocks = Blocks { next: 0 };
        let one = blocks.grown(&Text::default(), 300);
        let two = blocks.grown(&one, 100);
        assert_eq!((one.blocks.as_slice(), two.blocks.as_slice()), (&[0, 1, 2][..], &[0, 1, 3, 4][..]));
    }

    #[test]
    fn the_index_has_a_chunk_for_every_128_tokens_begun() {
        let prompt = index(&[5, 6], 512, 600);
        assert_eq!(prompt.chunks().len(), 5);
        let longer = index(&[5, 7], 512, 1024);
        assert_eq!(prompt.chunks()[..4], longer.chunks()[..4]);
        assert_ne!(prompt.chunks()[4], longer.chunks()[4]);
        assert_eq!((longer.chunks().len(), longer.tokens()), (8, 1024));
    }

    #[test]
    fn what_fills_no_chunk_can_be_left_out() {
        let lengths = |made: Workload| -> Vec<_> {
            made.requests.iter().map(|r| (r.prompt, r.index.tokens(), r.index.chunks().len())).collect()
        };
        let made = || generate(&Mould { requests: 100, ..AGENT }, 1);
        for ((tokens, known, begun), whole) in
            lengths(made()).into_iter().zip(lengths(made().in_whole_chunks()))
        {
            assert_eq!((begun, known), (tokens.div_ceil(CHUNK_TOKENS) as usize, u64::from(tokens)));
            assert_eq!(whole, (tokens, known, (tokens / CHUNK_TOKENS) as usize));
        }
    }

    #[test]
    fn a_doubled_workload_shares_nothing_between_its_copies() {
        let one = generate(&Mould { requests: 400, ..AGENT }, 1);
        let two = one.doubled();
        assert_eq!(two.requests.len(), one.requests.len() * 2);
        assert!(two.duration_s() <= one.duration_s() * 1.001);
        assert!(two.reusable() <= one.reusable() + 0.01);
    }

    #[test]
    fn a_line_of_a_trace_is_read_and_a_wrong_one_refused() {
        let line = r#"{"timestamp": 3000, "input_length": 600, "output_length": 0, "hash_ids": [0, 9]}"#;
        let draft = read_line(line).unwrap();
        assert_eq!((draft.prompt, draft.output, draft.blocks), (600, 1, vec![0, 9]));
        assert!(read_line(&line.replace("600", "1600")).is_err());
    }

    #[test]
    fn a_request_without_a_session_continues_the_one_that_it_shares_a_prompt_with() {
        let mut sessions = HashMap::new();
        assert_eq!(continued(&[0, 1, 2], 10, &mut sessions), 10);
        assert_eq!(continued(&[0, 5], 11, &mut sessions), 11, "the first block is everybody's");
        assert_eq!(continued(&[0, 1, 3], 12, &mut sessions), 10);
    }
}
