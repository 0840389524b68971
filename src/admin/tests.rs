//! The admin endpoints over a real control thread, against workers on loopback.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{atomic::Ordering, mpsc},
};

use super::*;
use crate::control::{
    Handle, Parts, Settings,
    fake::{Asked, Fake, eventually, json, list},
};
use crate::workers::{FleetHandle, Health, ModelSettings, Registry, WorkerSpec, WorkerUrl};
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::IntoResponse;

const STORED: &str = r#"{"id":"resp_1","status":"completed"}"#;
const MISSING: &str = r#"{"error":{"message":"Response with id 'resp_1' not found.","type":"invalid_request_error","param":"response_id","code":404}}"#;

struct Running {
    admin: SocketAddr,
    fleet: FleetHandle,
    stored: Arc<StoredResponses>,
    handle: Option<Handle>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take()
            && let Err(panic) = handle.stop()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// An answer as it came over the wire, its body joined from its chunks.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Running {
    fn start(workers: &[&Fake]) -> Self {
        Self::with(workers, ModelSettings::default(), 1 << 20)
    }

    fn with(workers: &[&Fake], models: ModelSettings, body_bytes: usize) -> Self {
        Self::at(workers.iter().map(|worker| worker.url()).collect(), models, body_bytes)
    }

    fn at(urls: Vec<WorkerUrl>, models: ModelSettings, body_bytes: usize) -> Self {
        Self::of(urls.into_iter().map(Into::into).collect(), models, body_bytes)
    }

    fn of(specs: Vec<WorkerSpec>, models: ModelSettings, body_bytes: usize) -> Self {
        let settings = Settings {
            health_check_interval_secs: 3600.0,
            health_check_timeout_secs: 2.0,
            model_refresh_secs: 3600.0,
            dns_refresh_secs: 3600.0,
            engine_stats_interval: 0.0,
            ..Settings::defaults()
        };
        let registry = Registry::new(specs, models);
        let fleet = registry.handle();
        let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let admin = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::new(1, ["/v1/chat/completions"]));
        let limits = Limits { connect: Duration::from_secs(2), body_bytes };
        let stored = Arc::new(StoredResponses::default());
        let service = service(listener, metrics, limits, stored.clone());
        let handle = control::start(Parts {
            clock: crate::base::Clock::start(),
            settings,
            registry,
            aliases: vec![],
            service,
        })
        .unwrap();
        handle.wait_ready();
        Self { admin, fleet, stored, handle: Some(handle) }
    }

    /// Sends a request and leaves the answer to be read.
    fn send(&self, line: &str, fields: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let length = body.len();
        let head = format!("{line} HTTP/1.1\r\nhost: p\r\n{fields}content-length: {length}\r\n");
        stream.write_all(format!("{head}connection: close\r\n\r\n{body}").as_bytes()).unwrap();
        stream
    }

    fn ask(&self, line: &str, fields: &str, body: &str) -> Answer {
        let mut text = String::new();
        self.send(line, fields, body).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head[9..12].parse().unwrap();
        let chunked = head.contains("transfer-encoding: chunked");
        let body = if chunked { joined(body) } else { body.to_owned() };
        Answer { status, head: head.to_owned(), body }
    }

    fn get(&self, target: &str) -> Answer {
        self.ask(&format!("GET {target}"), "", "")
    }

    fn set_down(&self, position: usize) {
        self.fleet.load().workers[position].set_health(Health::Down);
    }
}

fn joined(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = chunks.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        body.push_str(&rest[..size]);
        chunks = &rest[size + 2..];
    }
    body
}

