use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwap;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    admission::{self, Admission},
    routing::{Journal, MAX_CHUNKS, Prompt, Settings},
    sync::codec::MOST_BYTES,
    workers::{Demand, Fleet, InFlight, Rest, WorkerSpec},
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
        let (journal, events) = Journal::open(100_000, 50);
        let settings = Settings::of_flags(&["--prefix-index-bytes=1048576"]);
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

/// A peer that says what the test wants.
struct Puppet {
    instance: u64,
    sequence: u64,
}

impl Puppet {
    fn new(instance: u64) -> Self {
        Self { instance, sequence: 0 }
    }

    fn says(&mut self, write: impl FnOnce(&mut Writer)) -> Vec<u8> {
        self.sequence += 1;
        let (instance, sequence) = (self.instance, self.sequence);
        let mut batch = Writer::new(Header { begins_anew: false, farewell: false, instance, sequence }, 2000);
        write(&mut batch);
        batch.finish()
    }

    /// That so many requests run on a worker.
    fn runs(&mut self, worker: &Worker, in_flight: u32, state: State, losses: u32) -> Vec<u8> {
        let load = Load { in_flight, ..Load::default() };
        self.says(|batch| assert!(batch.load((0, worker.key()), load, state, losses)))
    }
}

const WELL: State = State { health: Health::Up, rest: None, breaker: BreakerState::Closed };

fn figure(figure: &AtomicU64) -> u64 {
    figure.load(Relaxed)
}

/// Bytes per request of `rounds` batches of 50 requests each, where `next` makes one of a worker's last prompt.
fn bytes_per_request(rounds: u64, next: impl Fn(&Prompt) -> Prompt) -> (u64, u64) {
    let (mut a, mut b, mut stream) = (Proxy::new(u64::MAX, 16), Proxy::new(1, 16), Vec::new());
    let mut last: Vec<Prompt> = (0..50).map(|_| prompt(94)).collect();
    for (at, prompt) in last.iter().enumerate() {
        a.shared.journal.sent(&a.worker(at % 16), prompt);
    }
    exchange(0, &mut stream, &mut [&mut a, &mut b]);
    let (before, mut batches) = (figure(&a.figures.bytes_sent), 0);
    let mut run = Vec::new();
    for round in 1..=rounds {
        for (at, last) in last.iter_mut().enumerate() {
            *last = next(last);
            let worker = a.worker(at % 16);
            run.push(InFlight::begin(worker.clone(), Demand::new(12_000, 6_000)));
            a.shared.journal.sent(&worker, last);
            a.shared.journal.ended(&worker, last, 3);
        }
        let entries = stream.len();
        exchange(round * 50, &mut stream, &mut [&mut a, &mut b]);
        batches += stream.len() - entries;
        run.truncate(100);
        for (at, last) in last.iter().enumerate() {
            assert_eq!(b.depth(at % 16, last) as usize, last.chunks().len(), "round {round}");
        }
    }
    assert!(batches as u64 <= rounds + 2 * (rounds * 50 / HEARTBEAT_MS + 1), "{batches} batches");
    ((figure(&a.figures.bytes_sent) - before).div_ceil(50 * rounds), rounds)
}

#[test]
fn what_a_request_costs_on_the_wire_is_bounded() {
    let (cold, _) = bytes_per_request(20, |_| prompt(94));
    assert!((100..=200).contains(&cold), "cold: {cold} bytes");
    // an answer and another question: six chunks, and what a conversation has in common ends before its last chunk
    let (turn, _) =
        bytes_per_request(20, |last| prompt_after(last, last.chunks().len(), last.chunks().len() + 6));
    assert!((20..=60).contains(&turn), "the next turn: {turn} bytes");
    let (again, _) = bytes_per_request(20, Prompt::clone);
    assert!((15..=40).contains(&again), "the same again: {again} bytes");
    println!("cold {cold}, next turn {turn}, the same again {again} bytes per request");
}

