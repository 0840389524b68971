//! Health: who is used and who is not, and what the process says of itself.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::support::{
    Gate, Proxy, Worker, answer, client, dead_url, eventually, json_answer, proxy, script, sse_event,
    variants, worker, worker::sse_head,
};

/// An hour.
const NEVER: &str = "3600";

fn uses(proxy: &Proxy, worker: &Worker) -> bool {
    proxy.usable_workers().contains(&worker.url())
}

fn probes(worker: &Worker, path: &str) -> usize {
    worker.all_requests().iter().filter(|request| request.path() == path).count()
}

fn figure(proxy: &Proxy, name: &str, worker: &Worker, label: &str) -> f64 {
    let series = format!("vllm_proxy_worker_{name}{{worker=\"{}\"{label}}}", worker.url());
    proxy.metric(&series).unwrap_or_else(|| panic!("no {series}"))
}

/// The reason that `/readyz` gives for its 503.
fn reason(proxy: &Proxy) -> String {
    let answer = proxy.get("/readyz").expect(503).json();
    assert_eq!(answer["status"], "not ready");
    answer["reason"].as_str().expect("a reason").to_owned()
}

/// A worker whose `/is_sleeping` and `/is_paused` say what the flags say; `/pause` and `/resume` set the second.
fn resting() -> (Worker, Arc<AtomicBool>, Arc<AtomicBool>) {
    let (asleep, paused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let says = |word: &'static str, flag: &Arc<AtomicBool>| {
        let flag = flag.clone();
        move |_: &_| script().send(json_answer(format!("{{\"{word}\":{}}}", flag.load(Ordering::SeqCst))))
    };
    let sets = |to: bool, flag: &Arc<AtomicBool>| {
        let flag = flag.clone();
        move |_: &_| {
            flag.store(to, Ordering::SeqCst);
            script().send(json_answer("{}"))
        }
    };
    let worker = worker()
        .on_request("/is_sleeping", says("is_sleeping", &asleep))
        .on_request("/is_paused", says("is_paused", &paused))
        .on_request("/pause", sets(true, &paused))
        .on_request("/resume", sets(false, &paused))
        .start();
    (worker, asleep, paused)
}

