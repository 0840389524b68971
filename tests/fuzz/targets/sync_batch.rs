//! Batches of other proxies: never a panic, and whatever they say is forgotten when they are not heard any more.

#![no_main]

use std::sync::{Arc, LazyLock, Mutex, PoisonError, atomic::Ordering};

use arc_swap::ArcSwap;
use clap::{Args, Command, FromArgMatches};
use libfuzzer_sys::fuzz_target;
use vllm_proxy::{
    routing::{Journal, Settings, Shared},
    sync::{PEER_MS, Parts, Replica},
    telemetry::metrics::SyncFigures,
    workers::{Fleet, FleetHandle, Load, Worker},
};

struct Proxy {
    replica: Replica,
    fleet: FleetHandle,
    figures: Arc<SyncFigures>,
    now: u64,
}

/// One for all inputs, since its tables are large: so an input also meets what those before it have left.
static PROXY: LazyLock<Mutex<Proxy>> = LazyLock::new(|| {
    let flags = Settings::augment_args(Command::new("fuzz"));
    let matches = flags.get_matches_from(["fuzz", "--prefix-index-bytes=1048576"]);
    let settings = Settings::from_arg_matches(&matches).expect("known flags");
    let (journal, events) = Journal::open(1, 50);
    let worker = |id: usize| Arc::new(Worker::new(id, format!("http://w{id}:1").parse().expect("a URL")));
    let mut fleet = Fleet::default();
    fleet.workers = (0..3).map(worker).collect();
    let fleet: FleetHandle = Arc::new(ArcSwap::from_pointee(fleet));
    let figures = Arc::new(SyncFigures::default());
    let parts = Parts {
        instance: 1,
        events,
        shared: Shared::with_journal(settings, 3, journal),
        fleet: fleet.clone(),
        stored: Arc::default(),
        quota: None,
        figures: figures.clone(),
        stream_bytes: 1 << 20,
    };
    Mutex::new(Proxy { replica: Replica::new(parts), fleet, figures, now: 0 })
});

// Batches, each after a byte that says how long it is in units of 8 bytes, and one that says how old. A first byte of
// 255 stands for the header of a peer, and 254 for that and the names of all workers, so that what follows are records.
fuzz_target!(|data: &[u8]| {
    let mut proxy = PROXY.lock().unwrap_or_else(PoisonError::into_inner);
    let Proxy { replica, fleet, figures, now } = &mut *proxy;
    let mut rest = data;
    while let Some(([length, age], batch)) = rest.split_first_chunk() {
        let (batch, later) = batch.split_at(batch.len().min(usize::from(*length) * 8));
        rest = later;
        *now += 1;
        let mut entry = Vec::new();
        let body = match batch.split_first() {
            Some((first @ (254 | 255), body)) => {
                let instance = u64::from(body.first().copied().unwrap_or_default());
                // flag, instance, and a number that grows
                entry.extend([1, u8::from(instance == 9)]);
                entry.extend(instance.to_le_bytes());
                let number = [*now, *now >> 7, *now >> 14, *now >> 21, *now >> 28];
                entry.extend(number.map(|bits| bits as u8 | 0x80));
                entry.push(0);
                if *first == 254 {
                    for worker in &fleet.load().workers {
                        entry.push(1);
                        entry.extend(worker.key().to_le_bytes());
                    }
                }
                body.get(1..).unwrap_or_default()
            }
            _ => batch,
        };
        entry.extend(body);
        replica.receive(*now, u64::from(*age) * 16, &entry);
        let _composed = replica.compose(*now);
    }
    *now += PEER_MS + 1;
    replica.expire(*now);
    assert_eq!(figures.peers.load(Ordering::Relaxed), 0);
    for worker in &fleet.load().workers {
        assert_eq!(worker.peers_load(), Load::default());
    }
    assert!(replica.stream_entries() >= 128);
});
