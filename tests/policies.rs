//! Who gets a request, policy by policy, seen from outside: how requests spread, who stays where, what gives way
//! under load and when a worker is lost. The defects of other routers that begin here (`peers.md` §7) are named.

use crate::support::{
    Gate, Proxy, Variant, Worker, answer, client, eventually, json_answer, proxy, script, sse_event,
    variants, worker,
    worker::{chunk, sse_end, sse_head},
};

/// A chat whose prompt is long enough to be known again: a system text of some kilobytes, then `turns`.
fn chat(system: &str, turns: &[&str]) -> String {
    let system = format!("{system}. ").repeat(2000 / system.len());
    let turns = turns.iter().map(|turn| serde_json::json!({"role": "user", "content": turn}));
    let messages: Vec<_> =
        [serde_json::json!({"role": "system", "content": system})].into_iter().chain(turns).collect();
    serde_json::json!({"messages": messages, "model": "m"}).to_string()
}

fn start(v: Variant, policy: &str, workers: &[Worker]) -> Proxy {
    workers.iter().fold(proxy(v).arg("--policy", policy), |proxy, worker| proxy.worker(worker)).start()
}

fn workers(count: usize) -> Vec<Worker> {
    (0..count).map(|_| worker().start()).collect()
}

fn counts(workers: &[Worker]) -> Vec<usize> {
    workers.iter().map(|worker| worker.requests().len()).collect()
}

fn busiest(workers: &[Worker]) -> usize {
    let counts = counts(workers);
    (0..counts.len()).max_by_key(|&at| counts[at]).unwrap()
}

