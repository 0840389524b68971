//! Draining: what runs is finished, nothing new is taken, and then it is over.

use std::{
    net::TcpStream,
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use crate::support::{
    Client, Ended, Gate, Io, Log, Variant, Worker, binary_with_log, client, eventually, patience, proxy,
    script, sse_event, variants, worker,
    worker::{sse_end, sse_head},
};

fn streaming_worker(gate: &Gate) -> Worker {
    let events =
        script().send(sse_head()).send(sse_event("one")).wait(gate).send(sse_event("two")).send(sse_end());
    worker().on("/v1/chat/completions", events).start()
}

variants! {
    fn draining_finishes_what_runs_and_takes_nothing_new(v: Variant) {
        let gate = Gate::new();
        let worker = streaming_worker(&gate);
        let proxy = proxy(v).worker(&worker).arg("--shutdown-grace-secs", "60").start();
        let mut running = proxy.client();
        running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        running.read_until("\"one\"");
        let mut idle = proxy.client();
        idle.get("/health").expect(200);
        let addr = proxy.addr();
        proxy.drain();
        idle.expect_closed();
        eventually("new connections are refused", || TcpStream::connect(addr).is_err());
        assert_eq!(gate.waiting(), 1, "the running stream was cut");
        gate.open();
        running.read_until("\"two\"");
        running.read_until("0\r\n\r\n");
        running.expect_closed();
        proxy.wait();
    }

    fn draining_ends_at_once_when_nothing_runs(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--shutdown-grace-secs", "3600").start();
        let mut idle = proxy.client();
        idle.chat("m").expect(200);
        proxy.drain();
        proxy.drain();
        proxy.wait();
        idle.expect_closed();
    }

    fn what_outlives_the_grace_period_is_let_go_even_when_the_process_lives_on(v: Variant) {
        let gate = Gate::new();
        let worker = streaming_worker(&gate);
        let proxy = proxy(v).worker(&worker).arg("--shutdown-grace-secs", "1").start();
        let mut running = proxy.client();
        running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        running.read_until("\"one\"");
        proxy.drain();
        proxy.wait();
        eventually("the worker is let go", || worker.only_request().gone.is_some());
        while running.fill(patience()).is_ok() {}
    }

    fn the_last_answer_while_draining_says_close(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--shutdown-grace-secs", "60").start();
        let mut client = proxy.client();
        client.send(client::post("/v1/chat/completions", client::chat("m")));
        eventually("it runs", || gate.waiting() == 1);
        proxy.drain();
        let addr = proxy.addr();
        eventually("new connections are refused", || TcpStream::connect(addr).is_err());
        gate.open();
        let answer = client.response().expect(200);
        assert_eq!(answer.completion(), "ok");
        let connection = answer.header("connection").map(|value| value.to_lowercase());
        assert_eq!(connection.as_deref(), Some("close"), "{answer}");
        client.expect_closed();
        proxy.wait();
    }

    fn the_binary_drains_on_sigterm_and_exits_0(v: Variant) {
        for signal in ["-TERM", "-INT"] {
            let gate = Gate::new();
            let worker = streaming_worker(&gate);
            let mut binary = Binary::start(v, &worker);
            let mut running = Client::connect(binary.addr);
            running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
            running.read_until("\"one\"");
            binary.kill(signal);
            let addr = binary.addr;
            eventually("new connections are refused", || TcpStream::connect(addr).is_err());
            assert_eq!(binary.child.0.try_wait().unwrap(), None, "it did not wait for the stream");
            gate.open();
            running.read_until("0\r\n\r\n");
            let status = binary.exit();
            assert_eq!(status.code(), Some(0), "{signal}: {status}");
        }
    }

    fn p1_who_has_no_answer_when_the_grace_period_is_over_is_told_why(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let more = ["--shutdown-grace-secs", "1", "--max-concurrent-requests", "1"];
        let proxy = more.chunks(2).fold(proxy(v).worker(&worker), |proxy, pair| proxy.arg(pair[0], pair[1])).start();
        let [mut running, mut waiting, mut sending] = [(); 3].map(|()| proxy.client());
        running.send(client::post("/v1/chat/completions", client::chat("m")));
        eventually("it runs", || gate.waiting() == 1);
        waiting.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        sending.send("POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{");
        eventually("all are there", || {
            // and the request for the metrics
            proxy.metric("vllm_proxy_requests_in_flight").is_some_and(|count| count >= 4.0)
        });
        proxy.drain();
        proxy.wait();
        for client in [&mut running, &mut waiting, &mut sending] {
            let answer = client.response().expect(503);
            assert!(answer.text().contains("shutting down"), "{answer}");
            assert!(answer.header("retry-after").is_some(), "{answer}");
            client.expect_closed();
        }
        // who waited may have been let in by one shard before the other was told of the end
        eventually("the worker is let go", || worker.requests().iter().all(|request| request.gone.is_some()));
    }

    fn what_outlives_the_grace_period_is_cut(v: Variant) {
        let gate = Gate::new();
        let worker = streaming_worker(&gate);
        let mut binary = Binary::start_with_grace(v, &worker, "1");
        let mut running = Client::connect(binary.addr);
        running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        running.read_until("\"one\"");
        binary.kill("-TERM");
        let status = binary.exit();
        assert_eq!(status.code(), Some(0), "{status}");
        eventually("the worker is let go", || worker.only_request().gone.is_some());
        while running.fill(patience()).is_ok() {}
        let seen = running.seen.escape_ascii().to_string();
        assert!(!seen.ends_with("0\\r\\n\\r\\n") || seen.contains("error"), "the cut stream looks finished: {seen}");
    }

    fn the_second_signal_ends_the_binary_at_once(v: Variant) {
        let gate = Gate::new();
        let worker = streaming_worker(&gate);
        let mut binary = Binary::start(v, &worker);
        let mut running = Client::connect(binary.addr);
        running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        running.read_until("\"one\"");
        binary.kill("-TERM");
        let addr = binary.addr;
        eventually("it drains", || TcpStream::connect(addr).is_err());
        let second = Instant::now();
        // one that comes within a second is the first one again
        eventually("it has ended", || {
            binary.try_kill("-TERM");
            binary.child.0.try_wait().unwrap()
        });
        assert!(second.elapsed() < Duration::from_secs(10), "{:?}", second.elapsed());
        eventually("the worker is let go", || worker.only_request().gone.is_some());
    }
}

variants! {
    fn p10_a_doubled_signal_is_one(v: Variant) {
        let gate = Gate::new();
        let worker = streaming_worker(&gate);
        let mut binary = Binary::start(v, &worker);
        let mut running = Client::connect(binary.addr);
        running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        running.read_until("\"one\"");
        let twice = format!("kill -TERM {0}; kill -INT {0}; kill -TERM {0}", binary.child.0.id());
        assert!(Command::new("sh").args(["-c", &twice]).status().unwrap().success());
        let addr = binary.addr;
        eventually("new connections are refused", || TcpStream::connect(addr).is_err());
        assert_eq!(binary.child.0.try_wait().unwrap(), None, "it did not wait for the stream");
        gate.open();
        running.read_until("0\r\n\r\n");
        let status = binary.exit();
        assert_eq!(status.code(), Some(0), "{status}");
    }

    fn p10_storms_of_other_signals_end_nothing(v: Variant) {
        let gate = Gate::new();
        let worker = streaming_worker(&gate);
        let mut binary = Binary::start(v, &worker);
        let mut running = Client::connect(binary.addr);
        running.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        running.read_until("\"one\"");
        let storm = "for n in $(seq 200); do kill -HUP $0; kill -USR1 $0; kill -USR2 $0; done";
        let storm = |pid: u32| Command::new("sh").args(["-c", storm, &pid.to_string()]).status().unwrap();
        assert!(storm(binary.child.0.id()).success());
        Client::connect(binary.addr).get("/health").expect(200);
        eventually("it is told once", || binary.log.lines_with("SIGHUP").len() == 1);
        binary.kill("-TERM");
        let addr = binary.addr;
        eventually("new connections are refused", || TcpStream::connect(addr).is_err());
        assert!(storm(binary.child.0.id()).success());
        gate.open();
        running.read_until("0\r\n\r\n");
        let status = binary.exit();
        assert_eq!(status.code(), Some(0), "{status}");
        assert_eq!(binary.log.lines_with("SIGHUP").len(), 1);
    }
}

/// The real program, as a process of its own; killed when dropped.
struct Binary {
    child: Ended,
    addr: std::net::SocketAddr,
    log: Log,
}

impl Binary {
    fn start(variant: Variant, worker: &Worker) -> Self {
        Self::start_with_grace(variant, worker, "60")
    }

    fn start_with_grace(variant: Variant, worker: &Worker, seconds: &str) -> Self {
        let io = if variant.io == Io::Uring { "uring" } else { "epoll" };
        let (threads, url) = (variant.shards.to_string(), worker.url());
        let flags = ["--no-pin", "--io", io, "--threads", &threads, "--shutdown-grace-secs", seconds];
        let program = Command::new(env!("CARGO_BIN_EXE_vllm-proxy"));
        let (child, addr, log) =
            binary_with_log(program, &[&flags[..], &["--worker-urls", &url]].concat(), |_| ());
        Self { child, addr, log }
    }

    fn kill(&self, signal: &str) {
        assert!(self.try_kill(signal), "it has ended already");
    }

    /// Whether there was a process to send it to.
    fn try_kill(&self, signal: &str) -> bool {
        Command::new("kill").args([signal, &self.child.0.id().to_string()]).status().unwrap().success()
    }

    fn exit(&mut self) -> ExitStatus {
        eventually("the binary has ended", || self.child.0.try_wait().unwrap())
    }
}
