//! The harness itself, without a proxy: a client that talks to a mock worker directly.

use crate::support::{Client, Gate, client, eventually, script, sse_event, worker};

#[test]
fn a_worker_answers_like_vllm_and_remembers_what_it_got() {
    let worker = worker().model("m").streams(["he", "llo"]).start();
    let mut client = Client::connect(worker.addr());
    assert_eq!(client.chat("m").expect(200).completion(), "hello");
    let streamed = client.post("/v1/chat/completions", client::chat_stream("m")).expect(200);
    assert_eq!(streamed.completion(), "hello");
    assert_eq!(streamed.chunks.len(), 3);
    assert_eq!(worker.requests().len(), 2);
    assert_eq!(worker.connections(), 1);
    assert_eq!(worker.requests()[1].nth, 1);
}

#[test]
fn a_worker_notices_that_its_peer_has_gone_while_it_waits() {
    let gate = Gate::new();
    let worker = worker().on("/x", script().wait(&gate).send(sse_event("late"))).start();
    let mut client = Client::connect(worker.addr());
    client.send(client::post("/x", "{}"));
    eventually("the worker waits", || gate.waiting() == 1);
    drop(client);
    eventually("the worker has noticed", || worker.only_request().gone.is_some());
}

#[test]
fn a_worker_refuses_and_reports_what_is_not_http() {
    for bytes in [
        "GET / HTTP/1.1\r\nHost: a\r\nFoo : b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\nFoo: b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nKeep-Alive: 5\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
    ] {
        let worker = worker().may_be_sent_nonsense().start();
        let mut client = Client::connect(worker.addr());
        client.send(bytes);
        eventually("the worker has complained", || worker.malformed().len() == 1);
        assert!(worker.complete_requests().is_empty(), "{bytes:?}");
    }
}

#[test]
fn a_worker_that_goes_down_refuses_and_comes_back_at_the_same_place() {
    let worker = worker().start();
    worker.go_down();
    assert!(std::net::TcpStream::connect(worker.addr()).is_err());
    worker.come_back();
    Client::connect(worker.addr()).chat("m").expect(200);
}

#[test]
fn bytes_that_come_one_by_one_are_the_same_request() {
    let worker = worker().echo().start();
    let mut client = Client::connect(worker.addr());
    let request = "POST /e HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n1\r\nd\r\n0\r\nT: u\r\n\r\n";
    assert!(client.send_bytewise(request.as_bytes()));
    assert_eq!(client.response().expect(200).body, b"abcd");
    let got = worker.only_request();
    assert_eq!((got.chunks, got.trailers), (vec![3, 1], vec!["T: u".to_owned()]));
}
