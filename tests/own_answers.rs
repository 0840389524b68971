//! What the proxy answers by itself, exactly as one vLLM would.

use serde_json::{Value, json};

use crate::support::{
    Client, Io, Response, Worker, answer, client, dead_url, eventually, head::head_end, json_answer, proxy,
    script, variants, worker,
};

/// Header names in order: uvicorn's shape.
fn names(answer: &Response) -> Vec<String> {
    answer.headers.0.iter().map(|(name, _)| name.clone()).collect()
}

fn bodies(worker: &Worker, path: &str) -> Vec<(String, String)> {
    worker
        .all_requests()
        .into_iter()
        .filter(|got| got.path() == path && got.method != "GET")
        .map(|got| (got.target, String::from_utf8(got.body).unwrap()))
        .collect()
}

variants! {
    fn the_model_list_of_one_worker_is_that_workers(v: Variant) {
        let worker = worker().model("a").lora("lo1", "a").start();
        let proxy = proxy(v).worker(&worker).start();
        let direct = Client::connect(worker.addr()).get("/v1/models").expect(200);
        let ours = proxy.get("/v1/models").expect(200);
        assert_eq!(ours.text(), direct.text());
        assert_eq!(names(&ours), names(&direct));
    }

    fn model_lists_are_merged_with_all_their_fields(v: Variant) {
        let workers = [worker().model_of_length("a", 4096).model("x").lora("lo1", "a").start(),
            worker().model_of_length("a", 1024).model("b").start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let list = proxy.get("/v1/models").expect(200).json();
        assert_eq!(list["object"], "list");
        let cards = list["data"].as_array().unwrap();
        let ids: Vec<_> = cards.iter().map(|card| card["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["a", "x", "lo1", "b"]);
        assert_eq!(cards[0]["max_model_len"], 1024, "the smallest is what every worker can do");
        assert_eq!((&cards[2]["parent"], &cards[2]["max_model_len"]), (&json!("a"), &Value::Null));
        for card in cards {
            let fields: Vec<_> = card.as_object().unwrap().keys().map(String::as_str).collect();
            let want = ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"];
            assert_eq!(fields, want);
        }
    }

    fn there_is_no_route_for_a_single_model(v: Variant) {
        let worker = worker().model("a").start();
        let proxy = proxy(v).worker(&worker).start();
        assert_eq!(proxy.get("/v1/models/a").expect(404).text(), r#"{"detail":"Not Found"}"#);
    }

    fn an_unknown_path_is_the_workers_to_answer(v: Variant) {
        let own = answer("404 Not Found", "application/json", "x-own: 1\r\n", r#"{"detail":"Not Found"}"#);
        let worker = worker().on("/nope", script().send(&own)).start();
        let proxy = proxy(v).worker(&worker).start();
        let got = proxy.get("/nope").expect(404);
        assert_eq!([got.head.clone(), got.body.clone()].concat().escape_ascii().to_string(), own.escape_ascii().to_string());
    }

    fn health_and_ping_say_whether_there_is_a_worker(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).start();
        let direct = Client::connect(worker.addr()).get("/health").expect(200);
        for (method, path) in [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")] {
            let answer = proxy.client().request(method, path, "", b"").expect(200);
            assert_eq!((answer.text(), answer.header("content-length").as_deref()), ("", Some("0")), "{method} {path}");
            assert_eq!(names(&answer), names(&direct), "{method} {path}");
        }
        assert!(worker.requests().is_empty(), "we answer ourselves");
        worker.set_health("503 Service Unavailable");
        for (method, path) in [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")] {
            eventually("the sick worker is seen", || {
                proxy.client().request(method, path, "", b"").status == 503
            });
            let answer = proxy.client().request(method, path, "", b"").expect(503);
            assert_eq!(answer.text(), "", "{method} {path}");
        }
        worker.set_health("200 OK");
        eventually("the healed worker is seen", || proxy.get("/health").status == 200);
    }

    fn health_is_503_while_no_worker_was_ever_reached(v: Variant) {
        let proxy = proxy(v).url(&dead_url()).without_waiting().start();
        assert_eq!(proxy.get("/health").expect(503).text(), "");
    }

    fn a_wrong_method_is_answered_as_a_worker_does(v: Variant) {
        let own = answer("405 Method Not Allowed", "application/json", "allow: GET\r\n", r#"{"detail":"Method Not Allowed"}"#);
        let worker = worker().on_request("*", move |request| match &request.method[..] {
            "HEAD" => script().send(&own[..head_end(&own).unwrap()]),
            _ => script().send(&own),
        }).start();
        let proxy = proxy(v).worker(&worker).start();
        for path in ["/health", "/v1/models", "/version", "/metrics"] {
            let answer = proxy.client().post(path, "{}");
            assert_eq!((answer.status, answer.text()), (405, r#"{"detail":"Method Not Allowed"}"#), "{path}: {answer}");
            assert_eq!(answer.header("allow").as_deref(), Some("GET"), "{path}: {answer}");
        }
        // uvicorn's routes do not know HEAD
        let answer = proxy.client().request("HEAD", "/health", "", b"");
        assert_eq!((answer.status, answer.header("allow").as_deref()), (405, Some("GET")), "{answer}");
    }

    fn version_is_the_lowest_of_the_workers(v: Variant) {
        let workers = [worker().version("0.33.0").start(), worker().version("0.32.0").start()];
        let both = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let answer = both.get("/version").expect(200);
        assert_eq!(answer.text(), r#"{"version":"0.32.0"}"#);
        assert_eq!(names(&answer), names(&Client::connect(workers[0].addr()).get("/version")));
        let one = proxy(v).worker(&workers[0]).start();
        assert_eq!(one.get("/version").expect(200).text(), r#"{"version":"0.33.0"}"#);
    }

    fn load_is_the_sum(v: Variant) {
        let workers = [worker().load(3).start(), worker().load(4).start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        assert_eq!(proxy.get("/load").expect(200).text(), r#"{"server_load":7}"#);
    }

    fn what_changes_a_worker_is_told_to_all_of_them(v: Variant) {
        let ok = |body: &str| script().send(json_answer(body));
        let make = |success: &str, sleeping: &str, size: &str, results: &str| {
            worker().on("/reset_prefix_cache", ok(success)).on("/is_sleeping", ok(sleeping))
                .on("/get_world_size", ok(size)).on("/collective_rpc", ok(results))
                .on("/sleep", ok(r#"{"status":"sleeping","level":1}"#))
                .on("/wake_up", ok(r#"{"status":"awake","tags":null}"#)).start()
        };
        let workers = [
            make(r#"{"success":true}"#, r#"{"is_sleeping":false}"#, r#"{"world_size":1}"#, r#"{"results":[[1]]}"#),
            make(r#"{"success":true}"#, r#"{"is_sleeping":true}"#, r#"{"world_size":2}"#, r#"{"results":[[2],3]}"#),
        ];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let rpc = r#"{"method": "list_loras"}"#;
        let asked = [
            ("POST", "/reset_prefix_cache", "", r#"{"success":true}"#),
            ("POST", "/sleep?level=1", "", r#"{"status":"sleeping","level":1}"#),
            ("POST", "/wake_up", "", r#"{"status":"awake","tags":null}"#),
            ("POST", "/collective_rpc", rpc, r#"{"results":[[1],[2],3]}"#),
            ("GET", "/is_sleeping", "", r#"{"is_sleeping":true}"#),
            ("GET", "/get_world_size", "", r#"{"world_size":3}"#),
        ];
        for (method, target, body, want) in asked {
            let answer = proxy.client().request(method, target, "Content-Type: application/json\r\n", body.as_bytes());
            assert_eq!((answer.status, answer.text()), (200, want), "{method} {target}");
        }
        for worker in &workers {
            assert_eq!(bodies(worker, "/sleep"), [("/sleep?level=1".to_owned(), String::new())]);
            assert_eq!(bodies(worker, "/collective_rpc"), [("/collective_rpc".to_owned(), rpc.to_owned())]);
            assert_eq!(bodies(worker, "/reset_prefix_cache").len(), 1);
        }
    }

    fn a_broadcast_that_one_worker_refuses_is_no_success(v: Variant) {
        let workers = [
            worker().on("/reset_prefix_cache", script().send(json_answer(r#"{"success":true}"#)))
                .on("/v1/load_lora_adapter", script().send(answer("200 OK", "", "", "Success: LoRA adapter 'x' added successfully."))).start(),
            worker().on("/reset_prefix_cache", script().send(json_answer(r#"{"success":false}"#)))
                .on("/v1/load_lora_adapter", script().send(answer("400 Bad Request", "application/json", "",
                    r#"{"error":{"message":"no such path","type":"BadRequestError","param":null,"code":400}}"#))).start(),
        ];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        assert_eq!(proxy.post("/reset_prefix_cache", "").expect(200).text(), r#"{"success":false}"#);
        let answer = proxy.post("/v1/load_lora_adapter", r#"{"lora_name":"x","lora_path":"/x"}"#);
        assert_eq!(answer.status, 400, "{answer}");
        assert!(answer.text().contains("no such path"), "{answer}");
    }

    fn an_adapter_is_loaded_on_every_worker_of_its_model(v: Variant) {
        let done = "Success: LoRA adapter 'x' added successfully.";
        let loads = || script().send(answer("200 OK", "", "", done));
        let workers = [worker().on("/v1/load_lora_adapter", loads()).start(), worker().on("/v1/load_lora_adapter", loads()).start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let ask = r#"{"lora_name":"x","lora_path":"/x"}"#;
        let answer = proxy.post("/v1/load_lora_adapter", ask).expect(200);
        assert_eq!(answer.text(), done);
        assert_eq!(answer.header("content-type"), None, "vLLM sends none here");
        for worker in &workers {
            assert_eq!(bodies(worker, "/v1/load_lora_adapter"), [("/v1/load_lora_adapter".to_owned(), ask.to_owned())]);
        }
    }

    fn metrics_have_their_names_and_move(v: Variant) {
        let (worker, other) = (worker().start(), worker().model("other").start());
        let proxy = proxy(v).worker(&worker).worker(&other).start();
        let page = proxy.get("/metrics").expect(200);
        for name in ["vllm_proxy_build_info", "vllm_proxy_io_backend", "vllm_proxy_shards", "vllm_proxy_requests_total",
            "vllm_proxy_requests_in_flight", "vllm_proxy_connections_open", "vllm_proxy_connections_total",
            "vllm_proxy_received_bytes_total", "vllm_proxy_sent_bytes_total", "vllm_proxy_time_to_first_byte_seconds_bucket",
            "vllm_proxy_retries_total", "vllm_proxy_refused_requests_total", "vllm_proxy_panics_total",
            "vllm_proxy_worker_health", "vllm_proxy_worker_in_flight", "vllm_proxy_worker_attempts_total",
            "vllm_proxy_worker_transport_errors_total", "vllm_proxy_worker_connects_total"]
        {
            assert!(page.text().lines().any(|line| line.starts_with(name)), "{name} is missing:\n{}", page.text());
        }
        let backend = if v.io == Io::Uring { "io_uring" } else { "epoll" };
        assert_eq!(proxy.metric(&format!("vllm_proxy_io_backend{{backend=\"{backend}\"}}")), Some(1.0));
        assert_eq!(proxy.metric("vllm_proxy_shards"), Some(v.shards as f64));
        assert_eq!(proxy.metric("vllm_proxy_panics_total"), Some(0.0));
        let chats = || page_sum(&proxy.get("/metrics").expect(200), "/v1/chat/completions", "2xx");
        let (before, sent) = (chats(), proxy.metric("vllm_proxy_sent_bytes_total").unwrap());
        for _ in 0..3 {
            proxy.client().chat("m").expect(200);
        }
        eventually("three more requests are counted", || {
            let now = chats();
            if now == before + 3.0 { Ok(()) } else { Err(now) }
        });
        assert!(proxy.metric("vllm_proxy_sent_bytes_total").unwrap() > sent);
        let attempts = format!("vllm_proxy_worker_attempts_total{{worker=\"{}\"}}", worker.url());
        assert_eq!(proxy.metric(&attempts), Some(3.0));
        proxy.client().chat("nope").expect(404);
        eventually("the refusal is counted", || {
            proxy.metric("vllm_proxy_refused_requests_total{reason=\"unknown_model\"}") == Some(1.0)
        });
    }

    fn an_answer_of_our_own_has_vllms_shape(v: Variant) {
        let (worker, other) = (worker().start(), worker().model("other").start());
        let proxy = proxy(v).worker(&worker).worker(&other).start();
        let mut client = proxy.client();
        let answer = client.post("/v1/chat/completions", client::chat("nope")).expect(404);
        assert_eq!(names(&answer), ["date", "server", "content-length", "content-type", "vary"]);
        assert_eq!(answer.header("vary").as_deref(), Some("Origin"));
        assert_eq!(answer.reason, "Not Found");
        let date = answer.header("date").unwrap();
        assert!(date.ends_with(" GMT") && date.len() == "Sat, 21 Nov 2026 09:10:10 GMT".len(), "{date}");
        client.chat("m").expect(200);
    }
}

/// Sum of the request counters whose labels contain both.
fn page_sum(page: &Response, endpoint: &str, code: &str) -> f64 {
    let (endpoint, code) = (format!("\"{endpoint}\""), format!("\"{code}\""));
    let lines = page.text().lines().filter(|line| line.starts_with("vllm_proxy_requests_total"));
    lines
        .filter(|line| line.contains(&endpoint) && line.contains(&code))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