#[test]
fn nothing_new_is_said_twice_a_second_and_all_loads_once() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 3), Proxy::new(2, 3), Vec::new());
    assert!(a.replica.compose(0).is_some_and(|batch| batch.len() > 3 * 15), "it announces itself");
    assert_eq!(a.replica.compose(0), None);
    assert_eq!(a.replica.compose(HEARTBEAT_MS - 1), None);
    let heartbeat = a.replica.compose(HEARTBEAT_MS).unwrap();
    assert!(heartbeat.len() <= 12, "{heartbeat:?}");
    assert_eq!(a.replica.compose(HEARTBEAT_MS), None);
    let running = a.runs(1, 5);
    let changed = a.replica.compose(600).unwrap();
    assert!((20..40).contains(&changed.len()), "only what has changed: {changed:?}");
    // the batch was lost; it heals
    a.tell(FULL_MS, &mut stream);
    b.hear(FULL_MS, &stream);
    assert_eq!(b.worker(1).peers_load().in_flight, 1);
    drop(running);
}

#[test]
fn who_begins_to_read_later_knows_what_is_told_from_then_on() {
    // 64 chunks of text per request: the stream is 64 KiB, and after half of it prompts are told whole again
    let (mut a, mut stream) = (Proxy::with_stream(1, 1, 64 << 10), Vec::new());
    let system = prompt(32);
    let mut last = system.clone();
    for turn in 0..400_u64 {
        last = prompt_after(&system, 32, 64);
        a.shared.journal.sent(&a.worker(0), &last);
        a.tell(turn * 50, &mut stream);
        a.hear(turn * 50, &stream);
    }
    let mut bytes = 0;
    let is_kept = |entry: &&Vec<u8>| {
        bytes += entry.len() as u64 + ENTRY_OVERHEAD;
        bytes <= 64 << 10
    };
    let kept = stream.iter().rev().take_while(is_kept).count();
    assert!((100..399).contains(&kept), "{kept}");
    let mut newcomer = Proxy::with_stream(2, 1, 64 << 10);
    newcomer.read = stream.len() - kept;
    newcomer.hear(30_000, &stream);
    assert_eq!(newcomer.depth(0, &last), 64);
    // it holds just that which the others hold as well, and what it says they understand
    let (all, some) = (a.replica.ancestry.links(), newcomer.replica.ancestry.links());
    let tail = some.iter().filter(|link| link.0 != 0);
    assert!(tail.clone().count() > 8 * kept / 2 && tail.clone().all(|link| all.contains(link)));
    let next = prompt_after(&last, 64, 72);
    newcomer.shared.journal.sent(&newcomer.worker(0), &next);
    newcomer.tell(30_000, &mut stream);
    assert!(stream.last().unwrap().len() < 70, "by its parent");
    a.hear(30_000, &stream);
    assert_eq!(a.depth(0, &next), 72);
}

#[test]
fn when_the_stream_vanished_everything_is_told_anew() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 1), Proxy::new(2, 1), Vec::new());
    let first = prompt(64);
    a.shared.journal.sent(&a.worker(0), &first);
    exchange(0, &mut stream, &mut [&mut a, &mut b]);
    stream.clear();
    (a.read, b.read) = (0, 0);
    a.replica.begin_anew();
    a.shared.journal.sent(&a.worker(0), &first);
    a.tell(1, &mut stream);
    // before its own word has come back it trusts in nothing
    a.shared.journal.sent(&a.worker(0), &first);
    a.tell(2, &mut stream);
    assert!(stream.iter().all(|batch| batch.len() > 64 / 4 * 6), "both are told whole");
    let mut newcomer = Proxy::new(3, 1);
    [&mut a, &mut b, &mut newcomer].into_iter().for_each(|proxy| proxy.hear(3, &stream));
    assert_eq!(newcomer.depth(0, &first), 64);
    for proxy in [&a, &b] {
        assert_eq!(proxy.replica.ancestry.links(), newcomer.replica.ancestry.links());
    }
    a.shared.journal.sent(&a.worker(0), &first);
    a.tell(4, &mut stream);
    assert!(stream.last().unwrap().len() < 40, "now it is known again");
}

#[test]
fn a_batch_that_says_that_all_begins_anew_is_said_again_if_it_was_lost() {
    let (mut a, mut stream) = (Proxy::new(1, 1), Vec::new());
    a.replica.begin_anew();
    assert!(a.replica.compose(0).is_some());
    a.tell(HEARTBEAT_MS, &mut stream);
    a.hear(HEARTBEAT_MS, &stream);
    assert_eq!(a.replica.anew, Anew::Due);
    assert!(a.replica.compose(HEARTBEAT_MS + 1).is_some_and(|batch| batch[1] == 1), "it is no heartbeat yet");
    assert_eq!(a.replica.compose(HEARTBEAT_MS + 1), None, "once is enough");
}

