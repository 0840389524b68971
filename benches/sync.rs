//! What telling other proxies costs the thread that does it: composing, reading, taking in.
//!
//! The goal is 2 µs per event and proxy: then 5,000 requests a second, whoever has them, are 2 % of a core in each
//! proxy. Most of what hearing takes are misses of the processor's caches: the links of a prompt lie anywhere in
//! their table, and so do its chunks in the index.

mod cpu_time;

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use clap::{Args, Command, FromArgMatches};
use cpu_time::CpuTime;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vllm_proxy::{
    routing::{Journal, Prompt, Settings, Shared},
    sync::{Parts, Replica},
    workers::{Demand, Fleet, FleetHandle, InFlight, Worker},
};

const WORKERS: usize = 16;

/// Requests of a batch: an interval's at 1,000 a second.
const REQUESTS: usize = 50;

/// Conversations that are going on.
const CONVERSATIONS: usize = 4000;

/// A proxy without sockets.
struct Proxy {
    replica: Replica,
    shared: Shared,
    fleet: FleetHandle,
}

impl Proxy {
    fn new(instance: u64) -> Self {
        let flags = Settings::augment_args(Command::new("bench"));
        let settings = Settings::from_arg_matches(&flags.get_matches_from(["bench"])).expect("defaults");
        let (journal, events) = Journal::open(65_536, 50);
        let shared = Shared::with_journal(settings, WORKERS, journal);
        let worker = |id| Arc::new(Worker::new(id, format!("http://w{id}:1").parse().expect("a URL")));
        let mut fleet = Fleet::default();
        fleet.workers = (0..WORKERS).map(worker).collect();
        let fleet: FleetHandle = Arc::new(ArcSwap::from_pointee(fleet));
        let parts = Parts {
            instance,
            events,
            shared: shared.clone(),
            fleet: fleet.clone(),
            stored: Arc::default(),
            quota: None,
            figures: Arc::default(),
            stream_bytes: 64 << 20,
        };
        Self { replica: Replica::new(parts), shared, fleet }
    }

    fn worker(&self, at: usize) -> Arc<Worker> {
        self.fleet.load().workers[at % WORKERS].clone()
    }
}

/// Numbers that nothing else has.
#[derive(Default)]
struct Fresh(u64);

impl Fresh {
    /// A prompt of `chunks` chunks, the first `common` of them those of `before`.
    fn prompt(&mut self, before: &Prompt, common: usize, chunks: usize) -> Prompt {
        let mut new = || {
            self.0 += 1;
            self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
        };
        let mut all: Vec<u64> = before.chunks().iter().copied().take(common).collect();
        all.resize_with(chunks, &mut new);
        let bytes = chunks as u64 * 512;
        Prompt::new(all, bytes, bytes / 4)
    }
}

/// What do 50 requests of 12,000 tokens cost who tells of them (with its echo), and who hears of them? Each is two
/// events. `cold`: nothing is known of them; `turn`: all but the last tenth is, and their tables are not in the
/// processor's cache.
fn telling(c: &mut Criterion<CpuTime>) {
    for (name, common) in [("cold", 0), ("turn", 84)] {
        let (mut a, mut b, mut fresh, mut now) = (Proxy::new(1), Proxy::new(2), Fresh::default(), 0);
        let mut prompts: Vec<Prompt> =
            (0..CONVERSATIONS).map(|_| fresh.prompt(&Prompt::default(), 0, 94)).collect();
        // the time of one or the other of both sides
        let mut round = |from: usize, tells: bool| -> Duration {
            now += 50;
            let mut running = Vec::new();
            for at in 0..REQUESTS {
                let worker = a.worker(at);
                // far from the one before
                let prompt = &mut prompts[(from * REQUESTS + at).wrapping_mul(1_000_003) % CONVERSATIONS];
                *prompt = fresh.prompt(prompt, common, 94);
                a.shared.journal.sent(&worker, prompt);
                a.shared.journal.ended(&worker, prompt, 3);
                running.push(InFlight::begin(worker, Demand::new(12_000, 6_000)));
            }
            let start = cpu_time::now();
            let batches: Vec<Vec<u8>> = std::iter::from_fn(|| a.replica.compose(now)).collect();
            batches.iter().for_each(|batch| a.replica.receive(now, 1, batch));
            let told = cpu_time::now() - start;
            let start = cpu_time::now();
            batches.iter().for_each(|batch| b.replica.receive(now, 1, batch));
            let heard = cpu_time::now() - start;
            if tells { told } else { heard }
        };
        (0..2 * CONVERSATIONS / REQUESTS).for_each(|from| {
            round(from, true);
        });
        let mut group = c.benchmark_group("sync");
        group.throughput(Throughput::Elements(2 * REQUESTS as u64));
        for (side, tells) in [("tell", true), ("hear", false)] {
            group.bench_function(format!("{side}_{name}/50x12k"), |b| {
                b.iter_custom(|times| (0..times).map(|from| round(from as usize, tells)).sum());
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = telling
}
criterion_main!(benches);
