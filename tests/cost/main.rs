//! What an exchange may cost, counted and not timed, so that it says the same on every machine: a guard against
//! what creeps in.
//!
//! Three things are counted, each for a small JSON exchange, for one with a
//! long prompt and for one event of a stream: allocations on the shard's
//! thread, with the proxy in this process; system calls of that thread, by `strace` around the binary; and, of a
//! release build only, instructions, by `valgrind` around it: `cargo test --release --test cost`. One client, one
//! worker, one exchange at a time, and who is to speak next waits until the shard sleeps ([`scene`]): so every
//! exchange goes the longest way, and the same one. Probes are as good as off, and what the shard does every 100 ms is
//! little beside hundreds of exchanges ([`What::tolerance`]).
//!
//! `cargo test --test cost -- --nocapture` shows what everything costs now. Who makes it cheaper lowers the limit.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test may stop at once, read the clock and say what it has counted"
)]

#[path = "../support/mod.rs"]
#[expect(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "the harness of all tests, of which these need a part"
)]
mod support;

/// Counts allocations of a thread.
mod allocations;
/// The binary below a program that counts.
mod counted;
/// A client and a worker that take turns.
mod scene;

use std::sync::{Mutex, MutexGuard, PoisonError};

use counted::{Callgrind, Profile, Strace};
use scene::{Case, QUIET, Scene, Thread};
use support::{Io, Variant, proxy, variants::kernel_grants_uring};

/// A limit.
struct Budget {
    what: What,
    case: Case,
    io: Io,
    /// What an exchange or an event may take of it.
    most: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// On the shard's thread, what is made larger included.
    Allocations,
    /// Of the shard's thread.
    SystemCalls,
    /// What these tell an io_uring to do.
    Submissions,
    /// Of the shard's thread in user space, in a release build.
    Instructions,
}

impl What {
    /// How far the mean may be from what an exchange takes, besides what it does for itself.
    fn tolerance(self) -> f64 {
        match self {
            // a buffer that grows once
            What::Allocations => 0.1,
            // a tick every 100 ms; half an exchange's worth where these are as slow as 50 ms
            What::SystemCalls | What::Submissions => 0.5,
            What::Instructions => 0.0,
        }
    }
}

/// All limits. Those of whole numbers are what it is today: one more fails. Instructions have 5 % above today's, for
/// other compilers and processors. What takes more than that is to be looked at, and only then the limit to be raised,
/// with the reason in the commit.
#[rustfmt::skip]
const BUDGETS: &[Budget] = &[
    Budget { what: What::Allocations,  case: Case::Json,  io: Io::Uring, most: 4.0 },
    Budget { what: What::Allocations,  case: Case::Json,  io: Io::Epoll, most: 4.0 },
    Budget { what: What::Allocations,  case: Case::Long,  io: Io::Uring, most: 5.0 },
    Budget { what: What::Allocations,  case: Case::Long,  io: Io::Epoll, most: 5.0 },
    Budget { what: What::Allocations,  case: Case::Event, io: Io::Uring, most: 0.0 },
    Budget { what: What::Allocations,  case: Case::Event, io: Io::Epoll, most: 0.0 },
    Budget { what: What::SystemCalls,  case: Case::Json,  io: Io::Uring, most: 4.0 },
    Budget { what: What::SystemCalls,  case: Case::Json,  io: Io::Epoll, most: 8.0 },
    Budget { what: What::SystemCalls,  case: Case::Long,  io: Io::Uring, most: 5.0 },
    Budget { what: What::SystemCalls,  case: Case::Long,  io: Io::Epoll, most: 9.0 },
    Budget { what: What::SystemCalls,  case: Case::Event, io: Io::Uring, most: 2.0 },
    Budget { what: What::SystemCalls,  case: Case::Event, io: Io::Epoll, most: 4.0 },
    Budget { what: What::Submissions,  case: Case::Json,  io: Io::Uring, most: 4.0 },
    Budget { what: What::Submissions,  case: Case::Long,  io: Io::Uring, most: 5.0 },
    Budget { what: What::Submissions,  case: Case::Event, io: Io::Uring, most: 2.0 },
    Budget { what: What::Instructions, case: Case::Json,  io: Io::Epoll, most: 25_000.0 },
    Budget { what: What::Instructions, case: Case::Long,  io: Io::Epoll, most: 73_000.0 },
    Budget { what: What::Instructions, case: Case::Event, io: Io::Epoll, most: 3_500.0 },
];

/// Exchanges or events that are counted.
const TIMES: usize = 200;