variants! {
    fn u6_a_worker_that_says_that_its_engine_is_dead_is_out(v: Variant) {
        let (dead, left) = (worker().start(), worker().start());
        let proxy = proxy(v).worker(&dead).worker(&left).start();
        dead.set_health("503 Service Unavailable");
        eventually("it is out", || !uses(&proxy, &dead));
        dead.forget();
        for _ in 0..6 {
            proxy.client().chat("m").expect(200);
        }
        assert!(dead.requests().is_empty());
        assert!(figure(&proxy, "ejections_total", &dead, ",reason=\"probe\"") >= 1.0);
        assert!(figure(&proxy, "probes_total", &dead, ",verdict=\"bad\"") >= 1.0);
        dead.set_health("200 OK");
        eventually("it is back", || uses(&proxy, &dead));
    }

    fn u9_a_worker_that_only_accepts_is_out_after_some_late_probes_and_no_sooner(v: Variant) {
        let gate = Gate::new();
        gate.open();
        let stopped = Arc::new(AtomicBool::new(false));
        let (stop, held) = (stopped.clone(), Gate::new());
        let frozen = worker().on_request("/health", {
            let held = held.clone();
            move |_| if stop.load(Ordering::SeqCst) { script().wait(&held) } else { script().send(json_answer("")) }
        }).start();
        let left = worker().start();
        let proxy = proxy(v).worker(&frozen).worker(&left).arg("--health-check-timeout-secs", "0.2")
            .arg("--health-check-consecutive-failures", "4").start();
        stopped.store(true, Ordering::SeqCst);
        eventually("it is out", || !uses(&proxy, &frozen));
        let late = figure(&proxy, "probes_total", &frozen, ",verdict=\"late\"");
        assert!(late >= 4.0, "out after {late} late probes");
        assert_eq!(figure(&proxy, "ejections_total", &frozen, ",reason=\"late_probes\""), 1.0);
        frozen.forget();
        for _ in 0..6 {
            proxy.client().chat("m").expect(200);
        }
        assert!(frozen.requests().is_empty());
        stopped.store(false, Ordering::SeqCst);
        eventually("it is back", || uses(&proxy, &frozen));
    }

    fn u10_a_long_prefill_takes_nobody_out(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", "0.05").start();
        let mut client = proxy.client();
        client.send(client::post("/v1/chat/completions", client::chat("m")));
        eventually("it computes", || gate.waiting() == 1);
        let before = probes(&worker, "/health");
        eventually("it was probed often", || probes(&worker, "/health") >= before + 20);
        assert!(uses(&proxy, &worker));
        assert_eq!(proxy.get("/health").status, 200);
        gate.open();
        assert_eq!(client.response().expect(200).completion(), "ok");
    }

    fn u2_a_connection_that_dies_under_a_request_has_the_worker_probed_not_taken_out(v: Variant) {
        let worker = worker().on("/v1/files", script().reset()).start();
        let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", NEVER)
            .arg("--model-refresh-secs", NEVER).start();
        let (probed, learnt) = (probes(&worker, "/health"), probes(&worker, "/v1/models"));
        assert_eq!(proxy.post("/v1/files", "{}").status, 502);
        assert!(uses(&proxy, &worker), "one request proves nothing");
        eventually("it is probed", || probes(&worker, "/health") > probed);
        eventually("its models are learnt anew", || probes(&worker, "/v1/models") > learnt);
        assert!(uses(&proxy, &worker));
    }

    fn u4_a_stream_that_breaks_has_the_worker_probed(v: Variant) {
        let events = script().send(sse_head()).send(sse_event("one")).reset();
        let worker = worker().on("/v1/chat/completions", events).start();
        let proxy = proxy(v).worker(&worker).arg("--health-check-interval-secs", NEVER).start();
        let probed = probes(&worker, "/health");
        let mut client = proxy.client();
        client.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        client.read_until("\"one\"");
        eventually("it is probed", || probes(&worker, "/health") > probed);
        assert!(uses(&proxy, &worker), "it answers");
        let mut client = proxy.client();
        worker.set_health("503 Service Unavailable");
        client.send(client::post("/v1/chat/completions", client::chat_stream("m")));
        eventually("a worker that died is out", || !uses(&proxy, &worker));
    }

    fn u22_a_worker_that_was_away_for_long_is_back_with_its_first_good_probe(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--cb-failure-threshold", "2").start();
        worker.go_down();
        for _ in 0..20 {
            assert!(matches!(proxy.client().chat("m").status, 502 | 503));
        }
        worker.come_back();
        eventually("it is ready", || proxy.get("/readyz").status == 200);
        proxy.client().chat("m").expect(200);
    }

    fn u18_who_sleeps_is_sent_nothing_and_all_asleep_is_a_503(v: Variant) {
        let (sleeper, asleep, _) = resting();
        let left = worker().start();
        let proxy = proxy(v).worker(&sleeper).worker(&left).start();
        asleep.store(true, Ordering::SeqCst);
        eventually("it is seen to sleep", || figure(&proxy, "asleep", &sleeper, "") == 1.0);
        sleeper.forget();
        for _ in 0..6 {
            proxy.client().chat("m").expect(200);
        }
        assert!(sleeper.requests().is_empty());
        assert_eq!(proxy.get("/readyz").status, 200);
        left.go_down();
        eventually("nobody is left", || proxy.get("/health").status == 503);
        assert_eq!(reason(&proxy), "all workers that are up are asleep or paused");
        let answer = proxy.client().chat("m").expect(503);
        assert!(answer.header("retry-after").is_some(), "{answer}");
        assert!(sleeper.requests().is_empty(), "it would never have answered");
        asleep.store(false, Ordering::SeqCst);
        eventually("it is awake", || proxy.get("/readyz").status == 200);
        proxy.client().chat("m").expect(200);
    }

    fn u18_who_was_paused_through_the_proxy_is_sent_nothing_from_then_on(v: Variant) {
        let (pausing, _, paused) = resting();
        let proxy = proxy(v).worker(&pausing).arg("--model-refresh-secs", NEVER).start();
        proxy.post("/pause", "").expect(200);
        assert!(paused.load(Ordering::SeqCst));
        proxy.client().chat("m").expect(503);
        assert_eq!(figure(&proxy, "paused", &pausing, ""), 1.0);
        proxy.post("/resume", "").expect(200);
        proxy.client().chat("m").expect(200);
    }

    fn u18_a_worker_that_cannot_say_whether_it_rests_is_asked_once(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).start();
        let before = probes(&worker, "/v1/models");
        eventually("its models were learnt some times", || probes(&worker, "/v1/models") >= before + 3);
        assert_eq!((probes(&worker, "/is_sleeping"), probes(&worker, "/is_paused")), (1, 1));
        worker.go_down();
        eventually("it is out", || !uses(&proxy, &worker));
        worker.come_back();
        eventually("it is back", || uses(&proxy, &worker));
        assert_eq!((probes(&worker, "/is_sleeping"), probes(&worker, "/is_paused")), (2, 2), "another may answer there");
    }

    fn u20_a_worker_that_comes_back_with_another_model_is_never_asked_for_the_old_one(v: Variant) {
        let (changing, left) = (worker().start(), worker().start());
        let proxy = proxy(v).worker(&changing).worker(&left).arg("--model-refresh-secs", NEVER).start();
        changing.go_down();
        eventually("it is out", || !uses(&proxy, &changing));
        changing.set_models(&["n"]);
        changing.forget();
        changing.come_back();
        eventually("it is back", || {
            proxy.client().chat("m").expect(200);
            uses(&proxy, &changing)
        });
        for _ in 0..10 {
            proxy.client().chat("m").expect(200);
            proxy.client().chat("n").expect(200);
        }
        let models: Vec<_> = changing.requests().iter().map(|request| request.json()["model"].clone()).collect();
        assert_eq!(models, vec!["n"; 10]);
    }

    fn u21_who_comes_back_is_given_little_at_first(v: Variant) {
        for (slow_start, few) in [("4", true), ("0", false)] {
            let (back, steady) = (worker().start(), worker().start());
            let proxy = proxy(v).worker(&back).worker(&steady).arg("--policy", "round_robin")
                .arg("--health-check-interval-secs", "0.05").arg("--slow-start-secs", slow_start).start();
            // the steady one must have warmed up itself
            eventually("it has been up for four seconds", || !few || probes(&steady, "/health") >= 90);
            back.go_down();
            eventually("it is out", || !uses(&proxy, &back));
            back.come_back();
            eventually("it is back", || uses(&proxy, &back));
            back.forget();
            for _ in 0..60 {
                proxy.client().chat("m").expect(200);
            }
            let got = back.requests().len();
            assert_eq!(got < 20, few, "{got} of 60 with a slow start of {slow_start} s");
        }
    }

    fn u22_the_least_bad_are_tried_where_all_look_bad_and_the_process_says_so(v: Variant) {
        let workers = [worker().start(), worker().start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        assert_eq!(proxy.get("/readyz").expect(200).json()["status"], "ready");
        workers.iter().for_each(|worker| worker.set_health("503 Service Unavailable"));
        eventually("all look bad", || proxy.usable_workers().is_empty());
        assert_eq!(proxy.client().chat("m").expect(200).completion(), "ok", "the verdict may be wrong");
        assert_eq!(reason(&proxy), "no worker is up");
        assert_eq!(proxy.get("/health").status, 503);
        assert_eq!(proxy.metric("vllm_proxy_panic_choices_total"), Some(1.0));
    }

    fn u22_nobody_is_tried_where_panic_is_switched_off(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).flag("--no-panic-mode").start();
        worker.set_health("503 Service Unavailable");
        eventually("it looks bad", || proxy.usable_workers().is_empty());
        let answer = proxy.client().chat("m").expect(503);
        assert!(answer.header("retry-after").is_some(), "{answer}");
        assert!(worker.requests().is_empty());
        worker.set_health("200 OK");
        eventually("it is used again", || proxy.client().chat("m").status == 200);
    }

    fn u23_a_flapping_worker_is_ejected_while_another_is_left(v: Variant) {
        // good and bad in turn, as long as it flaps
        let flapping = || {
            let (turn, flaps) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(true)));
            let flag = flaps.clone();
            let worker = worker().on_request("/health", move |_| {
                let bad = flag.load(Ordering::SeqCst) && turn.fetch_add(1, Ordering::SeqCst) % 2 == 1;
                let status = if bad { "503 Service Unavailable" } else { "200 OK" };
                script().send(answer(status, "text/plain", "", ""))
            });
            (worker.start(), flaps)
        };
        let ejected = |proxy: &Proxy, worker: &Worker| figure(proxy, "ejections_total", worker, ",reason=\"success_rate\"");
        let ((bad, flaps), steady) = (flapping(), worker().start());
        let proxy = proxy(v).worker(&bad).worker(&steady).arg("--health-check-interval-secs", "0.1").start();
        eventually("it is ejected", || ejected(&proxy, &bad) >= 1.0);
        for _ in 0..6 {
            proxy.client().chat("m").expect(200);
        }
        flaps.store(false, Ordering::SeqCst);
        eventually("it is used again", || uses(&proxy, &bad));
        drop(proxy);

        let (alone, _flaps) = flapping();
        let proxy = crate::support::proxy(v).worker(&alone).arg("--health-check-interval-secs", "0.05").start();
        let before = probes(&alone, "/health");
        eventually("it was probed often", || probes(&alone, "/health") >= before + 20);
        assert_eq!(ejected(&proxy, &alone), 0.0, "the last one never is");
    }

    fn health_real_requests_find_a_worker_that_only_seems_well(v: Variant) {
        let broken = Arc::new(AtomicBool::new(false));
        let flag = broken.clone();
        let sick = worker().on_request("/v1/embeddings", move |_| {
            let status = if flag.load(Ordering::SeqCst) { "500 Internal Server Error" } else { "200 OK" };
            script().send(answer(status, "application/json", "", "{}"))
        }).start();
        // what it is asked does not fit its model: that is nobody's fault but the operator's
        let other = worker().on("/v1/score", script().send(answer("400 Bad Request", "application/json", "", "{}"))).start();
        let proxy = proxy(v).worker(&sick).worker(&other).flag("--static-backend-health-checks")
            .arg("--static-model-types", "embeddings,score").arg("--static-backend-health-check-interval", "0.1").start();
        let asked = eventually("both were asked", || {
            let first = |worker: &Worker| worker.complete_requests().first().cloned();
            first(&sick).zip(first(&other))
        });
        assert_eq!((asked.0.path(), asked.1.path()), ("/v1/embeddings", "/v1/score"));
        assert_eq!(asked.0.json()["model"], "m");
        broken.store(true, Ordering::SeqCst);
        eventually("it is out", || !uses(&proxy, &sick));
        let before = probes(&sick, "/health");
        eventually("it was probed again", || probes(&sick, "/health") >= before + 3);
        assert!(!uses(&proxy, &sick), "its /health is not to be believed");
        assert!(uses(&proxy, &other));
        broken.store(false, Ordering::SeqCst);
        eventually("it is back", || uses(&proxy, &sick));
    }

    fn p1_the_process_lives_and_is_not_ready(v: Variant) {
        let proxy = proxy(v).url(&dead_url()).without_waiting().start();
        for path in ["/livez", "/liveness"] {
            assert_eq!(proxy.get(path).expect(200).text(), r#"{"status":"alive"}"#, "{path}");
        }
        for path in ["/readyz", "/readiness"] {
            let answer = proxy.get(path).expect(503);
            assert_eq!(answer.text(), r#"{"status":"not ready","reason":"no worker is up"}"#, "{path}");
            assert_eq!(answer.header("content-type").as_deref(), Some("application/json"));
        }
    }

    fn p1_who_drains_is_not_ready(v: Variant) {
        let gate = Gate::new();
        let worker = worker().holds(&gate).start();
        let proxy = proxy(v).worker(&worker).arg("--shutdown-grace-secs", "60").start();
        let mut running = proxy.client();
        running.send(client::post("/v1/chat/completions", client::chat("m")));
        eventually("it runs", || gate.waiting() == 1);
        // a request that has begun is not idle, so its connection outlives the drain
        let mut asking = proxy.client();
        asking.send("GET /readyz HTTP/1.1\r\n");
        let mut lives = proxy.client();
        lives.send("GET /livez HTTP/1.1\r\n");
        let mut idle = proxy.client();
        idle.get("/readyz").expect(200);
        proxy.drain();
        idle.expect_closed();
        eventually("every shard drains", || std::net::TcpStream::connect(proxy.addr()).is_err());
        asking.send("Host: a\r\n\r\n");
        let answer = asking.response().expect(503);
        assert_eq!(answer.text(), r#"{"status":"not ready","reason":"draining"}"#);
        assert_eq!(answer.header("connection").as_deref(), Some("close"));
        lives.send("Host: a\r\n\r\n");
        lives.response().expect(200);
        gate.open();
        assert_eq!(running.response().expect(200).completion(), "ok");
        proxy.wait();
    }
}
