//! Time limits, each with its end; slow clients; and a stream that would have the shard for itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    Client, End, Gate, Proxy, Response, client, eventually, patience, proxy, script, sse_event, variants,
    worker,
    worker::{chunk, sse_end, sse_head},
};

const CHAT: &str = "/v1/chat/completions";

/// Longer than the limits of these tests, which are of a second or two.
const LONGER: Duration = Duration::from_millis(2500);

fn count(proxy: &Proxy, metric: &str, reason: &str) -> f64 {
    proxy.metric(&format!("vllm_proxy_{metric}_total{{reason=\"{reason}\"}}")).unwrap()
}

#[track_caller]
fn assert_504(answer: &Response) {
    assert_eq!(answer.status, 504, "{answer}");
    let error = &answer.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&"Gateway Timeout".into(), &504.into()), "{answer}");
}

/// Reads to the end of a stream that ends with the error event of this code.
#[track_caller]
fn read_told(client: &mut Client, code: u16) {
    client.read_until("data: {\"error\": {");
    client.read_until(format!("\"code\": {code}}}}}\n\n"));
    client.read_until("data: [DONE]\n\n");
    client.read_until("\r\n0\r\n\r\n");
}

/// Bytes of a body that takes more than the sockets' buffers.
const MUCH: u64 = 300 << 20;

fn flood_head() -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {MUCH}\r\n\r\n")
}

