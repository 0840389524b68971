//! A mock vLLM on plain threads, scriptable to the byte, that remembers everything it was sent.
//!
//! Its default answers have vLLM's shape (header order and case of uvicorn). It reads strictly: whatever it
//! cannot parse is kept in [`Worker::malformed`], and a worker that is dropped with an unexpected entry there
//! fails its test. Every worker has a loopback address of its own, so that a port which it gave up is nobody
//! else's meanwhile.

mod script;
mod talk;

use std::{
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use serde_json::{Value, json};

use crate::support::{eventually, head};
use talk::Talk;

pub(crate) use script::{Gate, Script, answer, chunk, json_answer, script, sse_end, sse_event, sse_head};
pub(crate) use talk::Request;

#[derive(Debug)]
struct Connection {
    /// To end it from outside; `None` once only the connection's own thread may hold it.
    stream: Option<TcpStream>,
    idle: bool,
    open: bool,
    /// Whether an application's request ever came on it.
    used: bool,
}

/// What is played for a path.
enum Route {
    /// Known beforehand, so it may begin before the body is read.
    Fixed(Script),
    /// Made of the whole request.
    Made(Box<dyn Fn(&Request) -> Script + Send + Sync>),
}

/// A model as `/v1/models` lists it.
#[derive(Debug, Clone)]
struct Card {
    id: String,
    parent: Option<String>,
    max_model_len: Option<u64>,
}

impl Card {
    fn json(&self) -> Value {
        json!({"id":self.id,"object":"model","created":1_795_252_204,"owned_by":"vllm","root":"tiny",
            "parent":self.parent,"max_model_len":self.max_model_len,
            "permission":[{"id":"modelperm-87be3ac511917a7d","object":"model_permission","allow_view":true}]})
    }
}

/// What a test may change while the worker runs.
#[derive(Debug)]
struct Changeable {
    cards: Vec<Card>,
    health: &'static str,
    load: u64,
    version: String,
}

/// What a worker will be.
pub(crate) struct Builder {
    changeable: Changeable,
    /// By path without query; the first that fits.
    routes: Vec<(String, Route)>,
    pieces: Vec<String>,
    echo: bool,
    hold: Option<Gate>,
    may_be_sent_nonsense: bool,
    ip: Option<IpAddr>,
}

/// A worker to be; without a [`Builder::model`] it serves `m`.
pub(crate) fn worker() -> Builder {
    Builder {
        changeable: Changeable { cards: Vec::new(), health: "200 OK", load: 0, version: "0.32.0".to_owned() },
        routes: Vec::new(),
        pieces: vec!["o".to_owned(), "k".to_owned()],
        echo: false,
        hold: None,
        may_be_sent_nonsense: false,
        ip: None,
    }
}

impl Builder {
    /// Serves a base model.
    pub(crate) fn model(self, id: &str) -> Self {
        self.model_of_length(id, 2048)
    }

    /// Serves a base model with this `max_model_len`.
    pub(crate) fn model_of_length(mut self, id: &str, max_model_len: u64) -> Self {
        let (id, max_model_len) = (id.to_owned(), Some(max_model_len));
        self.changeable.cards.push(Card { id, parent: None, max_model_len });
        self
    }

    /// Serves a LoRA adapter of `parent`.
    pub(crate) fn lora(mut self, id: &str, parent: &str) -> Self {
        let (id, parent) = (id.to_owned(), Some(parent.to_owned()));
        self.changeable.cards.push(Card { id, parent, max_model_len: None });
        self
    }

    /// What completions say, one event each when streamed.
    pub(crate) fn streams<const N: usize>(mut self, pieces: [&str; N]) -> Self {
        self.pieces = pieces.map(str::to_owned).to_vec();
        self
    }

    /// Answers what it has no other answer for with the body it got.
    pub(crate) fn echo(mut self) -> Self {
        self.echo = true;
        self
    }

    /// Answers `/version` with this.
    pub(crate) fn version(mut self, version: &str) -> Self {
        self.changeable.version = version.to_owned();
        self
    }

    /// Answers `/load` with this.
    pub(crate) fn load(mut self, load: u64) -> Self {
        self.changeable.load = load;
        self
    }

    /// Plays `script` for every request to `path`, whatever its method.
    pub(crate) fn on(mut self, path: &str, script: Script) -> Self {
        self.routes.push((path.to_owned(), Route::Fixed(script)));
        self
    }

    /// Plays what `handler` says for a whole request to `path`; `*` stands for every path that has no other.
    pub(crate) fn on_request(
        mut self,
        path: &str,
        handler: impl Fn(&Request) -> Script + Send + Sync + 'static,
    ) -> Self {
        self.routes.push((path.to_owned(), Route::Made(Box::new(handler))));
        self
    }

    /// Reads requests (probes excepted) and answers them when the gate is open.
    pub(crate) fn holds(mut self, gate: &Gate) -> Self {
        self.hold = Some(gate.clone());
        self
    }

    /// Is not fussy about what it cannot parse: for tests that look at it themselves.
    pub(crate) fn may_be_sent_nonsense(mut self) -> Self {
        self.may_be_sent_nonsense = true;
        self
    }

    /// Listens at this address, on a port of the kernel's choice, instead of an address of its own.
    pub(crate) fn at(mut self, ip: impl Into<IpAddr>) -> Self {
        self.ip = Some(ip.into());
        self
    }

    /// Starts to listen.
    pub(crate) fn start(mut self) -> Worker {
        if self.changeable.cards.is_empty() {
            self = self.model("m");
        }
        let listener =
            TcpListener::bind((self.ip.unwrap_or_else(own_ip), 0)).expect("cannot bind a loopback address");
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            addr,
            changeable: Mutex::new(self.changeable),
            routes: self.routes,
            pieces: self.pieces,
            echo: self.echo,
            hold: self.hold,
            may_be_sent_nonsense: self.may_be_sent_nonsense,
            listening: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            requests: Mutex::default(),
            connections: Mutex::default(),
            malformed: Mutex::default(),
            sent_bytes: AtomicU64::new(0),
            threads: Mutex::default(),
        });
        Worker { acceptor: Mutex::new(Some(shared.clone().accept(listener))), shared }
    }
}

