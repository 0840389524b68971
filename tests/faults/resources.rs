//! What the host runs out of: descriptors and ports, and clients that come by the thousand.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    process::Command,
    sync::Mutex,
    time::Instant,
};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::support::{
    Client, Ended, Gate, Io, Log, Response, Variant, Worker, binary_with_log, client, eventually, proxy,
    script, sse_event, variants, worker,
    worker::{sse_end, sse_head},
};

/// What happens in these tests is learnt from requests, not from probes, whose descriptors would come and go.
const NEVER: &str = "3600";

/// The binary, with a limit of open files.
struct Limited {
    child: Ended,
    addr: SocketAddr,
    log: Log,
}

impl Limited {
    /// With `soft` and `hard` as its limits of open files.
    fn start(v: Variant, worker: &Worker, soft: u64, hard: u64, more: &[&str]) -> Self {
        let mut command = Command::new("sh");
        let limits = format!("ulimit -S -n {soft} && ulimit -H -n {hard} && exec \"$0\" \"$@\"");
        command.args(["-c", &limits, env!("CARGO_BIN_EXE_vllm-proxy")]);
        let io = if v.io == Io::Uring { "uring" } else { "epoll" };
        let (threads, url) = (v.shards.to_string(), worker.url());
        let probes = "--health-check-interval-secs";
        let flags = ["--no-pin", "--io", io, "--threads", &threads, probes, NEVER];
        let flags = if more.contains(&probes) { &flags[..5] } else { &flags };
        let quiet = ["--model-refresh-secs", NEVER, "--engine-stats-interval", "0", "--worker-urls", &url];
        let (child, addr, log) = binary_with_log(command, &[flags, more, &quiet].concat(), |_| ());
        let limited = Self { child, addr, log };
        eventually("it knows its worker", || limited.client().get("/health").status == 200);
        limited
    }

    fn client(&self) -> Client {
        Client::connect(self.addr)
    }

    /// Numbers of its open files, without those that whoever runs the tests has left open above any limit.
    fn files(&self) -> Vec<u64> {
        let files = fs::read_dir(format!("/proc/{}/fd", self.child.0.id())).unwrap();
        let numbers = files.filter_map(|file| file.unwrap().file_name().to_str().unwrap().parse().ok());
        numbers.filter(|&number| number < HARD).collect()
    }

    fn limit(&self, files: u64) {
        let pid = Pid::from_child(&self.child.0);
        // the hard limit stays, so that it can be raised again
        let limit = Rlimit { current: Some(files), maximum: Some(HARD) };
        prlimit(Some(pid), Resource::Nofile, limit).unwrap();
    }

    /// Lowers the limit to what is open now. What is closed below it makes room for others again: see
    /// [`Limited::fill`]. Returns the limit.
    fn exhaust(&self) -> u64 {
        let limit = self.files().into_iter().max().unwrap() + 1;
        self.limit(limit);
        limit
    }

    /// Takes what is left below the limit by a client that stays; true if nothing was left, and the client was
    /// turned away.
    fn fill(&self, staying: &mut Vec<Client>) -> bool {
        let mut client = self.client();
        let answer = client.get("/health");
        if answer.status == 200 {
            staying.push(client);
            return false;
        }
        assert_turned_away(&answer);
        assert_eq!(answer.header("connection").as_deref(), Some("close"), "{answer}");
        client.expect_closed();
        true
    }

