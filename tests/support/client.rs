//! A raw HTTP client: it sends whatever bytes it is told and reads answers strictly.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::SockRef;

use crate::support::{
    head::{self, Body, Framing, Headers},
    patience,
};

/// One connection to the proxy (or to a worker directly).
#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    /// Bytes read and not yet taken.
    pub(crate) buffer: Vec<u8>,
    /// Every byte read so far.
    pub(crate) seen: Vec<u8>,
}

/// One answer, interim ones included.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) version: String,
    pub(crate) status: u16,
    pub(crate) reason: String,
    /// The bytes of the head, its empty line included.
    pub(crate) head: Vec<u8>,
    pub(crate) headers: Headers,
    pub(crate) framing: Framing,
    /// The body without its framing.
    pub(crate) body: Vec<u8>,
    /// The body as it stood on the wire.
    pub(crate) raw_body: Vec<u8>,
    /// Sizes of the chunks of a chunked body.
    pub(crate) chunks: Vec<usize>,
    pub(crate) trailers: Vec<String>,
    /// False if the connection ended before the body did.
    pub(crate) complete: bool,
}

impl Response {
    /// The only value of a header.
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name)
    }

    /// The body as text.
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is not UTF-8")
    }

    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self}"))
    }

    /// What the model said, streamed or not.
    #[track_caller]
    pub(crate) fn completion(&self) -> String {
        if self.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")) {
            return self
                .text()
                .split("\n\n")
                .filter_map(|event| event.strip_prefix("data: "))
                .filter(|data| *data != "[DONE]")
                .map(|data| said(&serde_json::from_str(data).expect("an event is JSON")))
                .collect();
        }
        said(&self.json())
    }

    /// Asserts the status, showing the whole answer if it is another.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self}");
        assert!(self.complete, "cut off: {self}");
        self
    }
}

fn said(json: &Value) -> String {
    let choice = &json["choices"][0];
    [&choice["delta"]["content"], &choice["message"]["content"], &choice["text"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

impl std::fmt::Display for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = &self.raw_body[..self.raw_body.len().min(2000)];
        write!(f, "{}{}", self.head.escape_ascii(), body.escape_ascii())
    }
}

/// How a read ended without bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The peer closed.
    Closed,
    /// The peer reset the connection.
    Reset,
    /// Nothing came in the time given.
    Silence,
}

