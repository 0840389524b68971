//! One connection of a worker: reading requests strictly, playing scripts, remembering both.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::SockRef;

use super::{
    Route, Shared, lock,
    script::{Gate, Step, answer},
};
use crate::support::{
    client::bytewise,
    head::{self, Body, Framing, Headers},
};

/// How often something that waits looks whether its peer has gone or the test is over.
const LOOK: Duration = Duration::from_millis(2);

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
    pub(super) fn is_probe(&self) -> bool {
        self.method == "GET"
            && matches!(
                self.path(),
                "/health" | "/v1/models" | "/version" | "/load" | "/metrics" | "/is_sleeping" | "/is_paused"
            )
    }
}

/// How a connection goes on.
enum Next {
    Keep,
    End,
}

/// One connection, on its own thread.
pub(super) struct Talk {
    pub(super) shared: Arc<Shared>,
    pub(super) stream: TcpStream,
    pub(super) id: usize,
    pub(super) buffer: Vec<u8>,
}

impl Talk {
    pub(super) fn run(mut self) {
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
                Step::Pause(pause) => {
                    std::thread::sleep(pause);
                    false
                }
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
        gate.arrive(true);
        let mut open = false;
        while !open && !self.peer_gone() && !self.shared.stopping.load(Ordering::Relaxed) {
            open = gate.wait(LOOK);
        }
        gate.arrive(false);
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
