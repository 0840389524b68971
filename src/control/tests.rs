//! The control thread against workers on loopback.

use std::sync::atomic::Ordering;

use super::{
    fake::{Fake, eventually, list},
    *,
};
use crate::workers::{Health, ModelSettings, Resolved, WorkerUrl};

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
        let mut settings = Settings {
            health_check_interval_secs: 0.1,
            health_check_timeout_secs: 2.0,
            model_refresh_secs: 0.1,
            dns_refresh_secs: 30.0,
            worker_api_key: None,
        };
        edit(&mut settings);
        let registry = Registry::new(urls.into_iter().map(Into::into), ModelSettings::default());
        let fleet = registry.handle();
        let service: Service = Box::new(|_| Box::pin(std::future::pending()));
        let handle = start(Parts { settings, registry, aliases: vec![], service }).unwrap();
        handle.wait_ready();
        Self { fleet, handle: Some(handle) }
    }

    fn health(&self, position: usize) -> Health {
        self.fleet.load().workers[position].health()
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