    fn metric(&self, start: &str) -> f64 {
        let metrics = self.client().get("/metrics").expect(200);
        let line = metrics.text().lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in {}", metrics.text()));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// The limit of open files, so high that the bound on clients is not reached first.
const HARD: u64 = 1024;

fn assert_turned_away(answer: &Response) {
    assert_eq!(answer.status, 503, "{answer}");
    assert!(answer.header("retry-after").is_some(), "{answer}");
    assert_eq!(answer.json()["error"]["type"], "Service Unavailable", "{answer}");
    assert_eq!(answer.json()["error"]["code"], 503, "{answer}");
}

variants! {
    fn p3_without_descriptors_clients_are_turned_away_and_nothing_else_is_lost(v: Variant) {
        let gate = Gate::new();
        let events = script().send(sse_head()).send(sse_event("one")).wait(&gate).send(sse_event("two")).send(sse_end());
        let worker = worker().on("/stream", events).start();
        let limited = Limited::start(v, &worker, HARD, HARD, &["--pool-size", "0"]);
        let mut streaming = limited.client();
        streaming.send(client::post("/stream", client::chat_stream("m")));
        streaming.read_until("\"one\"");
        let mut old = limited.client();
        old.get("/health").expect(200);

        let began = Instant::now();
        let limit = limited.exhaust();
        let (mut staying, mut turned_away) = (Vec::new(), 0);
        eventually("clients are turned away, again and again", || {
            turned_away += u32::from(limited.fill(&mut staying));
            turned_away >= 6
        });
        // whoever is connected is served, as far as that needs no descriptor
        old.get("/health").expect(200);
        let mut looks = 0;
        let answer = eventually("there is none for a connection to the worker", || {
            looks += 1;
            // what was closed is closed in the end, and the reserves are held again
            if (limited.files().len() as u64) < limit {
                if looks % 50 == 0 {
                    limited.fill(&mut staying);
                }
                return None;
            }
            Some(old.chat("m")).filter(|answer| answer.status != 200)
        });
        assert_turned_away(&answer);
        assert!(answer.text().contains("out of descriptors"), "{answer}");

        limited.limit(HARD);
        let lasted = began.elapsed();
        eventually("connections to the worker are made again", || old.chat("m").status == 200);
        eventually("new clients are served", || limited.client().chat("m").status == 200);
        gate.open();
        streaming.read_until("\"two\"");
        streaming.read_until("[DONE]\n\n\r\n0\r\n\r\n");

        assert!(limited.metric("vllm_proxy_shed_connections_total{reason=\"descriptors\"}") >= 6.0);
        let errors = limited.metric("vllm_proxy_accept_errors_total{reason=\"descriptors\"}");
        // one before each that was let in on the reserve, and one per pause of 50 ms; it does not spin
        let most = 4.0 * f64::from(turned_away) + lasted.as_secs_f64() * 20.0 * 2.0 + 20.0;
        assert!(errors >= 1.0 && errors <= most, "{errors} failed accepts in {lasted:?}");
        assert!(limited.metric("vllm_proxy_shortages_total{resource=\"descriptors\"}") > errors);
        assert_eq!(limited.metric("vllm_proxy_worker_health"), 1.0, "the worker was blamed");
        assert_eq!(limited.log.lines_with("out of descriptors").len(), 1, "{:?}", limited.log);
        assert_eq!(limited.log.lines_with("worker is down").len(), 0, "{:?}", limited.log);
    }

    fn p3_a_probe_without_a_descriptor_blames_nobody(v: Variant) {
        let worker = worker().start();
        let probes = ["--health-check-interval-secs", "0.05", "--verbosity", "Debug"];
        let limited = Limited::start(v, &worker, HARD, HARD, &probes);
        let mut old = limited.client();
        old.get("/health").expect(200);
        limited.exhaust();
        let mut staying = Vec::new();
        eventually("probes cannot be made, again and again", || {
            limited.fill(&mut staying);
            limited.log.lines_with("worker cannot be probed").len() >= 5
        });
        old.get("/health").expect(200);
        limited.limit(HARD);
        eventually("new clients are served", || limited.client().chat("m").status == 200);
        assert_eq!(limited.log.lines_with("worker is down").len(), 0, "{:?}", limited.log);
    }

    fn p3_half_of_the_descriptors_are_kept_for_workers(v: Variant) {
        let worker = worker().start();
        let limited = Limited::start(v, &worker, 64, 160, &[]);
        assert_eq!(limited.log.lines_with("the limit was raised from 64 to the hard one, 160").len(), 1);
        assert_eq!(limited.log.lines_with("RLIMIT_NOFILE is low").len(), 1);
        let most = limited.metric("vllm_proxy_connections_max") as usize;
        assert!((30..80).contains(&most), "{most}");
        assert_eq!(limited.metric("vllm_proxy_open_files_max"), 160.0);
        eventually("those of the questions are closed", || limited.metric("vllm_proxy_connections_open") == 1.0);

        let mut clients: Vec<Client> = (0..most).map(|_| limited.client()).collect();
        for client in &mut clients {
            client.get("/health").expect(200);
            client.send("GET /health HTTP/1.1\r\n");
        }
        let mut one_more = limited.client();
        assert_turned_away(&one_more.get("/health"));
        one_more.expect_closed();
        for client in &mut clients {
            client.send("host: a\r\n\r\n");
            client.response().expect(200);
        }
        // all of them at once, each with a connection to the worker
        for client in &mut clients {
            client.send(client::post("/v1/chat/completions", client::chat("m")));
        }
        for client in &mut clients {
            assert_eq!(client.response().expect(200).completion(), "ok");
        }
        clients.truncate(most / 2);
        eventually("there is room again", || limited.client().get("/health").status == 200);
        assert!(limited.metric("vllm_proxy_shed_connections_total{reason=\"limit\"}") >= 1.0);
        assert_eq!(limited.metric("vllm_proxy_shed_connections_total{reason=\"descriptors\"}"), 0.0);
    }

    fn p3_clients_that_rest_make_room_for_others(v: Variant) {
        let worker = worker().start();
        if v.shards > 1 {
            // a shard closes its own only, and who comes to which is up to the kernel
            return;
        }
        let limited = Limited::start(v, &worker, 160, 160, &[]);
        let most = limited.metric("vllm_proxy_connections_max") as usize;
        let mut clients: Vec<Client> = Vec::new();
        for _ in 0..3 * most {
            let mut client = limited.client();
            client.chat("m").expect(200);
            clients.push(client);
        }
        assert_eq!(limited.metric("vllm_proxy_shed_connections_total{reason=\"limit\"}"), 0.0);
        let open = limited.metric("vllm_proxy_connections_open");
        assert!(open <= most as f64, "{open} of {most}");
        clients[0].expect_closed();
        clients.last_mut().unwrap().chat("m").expect(200);
    }

    fn p4_without_ports_nobody_is_blamed(v: Variant) {
        let (one, two) = (worker().start(), worker().start());
        let proxy = proxy(v)
            .worker(&one)
            .worker(&two)
            .arg("--health-check-interval-secs", NEVER)
            .connect_fault(no_port)
            .start();
        let mut client = proxy.client();
        let both = [one.addr().ip(), two.addr().ip()];
        WITHOUT_PORTS.lock().unwrap().push(both[0]);
        for _ in 0..8 {
            client.chat("m").expect(200);
        }
        WITHOUT_PORTS.lock().unwrap().push(both[1]);
        let answer = eventually("there is no kept connection any more", || {
            two.close_idle();
            let answer = client.chat("m");
            (answer.status != 200).then_some(answer)
        });
        assert_turned_away(&answer);
        assert_eq!(proxy.usable_workers().len(), 2, "a worker was blamed");
        assert!(proxy.metric("vllm_proxy_shortages_total{resource=\"ports\"}").unwrap() >= 2.0);
        WITHOUT_PORTS.lock().unwrap().retain(|ip| !both.contains(ip));
        client.chat("m").expect(200);
    }

    fn c23_clients_that_come_and_go_leave_nothing_behind(v: Variant) {
        let worker = worker().start();
        let limited = Limited::start(v, &worker, HARD, HARD, &["--pool-idle-timeout-secs", "1"]);
        let rested = |what: &str, most: usize| {
            eventually(what, || {
                let (open, files) = (limited.metric("vllm_proxy_connections_open"), limited.files().len());
                if open == 1.0 && files <= most { Ok(files) } else { Err(format!("{open} open, {files} files")) }
            })
        };
        limited.client().chat("m").expect(200);
        limited.metric("vllm_proxy_connections_open");
        let before = rested("it rests", HARD as usize);
        for round in 0..600 {
            let mut client = limited.client();
            match round % 6 {
                0 => drop(client),
                1 => client.reset(),
                2 => drop(client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le")),
                3 => {
                    client.send(client::post("/v1/chat/completions", client::chat("m")));
                    client.reset();
                }
                4 => client.half_close(),
                _ => drop(client.chat("m").expect(200)),
            }
        }
        // connections that are kept, to the worker and for questions, may differ by a few
        rested("nothing is left of them", before + 6);
    }

    fn c10_hundreds_of_slow_heads_end_in_408_and_hold_up_nobody(v: Variant) {
        let worker = worker().start();
        let limited = Limited::start(v, &worker, HARD, HARD, &["--head-timeout-secs", "1"]);
        let slow: Vec<Client> = (0..300)
            .map(|_| {
                let mut client = limited.client();
                client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n");
                client
            })
            .collect();
        limited.client().chat("m").expect(200);
        for mut client in slow {
            assert_eq!(client.response().status, 408);
            client.expect_closed();
        }
        assert_eq!(worker.complete_requests().len(), 1, "a head that did not end has reached the worker");
        eventually("all of them are gone", || limited.metric("vllm_proxy_connections_open") == 1.0);
    }
}

/// Workers to which there is no port: tests run side by side in this process, and a fault is a plain function.
static WITHOUT_PORTS: Mutex<Vec<IpAddr>> = Mutex::new(Vec::new());

fn no_port(peer: SocketAddr) -> io::Result<()> {
    match WITHOUT_PORTS.lock().unwrap().contains(&peer.ip()) {
        // EADDRNOTAVAIL
        true => Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL)),
        false => Ok(()),
    }
}
