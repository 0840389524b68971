//! What other proxies are told of the choices of this one, and what is done with what they tell.
//!
//! Shards write into the [`Journal`] and never wait: it is a bounded queue that the sync thread empties
//! (`crate::sync`). What does not fit is dropped and counted.

use std::{
    ops::Deref,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::{
    routing::{CHUNK_BYTES, Prompt, STRIDE, Shared},
    workers::Worker,
};

/// Something that happened on a shard. Workers are known by [`Worker::id`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A prompt was sent to a worker.
    Sent {
        /// The worker.
        worker: usize,
        /// How dense the prompt is.
        density: Density,
        /// What is told of its chunks, in their order; see [`Prompt::sparse`]. Not empty.
        chunks: Sparse,
    },
    /// The request of a prompt has ended.
    Ended {
        /// The worker.
        worker: usize,
        /// How dense the prompt is.
        density: Density,
        /// The prompt's last chunk.
        last: u64,
        /// Chunks that the generated text is taken for.
        generated: u32,
    },
    /// A worker has stored a response.
    Stored {
        /// The worker.
        worker: usize,
        /// Hash of the response's id.
        response: u64,
    },
}

/// What is told of a prompt's chunks. The commonest are short, and what one thread allocates and another frees costs both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sparse {
    /// Of a prompt of up to [`STRIDE`] chunks.
    One([u64; 1]),
    /// Of a longer one.
    Many(Box<[u64]>),
}

impl Deref for Sparse {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        match self {
            Self::One(chunk) => chunk,
            Self::Many(chunks) => chunks,
        }
    }
}

impl FromIterator<u64> for Sparse {
    fn from_iter<I: IntoIterator<Item = u64>>(chunks: I) -> Self {
        let mut chunks = chunks.into_iter();
        match (chunks.next(), chunks.size_hint()) {
            (Some(only), (0, Some(0))) => Self::One([only]),
            (first, _) => Self::Many(first.into_iter().chain(chunks).collect()),
        }
    }
}

/// How many chunks a worker's cache holds if all prompts are like this one, and how many chunks its last one stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Density {
    /// Bytes per token, in quarters; 1 to [`Density::MOST_QUARTERS`].
    pub quarter_bytes: u8,
    /// 1 to [`STRIDE`].
    pub tail: u8,
}

impl Density {
    /// The most: 15.75 bytes per token.
    pub const MOST_QUARTERS: u8 = 63;

    fn of(prompt: &Prompt, tail: u32) -> Self {
        let quarters = prompt.bytes().saturating_mul(4) / prompt.tokens().max(1);
        Self {
            quarter_bytes: quarters.clamp(1, Self::MOST_QUARTERS.into()) as u8,
            tail: tail.clamp(1, STRIDE as u32) as u8,
        }
    }

    /// Chunks of so many tokens.
    pub fn chunks_per(self, tokens: u64) -> u64 {
        tokens.saturating_mul(self.quarter_bytes.into()) / (4 * CHUNK_BYTES as u64)
    }
}

/// Where shards write what other proxies are to be told.
#[derive(Debug, Default)]
pub struct Journal {
    /// `None`: nobody is told.
    sender: Option<Sender<Event>>,
    /// How late others are told, and these are heard, in milliseconds.
    interval_ms: u64,
    dropped: AtomicU64,
    alone: AtomicBool,
    muted: AtomicBool,
}

/// The interval at which, and beyond which, a third is unknown: see [`Journal::ignorance`].
const THIRD_MS: f64 = 100.0;

impl Journal {
    /// One that somebody reads every so many milliseconds, with room for so many events.
    pub fn open(capacity: usize, interval_ms: u64) -> (Self, Receiver<Event>) {
        let (sender, receiver) = bounded(capacity);
        (Self { sender: Some(sender), interval_ms, ..Self::default() }, receiver)
    }

    /// Events that did not fit, or gave way to later ones.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// While nobody can be told: of `events`, which are this journal's, the oldest go where more than half of the room
    /// is taken, so that there is some for the latest.
    pub fn make_room(&self, events: &Receiver<Event>) {
        let most = events.capacity().unwrap_or(usize::MAX) / 2;
        let gone = events.try_iter().take(events.len().saturating_sub(most)).count();
        self.dropped.fetch_add(gone as u64, Ordering::Relaxed);
    }

