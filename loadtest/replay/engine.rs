//! One simulated worker: continuous batching in steps, as vLLM V1 does it.
//!
//! A step computes one token of every request that decodes and, within a budget of tokens, pieces of prompts:
//! those begun first, then waiting ones in the order of their arrival, as long as the next one fits into memory.
//! A request is promised the memory of its prompt and its output when it is admitted, so nothing is preempted.
//!
//! While requests only decode, all steps up to the next end are one event: their times are a sum in closed form.
//! An arrival cuts it at the end of the step that it falls into. So the work is that of arrivals and ends, not of
//! steps or sequences.

use std::{cmp::Reverse, collections::BinaryHeap, collections::VecDeque};

use crate::{
    cache::{BlockCache, BlockMap},
    workload::{Request, Workload},
};

/// What a worker is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Model {
    /// Seconds that every step costs.
    pub(crate) step_s: f64,
    /// Prompt tokens per second, without attention.
    pub(crate) prefill_rate: f64,
    /// Tokens of context that make a prompt token cost twice.
    pub(crate) attention_tokens: f64,
    /// Seconds that a request in decode adds to a step.
    pub(crate) sequence_s: f64,
    /// Seconds that a token of context of a request in decode adds to a step.
    pub(crate) context_s: f64,
    /// Tokens of a step (`max_num_batched_tokens`).
    pub(crate) budget: u32,
    /// Requests that run at once (`max_num_seqs`).
    pub(crate) sequences: usize,
    /// Tokens of its KV cache.
    pub(crate) cache_tokens: u64,
    /// Time that a step takes here, where 1 is the above.
    pub(crate) slowness: f64,
}

impl Default for Model {
    /// Something like Llama-70B on four H100.
    fn default() -> Self {
        Self {
            step_s: 0.012,
            prefill_rate: 12_000.0,
            attention_tokens: 54_000.0,
            sequence_s: 20e-6,
            context_s: 25e-9,
            budget: 8192,
            sequences: 256,
            cache_tokens: 461_376,
            slowness: 1.0,
        }
    }
}

impl Model {
    /// Seconds that `tokens` of a prompt cost behind `context` tokens of it, without the step's own.
    pub(crate) fn prefill_s(&self, context: u32, tokens: u32) -> f64 {
        let (context, tokens) = (f64::from(context), f64::from(tokens));
        self.slowness * tokens / self.prefill_rate * (1.0 + (context + tokens / 2.0) / self.attention_tokens)
    }

    /// Seconds of a step that only decodes.
    fn decode_s(&self, sequences: usize, context: u64) -> f64 {
        self.slowness * (self.step_s + self.sequence_s * sequences as f64 + self.context_s * context as f64)
    }
}

/// What happened on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The request has its first token.
    FirstToken(u32),
    /// The request has all of its tokens.
    Ended(u32),
}

/// A request whose prompt is being computed.
#[derive(Debug)]
struct Prefill {
    request: u32,
    /// Tokens of the prompt that are computed or were found.
    done: u32,
    /// Tokens that the present step computes.
    piece: u32,
    /// The blocks that it holds, in the prompt's order.
    nodes: Vec<u32>,
}

/// A request that waits, and what was expected of it when it came (only kept for an oracle).
#[derive(Debug)]
struct Waiting {
    request: u32,
    cost: Queue,
}

/// Prompts that are before somebody.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Queue {
    /// Seconds of computing, without the steps' own.
    pub(crate) seconds: f64,
    pub(crate) tokens: f64,
}

/// What an all-knowing chooser is told of one request on one worker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quote {
    /// Seconds until its prompt could begin, and those of the steps that both it and what is before it take.
    pub(crate) wait_s: f64,
    /// Seconds that its own prompt costs.
    pub(crate) own_s: f64,
    /// The same on a worker of ordinary speed: what the fleet loses by it.
    pub(crate) work_s: f64,
}