#[test]
fn who_is_not_heard_any_more_has_nothing_running() {
    let (mut a, mut b, mut c, mut stream) =
        (Proxy::new(1, 1), Proxy::new(2, 1), Proxy::new(3, 1), Vec::new());
    let _running = (b.runs(0, 1), c.runs(0, 1));
    exchange(0, &mut stream, &mut [&mut a, &mut b, &mut c]);
    exchange(1000, &mut stream, &mut [&mut a, &mut c]);
    a.replica.expire(PEER_MS);
    assert_eq!(a.worker(0).peers_load().in_flight, 2);
    a.replica.expire(PEER_MS + 1);
    assert_eq!((a.worker(0).peers_load().in_flight, figure(&a.figures.peers)), (1, 1));
    stream.push(c.replica.farewell());
    a.hear(PEER_MS + 1, &stream);
    assert_eq!((a.worker(0).peers_load(), figure(&a.figures.peers)), (Load::default(), 0));
    exchange(PEER_MS + 2, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!(a.worker(0).peers_load().in_flight, 1, "it was only slow");
}

#[test]
fn a_cache_that_one_saw_lost_is_lost_for_all_once() {
    let mut stream = Vec::new();
    let mut proxies = [Proxy::new(1, 2), Proxy::new(2, 2), Proxy::new(3, 2)];
    let round = |now, stream: &mut Vec<_>, proxies: &mut [Proxy; 3]| {
        exchange(now, stream, &mut proxies.each_mut());
        proxies.each_ref().map(|proxy| proxy.worker(1).cache_generation())
    };
    proxies[0].worker(1).cache_lost();
    assert_eq!(round(0, &mut stream, &mut proxies), [1, 0, 0], "what was before it was heard says nothing");
    proxies[0].worker(1).cache_lost();
    assert_eq!(round(50, &mut stream, &mut proxies), [2, 1, 1]);
    for now in 2..60 {
        assert_eq!(round(now * 50, &mut stream, &mut proxies), [2, 1, 1], "it is not told on");
    }
    proxies[2].worker(1).cache_lost();
    proxies[1].worker(1).cache_lost();
    assert_eq!(round(3000, &mut stream, &mut proxies), [4, 3, 3]);
    assert_eq!(round(3050, &mut stream, &mut proxies), [4, 3, 3]);
    assert!(proxies.iter().all(|proxy| proxy.worker(0).cache_generation() == 0));
}

#[test]
fn what_was_sent_before_a_cache_was_lost_is_not_there_for_a_newcomer() {
    let (mut a, mut stream) = (Proxy::new(1, 2), Vec::new());
    let (before, after) = (prompt(16), prompt(16));
    a.shared.journal.sent(&a.worker(1), &before);
    a.tell(0, &mut stream);
    a.worker(1).cache_lost();
    a.tell(1, &mut stream);
    a.shared.journal.sent(&a.worker(1), &after);
    a.tell(2, &mut stream);
    let mut newcomer = Proxy::new(2, 2);
    for _ in 0..2 {
        stream.iter().for_each(|entry| newcomer.replica.receive(60_000, 60_000, entry));
        newcomer.replica.expire(60_000);
        assert_eq!([newcomer.depth(1, &before), newcomer.depth(1, &after)], [0, 16]);
        assert_eq!(newcomer.worker(1).cache_generation(), 1, "once, however often it is read");
        assert_eq!(figure(&newcomer.figures.events_received), 2);
    }
    // who was not heard for a while may tell then what it saw meanwhile
    a.worker(1).cache_lost();
    a.tell(FULL_MS, &mut stream);
    newcomer.replica.receive(120_000, 0, stream.last().unwrap());
    assert_eq!(newcomer.worker(1).cache_generation(), 2);
}

#[test]
fn ranks_of_a_server_lose_their_caches_together_and_once() {
    const WORKER: &str = "http://a:1";
    let ranks = || {
        let rank = |at| WorkerSpec { rank: Some(at), ..WORKER.parse().unwrap() };
        let first = Worker::new(0, rank(0));
        let second = first.sibling(1, rank(1));
        let mut fleet = Fleet::default();
        fleet.workers = vec![Arc::new(first), Arc::new(second)];
        fleet
    };
    let (mut a, mut b, mut stream) = (Proxy::new(1, 2), Proxy::new(2, 2), Vec::new());
    [&a, &b].iter().for_each(|proxy| proxy.fleet.store(Arc::new(ranks())));
    exchange(0, &mut stream, &mut [&mut a, &mut b]);
    a.worker(1).cache_lost();
    for now in 1..50 {
        exchange(now * 50, &mut stream, &mut [&mut a, &mut b]);
        let generations = [&a, &b].map(|proxy| proxy.worker(0).cache_generation());
        assert_eq!(generations, [1, 1], "they do not tell each other for ever");
    }
}

#[test]
fn what_was_added_long_ago_says_nothing_of_now_but_of_prompts() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 1), Proxy::new(2, 1), Vec::new());
    let sent = prompt(16);
    let _running = a.runs(0, 1);
    a.shared.journal.sent(&a.worker(0), &sent);
    a.tell(0, &mut stream);
    b.replica.receive(0, PEER_MS + 1, &stream[0]);
    assert_eq!((b.worker(0).peers_load(), figure(&b.figures.peers)), (Load::default(), 0));
    assert_eq!(b.depth(0, &sent), 16);
    a.tell(10_000, &mut stream);
    b.replica.receive(10_000, PEER_MS, &stream[1]);
    assert_eq!((b.worker(0).peers_load().in_flight, figure(&b.figures.peers)), (1, 1));
    b.replica.expire(10_001);
    assert_eq!(figure(&b.figures.peers), 0, "that was all but too old");
}

