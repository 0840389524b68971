//! The proxy under test, in the test's own process and through the binary's own composition root.

use std::{collections::BTreeSet, net::SocketAddr, sync::mpsc, thread, time::Duration};

use clap::Parser;
use vllm_proxy::{
    app::{self, Faults, Running},
    config::Config,
    net::Driver,
};

use crate::support::{Client, Io, Response, Variant, Worker, eventually, patience};

/// A proxy to be.
#[derive(Debug, Clone)]
pub(crate) struct Builder {
    urls: Vec<String>,
    /// Workers that must have been learnt of before [`Builder::start`] returns.
    expected: Vec<(SocketAddr, Vec<String>)>,
    /// Flags and their values; a later one replaces an earlier one of the same name.
    args: Vec<(String, Option<String>)>,
    variant: Variant,
    wait: bool,
    faults: Faults,
}

/// A proxy without a worker yet. Probes are quick, the grace period is short.
pub(crate) fn proxy(variant: Variant) -> Builder {
    let builder = Builder {
        urls: Vec::new(),
        expected: Vec::new(),
        args: Vec::new(),
        variant,
        wait: true,
        faults: Faults::default(),
    };
    let io = match variant.io {
        Io::Uring => "uring",
        Io::Epoll => "epoll",
    };
    builder
        .arg("--host", "127.0.0.1")
        .arg("--port", "0")
        .flag("--no-pin")
        .arg("--io", io)
        .arg("--threads", &variant.shards.to_string())
        .arg("--shutdown-grace-secs", "1")
        .arg("--health-check-interval-secs", "0.2")
        .arg("--model-refresh-secs", "0.2")
        // who comes back gets its share at once
        .arg("--slow-start-secs", "0")
        // by itself, whoever is on this host
        .arg("--redis", "none")
}

impl Builder {
    /// Puts `worker` behind the proxy.
    pub(crate) fn worker(mut self, worker: &Worker) -> Self {
        self.urls.push(worker.url());
        self.expected.push((worker.addr(), worker.model_names()));
        self
    }

    /// Puts what may or may not be there behind the proxy; nobody waits for it.
    pub(crate) fn url(mut self, url: &str) -> Self {
        self.urls.push(url.to_owned());
        self
    }

    /// Sets a flag with a value, in place of an earlier one.
    pub(crate) fn arg(mut self, name: &str, value: &str) -> Self {
        self.args.retain(|(have, _)| have != name);
        self.args.push((name.to_owned(), Some(value.to_owned())));
        self
    }

    /// Sets a flag without a value.
    pub(crate) fn flag(mut self, name: &str) -> Self {
        self.args.push((name.to_owned(), None));
        self
    }

    /// Returns from [`Builder::start`] as soon as the proxy accepts, whatever it knows of its workers.
    pub(crate) fn without_waiting(mut self) -> Self {
        self.wait = false;
        self
    }

    /// Calls `fault` on a shard with the target of every request.
    pub(crate) fn fault(mut self, fault: fn(&str)) -> Self {
        self.faults.on_request = Some(fault);
        self
    }

    /// Calls `fault` on a shard before every connect to a worker, which fails as it says.
    pub(crate) fn connect_fault(mut self, fault: fn(SocketAddr) -> std::io::Result<()>) -> Self {
        self.faults.on_connect = Some(fault);
        self
    }

    /// Calls `fault` on the sync thread before every batch.
    pub(crate) fn sync_fault(mut self, fault: fn()) -> Self {
        self.faults.on_sync = Some(fault);
        self
    }

    /// The command line, program name first.
    pub(crate) fn command_line(&self) -> Vec<String> {
        let mut line = vec!["vllm-proxy".to_owned()];
        for (name, value) in &self.args {
            line.push(name.clone());
            line.extend(value.clone());
        }
        line.push("--worker-urls".to_owned());
        line.extend(self.urls.iter().cloned());
        line
    }