/// One worker.
#[derive(Debug)]
pub(crate) struct Engine<'a> {
    model: Model,
    workload: &'a Workload,
    cache: BlockCache,
    waiting: VecDeque<Waiting>,
    prefills: VecDeque<Prefill>,
    /// Requests in decode by the step at whose end they end, and where their blocks are in `held`.
    decoding: BinaryHeap<Reverse<(u64, u32, u32)>>,
    held: Vec<Vec<u32>>,
    held_unused: Vec<u32>,
    /// Tokens of context of all requests in decode.
    context: u64,
    /// Steps done.
    steps: u64,
    /// Start of what is being computed.
    since: f64,
    /// Steps that are one event now; 0: idle.
    span: u64,
    /// End of them.
    until: f64,
    /// Tokens of prompts that were found in the cache.
    found: u64,
    /// Tokens of prompts that were computed.
    computed: u64,
    /// Found tokens by request, of those that run here.
    found_of: BlockMap<u32>,
    /// Blocks of prompts that wait or are being computed, with how many of those have them; `None`: not asked for.
    coming: Option<BlockMap<u32>>,
    /// Sum over `waiting`.
    queued: Queue,
}

impl<'a> Engine<'a> {
    /// An idle worker. `foresight`: whether [`Engine::quote`] will be asked.
    pub(crate) fn new(model: Model, workload: &'a Workload, foresight: bool) -> Self {
        Self {
            cache: BlockCache::new(model.cache_tokens),
            model,
            workload,
            waiting: VecDeque::new(),
            prefills: VecDeque::new(),
            decoding: BinaryHeap::new(),
            held: Vec::new(),
            held_unused: Vec::new(),
            context: 0,
            steps: 0,
            since: 0.0,
            span: 0,
            until: f64::INFINITY,
            found: 0,
            computed: 0,
            found_of: BlockMap::default(),
            coming: foresight.then(BlockMap::default),
            queued: Queue::default(),
        }
    }

    /// When [`Engine::advance`] must be called next; infinity: it is idle.
    pub(crate) fn next_event(&self) -> f64 {
        self.until
    }

    /// Tokens of prompts that were found in the cache, and that were computed.
    pub(crate) fn work(&self) -> (u64, u64) {
        (self.found, self.computed)
    }