#[test]
fn a_batch_that_comes_twice_or_late_does_not_count() {
    let (mut a, mut b) = (Proxy::new(1, 1), Puppet::new(2));
    let worker = a.worker(0);
    let batches = [3, 1].map(|in_flight| b.runs(&worker, in_flight, WELL, 0));
    for at in [0, 1, 0, 1, 0] {
        a.replica.receive(0, 0, &batches[at]);
    }
    assert_eq!(a.worker(0).peers_load().in_flight, 1);
    // for the life of a peer at most, should its number have been wrong
    let wrong = Puppet { instance: 2, sequence: u64::MAX - 1 }.runs(&worker, 9, WELL, 0);
    a.replica.receive(0, 0, &wrong);
    a.replica.receive(PEER_MS, 0, &b.runs(&worker, 2, WELL, 0));
    assert_eq!(a.worker(0).peers_load().in_flight, 9);
    a.replica.expire(PEER_MS + 1);
    a.replica.receive(PEER_MS + 1, 0, &b.runs(&worker, 2, WELL, 0));
    assert_eq!(a.worker(0).peers_load().in_flight, 2);
}

#[test]
fn what_cannot_be_read_is_counted_and_what_is_before_it_counts() {
    let mut a = Proxy::new(1, 1);
    let good = Puppet::new(2).runs(&a.worker(0), 3, WELL, 0);
    let skipped =
        |proxy: &Proxy| (figure(&proxy.figures.skipped_version), figure(&proxy.figures.skipped_malformed));
    let newer = [&[2], &good[1..]].concat();
    a.replica.receive(0, 0, &newer);
    assert_eq!((skipped(&a), figure(&a.figures.peers)), ((1, 0), 0));
    a.replica.receive(0, 0, b"");
    a.replica.receive(0, 0, &good[..5]);
    a.replica.receive(0, 0, &[&good[..], &vec![0; MOST_BYTES]].concat());
    assert_eq!((skipped(&a), figure(&a.figures.peers)), ((1, 3), 0));
    a.replica.receive(0, 0, &[&good[..], &[99, 1, 2]].concat());
    assert_eq!((skipped(&a), a.worker(0).peers_load().in_flight), ((1, 4), 3));
}

#[test]
fn workers_that_are_not_ours_are_skipped_and_their_prompts_are_known() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 3), Proxy::new(2, 1), Vec::new());
    let (sent, _running) = (prompt(32), a.runs(2, 1));
    a.shared.journal.sent(&a.worker(2), &sent);
    a.shared.journal.ended(&a.worker(2), &sent, 1);
    a.shared.journal.stored(&a.worker(2), 1);
    exchange(0, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!((b.depth(0, &sent), b.worker(0).peers_load()), (0, Load::default()));
    assert_eq!(a.replica.ancestry.links(), b.replica.ancestry.links());
    // what one does not know the other may still speak of
    a.shared.journal.sent(&a.worker(0), &sent);
    exchange(50, &mut stream, &mut [&mut a, &mut b]);
    assert!(stream.iter().rev().any(|batch| batch.len() < 40));
    assert_eq!(b.depth(0, &sent), 32);
}

