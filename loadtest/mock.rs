//! A worker for measurements: one event loop, as a vLLM front end has, that answers at full speed and does
//! nothing else.
//!
//! `mock ADDRESS [EVENTS] [--gap-ms G] [--models a,b]`: a request whose body says `"stream": true` is answered with that
//! many events, each in a chunk and a write of its own, G milliseconds apart; any other with what its path says, 300
//! bytes of JSON in most cases. `max_tokens` and `mock_gap_ms` in the body of a stream replace the two numbers. Each
//! event's id ends with the time at which it was written, in nanoseconds of `CLOCK_MONOTONIC`. Streams that began together
//! are written together, as the steps of an engine make them be.
//!
//! It must not be what is measured: it allocates nothing per request, but once for a stream and for tokens, and of a body
//! it looks at both ends only.
#![expect(clippy::print_stderr, reason = "a tool for the terminal")]

#[path = "load/chunked.rs"]
mod chunked;
#[path = "load/clock.rs"]
mod clock;

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::LazyLock,
    task::{Poll, ready},
    time::Duration,
};

use clap::Parser;
use memchr::memmem::{self, Finder};
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf},
    net::{TcpSocket, TcpStream},
    task::LocalSet,
};

use crate::{chunked::Chunked, clock::now_ns};

/// Bytes that are read at once. There is one such buffer for all connections.
const READ_BYTES: usize = 256 * 1024;
/// Connections that may wait to be accepted: a thousand streams may begin at once.
const BACKLOG: u32 = 4096;
/// The longest head, and the most fields that it may have.
const LONGEST_HEAD: usize = 64 * 1024;
const MOST_FIELDS: usize = 64;
/// How much of a body's begin and end is looked at.
const BEGIN: usize = 2048;
const END: usize = 512;
/// How much of a body that asks for tokens becomes tokens.
const TOKENISED: usize = 256 * 1024;
/// Bytes of a token.
const TOKEN_BYTES: usize = 4;
/// Inputs that have an embedding.
const EMBEDDINGS: usize = 64;

/// Fields of a body that are looked for.
static STREAM: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("\"stream\""));
static MAX_TOKENS: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("\"max_tokens\""));
static GAP_MS: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("\"mock_gap_ms\""));

const HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\n";
const STREAM_HEAD: &str =
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
const LAST_EVENT: &[u8] = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// A worker that answers at full speed.
#[derive(Debug, Parser)]
#[command(name = "mock")]
struct Args {
    #[arg(default_value = "127.0.0.1:0")]
    address: SocketAddr,

    /// Events of a stream of which the request does not say how many
    #[arg(default_value_t = 200)]
    events: u32,

    /// Milliseconds between events of a stream of which the request does not say it
    #[arg(long, default_value_t = 0)]
    gap_ms: u32,

    /// The models it has; answers are those of the first one
    #[arg(long, value_delimiter = ',', default_value = "m")]
    models: Vec<String>,
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    vllm_proxy::base::raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async move {
        let socket = if args.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(args.address)?;
        let listener = socket.listen(BACKLOG)?;
        eprintln!("listening on {}", listener.local_addr()?);
        let worker = Rc::new(Worker::new(&args));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // the client has gone, or there are no files left: some will be closed
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let worker = worker.clone();
            // a client that goes away ends its task
            tokio::task::spawn_local(async move { worker.serve(stream).await.ok() });
        }
    })
}

/// What is answered, made once.
struct Worker {
    health: Vec<u8>,
    version: Vec<u8>,
    models: Vec<u8>,
    metrics: Vec<u8>,
    chat: Vec<u8>,
    embeddings: Vec<u8>,
    transcription: Vec<u8>,
    stream_head: Vec<u8>,
    event: Event,
    events: u32,
    gap_ms: u32,
}

/// An event in its chunk, with places for its time and its number.
#[derive(Clone)]
struct Event {
    chunk: Vec<u8>,
    time_at: usize,
    number_at: usize,
}

impl Event {
    const TIME: &str = "TTTTTTTTTTTTTTTTTTTT";
    const NUMBER: &str = "NNNNN";

    fn new(model: &str) -> Self {
        let (time, number) = (Self::TIME, Self::NUMBER);
        let event = format!(
            "data: {{\"id\":\"chatcmpl-{time}\",\"object\":\"chat.completion.chunk\",\"created\":1763716203,\"model\":\"{model}\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"token {number}\"}},\"finish_reason\":null}}]}}\n\n"
        );
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        let place = |what: &str| chunk.find(what).unwrap_or(0);
        Self { time_at: place(time), number_at: place(number), chunk: chunk.into_bytes() }
    }

