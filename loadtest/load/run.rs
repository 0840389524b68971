//! A run: connections that take their turns from the schedule.
//!
//! In a closed loop each connection sends whenever it is free. In an open loop a free connection waits for its turn on
//! a stack, and the one that was used last is used first; a new one is opened only when all are busy. What is due while
//! as many are busy as there may be is sent by the first that becomes free.

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    task::{Poll, Waker},
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::spawn_local,
    time::{sleep, timeout},
};

use crate::{
    answer::Failure,
    chance::Chance,
    clock::now_ns,
    connection::{Connection, End, Exchange},
    schedule::{Due, Schedule, Turn},
    tally::Tally,
    timer::Timer,
    workload::{Manner, Requests},
};

/// How long a connection pauses after a failure: what refuses everything shall not be asked as fast as it refuses.
const PAUSE: Duration = Duration::from_millis(10);
/// The most events that a client awaits that leaves early.
const LEAVES_AFTER: usize = 8;

/// What all connections share.
pub(crate) struct Run {
    address: SocketAddr,
    streams: bool,
    manner: Manner,
    /// How many connections there may be.
    most: usize,
    requests: RefCell<Requests>,
    schedule: RefCell<Schedule>,
    chance: RefCell<Chance>,
    pub(crate) tally: RefCell<Tally>,
    /// Free connections of an open loop; the last one is used next.
    free: RefCell<Vec<Rc<Seat>>>,
    connections: Cell<usize>,
    /// Measured requests that are under way.
    measured_under_way: Cell<u64>,
    /// A connection has become free or has gone.
    freed: Notify,
}

/// Where a free connection waits for its turn.
#[derive(Default)]
struct Seat {
    due: Cell<Option<Due>>,
    waker: Cell<Option<Waker>>,
}

impl Run {
    /// `most`: how many connections there may be.
    pub(crate) fn new(
        (address, streams, manner): (SocketAddr, bool, Manner),
        most: usize,
        requests: Requests,
        schedule: Schedule,
        chance: Chance,
    ) -> Rc<Self> {
        Rc::new(Self {
            address,
            streams,
            manner,
            most,
            requests: RefCell::new(requests),
            schedule: RefCell::new(schedule),
            chance: RefCell::new(chance),
            tally: RefCell::new(Tally::new()),
            free: RefCell::new(Vec::new()),
            connections: Cell::new(0),
            measured_under_way: Cell::new(0),
            freed: Notify::new(),
        })
    }

    /// Runs until everything that was due is answered, but not beyond `deadline`; what is not answered then has failed.
    ///
    /// # Errors
    /// There is no timer.
    pub(crate) async fn drive(self: &Rc<Self>, deadline: Duration) -> io::Result<()> {
        let all = async {
            if self.schedule.borrow().is_open_loop() {
                self.dispatch().await?;
            } else {
                (0..self.most).for_each(|_| self.connect(None));
            }
            while self.connections.get() > self.free.borrow().len() {
                self.freed.notified().await;
            }
            Ok(())
        };
        if let Ok(ended) = timeout(deadline, all).await {
            return ended;
        }
        let now_ns = now_ns();
        let overdue = self.schedule.borrow_mut().overdue(now_ns);
        let mut tally = self.tally.borrow_mut();
        tally.fail(self.measured_under_way.get(), || "no whole answer long after the end".to_owned());
        tally.fail(overdue, || "all connections were busy until long after the end".to_owned());
        tally.last_ns = now_ns;
        Ok(())
    }

    /// Gives each request of an open loop to a connection when it is due.
    async fn dispatch(self: &Rc<Self>) -> io::Result<()> {
        let timer = Timer::new()?;
        loop {
            let Some(next_ns) = self.schedule.borrow().next_ns() else { return Ok(()) };
            if next_ns > now_ns() {
                timer.until(next_ns).await?;
                // a connection may have become free at that moment and have taken it
                continue;
            }
            if self.free.borrow().is_empty() && self.connections.get() >= self.most {
                self.freed.notified().await;
                continue;
            }
            let Turn::Send(due) = self.turn() else { continue };
            let seat = self.free.borrow_mut().pop();
            match seat {
                Some(seat) => {
                    seat.due.set(Some(due));
                    if let Some(waker) = seat.waker.take() {
                        waker.wake();
                    }
                }
                None => self.connect(Some(due)),
            }
        }
    }

    /// The turn of whoever asks; what is to be sent is under way from then on.
    fn turn(&self) -> Turn {
        let now_ns = now_ns();
        let mut schedule = self.schedule.borrow_mut();
        let turn = schedule.turn(now_ns);
        if let Turn::Send(Due { at_ns, measured: true }) = turn {
            self.measured_under_way.set(self.measured_under_way.get() + 1);
            if schedule.is_open_loop() {
                self.tally.borrow_mut().sent_late.record(now_ns - at_ns);
            }
        }
        turn
    }

