//! A mock vLLM on plain threads, scriptable to the byte, that remembers everything it was sent.
//!
//! Its default answers have vLLM's shape (header order and case of uvicorn). It reads strictly: whatever it
//! cannot parse is kept in [`Worker::malformed`], and a worker that is dropped with an unexpected entry there
//! fails its test. Every worker has a loopback address of its own, so that a port which it gave up is nobody
//! else's meanwhile.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use socket2::SockRef;

use crate::support::{
    client::bytewise,
    eventually,
    head::{self, Body, Framing, Headers},
};

/// How often something that waits looks whether its peer has gone or the test is over.
const LOOK: Duration = Duration::from_millis(2);

/// A latch between a test and its workers: shut until the test opens it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<(bool, usize)>, Condvar)>);

impl Gate {
    /// A shut gate.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Lets everybody through, now and later.
    pub(crate) fn open(&self) {
        lock(&self.0.0).0 = true;
        self.0.1.notify_all();
    }

    /// How many stand before it.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.0.0).1
    }

    /// Waits `limit` at most; whether it is open.
    fn wait(&self, limit: Duration) -> bool {
        let guard = lock(&self.0.0);
        self.0.1.wait_timeout_while(guard, limit, |(open, _)| !*open).unwrap().0.0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What a worker does on the wire for one request.
#[derive(Debug, Clone)]
enum Step {
    ReadBody,
    Send(Vec<u8>),
    SendBytewise(Vec<u8>),
    Wait(Gate),
    Flood(u64),
    Tunnel,
    Close,
    Reset,
}

/// Steps in order. If none of them ends the connection, it is kept for the next request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Script {
    steps: Vec<Step>,
    early: bool,
}

/// A script that first reads the request to its end.
pub(crate) fn script() -> Script {
    Script::default()
}

impl Script {
    fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Does not read the request's body before the first step.
    pub(crate) fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// Reads the body to its end, after [`Script::early`].
    pub(crate) fn read_body(self) -> Self {
        self.then(Step::ReadBody)
    }

    /// Sends these bytes, whatever they are.
    pub(crate) fn send(self, bytes: impl AsRef<[u8]>) -> Self {
        self.then(Step::Send(bytes.as_ref().to_vec()))
    }

    /// Sends these bytes one by one.
    pub(crate) fn send_bytewise(self, bytes: impl AsRef<[u8]>) -> Self {
        self.then(Step::SendBytewise(bytes.as_ref().to_vec()))
    }

    /// Goes on when the gate is open; if the peer goes first, that is noted and the script ends.
    pub(crate) fn wait(self, gate: &Gate) -> Self {
        self.then(Step::Wait(gate.clone()))
    }

    /// Sends `total` bytes of `x` as fast as they are taken.
    pub(crate) fn flood(self, total: u64) -> Self {
        self.then(Step::Flood(total))
    }

    /// Echoes whatever comes until the peer closes.
    pub(crate) fn tunnel(self) -> Self {
        self.then(Step::Tunnel)
    }

    /// Closes the connection.
    pub(crate) fn close(self) -> Self {
        self.then(Step::Close)
    }

    /// Resets the connection.
    pub(crate) fn reset(self) -> Self {
        self.then(Step::Reset)
    }
}