    /// The event with this number, written now.
    fn now(&mut self, number: u32) -> &[u8] {
        digits(&mut self.chunk[self.time_at..][..Self::TIME.len()], now_ns());
        digits(&mut self.chunk[self.number_at..][..Self::NUMBER.len()], number.into());
        &self.chunk
    }
}

/// Writes a number with zeros before it.
fn digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

impl Worker {
    fn new(args: &Args) -> Self {
        let model = args.models.first().map_or("m", String::as_str);
        let card = |id: &String| {
            format!(
                r#"{{"id":"{id}","object":"model","created":1763716203,"owned_by":"vllm","root":"{id}","parent":null,"max_model_len":1048576}}"#
            )
        };
        let cards: Vec<String> = args.models.iter().map(card).collect();
        let vector =
            |index| format!(r#"{{"index":{index},"object":"embedding","embedding":[0.125,-0.25,0.5,-1.0]}}"#);
        let vectors: Vec<String> = (0..EMBEDDINGS).map(vector).collect();
        let usage = r#""usage":{"prompt_tokens":250,"completion_tokens":16,"total_tokens":266}"#;
        Self {
            health: answer("application/json", ""),
            version: answer("application/json", r#"{"version":"0.32.0"}"#),
            models: answer(
                "application/json",
                &format!(r#"{{"object":"list","data":[{}]}}"#, cards.join(",")),
            ),
            metrics: answer(
                "text/plain; version=0.0.4; charset=utf-8",
                &format!(
                    "vllm:num_requests_running{{model_name=\"{model}\"}} 0.0\nvllm:num_requests_waiting{{model_name=\"{model}\"}} 0.0\nvllm:kv_cache_usage_perc{{model_name=\"{model}\"}} 0.0\n"
                ),
            ),
            chat: answer(
                "application/json",
                &format!(
                    r#"{{"id":"chatcmpl-1","object":"chat.completion","created":1763716203,"model":"{model}","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"finish_reason":"stop"}}],{usage}}}"#,
                    "x".repeat(60)
                ),
            ),
            embeddings: answer(
                "application/json",
                &format!(
                    r#"{{"id":"embd-1","object":"list","created":1763716203,"model":"{model}","data":[{}],{usage}}}"#,
                    vectors.join(",")
                ),
            ),
            transcription: answer(
                "application/json",
                r#"{"text":"What was said.","usage":{"type":"duration","seconds":1}}"#,
            ),
            stream_head: [HEAD, STREAM_HEAD].concat().into_bytes(),
            event: Event::new(model),
            events: args.events,
            gap_ms: args.gap_ms,
        }
    }

    /// Answers one request after the other.
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut request = Request::default();
        while request.read(&mut stream).await? {
            let answer = match request.wants {
                Wants::Health => &self.health,
                Wants::Version => &self.version,
                Wants::Models => &self.models,
                Wants::Metrics => &self.metrics,
                Wants::Embeddings => &self.embeddings,
                Wants::Transcription => &self.transcription,
                Wants::Tokens => &tokens(&request.begin),
                Wants::Text if request.streams() => {
                    self.stream(&mut stream, &request).await?;
                    continue;
                }
                Wants::Text => &self.chat,
            };
            stream.write_all(request.cut(answer)).await?;
        }
        Ok(())
    }

    /// Event N is due N gaps after the head, so that what is late now does not make all that follow late.
    async fn stream(&self, stream: &mut TcpStream, request: &Request) -> io::Result<()> {
        let events = request.number(&MAX_TOKENS).unwrap_or(self.events);
        let gap_ms = request.number(&GAP_MS).unwrap_or(self.gap_ms);
        let mut event = self.event.clone();
        stream.write_all(&self.stream_head).await?;
        let begin = tokio::time::Instant::now();
        for number in 0..events {
            if gap_ms > 0 && number > 0 {
                tokio::time::sleep_until(begin + Duration::from_millis(gap_ms.into()) * number).await;
            }
            stream.write_all(event.now(number)).await?;
        }
        stream.write_all(LAST_EVENT).await
    }
}

fn answer(content_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{HEAD}content-length: {length}\r\ncontent-type: {content_type}\r\n\r\n{body}").into_bytes()
}

/// Tokens of a body: equal as far as bodies are.
fn tokens(body: &[u8]) -> Vec<u8> {
    let count = body.len() / TOKEN_BYTES;
    let mut all = format!(r#"{{"count":{count},"max_model_len":1048576,"tokens":["#);
    for (at, token) in body.chunks_exact(TOKEN_BYTES).enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let token = token.iter().fold(0, |sum, byte| sum * 257 % 65_521 + u32::from(*byte));
        all += &format!("{comma}{token}");
    }
    all += "]}";
    answer("application/json", &all)
}

/// What a path asks for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Wants {
    Health,
    Version,
    Models,
    Metrics,
    Embeddings,
    Transcription,
    Tokens,
    #[default]
    Text,
}

impl Wants {
    fn of(path: &str) -> Self {
        match path.split('?').next().unwrap_or_default() {
            "/health" | "/ping" => Self::Health,
            "/version" => Self::Version,
            "/v1/models" => Self::Models,
            "/metrics" => Self::Metrics,
            "/v1/embeddings" => Self::Embeddings,
            "/v1/audio/transcriptions" => Self::Transcription,
            "/tokenize" | "/v1/chat/completions/render" | "/v1/completions/render" => Self::Tokens,
            _ => Self::Text,
        }
    }
}

/// What comes next on a connection.
#[derive(Debug, Default)]
enum Part {
    #[default]
    Head,
    /// So many bytes of a body.
    Length(u64),
    Chunked(Chunked),
    /// The request is whole.
    Over,
}

/// A request, read as its bytes come.
#[derive(Debug, Default)]
struct Request {
    part: Part,
    wants: Wants,
    /// Whether only the head is wanted.
    head_only: bool,
    /// Whether the client waits to be told that it may send the body.
    expects: bool,
    /// What came and is not read: a part of a head, or what follows a request.
    left: Vec<u8>,
    /// The body's begin, and the end of the rest.
    begin: Vec<u8>,
    end: Vec<u8>,
}

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

impl Request {
    /// Reads the next request; false if there is none any more.
    async fn read(&mut self, stream: &mut TcpStream) -> io::Result<bool> {
        (self.part, self.expects) = (Part::Head, false);
        self.begin.clear();
        self.end.clear();
        let left = std::mem::take(&mut self.left);
        self.feed(&left)?;
        while !matches!(self.part, Part::Over) {
            if std::mem::take(&mut self.expects) {
                stream.write_all(CONTINUE).await?;
            }
            let bytes = poll_fn(|cx| {
                BUFFER.with_borrow_mut(|buffer| {
                    let mut read = ReadBuf::new(buffer);
                    ready!(Pin::new(&mut *stream).poll_read(cx, &mut read))?;
                    self.feed(read.filled())?;
                    Poll::Ready(io::Result::Ok(read.filled().len()))
                })
            });
            if bytes.await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !matches!(self.part, Part::Head) {
            return self.body(bytes);
        }
        if self.left.is_empty() {
            // nearly always the head is whole, and need not be kept
            return self.head(bytes);
        }
        let mut head = std::mem::take(&mut self.left);
        head.extend_from_slice(bytes);
        self.head(&head)
    }

    fn head(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
        let mut head = httparse::Request::new(&mut fields);
        let length = match head.parse(bytes).map_err(invalid)? {
            httparse::Status::Complete(length) => length,
            httparse::Status::Partial if bytes.len() > LONGEST_HEAD => {
                return Err(invalid("a head too long"));
            }
            httparse::Status::Partial => {
                self.left.extend_from_slice(bytes);
                return Ok(());
            }
        };
        self.wants = Wants::of(head.path.unwrap_or_default());
        self.head_only = head.method == Some("HEAD");
        self.part = Part::Over;
        for field in head.headers.iter() {
            let is = |name: &str| field.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                let length = std::str::from_utf8(field.value).map_err(invalid)?.parse().map_err(invalid)?;
                self.part = if length == 0 { Part::Over } else { Part::Length(length) };
            } else if is("transfer-encoding") {
                self.part = Part::Chunked(Chunked::new());
            } else if is("expect") {
                self.expects = true;
            }
        }
        self.body(&bytes[length..])
    }