impl Client {
    /// Connects to `addr`.
    #[track_caller]
    pub(crate) fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&addr, patience()).expect("cannot connect");
        Self::over(stream)
    }

    /// Connects with a receive buffer of about `bytes`, so that not reading is felt soon.
    pub(crate) fn connect_with_small_buffer(addr: SocketAddr, bytes: usize) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(bytes).unwrap();
        socket.connect(&addr.into()).expect("cannot connect");
        Self::over(socket.into())
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_write_timeout(Some(patience())).unwrap();
        Self { stream, buffer: Vec::new(), seen: Vec::new() }
    }

    /// Sends all of `bytes`.
    #[track_caller]
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.stream.write_all(bytes.as_ref()).expect("cannot send");
        self
    }

    /// Sends `bytes` and shrugs if the peer has gone meanwhile: for what is refused before it is read.
    pub(crate) fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Sends until nobody takes anything for a while.
    pub(crate) fn send_until_stalled(&mut self) {
        self.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        while self.try_send(vec![b'x'; 1 << 20]) {}
    }

    /// Sends `bytes` one by one, each its own segment; false if the peer has gone meanwhile.
    pub(crate) fn send_bytewise(&mut self, bytes: &[u8]) -> bool {
        bytewise(&mut self.stream, bytes).is_ok()
    }

    /// No further byte will be sent; answers can still be read.
    pub(crate) fn half_close(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Ends the connection with an RST.
    pub(crate) fn reset(self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap();
    }

    /// One read into the buffer, waiting at most `limit`.
    pub(crate) fn fill(&mut self, limit: Duration) -> Result<usize, End> {
        self.stream.set_read_timeout(Some(limit.max(Duration::from_millis(1)))).unwrap();
        let mut piece = [0; 65536];
        loop {
            return match self.stream.read(&mut piece) {
                Ok(0) => Err(End::Closed),
                Ok(count) => {
                    self.buffer.extend_from_slice(&piece[..count]);
                    self.seen.extend_from_slice(&piece[..count]);
                    Ok(count)
                }
                // a ring that this thread has closed still interrupts it
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    Err(End::Silence)
                }
                Err(_) => Err(End::Reset),
            };
        }
    }

    /// Reads until `bytes` have come, and takes everything up to their end.
    #[track_caller]
    pub(crate) fn read_until(&mut self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        let bytes = bytes.as_ref();
        loop {
            if let Some(at) = self.buffer.windows(bytes.len()).position(|window| window == bytes) {
                return self.buffer.drain(..at + bytes.len()).collect();
            }
            if let Err(end) = self.fill(patience()) {
                let (want, have) = (bytes.escape_ascii(), self.buffer.escape_ascii());
                panic!("{end:?} before {want}; there is {have}");
            }
        }
    }

    /// The next answer, interim ones included, to a request that was no HEAD.
    #[track_caller]
    pub(crate) fn response(&mut self) -> Response {
        self.response_to("GET")
    }

    /// The next answer to a request with `method`.
    #[track_caller]
    pub(crate) fn response_to(&mut self, method: &str) -> Response {
        match self.try_response_to(method, patience()) {
            Ok(response) => response,
            Err((end, have)) => {
                panic!("{end:?} before an answer; there is {:?}", have.escape_ascii().to_string())
            }
        }
    }

    /// The next answer, or how the connection ended before its head was complete and what had come till then.
    #[track_caller]
    pub(crate) fn try_response_to(
        &mut self,
        method: &str,
        limit: Duration,
    ) -> Result<Response, (End, Vec<u8>)> {
        let deadline = Instant::now() + limit;
        let end = loop {
            if let Some(end) = head::head_end(&self.buffer) {
                break end;
            }
            self.fill(deadline.saturating_duration_since(Instant::now()))
                .map_err(|end| (end, self.buffer.clone()))?;
        };
        let head: Vec<u8> = self.buffer.drain(..end).collect();
        let shown = head.escape_ascii().to_string();
        let (start, headers) = head::parse(&head).unwrap_or_else(|why| panic!("{why} in {shown}"));
        let mut words = start.splitn(3, ' ');
        let version = words.next().unwrap_or_default().to_owned();
        assert!(matches!(&version[..], "HTTP/1.1" | "HTTP/1.0"), "version in {shown}");
        let code = words.next().unwrap_or_default();
        assert!(code.len() == 3, "status in {shown}");
        let status: u16 = code.parse().unwrap_or_else(|_| panic!("status in {shown}"));
        let reason = words.next().unwrap_or_default().to_owned();
        let declared = head::declared(&headers).unwrap_or_else(|why| panic!("{why} in {shown}"));
        let bodyless = status < 200 || matches!(status, 204 | 304) || method == "HEAD";
        let framing = if bodyless { Framing::None } else { declared };
        let mut body = Body::new(framing);
        let mut complete = true;
        loop {
            body.take(&mut self.buffer).unwrap_or_else(|why| panic!("{why} after {shown}"));
            if body.complete {
                break;
            }
            match self.fill(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(End::Closed) if framing == Framing::UntilClose => break,
                Err(End::Silence) => panic!("the body stops but the connection stays after {shown}"),
                Err(_) => {
                    complete = false;
                    break;
                }
            }
        }
        let (raw_body, body, chunks, trailers) = (body.raw, body.decoded, body.chunks, body.trailers);
        Ok(Response {
            version,
            status,
            reason,
            head,
            headers,
            framing,
            body,
            raw_body,
            chunks,
            trailers,
            complete,
        })
    }

    /// Waits until the peer has closed, and asserts that it sent nothing more.
    #[track_caller]
    pub(crate) fn expect_closed(&mut self) {
        let end = self.fill(patience());
        assert!(
            self.buffer.is_empty() && matches!(end, Err(End::Closed | End::Reset)),
            "the connection is not closed: {end:?}, {}",
            self.buffer.escape_ascii()
        );
    }

    /// A request and its answer on this connection.
    #[track_caller]
    pub(crate) fn request(&mut self, method: &str, target: &str, headers: &str, body: &[u8]) -> Response {
        self.send(request(method, target, headers, body));
        loop {
            let response = self.response_to(method);
            if response.status >= 200 || response.status == 101 {
                return response;
            }
        }
    }

    /// GET.
    #[track_caller]
    pub(crate) fn get(&mut self, target: &str) -> Response {
        self.request("GET", target, "", b"")
    }

    /// POST of JSON.
    #[track_caller]
    pub(crate) fn post(&mut self, target: &str, json: impl AsRef<[u8]>) -> Response {
        self.request("POST", target, "Content-Type: application/json\r\n", json.as_ref())
    }

    /// A chat completion that is not streamed.
    #[track_caller]
    pub(crate) fn chat(&mut self, model: &str) -> Response {
        self.post("/v1/chat/completions", chat(model))
    }
}

/// The body of a chat completion request for `model`.
pub(crate) fn chat(model: &str) -> String {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"hi"}}]}}"#)
}

/// The body of a streamed chat completion request for `model`.
pub(crate) fn chat_stream(model: &str) -> String {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"hi"}}],"stream":true}}"#)
}

/// The bytes of a request; `headers` are whole lines, Host and Content-Length are added.
pub(crate) fn request(method: &str, target: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = if body.is_empty() && matches!(method, "GET" | "HEAD") {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    let mut bytes =
        format!("{method} {target} HTTP/1.1\r\nHost: proxy.test\r\n{headers}{length}\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// The bytes of a POST of JSON.
pub(crate) fn post(target: &str, json: impl AsRef<[u8]>) -> Vec<u8> {
    request("POST", target, "Content-Type: application/json\r\n", json.as_ref())
}

/// Writes byte by byte. Between two bytes it steps aside, so that the reader may see them apart; a test must
/// not need that it does.
pub(crate) fn bytewise(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    for byte in bytes {
        stream.write_all(std::slice::from_ref(byte))?;
        let until = Instant::now() + Duration::from_micros(20);
        while Instant::now() < until {
            std::thread::yield_now();
        }
    }
    Ok(())
}
