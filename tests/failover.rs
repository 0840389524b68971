//! Workers that cannot be reached, and what a client sees of it: nothing, as long as one is left.

use crate::support::{
    Response, answer, client, dead_url, eventually, json_answer, proxy, script, variants, worker,
};

/// An hour: what happens in these tests is learnt from requests, not from probes.
const NEVER: &str = "3600";

fn assert_error(answer: &Response, status: u16, kind: &str) {
    assert_eq!(answer.status, status, "{answer}");
    let error = answer.json()["error"].clone();
    assert_eq!(error["type"], kind, "{answer}");
    assert_eq!(error["code"], status, "{answer}");
    assert!(error["param"].is_null() && error["message"].is_string(), "{answer}");
    assert_eq!(answer.header("content-type").as_deref(), Some("application/json"));
}

variants! {
    fn a_refused_connect_goes_to_another_worker(v: Variant) {
        let (gone, left) = (worker().start(), worker().start());
        let proxy = proxy(v).worker(&gone).worker(&left).arg("--health-check-interval-secs", NEVER).start();
        gone.go_down();
        for _ in 0..12 {
            assert_eq!(proxy.client().chat("m").expect(200).completion(), "ok");
        }
        assert_eq!(left.complete_requests().len(), 12);
        assert!(!proxy.usable_workers().contains(&gone.url()), "out after its first transport error");
        assert!(proxy.usable_workers().contains(&left.url()));
    }

    fn a_dead_worker_in_the_list_harms_nobody(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).url(&dead_url()).worker(&worker).start();
        for _ in 0..10 {
            proxy.client().chat("m").expect(200);
        }
    }

    fn a_worker_is_out_after_a_transport_error_and_back_after_a_good_probe(v: Variant) {
        let (flapping, steady) = (worker().start(), worker().start());
        let proxy = proxy(v).worker(&flapping).worker(&steady).start();
        flapping.go_down();
        eventually("it is out", || {
            proxy.client().chat("m").expect(200);
            !proxy.usable_workers().contains(&flapping.url())
        });
        flapping.come_back();
        eventually("it is back", || proxy.usable_workers().contains(&flapping.url()));
        flapping.forget();
        for _ in 0..10 {
            proxy.client().chat("m").expect(200);
        }
        assert!(!flapping.requests().is_empty(), "it is back but gets nothing");
    }

    fn a_pooled_connection_that_was_closed_meanwhile_is_not_noticed(v: Variant) {
        let worker = worker().on("/silent-close", script().send(json_answer("{}")).close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..5 {
            // the worker answers and closes, without having said so
            assert_eq!(client.get("/silent-close").expect(200).text(), "{}");
            assert_eq!(client.chat("m").expect(200).completion(), "ok");
            eventually("the worker's connection is idle, and closed", || worker.close_idle() == 1);
            assert_eq!(client.chat("m").expect(200).completion(), "ok");
        }
        assert_eq!(worker.complete_requests().len(), 15, "each exactly once");
    }

    fn a_reused_connection_that_dies_under_a_request_gets_a_fresh_one(v: Variant) {
        for reset in [false, true] {
            let worker = worker().on_request("/v1/embeddings", move |request| match request.nth {
                0 => script().send(json_answer("{}")),
                _ if reset => script().reset(),
                _ => script().close(),
            }).start();
            let proxy = proxy(v).worker(&worker).start();
            let mut client = proxy.client();
            let body = crate::compat::noise(30_000);
            for count in 1..=4 {
                let answer = client.request("POST", "/v1/embeddings", "", &body);
                assert_eq!(answer.status, 200, "request {count}, reset {reset}: {answer}");
                assert!(worker.requests().last().unwrap().body == body, "the retry was sent another body");
            }
            // the first on a fresh connection; each further one dies on the reused and lives on a fresh one
            assert_eq!(worker.requests().len(), 7);
            assert!(proxy.usable_workers().contains(&worker.url()), "a stale connection is no failure of the worker");
        }
    }

    fn a_fresh_connection_that_dies_is_not_tried_on_the_same_worker_again(v: Variant) {
        for script in [script().close(), script().reset()] {
            let worker = worker().on("/v1/files", script).start();
            let proxy = proxy(v).worker(&worker).start();
            let answer = proxy.post("/v1/files", "{}");
            assert_error(&answer, 502, "Bad Gateway");
            assert_eq!(worker.requests().len(), 1, "a request that kills workers must not be repeated");
            // the client's connection stays usable
            let mut client = proxy.client();
            assert_eq!(client.post("/v1/files", "{}").status, 502);
            assert_eq!(client.chat("m").expect(200).completion(), "ok");
        }
    }

    fn a_reused_connection_gets_one_fresh_one_and_no_more(v: Variant) {
        let worker = worker().on("/v1/embeddings", script().close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.chat("m").expect(200);
        assert_error(&client.post("/v1/embeddings", "{}"), 502, "Bad Gateway");
        let got: Vec<_> = worker.requests().into_iter().filter(|got| got.path() == "/v1/embeddings").collect();
        assert_eq!(got.len(), 2);
        assert_ne!(got[0].connection, got[1].connection);
    }

    fn all_dead_is_a_503_that_says_when_to_come_back(v: Variant) {
        let workers = [worker().start(), worker().start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        workers[0].go_down();
        workers[1].go_down();
        let answer = eventually("all are known to be dead", || {
            let answer = proxy.client().chat("m");
            if answer.status == 503 { Ok(answer) } else { Err(answer.status) }
        });
        assert_error(&answer, 503, "Service Unavailable");
        let after: u64 = answer.header("retry-after").expect("Retry-After").parse().expect("seconds");
        assert!((1..=120).contains(&after), "{after}");
        let mut client = proxy.client();
        assert_eq!(client.chat("m").status, 503);
        assert_eq!(client.chat("m").status, 503, "the connection is kept");
        workers[1].come_back();
        eventually("it works again", || proxy.client().chat("m").status == 200);
    }

    fn the_last_worker_is_still_tried(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", NEVER).start();
        worker.go_down();
        let answer = proxy.client().chat("m");
        assert!(matches!(answer.status, 502 | 503), "{answer}");
        worker.come_back();
        // nobody probes: only a request can find out
        assert_eq!(proxy.client().chat("m").expect(200).completion(), "ok");
    }

    fn busy_is_not_dead(v: Variant) {
        let busy = r#"{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.","type":"Service Unavailable","param":null,"code":503}}"#;
        let worker = worker().on("/v1/chat/completions", script().send(answer("503 Service Unavailable", "application/json", "", busy)))
            .on("/500", script().send(answer("500 Internal Server Error", "application/json", "", "{}"))).start();
        let proxy = proxy(v).worker(&worker).start();
        for _ in 0..30 {
            assert_eq!(proxy.client().chat("m").expect(503).text(), busy);
            proxy.get("/500").expect(500);
        }
        assert!(proxy.usable_workers().contains(&worker.url()));
        assert_eq!(proxy.get("/health").status, 200);
    }

    fn a_retried_request_reaches_the_other_worker_whole(v: Variant) {
        let (gone, left) = (worker().echo().start(), worker().echo().start());
        let proxy = proxy(v).worker(&gone).worker(&left).arg("--health-check-interval-secs", NEVER).start();
        gone.go_down();
        let big = crate::compat::noise(3_000_000);
        for _ in 0..4 {
            let answer = proxy.client().request("POST", "/v1/embeddings", "", &big).expect(200);
            assert!(answer.body == big);
        }
        let mut client = proxy.client();
        client.send(client::request("POST", "/e", "Connection: close\r\n", b"hi"));
        assert_eq!(client.response().expect(200).text(), "hi");
    }
}
