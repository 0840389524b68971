use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU32, AtomicUsize},
};

use clap::{Args, Command, FromArgMatches, builder::Resettable};
use proptest::prelude::*;

use super::*;
use crate::workers::Worker;

/// As [`Settings`] of these flags, whatever the environment says.
fn settings(flags: &[&str]) -> Settings {
    let command = Settings::augment_args(Command::new("test")).no_binary_name(true);
    let command = command.mut_args(|arg| arg.env(Resettable::Reset));
    Settings::from_arg_matches(&command.get_matches_from(flags)).unwrap()
}

fn admission(slots: u32, queue: u32) -> Admission {
    let flags = [format!("--max-concurrent-requests={slots}"), format!("--queue-size={queue}")];
    Admission::new(&settings(&[&flags[0], &flags[1]]), |_| {})
}

/// One that any of these workers may serve; nobody: that needs no room.
fn newcomer(priority: i64, workers: &[&Arc<Worker>]) -> Newcomer {
    let workers: Vec<Arc<Worker>> = workers.iter().copied().cloned().collect();
    let of = workers.iter().map(|worker| 1 << worker.id()).sum();
    let find = move || {
        let usable = workers.iter().filter(|worker| worker.usable() && !worker.is_full());
        let best = usable.min_by_key(|worker| worker.in_flight()).ok_or(Full)?;
        InFlight::reserve(best).map(Some).ok_or(Full)
    };
    let room = (of != 0).then(|| RoomWanted { of, find: Box::new(find) });
    Newcomer { priority, key: 0, shard: 0, room }
}

fn limited(id: usize, most: u32) -> Arc<Worker> {
    let worker = Worker::new(id, format!("http://w{id}:1#max_concurrent_requests={most}").parse().unwrap());
    worker.set_health(crate::workers::Health::Up);
    Arc::new(worker)
}

impl<'a> Waiting<'a> {
    /// As [`Waiting::called`], where nobody is displaced.
    fn admitted(&mut self) -> Option<Admitted<'a>> {
        self.called().map(|called| called.expect("nobody is displaced"))
    }
}

#[track_caller]
fn waits<'a>(admission: &'a Admission, newcomer: Newcomer) -> Waiting<'a> {
    match admission.enter(newcomer) {
        Entry::Waits(waiting) => waiting,
        other => panic!("it does not wait: {other:?}"),
    }
}

#[track_caller]
fn refused(admission: &Admission, newcomer: Newcomer) -> Reason {
    match admission.enter(newcomer) {
        Entry::Refused(refused) => refused.reason,
        other => panic!("it is not refused: {other:?}"),
    }
}

#[test]
fn a_slot_that_is_given_back_goes_to_the_first_who_waits_and_to_nobody_who_comes() {
    let admission = admission(1, 10);
    let permit = admission.try_enter().expect("a free slot");
    assert!(admission.try_enter().is_none());
    let mut second = waits(&admission, newcomer(0, &[]));
    let mut third = waits(&admission, newcomer(0, &[]));
    let mut first = waits(&admission, newcomer(-1, &[]));
    assert_eq!((admission.in_use(), admission.waiting()), (1, 3));
    drop(permit);
    assert_eq!((admission.in_use(), admission.waiting()), (1, 2), "it is handed over");
    assert!(admission.try_enter().is_none() && second.admitted().is_none() && third.admitted().is_none());
    let admitted = first.admitted().expect("the lowest priority");
    assert!(first.admitted().is_none(), "once");
    drop((admitted, first));
    let admitted = second.admitted().expect("the next");
    drop(third);
    drop(admitted);
    assert_eq!((admission.in_use(), admission.waiting()), (0, 0));
    assert!(admission.try_enter().is_some());
}

#[test]
fn who_leaves_the_queue_passes_on_what_it_was_given_meanwhile() {
    let admission = admission(1, 10);
    let permit = admission.try_enter().unwrap();
    let one = waits(&admission, newcomer(0, &[]));
    let mut two = waits(&admission, newcomer(0, &[]));
    drop(permit);
    assert!(one.waiter().is_called());
    drop(one);
    assert!(two.admitted().is_some());
}

#[test]
fn a_full_queue_refuses_and_says_for_how_long() {
    let admission = admission(1, 1);
    let _permit = admission.try_enter().unwrap();
    assert!(admission.foresee().is_ok(), "there is a place in the queue");
    let waiting = waits(&admission, newcomer(0, &[]));
    assert_eq!(refused(&admission, newcomer(0, &[])), Reason::QueueFull);
    assert_eq!(waiting.overdue().reason, Reason::QueueTimeout);
    assert_eq!(admission.foresee().unwrap_err().retry_after_secs, 1, "nothing is known");
    (0..50).for_each(|_| admission.waited(4_100_000));
    assert_eq!(admission.foresee().unwrap_err().retry_after_secs, 5, "about as long as others have waited");
    admission.waited(u64::MAX);
    assert_eq!(u64::from(admission.foresee().unwrap_err().retry_after_secs), MAX_RETRY_AFTER_SECS);
}