    /// Starts the proxy; every worker given by [`Builder::worker`] is in use when this returns.
    #[track_caller]
    pub(crate) fn start(self) -> Proxy {
        let config = Config::try_parse_from(self.command_line()).unwrap_or_else(|error| panic!("{error}"));
        let running = app::start_with(config, self.faults)
            .unwrap_or_else(|error| panic!("the proxy does not start: {error:#}"));
        let driver = running.driver();
        let uring = driver != Driver::Epoll;
        assert_eq!(uring, self.variant.io == Io::Uring, "asked for {:?}, got {driver}", self.variant.io);
        let proxy = Proxy { addr: running.addr(), running: Some(running) };
        if self.wait && !self.expected.is_empty() {
            proxy.wait_for_workers(&self.expected);
        }
        proxy
    }
}

/// A running proxy. Dropping it drains and joins it.
pub(crate) struct Proxy {
    addr: SocketAddr,
    running: Option<Running>,
}

impl Proxy {
    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// A new connection to it.
    #[track_caller]
    pub(crate) fn client(&self) -> Client {
        Client::connect(self.addr)
    }

    /// GET on a connection of its own.
    #[track_caller]
    pub(crate) fn get(&self, target: &str) -> Response {
        self.client().get(target)
    }

    /// POST of JSON on a connection of its own.
    #[track_caller]
    pub(crate) fn post(&self, target: &str, json: impl AsRef<[u8]>) -> Response {
        self.client().post(target, json)
    }

    /// The value of the first metric line that starts with `start`.
    #[track_caller]
    pub(crate) fn metric(&self, start: &str) -> Option<f64> {
        let metrics = self.get("/metrics").expect(200);
        let line = metrics.text().lines().find(|line| line.starts_with(start))?.to_owned();
        line.rsplit(' ').next().and_then(|value| value.parse().ok())
    }

    /// Starts to drain, as the first SIGTERM does.
    pub(crate) fn drain(&self) {
        if let Some(running) = &self.running {
            running.drain();
        }
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub(crate) fn wait(mut self) {
        if let Some(running) = self.running.take() {
            join(running);
        }
    }

    #[track_caller]
    fn wait_for_workers(&self, expected: &[(SocketAddr, Vec<String>)]) {
        let models: BTreeSet<String> = expected.iter().flat_map(|(_, models)| models.clone()).collect();
        eventually("the proxy has learnt its workers' models", || {
            let answer = self.get("/v1/models");
            let listed: BTreeSet<String> = match answer.status {
                200 => answer.json()["data"].as_array().into_iter().flatten().map(id).collect(),
                status => return Err(format!("{status} {}", answer.text())),
            };
            if listed.is_superset(&models) { Ok(()) } else { Err(format!("models {listed:?}")) }
        });
        eventually("the proxy uses all its workers", || {
            let usable = self.usable_workers();
            // its rank stands behind an `@`
            let used = |url: &str| usable.iter().any(|name| name.split('@').next() == Some(url));
            let missing: Vec<_> =
                expected.iter().filter(|(addr, _)| !used(&format!("http://{addr}"))).collect();
            if missing.is_empty() {
                Ok(())
            } else {
                Err(format!("not in use: {missing:?}, in use: {usable:?}"))
            }
        });
    }

    /// URLs of the workers that are in use, by the gauge in `/metrics`.
    pub(crate) fn usable_workers(&self) -> Vec<String> {
        let metrics = self.get("/metrics").expect(200);
        let gauges = metrics.text().lines().filter(|line| line.contains("health") && line.ends_with(" 1"));
        gauges
            .filter_map(|line| line.split('"').find(|part| part.starts_with("http://")))
            .map(str::to_owned)
            .collect()
    }
}

fn id(card: &serde_json::Value) -> String {
    card["id"].as_str().unwrap_or_default().to_owned()
}

/// Waits until the proxy's threads have ended; a proxy that hangs fails the test instead of hanging it.
#[track_caller]
fn join(running: Running) {
    let (ended, end) = mpsc::channel();
    let waiter = thread::spawn(move || ended.send(running.wait()).unwrap_or_default());
    let limit = patience() + Duration::from_secs(5);
    match end.recv_timeout(limit) {
        Ok(Ok(())) => waiter.join().unwrap_or_default(),
        Ok(Err(error)) => complain(&format!("the proxy ended badly: {error:#}")),
        Err(_) => complain(&format!("the proxy has not ended within {limit:?}")),
    }
}

#[track_caller]
fn complain(what: &str) {
    if thread::panicking() {
        eprintln!("{what}");
    } else {
        panic!("{what}");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.drain();
            join(running);
        }
    }
}
