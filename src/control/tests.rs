//! The control thread against workers on loopback.

use std::sync::atomic::Ordering;

use super::{
    fake::{Fake, eventually, json, list},
    *,
};
use crate::workers::{BreakerRules, Health, ModelSettings, Resolved, Rest, WorkerSpec, WorkerUrl};

/// A control thread over these workers, with short intervals, and their values. The handle comes last, so that it
/// is dropped last.
struct Running {
    fleet: FleetHandle,
    handle: Option<Handle>,
}

impl Running {
    fn start(urls: Vec<WorkerUrl>) -> Self {
        Self::with(urls, |_| ())
    }

    fn with(urls: Vec<WorkerUrl>, edit: impl FnOnce(&mut Settings)) -> Self {
        Self::of(urls.into_iter().map(Into::into).collect(), edit)
    }

    fn of(specs: Vec<WorkerSpec>, edit: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings {
            health_check_interval_secs: 0.1,
            health_check_timeout_secs: 2.0,
            model_refresh_secs: 0.1,
            dns_refresh_secs: 30.0,
            engine_stats_interval: 0.1,
            ..Settings::defaults()
        };
        edit(&mut settings);
        let registry = Registry::new(specs, ModelSettings::default());
        let fleet = registry.handle();
        let service: Service = Box::new(|_| Box::pin(std::future::pending()));
        let handle =
            start(Parts { settings, clock: Clock::start(), registry, aliases: vec![], service }).unwrap();
        handle.wait_ready();
        Self { fleet, handle: Some(handle) }
    }

    fn health(&self, position: usize) -> Health {
        self.fleet.load().workers[position].health()
    }

    fn worker(&self, position: usize) -> Arc<Worker> {
        self.fleet.load().workers[position].clone()
    }

    fn models(&self) -> Vec<String> {
        self.fleet.load().models().iter().map(|model| model.name.clone()).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take()
            && let Err(panic) = handle.stop()
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// A port where nobody listens, which stays reserved as long as the socket lives.
fn refusing() -> (socket2::Socket, WorkerUrl) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, format!("http://{address}").parse().unwrap())
}