    /// Requests that run.
    pub(crate) fn running(&self) -> usize {
        self.prefills.len() + self.decoding.len()
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Share of the memory that running requests hold, 0 to 1.
    pub(crate) fn usage(&self) -> f64 {
        self.cache.usage()
    }

    /// Loses the prefix cache; what runs goes on.
    pub(crate) fn flush(&mut self) {
        self.cache.flush();
    }

    /// A request comes.
    pub(crate) fn arrive(&mut self, now: f64, request: u32) {
        let mut cost = Queue::default();
        if self.coming.is_some() {
            let data = &self.workload.requests[request as usize];
            cost = self.cost(data);
            self.queued.seconds += cost.seconds;
            self.queued.tokens += cost.tokens;
            let coming = self.coming.get_or_insert_default();
            data.blocks.iter().for_each(|id| *coming.entry(*id).or_insert(0) += 1);
        }
        let alone = self.waiting.is_empty();
        self.waiting.push_back(Waiting { request, cost });
        if self.span == 0 {
            self.plan(now);
        } else if alone && self.prefills.is_empty() && self.decoding.len() < self.model.sequences {
            self.span = self.steps_until(now);
            self.until = self.since + self.span_s(self.span);
        }
    }

    /// Ends the present steps, at [`Engine::next_event`], and begins the next ones.
    pub(crate) fn advance(&mut self, events: &mut Vec<Event>) {
        let now = self.until;
        self.steps += self.span;
        self.context += self.span * self.decoding.len() as u64;
        while let Some(Reverse((step, request, at))) = self.decoding.peek().copied() {
            if step > self.steps {
                break;
            }
            self.decoding.pop();
            let data = &self.workload.requests[request as usize];
            self.context -= u64::from(data.prompt + data.output);
            let nodes = std::mem::take(&mut self.held[at as usize]);
            self.held_unused.push(at);
            self.end(request, &nodes, events);
        }
        self.end_prefills(events);
        self.plan(now);
    }

    /// Tokens of a request that were found in the cache. To be asked once, when it has ended.
    pub(crate) fn take_found(&mut self, request: u32) -> u32 {
        self.found_of.remove(&request).unwrap_or(0)
    }

    /// What an all-knowing chooser is told of a request that would come now.
    pub(crate) fn quote(&self, now: f64, request: u32) -> Quote {
        let own = self.cost(&self.workload.requests[request as usize]);
        let begun = self.prefills.iter().map(|prefill| {
            let done = prefill.done + prefill.piece;
            let rest = self.workload.requests[prefill.request as usize].prompt - done;
            (self.model.prefill_s(done, rest), f64::from(rest))
        });
        let (seconds, tokens) = begun.fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        let present = match self.span {
            0 => 0.0,
            _ if self.prefills.is_empty() => self.since + self.span_s(self.steps_until(now)) - now,
            _ => self.until - now,
        };
        let steps = ((self.queued.tokens + tokens + own.tokens) / f64::from(self.model.budget)).ceil();
        let overhead = steps * self.model.decode_s(self.decoding.len(), self.context);
        Quote {
            wait_s: present + seconds + self.queued.seconds + overhead,
            own_s: own.seconds,
            work_s: own.seconds / self.model.slowness,
        }
    }

    /// Of a request's prompt, what neither the cache nor those before it bring.
    fn cost(&self, data: &Request) -> Queue {
        let there = |id: &&u32| {
            self.cache.contains(**id) || self.coming.as_ref().is_some_and(|coming| coming.contains_key(*id))
        };
        let found = self.found_tokens(data, data.blocks.iter().take_while(there).count());
        let rest = data.prompt - found;
        Queue { seconds: self.model.prefill_s(found, rest), tokens: f64::from(rest) }
    }

    /// At least one token is always computed: the last one's logits are needed.
    fn found_tokens(&self, data: &Request, blocks: usize) -> u32 {
        (blocks as u32 * self.workload.block_tokens).min(data.prompt - 1)
    }

    /// Seconds of so many steps that only decode, from `since` on.
    fn span_s(&self, steps: u64) -> f64 {
        let (first, growth) = self.decode_steps();
        let steps = steps as f64;
        steps * first + growth * steps * (steps - 1.0) / 2.0
    }

    /// Seconds of the first of the present steps, and by how much each is longer than the one before it.
    fn decode_steps(&self) -> (f64, f64) {
        let sequences = self.decoding.len();
        let growth = self.model.slowness * self.model.context_s * sequences as f64;
        (self.model.decode_s(sequences, self.context), growth)
    }

    /// Of the present steps, those that have begun by `now`.
    fn steps_until(&self, now: f64) -> u64 {
        let (first, growth) = self.decode_steps();
        let passed = (now - self.since).max(0.0);
        let linear = first - growth / 2.0;
        let root = (linear * linear + 2.0 * growth * passed).sqrt();
        let guess = (2.0 * passed / (root + linear)).floor() as u64;
        let mut steps = guess.saturating_sub(1).max(1);
        while steps < self.span && self.span_s(steps) < passed {
            steps += 1;
        }
        steps.min(self.span)
    }

    fn end(&mut self, request: u32, nodes: &[u32], events: &mut Vec<Event>) {
        self.cache.release(nodes, self.workload.requests[request as usize].output);
        events.push(Event::Ended(request));
    }

    fn end_prefills(&mut self, events: &mut Vec<Event>) {
        for prefill in &mut self.prefills {
            prefill.done += std::mem::take(&mut prefill.piece);
        }
        // only the last one can be unfinished: the budget ended in it
        while let Some(first) = self.prefills.front() {
            let data = &self.workload.requests[first.request as usize];
            if first.done < data.prompt {
                break;
            }
            let Some(prefill) = self.prefills.pop_front() else { break };
            if let Some(coming) = &mut self.coming {
                forget(coming, &data.blocks);
            }
            events.push(Event::FirstToken(prefill.request));
            if data.output == 1 {
                self.end(prefill.request, &prefill.nodes, events);
                continue;
            }
            let at = self.held_unused.pop().unwrap_or_else(|| {
                self.held.push(Vec::new());
                self.held.len() as u32 - 1
            });
            self.held[at as usize] = prefill.nodes;
            self.context += u64::from(data.prompt) + 1;
            let last = self.steps + u64::from(data.output) - 1;
            self.decoding.push(Reverse((last, prefill.request, at)));
        }
    }

    /// Decides what the next steps compute, and when they end.
    fn plan(&mut self, now: f64) {
        self.since = now;
        let decode_s = self.model.decode_s(self.decoding.len(), self.context);
        let mut budget = self.model.budget - (self.decoding.len() as u32).min(self.model.budget);
        let mut prefill_s = 0.0;
        let mut at = 0;
        while budget > 0 && (at < self.prefills.len() || self.admit()) {
            let (piece, seconds) = self.piece(at, budget);
            budget -= piece;
            prefill_s += seconds;
            at += 1;
        }
        if at > 0 {
            (self.span, self.until) = (1, now + decode_s + prefill_s);
        } else if let Some(Reverse((last, _, _))) = self.decoding.peek() {
            self.span = last - self.steps;
            self.until = now + self.span_s(self.span);
        } else {
            debug_assert!(self.waiting.is_empty(), "an idle worker must take who waits");
            (self.span, self.until) = (0, f64::INFINITY);
        }
    }

    /// Begins the request that has waited longest, if it fits.
    fn admit(&mut self) -> bool {
        if self.running() >= self.model.sequences {
            return false;
        }
        let Some(first) = self.waiting.front() else { return false };
        let data = &self.workload.requests[first.request as usize];
        let matching = self.cache.matching(&data.blocks);
        let found = self.found_tokens(data, matching);
        let held = (matching as u32 * self.workload.block_tokens).min(data.prompt);
        let reserve = u64::from(data.prompt - held + data.output);
        let Some(nodes) = self.cache.admit(&data.blocks[..matching], reserve) else { return false };
        let Some(first) = self.waiting.pop_front() else { return false };
        self.queued.seconds -= first.cost.seconds;
        self.queued.tokens -= first.cost.tokens;
        self.found += u64::from(found);
        self.found_of.insert(first.request, found);
        self.prefills.push_back(Prefill { request: first.request, done: found, piece: 0, nodes });
        true
    }

    /// Plans the next piece of a prompt. Its blocks can be found from now on, as in vLLM: who is admitted in the
    /// same step uses them.
    fn piece(&mut self, at: usize, budget: u32) -> (u32, f64) {
        let prefill = &mut self.prefills[at];
        let data = &self.workload.requests[prefill.request as usize];
        let piece = (data.prompt - prefill.done).min(budget);
        let seconds = self.model.prefill_s(prefill.done, piece);
        prefill.piece = piece;
        self.computed += u64::from(piece);
        let (size, end) = (self.workload.block_tokens, prefill.done + piece);
        while let Some(id) = data.blocks.get(prefill.nodes.len()) {
            let start = prefill.nodes.len() as u32 * size;
            let tokens = size.min(data.prompt - start);
            if start + tokens > end {
                break;
            }
            prefill.nodes.push(self.cache.fill(*id, tokens));
        }
        (piece, seconds)
    }
}

fn forget(coming: &mut BlockMap<u32>, blocks: &[u32]) {
    for id in blocks {
        if let Some(count) = coming.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                coming.remove(id);
            }
        }
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