#[test]
fn who_goes_first_is_not_kept_out_by_a_full_queue() {
    let admission = admission(1, 1);
    let permit = admission.try_enter().unwrap();
    let mut later = waits(&admission, newcomer(5, &[]));
    let mut urgent = waits(&admission, newcomer(-5, &[]));
    assert!(later.waiter().is_called(), "it is told at once");
    let refused = later.called().expect("it is told").expect_err("it has to go");
    assert_eq!(refused.reason, Reason::QueueFull);
    assert!(later.called().is_none(), "once");
    drop(later);
    assert_eq!((admission.in_use(), admission.waiting()), (1, 1));
    drop(permit);
    assert!(urgent.admitted().is_some());
    assert_eq!((admission.in_use(), admission.waiting()), (0, 0));
}

#[test]
fn more_slots_let_in_who_waits_and_fewer_are_waited_for() {
    let rung = Arc::new(Mutex::new(Vec::new()));
    let ring = {
        let rung = rung.clone();
        move |shard| rung.lock().unwrap().push(shard)
    };
    let admission = Admission::new(&settings(&["--max-concurrent-requests=2"]), ring);
    assert_eq!(admission.slots(), Some(2));
    let mut inside: Vec<_> = (0..2).map(|_| admission.try_enter().unwrap()).collect();
    let mut waiting: Vec<_> = (0..5).map(|_| waits(&admission, newcomer(0, &[]))).collect();
    admission.set_slots(4);
    assert_eq!((admission.in_use(), admission.waiting()), (4, 3));
    assert_eq!(*rung.lock().unwrap(), [0], "their shard is told, once");
    inside.extend(waiting.drain(..2).map(|mut waiting| waiting.admitted().expect("a new slot").permit));
    admission.set_slots(3);
    assert_eq!((admission.in_use(), admission.waiting()), (4, 3), "who is in stays");
    inside.pop();
    assert_eq!((admission.in_use(), admission.waiting()), (3, 3), "and is not followed by anybody");
    inside.pop();
    assert_eq!((admission.in_use(), admission.waiting()), (3, 2), "until there are fewer than slots");
    admission.set_slots(0);
    drop((inside, waiting.remove(0)));
    assert_eq!((admission.in_use(), admission.waiting()), (0, 2));
    assert!(admission.try_enter().is_none(), "none is not: no limit");
    assert_eq!(waiting[0].overdue().reason, Reason::QueueTimeout);
    admission.set_slots(9);
    assert!(waiting.iter_mut().all(|waiting| waiting.admitted().is_some()));
    assert!(admission.try_enter().is_some());
}

#[test]
fn a_limit_of_all_proxies_is_one_of_this_proxy_at_first() {
    let slots = |flags: &[&str]| Admission::new(&settings(flags), |_| {}).slots();
    assert_eq!(slots(&[]), None);
    assert_eq!(slots(&["--fleet-max-concurrent-requests=7"]), Some(7));
    assert_eq!(slots(&["--fleet-max-concurrent-requests=7", "--max-concurrent-requests=8"]), Some(7));
    assert_eq!(slots(&["--fleet-max-concurrent-requests=7", "--max-concurrent-requests=6"]), Some(6));
    assert!(settings(&["--fleet-max-concurrent-requests=7"]).limits(false) && !settings(&[]).limits(false));
    let unlimited = Admission::new(&settings(&[]), |_| {});
    unlimited.set_slots(0);
    assert!(unlimited.try_enter().is_some(), "where there is no limit, there comes none");
}

#[test]
fn who_is_refused_for_want_of_a_slot_is_counted() {
    let admission = admission(1, 1);
    let _permit = admission.try_enter().unwrap();
    let mut later = waits(&admission, newcomer(5, &[]));
    assert_eq!((refused(&admission, newcomer(9, &[])), admission.refused()), (Reason::QueueFull, 1));
    assert!(admission.foresee().is_err() && admission.refused() == 2);
    let _urgent = waits(&admission, newcomer(-5, &[]));
    assert!(later.called().is_some_and(|called| called.is_err()) && admission.refused() == 3);
    assert!(
        later.overdue().reason == Reason::QueueTimeout && admission.refused() == 3,
        "it was one who waited"
    );
}