    /// Whether there is nobody to be told, and nobody missed: then nothing is kept or counted.
    pub fn set_muted(&self, muted: bool) {
        self.muted.store(muted, Ordering::Relaxed);
    }

    fn is_kept(&self) -> bool {
        self.sender.is_some() && !self.muted.load(Ordering::Relaxed)
    }

    /// Whether there may be other proxies of which nothing is heard now.
    pub fn is_alone(&self) -> bool {
        self.alone.load(Ordering::Relaxed)
    }

    /// How little is known of what other proxies have done in the last moments: 0 if they were heard without delay, 1
    /// if they are not heard at all. It says how much of `--hash-credit` is given. In the replay, eight
    /// proxies that are heard every 100 ms are best with a third of it; at 10 ms that costs more than it gains.
    pub fn ignorance(&self) -> f64 {
        if self.is_alone() { 1.0 } else { (self.interval_ms as f64 / THIRD_MS).min(1.0) / 3.0 }
    }

    /// Other proxies are heard from now on, or not any more.
    pub fn set_alone(&self, alone: bool) {
        self.alone.store(alone, Ordering::Relaxed);
    }

    /// `prompt` is sent to `worker`.
    pub fn sent(&self, worker: &Worker, prompt: &Prompt) {
        if self.is_kept() && !prompt.chunks().is_empty() {
            let (chunks, tail) = prompt.sparse();
            let density = Density::of(prompt, tail);
            self.write(Event::Sent { worker: worker.id(), density, chunks: chunks.collect() });
        }
    }

    /// The request of `prompt` on `worker` has ended; what was generated is taken for so many chunks.
    pub fn ended(&self, worker: &Worker, prompt: &Prompt, generated: u64) {
        if self.is_kept()
            && let Some(&last) = prompt.chunks().last()
        {
            let (_, tail) = prompt.sparse();
            let density = Density::of(prompt, tail);
            let generated = u32::try_from(generated).unwrap_or(u32::MAX);
            self.write(Event::Ended { worker: worker.id(), density, last, generated });
        }
    }

    /// `worker` has stored the response with this id's hash.
    pub fn stored(&self, worker: &Worker, response: u64) {
        if self.is_kept() {
            self.write(Event::Stored { worker: worker.id(), response });
        }
    }