/// A loopback address that no other worker, test process (by its id) or proxy uses.
pub(crate) fn own_ip() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id();
    let octet = |value: u32| (value % 254) as u8 + 1;
    IpAddr::V4(Ipv4Addr::new(127, octet(process), octet(process / 254 + next / 254), octet(next)))
}

/// The URL of a worker that refuses connections, for as long as the test runs.
pub(crate) fn dead_url() -> String {
    let addr = TcpListener::bind((own_ip(), 0)).unwrap().local_addr().unwrap();
    format!("http://{addr}")
}

/// A running worker.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    addr: SocketAddr,
    changeable: Mutex<Changeable>,
    routes: Vec<(String, Route)>,
    pieces: Vec<String>,
    echo: bool,
    hold: Option<Gate>,
    may_be_sent_nonsense: bool,
    listening: AtomicBool,
    stopping: AtomicBool,
    requests: Mutex<Vec<Request>>,
    connections: Mutex<Vec<Connection>>,
    malformed: Mutex<Vec<String>>,
    sent_bytes: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Worker {
    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// Its URL for `--worker-urls`.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.shared.addr)
    }

    /// Names of the models it serves now.
    pub(crate) fn model_names(&self) -> Vec<String> {
        lock(&self.shared.changeable).cards.iter().map(|card| card.id.clone()).collect()
    }

    /// The requests it got, without the probes of the proxy itself (`/health`, `/v1/models` …).
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.all_requests().into_iter().filter(|request| !request.is_probe()).collect()
    }

    /// The requests it got, probes included.
    pub(crate) fn all_requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    /// The requests that came to their end, without probes.
    pub(crate) fn complete_requests(&self) -> Vec<Request> {
        self.requests().into_iter().filter(|request| request.complete).collect()
    }

    /// The only request it got.
    #[track_caller]
    pub(crate) fn only_request(&self) -> Request {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "requests: {requests:#?}");
        requests.remove(0)
    }

    /// Waits until `count` requests have come (their heads at least).
    #[track_caller]
    pub(crate) fn wait_for_requests(&self, count: usize) -> Vec<Request> {
        eventually(&format!("the worker has got {count} requests"), || {
            let requests = self.requests();
            if requests.len() >= count { Ok(requests) } else { Err(requests.len()) }
        })
    }

    /// Forgets the requests it got.
    pub(crate) fn forget(&self) {
        lock(&self.shared.requests).clear();
    }

    /// What came that is not HTTP/1.1, in words.
    pub(crate) fn malformed(&self) -> Vec<String> {
        lock(&self.shared.malformed).clone()
    }

    /// Connections that are open and on which at least one request (no probe) came.
    pub(crate) fn open_connections(&self) -> usize {
        lock(&self.shared.connections).iter().filter(|connection| connection.open && connection.used).count()
    }

    /// Connections ever made on which at least one request (no probe) came.
    pub(crate) fn connections(&self) -> usize {
        lock(&self.shared.connections).iter().filter(|connection| connection.used).count()
    }

    /// Bytes of answers that the kernel has taken.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.shared.sent_bytes.load(Ordering::Relaxed)
    }

    /// From now on `/health` answers with this status line's rest.
    pub(crate) fn set_health(&self, status: &'static str) {
        lock(&self.shared.changeable).health = status;
    }

    /// From now on it serves these base models.
    pub(crate) fn set_models(&self, ids: &[&str]) {
        lock(&self.shared.changeable).cards = ids
            .iter()
            .map(|id| Card { id: (*id).to_owned(), parent: None, max_model_len: Some(2048) })
            .collect();
    }

    /// Closes the connections that wait for a request; how many.
    pub(crate) fn close_idle(&self) -> usize {
        let connections = lock(&self.shared.connections);
        let idle = connections.iter().filter(|connection| connection.open && connection.idle);
        idle.filter(|connection| connection.used).map(Connection::end).count()
    }

    /// Stops to listen and ends all connections: connecting is refused from now on.
    pub(crate) fn go_down(&self) {
        self.stop_listening();
        self.shared.end_connections();
    }

    /// Listens again, where it did before.
    pub(crate) fn come_back(&self) {
        let listener = TcpListener::bind(self.shared.addr).expect("the worker's address is taken");
        self.shared.listening.store(true, Ordering::SeqCst);
        *lock(&self.acceptor) = Some(self.shared.clone().accept(listener));
    }

    fn stop_listening(&self) {
        self.shared.listening.store(false, Ordering::SeqCst);
        if let Some(acceptor) = lock(&self.acceptor).take() {
            // wakes the thread that accepts
            drop(TcpStream::connect(self.shared.addr));
            re_raise(acceptor.join());
        }
    }
}