#[test]
fn a_peer_that_has_counted_below_zero_keeps_nobody_away() {
    let mut a = Proxy::new(1, 1);
    let (worker, mut peer) = (a.worker(0), Puppet::new(2));
    let mut tells = |load| {
        let batch = peer.says(|batch| assert!(batch.load((0, worker.key()), load, WELL, 0)));
        a.replica.receive(0, 0, &batch);
        worker.peers_load()
    };
    let load = |in_flight, queued_tokens, decode_tokens| Load { in_flight, queued_tokens, decode_tokens };
    assert_eq!(tells(load(u32::MAX, u64::MAX - 900, 5)), load(0, 0, 5));
    assert_eq!(tells(load(2, 7, u64::MAX)), load(2, 7, 0));
    assert_eq!(tells(load(1 << 20, 1 << 40, 1 << 40)), load(1 << 20, 1 << 40, 1 << 40));
}

#[test]
fn who_names_none_of_our_workers_is_no_peer() {
    let mut a = Proxy::new(1, 1);
    let (ours, theirs) = (a.worker(0).key(), 0xdead);
    let mut other = Puppet::new(2);
    let mut peers_after = |keys: &[u64]| {
        let load = Load { in_flight: 3, ..Load::default() };
        let batch = other.says(|batch| {
            keys.iter().enumerate().for_each(|(at, &key)| assert!(batch.load((at, key), load, WELL, 0)));
        });
        a.replica.receive(0, 0, &batch);
        figure(&a.figures.peers)
    };
    assert_eq!(peers_after(&[]), 1, "it may yet name some");
    assert_eq!(peers_after(&[theirs]), 0);
    assert_eq!(peers_after(&[]), 0);
    assert_eq!(peers_after(&[theirs, ours]), 1);
    assert_eq!(peers_after(&[theirs]), 1, "of ours nothing has changed");
}

#[test]
fn only_so_many_peers_are_heard() {
    let mut a = Proxy::new(1, 1);
    let worker = a.worker(0);
    for instance in 2..2000 {
        a.replica.receive(0, 0, &Puppet::new(instance).runs(&worker, 1, WELL, 0));
    }
    assert_eq!((figure(&a.figures.peers), a.worker(0).peers_load().in_flight), (1024, 1024));
    a.replica.expire(PEER_MS + 1);
    assert_eq!((figure(&a.figures.peers), a.worker(0).peers_load()), (0, Load::default()));
    a.replica.receive(PEER_MS + 1, 0, &Puppet::new(1999).runs(&worker, 1, WELL, 0));
    assert_eq!(a.worker(0).peers_load().in_flight, 1);
}

#[test]
fn the_largest_prompts_and_many_of_them_are_told_in_several_batches() {
    // more workers than have room in one batch beside a prompt
    let (mut a, mut b, mut stream) = (Proxy::new(1, 1500), Proxy::new(2, 1500), Vec::new());
    let giants = [(); 3].map(|()| prompt(MAX_CHUNKS));
    let _running: Vec<_> = (0..1500).map(|worker| a.runs(worker, 7)).collect();
    for giant in &giants {
        a.shared.journal.sent(&a.worker(0), giant);
    }
    a.tell(0, &mut stream);
    assert!((3..8).contains(&stream.len()), "{}", stream.len());
    assert!(stream.iter().all(|batch| batch.len() <= MOST_BYTES));
    assert_eq!(figure(&a.figures.events_sent), 3);
    [&mut a, &mut b].into_iter().for_each(|proxy| proxy.hear(0, &stream));
    assert!((0..1500).all(|worker| b.worker(worker).peers_load().queued_tokens == 7));
    assert_eq!(figure(&b.figures.skipped_malformed), 0);
    a.shared.journal.sent(&a.worker(1), &giants[2]);
    a.tell(1, &mut stream);
    assert!(stream.last().unwrap().len() < 40);
    b.hear(1, &stream);
    // room in the index ends it before that
    assert!(b.depth(1, &giants[2]) > 1000, "{}", b.depth(1, &giants[2]));
}

