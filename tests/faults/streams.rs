//! Answers that break after they have begun: a stream of events is told, anything else is left without an end.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Client, End, Gate, Proxy, Response, client, eventually, proxy, script, sse_event, variants, worker,
    worker::{chunk, sse_end, sse_head},
};

const CHAT: &str = "/v1/chat/completions";

/// An event of a stream: its name, if it has one, and its data.
type Event = (Option<String>, String);

/// The events of a stream; what stands behind the last empty line must be nothing.
#[track_caller]
fn events(answer: &Response) -> Vec<Event> {
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.is_empty() || text.ends_with("\n\n"), "the last event is not complete: {answer}");
    let mut events = Vec::new();
    for block in text.split("\n\n").filter(|block| !block.trim().is_empty()) {
        let field = |name: &str| {
            block.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim_start().to_owned())
        };
        if let Some(data) = field("data:") {
            events.push((field("event:"), data));
        }
    }
    events
}

/// Asserts that `answer` is a complete stream which ends with vLLM's error event of this code and `[DONE]`.
#[track_caller]
fn assert_told(answer: &Response, code: u16) {
    assert!(answer.complete, "not ended cleanly: {answer}");
    let events = events(answer);
    let [.., (_, error), (_, done)] = &events[..] else { panic!("no two events: {answer}") };
    assert_eq!(done, "[DONE]", "{answer}");
    let error: Value = serde_json::from_str(error).unwrap_or_else(|why| panic!("{why} in {answer}"));
    let error = &error["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!(code), &json!("InternalServerError")), "{answer}");
    assert!(error["param"].is_null() && error["message"].is_string(), "{answer}");
}

#[track_caller]
fn assert_goes_on(client: &mut Client) {
    assert_eq!(client.chat("m").expect(200).completion(), "ok", "the connection does not go on");
}

fn broken(proxy: &Proxy, reason: &str) -> f64 {
    proxy.metric(&format!("vllm_proxy_broken_answers_total{{reason=\"{reason}\"}}")).unwrap()
}

/// A worker that streams when asked to and answers `ok` otherwise: these bytes, and then it ends the connection.
fn breaking(bytes: Vec<u8>, reset: bool) -> crate::support::Worker {
    worker()
        .on_request(CHAT, move |request| {
            if request.json()["stream"] != json!(true) {
                return script()
                    .send(crate::support::json_answer(r#"{"choices":[{"message":{"content":"ok"}}]}"#));
            }
            let script = script().send(&bytes);
            if reset { script.reset() } else { script.close() }
        })
        .start()
}

variants! {
    fn u4_a_stream_cut_between_events_ends_with_an_error_event(v: Variant) {
        let worker = breaking([sse_head().as_bytes(), &sse_event("one")].concat(), false);
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for round in 1..=3 {
            let answer = client.post(CHAT, client::chat_stream("m"));
            assert_told(&answer, 502);
            assert!(answer.raw_body.starts_with(&sse_event("one")), "what had come is gone: {answer}");
            assert_goes_on(&mut client);
            assert_eq!(broken(&proxy, "worker_broke"), f64::from(round));
        }
        let errors = format!("vllm_proxy_worker_transport_errors_total{{worker=\"{}\"}}", worker.url());
        assert_eq!(proxy.metric(&errors), Some(3.0), "the worker is not blamed");
    }

    fn u4_a_stream_that_is_reset_ends_with_an_error_event(v: Variant) {
        let gate = Gate::new();
        let events = script().send(sse_head()).send(sse_event("one")).wait(&gate).reset();
        let worker = worker().on("/v1/completions", events).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::post("/v1/completions", client::chat_stream("m")));
        eventually("it streams", || gate.waiting() == 1);
        gate.open();
        assert_told(&client.response(), 502);
        assert_goes_on(&mut client);
    }

    fn u4_a_stream_that_broke_before_its_first_event_is_told_as_well(v: Variant) {
        let gate = Gate::new();
        let worker = worker().on("/v1/completions", script().send(sse_head()).wait(&gate).close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::post("/v1/completions", client::chat_stream("m")));
        eventually("it streams", || gate.waiting() == 1);
        client.read_until("\r\n\r\n");
        gate.open();
        client.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
        assert_goes_on(&mut client);
    }

    fn u11_each_api_is_told_in_its_own_words(v: Variant) {
        let cut = || script().send(sse_head()).send(chunk("event: x\ndata: {}\n\n")).close();
        let worker = worker().on("/v1/messages", cut()).on("/v1/responses", cut()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let messages = client.post("/v1/messages", client::chat_stream("m")).expect(200);
        let (name, data) = events(&messages).pop().unwrap();
        let data: Value = serde_json::from_str(&data).unwrap();
        assert_eq!((name.as_deref(), &data["type"]), (Some("error"), &json!("error")), "{messages}");
        assert!(data["error"]["message"].is_string() && data["error"]["type"].is_string(), "{messages}");
        let responses = client.post("/v1/responses", r#"{"model":"m","input":"x","stream":true}"#).expect(200);
        let (name, data) = events(&responses).pop().unwrap();
        let data: Value = serde_json::from_str(&data).unwrap();
        assert_eq!((name.as_deref(), &data["type"], &data["code"]), (Some("error"), &json!("error"), &json!("502")), "{responses}");
        assert!(!messages.text().contains("[DONE]") && !responses.text().contains("[DONE]"));
        assert_goes_on(&mut client);
    }

    fn u11_a_stream_cut_at_any_byte_is_never_silently_short(v: Variant) {
        let whole = [sse_event("a"), chunk("data: {\"x\":\"\u{1f999}\"}"), chunk("\n\n"), sse_end()].concat();
        let stream = whole.clone();
        let worker = worker().on_request("*", move |request| {
            match request.path()[1..].parse::<usize>() {
                Ok(cut) => script().send([sse_head().as_bytes(), &stream[..cut]].concat()).close(),
                Err(_) => script().send(crate::support::json_answer(r#"{"choices":[{"text":"ok"}]}"#)),
            }
        }).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let done = memchr::memmem::find(&whole, b"data: [DONE]\n\n").unwrap() + 14;
        let (mut told, mut ended) = (0, 0);
        for cut in 0..whole.len() {
            let answer = client.post(&format!("/{cut}"), client::chat_stream("m"));
            if cut >= done {
                assert!(answer.complete, "{cut}: {answer}");
                assert_eq!(events(&answer).iter().filter(|(_, data)| data == "[DONE]").count(), 1, "{cut}: {answer}");
                assert!(!answer.text().contains("error"), "{cut}: {answer}");
                ended += 1;
            } else {
                assert_told(&answer, 502);
                told += 1;
            }
        }
        assert!(told == done && ended == whole.len() - done, "{told} {ended}");
        assert_eq!(broken(&proxy, "worker_broke"), told as f64, "what was whole is no failure");
        assert_goes_on(&mut client);
    }

    fn u11_a_malformed_chunk_in_a_stream_ends_it_with_an_error_event(v: Variant) {
        let bad = [sse_head().as_bytes(), &sse_event("one")].concat();
        let gate = Gate::new();
        let worker = worker().on("/v1/completions", script().send(bad).wait(&gate).send("zz\r\n").wait(&Gate::new())).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::post("/v1/completions", client::chat_stream("m")));
        eventually("it streams", || gate.waiting() == 1);
        client.read_until("one");
        gate.open();
        client.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
        assert!(!client.seen.windows(4).any(|bytes| bytes == b"zz\r\n"), "the malformed bytes were passed on");
        assert_goes_on(&mut client);
        assert_eq!(broken(&proxy, "bad_coding"), 1.0);
        eventually("the worker's connection is closed", || worker.requests()[0].gone.is_some());
    }

    fn u11_what_is_missing_in_a_chunk_is_filled_up_to_64_kib_and_no_further(v: Variant) {
        let script = |missing: usize| script().send(sse_head()).send(format!("{:x}\r\ndata: x", missing + 7)).close();
        let worker = worker().on("/v1/completions", script(65_536)).on("/v1/chat/completions", script(65_537)).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let filled = client.post("/v1/completions", client::chat_stream("m"));
        assert_told(&filled, 502);
        assert_eq!(filled.chunks[0], 65_543, "{:?}", filled.chunks);
        let aborted = client.post("/v1/chat/completions", client::chat_stream("m"));
        assert!(!aborted.complete, "it looks complete");
    }

    fn u11_what_is_no_stream_of_events_is_left_without_an_end(v: Variant) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
        let short = format!("{head}content-length: 100\r\n\r\n{{\"a\":1}}");
        let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n");
        let events = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100\r\n\r\ndata: x\n\n";
        let worker = worker()
            .on("/short", script().send(short).close())
            .on("/chunked", script().send(chunked).close())
            .on("/events", script().send(events).close())
            .start();
        let proxy = proxy(v).worker(&worker).start();
        for target in ["/short", "/chunked", "/events"] {
            let answer = proxy.post(target, "{}");
            assert!(!answer.complete && answer.status == 200, "{target}: {answer}");
            assert!(!String::from_utf8_lossy(&answer.body).contains("error"), "{target}: {answer}");
        }
        assert_eq!(broken(&proxy, "worker_broke"), 3.0);
    }

    fn u11_a_client_of_1_0_is_told_before_the_connection_closes(v: Variant) {
        let worker = worker().on("/v1/completions", script().send(sse_head()).send(sse_event("one")).close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let body = client::chat_stream("m");
        client.send(format!("POST /v1/completions HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        assert_told(&client.response(), 502);
    }

    fn u11_a_stream_without_framing_that_is_reset_is_told(v: Variant) {
        let gate = Gate::new();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
        let worker = worker().on("/v1/completions", script().send(head).send("data: {}\n\ndata: {").wait(&gate).reset()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::post("/v1/completions", client::chat_stream("m")));
        eventually("it streams", || gate.waiting() == 1);
        client.read_until("data: {}");
        gate.open();
        client.read_until("\n\ndata: {\"error\"");
        client.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
        assert_goes_on(&mut client);
    }

    fn u4_an_error_event_of_the_worker_passes_and_is_counted(v: Variant) {
        let error = "data: {\"error\": {\"message\": \"x\", \"type\": \"InternalServerError\", \"param\": null, \"code\": 500}}\n\n";
        let events = [sse_head().into_bytes(), sse_event("one"), chunk(error), sse_end()].concat();
        let sent = events.clone();
        let worker = worker().on("/v1/completions", script().send(sent)).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let answer = client.post("/v1/completions", client::chat_stream("m")).expect(200);
        assert!(events.ends_with(&answer.raw_body), "{answer}");
        // it is counted when the client may have it already
        eventually("it is counted", || broken(&proxy, "worker_error") == 1.0);
        assert_eq!(broken(&proxy, "worker_broke"), 0.0);
        assert_goes_on(&mut client);
    }

    fn p1_streams_that_outlive_the_grace_period_end_with_an_error_event(v: Variant) {
        let gate = Gate::new();
        let worker = worker().on(CHAT, script().send(sse_head()).send(sse_event("one")).wait(&gate)).start();
        let proxy = proxy(v).worker(&worker).arg("--shutdown-grace-secs", "1").start();
        let mut clients: Vec<_> = (0..8).map(|_| proxy.client()).collect();
        for client in &mut clients {
            client.send(client::post(CHAT, client::chat_stream("m")));
        }
        eventually("all of them stream", || gate.waiting() == 8);
        proxy.drain();
        proxy.wait();
        for client in &mut clients {
            assert_told(&client.response(), 503);
            client.expect_closed();
        }
    }

    fn a_silent_stream_is_kept_alive_between_events_only(v: Variant) {
        let gates: Vec<Gate> = (0..3).map(|_| Gate::new()).collect();
        let torn = sse_event("two");
        let (begin, end) = torn.split_at(30);
        let events = script()
            .send(sse_head()).wait(&gates[0])
            .send(sse_event("one")).wait(&gates[1])
            .send(begin).wait(&gates[2]).send(end).send(sse_end());
        let worker = worker().on(CHAT, events).start();
        let proxy = proxy(v).worker(&worker).arg("--sse-keepalive-secs", "1").start();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat_stream("m")));
        // before the first event, and after it
        client.read_until("\r\n\r\ne\r\n: keep-alive\n\n\r\n");
        gates[0].open();
        client.read_until("\"one\"");
        client.read_until("\n\n\r\ne\r\n: keep-alive\n\n\r\n");
        gates[1].open();
        client.read_until(begin);
        assert_eq!(client.fill(Duration::from_millis(2500)), Err(End::Silence), "{}", client.buffer.escape_ascii());
        gates[2].open();
        client.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
        assert_eq!(client.buffer, b"");
        assert_eq!(client.chat("m").status, 200);
    }
}