    /// Passes over the body; what follows it belongs to the next request.
    fn body(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self { part, begin, end, wants, .. } = self;
        let most = if *wants == Wants::Tokens { TOKENISED } else { BEGIN };
        let mut keep = |piece: &[u8]| {
            begin.extend_from_slice(&piece[..piece.len().min(most - begin.len())]);
            end.drain(..(end.len() + piece.len()).saturating_sub(END).min(end.len()));
            end.extend_from_slice(&piece[piece.len().saturating_sub(END)..]);
        };
        let taken = match part {
            Part::Length(left) => {
                let taken = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                keep(&bytes[..taken]);
                *left -= taken as u64;
                taken
            }
            Part::Chunked(chunked) => chunked.feed(bytes, keep).map_err(invalid)?,
            Part::Head | Part::Over => 0,
        };
        if matches!(part, Part::Length(0)) || matches!(part, Part::Chunked(chunked) if chunked.is_over()) {
            *part = Part::Over;
        }
        self.left.extend_from_slice(&bytes[taken..]);
        Ok(())
    }

    /// What is at the place of a value, if this key is at one of the body's ends.
    fn value(&self, key: &Finder<'_>) -> Option<&[u8]> {
        [&self.begin, &self.end].into_iter().find_map(|part| {
            let behind = part.get(key.find(part)? + key.needle().len()..)?;
            Some(behind.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start())
        })
    }

