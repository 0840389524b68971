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

    /// Sends one request, on the connection that is kept if there is one, and counts what it came to. Returns whether it failed.
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
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        task::LocalSet,
    };

    use super::*;
    use crate::{
        schedule::Arrivals,
        workload::{Asked, Workload},
    };

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    const LONG: Duration = Duration::from_secs(30);
    const HOUR_NS: u64 = 3_600_000_000_000;

    /// A worker of which each connection is served by `serve`; how many there were is counted.
    async fn worker<F: Future<Output = io::Result<()>> + 'static>(
        serve: impl Fn(TcpStream) -> F + 'static,
    ) -> (SocketAddr, Rc<Cell<usize>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let count = Rc::new(Cell::new(0));
        let counted = count.clone();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.set(counted.get() + 1);
                spawn_local(serve(stream));
            }
        });
        (address, count)
    }

    /// Reads one request whose body is whole when a closing brace ends what came.
    async fn request(stream: &mut TcpStream) -> io::Result<()> {
        let mut received = Vec::new();
        while !received.ends_with(b"}") {
            if stream.read_buf(&mut received).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Answers one request after the other.
    async fn answer_all(mut stream: TcpStream) -> io::Result<()> {
        loop {
            request(&mut stream).await?;
            stream.write_all(ANSWER).await?;
        }
    }

    fn run(name: &str, address: SocketAddr, most: usize, requests: u64, rate: Option<f64>) -> Rc<Run> {
        let workload = Workload::named(name).unwrap();
        let asked = Asked { models: vec!["m".to_owned()], seed: 1, events: 20, gap_ms: 0 };
        let now_ns = now_ns();
        let arrivals = rate.map(|rate| Arrivals::new(now_ns, rate, None));
        let schedule = Schedule::new(arrivals, now_ns, now_ns + HOUR_NS, requests);
        let what = (address, workload.streams, workload.manner);
        Run::new(what, most, workload.requests(address, &asked), schedule, Chance::new(1))
    }

    fn block_on(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn a_closed_loop_uses_its_connections_again() {
        block_on(async {
            let (address, connections) = worker(answer_all).await;
            let run = run("small-json", address, 4, 100, None);
            run.drive(LONG).await.unwrap();
            let tally = run.tally.borrow();
            assert_eq!((tally.whole, tally.failed, &tally.first_failure), (100, 0, &None));
            assert_eq!(tally.bytes_received, 100 * ANSWER.len() as u64);
            assert_eq!(connections.get(), 4);
        });
    }

    #[test]
    fn churn_opens_a_connection_for_each_request() {
        block_on(async {
            let (address, connections) = worker(answer_all).await;
            let run = run("churn", address, 4, 20, None);
            run.drive(LONG).await.unwrap();
            assert_eq!((run.tally.borrow().whole, connections.get()), (20, 20));
        });
    }

    #[test]
    fn an_open_loop_opens_no_more_connections_than_it_may() {
        block_on(async {
            let (address, connections) = worker(answer_all).await;
            let run = run("small-json", address, 3, 500, Some(100_000.0));
            run.drive(LONG).await.unwrap();
            assert_eq!((run.tally.borrow().whole, run.tally.borrow().failed), (500, 0));
            assert!((1..=3).contains(&connections.get()), "{}", connections.get());
        });
    }

    #[test]
    fn a_kept_connection_that_was_closed_is_no_failure() {
        block_on(async {
            let close = async |mut stream: TcpStream| {
                request(&mut stream).await?;
                stream.write_all(ANSWER).await
            };
            let (address, connections) = worker(close).await;
            let run = run("small-json", address, 2, 20, None);
            run.drive(LONG).await.unwrap();
            let tally = run.tally.borrow();
            assert_eq!((tally.whole, tally.failed, &tally.first_failure), (20, 0, &None));
            assert_eq!(connections.get(), 20);
        });
    }

    #[test]
    fn what_waited_for_a_connection_counts_from_when_it_was_due() {
        block_on(async {
            // the only connection stalls until the last request has long been due
            let released = Rc::new(Cell::new(0));
            let last_ns = now_ns() + 60_000_000;
            let telling = released.clone();
            let stall = move |mut stream: TcpStream| {
                let released = telling.clone();
                async move {
                    request(&mut stream).await?;
                    Timer::new()?.until(last_ns).await?;
                    released.set(now_ns());
                    stream.write_all(ANSWER).await?;
                    answer_all(stream).await
                }
            };
            let (address, _) = worker(stall).await;
            let run = run("small-json", address, 1, 10, Some(1000.0));
            let last_due_ns = run.schedule.borrow().next_ns().unwrap() + 9_000_000;
            run.drive(LONG).await.unwrap();
            let tally = run.tally.borrow();
            assert_eq!((tally.whole, tally.failed), (10, 0));
            let least_ns = released.get().saturating_sub(last_due_ns);
            let shortest_ns = tally.latency.percentile_ns(0.0);
            assert!(shortest_ns + shortest_ns / 100 >= least_ns, "{shortest_ns} is less than {least_ns}");
        });
    }

    #[test]
    fn what_is_refused_has_failed() {
        block_on(async {
            let refuse = async |mut stream: TcpStream| {
                request(&mut stream).await?;
                stream.write_all(b"HTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\noops").await
            };
            let (address, _) = worker(refuse).await;
            let refused = run("small-json", address, 2, 4, None);
            refused.drive(LONG).await.unwrap();
            let tally = refused.tally.borrow();
            assert_eq!((tally.whole, tally.failed), (0, 4));
            assert_eq!(tally.first_failure.as_deref(), Some("status 500: oops"));
        });
    }

    #[test]
    fn what_is_never_answered_and_what_is_never_sent_has_failed() {
        block_on(async {
            let (address, _) = worker(async |mut stream: TcpStream| {
                request(&mut stream).await?;
                std::future::pending().await
            })
            .await;
            let silent = run("small-json", address, 2, 10, Some(1e6));
            silent.drive(Duration::from_millis(50)).await.unwrap();
            assert_eq!((silent.tally.borrow().whole, silent.tally.borrow().failed), (0, 10));
        });
    }

    #[test]
    fn a_client_that_leaves_is_neither_whole_nor_a_failure() {
        block_on(async {
            let endless = async |mut stream: TcpStream| {
                request(&mut stream).await?;
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                loop {
                    stream.write_all(b"data: {}\n\n").await?;
                }
            };
            let (address, connections) = worker(endless).await;
            let run = run("abort", address, 4, 12, None);
            run.drive(LONG).await.unwrap();
            let tally = run.tally.borrow();
            assert_eq!((tally.aborted, tally.whole, tally.failed), (12, 0, 0));
            assert!(tally.events >= 12 && !tally.first_event.is_empty());
            assert_eq!(connections.get(), 12);
        });
    }
}