    fn write(&self, event: Event) {
        if let Some(sender) = &self.sender
            && sender.try_send(event).is_err()
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Shared {
    /// Another proxy has sent a prompt of these sparse chunks to `worker`.
    pub fn heard_sent(&self, worker: &Worker, density: Density, chunks: &[u64]) {
        let room = density.chunks_per(self.sizes.tokens(worker));
        self.index.follow(worker.id(), worker.cache_generation());
        self.index.touch_sparse(worker.id(), chunks, density.tail.into(), room, room);
    }

    /// The request of such a prompt has ended, with so many chunks of generated text.
    pub fn heard_ended(&self, worker: &Worker, density: Density, chunks: &[u64], generated: u32) {
        let room = density.chunks_per(self.sizes.tokens(worker));
        self.index.follow(worker.id(), worker.cache_generation());
        self.index.touch_sparse(worker.id(), chunks, density.tail.into(), room, 0);
        self.index.add_pressure(worker.id(), generated.into(), room);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::Settings;

    fn prompt(chunks: u64) -> Prompt {
        Prompt::new((1..=chunks).collect(), chunks * 512, chunks * 128)
    }

    fn worker() -> Worker {
        Worker::new(0, "http://a:1".parse().unwrap())
    }

    #[test]
    fn what_is_told_of_a_prompt_is_every_fourth_chunk_and_the_last() {
        let (journal, events) = Journal::open(9, 50);
        for (length, told, tail) in [(1, &[1][..], 1), (4, &[4], 4), (9, &[4, 8, 9], 1), (12, &[4, 8, 12], 4)]
        {
            journal.sent(&worker(), &prompt(length));
            let density = Density { quarter_bytes: 16, tail };
            assert_eq!(
                events.try_recv(),
                Ok(Event::Sent { worker: 0, density, chunks: told.iter().copied().collect() })
            );
            journal.ended(&worker(), &prompt(length), 3);
            assert_eq!(
                events.try_recv(),
                Ok(Event::Ended { worker: 0, density, last: length, generated: 3 })
            );
        }
        journal.sent(&worker(), &Prompt::default());
        journal.ended(&worker(), &Prompt::default(), 3);
        assert!(events.is_empty(), "of what is not known nothing is told");
    }

    #[test]
    fn a_short_prompt_takes_no_memory_of_its_own() {
        let told = |chunks: u64| prompt(chunks).sparse().0.collect::<Sparse>();
        assert!(matches!(told(1), Sparse::One([1])) && matches!(told(4), Sparse::One([4])));
        assert!(matches!(told(5), Sparse::Many(_)) && told(0).is_empty());
    }

    #[test]
    fn what_does_not_fit_is_counted_and_what_nobody_reads_is_not() {
        let (journal, events) = Journal::open(2, 50);
        (0..5).for_each(|response| journal.stored(&worker(), response));
        assert_eq!((journal.dropped(), events.len()), (3, 2));
        let silent = Journal::default();
        silent.sent(&worker(), &prompt(9));
        silent.stored(&worker(), 1);
        assert_eq!(silent.dropped(), 0);
    }

    #[test]
    fn while_nobody_can_be_told_the_latest_are_kept() {
        let (journal, events) = Journal::open(8, 50);
        for response in 0..20 {
            journal.make_room(&events);
            journal.stored(&worker(), response);
        }
        let kept: Vec<_> = events.try_iter().collect();
        let latest: Vec<_> = (15..20).map(|response| Event::Stored { worker: 0, response }).collect();
        assert_eq!((kept, journal.dropped()), (latest, 15));
        journal.set_muted(true);
        journal.sent(&worker(), &prompt(9));
        journal.ended(&worker(), &prompt(9), 1);
        (0..9).for_each(|response| journal.stored(&worker(), response));
        assert_eq!((events.len(), journal.dropped()), (0, 15), "nobody is missed");
        journal.set_muted(false);
        journal.stored(&worker(), 1);
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn what_others_sent_is_found_as_deep_as_they_tell() {
        let shared = Shared::new(Settings::of_flags(&["--prefix-index-bytes=1048576"]), 1);
        let (worker, sent, mut depths) = (worker(), prompt(94), Vec::new());
        let (chunks, tail) = sent.sparse();
        let density = Density::of(&sent, tail);
        assert_eq!((density.tail, density.chunks_per(1280)), (2, 10));
        let chunks: Vec<u64> = chunks.collect();
        shared.heard_sent(&worker, density, &chunks);
        assert_eq!(shared.index.held(0), 94);
        let mut depth = |chunks: &[u64]| {
            shared.index.matched(chunks, &[0], &mut depths);
            depths[0]
        };
        assert_eq!(depth(sent.chunks()), 94);
        assert_eq!(depth(prompt(120).chunks()), 94, "a longer one");
        let other: Vec<u64> = (1..=50).chain(900..950).collect();
        assert_eq!(depth(&other), 48, "what parts between two that are known");
        assert_eq!(depth(&[7, 8, 9]), 2, "8 says that what is before it is there");
        assert_eq!(depth(&[901, 902]), 0);
        shared.heard_ended(&worker, density, &chunks, 6);
        assert_eq!(shared.index.held(0), 100, "what was generated lies there as well");
    }

    #[test]
    fn the_later_others_are_heard_the_less_is_known_of_them() {
        let ignorance = |interval_ms| Journal::open(1, interval_ms).0.ignorance();
        assert_eq!([0, 50, 100, 5000].map(ignorance), [0.0, 1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0]);
        let journal = Journal::open(1, 50).0;
        journal.set_alone(true);
        assert_eq!(journal.ignorance(), 1.0);
    }

    #[test]
    fn odd_prompts_have_a_density_as_well() {
        let of = |bytes, tokens| Density::of(&Prompt::new(vec![1], bytes, tokens), 0);
        assert_eq!(of(0, 0), Density { quarter_bytes: 1, tail: 1 });
        assert_eq!(of(u64::MAX, 1), Density { quarter_bytes: 63, tail: 1 });
    }
}
