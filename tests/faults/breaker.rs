//! Breakers: what opens one, what does not, and the way back.

use crate::support::{
    Gate, Proxy, Worker, answer, client, eventually, proxy, script, sse_event, variants, worker,
    worker::{sse_end, sse_head},
};

/// An hour: what happens is learnt from requests and doubts, not from the clock.
const NEVER: &str = "3600";

/// A figure of one worker.
fn figure(proxy: &Proxy, name: &str, worker: &Worker, label: &str) -> f64 {
    let series = format!("vllm_proxy_worker_{name}{{worker=\"{}\"{label}}}", worker.url());
    proxy.metric(&series).unwrap_or_else(|| panic!("no {series}"))
}

fn breaker(proxy: &Proxy, worker: &Worker) -> f64 {
    figure(proxy, "breaker_state", worker, "")
}

fn opened(proxy: &Proxy, worker: &Worker) -> f64 {
    figure(proxy, "ejections_total", worker, ",reason=\"breaker\"")
}

/// Lets `failing` refuse connections until its breaker has opened, with `rounds` requests that it fails; then it is
/// back.
fn trip(proxy: &Proxy, failing: &Worker, rounds: usize) {
    for _ in 0..rounds {
        eventually("it is in use", || proxy.usable_workers().contains(&failing.url()));
        let before = failing_connects(proxy, failing);
        failing.go_down();
        eventually("a request has found it gone", || {
            proxy.client().chat("m").expect(200);
            failing_connects(proxy, failing) > before
        });
        failing.come_back();
    }
    eventually("it is in use", || proxy.usable_workers().contains(&failing.url()));
}

fn failing_connects(proxy: &Proxy, worker: &Worker) -> f64 {
    figure(proxy, "ejections_total", worker, ",reason=\"connect\"")
}