variants! {
    fn c10_a_head_that_does_not_come_is_408_and_reaches_no_worker(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--head-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-");
        let answer = client.response();
        assert_eq!(answer.status, 408, "{answer}");
        client.expect_closed();
        assert_eq!(worker.requests().len(), 0);
        assert_eq!(count(&proxy, "refused_requests", "client_timeout"), 1.0);
    }

    fn c11_a_body_that_does_not_come_is_408_and_reaches_no_worker(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--body-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{\"model\"");
        let answer = client.response();
        assert_eq!(answer.status, 408, "{answer}");
        client.expect_closed();
        assert!(worker.requests().iter().all(|got| !got.complete), "{:#?}", worker.requests());
    }

    fn u10_silence_before_the_head_and_before_the_first_event_is_a_prompt_that_is_computed(v: Variant) {
        let gates = [Gate::new(), Gate::new()];
        let events = script().wait(&gates[0]).send(sse_head()).wait(&gates[1]).send(sse_event("one")).send(sse_end());
        let worker = worker().on(CHAT, events).start();
        let proxy = proxy(v).worker(&worker).arg("--stream-idle-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat_stream("m")));
        assert_eq!(client.fill(LONGER), Err(End::Silence));
        gates[0].open();
        client.read_until("\r\n\r\n");
        assert_eq!(client.fill(LONGER), Err(End::Silence));
        gates[1].open();
        client.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
        assert!(proxy.usable_workers().contains(&worker.url()), "it was taken for dead");
        assert_eq!(worker.requests().len(), 1, "it was tried again");
    }

    fn a_head_that_does_not_come_in_time_is_504_and_no_second_try(v: Variant) {
        let gate = Gate::new();
        let workers = [worker().on("/slow", script().wait(&gate)).start(), worker().on("/slow", script().wait(&gate)).start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).arg("--response-timeout-secs", "1").start();
        let mut client = proxy.client();
        assert_504(&client.post("/slow", "{}"));
        let got: Vec<_> = workers.iter().flat_map(|worker| worker.requests()).collect();
        assert_eq!(got.len(), 1, "{got:#?}");
        eventually("the worker is let go", || workers.iter().any(|worker| worker.requests().iter().any(|got| got.gone.is_some())));
        assert_eq!(client.chat("m").status, 200, "the connection goes on");
        assert_eq!(proxy.usable_workers().len(), 2, "slow is not dead");
        assert_eq!(count(&proxy, "refused_requests", "worker_timeout"), 1.0);
    }

    fn u9_a_stream_that_falls_silent_ends_with_an_error_event(v: Variant) {
        let gate = Gate::new();
        let silent = script().send(sse_head()).send(sse_event("one")).wait(&gate);
        let worker = worker().on("/v1/completions", silent).start();
        let proxy = proxy(v).worker(&worker).arg("--stream-idle-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.send(client::post("/v1/completions", client::chat_stream("m")));
        client.read_until("\"one\"");
        read_told(&mut client, 504);
        eventually("the worker is let go", || worker.only_request().gone.is_some());
        assert_eq!(client.chat("m").status, 200, "the connection goes on");
        assert!(proxy.usable_workers().contains(&worker.url()), "a time limit is no proof of death");
        assert_eq!(count(&proxy, "broken_answers", "idle_timeout"), 1.0);
    }

    fn u9_an_answer_that_falls_silent_is_left_without_an_end(v: Variant) {
        let half = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"a\":";
        let worker = worker().on("/half", script().send(half).wait(&Gate::new())).start();
        let proxy = proxy(v).worker(&worker).arg("--stream-idle-timeout-secs", "1").start();
        let answer = proxy.post("/half", "{}");
        assert!(!answer.complete && answer.status == 200, "{answer}");
        assert_eq!(count(&proxy, "broken_answers", "idle_timeout"), 1.0);
    }

    fn u9_an_answer_that_falls_silent_while_it_is_held_is_504(v: Variant) {
        let half = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"a\":";
        let role = chunk("data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n");
        for silent in [script().send(half), script().send(sse_head()).send(role)] {
            let silent = silent.wait(&Gate::new());
            let workers = [(); 2].map(|()| worker().on(CHAT, silent.clone()).start());
            let proxy =
                proxy(v).worker(&workers[0]).worker(&workers[1]).arg("--stream-idle-timeout-secs", "1").start();
            assert_504(&proxy.client().post(CHAT, client::chat_stream("m")));
            let sent: usize = workers.iter().map(|worker| worker.requests().len()).sum();
            assert_eq!((sent, proxy.usable_workers().len()), (1, 2), "a time limit is no reason to ask again");
        }
    }

    fn a_request_that_takes_too_long_in_all_is_504_or_ends_with_an_error_event(v: Variant) {
        let (held, gate) = (Gate::new(), Gate::new());
        // an event every 100 ms: nothing but the whole takes too long
        let mut dripping = script().send(sse_head());
        for number in 0..100 {
            dripping = dripping.send(sse_event(&number.to_string())).pause(Duration::from_millis(100));
        }
        let worker = worker().on("/held", script().wait(&held)).on("/v1/completions", dripping).on("/early", script().early().wait(&gate)).start();
        let proxy = proxy(v).worker(&worker).arg("--request-timeout-secs", "2").start();
        let mut client = proxy.client();
        for _ in 0..2 {
            assert_504(&client.post("/held", "{}"));
        }
        client.send(client::post("/v1/completions", client::chat_stream("m")));
        client.read_until("\"0\"");
        read_told(&mut client, 504);
        assert_eq!(count(&proxy, "refused_requests", "request_timeout"), 2.0);
        assert_eq!(count(&proxy, "broken_answers", "total_timeout"), 1.0);
        // the time is the request's, not the connection's
        assert_eq!(client.fill(LONGER), Err(End::Silence));
        assert_eq!(client.chat("m").status, 200);
        assert!(proxy.usable_workers().contains(&worker.url()));
    }

    fn a_worker_that_does_not_read_is_504(v: Variant) {
        let gate = Gate::new();
        let worker = worker().on("/up", script().early().wait(&gate)).start();
        let proxy = proxy(v).worker(&worker).arg("--worker-write-timeout-secs", "1").start();
        let addr = proxy.addr();
        let uploading = thread::spawn(move || {
            let mut client = Client::connect(addr);
            client.send(format!("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: {MUCH}\r\n\r\n"));
            let piece = vec![b'x'; 1 << 20];
            while client.try_send(&piece) && client.fill(Duration::from_millis(1)) == Err(End::Silence) {}
            client.response()
        });
        let answer = uploading.join().unwrap();
        assert_504(&answer);
        assert_eq!(count(&proxy, "refused_requests", "worker_timeout"), 1.0);
        assert!(proxy.usable_workers().contains(&worker.url()));
    }

    fn c12_a_client_that_takes_nothing_is_cut_and_others_are_not(v: Variant) {
        let worker = worker().on("/big", script().send(flood_head()).flood(MUCH)).start();
        let proxy = proxy(v).worker(&worker).arg("--write-timeout-secs", "1").start();
        let mut stalled = Client::connect_with_small_buffer(proxy.addr(), 16 << 10);
        stalled.send(client::request("GET", "/big", "", b""));
        stalled.read_until("\r\n\r\n");
        eventually("the worker is let go", || {
            proxy.client().chat("m").expect(200);
            worker.requests().iter().any(|got| got.path() == "/big" && got.gone.is_some())
        });
        assert_eq!(count(&proxy, "broken_answers", "slow_client"), 1.0);
    }

    fn c12_a_slow_reader_that_takes_a_little_now_and_then_is_not_cut(v: Variant) {
        let worker = worker().on("/big", script().send(flood_head()).flood(MUCH)).start();
        let proxy = proxy(v).worker(&worker).arg("--write-timeout-secs", "2").start();
        let mut slow = Client::connect_with_small_buffer(proxy.addr(), 16 << 10);
        slow.send(client::request("GET", "/big", "", b""));
        slow.read_until("\r\n\r\n");
        let began = Instant::now();
        // far less than makes room in the proxy's own socket buffer
        while began.elapsed() < 2 * LONGER {
            slow.fill(patience()).expect("a slow reader was cut");
            slow.seen.clear();
            slow.buffer.clear();
            // the pace of the client, which is what the test is about
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(count(&proxy, "broken_answers", "slow_client"), 0.0);
        assert!(worker.requests().iter().all(|got| got.gone.is_none()));
    }

    fn an_answer_before_the_upload_is_read_is_seen_by_who_sends_all_first(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--max-body-bytes", "1000000").arg("--prompt-peek-bytes", "1000").start();
        let body = vec![b'x'; 40 << 20];
        let mut client = proxy.client();
        client.send(client::request("POST", CHAT, "", &body));
        let answer = client.response();
        assert_eq!(answer.status, 413, "{answer}");
        client.expect_closed();
        assert_eq!(worker.requests().len(), 0);
    }

    fn a_stream_that_always_has_more_does_not_keep_the_shard_for_itself(v: Variant) {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", 1_u64 << 40);
        let worker = worker().on("/big", script().send(head).flood(1 << 40)).start();
        let proxy = proxy(v).worker(&worker).start();
        let read = Arc::new(AtomicU64::new(0));
        let readers: Vec<_> = (0..2).map(|_| {
            let (addr, read) = (proxy.addr(), read.clone());
            thread::spawn(move || {
                let mut client = Client::connect(addr);
                client.send(client::request("GET", "/big", "", b""));
                while read.load(Ordering::Relaxed) < u64::MAX / 2 {
                    let Ok(count) = client.fill(patience()) else { return };
                    read.fetch_add(count as u64, Ordering::Relaxed);
                    client.seen.clear();
                    client.buffer.clear();
                }
            })
        }).collect();
        eventually("it floods", || read.load(Ordering::Relaxed) > 100 << 20);
        for _ in 0..20 {
            proxy.client().chat("m").expect(200);
        }
        read.store(u64::MAX / 2, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    }
}
