//! When requests are due: at once (closed loop), or at times that do not depend on how fast they are answered (open
//! loop). No sockets, no clock.
//!
//! In an open loop a latency counts from when its request was due. One that had to wait because all connections were
//! busy has waited like a user would have; to count from when it was sent would hide that (coordinated omission).

use crate::chance::Chance;

/// What is sent when.
#[derive(Debug)]
pub(crate) struct Schedule {
    arrivals: Option<Arrivals>,
    /// Requests that are due earlier are not measured.
    begin_ns: u64,
    /// No request is due then or later.
    end_ns: u64,
    /// Measured requests still to be sent.
    left: u64,
}

/// The times of an open loop.
#[derive(Debug)]
pub(crate) struct Arrivals {
    start_ns: u64,
    per_second: f64,
    /// What draws the pauses; without it all are the same.
    chance: Option<Chance>,
    /// Pauses so far, in units of their mean.
    pauses: f64,
}

/// A request that is to be sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Due {
    /// When it was due: what its latency counts from.
    pub(crate) at_ns: u64,
    /// Whether it is measured or only warms up.
    pub(crate) measured: bool,
}

/// What a free connection has to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Send(Due),
    /// Nothing is due yet.
    Wait,
    /// Nothing will be due any more.
    Over,
}

impl Arrivals {
    /// The first request is due at once if pauses are even, else after a pause (Poisson).
    pub(crate) fn new(start_ns: u64, per_second: f64, chance: Option<Chance>) -> Self {
        let mut arrivals = Self { start_ns, per_second, chance, pauses: 0.0 };
        if arrivals.chance.is_some() {
            arrivals.advance();
        }
        arrivals
    }

    /// From the start, so that nothing adds up.
    fn next_ns(&self) -> u64 {
        self.start_ns + (self.pauses / self.per_second * 1e9) as u64
    }

    fn advance(&mut self) {
        self.pauses += self.chance.as_mut().map_or(1.0, |chance| chance.exponential(1.0));
    }
}

impl Schedule {
    /// `requests`: how many are measured at most. Times are those of one clock, in nanoseconds.
    pub(crate) fn new(arrivals: Option<Arrivals>, begin_ns: u64, end_ns: u64, requests: u64) -> Self {
        Self { arrivals, begin_ns, end_ns, left: requests }
    }

    /// Whether requests are due however fast they are answered.
    pub(crate) fn is_open_loop(&self) -> bool {
        self.arrivals.is_some()
    }

