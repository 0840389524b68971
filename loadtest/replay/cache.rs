//! The prefix cache of one simulated worker: blocks in the order of their last use.
//!
//! A block that a running request uses is pinned and cannot be evicted. When a request ends its blocks are freed
//! from the tail, so that of a prompt the beginning outlives the end (vLLM 0.32, `kv_cache_manager.free`).
//! Sizes are tokens: vLLM's blocks of 16 are small enough against prompts of thousands.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

/// No node: the end of the list.
const NONE: u32 = u32::MAX;

/// A hasher for keys that are numbers: one multiplication.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, key: u32) {
        self.write_u64(u64::from(key));
    }

    fn write_u64(&mut self, key: u64) {
        let product = (self.0 ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

/// A map whose keys are block identifiers.
pub(crate) type BlockMap<T> = HashMap<u32, T, BuildHasherDefault<Mix>>;

/// A block that is held in memory.
#[derive(Debug, Clone, Copy)]
struct Node {
    /// Whose content it is; `None`: output that no prompt will ever match, or a block that was flushed.
    id: Option<u32>,
    tokens: u32,
    /// Running requests that use it.
    pins: u32,
    prev: u32,
    next: u32,
}

/// The blocks of one worker.
#[derive(Debug)]
pub(crate) struct BlockCache {
    /// Tokens that fit.
    capacity: u64,
    /// Tokens of blocks that running requests use.
    pinned: u64,
    /// Tokens that running requests have been promised and not filled yet.
    reserved: u64,
    /// Tokens of blocks that nobody uses, which may be evicted.
    idle: u64,
    by_id: BlockMap<u32>,
    nodes: Vec<Node>,
    unused: Vec<u32>,
    /// The idle block that is evicted next.
    oldest: u32,
    /// The idle block that was freed last.
    newest: u32,
}

impl BlockCache {
    /// An empty cache of so many tokens.
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            capacity,
            pinned: 0,
            reserved: 0,
            idle: 0,
            by_id: BlockMap::default(),
            nodes: Vec::new(),
            unused: Vec::new(),
            oldest: NONE,
            newest: NONE,
        }
    }

    /// Share of the memory that running requests hold, 0 to 1.
    pub(crate) fn usage(&self) -> f64 {
        (self.pinned + self.reserved) as f64 / self.capacity as f64
    }

    /// Whether the block is there.
    pub(crate) fn contains(&self, id: u32) -> bool {
        self.by_id.contains_key(&id)
    }

    /// How many of these blocks are there, from the first one on without a gap.
    pub(crate) fn matching(&self, blocks: &[u32]) -> usize {
        blocks.iter().take_while(|id| self.contains(**id)).count()
    }

    /// Begins a request: pins `found`, which must all be there, and promises `reserve` tokens more. `None`, and
    /// nothing changes, if they do not fit beside what runs. Otherwise the nodes of `found`, for
    /// [`BlockCache::release`].
    pub(crate) fn admit(&mut self, found: &[u32], reserve: u64) -> Option<Vec<u32>> {
        let nodes: Vec<u32> = found.iter().filter_map(|id| self.by_id.get(id).copied()).collect();
        let fresh: u64 =
            nodes.iter().map(|at| self.node(*at)).filter(|n| n.pins == 0).map(|n| u64::from(n.tokens)).sum();
        if self.pinned + self.reserved + fresh + reserve > self.capacity {
            return None;
        }
        for at in &nodes {
            self.pin(*at);
        }
        self.reserved += reserve;
        while self.pinned + self.reserved + self.idle > self.capacity && self.oldest != NONE {
            self.evict();
        }
        Some(nodes)
    }

    /// A block of a request was computed: it takes its tokens from what was promised, and can be found from now
    /// on. Returns its node.
    pub(crate) fn fill(&mut self, id: u32, tokens: u32) -> u32 {
        self.reserved -= u64::from(tokens);
        if let Some(at) = self.by_id.get(&id).copied() {
            self.pin(at);
            return at;
        }
        let at = self.add(Node { id: Some(id), tokens, pins: 1, prev: NONE, next: NONE });
        self.by_id.insert(id, at);
        self.pinned += u64::from(tokens);
        at
    }

    /// Ends a request that used `nodes`, in the prompt's order, and wrote `output` tokens that had been promised.
    pub(crate) fn release(&mut self, nodes: &[u32], output: u32) {
        self.reserved -= u64::from(output);
        if output > 0 {
            let at = self.add(Node { id: None, tokens: output, pins: 0, prev: NONE, next: NONE });
            self.append(at);
        }
        for at in nodes.iter().rev() {
            let node = self.node_mut(*at);
            node.pins -= 1;
            let (pins, tokens, known) = (node.pins, node.tokens, node.id.is_some());
            if pins == 0 {
                self.pinned -= u64::from(tokens);
                if known {
                    self.append(*at);
                } else {
                    self.unused.push(*at);
                }
            }
        }
    }

    /// Forgets everything; what running requests hold stays in memory and is not found any more.
    pub(crate) fn flush(&mut self) {
        while self.oldest != NONE {
            self.evict();
        }
        for (_, at) in std::mem::take(&mut self.by_id) {
            self.node_mut(at).id = None;
        }
    }

    fn pin(&mut self, at: u32) {
        let node = self.node_mut(at);
        node.pins += 1;
        if node.pins == 1 {
            self.unlink(at);
            self.pinned += u64::from(self.node(at).tokens);
        }
    }

    fn evict(&mut self) {
        let at = self.oldest;
        self.unlink(at);
        if let Some(id) = self.node(at).id {
            self.by_id.remove(&id);
        }
        self.unused.push(at);
    }

    fn add(&mut self, node: Node) -> u32 {
        if let Some(at) = self.unused.pop() {
            *self.node_mut(at) = node;
            return at;
        }
        self.nodes.push(node);
        self.nodes.len() as u32 - 1
    }

    fn append(&mut self, at: u32) {
        let before = std::mem::replace(&mut self.newest, at);
        let node = self.node_mut(at);
        (node.prev, node.next) = (before, NONE);
        let tokens = node.tokens;
        match before {
            NONE => self.oldest = at,
            _ => self.node_mut(before).next = at,
        }
        self.idle += u64::from(tokens);
    }

    fn unlink(&mut self, at: u32) {
        let Node { prev, next, tokens, .. } = *self.node(at);
        match prev {
            NONE => self.oldest = next,
            _ => self.node_mut(prev).next = next,
        }
        match next {
            NONE => self.newest = prev,
            _ => self.node_mut(next).prev = prev,
        }
        self.idle -= u64::from(tokens);
    }

    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        &mut self.nodes[at as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A whole request of blocks of 10 tokens.
    fn serve(cache: &mut BlockCache, blocks: &[u32], output: u32) -> usize {
        let found = cache.matching(blocks);
        let rest = &blocks[found..];
        let mut nodes = cache.admit(&blocks[..found], rest.len() as u64 * 10 + u64::from(output)).unwrap();
        nodes.extend(rest.iter().map(|id| cache.fill(*id, 10)));
        cache.release(&nodes, output);
        found
    }

    #[test]
    fn the_tail_goes_first_and_the_output_before_it() {
        let mut cache = BlockCache::new(50);
        serve(&mut cache, &[1, 2, 3], 10);
        serve(&mut cache, &[7, 8], 0);
        assert_eq!(
            cache.matching(&[1, 2, 3]),
            3,
            "the output made room for one block, a free place for the other"
        );
        serve(&mut cache, &[9], 0);
        assert_eq!(cache.matching(&[1, 2, 3]), 2);
        assert_eq!(cache.matching(&[7, 8]), 2, "freed later");
    }

    #[test]
    fn what_is_used_again_is_kept_longer() {
        let mut cache = BlockCache::new(30);
        for id in 1..=3 {
            serve(&mut cache, &[id], 0);
        }
        assert_eq!(serve(&mut cache, &[1], 0), 1);
        serve(&mut cache, &[4], 0);
        assert!(cache.contains(1) && !cache.contains(2) && cache.contains(3));
    }

    #[test]
    fn a_pinned_block_is_never_evicted() {
        let mut cache = BlockCache::new(30);
        serve(&mut cache, &[1], 0);
        let nodes = cache.admit(&[1], 0).unwrap();
        serve(&mut cache, &[2, 3], 0);
        serve(&mut cache, &[4, 5], 0);
        assert!(cache.contains(1) && !cache.contains(2));
        assert!(cache.admit(&[], 21).is_none(), "10 of 30 are in use");
        cache.release(&nodes, 0);
        assert!(cache.admit(&[], 30).is_some());
        assert!(!cache.contains(1));
    }

    #[test]
    fn a_block_that_two_use_is_counted_once() {
        let mut cache = BlockCache::new(30);
        let one = cache.admit(&[], 10).unwrap();
        assert!(one.is_empty());
        let first = cache.fill(1, 10);
        let two = cache.admit(&[1], 10).unwrap();
        assert_eq!(two, [first]);
        assert!(cache.admit(&[], 11).is_none());
        cache.release(&[first], 0);
        cache.release(&two, 10);
        assert_eq!((cache.pinned, cache.reserved, cache.idle), (0, 0, 20));
    }

    #[test]
    fn a_flush_forgets_what_is_in_use_too_and_loses_no_memory() {
        let mut cache = BlockCache::new(30);
        serve(&mut cache, &[2], 0);
        cache.admit(&[], 10).unwrap();
        let old = cache.fill(1, 10);
        cache.flush();
        assert!(!cache.contains(1) && !cache.contains(2));
        cache.admit(&[], 10).unwrap();
        let new = cache.fill(1, 10);
        cache.release(&[old], 0);
        assert!(cache.contains(1), "the new one is another block");
        cache.release(&[new], 0);
        assert_eq!((cache.pinned, cache.reserved, cache.idle), (0, 0, 10));
    }
}