/// The bytes of an answer with a length, headers in uvicorn's order; `headers` are whole lines put last.
pub(crate) fn answer(status: &str, kind: &str, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let kind = if kind.is_empty() { String::new() } else { format!("content-type: {kind}\r\n") };
    let length = body.len();
    let mut bytes = format!(
        "HTTP/1.1 {status}\r\n{}content-length: {length}\r\n{kind}vary: Origin\r\n{headers}\r\n",
        uvicorn()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// The first two header lines of every uvicorn answer.
fn uvicorn() -> &'static str {
    "date: Sat, 21 Nov 2026 09:10:10 GMT\r\nserver: uvicorn\r\n"
}

/// A 200 with JSON.
pub(crate) fn json_answer(body: impl AsRef<[u8]>) -> Vec<u8> {
    answer("200 OK", "application/json", "", body)
}

/// The head of a streamed answer as vLLM's Python front end sends it.
pub(crate) fn sse_head() -> String {
    format!(
        "HTTP/1.1 200 OK\r\n{}content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\ntransfer-encoding: chunked\r\n\r\n",
        uvicorn()
    )
}

/// A chunk, size in lower-case hexadecimal.
pub(crate) fn chunk(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    let mut bytes = format!("{:x}\r\n", data.len()).into_bytes();
    bytes.extend_from_slice(data);
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// One event of a streamed chat completion, as a chunk of its own.
pub(crate) fn sse_event(piece: &str) -> Vec<u8> {
    let event = json!({"id":"chatcmpl-1","object":"chat.completion.chunk","created":1_795_252_211,"model":"m",
        "choices":[{"index":0,"delta":{"content":piece},"logprobs":null,"finish_reason":null}]});
    chunk(format!("data: {event}\n\n"))
}

/// The end of a streamed chat completion.
pub(crate) fn sse_end() -> Vec<u8> {
    let mut bytes = chunk("data: [DONE]\n\n");
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// One request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Which connection it came on, counted from 0 per worker.
    pub(crate) connection: usize,
    /// Which request on that connection, from 0.
    pub(crate) nth: usize,
    /// The bytes of the head, its empty line included.
    pub(crate) head: Vec<u8>,
    pub(crate) method: String,
    /// The target as it stood in the request line.
    pub(crate) target: String,
    pub(crate) headers: Headers,
    /// The body without its framing, as far as it has come.
    pub(crate) body: Vec<u8>,
    /// The body as it stood on the wire.
    pub(crate) raw_body: Vec<u8>,
    pub(crate) chunks: Vec<usize>,
    pub(crate) trailers: Vec<String>,
    /// Whether head and body were there to their end.
    pub(crate) complete: bool,
    /// When the peer was seen to have gone before the answer was out.
    pub(crate) gone: Option<Instant>,
    /// Whether the whole script was played.
    pub(crate) answered: bool,
}

impl Request {
    /// The path of the target.
    pub(crate) fn path(&self) -> &str {
        self.target.split_once('?').map_or(&self.target[..], |(path, _)| path)
    }

    /// The only value of a header.
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name)
    }

    /// The body as JSON, `null` if it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// What every vLLM answers by itself and the proxy's control thread asks.
    fn is_probe(&self) -> bool {
        self.method == "GET"
            && matches!(self.path(), "/health" | "/v1/models" | "/version" | "/load" | "/metrics")
    }
}

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

    /// Starts to listen.
    pub(crate) fn start(mut self) -> Worker {
        if self.changeable.cards.is_empty() {
            self = self.model("m");
        }
        let listener = TcpListener::bind((own_ip(), 0)).expect("cannot bind a loopback address");
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

    /// How often `GET path` was asked.
    pub(crate) fn probes(&self, path: &str) -> usize {
        self.all_requests()
            .iter()
            .filter(|request| request.is_probe() && request.path() == path && request.answered)
            .count()
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

/// How a connection goes on.
enum Next {
    Keep,
    End,
}

/// One connection, on its own thread.
struct Talk {
    shared: Arc<Shared>,
    stream: TcpStream,
    id: usize,
    buffer: Vec<u8>,
}

impl Talk {
    fn run(mut self) {
        self.stream.set_nodelay(true).unwrap_or_default();
        self.stream.set_write_timeout(Some(LOOK)).unwrap_or_default();
        let mut nth = 0;
        loop {
            let Some(end) = self.read_head() else { return };
            lock(&self.shared.connections)[self.id].idle = false;
            let head: Vec<u8> = self.buffer.drain(..end).collect();
            let (request, body) = match self.judge(&head, nth) {
                Ok(judged) => judged,
                Err(why) => {
                    let seen = format!("{why} in {}", head.escape_ascii());
                    lock(&self.shared.malformed).push(seen);
                    let text = "Invalid HTTP request received.";
                    let bytes =
                        answer("400 Bad Request", "text/plain; charset=utf-8", "connection: close\r\n", text);
                    self.stream.write_all(&bytes).unwrap_or_default();
                    return;
                }
            };
            if !request.is_probe() {
                lock(&self.shared.connections)[self.id].used = true;
            }
            let Next::Keep = self.exchange(request, body) else { return };
            nth += 1;
            lock(&self.shared.connections)[self.id].idle = true;
        }
    }

    /// The length of the next head; `None` when the connection is over.
    fn read_head(&mut self) -> Option<usize> {
        loop {
            if let Some(end) = head::head_end(&self.buffer) {
                return Some(end);
            }
            if self.fill().is_err() {
                return None;
            }
        }
    }

    /// Reads some bytes; an error stands for any end of the connection.
    fn fill(&mut self) -> Result<(), ()> {
        let mut piece = [0; 65536];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(()),
                Ok(count) => {
                    self.buffer.extend_from_slice(&piece[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(()),
            }
        }
    }

    /// Reads the request in `head` as strictly as the strictest server would.
    fn judge(&self, head: &[u8], nth: usize) -> Result<(Request, Body), String> {
        let (start, headers) = head::parse(head)?;
        let words: Vec<&str> = start.split(' ').collect();
        let [method, target, "HTTP/1.1"] = words[..] else { return Err(format!("request line {start:?}")) };
        if method.is_empty() || !target.starts_with('/') && target != "*" {
            return Err(format!("request line {start:?}"));
        }
        if headers.all("host").len() != 1 {
            return Err(format!("{} Hosts", headers.all("host").len()));
        }
        if headers.0.iter().any(|(_, value)| value.starts_with(b" ") || value.ends_with(b" ")) {
            return Err("a value is not trimmed".to_owned());
        }
        hop_by_hop(&headers)?;
        let framing = match head::declared(&headers)? {
            Framing::UntilClose => Framing::None,
            declared => declared,
        };
        let body = Body::new(framing);
        let request = Request {
            connection: self.id,
            nth,
            head: head.to_vec(),
            method: method.to_owned(),
            target: target.to_owned(),
            headers,
            body: Vec::new(),
            raw_body: Vec::new(),
            chunks: Vec::new(),
            trailers: Vec::new(),
            complete: body.complete,
            gone: None,
            answered: false,
        };
        Ok((request, body))
    }

    /// From a head to the end of the script.
    fn exchange(&mut self, mut request: Request, mut body: Body) -> Next {
        let at = {
            let mut requests = lock(&self.shared.requests);
            requests.push(request.clone());
            requests.len() - 1
        };
        let early = matches!(self.shared.route(&request), Some(Route::Fixed(script)) if script.early);
        if !early && !self.read_body(at, &mut request, &mut body) {
            return Next::End;
        }
        let mut steps = self.shared.script(&request).steps;
        if let Some(gate) = &self.shared.hold
            && !request.is_probe()
        {
            steps.insert(0, Step::Wait(gate.clone()));
        }
        for step in steps {
            let gone = match step {
                Step::ReadBody => {
                    if !self.read_body(at, &mut request, &mut body) {
                        return Next::End;
                    }
                    false
                }
                Step::Send(bytes) => !self.send(&bytes),
                Step::SendBytewise(bytes) => {
                    self.stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap_or_default();
                    bytewise(&mut self.stream, &bytes).is_err()
                }
                Step::Wait(gate) => !self.wait(&gate),
                Step::Flood(total) => !self.flood(total),
                Step::Tunnel => {
                    self.tunnel(at);
                    return Next::End;
                }
                Step::Close => {
                    self.note(at, |request| request.answered = true);
                    self.stream.shutdown(Shutdown::Both).unwrap_or_default();
                    return Next::End;
                }
                Step::Reset => {
                    self.note(at, |request| request.answered = true);
                    SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap_or_default();
                    // closing resets only when no other descriptor is left
                    lock(&self.shared.connections)[self.id].stream = None;
                    return Next::End;
                }
            };
            if gone {
                self.note(at, |request| request.gone = Some(Instant::now()));
                self.stream.shutdown(Shutdown::Both).unwrap_or_default();
                return Next::End;
            }
        }
        self.note(at, |request| request.answered = true);
        if self.read_body(at, &mut request, &mut body) { Next::Keep } else { Next::End }
    }

    /// Changes what is remembered of the request; nothing if the test has made the worker forget.
    fn note(&self, at: usize, change: impl FnOnce(&mut Request)) {
        if let Some(request) = lock(&self.shared.requests).get_mut(at)
            && request.connection == self.id
        {
            change(request);
        }
    }

    /// Reads the body to its end, remembering every piece; false if it does not get there.
    fn read_body(&mut self, at: usize, request: &mut Request, body: &mut Body) -> bool {
        if !body.complete && !request.headers.all("expect").is_empty() {
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        loop {
            if let Err(why) = body.take(&mut self.buffer) {
                let seen = format!("{why} in the body after {}", request.head.escape_ascii());
                lock(&self.shared.malformed).push(seen);
                return false;
            }
            request.complete = body.complete;
            request.body.clone_from(&body.decoded);
            self.note(at, |noted| {
                noted.complete = body.complete;
                if body.complete {
                    noted.body.clone_from(&body.decoded);
                    noted.raw_body.clone_from(&body.raw);
                    noted.chunks.clone_from(&body.chunks);
                    noted.trailers.clone_from(&body.trailers);
                } else {
                    let known = noted.body.len();
                    noted.body.extend_from_slice(&body.decoded[known..]);
                }
            });
            if body.complete {
                return true;
            }
            if self.fill().is_err() {
                self.note(at, |noted| noted.gone = Some(Instant::now()));
                return false;
            }
        }
    }

    /// False if the peer went first.
    fn send(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.shared.stopping.load(Ordering::Relaxed) {
                return false;
            }
            match self.stream.write(rest) {
                Ok(count) => {
                    self.shared.sent_bytes.fetch_add(count as u64, Ordering::Relaxed);
                    rest = &rest[count..];
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(_) => return false,
            }
        }
        true
    }

    fn flood(&mut self, total: u64) -> bool {
        let piece = vec![b'x'; 65536];
        let mut left = total;
        while left > 0 {
            let now = left.min(piece.len() as u64);
            if !self.send(&piece[..now as usize]) {
                return false;
            }
            left -= now;
        }
        true
    }

    /// False if the peer went first.
    fn wait(&mut self, gate: &Gate) -> bool {
        lock(&gate.0.0).1 += 1;
        let mut open = false;
        while !open && !self.peer_gone() && !self.shared.stopping.load(Ordering::Relaxed) {
            open = gate.wait(LOOK);
        }
        lock(&gate.0.0).1 -= 1;
        open
    }

    fn peer_gone(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap_or_default();
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).unwrap_or_default();
        match peeked {
            Ok(count) => count == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Echoes; what came is remembered as the request's body.
    fn tunnel(&mut self, at: usize) {
        loop {
            let bytes = std::mem::take(&mut self.buffer);
            self.note(at, |request| request.body.extend_from_slice(&bytes));
            if !self.send(&bytes) || self.fill().is_err() {
                break;
            }
        }
        self.note(at, |request| request.gone = Some(Instant::now()));
    }
}

impl Connection {
    fn end(&self) {
        if let Some(stream) = &self.stream {
            stream.shutdown(Shutdown::Both).unwrap_or_default();
        }
    }
}

/// A connection's own headers must not get past a proxy, WebSocket upgrades excepted.
fn hop_by_hop(headers: &Headers) -> Result<(), String> {
    let upgrade = headers.all("upgrade").iter().any(|value| value.eq_ignore_ascii_case("websocket"));
    for (name, value) in &headers.0 {
        let value = String::from_utf8_lossy(value).to_lowercase();
        let passed = match &name.to_lowercase()[..] {
            "connection" => !(upgrade && value == "upgrade" || value == "keep-alive"),
            "upgrade" => !upgrade,
            "keep-alive" | "te" | "proxy-connection" | "proxy-authorization" | "proxy-authenticate" => true,
            _ => false,
        };
        if passed {
            return Err(format!("hop-by-hop {name}: {value}"));
        }
    }
    Ok(())
}