    /// When the next request of an open loop is due; `None` if there is none any more.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        let next_ns = self.arrivals.as_ref()?.next_ns();
        (next_ns < self.end_ns && self.left > 0).then_some(next_ns)
    }

    /// The turn of a connection that is free now.
    pub(crate) fn turn(&mut self, now_ns: u64) -> Turn {
        let at_ns = if self.arrivals.is_some() { self.next_ns() } else { Some(now_ns) };
        let Some(at_ns) = at_ns.filter(|at_ns| *at_ns < self.end_ns && self.left > 0) else {
            return Turn::Over;
        };
        if at_ns > now_ns {
            return Turn::Wait;
        }
        if let Some(arrivals) = &mut self.arrivals {
            arrivals.advance();
        }
        let measured = at_ns >= self.begin_ns;
        self.left -= u64::from(measured);
        Turn::Send(Due { at_ns, measured })
    }

    /// How many requests of an open loop were due and not sent.
    pub(crate) fn overdue(&mut self, now_ns: u64) -> u64 {
        let mut overdue = 0;
        while self.arrivals.is_some() && matches!(self.turn(now_ns), Turn::Send(Due { measured: true, .. })) {
            overdue += 1;
        }
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::Histogram;

    const MS: u64 = 1_000_000;

    fn even(per_second: f64, begin_ns: u64, end_ns: u64, requests: u64) -> Schedule {
        Schedule::new(Some(Arrivals::new(0, per_second, None)), begin_ns, end_ns, requests)
    }

    /// Sends over one connection to a worker that takes 1 ms, but 1 s for the request numbered 100. Latencies as they are
    /// reported, and as they would be if they counted from when a request is sent.
    fn stalled(mut schedule: Schedule) -> (Histogram, Histogram) {
        let (mut reported, mut naive, mut now_ns, mut number) = (Histogram::new(), Histogram::new(), 0, 0);
        loop {
            match schedule.turn(now_ns) {
                Turn::Send(due) => {
                    number += 1;
                    let sent_ns = now_ns;
                    now_ns += if number == 100 { 1000 * MS } else { MS };
                    reported.record(now_ns - due.at_ns);
                    naive.record(now_ns - sent_ns);
                }
                Turn::Wait => now_ns = schedule.next_ns().unwrap(),
                Turn::Over => return (reported, naive),
            }
        }
    }

    #[test]
    fn requests_that_waited_behind_a_stall_count_from_when_they_were_due() {
        // 100 a second: the stall of 1 s makes 100 of 1,000 wait for half a second on average
        let (reported, naive) = stalled(even(100.0, 0, 10_000 * MS, u64::MAX));
        assert!(naive.percentile_ns(0.99) < 2 * MS);
        assert!(reported.percentile_ns(0.5) < 2 * MS);
        let p99 = reported.percentile_ns(0.99);
        assert!((900 * MS..920 * MS).contains(&p99), "{p99}");
        let p95 = reported.percentile_ns(0.95);
        assert!((540 * MS..560 * MS).contains(&p95), "{p95}");
    }

    #[test]
    fn even_requests_are_due_at_multiples_of_the_pause() {
        let mut schedule = even(1000.0, 0, 10 * MS, u64::MAX);
        for number in 0..10 {
            assert_eq!(schedule.next_ns(), Some(number * MS));
            assert_eq!(schedule.turn(number * MS), Turn::Send(Due { at_ns: number * MS, measured: true }));
            assert!(matches!(schedule.turn(number * MS), Turn::Wait | Turn::Over));
        }
        assert_eq!(schedule.turn(10 * MS), Turn::Over);
        assert_eq!(schedule.next_ns(), None);
    }

    #[test]
    fn arrivals_by_chance_have_the_rate_that_was_asked_for_and_repeat_with_the_seed() {
        let draw = |seed| {
            let arrivals = Arrivals::new(0, 1000.0, Some(Chance::new(seed)));
            let mut schedule = Schedule::new(Some(arrivals), 0, 100_000 * MS, u64::MAX);
            let mut times = Vec::new();
            while let Turn::Send(due) = schedule.turn(u64::MAX) {
                times.push(due.at_ns);
            }
            times
        };
        let times = draw(1);
        // the deviation is 316
        assert!(times.len().abs_diff(100_000) < 1600, "{}", times.len());
        let short =
            times.windows(2).filter(|pair| pair[1] - pair[0] < MS).count() as f64 / times.len() as f64;
        assert!((short - 0.632).abs() < 0.01, "{short} of the pauses are shorter than their mean");
        assert_eq!(times, draw(1));
        assert_ne!(times, draw(2));
    }

    #[test]
    fn requests_of_the_warm_up_are_sent_and_not_measured() {
        let mut schedule = even(1000.0, 3 * MS, 1000 * MS, 2);
        let turns: Vec<Turn> = (0..6).map(|_| schedule.turn(500 * MS)).collect();
        let due = |number, measured| Turn::Send(Due { at_ns: number * MS, measured });
        let expected = [due(0, false), due(1, false), due(2, false), due(3, true), due(4, true), Turn::Over];
        assert_eq!(turns, expected);
    }

    #[test]
    fn a_closed_loop_sends_whenever_a_connection_is_free() {
        let mut schedule = Schedule::new(None, 10, 20, 2);
        assert_eq!(schedule.turn(9), Turn::Send(Due { at_ns: 9, measured: false }));
        assert_eq!(schedule.turn(10), Turn::Send(Due { at_ns: 10, measured: true }));
        assert_eq!(schedule.turn(20), Turn::Over);
        assert_eq!(schedule.turn(19), Turn::Send(Due { at_ns: 19, measured: true }));
        assert_eq!(schedule.turn(19), Turn::Over);
        assert_eq!(schedule.overdue(19), 0);
    }

    #[test]
    fn requests_that_were_due_and_never_sent_are_counted() {
        let mut schedule = even(1000.0, 0, 10 * MS, u64::MAX);
        assert!(matches!(schedule.turn(0), Turn::Send(_)));
        assert_eq!(schedule.overdue(60_000 * MS), 9);
    }
}
