//! Clients that go away, and clients that do not read.
//!
//! The goal is 100 ms from the client's close to the worker's; a busy machine may take longer, so these tests
//! only insist that it happens by itself, while the worker sends nothing and the client sends nothing, and that
//! it does not take as long as any time limit of the proxy.

use std::time::{Duration, Instant};

use crate::support::{
    Client, Gate, client, eventually, patience, proxy, script, sse_event, tick, variants, worker,
    worker::sse_head,
};

/// Ten times the goal, for machines that do ten things at once.
const SOON: Duration = Duration::from_millis(1000);

/// How a client goes.
#[derive(Debug, Clone, Copy)]
enum Way {
    Close,
    Reset,
    HalfClose,
}

/// Ends the client; a half-closed one is given back, to be kept open.
fn go(mut client: Client, way: Way) -> Option<Client> {
    match way {
        Way::Close => drop(client),
        Way::Reset => client.reset(),
        Way::HalfClose => {
            client.half_close();
            return Some(client);
        }
    }
    None
}

const WAYS: [Way; 3] = [Way::Close, Way::Reset, Way::HalfClose];

variants! {
    fn a_client_that_goes_while_it_waits_takes_its_request_with_it(v: Variant) {
        for way in WAYS {
            let gate = Gate::new();
            let worker = worker().holds(&gate).start();
            let proxy = proxy(v).worker(&worker).start();
            let mut client = proxy.client();
            client.send(client::post("/v1/chat/completions", client::chat("m")));
            eventually("the worker has it", || gate.waiting() == 1);
            let went = Instant::now();
            let kept = go(client, way);
            let gone = eventually("the worker is let go", || worker.only_request().gone);
            assert!(gone - went < SOON, "{way:?} took {:?}", gone - went);
            assert_eq!(worker.requests().len(), 1, "{way:?}: it was retried");
            assert!(proxy.usable_workers().contains(&worker.url()), "{way:?}: the worker was blamed");
            drop(kept);
        }
    }

    fn a_client_that_goes_while_it_streams_takes_its_request_with_it(v: Variant) {
        for way in WAYS {
            let gate = Gate::new();
            let events = script().send(sse_head()).send(sse_event("one")).wait(&gate);
            let worker = worker().on("/v1/chat/completions", events).start();
            let proxy = proxy(v).worker(&worker).start();
            let mut client = proxy.client();
            client.send(client::post("/v1/chat/completions", client::chat_stream("m")));
            client.read_until("\"one\"");
            client.read_until("\r\n");
            eventually("the worker holds the next event", || gate.waiting() == 1);
            let went = Instant::now();
            let kept = go(client, way);
            let gone = eventually("the worker is let go", || worker.only_request().gone);
            assert!(gone - went < SOON, "{way:?} took {:?}", gone - went);
            drop(kept);
        }
    }

    fn a_client_that_goes_while_it_uploads_takes_its_request_with_it(v: Variant) {
        for way in WAYS {
            let worker = worker().on("/up", script().early().read_body()).start();
            let proxy = proxy(v).worker(&worker).arg("--body-peek-bytes", "1000").start();
            for chunked in [false, true] {
                worker.forget();
                let mut client = proxy.client();
                let framing = if chunked { "Transfer-Encoding: chunked\r\n\r\n7a120\r\n" } else { "Content-Length: 500000\r\n\r\n" };
                client.send(format!("POST /up HTTP/1.1\r\nHost: a\r\n{framing}")).send(crate::compat::noise(200_000));
                eventually("the worker has the first part", || {
                    worker.requests().pop().is_some_and(|got| got.body.len() > 100_000)
                });
                let went = Instant::now();
                let kept = go(client, way);
                let gone = eventually("the worker is let go", || worker.only_request().gone);
                assert!(gone - went < SOON, "{way:?} took {:?}", gone - went);
                assert!(!worker.only_request().complete, "{way:?}: a cut upload was finished");
                drop(kept);
            }
        }
    }

    fn a_client_that_goes_before_its_body_is_there_never_reaches_a_worker(v: Variant) {
        let workers = [worker().model("a").start(), worker().model("b").start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{\"model\":\"a\"");
        drop(client);
        for _ in 0..10 {
            proxy.client().chat("a").expect(200);
        }
        assert_eq!(workers[0].requests().len(), 10);
        assert!(workers[0].requests().iter().all(|got| got.complete));
    }

    fn a_client_that_goes_after_pipelining_takes_all_with_it(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let one = client::post("/v1/chat/completions", client::chat("m"));
        client.send([&one[..], &one, &one].concat());
        eventually("the worker has the first", || gate.waiting() >= 1);
        client.reset();
        eventually("nobody waits any more", || gate.waiting() == 0);
        proxy.get("/health").expect(200);
        assert!(worker.requests().iter().all(|got| got.gone.is_some()), "{:#?}", worker.requests());
    }

    fn a_stalled_reader_stalls_the_worker(v: Variant) {
        const TOTAL: u64 = 300 << 20;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {TOTAL}\r\n\r\n");
        let worker = worker().on("/big", script().send(head).flood(TOTAL)).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = Client::connect_with_small_buffer(proxy.addr(), 16 << 10);
        client.send(client::request("GET", "/big", "", b""));
        client.read_until("\r\n\r\n");
        let stalled_at = settled(|| worker.sent_bytes());
        assert!(stalled_at < 32 << 20, "{stalled_at} bytes were taken for a client that does not read");
        // others are not held up meanwhile
        for _ in 0..4 {
            proxy.client().chat("m").expect(200);
        }
        // and it goes on when the client does
        let mut read = client.buffer.len() as u64;
        client.buffer.clear();
        while read < stalled_at + (16 << 20) {
            read += client.fill(patience()).expect("the stream goes on") as u64;
            client.buffer.clear();
            client.seen.clear();
        }
        let went = Instant::now();
        client.reset();
        let gone = eventually("the worker is let go", || worker.requests().first().and_then(|got| got.gone));
        assert!(gone - went < SOON, "{:?}", gone - went);
    }

    fn a_stalled_reader_that_goes_lets_the_worker_go(v: Variant) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 300000000\r\n\r\n";
        let worker = worker().on("/big", script().send(head).flood(300_000_000)).start();
        let proxy = proxy(v).worker(&worker).start();
        for way in [Way::Reset, Way::Close] {
            worker.forget();
            let mut client = Client::connect_with_small_buffer(proxy.addr(), 16 << 10);
            client.send(client::request("GET", "/big", "", b""));
            client.read_until("\r\n\r\n");
            settled(|| worker.sent_bytes());
            let went = Instant::now();
            go(client, way);
            let gone = eventually("the worker is let go", || worker.only_request().gone);
            assert!(gone - went < SOON, "{way:?} took {:?}", gone - went);
        }
    }

    fn a_stalled_worker_stalls_the_uploading_client(v: Variant) {
        let gate = Gate::new();
        let worker = worker().on("/up", script().early().wait(&gate).read_body().send(crate::support::json_answer("{}"))).start();
        let proxy = proxy(v).worker(&worker).start();
        const TOTAL: usize = 64 << 20;
        let addr = proxy.addr();
        let sent = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counter = sent.clone();
        let sender = std::thread::spawn(move || {
            let mut client = Client::connect(addr);
            client.send(format!("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: {TOTAL}\r\n\r\n"));
            let piece = vec![b'x'; 1 << 20];
            for _ in 0..TOTAL >> 20 {
                client.send(&piece);
                counter.fetch_add(1 << 20, std::sync::atomic::Ordering::Relaxed);
            }
            client.response().expect(200);
        });
        eventually("the upload has begun", || gate.waiting() == 1);
        let stalled_at = settled(|| sent.load(std::sync::atomic::Ordering::Relaxed));
        assert!(stalled_at < 40 << 20, "{stalled_at} bytes were taken for a worker that does not read");
        gate.open();
        sender.join().unwrap();
        assert_eq!(worker.only_request().body.len(), TOTAL);
    }
}

/// The count that `look` has come to once it grows by less than 64 KiB in 300 ms: against a full window the
/// kernel still pushes a few hundred bytes with every probe.
fn settled(look: impl Fn() -> u64) -> u64 {
    let deadline = Instant::now() + patience();
    let (mut count, mut since) = (look(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        assert!(Instant::now() < deadline, "it never settles; {count} by now");
        tick();
        let now = look();
        if now < 1 << 20 || now > count + (64 << 10) {
            (count, since) = (now, Instant::now());
        }
    }
    count
}
