//! Streamed answers come event by event, as they are made.

use crate::support::{
    Gate, client, eventually, proxy, script, sse_event, variants, worker,
    worker::{sse_end, sse_head},
};

variants! {
    fn a_streamed_completion_comes_byte_for_byte(v: Variant) {
        let worker = worker().streams(["he", "ll", "o"]).start();
        let proxy = proxy(v).worker(&worker).start();
        let direct = client::Client::connect(worker.addr()).post("/v1/chat/completions", client::chat_stream("m"));
        let mut client = proxy.client();
        for _ in 0..3 {
            let answer = client.post("/v1/chat/completions", client::chat_stream("m")).expect(200);
            assert_eq!(answer.completion(), "hello");
            assert_eq!(answer.raw_body.escape_ascii().to_string(), direct.raw_body.escape_ascii().to_string());
            assert_eq!(answer.chunks.len(), 4);
            assert_eq!(answer.head.escape_ascii().to_string(), direct.head.escape_ascii().to_string());
        }
    }

    fn an_event_reaches_the_client_while_the_worker_holds_the_next(v: Variant) {
        let gates: Vec<Gate> = (0..5).map(|_| Gate::new()).collect();
        let mut script = script().wait(&gates[0]).send(sse_head());
        for (number, gate) in gates[1..].iter().enumerate() {
            script = script.wait(gate).send(sse_event(&format!("piece {number}")));
        }
        let worker = worker().on("/v1/chat/completions", script.send(sse_end())).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        worker.wait_for_requests(1);
        gates[0].open();
        // not even the head waits for the first event
        let head = client.read_until("\r\n\r\n");
        assert!(head.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", head.escape_ascii());
        for (number, gate) in gates[1..].iter().enumerate() {
            eventually("the worker holds the next event", || gate.waiting() == 1);
            gate.open();
            let event = client.read_until("\n\n\r\n");
            assert_eq!(event.escape_ascii().to_string(), sse_event(&format!("piece {number}")).escape_ascii().to_string());
        }
        client.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
        assert_eq!(client.chat("m").status, 200, "the connection goes on");
    }

    fn an_event_reaches_a_client_of_1_0_while_the_worker_holds_the_next(v: Variant) {
        let gate = Gate::new();
        let events = script().send(sse_head()).send(sse_event("one")).wait(&gate).send(sse_end());
        let worker = worker().on("/v1/chat/completions", events).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let body = client::chat_stream("m");
        client.send(format!("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        let seen = String::from_utf8(client.read_until("\n\n")).unwrap();
        assert!(seen.contains("\"content\":\"one\""), "{seen}");
        gate.open();
        assert_eq!(client.read_until("[DONE]\n\n"), b"data: [DONE]\n\n");
        client.expect_closed();
    }

    fn events_split_at_every_byte_and_events_glued_together_are_the_same_stream(v: Variant) {
        let events = [sse_event("a"), sse_event("\u{1f999}"), sse_event("b"), sse_end()].concat();
        let split = script().send(sse_head()).send_bytewise(&events);
        let glued = script().send([sse_head().as_bytes(), &events].concat());
        let worker = worker().on("/split", split).on("/glued", glued).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for target in ["/split", "/glued", "/split"] {
            let answer = client.post(target, client::chat_stream("m")).expect(200);
            assert!(answer.raw_body == events, "{target}: {answer}");
        }
    }

    fn many_streams_at_once_do_not_mix(v: Variant) {
        let gate = Gate::new();
        let held = gate.clone();
        let worker = worker().on_request("/v1/chat/completions", move |request| {
            let who = request.json()["who"].as_str().unwrap_or_default().to_owned();
            let mut events = script().send(sse_head()).send(sse_event(&format!("{who}:"))).wait(&held);
            for _ in 0..50 {
                events = events.send(sse_event(&who));
            }
            events.send(sse_end())
        }).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut clients: Vec<_> = (0..16).map(|_| proxy.client()).collect();
        for (number, client) in clients.iter_mut().enumerate() {
            client.send(client::post("/v1/chat/completions", format!(r#"{{"model":"m","stream":true,"who":"{number}"}}"#)));
        }
        eventually("all sixteen run", || gate.waiting() == 16);
        gate.open();
        for (number, client) in clients.iter_mut().enumerate() {
            let said = client.response().expect(200).completion();
            assert_eq!(said, format!("{number}:{}", number.to_string().repeat(50)));
        }
    }
}