#[test]
fn a_parent_that_is_unknown_makes_no_match_and_heals() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 1), Proxy::new(2, 1), Vec::new());
    let first = prompt(16);
    a.shared.journal.sent(&a.worker(0), &first);
    a.tell(0, &mut stream);
    // b has missed that
    a.hear(0, &stream);
    b.read = stream.len();
    let next = prompt_after(&first, 16, 32);
    a.shared.journal.sent(&a.worker(0), &next);
    exchange(1, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!((b.depth(0, &next), b.shared.index.held(0)), (0, 0), "nothing is put that cannot be found");
    b.replica.receive(2, 0, &stream[0]);
    a.shared.journal.sent(&a.worker(0), &next);
    exchange(3, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!(b.depth(0, &next), 32);
}

#[test]
fn loops_of_parents_end() {
    let mut a = Proxy::new(1, 1);
    let (worker, density) = (a.worker(0), Density { quarter_bytes: 16, tail: 4 });
    let mut peer = Puppet::new(2);
    let batch = peer.says(|batch| {
        let at = (0, worker.key());
        assert!(batch.sent(at, density, Some(7), &[5, 6, 7]));
        assert!(batch.sent(at, density, Some(8), &[8]));
        assert!(batch.sent(at, density, Some(7), &[]) && batch.ended(at, density, 8, 1));
    });
    a.replica.receive(0, 0, &batch);
    assert_eq!(figure(&a.figures.events_received), 4);
    assert_eq!(a.shared.index.held(0), 1, "but for what was generated");
    assert_eq!(a.replica.links_left, MOST_LINKS - 4 * MOST_CHUNKS);
    // and so they do where one batch follows them again and again, also those that have an end
    let known = peer.says(|batch| assert!(batch.sent((0, worker.key()), density, None, &[30, 31, 32])));
    a.replica.receive(1, 0, &known);
    let hostile = peer.says(|batch| {
        let at = (0, worker.key());
        assert!(batch.sent(at, density, Some(32), &[]) && batch.ended(at, density, 32, 0));
        while batch.ended(at, density, 8, 0) {}
    });
    a.replica.receive(2, 0, &hostile);
    assert_eq!((a.replica.links_left, a.depth(0, &Prompt::new(vec![1, 1, 1, 30], 2048, 512))), (0, 4));
}

#[test]
fn what_a_peer_thinks_worse_of_is_looked_at_once() {
    let mut a = Proxy::new(1, 1);
    let (worker, mut peer) = (a.worker(0), Puppet::new(2));
    worker.set_health(Health::Up);
    let down = State { health: Health::Down, ..WELL };
    let asleep = State { rest: Some(Rest::Asleep), ..WELL };
    let paused = State { rest: Some(Rest::Paused), ..WELL };
    let open = State { breaker: BreakerState::Open, ..WELL };
    let ejected = State { health: Health::Ejected, breaker: BreakerState::HalfOpen, ..WELL };
    for (at, (state, doubted)) in [
        (WELL, false),
        (ejected, false),
        (down, true),
        (down, false),
        (WELL, false),
        (asleep, true),
        (asleep, false),
        (paused, true),
        (open, true),
        (open, false),
        (down, true),
    ]
    .into_iter()
    .enumerate()
    {
        a.replica.receive(at as u64 * 10, 0, &peer.runs(&worker, 0, state, 0));
        assert_eq!(worker.take_doubt(), doubted, "{at}: {state:?}");
        worker.settle_doubt();
    }
    assert!(worker.is_set_back(80 + SET_BACK_MS - 1) && !worker.is_set_back(80 + SET_BACK_MS));
    assert!(worker.usable() && !worker.rests(), "hearsay takes nobody out");
    worker.set_health(Health::Down);
    a.replica.receive(200, 0, &Puppet::new(3).runs(&worker, 0, down, 0));
    assert!(!worker.take_doubt(), "that is no news");
}

#[test]
fn a_fleet_that_changes_keeps_what_is_known_of_those_that_stay() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 3), Proxy::new(2, 3), Vec::new());
    let _running = [1, 1, 2].map(|worker| b.runs(worker, 10));
    exchange(0, &mut stream, &mut [&mut a, &mut b]);
    let old = a.fleet.load_full();
    old.workers[2].cache_lost();
    let mut fleet = Fleet::default();
    let newcomer = Arc::new(Worker::new(9, "http://new:1".parse().unwrap()));
    fleet.workers = vec![newcomer, old.workers[2].clone(), old.workers[1].clone()];
    a.fleet.store(Arc::new(fleet));
    old.workers[0].set_peers_load(Load { in_flight: 5, ..Load::default() });
    a.replica.expire(1);
    let loads = a.fleet.load().workers.iter().map(|worker| worker.peers_load().in_flight).collect::<Vec<_>>();
    assert_eq!(loads, [0, 1, 2]);
    assert_eq!(old.workers[0].peers_load(), Load::default(), "of who has left nothing is heard any more");
    exchange(50, &mut stream, &mut [&mut a, &mut b]);
    assert_eq!(b.worker(2).cache_generation(), 1, "the loss is still its own");
    b.replica.expire(PEER_MS + 51);
    a.replica.expire(PEER_MS + 51);
    assert!(a.fleet.load().workers.iter().all(|worker| worker.peers_load() == Load::default()));
    // what was written of a worker that is gone concerns nobody
    a.shared.journal.stored(&old.workers[0], 1);
    let told = a.replica.compose(5000).unwrap();
    b.replica.receive(5000, 0, &told);
    assert_eq!(figure(&b.figures.events_received), 0);
}

