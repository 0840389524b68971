//! What is tried again on another worker, and what never is.
//!
//! Workers take turns, so that with two of them every other request begins with the first. Of requests that come one
//! by one three may be tried again at once, and three per second: tests stay below that unless they are about it.

use std::time::{Duration, Instant};

use crate::support::{
    Gate, Proxy, ProxyBuilder, Variant, Worker, answer, client, eventually, json_answer, proxy, script,
    sse_event, variants, worker,
    worker::{Script, chunk, sse_end, sse_head},
};

const CHAT: &str = "/v1/chat/completions";

/// An hour: what happens in these tests is learnt from requests, not from probes.
const NEVER: &str = "3600";

/// vLLM 0.32, `--max-num-queued-reqs` reached.
const BUSY: &str = r#"{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.","type":"Service Unavailable","param":null,"code":503}}"#;

/// vLLM 0.32, its engine's process killed.
const DEAD: &str = r#"{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.","type":"InternalServerError","param":null,"code":500}}"#;

/// vLLM 0.32, a model that is not there any more.
const LOST: &str = r#"{"error":{"message":"The model `m` does not exist. Valid aliases: other.","type":"NotFoundError","param":"model","code":404}}"#;

/// A whole chat that vLLM broke off because it was told to end.
const ABORTED: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"half a"},"finish_reason":"abort"}],"usage":{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2}}"#;

/// The event with which every stream of a chat begins.
const ROLE: &str = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";

fn refusal(status: &str, headers: &str, body: &str) -> Script {
    script().send(answer(status, "application/json", headers, body))
}

fn stream(events: &[&str]) -> Script {
    let chunks: Vec<u8> = events.iter().flat_map(chunk).collect();
    script().send(sse_head()).send(chunks).send("0\r\n\r\n")
}

fn failing(path: &str, script: Script) -> Worker {
    worker().on(path, script).start()
}

/// Both before a proxy that lets them take turns and does not probe them.
fn turns<'a>(v: Variant, workers: impl IntoIterator<Item = &'a Worker>) -> ProxyBuilder {
    let proxy = proxy(v).arg("--policy", "round_robin").arg("--health-check-interval-secs", NEVER);
    workers.into_iter().fold(proxy, |proxy, worker| proxy.worker(worker))
}

fn count(proxy: &Proxy, reason: &str) -> f64 {
    proxy.metric(&format!("vllm_proxy_retries_total{{reason=\"{reason}\"}}")).expect("the metric")
}

fn exhausted(proxy: &Proxy, reason: &str) -> f64 {
    proxy.metric(&format!("vllm_proxy_retries_exhausted_total{{reason=\"{reason}\"}}")).expect("the metric")
}

/// `failing` had at least one of the requests, and each that it had was tried again for this reason.
#[track_caller]
fn assert_made_good(proxy: &Proxy, failing: &Worker, reason: &str) {
    let got = failing.requests().len();
    assert!(got > 0, "it was never asked");
    assert_eq!(count(proxy, reason), got as f64, "{reason}");
}

/// Two chats on one connection, and so on one shard, one of which begins with each worker; both must be answered.
fn two_chats(proxy: &Proxy) {
    let mut client = proxy.client();
    for _ in 0..2 {
        assert_eq!(client.chat("m").expect(200).completion(), "ok");
    }
}