    /// Adds a connection; one of an open loop has its first request at once.
    fn connect(self: &Rc<Self>, due: Option<Due>) {
        self.connections.set(self.connections.get() + 1);
        let run = self.clone();
        spawn_local(async move {
            run.serve(due).await;
            run.connections.set(run.connections.get() - 1);
            run.freed.notify_one();
        });
    }

    /// The life of a connection: until it has no turn any more.
    async fn serve(&self, first: Option<Due>) {
        let seat = Rc::new(Seat::default());
        let mut connection = None;
        if first.is_none() && self.manner == Manner::Keep {
            // that it must be opened is no part of a latency, and if it cannot be, its first request tells
            connection = Connection::open_in_turn(self.address).await.ok();
        }
        let mut turn = first.map_or_else(|| self.turn(), Turn::Send);
        loop {
            let due = match turn {
                Turn::Send(due) => Some(due),
                Turn::Wait => self.wait(&seat, &mut connection).await,
                Turn::Over => None,
            };
            let Some(due) = due else { return };
            let failed = self.request(&mut connection, due).await;
            self.measured_under_way.set(self.measured_under_way.get() - u64::from(due.measured));
            if failed {
                sleep(PAUSE).await;
            }
            turn = self.turn();
        }
    }

    /// Waits for the next turn; `None` if the connection is gone before that.
    async fn wait(&self, seat: &Rc<Seat>, connection: &mut Option<Connection>) -> Option<Due> {
        let kept = connection.as_mut()?;
        self.free.borrow_mut().push(seat.clone());
        self.freed.notify_one();
        let due = std::future::poll_fn(|cx| {
            if let Some(due) = seat.due.take() {
                return Poll::Ready(Some(due));
            }
            seat.waker.set(Some(cx.waker().clone()));
            kept.poll_closed(cx).map(|()| None)
        })
        .await;
        if due.is_none() {
            self.free.borrow_mut().retain(|free| !Rc::ptr_eq(free, seat));
        }
        due
    }

    /// Sends one request, on the connection that is kept if there is one, and counts what it came to. Returns whether it
    /// failed.
    async fn request(&self, connection: &mut Option<Connection>, due: Due) -> bool {
        let request = self.requests.borrow_mut().next();
        let leaves_after = match self.manner {
            Manner::Leave => 1 + self.chance.borrow_mut().below(LEAVES_AFTER) as u64,
            _ => u64::MAX,
        };
        let mut exchange = Exchange::new(&request, self.streams, leaves_after);
        let mut end = self.attempt(connection, &mut exchange, due).await;
        if let (Err(failure), Some(kept)) = (&end, &*connection)
            && kept.was_stale(failure, &exchange)
        {
            *connection = None;
            exchange = Exchange::new(&request, self.streams, leaves_after);
            end = self.attempt(connection, &mut exchange, due).await;
        }
        let keeps = matches!(end, Ok(End::Whole))
            && matches!(self.manner, Manner::Keep | Manner::Hold)
            && connection.as_ref().is_some_and(|kept| kept.keeps(&exchange));
        if !keeps {
            *connection = None;
        }
        let failed = end.is_err();
        if due.measured {
            self.count(&exchange, due, end);
        }
        failed
    }

    async fn attempt(
        &self,
        connection: &mut Option<Connection>,
        exchange: &mut Exchange<'_>,
        due: Due,
    ) -> Result<End, Failure> {
        if connection.is_none() {
            *connection = Some(Connection::open(self.address).await?);
        }
        let Some(kept) = connection else { return Err(Failure::NoAnswer) };
        let seen = |delay_ns| {
            if due.measured {
                self.tally.borrow_mut().event_delay.record(delay_ns);
            }
        };
        kept.exchange(exchange, seen).await
    }

    fn count(&self, exchange: &Exchange<'_>, due: Due, end: Result<End, Failure>) {
        let now_ns = now_ns();
        let mut tally = self.tally.borrow_mut();
        tally.last_ns = now_ns;
        tally.bytes_sent += exchange.sent() as u64;
        tally.bytes_received += exchange.received();
        tally.events += exchange.events();
        if let Some(first_ns) = exchange.first_event_ns {
            tally.first_event.record(first_ns - due.at_ns);
        }
        match end {
            Ok(End::Whole) => tally.whole += 1,
            Ok(End::Left) => tally.aborted += 1,
            Err(failure) => return tally.fail(1, || failure.to_string()),
        }
        tally.latency.record(now_ns - due.at_ns);
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
