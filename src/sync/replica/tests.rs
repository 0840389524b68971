use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwap;
use crossbeam_channel::Sender;

use super::*;
use crate::{
    routing::{Journal, Prompt, Settings},
    workers::{Demand, Fleet, InFlight},
};

/// Bytes of the stream that are told of as its size.
const STREAM: u64 = 64 << 20;

/// A proxy without sockets: some workers, a prefix index, and its part in the exchange.
struct Proxy {
    replica: Replica,
    shared: Shared,
    fleet: FleetHandle,
    figures: Arc<SyncFigures>,
    /// Position in the stream.
    read: usize,
}

impl Proxy {
    fn new(instance: u64, workers: usize) -> Self {
        Self::with_stream(instance, workers, STREAM)
    }

    fn with_stream(instance: u64, workers: usize, stream_bytes: u64) -> Self {
        let (journal, events) = Journal::open(100_000);
        let settings = Settings::of_flags(&["--prefix-index-bytes=16777216"]);
        let shared = Shared::with_journal(settings, workers.max(1), journal);
        let fleet = Arc::new(ArcSwap::from_pointee(fleet_of(0, workers)));
        let figures = Arc::new(SyncFigures::default());
        let parts = Parts {
            instance,
            events,
            shared: shared.clone(),
            fleet: fleet.clone(),
            stored: Arc::default(),
            quota: None,
            figures: figures.clone(),
            stream_bytes,
        };
        Self { replica: Replica::new(parts), shared, fleet, figures, read: 0 }
    }

    fn worker(&self, at: usize) -> Arc<Worker> {
        self.fleet.load().workers[at].clone()
    }

    fn runs(&self, worker: usize, tokens: u64) -> InFlight {
        InFlight::begin(self.worker(worker), Demand::new(tokens, tokens))
    }

    /// Adds to the stream what there is to be added.
    fn tell(&mut self, now: Millis, stream: &mut Vec<Vec<u8>>) {
        stream.extend(std::iter::from_fn(|| self.replica.compose(now)));
    }

    /// Reads what is new in the stream.
    fn hear(&mut self, now: Millis, stream: &[Vec<u8>]) {
        for entry in &stream[self.read..] {
            self.replica.receive(now, 0, entry);
        }
        self.read = stream.len();
    }

    fn depth(&self, worker: usize, prompt: &Prompt) -> u32 {
        let mut depths = Vec::new();
        self.shared.index.matched(prompt.chunks(), &[worker], &mut depths);
        depths[0]
    }
}

fn fleet_of(first_id: usize, workers: usize) -> Fleet {
    let worker = |at| Arc::new(Worker::new(first_id + at, format!("http://w{at}:1").parse().unwrap()));
    let mut fleet = Fleet::default();
    fleet.workers = (0..workers).map(worker).collect();
    fleet
}

/// A prompt of so many chunks that nothing else has, after the first `common` of `before`.
fn prompt_after(before: &Prompt, common: usize, chunks: usize) -> Prompt {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let new = |_| NEXT.fetch_add(1, Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
    let chunks: Vec<u64> =
        before.chunks().iter().copied().take(common).chain((common..chunks).map(new)).collect();
    let bytes = chunks.len() as u64 * 512;
    Prompt::new(chunks, bytes, bytes / 4)
}

fn prompt(chunks: usize) -> Prompt {
    prompt_after(&Prompt::default(), 0, chunks)
}

/// Everybody tells, then everybody hears.
fn exchange(now: Millis, stream: &mut Vec<Vec<u8>>, proxies: &mut [&mut Proxy]) {
    proxies.iter_mut().for_each(|proxy| proxy.tell(now, stream));
    proxies.iter_mut().for_each(|proxy| proxy.hear(now, stream));
}

#[test]
fn loads_of_peers_add_up_and_follow() {
    let (mut a, mut b, mut c, mut stream) =
        (Proxy::new(1, 2), Proxy::new(2, 2), Proxy::new(3, 2), Vec::new());
    let of_b = b.runs(0, 100);
    let mut of_c = c.runs(0, 30);
    exchange(0, &mut stream, &mut [&mut a, &mut b, &mut c]);
    let load = |in_flight, queued_tokens, decode_tokens| Load { in_flight, queued_tokens, decode_tokens };
    assert_eq!(a.worker(0).peers_load(), load(2, 130, 0));
    assert_eq!(a.worker(0).own_load(), Load::default());
    assert_eq!(b.worker(0).peers_load(), load(1, 30, 0), "its own is not counted twice");
    assert_eq!(a.worker(1).peers_load(), Load::default());
    assert_eq!(a.figures.peers.load(Relaxed), 2);
    drop(of_b);
    of_c.first_token();
    let of_a = a.runs(1, 7);
    exchange(50, &mut stream, &mut [&mut a, &mut b, &mut c]);
    assert_eq!(a.worker(0).peers_load(), load(1, 0, 30));
    assert_eq!(c.worker(1).peers_load(), load(1, 7, 0));
    drop((of_c, of_a));
    exchange(100, &mut stream, &mut [&mut a, &mut b, &mut c]);
    for proxy in [&a, &b, &c] {
        assert_eq!([0, 1].map(|at| proxy.worker(at).peers_load()), [Load::default(); 2]);
    }
}

#[test]
fn a_prompt_that_one_has_sent_is_found_by_the_other() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 2), Proxy::new(2, 2), Vec::new());
    let first = prompt(96);
    a.shared.journal.sent(&a.worker(1), &first);
    exchange(0, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!([0, 1].map(|worker| b.depth(worker, &first)), [0, 96]);
    assert_eq!(a.depth(1, &first), 0, "what is its own it is not told");
    let next = prompt_after(&first, 96, 112);
    let told = a.figures.bytes_sent.load(Relaxed);
    a.shared.journal.sent(&a.worker(1), &next);
    a.shared.journal.ended(&a.worker(1), &next, 5);
    exchange(50, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!(b.depth(1, &next), 112);
    let told = a.figures.bytes_sent.load(Relaxed) - told;
    assert!(told < 90, "only what is new is told: {told} bytes");
    assert_eq!(b.shared.index.held(1), 112 + 5);
    assert_eq!((a.figures.events_sent.load(Relaxed), b.figures.events_received.load(Relaxed)), (3, 3));
}