variants! {
    fn breaker_no_sequence_of_requests_by_one_client_opens_one(v: Variant) {
        let poison = |worker: crate::support::worker::Builder| {
            let status = |line: &str| script().send(answer(line, "application/json", "", "{}"));
            worker
                .on("/v1/embeddings", status("500 Internal Server Error"))
                .on("/v1/score", script().reset())
                .on("/v1/rerank", script().close())
                .on("/pooling", status("404 Not Found"))
                .on("/classify", status("429 Too Many Requests"))
                .on("/score", script().send("HTTP/1.1 200 OK\r\ncontent-len").close())
                .on("/rerank", script().send("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").close())
                .on("/v2/rerank", script().send("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx").close())
                .on("/v2/embed", script().send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n").close())
                .on("/v1/responses", status("502 Bad Gateway"))
                .start()
        };
        let workers = [poison(worker()), poison(worker())];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).arg("--policy", "round_robin")
            .arg("--health-check-interval-secs", NEVER).arg("--health-check-window-size", "0")
            .arg("--cb-failure-threshold", "1").arg("--cb-window-duration-secs", NEVER).start();
        let paths = ["/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling", "/classify", "/score", "/rerank",
            "/v2/rerank", "/v2/embed", "/v1/responses"];
        for (count, path) in paths.iter().cycle().take(200).enumerate() {
            let mut poisoner = proxy.client();
            poisoner.send(client::post(path, r#"{"model":"m"}"#));
            let limit = crate::support::patience();
            poisoner.fill(limit).unwrap_or(0);
            if count % 10 == 0 {
                assert_eq!(proxy.client().chat("m").expect(200).completion(), "ok", "after {path}");
            }
        }
        for worker in &workers {
            assert!(worker.complete_requests().len() >= 50, "it got nothing of it");
            assert_eq!((breaker(&proxy, worker), opened(&proxy, worker)), (0.0, 0.0));
            assert!(proxy.usable_workers().contains(&worker.url()));
        }
        assert_eq!(proxy.get("/health").status, 200);
    }

    fn breaker_opens_after_refused_connects_and_keeps_requests_away(v: Variant) {
        let (failing, steady) = (worker().start(), worker().start());
        let proxy = proxy(v).worker(&failing).worker(&steady).arg("--policy", "round_robin")
            .arg("--health-check-interval-secs", NEVER).arg("--health-check-window-size", "0")
            .arg("--cb-failure-threshold", "2").arg("--cb-timeout-duration-secs", NEVER).start();
        trip(&proxy, &failing, 2);
        assert_eq!((breaker(&proxy, &failing), opened(&proxy, &failing)), (1.0, 1.0));
        failing.forget();
        for _ in 0..10 {
            proxy.client().chat("m").expect(200);
        }
        assert!(failing.requests().is_empty(), "its breaker is open");
        assert_eq!(breaker(&proxy, &steady), 0.0);
        steady.go_down();
        eventually("the last one is used however bad it is", || proxy.client().chat("m").status == 200);
        proxy.client().chat("m").expect(200);
        assert!(proxy.metric("vllm_proxy_panic_choices_total").is_some_and(|count| count >= 1.0));
    }

    fn breaker_half_open_lets_one_request_through_at_a_time(v: Variant) {
        let gate = Gate::new();
        let (failing, steady) = (worker().holds(&gate).start(), worker().start());
        let proxy = proxy(v).worker(&failing).worker(&steady).arg("--policy", "round_robin")
            .arg("--health-check-interval-secs", NEVER).arg("--health-check-window-size", "0")
            .arg("--cb-failure-threshold", "2").arg("--cb-success-threshold", "2").arg("--cb-timeout-duration-secs", "1")
            .start();
        trip(&proxy, &failing, 2);
        let trial = eventually("a trial is under way", || {
            let mut client = proxy.client();
            client.send(client::post("/v1/chat/completions", client::chat("m")));
            // either the steady one has answered, or the gate holds it
            eventually("it is somewhere", || gate.waiting() == 1 || client.fill(std::time::Duration::from_millis(2)).is_ok_and(|count| count > 0));
            (gate.waiting() == 1).then_some(client)
        });
        assert_eq!(breaker(&proxy, &failing), 2.0);
        for _ in 0..8 {
            proxy.client().chat("m").expect(200);
        }
        assert_eq!(gate.waiting(), 1, "there is one trial");
        gate.open();
        let mut trial = trial;
        trial.response().expect(200);
        eventually("good trials close it", || {
            proxy.client().chat("m").expect(200);
            breaker(&proxy, &failing) == 0.0
        });
    }

    fn breaker_half_open_does_not_wait_for_the_end_of_a_long_stream(v: Variant) {
        const PATH: &str = "/v1/completions";
        let gate = Gate::new();
        let begin = || script().send(sse_head()).send(sse_event("one"));
        let failing = worker().on(PATH, begin().wait(&gate).send(sse_end())).start();
        let steady = worker().on(PATH, begin().send(sse_end())).start();
        let proxy = proxy(v).worker(&failing).worker(&steady).arg("--policy", "round_robin")
            .arg("--health-check-interval-secs", NEVER).arg("--health-check-window-size", "0")
            .arg("--cb-failure-threshold", "2").arg("--cb-success-threshold", "2").arg("--cb-timeout-duration-secs", "1")
            .start();
        trip(&proxy, &failing, 2);
        failing.forget();
        let mut stream = eventually("a long stream is the trial", || {
            let mut client = proxy.client();
            client.send(client::post(PATH, r#"{"model":"m","prompt":"x","stream":true}"#));
            client.read_until("\"one\"");
            (failing.requests().len() == 1).then_some(client)
        });
        assert_eq!(breaker(&proxy, &failing), 2.0, "it has begun well, and one more must");
        eventually("the next trial closes it", || {
            proxy.client().chat("m").expect(200);
            breaker(&proxy, &failing) == 0.0
        });
        eventually("the stream goes on", || gate.waiting() == 1);
        gate.open();
        stream.read_until("0\r\n\r\n");
    }

    fn breaker_that_is_switched_off_never_opens(v: Variant) {
        let (failing, steady) = (worker().start(), worker().start());
        let proxy = proxy(v).worker(&failing).worker(&steady).arg("--policy", "round_robin")
            .arg("--health-check-interval-secs", NEVER).arg("--health-check-window-size", "0")
            .arg("--cb-failure-threshold", "1").flag("--disable-circuit-breaker").start();
        trip(&proxy, &failing, 2);
        assert_eq!((breaker(&proxy, &failing), opened(&proxy, &failing)), (0.0, 0.0));
    }
}