#[test]
fn the_rate_holds_and_its_burst_is_the_number_of_slots() {
    let taken = |flags: &[&str]| {
        let admission = Admission::new(&settings(flags), |_| {});
        (0..100).take_while(|_| admission.arrives(0).is_ok()).count()
    };
    assert_eq!(taken(&["--rate-limit-tokens-per-second=2.5"]), 3);
    assert_eq!(taken(&["--rate-limit-tokens-per-second=2.5", "--max-concurrent-requests=7"]), 7);
    assert_eq!(taken(&[]), 100);
    let admission = Admission::new(&settings(&["--rate-limit-tokens-per-second=0.1"]), |_| {});
    admission.arrives(0).unwrap();
    let refused = admission.arrives(0).unwrap_err();
    assert_eq!((refused.reason, refused.retry_after_secs), (Reason::RateLimit, 10));
    assert!(admission.arrives(10_000_000).is_ok(), "it was told the truth");
}

#[test]
fn who_waits_for_a_worker_holds_nobody_up_who_can_use_another() {
    let admission = admission(2, 10);
    let (busy, free) = (limited(0, 1), limited(1, 5));
    let running = InFlight::begin(busy.clone(), Default::default());
    let mut waiting = waits(&admission, newcomer(-5, &[&busy]));
    assert_eq!(admission.in_use(), 0, "no slot is held meanwhile");
    assert!(admission.try_enter().is_none(), "the queue is asked first");
    let Entry::In(other) = admission.enter(newcomer(5, &[&free])) else {
        panic!("there is room on the other")
    };
    assert_eq!(other.room.as_ref().map(|room| room.in_flight.worker().id()), Some(1));
    let Entry::In(anybodys) = admission.enter(newcomer(9, &[])) else { panic!("it needs no room") };
    assert!(anybodys.room.is_none());
    drop(running);
    admission.room_made();
    assert!(waiting.admitted().is_none(), "all slots are in use");
    drop(anybodys);
    let admitted = waiting.admitted().expect("a slot, and room");
    assert_eq!(admitted.room.as_ref().map(|room| room.in_flight.worker().id()), Some(0));
    assert!(busy.is_full(), "its place is taken");
}

#[test]
fn the_reason_is_what_is_waited_for() {
    let admission = admission(1, 0);
    let worker = limited(0, 1);
    let running = InFlight::begin(worker.clone(), Default::default());
    assert_eq!(refused(&admission, newcomer(0, &[&worker])), Reason::WorkersBusy);
    assert!(admission.foresee().is_ok(), "others may be served");
    let _permit = admission.try_enter().unwrap();
    assert_eq!(refused(&admission, newcomer(0, &[&worker])), Reason::QueueFull);
    drop(running);
    assert_eq!(refused(&admission, newcomer(0, &[])), Reason::QueueFull);
}

#[test]
fn the_shards_of_those_who_are_served_are_rung_once() {
    let rung = Arc::new(Mutex::new(Vec::new()));
    let ring = {
        let rung = rung.clone();
        move |shard| rung.lock().unwrap().push(shard)
    };
    let admission = Admission::new(&settings(&["--queue-size=10"]), ring);
    let worker = limited(0, 3);
    let running: Vec<_> = (0..3).map(|_| InFlight::begin(worker.clone(), Default::default())).collect();
    let waiting: Vec<_> = [2, 7, 2, 5]
        .map(|shard| waits(&admission, Newcomer { shard, ..newcomer(0, &[&worker]) }))
        .into_iter()
        .collect();
    assert!(rung.lock().unwrap().is_empty());
    drop(running);
    admission.room_made();
    assert_eq!(*rung.lock().unwrap(), [2, 7]);
    assert_eq!(waiting.iter().filter(|waiting| waiting.waiter().is_called()).count(), 3);
}