variants! {
    fn u1_workers_that_refuse_are_tried_again_after_a_pause(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", NEVER)
            .arg("--retry-delay", "0.02").arg("--max-retries", "99").start();
        worker.go_down();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat("m")));
        eventually("it was tried again", || count(&proxy, "connect_refused") >= 3.0);
        worker.come_back();
        assert_eq!(client.response().expect(200).completion(), "ok");
        assert_eq!(worker.complete_requests().len(), 1);
    }

    fn u1_attempts_are_counted_in_all_and_switched_off(v: Variant) {
        for (flags, retries) in [(&["--retry-max-retries", "3"][..], 2.0), (&["--max-retries", "1"], 1.0), (&["--disable-retries"], 0.0)] {
            let worker = worker().start();
            let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", NEVER);
            let proxy = match flags {
                [name, value] => proxy.arg(name, value),
                names => proxy.flag(names[0]),
            }.start();
            worker.go_down();
            let answer = proxy.client().chat("m").expect(503);
            assert!(answer.header("retry-after").is_some(), "{answer}");
            assert_eq!((count(&proxy, "connect_refused"), exhausted(&proxy, "connect_refused")), (retries, 1.0), "{flags:?}");
        }
    }

    fn u2_a_fresh_connection_that_dies_under_a_request_is_made_good_by_another_worker(v: Variant) {
        for death in [script().reset(), script().close(), script().send("HTTP/1.1 200 OK\r\nconte").close()] {
            let (dying, well) = (failing(CHAT, death), worker().start());
            let proxy = turns(v, [&dying, &well]).start();
            two_chats(&proxy);
            assert_made_good(&proxy, &dying, "connection_lost");
            assert_eq!(well.requests().len(), 2);
        }
    }

    fn u4_the_request_of_a_worker_that_is_killed_is_made_good_by_another(v: Variant) {
        for rested in [false, true] {
            let gates = [Gate::new(), Gate::new()];
            let workers = gates.each_ref().map(|gate| failing("/v1/embeddings", script().wait(gate).send(json_answer("{}"))));
            let proxy = turns(v, [&workers[0], &workers[1]]).start();
            let mut client = proxy.client();
            if rested {
                // then it is on a connection of which one cannot know whether it was stale
                client.chat("m").expect(200);
                client.chat("m").expect(200);
            }
            client.send(client::post("/v1/embeddings", "{}"));
            let at = eventually("a worker has it", || gates.iter().position(|gate| gate.waiting() == 1));
            workers[at].go_down();
            gates[1 - at].open();
            client.response().expect(200);
            assert_eq!(count(&proxy, "stale_connection"), f64::from(u8::from(rested)));
            assert_eq!(count(&proxy, if rested { "connect_refused" } else { "connection_lost" }), 1.0);
        }
    }

    fn u4_all_requests_of_a_worker_that_is_killed_move_on_although_they_are_more_than_the_budget(v: Variant) {
        let gates = [Gate::new(), Gate::new()];
        let held = |gate: &Gate| failing(CHAT, script().wait(gate).send(json_answer("{}")));
        let workers = gates.each_ref().map(held);
        let proxy = turns(v, &workers).arg("--request-timeout-secs", "120").start();
        let clients: Vec<_> = (0..24)
            .map(|_| {
                let mut client = proxy.client();
                client.send(client::post(CHAT, client::chat("m")));
                client
            })
            .collect();
        eventually("both have their share", || gates.iter().map(Gate::waiting).sum::<usize>() == clients.len());
        // half of what runs is lost at once, and the budget is a fifth
        let lost = gates[0].waiting();
        workers[0].go_down();
        eventually("all are with the other one", || gates[1].waiting() == clients.len());
        gates[1].open();
        for mut client in clients {
            client.response().expect(200);
        }
        assert_eq!(count(&proxy, "connection_lost"), lost as f64);
    }

    fn u1_a_broadcast_that_reaches_nobody_says_when_to_come_back(v: Variant) {
        let workers = [worker().start(), worker().start()];
        let proxy = turns(v, [&workers[0], &workers[1]]).start();
        workers.iter().for_each(Worker::go_down);
        let answer = proxy.post("/v1/load_lora_adapter", r#"{"lora_name":"l","lora_path":"/l"}"#).expect(503);
        assert!(answer.header("retry-after").is_some() && answer.json()["error"]["code"] == 503, "{answer}");
    }

    fn u2_a_request_that_kills_workers_does_not_go_through_the_fleet(v: Variant) {
        let workers: Vec<Worker> = (0..4).map(|_| failing(CHAT, script().reset())).collect();
        let proxy = workers.iter().fold(proxy(v), |proxy, worker| proxy.worker(worker)).start();
        proxy.client().chat("m").expect(502);
        let got: usize = workers.iter().map(|worker| worker.requests().len()).sum();
        assert_eq!(got, 2, "one further attempt and no more");
        assert_eq!(exhausted(&proxy, "connection_lost"), 1.0);
    }

    fn u2_what_may_have_been_done_is_not_sent_twice(v: Variant) {
        for (path, body) in [
            ("/v1/files", "{}"),
            ("/v1/responses", r#"{"model":"m","input":"a","store":true}"#),
            ("/v1/responses", r#"{"model":"m","background":true,"input":"a"}"#),
        ] {
            let workers = [script().reset(), script().reset()].map(|death| failing(path, death));
            let proxy = turns(v, [&workers[0], &workers[1]]).start();
            // connections that could be stale are there
            for _ in 0..2 {
                proxy.client().chat("m").expect(200);
            }
            proxy.post(path, body).expect(502);
            let got = workers.iter().flat_map(Worker::requests).filter(|got| got.path() == path).count();
            assert_eq!(got, 1, "{path} {body}");
        }
    }

    fn u2_a_response_that_is_not_stored_is_tried_again(v: Variant) {
        let dying = failing("/v1/responses", script().reset());
        let well = failing("/v1/responses", script().send(json_answer("{}")));
        let proxy = turns(v, [&dying, &well]).start();
        let mut client = proxy.client();
        for _ in 0..2 {
            assert_eq!(client.post("/v1/responses", r#"{"model":"m","input":"a","store":false}"#).expect(200).text(), "{}");
        }
        assert_made_good(&proxy, &dying, "connection_lost");
    }

    fn u5_a_whole_answer_that_was_aborted_is_asked_for_elsewhere(v: Variant) {
        let (ending, well) = (failing(CHAT, script().send(json_answer(ABORTED))), worker().start());
        let proxy = turns(v, [&ending, &well]).start();
        two_chats(&proxy);
        assert_made_good(&proxy, &ending, "aborted");
    }

    fn u5_an_aborted_answer_is_passed_on_when_the_other_is_aborted_too_and_is_no_success(v: Variant) {
        let workers = [(); 2].map(|()| failing(CHAT, script().send(json_answer(ABORTED))));
        let proxy = turns(v, [&workers[0], &workers[1]]).start();
        assert_eq!(proxy.client().chat("m").expect(200).text(), ABORTED);
        assert_eq!(workers.each_ref().map(|worker| worker.requests().len()), [1, 1]);
        assert_eq!(exhausted(&proxy, "aborted"), 1.0);
        let counted = |code: &str| {
            let name = format!("vllm_proxy_requests_total{{endpoint=\"{CHAT}\",code=\"{code}\"}}");
            proxy.metric(&name)
        };
        eventually("it is counted", || counted("5xx") == Some(1.0));
        assert_eq!(counted("2xx"), Some(0.0));
    }

    fn u6_a_dead_engine_is_out_at_once_and_its_request_goes_elsewhere(v: Variant) {
        let (dead, well) = (failing(CHAT, refusal("500 Internal Server Error", "", DEAD)), worker().start());
        let proxy = turns(v, [&dead, &well]).start();
        let mut client = proxy.client();
        for _ in 0..6 {
            assert_eq!(client.chat("m").expect(200).completion(), "ok");
        }
        assert_eq!(dead.requests().len(), 1, "nothing more goes there");
        assert_eq!(proxy.usable_workers(), [well.url()]);
        assert_eq!(count(&proxy, "engine_dead"), 1.0);
    }

    fn u6_a_dead_engine_is_out_even_where_its_answer_has_to_be_passed_on(v: Variant) {
        let dead = failing("/v1/files", refusal("500 Internal Server Error", "", DEAD));
        let well = failing("/v1/files", script().send(json_answer("{}")));
        let proxy = turns(v, [&dead, &well]).start();
        let mut client = proxy.client();
        let statuses: Vec<u16> = (0..4).map(|_| client.post("/v1/files", "{}").status).collect();
        assert_eq!(statuses.iter().filter(|status| **status == 500).count(), 1, "{statuses:?}");
        assert_eq!(proxy.usable_workers(), [well.url()]);
    }

    fn u6_two_dead_engines_are_told_to_the_client(v: Variant) {
        let workers = [(); 3].map(|()| failing(CHAT, refusal("500 Internal Server Error", "", DEAD)));
        let proxy = workers.iter().fold(proxy(v), |proxy, worker| proxy.worker(worker))
            .arg("--health-check-interval-secs", NEVER).start();
        assert_eq!(proxy.client().chat("m").expect(500).text(), DEAD);
        assert_eq!(workers.iter().map(|worker| worker.requests().len()).sum::<usize>(), 2, "one further attempt");
    }

    fn u7_overload_goes_to_another_worker_and_is_no_failure(v: Variant) {
        for busy in [refusal("503 Service Unavailable", "", BUSY), refusal("429 Too Many Requests", "", "{}")] {
            let (busy, well) = (failing(CHAT, busy), worker().start());
            let proxy = turns(v, [&busy, &well]).start();
            two_chats(&proxy);
            assert_made_good(&proxy, &busy, "busy");
            assert!(proxy.usable_workers().contains(&busy.url()), "busy is not dead");
        }
    }

    fn u7_when_all_are_busy_the_client_is_told_so_and_when_to_come_back(v: Variant) {
        for (headers, after) in [("", "1"), ("Retry-After: 7\r\n", "7")] {
            let workers = [(); 2].map(|()| failing(CHAT, refusal("503 Service Unavailable", headers, BUSY)));
            let proxy = turns(v, [&workers[0], &workers[1]]).start();
            let answer = proxy.client().chat("m").expect(503);
            assert_eq!((answer.text(), answer.header("retry-after").as_deref()), (BUSY, Some(after)));
            assert_eq!(workers.each_ref().map(|worker| worker.requests().len()), [1, 1], "each once");
            assert_eq!(proxy.usable_workers().len(), 2);
            // the only one there is does not keep anybody waiting
            let alone = crate::support::proxy(v).worker(&workers[0]).start();
            let answer = alone.client().chat("m").expect(503);
            assert_eq!((answer.text(), answer.header("retry-after").as_deref()), (BUSY, Some(after)));
            assert_eq!(workers[0].requests().len(), 2);
        }
    }

    fn u7_a_busy_worker_is_left_and_its_connection_kept(v: Variant) {
        let (busy, well) = (failing(CHAT, refusal("503 Service Unavailable", "", BUSY)), worker().start());
        let proxy = turns(v, [&busy, &well]).start();
        let mut client = proxy.client();
        for _ in 0..3 {
            assert_eq!(client.chat("m").expect(200).completion(), "ok");
        }
        assert_made_good(&proxy, &busy, "busy");
        assert_eq!(busy.connections(), 1);
    }

    fn what_every_worker_would_say_is_passed_on_at_once(v: Variant) {
        for status in ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "404 Not Found", "405 Method Not Allowed",
            "408 Request Timeout", "413 Content Too Large", "422 Unprocessable Entity", "500 Internal Server Error",
            "501 Not Implemented", "502 Bad Gateway", "504 Gateway Timeout"] {
            let body = r#"{"error":{"message":"EngineCore is fine","type":"X","param":null,"code":0}}"#;
            let workers = [(); 2].map(|()| failing(CHAT, refusal(status, "", body)));
            let proxy = turns(v, [&workers[0], &workers[1]]).start();
            let answer = proxy.client().chat("m").expect(status[..3].parse().unwrap());
            assert_eq!((answer.text(), answer.header("retry-after")), (body, None));
            assert_eq!(workers.iter().map(|worker| worker.requests().len()).sum::<usize>(), 1, "{status}");
            assert_eq!(proxy.usable_workers().len(), 2, "{status}");
        }
        // a 503 that is not vLLM's
        let gateway = [(); 2].map(|()| failing(CHAT, script().send(answer("503 Service Unavailable", "text/html", "", "<html>"))));
        let proxy = turns(v, [&gateway[0], &gateway[1]]).start();
        assert_eq!(proxy.client().chat("m").expect(503).text(), "<html>");
        assert_eq!(gateway.iter().map(|worker| worker.requests().len()).sum::<usize>(), 1);
    }

    fn statuses_that_were_asked_for_are_tried_again_on_all_workers_and_then_on_the_same(v: Variant) {
        let workers = [(); 2].map(|()| failing(CHAT, refusal("502 Bad Gateway", "", "{}")));
        let proxy = turns(v, [&workers[0], &workers[1]]).arg("--retry-statuses", "500,502").arg("--retry-max-retries", "3")
            .arg("--retry-initial-backoff-ms", "1").start();
        assert_eq!(proxy.client().chat("m").expect(502).text(), "{}");
        assert_eq!(workers.iter().map(|worker| worker.requests().len()).sum::<usize>(), 3);
        assert_eq!((count(&proxy, "status"), exhausted(&proxy, "status")), (2.0, 1.0));
    }

    fn a_workers_retry_after_is_obeyed(v: Variant) {
        let worker = worker().on_request(CHAT, |request| match request.nth {
            0 => refusal("502 Bad Gateway", "Retry-After: 1\r\n", "{}"),
            _ => script().send(json_answer("{\"second\":1}")),
        }).start();
        let proxy = proxy(v).worker(&worker).arg("--retry-statuses", "502").start();
        let begun = Instant::now();
        assert_eq!(proxy.client().chat("m").expect(200).text(), "{\"second\":1}");
        // the shard's clock is exact to a tenth of a second
        assert!(begun.elapsed() >= Duration::from_millis(880), "{:?}", begun.elapsed());
        let hasty = crate::support::proxy(v).worker(&worker).arg("--retry-statuses", "502").arg("--retry-max-backoff-ms", "500").start();
        assert_eq!(hasty.client().chat("m").expect(502).header("retry-after").as_deref(), Some("1"), "too long to wait for");
    }

    fn u14_a_stream_that_fails_before_its_first_text_is_begun_anew_elsewhere(v: Variant) {
        let abort = ROLE.replace("\"finish_reason\":null", "\"finish_reason\":\"abort\"").replace("\"role\":\"assistant\",", "");
        let error = "data: {\"error\": {\"message\": \"x\", \"type\": \"InternalServerError\", \"param\": null, \"code\": 500}}\n\n";
        let done = "data: [DONE]\n\n";
        for (reason, events) in [
            ("empty_answer", &[][..]),
            ("empty_answer", &[ROLE]),
            ("empty_answer", &[done]),
            ("aborted", &[ROLE, &abort, done]),
            ("error_event", &[error, done]),
            ("error_event", &[ROLE, error, done]),
        ] {
            let (failing, well) = (failing(CHAT, stream(events)), worker().start());
            let proxy = turns(v, [&failing, &well]).start();
            let mut client = proxy.client();
            for _ in 0..2 {
                client.send(client::post(CHAT, client::chat_stream("m")));
                assert_eq!(client.response().expect(200).completion(), "ok", "{events:?}");
            }
            assert_made_good(&proxy, &failing, reason);
        }
    }

    fn u12_a_malformed_answer_is_told_and_not_asked_for_again(v: Variant) {
        for malformed in ["HTTP/1.1 2000 OK\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\na"] {
            let workers = [(); 2].map(|()| failing(CHAT, script().send(malformed)));
            let proxy = turns(v, [&workers[0], &workers[1]]).start();
            proxy.client().chat("m").expect(502);
            assert_eq!(workers.iter().map(|worker| worker.requests().len()).sum::<usize>(), 1, "{malformed}");
        }
    }

    fn u14_an_empty_document_is_asked_for_elsewhere(v: Variant) {
        let untyped = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".as_bytes().to_vec();
        for empty in [json_answer(""), untyped] {
            let (failing, well) = (failing(CHAT, script().send(empty)), worker().start());
            let proxy = turns(v, [&failing, &well]).start();
            two_chats(&proxy);
            assert_made_good(&proxy, &failing, "empty_answer");
        }
    }

    fn u14_an_answer_without_content_is_never_passed_on_as_a_success(v: Variant) {
        let empty = || [stream(&[]), script().send(json_answer(""))];
        for (script, again) in empty().into_iter().zip(empty()) {
            let (one, other) = (failing(CHAT, script), failing(CHAT, again));
            for workers in [vec![&one], vec![&one, &other]] {
                let proxy = turns(v, workers).start();
                let answer = proxy.client().post(CHAT, client::chat_stream("m"));
                // where nobody else can be asked, the beginning of a stream is not held
                let error = r#""type": "InternalServerError", "param": null, "code": 502}"#;
                let told = answer.complete && answer.text().contains(error);
                assert!(told || answer.status == 502 && answer.json()["error"]["type"] == "Bad Gateway", "{answer}");
            }
        }
    }

    fn u6_a_stream_that_begins_with_a_dead_engine_takes_the_worker_out(v: Variant) {
        let event = format!("data: {DEAD}\n\n");
        let (dead, well) = (failing(CHAT, stream(&[&event, "data: [DONE]\n\n"])), worker().start());
        let proxy = turns(v, [&dead, &well]).start();
        let mut client = proxy.client();
        for _ in 0..2 {
            client.send(client::post(CHAT, client::chat_stream("m")));
            assert_eq!(client.response().expect(200).completion(), "ok");
        }
        assert_eq!(proxy.usable_workers(), [well.url()]);
    }

    fn a_stream_that_was_held_arrives_unchanged_however_it_was_cut(v: Variant) {
        let mut bytes = sse_head().into_bytes();
        let begin = bytes.len();
        for event in [": hello\n\n", ROLE] {
            bytes.extend(chunk(event));
        }
        bytes.extend(sse_event("one"));
        bytes.extend(sse_event("two"));
        bytes.extend(sse_end());
        let workers = [script().send_bytewise(&bytes), script().send(&bytes)].map(|script| failing(CHAT, script));
        let proxy = turns(v, [&workers[0], &workers[1]]).start();
        for _ in 0..4 {
            let mut client = proxy.client();
            client.send(client::post(CHAT, client::chat_stream("m")));
            let seen = client.read_until("0\r\n\r\n");
            assert!(seen.ends_with(&bytes[begin..]), "{}", seen.escape_ascii());
        }
    }

    fn no_more_is_held_than_its_bound(v: Variant) {
        let gate = Gate::new();
        let noise = chunk(format!(": {}\n\n", "x".repeat(20_000)));
        let held = script().send(sse_head()).send(&noise).wait(&gate).send(sse_event("a")).send(sse_end());
        let workers = [held.clone(), held].map(|script| failing(CHAT, script));
        let proxy = turns(v, [&workers[0], &workers[1]]).start();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat_stream("m")));
        client.read_until("xxx");
        gate.open();
        client.read_until("0\r\n\r\n");
    }

    fn a_stream_is_not_held_where_there_is_nobody_else(v: Variant) {
        let gate = Gate::new();
        let held = script().send(sse_head()).send(chunk(ROLE)).wait(&gate).send(sse_event("a")).send(sse_end());
        let worker = failing(CHAT, held);
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat_stream("m")));
        client.read_until("assistant");
        gate.open();
        client.read_until("0\r\n\r\n");
    }

    fn c14_a_client_that_goes_while_its_answer_is_held_takes_the_request_with_it(v: Variant) {
        let gate = Gate::new();
        let held = script().send(sse_head()).send(chunk(ROLE)).wait(&gate);
        let workers = [held.clone(), held].map(|script| failing(CHAT, script));
        let proxy = turns(v, [&workers[0], &workers[1]]).start();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat_stream("m")));
        eventually("a worker holds its text", || gate.waiting() == 1);
        drop(client);
        let requests = || workers.iter().flat_map(Worker::requests).collect::<Vec<_>>();
        eventually("the worker is let go", || requests().iter().all(|request| request.gone.is_some()));
        assert_eq!(requests().len(), 1, "it was tried again for nobody");
    }

    fn c14_a_client_that_goes_during_a_pause_ends_it(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", NEVER).arg("--retry-delay", "3600").start();
        worker.go_down();
        let mut client = proxy.client();
        client.send(client::post(CHAT, client::chat("m")));
        eventually("it waits", || count(&proxy, "connect_refused") == 1.0);
        let in_flight = || proxy.metric("vllm_proxy_requests_in_flight").expect("the metric");
        // the scrape is one itself; the one before may have its answer and not be over
        eventually("nothing else is in flight", || in_flight() == 2.0);
        drop(client);
        eventually("it has ended", || in_flight() == 1.0);
    }

    fn u19_a_model_that_a_worker_has_lost_is_asked_for_elsewhere_once(v: Variant) {
        let (lost, well) = (failing(CHAT, refusal("404 Not Found", "", LOST)), worker().start());
        let proxy = turns(v, [&lost, &well]).start();
        two_chats(&proxy);
        assert_made_good(&proxy, &lost, "model_lost");
        let all = [(); 3].map(|()| failing(CHAT, refusal("404 Not Found", "", LOST)));
        let proxy = all.iter().fold(crate::support::proxy(v), |proxy, worker| proxy.worker(worker)).start();
        assert_eq!(proxy.client().chat("m").expect(404).text(), LOST);
        assert_eq!(all.iter().map(|worker| worker.requests().len()).sum::<usize>(), 2);
    }

    fn a_body_that_is_too_large_to_keep_is_sent_once(v: Variant) {
        let busy = || failing("/v1/embeddings", refusal("503 Service Unavailable", "", BUSY));
        let workers = [busy(), busy()];
        let proxy = turns(v, [&workers[0], &workers[1]]).arg("--retry-buffer-bytes", "1000").start();
        let sent = || workers.iter().map(|worker| worker.requests().len()).sum::<usize>();
        proxy.post("/v1/embeddings", crate::compat::noise(1001)).expect(503);
        assert_eq!(sent(), 1);
        proxy.post("/v1/embeddings", crate::compat::noise(1000)).expect(503);
        assert_eq!(sent(), 3);
    }

    fn further_attempts_have_a_budget_over_all_traffic(v: Variant) {
        let busy = || failing(CHAT, refusal("503 Service Unavailable", "", BUSY));
        let workers = [busy(), busy()];
        let proxy = turns(v, &workers).start();
        let refused = || {
            let answer = proxy.client().chat("m");
            assert_eq!((answer.status, answer.text()), (503, BUSY));
            proxy.metric("vllm_proxy_retries_over_budget_total").unwrap_or(0.0)
        };
        // one by one: three at once, and three more per second
        eventually("the budget is used up", || refused() > 0.0);
        let made = count(&proxy, "busy");
        // the clocks of two shards may be a tick apart, which is a third of one attempt
        assert!(made >= 2.0, "{made}");
        eventually("it is whole again", || {
            refused();
            count(&proxy, "busy") > made
        });
    }
}