/// A worker that holds the response `resp_1`.
fn holder() -> Fake {
    Fake::scripted(|asked| match &asked.line[..] {
        "GET /v1/responses/resp_1" | "GET /v1/responses/resp%5f1" => Some(json(200, STORED)),
        "GET /v1/responses/resp_1?stream=true" => Some(json(200, "data: {}\n\n")),
        "POST /v1/responses/resp_1/cancel" => Some(json(200, r#"{"status":"cancelled"}"#)),
        "POST /v1/responses" => Some(json(200, asked.body.clone())),
        _ => None,
    })
}

/// A worker that has no stored response.
fn stranger() -> Fake {
    Fake::scripted(|asked| match &asked.line[..] {
        line if line.starts_with("GET /v1/responses/") => Some(json(404, MISSING)),
        "POST /v1/responses" => Some(json(404, MISSING)),
        _ => None,
    })
}

/// A worker that answers one request so.
fn saying(line: &'static str, status: u16, body: &'static str) -> Fake {
    Fake::scripted(move |asked| (asked.line == line).then(|| json(status, body)))
}

#[test]
fn metrics_are_told_in_the_format_that_is_asked_for() {
    let worker = Fake::start();
    let running = Running::start(&[&worker]);
    let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let accept = "accept: application/openmetrics-text\r\n";
    for (path, fields, content_type) in [
        ("/metrics", "", "text/plain; version=0.0.4; charset=utf-8"),
        ("/metrics", accept, openmetrics),
        ("/metrics/", accept, openmetrics),
        ("/metrics/x", accept, openmetrics),
    ] {
        let answer = running.ask(&format!("GET {path}"), fields, "");
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.head.contains(&format!("content-type: {content_type}\r\n")), "{}", answer.head);
        let health = format!("vllm_proxy_worker_health{{worker=\"{}\"}} 1\n", worker.url());
        assert!(answer.body.contains(&health), "{}", answer.body);
    }
}

#[test]
fn load_is_the_sum_over_those_who_answer() {
    let workers = [3, 4, 100].map(|load| {
        Fake::scripted(move |asked| {
            (asked.line == "GET /load").then(|| json(200, format!("{{\"server_load\":{load}}}")))
        })
    });
    let running = Running::start(&workers.each_ref());
    running.set_down(2);
    let answer = running.get("/load");
    assert_eq!((answer.status, &answer.body[..]), (200, r#"{"server_load":7}"#));
    assert!(answer.head.contains("content-type: application/json"));
}

#[test]
fn a_broadcast_reaches_every_worker_with_query_body_and_key() {
    let workers = [0, 1].map(|_| saying("POST /sleep?level=1", 200, r#"{"status":"sleeping","level":1}"#));
    let running = Running::start(&workers.each_ref());
    let fields = "authorization: Bearer k\r\ncontent-type: application/json\r\n";
    let answer = running.ask("POST /sleep?level=1", fields, r#"{"tags":null}"#);
    assert_eq!((answer.status, &answer.body[..]), (200, r#"{"status":"sleeping","level":1}"#));
    let want = Asked {
        line: "POST /sleep?level=1".to_owned(),
        key: Some("Bearer k".to_owned()),
        rank: None,
        body: Bytes::from_static(br#"{"tags":null}"#),
    };
    for worker in &workers {
        assert_eq!(worker.asked().iter().filter(|asked| **asked == want).count(), 1);
    }
}

#[test]
fn a_broadcast_that_names_a_model_goes_to_its_workers_only() {
    let workers = [0, 1].map(|_| saying("POST /reset_prefix_cache", 200, r#"{"success":true}"#));
    workers[1].set_models(200, list(&["n"]));
    let running = Running::start(&workers.each_ref());
    running.ask("POST /reset_prefix_cache", "", r#"{"model":"n"}"#);
    assert_eq!([0, 1].map(|at| workers[at].count("POST /reset_prefix_cache")), [0, 1]);
    running.ask("POST /reset_prefix_cache", "", "");
    assert_eq!([0, 1].map(|at| workers[at].count("POST /reset_prefix_cache")), [1, 2]);
}

#[test]
fn a_change_that_one_worker_refuses_is_no_success() {
    let good = saying("POST /sleep", 200, r#"{"status":"sleeping","level":1}"#);
    let bad = saying("POST /sleep", 500, r#"{"error":"no"}"#);
    let running = Running::start(&[&good, &bad]);
    assert_ne!(running.ask("POST /sleep", "", "").status, 200);
}

#[test]
fn an_adapter_is_known_as_soon_as_its_loading_is_answered() {
    let worker =
        saying("POST /v1/load_lora_adapter", 200, "Success: LoRA adapter 'lora-z' added successfully.");
    let running = Running::start(&[&worker]);
    worker.set_models(200, list(&["m", "lora-z"]));
    let answer = running.ask("POST /v1/load_lora_adapter", "", r#"{"lora_name":"lora-z","lora_path":"/z"}"#);
    assert_eq!(answer.status, 200);
    assert!(running.fleet.load().models().iter().any(|model| model.name == "lora-z"));
}

#[test]
fn a_stored_response_is_found_on_its_worker() {
    let (holder, stranger) = (holder(), stranger());
    let running = Running::start(&[&stranger, &holder]);
    for (target, body) in
        [("/v1/responses/resp_1", STORED), ("/v1/responses/resp_1?stream=true", "data: {}\n\n")]
    {
        let answer = running.get(target);
        assert_eq!((answer.status, &answer.body[..]), (200, body), "{target}");
    }
    eventually("nothing is in flight", || running.fleet.load().workers.iter().all(|w| w.in_flight() == 0));
}

#[test]
fn a_response_that_nobody_has_is_missing_in_the_workers_own_words() {
    let strangers = [stranger(), stranger()];
    let running = Running::start(&strangers.each_ref());
    for line in ["GET /v1/responses/resp_1", "POST /v1/responses/resp_1/cancel"] {
        let answer = running.ask(line, "", "");
        assert_eq!((answer.status, &answer.body[..]), (404, MISSING), "{line}");
    }
    assert!(strangers.iter().all(|worker| worker.count("POST /v1/responses/resp_1/cancel") == 0));
}

#[test]
fn an_error_of_a_possible_holder_is_told_before_a_404_of_others() {
    let broken = saying("GET /v1/responses/resp_1", 500, r#"{"error":"no"}"#);
    let stranger = stranger();
    let running = Running::start(&[&stranger, &broken]);
    assert_eq!(running.get("/v1/responses/resp_1").status, 500);
    running.set_down(1);
    assert_eq!(running.get("/v1/responses/resp_1").status, 404);
}

#[test]
fn a_cancel_reaches_the_holder_only() {
    let (holder, stranger) = (holder(), stranger());
    let running = Running::start(&[&stranger, &holder]);
    let answer = running.ask("POST /v1/responses/resp_1/cancel", "", "");
    assert_eq!((answer.status, &answer.body[..]), (200, r#"{"status":"cancelled"}"#));
    assert_eq!(stranger.count("POST /v1/responses/resp_1/cancel"), 0);
}

#[test]
fn a_response_that_continues_another_goes_to_its_holder() {
    let (holder, stranger) = (holder(), stranger());
    let running = Running::start(&[&stranger, &holder]);
    let body = r#"{"model":"m","previous_response_id":"resp_1","input":"x"}"#;
    let answer = running.ask("POST /v1/responses", "content-type: application/json\r\n", body);
    assert_eq!((answer.status, &answer.body[..]), (200, body));
    assert_eq!(stranger.count("POST /v1/responses"), 0);
}

#[test]
fn an_alias_is_renamed_on_the_way_to_the_holder() {
    let (holder, stranger) = (holder(), stranger());
    let models = ModelSettings { aliases: vec![("gpt-4".to_owned(), "m".to_owned())], default_model: None };
    let running = Running::with(&[&stranger, &holder], models, 1 << 20);
    let body = r#"{"model": "gpt-4","previous_response_id":"resp_1"}"#;
    let answer = running.ask("POST /v1/responses", "", body);
    assert_eq!(answer.body, r#"{"model": "m","previous_response_id":"resp_1"}"#);
}

#[test]
fn what_continues_nothing_that_is_known_is_answered_by_a_worker() {
    let strangers = [stranger(), stranger()];
    let running = Running::start(&strangers.each_ref());
    let answer = running.ask("POST /v1/responses", "", r#"{"model":"m","previous_response_id":"resp_9"}"#);
    assert_eq!((answer.status, &answer.body[..]), (404, MISSING));
    assert_eq!(strangers.iter().map(|worker| worker.count("POST /v1/responses")).sum::<usize>(), 1);
}

#[test]
fn a_client_that_goes_away_takes_its_question_along() {
    let silent = Fake::scripted(|asked| {
        asked.line.starts_with("GET /v1/responses/").then(|| json(StatusCode::IM_A_TEAPOT.as_u16(), ""))
    });
    let running = Running::start(&[&silent]);
    let client = running.send("GET /v1/responses/resp_1", "", "");
    eventually("the worker is asked", || silent.settings.hanging.load(Ordering::SeqCst) == 1);
    drop(client);
    eventually("the question is dropped", || silent.settings.hanging.load(Ordering::SeqCst) == 0);
    eventually("nothing is in flight", || running.fleet.load().workers[0].in_flight() == 0);
}

#[test]
fn no_worker_at_all_is_a_503_in_vllms_shape() {
    let running = Running::start(&[]);
    for line in ["GET /load", "POST /sleep", "GET /v1/responses/resp_1", "POST /v1/responses"] {
        let answer = running.ask(line, "", "");
        assert_eq!(answer.status, 503, "{line}");
        assert!(answer.head.contains("retry-after: 1"));
        assert!(answer.body.contains(r#""type":"Service Unavailable","param":null,"code":503"#));
    }
}

#[test]
fn when_every_worker_refuses_they_are_down_and_the_client_is_told_to_come_back() {
    let worker = Fake::start();
    let running = Running::start(&[&worker]);
    drop(worker);
    assert_eq!(running.get("/load").status, 503);
    assert_eq!(running.fleet.load().workers[0].health(), Health::Down);
}

#[test]
fn a_body_over_the_limit_is_refused() {
    let worker = Fake::start();
    let running = Running::with(&[&worker], ModelSettings::default(), 10);
    for line in ["POST /sleep", "POST /v1/responses"] {
        let answer = running.ask(line, "", "12345678901");
        assert_eq!(answer.status, 413, "{line}");
    }
}

#[test]
fn an_unknown_path_or_method_is_answered_as_vllm_does() {
    let running = Running::start(&[]);
    let answer = running.get("/nope");
    assert_eq!((answer.status, &answer.body[..]), (404, r#"{"detail":"Not Found"}"#));
    let answer = running.get("/sleep");
    assert_eq!((answer.status, &answer.body[..]), (405, r#"{"detail":"Method Not Allowed"}"#));
    assert!(answer.head.contains("allow: POST"), "{}", answer.head);
}

/// A worker that answers requests for stored responses with these bytes, holds the connection until it is told to
/// end or its client is gone, and 404 to everything else.
struct Raw {
    url: WorkerUrl,
    /// Heads of the requests for stored responses.
    heads: mpsc::Receiver<String>,
    /// Ends the connections when dropped.
    end: Option<mpsc::Sender<()>>,
    /// Gets a word when a client is gone before the end.
    gone: mpsc::Receiver<()>,
    address: SocketAddr,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Raw {
    fn start(answer: &'static str) -> Self {
        let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (told, heads) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let (left, gone) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(head) = head(&mut stream) else { return };
                if !head.contains(" /v1/responses") {
                    let nothing = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                    stream.write_all(nothing).unwrap();
                    continue;
                }
                told.send(head).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                while ended.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    if stream.read(&mut [0; 16]).is_ok_and(|n| n == 0) {
                        left.send(()).unwrap_or_default();
                        break;
                    }
                }
            }
        });
        let url = format!("http://{address}").parse().unwrap();
        Self { url, heads, end: Some(end), gone, address, thread: Some(thread) }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        drop(self.end.take());
        // An empty connection ends the loop.
        drop(TcpStream::connect(self.address));
        if let Some(Err(panic)) = self.thread.take().map(std::thread::JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Reads to the end of a head; `None` if nothing comes.
fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.extend_from_slice(&byte);
    }
    String::from_utf8(head).ok()
}

/// Reads until `text` has come.
fn until(stream: &mut TcpStream, text: &str) -> String {
    let mut got = Vec::new();
    while !got.windows(text.len()).any(|part| part == text.as_bytes()) {
        let mut part = [0; 1024];
        let n = stream.read(&mut part).unwrap();
        assert_ne!(n, 0, "ended before {text:?}: {:?}", String::from_utf8_lossy(&got));
        got.extend_from_slice(&part[..n]);
    }
    String::from_utf8(got).unwrap()
}

const OPEN_STREAM: &str = "HTTP/1.1 200 OK\r\nX-Thing: A\r\nContent-Type: text/event-stream\r\n\
    Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5\r\n\r\n9\r\ndata: 1\n\n\r\n";

#[test]
fn heads_pass_as_they_were_written_but_for_what_concerns_one_connection() {
    let worker = Raw::start("HTTP/1.1 203 Odd\r\nX-Thing: A\r\nContent-LENGTH: 2\r\nx-other: b\r\n\r\nhi");
    let running = Running::at(vec![worker.url.clone()], ModelSettings::default(), 1 << 20);
    let fields = "X-Mine: 1\r\nauthorization: Bearer k\r\nX-Hop: 2\r\nconnection: X-Hop\r\n";
    let answer = running.ask("GET /v1/responses/..%2fa?b=%7e", fields, "");
    assert_eq!((answer.status, &answer.body[..]), (203, "hi"));
    for field in ["X-Thing: A\r\n", "Content-LENGTH: 2\r\n", "x-other: b\r\n"] {
        assert!(answer.head.contains(field), "{}", answer.head);
    }
    let head = worker.heads.recv().unwrap();
    assert!(head.starts_with("GET /v1/responses/..%2fa?b=%7e HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("X-Mine: 1\r\n") && head.contains("host: p\r\n"), "{head}");
    assert!(!head.contains("X-Hop") && !head.contains("connection"), "{head}");
}

#[test]
fn a_stream_passes_as_it_comes_and_a_cut_stays_a_cut() {
    let mut worker = Raw::start(OPEN_STREAM);
    let running = Running::at(vec![worker.url.clone()], ModelSettings::default(), 1 << 20);
    let mut client = running.send("GET /v1/responses/r?stream=true", "", "");
    let got = until(&mut client, "data: 1\n\n");
    assert!(got.contains("X-Thing: A\r\n") && !got.contains("Keep-Alive: timeout"), "{got}");
    drop(worker.end.take());
    let mut rest = String::new();
    // Whether the cut is seen as an end or as a reset is a matter of timing.
    client.read_to_string(&mut rest).unwrap_or_default();
    assert!(!rest.contains("0\r\n\r\n"), "{rest:?}");
}

#[test]
fn a_client_that_goes_away_in_a_stream_takes_it_along() {
    let worker = Raw::start(OPEN_STREAM);
    let running = Running::at(vec![worker.url.clone()], ModelSettings::default(), 1 << 20);
    let mut client = running.send("GET /v1/responses/r?stream=true", "", "");
    until(&mut client, "data: 1\n\n");
    assert_eq!(running.fleet.load().workers[0].in_flight(), 1);
    drop(client);
    worker.gone.recv_timeout(Duration::from_secs(10)).unwrap();
    eventually("nothing is in flight", || running.fleet.load().workers[0].in_flight() == 0);
}

#[test]
fn a_broadcast_reaches_a_server_once_however_many_ranks_it_has() {
    let servers = [0, 1].map(|_| {
        Fake::scripted(|asked| match &asked.line[..] {
            "GET /load" => Some(json(200, r#"{"server_load":3}"#)),
            "POST /sleep" => Some(json(200, r#"{"status":"sleeping"}"#)),
            _ => None,
        })
    });
    let specs = servers.iter().flat_map(|server| server.ranks(2)).collect();
    let running = Running::of(specs, ModelSettings::default(), 1 << 20);
    assert_eq!(running.get("/load").body, r#"{"server_load":6}"#);
    assert_eq!(running.ask("POST /sleep", "", "").status, 200);
    for server in &servers {
        assert_eq!((server.count("GET /load"), server.count("POST /sleep")), (1, 1));
    }
}

#[test]
fn who_has_emptied_its_cache_has_lost_it_and_nobody_else_has() {
    let does = Fake::scripted(|asked| match &asked.line[..] {
        "POST /reset_prefix_cache" => Some(json(200, r#"{"success":true}"#)),
        "POST /reset_mm_cache" | "POST /sleep" => Some(json(200, "")),
        _ => None,
    });
    let busy = Fake::scripted(|asked| match &asked.line[..] {
        "POST /reset_prefix_cache" => Some(json(200, r#"{"success":false}"#)),
        "POST /reset_mm_cache" => Some(json(200, "")),
        _ => None,
    });
    let running = Running::start(&[&does, &busy]);
    let generations = || {
        let fleet = running.fleet.load();
        [0, 1].map(|at| fleet.workers[at].cache_generation())
    };
    assert_eq!(generations(), [0, 0]);
    assert_eq!(running.ask("POST /reset_prefix_cache", "", "").body, r#"{"success":false}"#);
    assert_eq!(generations(), [1, 0], "one was too busy");
    assert_eq!(running.ask("POST /reset_mm_cache", "", "").status, 200);
    assert_eq!(generations(), [1, 0], "another cache");
    assert_eq!(running.ask("POST /sleep", "", "").status, 200, "a 404 is left out");
    assert_eq!(generations(), [2, 0], "one has slept, the other does not know how");
}

#[test]
fn a_stored_response_is_looked_for_once_per_server_and_continued_on_its_idlest_rank() {
    let (holder, stranger) = (holder(), stranger());
    let specs = [&stranger, &holder].iter().flat_map(|server| server.ranks(2)).collect();
    let running = Running::of(specs, ModelSettings::default(), 1 << 20);
    assert_eq!(running.get("/v1/responses/resp_1").body, STORED);
    assert_eq!(holder.count("GET /v1/responses/resp_1"), 1);
    assert!(stranger.count("GET /v1/responses/resp_1") <= 1);
    let first = running.fleet.load().workers[2].clone();
    let _busy = crate::workers::InFlight::begin(first, crate::workers::Demand::default());
    let body = r#"{"previous_response_id":"resp_1"}"#;
    let answer = running.ask("POST /v1/responses", "x-data-parallel-rank: 7\r\n", body);
    assert_eq!((answer.status, &answer.body[..]), (200, body));
    let asked = holder.asked();
    let continued: Vec<_> = asked.iter().filter(|asked| asked.line == "POST /v1/responses").collect();
    assert_eq!(continued.iter().map(|asked| asked.rank.as_deref()).collect::<Vec<_>>(), [Some("1")]);
}

/// Remembers the worker at `position` for `resp_1`.
fn remember(running: &Running, position: usize) {
    let id = running.fleet.load().workers[position].id();
    running.stored.put(StoredResponses::hash("resp_1"), id);
}

#[test]
fn memory_is_not_taken_at_its_word() {
    let silent = Fake::scripted(|asked| {
        asked.line.starts_with("GET /v1/responses/").then(|| json(StatusCode::IM_A_TEAPOT.as_u16(), ""))
    });
    let broken = saying("GET /v1/responses/resp_1", 500, r#"{"error":"no"}"#);
    let (holder, stranger, gone) = (holder(), stranger(), Fake::start());
    let running = Running::start(&[&holder, &silent, &broken, &stranger, &gone]);
    drop(gone);
    // silent, broken, without it, and unreachable
    for wrong in 1..5 {
        remember(&running, wrong);
        let answer = running.get("/v1/responses/resp_1");
        assert_eq!((answer.status, &answer.body[..]), (200, STORED), "{wrong}");
        assert_eq!(running.stored.get(StoredResponses::hash("resp_1")), Some(0), "{wrong}");
        remember(&running, wrong);
        assert_eq!(running.ask("POST /v1/responses/resp_1/cancel", "", "").status, 200, "{wrong}");
    }
    running.stored.put(StoredResponses::hash("resp_1"), 77);
    assert_eq!(running.get("/v1/responses/resp_1").body, STORED, "a worker that is none of ours");
    assert_eq!(stranger.count("POST /v1/responses/resp_1/cancel"), 0);
    eventually("nothing is in flight", || running.fleet.load().workers.iter().all(|w| w.in_flight() == 0));
}

#[test]
fn what_is_remembered_and_nobody_has_is_told_as_if_it_were_not() {
    let broken = saying("GET /v1/responses/resp_1", 500, r#"{"error":"no"}"#);
    let strangers = [stranger(), stranger()];
    let running = Running::start(&[&strangers[0], &strangers[1], &broken]);
    for remembered in [0, 2] {
        remember(&running, remembered);
        assert_eq!(running.get("/v1/responses/resp_1").status, 500, "it may be the holder's");
    }
    running.set_down(2);
    for remembered in [0, 2] {
        remember(&running, remembered);
        let answer = running.get("/v1/responses/resp_1");
        assert_eq!((answer.status, &answer.body[..]), (404, MISSING));
    }
}

#[test]
fn only_the_server_that_is_remembered_is_asked_whichever_of_its_ranks_it_was() {
    let (holder, stranger) = (holder(), stranger());
    let specs = [&stranger, &holder].iter().flat_map(|server| server.ranks(2)).collect();
    let running = Running::of(specs, ModelSettings::default(), 1 << 20);
    remember(&running, 3);
    assert_eq!(running.get("/v1/responses/resp_1").body, STORED);
    assert_eq!(running.ask("POST /v1/responses/resp_1/cancel", "", "").status, 200);
    assert_eq!(holder.count("GET /v1/responses/resp_1"), 2);
    assert_eq!(running.get("/v1/responses/resp%5f1").body, STORED, "the same id, written otherwise");
    assert!(stranger.asked().iter().all(|asked| !asked.line.contains("/v1/responses")));
}

#[test]
fn a_response_made_by_continuing_one_is_remembered_unless_it_is_not_stored() {
    let holder = Fake::scripted(|asked| {
        let made = if asked.body.windows(6).any(|part| part == b"stream") {
            let event = "event: response.created\ndata: {\"response\":{\"id\":\"resp_2\"}}\n\n";
            ([(axum::http::header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], event).into_response()
        } else {
            json(200, r#"{"id":"resp_2","output":[]}"#)
        };
        match &asked.line[..] {
            "GET /v1/responses/resp_1" => Some(json(200, STORED)),
            "POST /v1/responses" => Some(made),
            _ => None,
        }
    });
    let running = Running::start(&[&stranger(), &holder]);
    let made = StoredResponses::hash("resp_2");
    for (more, remembered) in [
        (r#","store":false"#, None),
        (r#","store":false,"stream":true"#, None),
        ("", Some(1)),
        (r#","stream":true"#, Some(1)),
    ] {
        if remembered.is_some() {
            running.stored.put(made, 0);
        }
        let body = format!(r#"{{"previous_response_id":"resp_1"{more}}}"#);
        let answer = running.ask("POST /v1/responses", "", &body);
        assert!(answer.status == 200 && answer.body.contains("resp_2"), "{}", answer.body);
        assert_eq!(running.stored.get(made), remembered, "{more}");
    }
}

#[test]
fn what_the_holder_refuses_it_is_asked_once_and_what_another_refuses_is_no_answer() {
    let says = |status: u16| {
        Fake::scripted(move |asked| match &asked.line[..] {
            "GET /v1/responses/resp_1" => Some(json(if status == 500 { 404 } else { 200 }, STORED)),
            "POST /v1/responses" => Some(json(status, r#"{"error":"no"}"#)),
            _ => None,
        })
    };
    let (holder, refuses, strange, gone) = (holder(), says(400), says(500), Fake::start());
    let body = r#"{"previous_response_id":"resp_1"}"#;
    let running = Running::start(&[&refuses, &strange]);
    remember(&running, 0);
    let answer = running.ask("POST /v1/responses", "", body);
    assert_eq!((answer.status, &answer.body[..]), (400, r#"{"error":"no"}"#));
    assert_eq!((refuses.count("POST /v1/responses"), strange.count("POST /v1/responses")), (1, 0));
    let running = Running::start(&[&holder, &strange, &gone]);
    drop(gone);
    for wrong in [1, 2] {
        remember(&running, wrong);
        let answer = running.ask("POST /v1/responses", "", body);
        assert_eq!((answer.status, &answer.body[..]), (200, body), "{wrong}");
    }
    assert_eq!((holder.count("POST /v1/responses"), strange.count("POST /v1/responses")), (2, 1));
}