/// Fails if `count`, of [`TIMES`], is beyond its limit, and says where it was seen; in any case says both.
#[track_caller]
fn judge(what: What, case: Case, io: Io, count: u64, seen: impl FnOnce(f64) -> String) {
    let row = BUDGETS.iter().find(|row| (row.what, row.case, row.io) == (what, case, io));
    let (most, mean) = (row.expect("it has a limit").most, count as f64 / TIMES as f64);
    let line = format!("{what:?} per {case:?} on {io:?}: {mean}, allowed {most}");
    eprintln!("{line}");
    assert!(mean <= most + what.tolerance(), "{line} in BUDGETS of tests/cost/main.rs.{}", seen(mean));
}

fn allocations_fit(case: Case, io: Io) {
    let _alone = alone();
    let scene = Scene::new();
    let builder = proxy(Variant { io, shards: 1 }).worker(scene.worker());
    let builder = QUIET.iter().fold(builder, |builder, (name, value)| builder.arg(name, value));
    let proxy = builder.fault(|_| allocations::count_this_thread()).start();
    let shard = Thread::shard_of_process(std::process::id());
    let [before, after] = scene.play(proxy.addr(), shard, case, TIMES, allocations::count);
    judge(What::Allocations, case, io, after - before, |_| String::new());
}

fn system_calls_fit(case: Case, io: Io) {
    let _alone = alone();
    let scene = Scene::new();
    let strace = Strace::start(io, &scene);
    let [before, after] = scene.play(strace.addr, strace.shard, case, TIMES, || strace.calls());
    let calls = &after[before.len()..];
    let seen =
        |mean: f64| format!(" The last ones:\n{}", calls[calls.len() - mean.ceil() as usize..].join("\n"));
    judge(What::SystemCalls, case, io, calls.len() as u64, seen);
    if io == Io::Uring {
        let submitted = calls.iter().filter_map(|call| counted::submitted(call)).sum();
        judge(What::Submissions, case, io, submitted, seen);
    }
}

/// What many take more than few, since the start takes some, too. The shard is the thread that makes the difference.
fn instructions_fit(case: Case) {
    let _alone = alone();
    let [few, many] = [0, 10 * TIMES].map(|times| {
        let scene = Scene::new();
        let callgrind = Callgrind::start(Io::Epoll, &scene, &format!("callgrind.{case:?}.{times}"));
        scene.play(callgrind.addr, callgrind.shard, case, times, || {});
        callgrind.end()
    });
    let more = |(few, many): (&Profile, &Profile)| many.instructions.saturating_sub(few.instructions);
    let (shard, count) =
        many.iter().zip(few.iter().zip(&many).map(more)).max_by_key(|(_, more)| *more).unwrap();
    let seen = |_| format!(" What takes them: callgrind_annotate {}", shard.path.display());
    judge(What::Instructions, case, Io::Epoll, count / 10, seen);
}

/// There is one shard in this process, and nobody else is counted.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On epoll, and on io_uring where there is one.
fn on_both(fits: impl Fn(Io)) {
    fits(Io::Epoll);
    if kernel_grants_uring() {
        fits(Io::Uring);
    } else {
        eprintln!("skipped on io_uring: this kernel refuses it");
    }
}

#[test]
fn a_small_exchange_allocates_no_more_than_it_may() {
    on_both(|io| allocations_fit(Case::Json, io));
}

#[test]
fn an_exchange_with_a_long_prompt_allocates_no_more_than_it_may() {
    on_both(|io| allocations_fit(Case::Long, io));
}

#[test]
fn an_event_allocates_no_more_than_it_may() {
    on_both(|io| allocations_fit(Case::Event, io));
}

#[test]
fn a_small_exchange_makes_no_more_system_calls_than_it_may() {
    on_both(|io| system_calls_fit(Case::Json, io));
}

#[test]
fn an_exchange_with_a_long_prompt_makes_no_more_system_calls_than_it_may() {
    on_both(|io| system_calls_fit(Case::Long, io));
}

#[test]
fn an_event_makes_no_more_system_calls_than_it_may() {
    on_both(|io| system_calls_fit(Case::Event, io));
}

#[test]
#[cfg_attr(debug_assertions, ignore = "of a release build: cargo test --release --test cost")]
fn a_small_exchange_takes_no_more_instructions_than_it_may() {
    instructions_fit(Case::Json);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "of a release build: cargo test --release --test cost")]
fn an_exchange_with_a_long_prompt_takes_no_more_instructions_than_it_may() {
    instructions_fit(Case::Long);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "of a release build: cargo test --release --test cost")]
fn an_event_takes_no_more_instructions_than_it_may() {
    instructions_fit(Case::Event);
}