#[test]
fn peers_say_what_they_claim_of_the_common_limit() {
    let (mut a, mut claims) = (Proxy::new(1, 1), Vec::new());
    let claim = |held| Claim { held, wanted: 9 };
    let mut peers = [Puppet::new(2), Puppet::new(3), Puppet::new(4)];
    for (peer, held) in peers.iter_mut().zip([Some(7), Some(u32::MAX), None]) {
        let batch = peer.says(|batch| held.into_iter().for_each(|held| batch.slots(claim(held))));
        a.replica.receive(0, 0, &batch);
    }
    a.replica.peers.claims(&mut claims);
    claims.sort_unstable_by_key(|peer| peer.0);
    assert_eq!(claims, [(2, claim(7)), (3, claim(u32::MAX))]);
    a.replica.receive(2000, 0, &peers[0].says(|batch| batch.slots(claim(8))));
    a.replica.expire(PEER_MS + 1);
    a.replica.peers.claims(&mut claims);
    assert_eq!(claims, [(2, claim(8))]);
}

/// Gives it slots of a common limit of 100.
fn with_slots(proxy: &mut Proxy) -> Arc<Admission> {
    let settings = admission::Settings {
        max_concurrent_requests: 0,
        fleet_max_concurrent_requests: 100,
        queue_size: 100,
        queue_timeout_secs: 1,
        rate_limit_tokens_per_second: 0.0,
        queue_fairness_header: String::new(),
        body_memory_bytes: 0,
    };
    let admission = Arc::new(Admission::new(&settings, |_| {}));
    proxy.replica.parts.quota = Some(Arc::new(Quota::new(100, admission.clone())));
    admission
}

#[test]
fn a_common_limit_is_divided_by_what_is_told_and_kept_while_nothing_is_heard() {
    let (mut a, mut b, mut stream) = (Proxy::new(1, 1), Proxy::new(2, 1), Vec::new());
    let slots = [with_slots(&mut a), with_slots(&mut b)];
    let parts = || [0, 1].map(|at: usize| slots[at].slots().unwrap());
    assert_eq!(parts(), [100, 100], "nobody has heard of anybody");
    let mut now = 0;
    let mut rounds = |a: &mut Proxy, b: &mut Proxy, count: u64| {
        for _ in 0..count {
            now += 50;
            exchange(now, &mut stream, &mut [a, b]);
            a.replica.expire(now);
            b.replica.expire(now);
        }
    };
    rounds(&mut a, &mut b, 5);
    assert_eq!(parts(), [50, 50]);
    let running: Vec<_> = (0..50).map(|_| slots[0].try_enter().expect("a slot")).collect();
    rounds(&mut a, &mut b, 5);
    assert_eq!(parts(), [75, 25], "what nobody wants is for both");
    // Redis is gone for both, and with it the peer
    for proxy in [&a, &b] {
        proxy.shared.journal.set_alone(true);
    }
    for silent in (0..2 * PEER_MS).step_by(250) {
        a.replica.expire(10_000 + silent);
        b.replica.expire(10_000 + silent);
    }
    assert_eq!((figure(&a.figures.peers), parts()), (0, [75, 25]));
    drop(running);
}