#[test]
fn slots_and_room_are_never_exceeded_and_none_is_lost_under_threads() {
    let admission = admission(3, 64);
    let workers = [limited(0, 1), limited(1, 2)];
    let (inside, most, served) = (AtomicU32::new(0), AtomicU32::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (admission, workers) = (&admission, &workers);
            let (inside, most, served) = (&inside, &most, &served);
            scope.spawn(move || {
                let mut queue: VecDeque<Waiting<'_>> = VecDeque::new();
                let run = |admitted: Admitted<'_>| {
                    let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                    most.fetch_max(now, Ordering::SeqCst);
                    for worker in workers {
                        assert!(worker.in_flight() <= worker.traits().max_concurrent_requests.unwrap());
                    }
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    served.fetch_add(1, Ordering::SeqCst);
                    drop(admitted);
                };
                for turn in 0..1500 {
                    let wanted: &[&Arc<Worker>] = match (turn + thread) % 4 {
                        0 => &[],
                        1 => &[&workers[0]],
                        2 => &[&workers[1]],
                        _ => &[&workers[0], &workers[1]],
                    };
                    match admission.enter(newcomer((turn % 3) as i64, wanted)) {
                        Entry::In(admitted) => run(admitted),
                        Entry::Waits(waiting) => queue.push_back(waiting),
                        Entry::Refused(_) => panic!("64 places are enough for 4 × 8"),
                    }
                    // some give up
                    if turn % 17 == 0 {
                        queue.pop_front();
                    }
                    while queue.len() >= 8 || turn == 1499 && !queue.is_empty() {
                        let waiting = queue.iter_mut().find_map(Waiting::admitted);
                        waiting.map_or_else(std::thread::yield_now, &run);
                        queue.retain(|waiting| !waiting.over);
                    }
                }
            });
        }
    });
    assert_eq!((admission.in_use(), admission.waiting()), (0, 0));
    assert!(workers.iter().all(|worker| worker.in_flight() == 0));
    assert!(most.into_inner() <= 3 && served.into_inner() > 4000);
}

#[derive(Debug, Clone)]
enum Step {
    Come { priority: i64, key: u64, workers: usize },
    End(prop::sample::Index),
    GiveUp(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (-1i64..2, 0u64..3, 0usize..4).prop_map(|(priority, key, workers)| Step::Come { priority, key, workers }),
        2 => any::<prop::sample::Index>().prop_map(Step::End),
        1 => any::<prop::sample::Index>().prop_map(Step::GiveUp),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    /// Whatever comes, ends and gives up: limits hold, counts agree, and nobody waits who could be served.
    #[test]
    fn nobody_waits_who_could_be_served(steps in steps(), slots in 0u32..4, size in 0u32..6) {
        let admission = admission(slots, size);
        let workers = [limited(0, 1), limited(1, 2)];
        let mut inside: Vec<Admitted<'_>> = Vec::new();
        let mut queue: Vec<(Waiting<'_>, usize)> = Vec::new();
        let (mut joined, mut displaced) = (0usize, 0usize);
        for step in steps {
            match step {
                Step::Come { priority, key, workers: wanted } => {
                    let among = workers.iter().enumerate().filter(|(at, _)| wanted & (1 << at) != 0);
                    let among: Vec<&Arc<Worker>> = among.map(|(_, worker)| worker).collect();
                    match admission.enter(Newcomer { key, ..newcomer(priority, &among) }) {
                        Entry::In(admitted) => inside.push(admitted),
                        Entry::Waits(waiting) => {
                            joined += 1;
                            queue.push((waiting, wanted));
                        }
                        Entry::Refused(_) => prop_assert_eq!(queue.len(), size as usize),
                    }
                }
                Step::End(which) => if !inside.is_empty() {
                    inside.swap_remove(which.index(inside.len()));
                },
                Step::GiveUp(which) => if !queue.is_empty() {
                    drop(queue.remove(which.index(queue.len())));
                },
            }
            for called in queue.iter_mut().filter_map(|(waiting, _)| waiting.called()) {
                match called {
                    Ok(admitted) => inside.push(admitted),
                    Err(_) => displaced += 1,
                }
            }
            prop_assert!(displaced <= joined.saturating_sub(size as usize), "only a full queue displaces");
            queue.retain(|(waiting, _)| !waiting.over);
            prop_assert_eq!(admission.waiting(), queue.len() as u64);
            prop_assert!(queue.len() <= size as usize);
            prop_assert_eq!(admission.in_use(), if slots == 0 { 0 } else { inside.len() as u64 });
            prop_assert!(slots == 0 || inside.len() <= slots as usize);
            for worker in &workers {
                let here = inside.iter().filter_map(|admitted| admitted.room.as_ref());
                let here = here.filter(|room| Arc::ptr_eq(room.in_flight.worker(), worker)).count();
                prop_assert_eq!(worker.in_flight() as usize, here);
                prop_assert!(here <= worker.traits().max_concurrent_requests.unwrap() as usize);
            }
            let slot = slots == 0 || inside.len() < slots as usize;
            for (_, wanted) in &queue {
                let room = *wanted == 0
                    || workers.iter().enumerate().any(|(at, worker)| wanted & (1 << at) != 0 && !worker.is_full());
                prop_assert!(!(slot && room), "one waits that could be served");
            }
        }
        drop(queue);
        drop(inside);
        prop_assert_eq!((admission.in_use(), admission.waiting()), (0, 0));
    }
}
