//! One test per bug that was found and fixed, named after what went wrong.

#![expect(unsafe_code, reason = "a limit is set between fork and exec")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::process::CommandExt,
};

use crate::support::{
    Client, End, Gate, binary, client, eventually, patience, proxy, script, variants, worker,
};

variants! {
    /// While an upload waits for a worker that does not read, no read on the client was armed.
    fn a_client_is_missed_though_its_upload_has_stalled(v: Variant) {
        let gate = Gate::new();
        let stalled = worker().on("/up", script().early().wait(&gate)).start();
        let proxy = proxy(v).worker(&stalled).start();
        for _ in 0..2 {
            let mut client = Client::connect(proxy.addr());
            client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n");
            client.send_until_stalled();
            eventually("it is in flight", || proxy.metric("vllm_proxy_worker_in_flight") == Some(1.0));
            client.reset();
            eventually("nothing is in flight any more", || {
                proxy.metric("vllm_proxy_worker_in_flight") == Some(0.0)
            });
        }
        gate.open();
    }

    /// What was pipelined filled the room for it, and then no read on the client was armed.
    fn a_client_that_pipelines_much_is_missed_when_it_goes(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).start();
        let one = client::post("/v1/chat/completions", client::chat("m"));
        let mut client = proxy.client();
        // more than is read ahead; but what does not fit into the socket would keep the end of the connection back
        client.send(one.repeat(50_000 / one.len()));
        eventually("the worker has the first", || gate.waiting() == 1);
        drop(client);
        eventually("nobody waits any more", || gate.waiting() == 0);
    }

    /// The end of the connection is the end of the answer for HTTP/1.0, so a broken answer looked complete.
    fn an_answer_that_breaks_off_looks_broken_to_http10(v: Variant) {
        let gate = Gate::new();
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let broken = script().send(head).send("5\r\nhello\r\n").wait(&gate).close();
        let worker = worker().on("/b", broken).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send("GET /b HTTP/1.0\r\n\r\n");
        client.read_until("hello");
        gate.open();
        let end = std::iter::repeat_with(|| client.fill(patience())).find_map(Result::err);
        assert!(matches!(end, Some(End::Reset)), "{end:?}");
    }

    /// Every WebSocket was counted as a client that went away.
    fn a_tunnel_that_its_client_ends_is_no_failure(v: Variant) {
        let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
        let worker = worker().on("/v1/realtime", script().send(switch).tunnel()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send("GET /v1/realtime HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n");
        assert_eq!(client.response().status, 101);
        drop(client);
        let count = |code| proxy.metric(&format!("vllm_proxy_requests_total{{endpoint=\"/v1/realtime\",code=\"{code}\"}}"));
        eventually("it is counted", || count("1xx") == Some(1.0));
        assert_eq!(count("499"), Some(0.0));
    }

    /// A line end behind a body was taken for the beginning of a request, and answered 408.
    fn a_stray_line_end_is_no_request(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--head-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.chat("m").expect(200);
        client.send("\r\n");
        client.expect_closed();
    }
}

/// Room for a whole body was taken on the word of its Content-Length, and an allocation that fails aborts.
#[test]
fn a_declared_length_alone_takes_no_memory() {
    let workers = [worker().model("a").start(), worker().model("b").start()];
    let urls = format!("{},{}", workers[0].url(), workers[1].url());
    let limit = libc::rlimit { rlim_cur: 2 << 30, rlim_max: 2 << 30 };
    let flags = ["--threads", "1", "--max-body-bytes", "1099511627776", "--worker-urls", &urls];
    let (mut child, addr) = binary(&flags, |command| {
        // SAFETY: between fork and exec only one system call is made, on memory that was made before.
        unsafe { command.pre_exec(move || limit_memory(&limit)) };
    });

    let mut greedy = TcpStream::connect(addr).unwrap();
    greedy
        .write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n{")
        .unwrap();
    for _ in 0..3 {
        let mut other = TcpStream::connect(addr).unwrap();
        other.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        other.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    assert!(child.0.try_wait().unwrap().is_none(), "the proxy has ended");
}

fn limit_memory(limit: &libc::rlimit) -> std::io::Result<()> {
    // SAFETY: the limit outlives the call.
    match unsafe { libc::setrlimit(libc::RLIMIT_AS, limit) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
