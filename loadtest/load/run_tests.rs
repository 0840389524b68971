//! Runs against workers that follow a script.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

use super::*;
use crate::{bodies::Asked, schedule::Arrivals, workload::Workload};

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