fn re_raise(joined: thread::Result<()>) {
    if let Err(panic) = joined
        && !thread::panicking()
    {
        std::panic::resume_unwind(panic);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.stop_listening();
        self.shared.end_connections();
        let threads = std::mem::take(&mut *lock(&self.shared.threads));
        for thread in threads {
            re_raise(thread.join());
        }
        let malformed = self.malformed();
        if !self.shared.may_be_sent_nonsense && !thread::panicking() {
            assert!(malformed.is_empty(), "the worker was sent nonsense: {malformed:#?}");
        }
    }
}

impl Shared {
    fn accept(self: Arc<Self>, listener: TcpListener) -> JoinHandle<()> {
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if !self.listening.load(Ordering::SeqCst) {
                    return;
                }
                let shared = self.clone();
                let mut connections = lock(&self.connections);
                let id = connections.len();
                let end = stream.try_clone().expect("out of descriptors");
                connections.push(Connection { stream: Some(end), idle: true, open: true, used: false });
                drop(connections);
                let thread = thread::spawn(move || {
                    Talk { shared: shared.clone(), stream, id, buffer: Vec::new() }.run();
                    let ended = &mut lock(&shared.connections)[id];
                    ended.open = false;
                    ended.stream = None;
                });
                lock(&self.threads).push(thread);
            }
        })
    }

    fn end_connections(&self) {
        for connection in lock(&self.connections).iter() {
            connection.end();
        }
    }

    fn route(&self, request: &Request) -> Option<&Route> {
        let fits = |path: &str| self.routes.iter().find(|(have, _)| have == path).map(|(_, route)| route);
        fits(request.path()).or_else(|| if request.is_probe() { None } else { fits("*") })
    }

    fn script(&self, request: &Request) -> Script {
        match self.route(request) {
            Some(Route::Fixed(script)) => script.clone(),
            Some(Route::Made(handler)) => handler(request),
            None => script().send(self.answer(request)),
        }
    }

    fn answer(&self, request: &Request) -> Vec<u8> {
        let now = lock(&self.changeable);
        let bytes = match (&request.method[..], request.path()) {
            ("GET", "/health") => answer(now.health, "", "", ""),
            ("GET", "/v1/models") => {
                let cards: Vec<Value> = now.cards.iter().map(Card::json).collect();
                json_answer(json!({"object":"list","data":cards}).to_string())
            }
            ("GET", "/version") => json_answer(json!({"version":now.version}).to_string()),
            ("GET", "/load") => json_answer(json!({"server_load":now.load}).to_string()),
            ("POST", "/v1/chat/completions" | "/v1/completions") => self.completion(request),
            _ if self.echo => answer("200 OK", "application/octet-stream", "", &request.body),
            _ => answer("404 Not Found", "application/json", "", r#"{"detail":"Not Found"}"#),
        };
        if request.method == "HEAD" {
            let end = head::head_end(&bytes).unwrap_or(bytes.len());
            return bytes[..end].to_vec();
        }
        bytes
    }

    fn completion(&self, request: &Request) -> Vec<u8> {
        let asked = request.json();
        if asked["stream"] == json!(true) {
            let mut bytes = sse_head().into_bytes();
            for piece in &self.pieces {
                bytes.extend_from_slice(&sse_event(piece));
            }
            bytes.extend_from_slice(&sse_end());
            return bytes;
        }
        let text = self.pieces.concat();
        let choice = if request.path() == "/v1/completions" {
            json!({"index":0,"text":text,"finish_reason":"stop"})
        } else {
            json!({"index":0,"message":{"role":"assistant","content":text},"finish_reason":"stop"})
        };
        json_answer(json!({"id":"chatcmpl-1","model":asked["model"],"choices":[choice]}).to_string())
    }
}

impl Connection {
    fn end(&self) {
        if let Some(stream) = &self.stream {
            stream.shutdown(Shutdown::Both).unwrap_or_default();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
