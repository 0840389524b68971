//! Which chunk of a prompt lies before which: so that what was told once need not be told again.
//!
//! The chunks of a prompt that are told ([`crate::routing::Prompt::sparse`]) are links: each has a parent, the one
//! before it, and the first one has none. Who has a link and all those behind it knows a whole prompt by its last
//! chunk.
//!
//! Links are only ever put here in the order of the stream, and which one has to go for a new one depends on
//! nothing but that order. So all proxies that read the same stream hold the same links, and who began to read
//! later holds those of them that were told since: what was told recently enough ([`Ancestry::told`]) everybody
//! knows.

use crate::{routing::CHUNK_BITS, sync::codec::MOST_CHUNKS};

/// Links of a bucket, the latest told first; a line of memory.
const WAYS: usize = 4;

/// Buckets: 262,144 links in 4 MiB, for 134 million tokens of text at 4 bytes each. The memory is used as it fills.
const BUCKET_BITS: u32 = 16;

/// 2⁶⁴ divided by the golden ratio, odd: spreads what differs in a few bits only.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes of the stream that a position is counted in. They go round after a terabyte.
const GRAIN: u64 = 256;

const CHUNK_MASK: u64 = (1 << CHUNK_BITS) - 1;

/// A chunk and the one before it (0: there is none), and in what is left of the words where in the stream that was
/// told: 16 bits each. All 0: no link; no chunk is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link {
    chunk: u64,
    parent: u64,
    /// In [`GRAIN`]s.
    position: u32,
}

impl Link {
    fn pack(self) -> [u64; 2] {
        let position = u64::from(self.position);
        [self.chunk << 16 | position >> 16, self.parent << 16 | position & 0xffff]
    }

    fn unpack([upper, lower]: [u64; 2]) -> Self {
        let position = (upper & 0xffff) << 16 | lower & 0xffff;
        Self { chunk: upper >> 16, parent: lower >> 16, position: position as u32 }
    }
}

/// The links that are known. The oldest go first.
pub(super) struct Ancestry {
    buckets: Vec<[[u64; 2]; WAYS]>,
    /// Bytes of the stream so far.
    position_bytes: u64,
    empty: bool,
}

impl std::fmt::Debug for Ancestry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shape = f.debug_struct("Ancestry");
        shape.field("position_bytes", &self.position_bytes).field("empty", &self.empty);
        shape.finish_non_exhaustive()
    }
}

impl Default for Ancestry {
    fn default() -> Self {
        let buckets = vec![[[0; 2]; WAYS]; 1 << BUCKET_BITS];
        Self { buckets, position_bytes: 0, empty: true }
    }
}

impl Ancestry {
    /// So many bytes of the stream more were read.
    pub(super) fn advance(&mut self, bytes: u64) {
        self.position_bytes = self.position_bytes.wrapping_add(bytes);
    }

    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        if !self.empty {
            self.buckets.fill([[0; 2]; WAYS]);
            self.empty = true;
        }
    }

    /// It was told that `parent` lies before `chunk`; 0: nothing does.
    pub(super) fn put(&mut self, chunk: u64, parent: u64) {
        let link = Link { chunk: chunk & CHUNK_MASK, parent: parent & CHUNK_MASK, position: self.position() };
        let bucket = bucket_of(chunk);
        if let Some(links) = self.buckets.get_mut(bucket) {
            let same = links.iter().position(|link| is_of(*link, chunk));
            // the last one goes, or moves to the front
            if let Some(before) = links.get_mut(..=same.unwrap_or(WAYS - 1)) {
                before.rotate_right(1);
            }
            links[0] = link.pack();
            self.empty = false;
        }
    }

    /// How many of a prompt's chunks, from its first, need not be told: each was told with its parent no more than
    /// `within_bytes` ago.
    pub(super) fn told(&self, chunks: &[u64], within_bytes: u64) -> usize {
        let within = u32::try_from(within_bytes / GRAIN).unwrap_or(u32::MAX);
        let (mut parent, now) = (0, self.position());
        let told = chunks.iter().take_while(|&&chunk| {
            let link = self.find(chunk);
            let known =
                link.is_some_and(|link| link.parent == parent && now.wrapping_sub(link.position) < within);
            parent = chunk & CHUNK_MASK;
            known
        });
        told.count()
    }

    /// The prompt that ends with `last`, from its first chunk; it is put into `chain`, which is empty and stays so
    /// where a part of the prompt is unknown, it has more than [`MOST_CHUNKS`], or more links would have to be
    /// followed than are `left`. True if it was found.
    pub(super) fn chain(&self, last: u64, left: &mut usize, chain: &mut Vec<u64>) -> bool {
        debug_assert!(chain.is_empty(), "a prompt begins with its first chunk");
        let mut next = last & CHUNK_MASK;
        while let Some(link) = self.find(next).filter(|_| *left > 0 && chain.len() < MOST_CHUNKS) {
            *left -= 1;
            chain.push(next);
            if link.parent == 0 {
                chain.reverse();
                return true;
            }
            next = link.parent;
        }
        chain.clear();
        false
    }

    fn find(&self, chunk: u64) -> Option<Link> {
        let links = self.buckets.get(bucket_of(chunk))?;
        links.iter().find(|link| is_of(**link, chunk)).map(|link| Link::unpack(*link))
    }

    /// Truncation is meant: it goes round.
    fn position(&self) -> u32 {
        (self.position_bytes / GRAIN) as u32
    }

    /// Every link, from bucket to bucket and in the order of a bucket, without where it was told.
    #[cfg(test)]
    pub(super) fn links(&self) -> Vec<(u64, u64)> {
        let links = self.buckets.iter().flatten().filter(|link| **link != [0; 2]);
        links.map(|link| Link::unpack(*link)).map(|link| (link.chunk, link.parent)).collect()
    }
}

fn bucket_of(chunk: u64) -> usize {
    ((chunk & CHUNK_MASK).wrapping_mul(SPREAD) >> (u64::BITS - BUCKET_BITS)) as usize
}

fn is_of([upper, _]: [u64; 2], chunk: u64) -> bool {
    upper >> 16 == chunk & CHUNK_MASK && upper != 0
}