#[test]
fn the_stream_is_as_long_as_its_bytes_allow() {
    let mut a = Proxy::with_stream(1, 1, 100_000_000);
    assert!((50_000..100_000).contains(&a.replica.stream_entries()), "before any was seen");
    (0..5000).for_each(|_| a.replica.receive(0, 0, &[2; 900]));
    assert!((99_000..101_000).contains(&a.replica.stream_entries()), "{}", a.replica.stream_entries());
    assert!(
        (49_900_000..=50_000_000).contains(&a.replica.known_bytes()),
        "what everybody knows is half of it"
    );
    (0..5000).for_each(|_| a.replica.receive(0, 0, &[2; 0]));
    assert!((900_000..=1_000_000).contains(&a.replica.stream_entries()));
    let mut small = Proxy::with_stream(1, 1, 0);
    assert_eq!((small.replica.stream_entries(), small.replica.known_bytes()), (128, 0));
    let mut busy = Proxy::with_stream(1, 1, 16 << 20);
    (0..5000).for_each(|_| busy.replica.receive(0, 0, &[2; 60_000]));
    let bytes = busy.replica.stream_entries() * 60_000;
    assert!((15 << 20..=16 << 20).contains(&bytes), "also where batches are large: {bytes}");
    small.replica.receive(0, 0, &[2; 60_000]);
    assert_eq!(Proxy::with_stream(1, 1, u64::MAX).replica.stream_entries(), 1_000_000);
}

/// What happens in a random run.
#[derive(Debug, Clone)]
enum Act {
    /// A proxy sends a prompt that has something in common with an earlier one.
    Send { by: usize, like: usize, common: usize, more: usize },
    /// A proxy tells.
    Tell(usize),
    /// A proxy hears so many entries.
    Hear(usize, usize),
    /// The stream vanishes for one of them.
    Anew(usize),
    /// Somebody writes nonsense into it.
    Nonsense(Vec<u8>),
}

fn act() -> impl Strategy<Value = Act> {
    let by = || 0..3_usize;
    prop_oneof![
        6 => (by(), any::<usize>(), 0..80_usize, 1..60_usize)
            .prop_map(|(by, like, common, more)| Act::Send { by, like, common, more }),
        4 => by().prop_map(Act::Tell),
        6 => (by(), 1..5_usize).prop_map(|(by, entries)| Act::Hear(by, entries)),
        1 => by().prop_map(Act::Anew),
        1 => vec(any::<u8>(), 0..60).prop_map(|mut bytes| {
            bytes.splice(0..0, [1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1]);
            Act::Nonsense(bytes)
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn who_has_read_the_same_knows_the_same(acts in vec(act(), 1..120)) {
        let mut proxies = [1, 2, 3].map(|instance| Proxy::with_stream(instance, 2, 20_000));
        let (mut stream, mut prompts) = (Vec::new(), vec![Prompt::default()]);
        for (now, act) in acts.into_iter().enumerate() {
            let now = now as u64 * 7;
            match act {
                Act::Send { by, like, common, more } => {
                    let like = &prompts[like % prompts.len()];
                    let common = common.min(like.chunks().len());
                    let prompt = prompt_after(like, common, common + more);
                    let proxy = &proxies[by];
                    proxy.shared.journal.sent(&proxy.worker(common % 2), &prompt);
                    prompts.push(prompt);
                }
                Act::Tell(by) => proxies[by].tell(now, &mut stream),
                Act::Hear(by, entries) => {
                    let proxy = &mut proxies[by];
                    let end = (proxy.read + entries).min(stream.len());
                    proxy.hear(now, &stream[..end]);
                }
                Act::Anew(by) => proxies[by].replica.begin_anew(),
                Act::Nonsense(bytes) => stream.push(bytes),
            }
        }
        let [a, b, c] = &mut proxies;
        // what they still have to say is understood by all
        exchange(10_000, &mut stream, &mut [a, b, c]);
        let links = [a, b, c].map(|proxy| proxy.replica.ancestry.links());
        prop_assert!(links[0] == links[1] && links[1] == links[2]);
    }

    #[test]
    fn any_bytes_are_survived(
        entries in vec((any::<u8>(), 0..5_u64, vec(any::<u8>(), 0..200)), 0..200),
    ) {
        let mut a = Proxy::new(1, 2);
        for (flags, instance, bytes) in entries {
            let header = [&[1, flags][..], &instance.to_le_bytes(), &[instance as u8]].concat();
            a.replica.receive(0, 0, &[&header[..], &bytes].concat());
            a.replica.receive(0, 0, &bytes);
        }
        prop_assert!(a.replica.peers.len() <= 1024);
        a.replica.expire(PEER_MS + 1);
        prop_assert_eq!([0, 1].map(|at| a.worker(at).peers_load()), [Load::default(); 2]);
    }
}
