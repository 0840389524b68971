use super::*;
use std::{future::pending, pin::pin};

fn poll<T>(task: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    task.poll(&mut Context::from_waker(Waker::noop()))
}

fn watches() -> Watches {
    Watches::new(Rc::new(ShardClock::new(Clock::start())))
}

#[test]
fn a_phase_ends_when_its_time_is_over_and_not_before() {
    let watches = watches();
    let watch = watches.watch();
    let mut phase = pin!(watch.limit(50, pending::<()>()));
    assert_eq!(poll(phase.as_mut()), Poll::Pending);
    watches.clock.now.set(watches.clock.now() + 49);
    assert_eq!(poll(phase.as_mut()), Poll::Pending);
    watches.clock.now.set(watches.clock.now() + 1);
    assert_eq!(poll(phase.as_mut()), Poll::Ready(Err(Elapsed)));
}

#[test]
fn no_limit_is_no_limit() {
    let watches = watches();
    let watch = watches.watch();
    let mut phase = pin!(watch.limit(0, pending::<()>()));
    watches.clock.now.set(Millis::MAX - 1);
    assert_eq!(poll(phase.as_mut()), Poll::Pending);
}

#[test]
fn draining_ends_idle_phases_only() {
    let watches = watches();
    let (one, two) = (watches.watch(), watches.watch());
    let mut idle = pin!(one.idle(1_000_000, pending::<()>()));
    let mut busy = pin!(two.limit(1_000_000, pending::<()>()));
    assert_eq!(poll(idle.as_mut()), Poll::Pending);
    assert_eq!(poll(busy.as_mut()), Poll::Pending);
    watches.drain();
    assert_eq!(poll(idle.as_mut()), Poll::Ready(Err(Elapsed)));
    assert_eq!(poll(busy.as_mut()), Poll::Pending);
}

#[test]
fn who_is_idle_makes_room_the_oldest_first_and_nobody_else_does() {
    let watches = watches();
    let all = [(); 4].map(|()| watches.watch());
    let mut busy = pin!(all[0].limit(0, pending::<()>()));
    assert!(poll(busy.as_mut()).is_pending());
    for idle in &all[1..] {
        assert!(poll(pin!(idle.idle(1_000_000, pending::<()>()))).is_pending());
    }
    let ended = || [0, 1, 2, 3].map(|at: usize| all[at].is_cut());
    assert!(watches.end_idle());
    assert_eq!(ended(), [false, true, false, false]);
    assert!(watches.end_idle() && watches.end_idle());
    assert_eq!(ended(), [false, true, true, true]);
    assert!(!watches.end_idle());
    assert!(poll(pin!(all[0].idle(1_000_000, pending::<()>()))).is_pending());
    assert!(!watches.end_idle(), "it was looked at already");
    watches.tick();
    assert!(watches.end_idle() && ended()[0]);
}

#[test]
fn phases_within_and_beside_each_other_each_end_in_their_own_time() {
    let watches = watches();
    let watch = watches.watch();
    let mut inner = pin!(watch.limit(50, pending::<()>()));
    let mut outer = pin!(watch.limit(200, async {
        assert_eq!(inner.as_mut().await, Err(Elapsed), "the inner one is over first");
        pending::<()>().await;
    }));
    let mut beside = pin!(watch.limit(100, pending::<()>()));
    let begin = watches.clock.now();
    for (after, wanted) in [(0, 0), (49, 0), (50, 1), (99, 1), (100, 2), (200, 2)] {
        watches.clock.now.set(begin + after);
        let due = watch.is_due();
        assert_eq!(due, [50, 100, 200].contains(&after), "woken after {after} ms");
        let outer = poll(outer.as_mut());
        assert_eq!(outer.is_ready(), after >= 200, "{after}");
        if wanted < 2 || after == 100 {
            assert_eq!(poll(beside.as_mut()).is_ready(), wanted == 2, "{after}");
        }
    }
}

#[test]
fn a_limit_of_the_whole_ends_every_phase_and_can_be_taken_away() {
    let watches = watches();
    let watch = watches.watch();
    watch.set_total(100);
    let mut unlimited = pin!(watch.limit(0, pending::<()>()));
    let mut long = pin!(watch.stream_until(Millis::MAX, pending::<()>()));
    assert!(poll(unlimited.as_mut()).is_pending() && poll(long.as_mut()).is_pending());
    assert!(!watch.is_total_over());
    watches.clock.now.set(watches.clock.now() + 100);
    assert!(watch.is_due() && watch.is_total_over());
    assert_eq!(poll(unlimited.as_mut()), Poll::Ready(Err(Elapsed)));
    assert_eq!(poll(long.as_mut()), Poll::Ready(Err(Elapsed)));
    watch.set_total(0);
    assert!(!watch.is_total_over());
    assert!(poll(pin!(watch.limit(1, pending::<()>()))).is_pending());
}

#[test]
fn what_has_last_words_is_told_of_the_cut_and_lives_on_for_a_moment() {
    let watches = watches();
    let (silent, speaking) = (watches.watch(), watches.watch());
    speaking.set_parting(Parting::Speaking);
    let mut stream = pin!(speaking.stream_until(Millis::MAX, pending::<()>()));
    assert!(poll(stream.as_mut()).is_pending());
    watches.cut();
    assert!(silent.is_cut() && !speaking.is_cut());
    assert!(silent.is_due() && speaking.is_due());
    assert_eq!(poll(stream.as_mut()), Poll::Ready(Err(Elapsed)));
    watches.clock.now.set(watches.clock.now() + PARTING_MS);
    watches.cut();
    assert!(speaking.is_cut(), "not for longer than that, however often everything is cut");
}

#[test]
fn who_has_said_nothing_is_given_up_at_the_cut_and_who_has_goes_on() {
    let watches = watches();
    let (unanswered, answered) = (watches.watch(), watches.watch());
    for watch in [&unanswered, &answered] {
        watch.set_parting(Parting::Unanswered);
    }
    let (mut one, mut two) = (pin!(pending::<()>()), pin!(pending::<()>()));
    let mut one = pin!(unanswered.unless_cut(one.as_mut()));
    let mut two = pin!(answered.unless_cut(two.as_mut()));
    assert!(poll(one.as_mut()).is_pending() && poll(two.as_mut()).is_pending());
    answered.speaks();
    watches.cut();
    assert!(!unanswered.is_cut() && !answered.is_cut(), "both have something to say");
    assert_eq!(poll(one.as_mut()), Poll::Ready(None));
    assert!(poll(two.as_mut()).is_pending());
}

#[test]
fn u10_ten_minutes_of_silence_end_no_phase_without_a_limit() {
    let watches = watches();
    let watch = watches.watch();
    watch.set_total(0);
    let mut head = pin!(watch.limit(0, pending::<()>()));
    let mut first_event = pin!(watch.stream_until(watch.deadline_in(0), pending::<()>()));
    for _ in 0..600 {
        watches.clock.now.set(watches.clock.now() + 1000);
        assert!(!watch.is_due());
        assert!(poll(head.as_mut()).is_pending() && poll(first_event.as_mut()).is_pending());
    }
}

#[test]
fn a_dropped_watch_is_forgotten() {
    let watches = watches();
    let watch = watches.watch();
    watches.tick();
    assert_eq!(watches.watches.borrow().len(), 1);
    drop(watch);
    watches.tick();
    assert_eq!(watches.watches.borrow().len(), 0);
}
