//! What is let in, who waits, who is sent away, and with which words.

use crate::support::{
    Client, Gate, Proxy, Response, Worker, client, eventually, proxy, script, sse_event, variants, worker,
    worker::{sse_end, sse_head},
};

/// Sends a chat without waiting for its answer.
fn begin(proxy: &Proxy, headers: &str, body: &str) -> Client {
    let mut client = proxy.client();
    let headers = format!("Content-Type: application/json\r\n{headers}");
    client.send(client::request("POST", "/v1/chat/completions", &headers, body.as_bytes()));
    client
}

/// A chat that says `name`, with further fields.
fn chat(name: &str, fields: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{name}"}}]{fields}}}"#)
}

/// What the requests that a worker got said, in the order in which they came.
fn said(worker: &Worker) -> Vec<String> {
    let name =
        |body: serde_json::Value| body["messages"][0]["content"].as_str().unwrap_or_default().to_owned();
    worker.requests().iter().map(|request| name(request.json())).collect()
}

#[track_caller]
fn queue_is(proxy: &Proxy, depth: usize) {
    eventually(&format!("{depth} wait"), || match proxy.metric("vllm_proxy_queue_depth ") {
        Some(seen) if seen == depth as f64 => Ok(()),
        seen => Err(seen),
    });
}

/// A refusal in vLLM's shape that says why and when to come back.
#[track_caller]
fn assert_refused(answer: &Response, status: u16, why: &str) -> u64 {
    assert_eq!(answer.status, status, "{answer}");
    assert_eq!(answer.header("content-type").as_deref(), Some("application/json"));
    let error = &answer.json()["error"];
    assert_eq!(error["type"], if status == 429 { "Too Many Requests" } else { "Service Unavailable" });
    assert_eq!((error["code"].as_u64(), error["param"].is_null()), (Some(status.into()), true), "{answer}");
    assert!(error["message"].as_str().is_some_and(|text| text.contains(why)), "{why}: {answer}");
    let after = answer.header("retry-after").expect("Retry-After").parse().expect("seconds");
    assert!(after >= 1, "{answer}");
    after
}

#[track_caller]
fn assert_counted(proxy: &Proxy, reason: &str, count: f64) {
    let series = format!("vllm_proxy_refused_requests_total{{reason=\"{reason}\"}}");
    eventually("it is counted", || match proxy.metric(&series) {
        Some(seen) if seen == count => Ok(()),
        seen => Err(seen),
    });
}

/// Nothing is in use and nobody waits.
#[track_caller]
fn assert_idle(proxy: &Proxy) {
    queue_is(proxy, 0);
    eventually("all slots are free", || proxy.metric("vllm_proxy_slots_in_use ") == Some(0.0));
    eventually("nothing is in flight", || {
        let metrics = proxy.get("/metrics");
        let mut lines =
            metrics.text().lines().filter(|line| line.starts_with("vllm_proxy_worker_in_flight{"));
        lines.all(|line| line.ends_with(" 0"))
    });
}

fn stream_held_by(gate: &Gate) -> crate::support::worker::Script {
    script().send(sse_head()).send(sse_event("one")).wait(gate).send(sse_event("two")).send(sse_end())
}