    fn streams(&self) -> bool {
        self.value(&STREAM).is_some_and(|value| value.starts_with(b"true"))
    }

    fn number(&self, key: &Finder<'_>) -> Option<u32> {
        let value = self.value(key)?;
        let digits = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
    }

    /// What of an answer is sent.
    fn cut<'a>(&self, answer: &'a [u8]) -> &'a [u8] {
        let end = if self.head_only { memmem::find(answer, b"\r\n\r\n") } else { None };
        end.map_or(answer, |end| &answer[..end + 4])
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 53\r\n\r\n{\"mock_gap_ms\" : 7,\"max_tokens\": 12, \"stream\" : true}";
    const CHUNKED: &str =
        "POST /v1/embeddings?x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    const EMPTY: &str = "HEAD /health HTTP/1.1\r\nhost: a\r\n\r\n";

    #[test]
    fn any_split_of_requests_that_follow_each_other_reads_alike() {
        let all = [SMALL, CHUNKED, EMPTY, SMALL].concat();
        for size in 1..=all.len() {
            let (mut request, mut seen) = (Request::default(), Vec::new());
            for part in all.as_bytes().chunks(size) {
                request.feed(part).unwrap();
                while matches!(request.part, Part::Over) {
                    let numbers = (request.number(&MAX_TOKENS), request.number(&GAP_MS));
                    seen.push((request.wants, request.streams(), numbers, request.head_only));
                    let left = std::mem::take(&mut request.left);
                    request = Request::default();
                    request.feed(&left).unwrap();
                }
            }
            let small = (Wants::Text, true, (Some(12), Some(7)), false);
            let chunked = (Wants::Embeddings, false, (None, None), false);
            let empty = (Wants::Health, false, (None, None), true);
            assert_eq!(seen, [small, chunked, empty, small], "{size}");
        }
    }

    #[test]
    fn of_a_large_body_both_ends_are_known_and_no_more_is_kept() {
        let filler = "x".repeat(1 << 20);
        let body = format!(r#"{{"max_tokens":5,"messages":"{filler}","stream":true}}"#);
        let head =
            format!("POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n", body.len());
        for size in [100, 511, 65_536, 2 << 20] {
            let mut request = Request::default();
            for part in [head.as_bytes(), body.as_bytes()].concat().chunks(size) {
                request.feed(part).unwrap();
            }
            assert!(matches!(request.part, Part::Over) && request.expects);
            assert_eq!((request.streams(), request.number(&MAX_TOKENS)), (true, Some(5)));
            assert_eq!((request.begin.len(), request.end.len()), (BEGIN, END));
        }
    }

    #[test]
    fn an_event_has_its_time_and_number_where_the_client_looks_for_them() {
        let mut event = Event::new("m");
        let before = now_ns();
        let text = String::from_utf8(event.now(42).to_vec()).unwrap();
        let (size, rest) = text.split_once("\r\n").unwrap();
        assert_eq!(usize::from_str_radix(size, 16).unwrap(), rest.len() - 2);
        let value: serde_json::Value =
            serde_json::from_str(rest.strip_prefix("data: ").unwrap().trim_end()).unwrap();
        assert_eq!(value["choices"][0]["delta"]["content"], "token 00042");
        let time = value["id"].as_str().unwrap().strip_prefix("chatcmpl-").unwrap();
        assert_eq!(time.len(), 20);
        assert!((before..=now_ns()).contains(&time.parse().unwrap()));
    }

    #[test]
    fn answers_are_json_of_the_length_that_they_say() {
        let worker = Worker::new(&Args::parse_from(["mock", "--models", "a,b"]));
        for answer in
            [&worker.chat, &worker.embeddings, &worker.models, &worker.transcription, &tokens(b"12345678")]
        {
            let text = std::str::from_utf8(answer).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{text}");
            serde_json::from_str::<serde_json::Value>(body).unwrap();
        }
    }

    #[test]
    fn bodies_that_begin_alike_have_tokens_that_do() {
        let read = |body: &[u8]| {
            let text = String::from_utf8(tokens(body)).unwrap();
            let body: serde_json::Value =
                serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
            body["tokens"].as_array().unwrap().clone()
        };
        let (one, other) = (read(b"the same, and a"), read(b"the same, not a"));
        assert_eq!((one.len(), &one[..2]), (3, &other[..2]));
        assert_ne!(one[2], other[2]);
    }
}