#[test]
fn when_ready_all_workers_were_looked_at() {
    let (a, b) = (Fake::start(), Fake::start());
    b.set_models(200, list(&["m", "lora-x"]));
    let (_kept, dead) = refusing();
    let running = Running::start(vec![a.url(), b.url(), dead]);
    assert_eq!([0, 1, 2].map(|at| running.health(at)), [Health::Up, Health::Up, Health::Down]);
    assert_eq!(running.models(), ["m", "lora-x"]);
    let fleet = running.fleet.load();
    assert!(matches!(fleet.resolve(Some("lora-x")), Resolved::Workers { workers: [1], .. }));
    assert_eq!(fleet.valid_names().collect::<Vec<_>>(), ["m"]);
    assert!(fleet.models_json().is_some());
    assert_eq!(fleet.version_json(), Some(&br#"{"version":"0.32.0"}"#[..]));
}

#[test]
fn a_worker_that_never_answers_delays_readiness_by_the_time_limit_only() {
    let (good, silent) = (Fake::start(), Fake::start());
    silent.set_health(0);
    let running = Running::with(vec![good.url(), silent.url()], |settings| {
        settings.health_check_timeout_secs = 0.3;
    });
    assert_eq!(running.health(0), Health::Up);
    eventually("the silent one is down", || running.health(1) == Health::Down);
}

#[test]
fn a_worker_is_out_when_its_health_says_no_and_back_when_it_says_yes() {
    let worker = Fake::start();
    let running = Running::start(vec![worker.url()]);
    for _ in 0..2 {
        worker.set_health(503);
        eventually("down", || running.health(0) == Health::Down);
        worker.set_health(200);
        eventually("up", || running.health(0) == Health::Up);
    }
}

#[test]
fn a_worker_that_was_restarted_with_another_model_is_known_before_it_is_used() {
    let worker = Fake::start();
    // Only the return may tell: the interval of model lists is long.
    let running = Running::with(vec![worker.url()], |settings| settings.model_refresh_secs = 3600.0);
    assert_eq!(running.models(), ["m"]);
    let (address, url) = (worker.address, worker.url());
    drop(worker);
    eventually("down", || running.health(0) == Health::Down);
    let other = Fake::at(address, None);
    other.set_models(200, list(&["n"]));
    eventually("up", || running.health(0) == Health::Up);
    assert_eq!(running.models(), ["n"], "of {url}");
}

#[test]
fn what_a_shard_marked_down_comes_back_long_before_the_interval() {
    let worker = Fake::start();
    let running = Running::with(vec![worker.url()], |settings| settings.health_check_interval_secs = 3600.0);
    let probes = worker.count("GET /health");
    running.fleet.load().workers[0].set_health(Health::Down);
    eventually("up", || running.health(0) == Health::Up);
    assert_eq!(worker.count("GET /health"), probes + 1);
}

#[test]
fn a_new_adapter_is_learnt_at_the_next_look() {
    let worker = Fake::start();
    let running = Running::start(vec![worker.url()]);
    worker.set_models(200, list(&["m", "lora-y"]));
    eventually("learnt", || running.models() == ["m", "lora-y"]);
    let json = running.fleet.load().models_json().unwrap().to_vec();
    assert!(String::from_utf8(json).unwrap().contains("lora-y"));
}

#[test]
fn a_list_that_is_refused_or_garbage_opens_the_worker_for_any_model() {
    for (status, body) in [(401, r#"{"error":"Unauthorized"}"#), (404, "nothing"), (200, "<html>")] {
        let worker = Fake::start();
        worker.set_models(status, body.to_owned());
        let running = Running::start(vec![worker.url()]);
        assert_eq!(running.health(0), Health::Up, "{status}");
        let fleet = running.fleet.load();
        assert!(matches!(fleet.resolve(Some("any")), Resolved::Workers { workers: [0], .. }), "{status}");
        assert_eq!(fleet.models_json(), None);
    }
}

#[test]
fn an_error_of_the_moment_keeps_what_was_known() {
    let worker = Fake::start();
    let running = Running::start(vec![worker.url()]);
    worker.set_models(503, String::new());
    let before = worker.count("GET /v1/models");
    eventually("looked twice", || worker.count("GET /v1/models") >= before + 2);
    assert_eq!(running.models(), ["m"]);
}

#[test]
fn the_proxys_own_key_is_sent_with_every_probe() {
    let worker = Fake::start();
    let _running =
        Running::with(vec![worker.url()], |settings| settings.worker_api_key = Some("secret".to_owned()));
    let asked = worker.asked();
    assert!(asked.len() >= 3);
    assert!(asked.iter().all(|asked| asked.key.as_deref() == Some("Bearer secret")), "{asked:?}");
}

#[test]
fn a_path_prefix_stands_before_every_probe() {
    let worker = Fake::start();
    let _running = Running::start(vec![format!("{}/team/x", worker.url()).parse().unwrap()]);
    assert_eq!(worker.count("GET /team/x/health"), 1);
}

#[test]
fn a_name_is_resolved_and_an_unknown_one_takes_nobody_else_down() {
    let worker = Fake::start();
    // A label of more than 63 characters is refused by the resolver itself, without asking anybody.
    let too_long = format!("http://{}", "a".repeat(70));
    let urls = ["http://localhost", &too_long]
        .map(|url| format!("{url}:{}", worker.address.port()).parse().unwrap());
    let running = Running::start(urls.into());
    assert_eq!(running.health(0), Health::Up);
    let addresses = running.fleet.load().workers[0].addresses();
    assert!(addresses.list.contains(&worker.address), "{addresses:?}");
    eventually("the unknown one is down", || running.health(1) == Health::Down);
}

#[test]
fn a_late_probe_alone_takes_nobody_out() {
    let worker = Fake::start();
    let running = Running::with(vec![worker.url()], |settings| settings.health_check_timeout_secs = 0.2);
    worker.set_health(0);
    eventually("a probe hangs", || worker.settings.hanging.load(Ordering::SeqCst) == 1);
    eventually("it was given up", || worker.settings.hanging.load(Ordering::SeqCst) == 0);
    assert_eq!(running.health(0), Health::Up);
    eventually("three in a row do", || running.health(0) == Health::Down);
}

/// What a worker with two engines says: requests running on each, and when it was started.
fn figures(running: [u32; 2], started: u32) -> String {
    let engine = |at: usize| {
        format!(
            "vllm:num_requests_running{{engine=\"{at}\",model_name=\"m\"}} {}\n\
             vllm:cache_config_info{{block_size=\"16\",engine=\"{at}\",num_gpu_blocks=\"10\"}} 1.0\n",
            running[at]
        )
    };
    format!("{}{}process_start_time_seconds {started}\n", engine(0), engine(1))
}

#[test]
fn what_a_worker_holds_is_known_before_it_is_used() {
    let worker = Fake::start();
    worker.set_metrics(200, &figures([0, 0], 1));
    let running = Running::with(vec![worker.url()], |settings| settings.engine_stats_interval = 3600.0);
    let engine = running.worker(0);
    assert_eq!((engine.engine().cache_tokens(), engine.engine().block_tokens()), (Some(320), Some(16)));
    assert_eq!(worker.count("GET /metrics"), 1);
}

#[test]
fn figures_that_hang_keep_no_worker_from_its_work() {
    let worker = Fake::start();
    worker.set_metrics(0, "");
    let running = Running::with(vec![worker.url()], |settings| settings.health_check_timeout_secs = 30.0);
    eventually("up", || running.health(0) == Health::Up);
    assert_eq!(running.worker(0).engine().running(), None);
}

#[test]
fn nobody_looks_at_figures_that_are_switched_off() {
    let worker = Fake::start();
    let running = Running::with(vec![worker.url()], |settings| settings.engine_stats_interval = 0.0);
    let before = worker.count("GET /health");
    eventually("two probes more", || worker.count("GET /health") >= before + 2);
    assert_eq!((running.health(0), worker.count("GET /metrics")), (Health::Up, 0));
}

#[test]
fn figures_are_kept_for_three_intervals_and_then_unknown() {
    let worker = Fake::start();
    worker.set_metrics(200, &figures([2, 3], 1));
    let running = Running::start(vec![worker.url()]);
    let engine = running.worker(0);
    assert_eq!(engine.engine().running(), Some(5));
    eventually("foreign", || engine.engine().foreign() == 5);
    worker.set_metrics(500, "");
    let asked = worker.count("GET /metrics");
    eventually("unknown", || engine.engine().running().is_none());
    assert!(worker.count("GET /metrics") >= asked + 2);
    assert_eq!((engine.engine().foreign(), engine.engine().cache_tokens()), (0, Some(320)));
    worker.set_metrics(200, &figures([1, 0], 1));
    eventually("known again", || engine.engine().running() == Some(1));
}

#[test]
fn u20_another_version_or_base_model_means_another_server_with_an_empty_cache() {
    let version = Arc::new(std::sync::Mutex::new("0.32.0"));
    let told = version.clone();
    let worker = Fake::scripted(move |asked| {
        let body = format!(r#"{{"version":"{}"}}"#, told.lock().unwrap());
        (asked.line == "GET /version").then(|| json(200, body))
    });
    let running = Running::start(vec![worker.url()]);
    let seen = running.worker(0);
    worker.set_models(200, list(&["m", "lora-x"]));
    eventually("the adapter is known", || running.models() == ["m", "lora-x"]);
    assert_eq!(seen.cache_generation(), 0, "an adapter says nothing of the cache");
    (0..BreakerRules::default().failures).for_each(|_| {
        seen.breaker().failed(0);
    });
    *version.lock().unwrap() = "0.33.0";
    eventually("the version is noticed", || seen.cache_generation() == 1);
    assert!(seen.breaker().admits(0), "what was counted was another's");
    worker.set_models(200, list(&["n"]));
    eventually("the model is noticed", || seen.cache_generation() == 2);
    assert_eq!(running.health(0), Health::Up);
}

#[test]
fn u18_who_says_that_it_sleeps_in_its_figures_is_not_asked() {
    let worker = Fake::start();
    worker.set_metrics(200, "vllm:engine_sleep_state{engine=\"0\",sleep_state=\"awake\"} 0");
    let running = Running::start(vec![worker.url()]);
    eventually("asleep", || running.worker(0).rest() == Some(Rest::Asleep));
    let (asked, learnt) = (worker.count("GET /is_sleeping"), worker.count("GET /v1/models"));
    eventually("learnt again", || worker.count("GET /v1/models") >= learnt + 3);
    assert_eq!(worker.count("GET /is_sleeping"), asked);
    worker.set_metrics(200, "vllm:engine_sleep_state{engine=\"0\",sleep_state=\"awake\"} 1");
    eventually("awake", || running.worker(0).rest().is_none());
}

#[test]
fn a_worker_that_was_started_anew_unnoticed_has_lost_its_cache() {
    let worker = Fake::start();
    worker.set_metrics(200, &figures([0, 0], 1));
    let running = Running::start(vec![worker.url()]);
    let engine = running.worker(0);
    let asked = worker.count("GET /metrics");
    eventually("two looks more", || worker.count("GET /metrics") >= asked + 2);
    let before = engine.cache_generation();
    assert_eq!(before, 0, "the same process all along");
    worker.set_metrics(200, &figures([0, 0], 2));
    eventually("noticed", || engine.cache_generation() == before + 1);
}

#[test]
fn ranks_of_a_server_are_probed_and_looked_at_once_and_have_their_own_figures() {
    let server = Fake::start();
    server.set_metrics(200, &figures([2, 7], 1));
    let running = Running::of(server.ranks(2), |settings| {
        settings.health_check_interval_secs = 3600.0;
        settings.engine_stats_interval = 3600.0;
        settings.model_refresh_secs = 3600.0;
    });
    let (first, second) = (running.worker(0), running.worker(1));
    assert_eq!([first.usable(), second.usable()], [true, true]);
    assert_eq!((first.engine().running(), second.engine().running()), (Some(2), Some(7)));
    assert_eq!((first.engine().cache_tokens(), second.engine().cache_tokens()), (Some(160), Some(160)));
    for line in ["GET /health", "GET /v1/models", "GET /metrics"] {
        assert_eq!(server.count(line), 1, "{line}");
    }
    let fleet = running.fleet.load();
    assert!(matches!(fleet.resolve(Some("m")), Resolved::Workers { workers: [0, 1], .. }));
    assert!(!second.addresses().list.is_empty());
}