variants! {
    fn round_robin_goes_round(v: Variant) {
        let workers = workers(3);
        let proxy = start(v, "roundrobin", &workers);
        let mut client = proxy.client();
        for _ in 0..9 {
            client.chat("m").expect(200);
        }
        assert_eq!(counts(&workers), [3, 3, 3], "one connection is one shard");
    }

    fn chance_and_power_of_two_leave_nobody_out(v: Variant) {
        for policy in ["random", "power_of_two"] {
            let workers = workers(3);
            let proxy = start(v, policy, &workers);
            let mut client = proxy.client();
            for _ in 0..60 {
                client.chat("m").expect(200);
            }
            // who expects 20 gets fewer than 3 once in 10^7 times
            assert!(counts(&workers).iter().all(|&count| count >= 3), "{policy}: {:?}", counts(&workers));
        }
    }

    /// Several proxies before the same workers must not all run to the same one.
    fn proxies_do_not_choose_in_step(v: Variant) {
        let workers = workers(2);
        let chosen = || {
            let proxy = workers.iter().fold(proxy(v).arg("--policy", "random").flag("--worker-header"), |proxy, worker| proxy.worker(worker));
            let proxy = proxy.start();
            let mut client = proxy.client();
            let mut choose = || client.chat("m").expect(200).header("x-vllm-proxy-worker").unwrap();
            (0..40).map(|_| choose()).collect::<Vec<String>>()
        };
        assert_ne!(chosen(), chosen(), "that would be one chance in 2^40");
    }

    fn policies_of_load_leave_a_busy_worker_alone(v: Variant) {
        for policy in ["least_requests", "power_of_two", "capacity"] {
            let gate = Gate::new();
            let busy = worker().model("m").model("own").holds(&gate).start();
            let free = worker().model("m").start();
            let proxy = proxy(v).arg("--policy", policy).worker(&busy).worker(&free).start();
            let mut waiting: Vec<_> = (0..3).map(|_| proxy.client()).collect();
            for client in &mut waiting {
                client.send(client::post("/v1/chat/completions", client::chat("own")));
            }
            eventually("it is busy", || gate.waiting() == 3);
            for _ in 0..10 {
                proxy.client().chat("m").expect(200);
            }
            assert_eq!((busy.requests().len(), free.requests().len()), (3, 10), "{policy}");
            gate.open();
            waiting.iter_mut().for_each(|client| drop(client.response().expect(200)));
        }
    }

    fn a_session_stays_and_sessions_spread(v: Variant) {
        let workers = workers(4);
        let proxy = start(v, "session", &workers);
        let mut used = Vec::new();
        for session in 0..16 {
            workers.iter().for_each(Worker::forget);
            for turn in 0..4 {
                let headers = format!("x-session-id: s{session}\r\nx-request-id: {session}-{turn}\r\nContent-Type: application/json\r\n");
                proxy.client().request("POST", "/v1/chat/completions", &headers, client::chat("m").as_bytes()).expect(200);
            }
            assert_eq!(counts(&workers)[busiest(&workers)], 4, "session {session}: {:?}", counts(&workers));
            used.push(busiest(&workers));
        }
        used.sort_unstable();
        used.dedup();
        assert!(used.len() >= 3, "16 sessions went to {used:?}");
    }

    /// Defect 5 of the peers: without a session header all chats went to one worker.
    fn what_names_no_session_does_not_go_to_one_worker(v: Variant) {
        let workers = workers(3);
        let proxy = start(v, "consistent_hash", &workers);
        for _ in 0..40 {
            proxy.client().chat("m").expect(200);
        }
        assert!(counts(&workers).iter().all(|&count| count <= 30), "{:?}", counts(&workers));
        workers.iter().for_each(Worker::forget);
        for user in 0..40 {
            let body = format!(r#"{{"model":"m","user":"u{user}","messages":[]}}"#);
            proxy.post("/v1/chat/completions", body).expect(200);
        }
        assert!(counts(&workers).iter().all(|&count| count <= 30), "{:?}", counts(&workers));
    }

    fn a_lost_worker_moves_only_its_own_sessions(v: Variant) {
        let workers = workers(3);
        let proxy = start(v, "consistent_hash", &workers);
        let place = |session: usize| {
            workers.iter().for_each(Worker::forget);
            let headers = format!("x-session-id: s{session}\r\nContent-Type: application/json\r\n");
            proxy.client().request("POST", "/v1/chat/completions", &headers, client::chat("m").as_bytes()).expect(200);
            busiest(&workers)
        };
        let before: Vec<_> = (0..12).map(place).collect();
        workers[1].go_down();
        eventually("it is out", || proxy.usable_workers().len() == 2);
        for (session, &was) in before.iter().enumerate() {
            let now = place(session);
            assert!(now == was || was == 1, "session {session} moved from {was} to {now}");
            assert_ne!(now, 1);
        }
        workers[1].come_back();
        eventually("it is back", || proxy.usable_workers().len() == 3);
        let after: Vec<_> = (0..12).map(place).collect();
        assert_eq!(after, before, "what moved moves back");
    }

    fn a_prompt_goes_where_its_prefix_is(v: Variant) {
        let workers = workers(3);
        let proxy = start(v, "cache_aware", &workers);
        for system in ["You are a pirate", "Translate into Dutch", "Answer in verse", "Be brief"] {
            workers.iter().for_each(Worker::forget);
            let mut turns = vec!["hello"];
            for _ in 0..5 {
                proxy.post("/v1/chat/completions", chat(system, &turns)).expect(200);
                turns.push("and then?");
            }
            assert_eq!(counts(&workers)[busiest(&workers)], 5, "{system}: {:?}", counts(&workers));
        }
    }

    /// Defect 6 of the peers: cold, distinct prompts went to the first worker.
    fn cold_prompts_spread(v: Variant) {
        let workers = workers(3);
        let proxy = start(v, "prefixaware", &workers);
        for prompt in 0..60 {
            proxy.post("/v1/chat/completions", chat(&format!("prompt {prompt}"), &[])).expect(200);
        }
        assert!(counts(&workers).iter().all(|&count| count >= 3), "{:?}", counts(&workers));
    }

    /// production-stack's `prefixaware` sends everything that shares a system prompt to one worker, busy or not.
    fn a_shared_prefix_spills_when_its_worker_is_busy(v: Variant) {
        let gate = Gate::new();
        let workers: Vec<_> = (0..2).map(|_| worker().holds(&gate).start()).collect();
        let proxy = start(v, "cache_aware", &workers);
        let mut clients: Vec<_> = (0..24).map(|_| proxy.client()).collect();
        for (count, client) in clients.iter_mut().enumerate() {
            let turn = format!("question {count}");
            client.send(client::post("/v1/chat/completions", chat("You are shared", &[&turn])));
            eventually("it has arrived", || gate.waiting() == count + 1);
        }
        assert!(counts(&workers).iter().all(|&count| count >= 6), "{:?}", counts(&workers));
        gate.open();
        clients.iter_mut().for_each(|client| drop(client.response().expect(200)));
    }

    fn who_lost_its_cache_is_not_believed_to_have_it(v: Variant) {
        let workers = workers(2);
        let proxy = start(v, "cache_aware", &workers);
        let prompt = chat("Remember this", &["hello"]);
        proxy.post("/v1/chat/completions", &prompt).expect(200);
        let home = busiest(&workers);
        workers[home].go_down();
        eventually("it is out", || proxy.usable_workers().len() == 1);
        proxy.post("/v1/chat/completions", &prompt).expect(200);
        assert_eq!(workers[1 - home].requests().len(), 1, "the other one took over");
        workers[home].come_back();
        eventually("it is back", || proxy.usable_workers().len() == 2);
        workers.iter().for_each(Worker::forget);
        for _ in 0..6 {
            proxy.post("/v1/chat/completions", &prompt).expect(200);
        }
        assert_eq!(workers[1 - home].requests().len(), 6, "who came back has nothing in its cache");
    }

    /// production-stack answered 500 to what has no `messages`; every body that a worker takes must get there.
    fn every_kind_of_prompt_is_taken(v: Variant) {
        let workers = workers(2);
        let long = "x".repeat(3000);
        let ids: Vec<u32> = (0..1500).collect();
        let bodies = [
            ("/v1/embeddings", format!(r#"{{"model":"m","input":["{long}","b"]}}"#)),
            ("/v1/embeddings", serde_json::json!({"model": "m", "input": ids}).to_string()),
            ("/v1/completions", serde_json::json!({"model": "m", "prompt": [ids, ids]}).to_string()),
            ("/v1/completions", format!(r#"{{"model":"m","prompt":"{long}"}}"#)),
            ("/v1/completions", r#"{"model":"m","prompt":null}"#.to_owned()),
            ("/v1/responses", format!(r#"{{"model":"m","instructions":"{long}","input":"hi"}}"#)),
            ("/v1/messages", format!(r#"{{"model":"m","system":"{long}","messages":[]}}"#)),
            ("/rerank", format!(r#"{{"model":"m","query":"q","documents":["{long}"]}}"#)),
            ("/score", format!(r#"{{"model":"m","text_1":"{long}","text_2":["a"]}}"#)),
            ("/v1/chat/completions", r#"{"model":"m","messages":[{"role":"user","content":null}]}"#.to_owned()),
            ("/v1/chat/completions", r#"{"model":"m","messages":7}"#.to_owned()),
            ("/detokenize", serde_json::json!({"model": "m", "tokens": ids}).to_string()),
        ];
        for policy in ["cache_aware", "consistent_hash", "capacity"] {
            let proxy = start(v, policy, &workers);
            for (path, body) in &bodies {
                workers.iter().for_each(Worker::forget);
                proxy.post(path, body);
                let got: Vec<_> = workers.iter().flat_map(Worker::requests).collect();
                assert_eq!(got.len(), 1, "{policy} {path}");
                assert_eq!(got[0].body, body.as_bytes(), "{policy} {path}");
            }
        }
    }

    /// Defect 4 of the peers: N calls per request, and a worker that hangs made every request slow. Ours asks nobody
    /// but the worker that it chose.
    fn a_choice_asks_no_worker(v: Variant) {
        let gate = Gate::new();
        let hung = worker().model("m").model("own").holds(&gate).start();
        let free = worker().model("m").start();
        let proxy = proxy(v).worker(&hung).worker(&free).start();
        let mut waiting = proxy.client();
        waiting.send(client::post("/v1/chat/completions", chat("hold", &[]).replace("\"m\"", "\"own\"")));
        eventually("it hangs", || gate.waiting() == 1);
        for turn in 0..10 {
            let turn = format!("turn {turn}");
            proxy.post("/v1/chat/completions", chat("Go on", &[&turn])).expect(200);
        }
        assert_eq!((hung.requests().len(), free.requests().len()), (1, 10));
        gate.open();
        waiting.response().expect(200);
    }

    fn the_answer_names_its_worker_when_asked_to(v: Variant) {
        let workers = workers(2);
        let silent = start(v, "cache_aware", &workers);
        assert_eq!(silent.client().chat("m").expect(200).header("x-vllm-proxy-worker"), None);
        workers.iter().for_each(Worker::forget);
        let proxy = workers.iter().fold(proxy(v).flag("--worker-header"), |proxy, worker| proxy.worker(worker)).start();
        for body in [client::chat("m"), client::chat_stream("m")] {
            workers.iter().for_each(Worker::forget);
            let named = proxy.post("/v1/chat/completions", body).expect(200).header("x-vllm-proxy-worker");
            assert_eq!(named, Some(workers[busiest(&workers)].url()));
        }
        for path in ["/metrics", "/load", "/v1/responses/resp_1"] {
            assert_eq!(proxy.get(path).header("x-vllm-proxy-worker"), None, "{path} is answered by no single worker");
        }
    }

    fn prompts_beyond_the_limit_go_through_by_their_length(v: Variant) {
        let workers = workers(2);
        let proxy = workers.iter().fold(proxy(v).arg("--prompt-peek-bytes", "4096"), |proxy, worker| proxy.worker(worker)).start();
        let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "y".repeat(300_000));
        for _ in 0..4 {
            proxy.post("/v1/completions", &body);
        }
        let got: Vec<_> = workers.iter().flat_map(Worker::requests).collect();
        assert_eq!(got.len(), 4);
        assert!(got.iter().all(|request| request.body == body.as_bytes()));
    }

    fn a_prompt_is_queued_until_its_first_token(v: Variant) {
        let (first, last) = (Gate::new(), Gate::new());
        let stream = script().send(sse_head()).wait(&first).send(sse_event("he")).wait(&last).send(sse_event("llo")).send(sse_end());
        let worker = worker().on("/v1/chat/completions", stream).start();
        let proxy = proxy(v).worker(&worker).start();
        let tokens = || {
            let read = |name| proxy.metric(name).unwrap_or(-1.0) as i64;
            (read("vllm_proxy_worker_queued_tokens"), read("vllm_proxy_worker_decode_tokens"))
        };
        let mut client = proxy.client();
        let prompt = chat("You stream", &["go"]).replacen('{', r#"{"stream":true,"#, 1);
        client.send(client::post("/v1/chat/completions", prompt));
        client.read_until("\r\n\r\n");
        eventually("it is queued", || first.waiting() == 1);
        let (queued, decoding) = tokens();
        assert!(queued > 400 && decoding == 0, "{queued} {decoding}");
        first.open();
        client.read_until("he");
        let (left, decoding) = tokens();
        // what is queued is its work, which is a little more than its tokens
        assert!(left == 0 && (400..=queued).contains(&decoding), "the first event is the first token: {left} {decoding}");
        last.open();
        client.read_until("[DONE]");
        eventually("nothing is left", || tokens() == (0, 0));
    }

    /// vLLM says that it has begun a response before it computes anything.
    fn a_response_that_was_only_created_has_no_token_yet(v: Variant) {
        let first = Gate::new();
        let created = chunk("event: response.created\ndata: {\"type\":\"response.created\"}\n\n");
        let stream = script().send(sse_head()).send(created).wait(&first).send(sse_event("he")).send(sse_end());
        let worker = worker().on("/v1/responses", stream).start();
        let proxy = proxy(v).worker(&worker).start();
        let queued = || proxy.metric("vllm_proxy_worker_queued_tokens").unwrap_or(-1.0);
        let mut client = proxy.client();
        let prompt = serde_json::json!({"model": "m", "stream": true, "input": "z".repeat(2000)}).to_string();
        client.send(client::post("/v1/responses", prompt));
        client.read_until("response.created\"}");
        assert!(queued() > 400.0, "{}", queued());
        first.open();
        client.read_until("[DONE]");
        eventually("nothing is queued", || queued() == 0.0);
    }

    fn what_an_answer_reports_is_counted_and_learnt(v: Variant) {
        let usage = r#"{"id":"c","choices":[],"usage":{"prompt_tokens":1000,"total_tokens":1005,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":250}},"prompt_logprobs":null}"#;
        let event = format!("data: {usage}\n\n");
        let streamed = script().send(sse_head()).send(sse_event("x")).send(chunk(event)).send(sse_end());
        let worker = worker()
            .on("/v1/completions", script().send(json_answer(usage)))
            .on("/v1/chat/completions", streamed)
            .start();
        let proxy = proxy(v).worker(&worker).start();
        let read = |name: &str| proxy.metric(name).unwrap_or(-1.0);
        let prompt = serde_json::json!({"model": "m", "prompt": "z".repeat(2000)}).to_string();
        proxy.post("/v1/completions", &prompt).expect(200);
        eventually("it is counted", || read("vllm_proxy_worker_reported_prompt_tokens_total") == 1000.0);
        assert_eq!(read("vllm_proxy_worker_reported_cached_tokens_total"), 250.0);
        let before = read("vllm_proxy_worker_prompt_tokens_total");
        assert!((490.0..=510.0).contains(&before), "four bytes are a token until more is known: {before}");
        // two connections may be two shards, which learn as one
        proxy.post("/v1/completions", &prompt).expect(200);
        let after = read("vllm_proxy_worker_prompt_tokens_total") - before;
        assert!((990.0..=1010.0).contains(&after), "two bytes are a token: {after}");
        assert!(read("vllm_proxy_worker_predicted_cached_tokens_total") > 500.0);
        proxy.post("/v1/chat/completions", chat("You stream", &["go"])).expect(200);
        eventually("the stream is counted", || read("vllm_proxy_worker_reported_prompt_tokens_total") == 3000.0);
    }

    fn a_load_that_an_answer_tells_is_taken_over(v: Variant) {
        let told = "endpoint-load-metrics: JSON {\"named_metrics\": {\"num_requests_waiting\": 7.0, \"kv_cache_usage_perc\": 0.5}}\r\n";
        let answer = answer("200 OK", "application/json", told, "{}");
        let worker = worker().on("/v1/chat/completions", script().send(answer)).start();
        let proxy = proxy(v).arg("--engine-stats-interval", "0").worker(&worker).start();
        proxy.client().chat("m").expect(200);
        assert_eq!(proxy.metric("vllm_proxy_worker_engine_waiting"), Some(7.0));
    }

    fn every_choice_is_counted_by_its_policy(v: Variant) {
        let workers = [worker().model("a").start(), worker().model("b").start()];
        let proxy = workers.iter().fold(proxy(v).arg("--model-policy", "b=random"), |proxy, worker| proxy.worker(worker)).start();
        for model in ["a", "b", "b"] {
            proxy.client().chat(model).expect(200);
        }
        let count = |worker: &Worker, policy: &str| {
            let text = proxy.get("/metrics").text().to_owned();
            let line = text.lines().find(|line| {
                line.starts_with("vllm_proxy_worker_selections") && line.contains(&worker.url()) && line.contains(policy)
            });
            line.map(|line| line.rsplit(' ').next().unwrap().to_owned())
        };
        assert_eq!(count(&workers[0], "cache_aware").as_deref(), Some("1"));
        assert_eq!(count(&workers[1], "random").as_deref(), Some("2"));
    }

    fn only_a_response_continues_another(v: Variant) {
        let workers = workers(2);
        let proxy = start(v, "cache_aware", &workers);
        let body = r#"{"model":"m","messages":[],"prompt":"x","input":"x","previous_response_id":"resp_1"}"#;
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses/render"] {
            workers.iter().for_each(Worker::forget);
            proxy.post(path, body);
            assert_eq!(counts(&workers).iter().sum::<usize>(), 1, "{path}");
        }
    }
}