variants! {
    fn a_slot_is_held_to_the_end_of_a_stream(v: Variant) {
        let gate = Gate::new();
        let worker = worker().on("/v1/chat/completions", stream_held_by(&gate)).start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "2").arg("--queue-size", "0").start();
        let mut streams: Vec<Client> = (0..2).map(|_| begin(&proxy, "", &client::chat_stream("m"))).collect();
        for stream in &mut streams {
            stream.read_until("\"one\"");
        }
        for _ in 0..6 {
            let answer = begin(&proxy, "", &client::chat_stream("m")).response();
            assert_refused(&answer, 429, "queue full");
        }
        assert_eq!(proxy.metric("vllm_proxy_slots_in_use "), Some(2.0));
        assert_counted(&proxy, "queue_full", 6.0);
        gate.open();
        for stream in &mut streams {
            stream.read_until("[DONE]");
        }
        assert_idle(&proxy);
        begin(&proxy, "", &client::chat_stream("m")).response().expect(200);
        assert_eq!(worker.requests().len(), 3);
    }

    fn who_waits_comes_in_when_a_stream_ends_and_not_before(v: Variant) {
        let gates = [Gate::new(), Gate::new()];
        let worker = {
            let gates = gates.clone();
            worker().on_request("/v1/chat/completions", move |request| {
                let first = request.json()["messages"][0]["content"] == "first";
                stream_held_by(&gates[usize::from(!first)])
            }).start()
        };
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "2").start();
        let stream = |name: &str| begin(&proxy, "", &chat(name, r#","stream":true"#));
        let mut streams: Vec<Client> = ["first", "second"].map(&stream).into();
        worker.wait_for_requests(2);
        streams.extend((0..6).map(|_| stream("later")));
        queue_is(&proxy, 6);
        assert_eq!(worker.requests().len(), 2);
        gates[0].open();
        streams[0].read_until("[DONE]");
        worker.wait_for_requests(3);
        queue_is(&proxy, 5);
        assert_eq!(worker.requests().len(), 3, "one has ended, one has come in");
        gates[1].open();
        for stream in &mut streams[1..] {
            stream.read_until("[DONE]");
        }
        assert_idle(&proxy);
        assert_eq!(worker.complete_requests().len(), 8);
        assert_eq!(proxy.metric("vllm_proxy_queue_wait_seconds_count "), Some(6.0));
        assert!(worker.connections() <= 4, "at most two at a time on each shard");
    }

    fn a_lower_priority_is_served_first(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        // the policy looks at nothing, but the queue does
        let proxy = proxy(v).worker(&worker).arg("--policy", "random").arg("--max-concurrent-requests", "1").start();
        let mut clients = vec![begin(&proxy, "", &chat("running", ""))];
        worker.wait_for_requests(1);
        let waiting =
            [("late", r#","priority":5"#), ("none", ""), ("early", r#","priority":-3"#), ("odd", r#","priority":"x""#)];
        for (count, (name, priority)) in waiting.into_iter().enumerate() {
            clients.push(begin(&proxy, "", &chat(name, priority)));
            queue_is(&proxy, count + 1);
        }
        gate.open();
        for client in &mut clients {
            client.response().expect(200);
        }
        assert_eq!(said(&worker), ["running", "early", "none", "odd", "late"]);
        assert_idle(&proxy);
    }

    fn a_tenant_with_many_requests_does_not_hold_up_one_with_few(v: Variant) {
        for (flag, header) in [(None, "X-Gateway-Inference-Fairness-Id"), (Some("x-tenant"), "X-Tenant")] {
            let gate = Gate::new();
            let worker = worker().holds(&gate).start();
            let mut proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1");
            if let Some(name) = flag {
                proxy = proxy.arg("--queue-fairness-header", name);
            }
            let proxy = proxy.start();
            let mut clients = vec![begin(&proxy, "", &chat("running", ""))];
            worker.wait_for_requests(1);
            for (count, name) in ["a1", "a2", "a3", "b1", "b2", "c1"].into_iter().enumerate() {
                clients.push(begin(&proxy, &format!("{header}: {}\r\n", &name[..1]), &chat(name, "")));
                queue_is(&proxy, count + 1);
            }
            gate.open();
            for client in &mut clients {
                client.response().expect(200);
            }
            assert_eq!(said(&worker), ["running", "a1", "b1", "c1", "a2", "b2", "a3"]);
        }
    }

    fn a_tenant_that_fills_the_queue_does_not_keep_others_out(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1").arg("--queue-size", "2").start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        let tenant = |name: &str| format!("x-gateway-inference-fairness-id: {name}\r\n");
        let mut many = Vec::new();
        for count in 1..=2 {
            many.push(begin(&proxy, &tenant("a"), &chat("a", "")));
            queue_is(&proxy, count);
        }
        assert_refused(&begin(&proxy, &tenant("a"), &chat("a", "")).response(), 429, "queue full");
        let mut other = begin(&proxy, &tenant("b"), &chat("b", ""));
        assert_refused(&many[1].response(), 429, "queue full");
        queue_is(&proxy, 2);
        gate.open();
        for client in [&mut running, &mut many[0], &mut other] {
            client.response().expect(200);
        }
        assert_eq!(said(&worker), ["running", "a", "b"]);
        assert_idle(&proxy);
    }

    fn c14_a_client_that_goes_while_queued_leaves_the_queue_at_once(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1").start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        for way in 0..3 {
            let mut gone = begin(&proxy, "", &chat("gone", ""));
            queue_is(&proxy, 1);
            match way {
                0 => drop(gone),
                1 => gone.reset(),
                _ => gone.half_close(),
            }
            queue_is(&proxy, 0);
        }
        let mut stays = begin(&proxy, "", &chat("stays", ""));
        queue_is(&proxy, 1);
        gate.open();
        running.response().expect(200);
        stays.response().expect(200);
        assert_eq!(said(&worker), ["running", "stays"], "nothing was sent for those who went");
        assert_idle(&proxy);
        assert!(proxy.usable_workers().contains(&worker.url()), "nobody is blamed");
        let chats = "vllm_proxy_requests_total{endpoint=\"/v1/chat/completions\",code=\"499\"}";
        assert_eq!(proxy.metric(chats), Some(3.0));
    }

    fn c14_a_client_that_goes_while_it_is_served_gives_its_slot_to_the_next(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1").start();
        let gone = begin(&proxy, "", &chat("gone", ""));
        worker.wait_for_requests(1);
        let mut next = begin(&proxy, "", &chat("next", ""));
        queue_is(&proxy, 1);
        gone.reset();
        worker.wait_for_requests(2);
        queue_is(&proxy, 0);
        gate.open();
        next.response().expect(200);
        assert_idle(&proxy);
    }

    fn who_waits_too_long_is_told_so(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v)
            .worker(&worker)
            .arg("--max-concurrent-requests", "1")
            .arg("--queue-timeout-secs", "1")
            .start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        let mut late = begin(&proxy, "", &chat("late", ""));
        assert_refused(&late.response(), 429, "queue timeout");
        assert_counted(&proxy, "queue_timeout", 1.0);
        queue_is(&proxy, 0);
        gate.open();
        running.response().expect(200);
        late.chat("m").expect(200);
        assert_eq!(worker.requests().len(), 2, "and the connection was kept");
        assert_idle(&proxy);
    }

    fn a_refusal_has_the_form_of_its_endpoint(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1").arg("--queue-size", "0").start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        let answer = proxy.post("/v1/messages", client::chat("m")).expect(429);
        assert_eq!((&answer.json()["type"], &answer.json()["error"]["type"]), (&"error".into(), &"Too Many Requests".into()));
        assert!(answer.header("retry-after").is_some());
        let answer = proxy.post("/cohere/v2/chat", client::chat("m")).expect(429);
        assert!(answer.json()["message"].as_str().is_some_and(|text| text.contains("queue full")), "{answer}");
        // what does not go to workers is not held up
        proxy.get("/health").expect(200);
        proxy.get("/v1/models").expect(200);
        assert_eq!(proxy.post("/v1/chat/completions", client::chat("unknown")).status, 429, "every worker has every model");
        gate.open();
        running.response().expect(200);
    }

    fn more_than_the_rate_is_refused_until_it_is_time(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--rate-limit-tokens-per-second", "0.01").start();
        proxy.client().chat("m").expect(200);
        let mut client = proxy.client();
        let after = assert_refused(&client.chat("m"), 429, "rate limit");
        assert!((90..=100).contains(&after), "{after}");
        assert_refused(&client.chat("m"), 429, "rate limit");
        proxy.get("/health").expect(200);
        assert_counted(&proxy, "rate_limit", 2.0);
        assert_eq!(worker.requests().len(), 1);
    }

    fn as_many_as_the_limit_of_concurrency_may_come_at_once(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v)
            .worker(&worker)
            .arg("--rate-limit-tokens-per-second", "0.01")
            .arg("--max-concurrent-requests", "5")
            .start();
        let statuses: Vec<u16> = (0..7).map(|_| proxy.client().chat("m").status).collect();
        assert_eq!(statuses, [200, 200, 200, 200, 200, 429, 429]);
    }

    fn no_worker_gets_more_than_it_may_and_who_waits_gets_the_place_that_is_free(v: Variant) {
        let gates = [Gate::new(), Gate::new()];
        let workers = gates.each_ref().map(|gate| worker().holds(gate).start());
        let limited = workers.each_ref().map(|worker| format!("{}#max_concurrent_requests=2", worker.url()));
        let proxy = proxy(v).url(&limited[0]).url(&limited[1]).start();
        let mut clients: Vec<Client> = (0..4).map(|_| begin(&proxy, "", &chat("running", ""))).collect();
        for worker in &workers {
            worker.wait_for_requests(2);
        }
        clients.extend((0..3).map(|_| begin(&proxy, "", &chat("waiting", ""))));
        queue_is(&proxy, 3);
        assert_eq!(workers.each_ref().map(|worker| worker.requests().len()), [2, 2]);
        gates[1].open();
        eventually("all who wait are served by the one that is free", || workers[1].requests().len() == 5);
        queue_is(&proxy, 0);
        assert_eq!(workers[0].requests().len(), 2);
        gates[0].open();
        for client in &mut clients {
            client.response().expect(200);
        }
        assert_idle(&proxy);
    }

    fn where_all_workers_are_busy_and_nobody_may_wait_it_is_a_503(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let url = format!("{}#max_concurrent_requests=1", worker.url());
        let proxy = proxy(v).url(&url).arg("--queue-size", "1").arg("--queue-timeout-secs", "1").start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        let mut waiting = begin(&proxy, "", &chat("waiting", ""));
        queue_is(&proxy, 1);
        assert_refused(&proxy.client().chat("m"), 503, "all workers are busy");
        assert_counted(&proxy, "workers_busy", 1.0);
        assert_refused(&waiting.response(), 503, "all workers were busy for too long");
        assert_counted(&proxy, "workers_timeout", 1.0);
        proxy.get("/health").expect(200);
        gate.open();
        running.response().expect(200);
        waiting.chat("m").expect(200);
        assert_idle(&proxy);
    }

    fn requests_for_another_model_do_not_wait_behind_those_for_a_busy_one(v: Variant) {
        let gate = Gate::new();
        let (busy, free) = (worker().model("a").holds(&gate).start(), worker().model("b").start());
        let [one, other] = [&busy, &free].map(|worker| format!("{}#max_concurrent_requests=1", worker.url()));
        for limit in ["0", "2"] {
            let proxy = proxy(v).url(&one).url(&other).arg("--max-concurrent-requests", limit).start();
            let mut running = proxy.client();
            running.send(client::post("/v1/chat/completions", client::chat("a")));
            let mut waiting: Vec<Client> = Vec::new();
            eventually("it runs", || gate.waiting() == 1);
            for count in 1..=3 {
                let mut client = proxy.client();
                client.send(client::post("/v1/chat/completions", client::chat("a")));
                queue_is(&proxy, count);
                waiting.push(client);
            }
            for _ in 0..5 {
                proxy.client().chat("b").expect(200);
            }
            queue_is(&proxy, 3);
            assert_eq!(gate.waiting(), 1);
            drop((running, waiting));
            eventually("the worker is let go", || gate.waiting() == 0);
            assert_idle(&proxy);
        }
        gate.open();
    }

    fn a_worker_without_a_limit_that_is_gone_is_no_room(v: Variant) {
        let gate = Gate::new();
        let (busy, gone) = (worker().holds(&gate).start(), worker().start());
        let one = format!("{}#max_concurrent_requests=1", busy.url());
        let proxy = proxy(v).url(&one).worker(&gone).start();
        gone.go_down();
        eventually("it is known to be gone", || !proxy.usable_workers().contains(&gone.url()));
        let mut running = begin(&proxy, "", &chat("running", ""));
        busy.wait_for_requests(1);
        let mut waiting = begin(&proxy, "", &chat("waiting", ""));
        queue_is(&proxy, 1);
        gate.open();
        running.response().expect(200);
        waiting.response().expect(200);
        assert_eq!(said(&busy), ["running", "waiting"]);
        assert_idle(&proxy);
    }

    fn who_waits_is_served_by_a_worker_that_comes_back(v: Variant) {
        let gate = Gate::new();
        let (busy, gone) = (worker().holds(&gate).start(), worker().start());
        let [one, other] = [&busy, &gone].map(|worker| format!("{}#max_concurrent_requests=1", worker.url()));
        let proxy = proxy(v).url(&one).url(&other).start();
        gone.go_down();
        eventually("it is known to be gone", || !proxy.usable_workers().contains(&gone.url()));
        let running = begin(&proxy, "", &chat("running", ""));
        busy.wait_for_requests(1);
        let mut waiting = begin(&proxy, "", &chat("waiting", ""));
        queue_is(&proxy, 1);
        gone.come_back();
        waiting.response().expect(200);
        assert_eq!((said(&busy), said(&gone)), (vec!["running".to_owned()], vec!["waiting".to_owned()]));
        drop(running);
        assert_idle(&proxy);
    }

    fn a_place_that_was_waited_for_on_a_worker_that_died_is_not_the_end(v: Variant) {
        let gate = Gate::new();
        let (dies, lives) = (worker().holds(&gate).start(), worker().holds(&gate).start());
        let [one, other] = [&dies, &lives].map(|worker| format!("{}#max_concurrent_requests=1", worker.url()));
        let proxy = proxy(v).url(&one).url(&other).arg("--health-check-interval-secs", "3600").start();
        let mut first: Vec<Client> = (0..2).map(|_| begin(&proxy, "", &chat("running", ""))).collect();
        dies.wait_for_requests(1);
        lives.wait_for_requests(1);
        let mut waiting: Vec<Client> = (0..2).map(|_| begin(&proxy, "", &chat("waiting", ""))).collect();
        queue_is(&proxy, 2);
        // its request fails, and whoever takes the place finds nobody there
        dies.go_down();
        gate.open();
        for client in &mut waiting {
            client.response().expect(200);
        }
        first.iter_mut().for_each(|client| drop(client.response()));
        assert_idle(&proxy);
    }

    fn what_waits_when_draining_begins_is_served(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v)
            .worker(&worker)
            .arg("--max-concurrent-requests", "1")
            .arg("--shutdown-grace-secs", "60")
            .start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        let mut waiting = begin(&proxy, "", &chat("waiting", ""));
        queue_is(&proxy, 1);
        proxy.drain();
        gate.open();
        running.response().expect(200);
        waiting.response().expect(200);
        proxy.wait();
    }

    fn a_large_body_is_refused_before_it_is_read_where_the_queue_is_full(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1").arg("--queue-size", "0").start();
        let mut running = begin(&proxy, "", &chat("running", ""));
        worker.wait_for_requests(1);
        for framing in ["Content-Length: 10000000", "Transfer-Encoding: chunked"] {
            let mut large = proxy.client();
            large.send(format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n{framing}\r\n\r\n"));
            let answer = large.response();
            assert_refused(&answer, 429, "queue full");
            assert_eq!(answer.header("connection").as_deref(), Some("close"));
        }
        gate.open();
        running.response().expect(200);
    }

    fn c11_a_slow_upload_holds_no_slot(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--max-concurrent-requests", "1").start();
        let mut slow = proxy.client();
        let body = chat("slow", "");
        slow.send(format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()));
        slow.send(&body[..10]);
        proxy.client().chat("m").expect(200);
        slow.send(&body[10..]);
        slow.response().expect(200);
        assert_idle(&proxy);
    }

    fn c16_bodies_beyond_the_budget_are_refused_and_the_memory_comes_back(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--body-memory-bytes", "1000000").start();
        let body = chat(&"x".repeat(700_000), "");
        let request = client::post("/v1/chat/completions", &body);
        let mut first = proxy.client();
        first.send(&request[..request.len() - 1]);
        let held = || proxy.metric("vllm_proxy_body_memory_bytes ").unwrap_or_default() as u64;
        eventually("the first is held", || held() >= 700_000);
        let chunked = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        for other in [&request[..], chunked.as_bytes()] {
            let mut client = proxy.client();
            client.try_send(other);
            let answer = client.response();
            assert_refused(&answer, 503, "memory");
            assert_eq!(answer.header("connection").as_deref(), Some("close"), "it was not read to its end");
        }
        assert_counted(&proxy, "body_memory", 2.0);
        // to come back would not help this one
        let never = client::post("/v1/chat/completions", chat(&"x".repeat(1_100_000), ""));
        let mut client = proxy.client();
        client.try_send(&never);
        assert_eq!(client.response().status, 413);
        proxy.client().chat("m").expect(200);
        first.send(&request[request.len() - 1..]).response().expect(200);
        eventually("it comes back", || held() == 0);
        proxy.client().send(&request).response().expect(200);
        eventually("it comes back", || held() == 0);
    }

    fn p5_the_memory_of_a_body_is_free_as_soon_as_its_answer_begins(v: Variant) {
        let gate = Gate::new();
        let worker = worker().on("/v1/chat/completions", stream_held_by(&gate)).start();
        let proxy = proxy(v).worker(&worker).arg("--body-memory-bytes", "1000000").start();
        let body = chat(&"x".repeat(700_000), r#","stream":true"#);
        let mut streams: Vec<Client> = Vec::new();
        for _ in 0..4 {
            let mut stream = begin(&proxy, "", &body);
            stream.read_until("\"one\"");
            streams.push(stream);
        }
        assert_eq!(proxy.metric("vllm_proxy_body_memory_bytes "), Some(0.0));
        gate.open();
        for stream in &mut streams {
            stream.read_until("[DONE]");
        }
        // a client that goes while it sends gives back what it had
        let mut gone = proxy.client();
        gone.send(&client::post("/v1/chat/completions", &body)[..600_000]);
        eventually("it is held", || proxy.metric("vllm_proxy_body_memory_bytes ") > Some(0.0));
        gone.reset();
        eventually("it comes back", || proxy.metric("vllm_proxy_body_memory_bytes ") == Some(0.0));
    }

    fn a_thousand_requests_through_a_narrow_door_are_all_answered(v: Variant) {
        let worker = worker().start();
        let url = format!("{}#max_concurrent_requests=3", worker.url());
        let proxy = proxy(v).url(&url).arg("--max-concurrent-requests", "4").start();
        std::thread::scope(|scope| {
            for _ in 0..16 {
                let mut client = proxy.client();
                scope.spawn(move || {
                    for _ in 0..64 {
                        client.chat("m").expect(200);
                    }
                });
            }
        });
        assert_eq!(worker.complete_requests().len(), 1024);
        assert_idle(&proxy);
    }
}
