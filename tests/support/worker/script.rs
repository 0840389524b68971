//! What a worker does on the wire, said beforehand.

use std::{
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use serde_json::json;

use super::lock;

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

    /// One more stands before it (`true`), or one fewer.
    pub(super) fn arrive(&self, arrives: bool) {
        let waiting = &mut lock(&self.0.0).1;
        *waiting = if arrives { *waiting + 1 } else { *waiting - 1 };
    }

    /// Waits `limit` at most; whether it is open.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let guard = lock(&self.0.0);
        self.0.1.wait_timeout_while(guard, limit, |(open, _)| !*open).unwrap().0.0
    }
}

/// What a worker does on the wire for one request.
#[derive(Debug, Clone)]
pub(super) enum Step {
    ReadBody,
    Send(Vec<u8>),
    SendBytewise(Vec<u8>),
    Wait(Gate),
    Pause(Duration),
    Flood(u64),
    Tunnel,
    Close,
    Reset,
}

/// Steps in order. If none of them ends the connection, it is kept for the next request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Script {
    pub(super) steps: Vec<Step>,
    pub(super) early: bool,
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

    /// Sends nothing for so long: for streams that are slow, not for synchronisation.
    pub(crate) fn pause(self, pause: Duration) -> Self {
        self.then(Step::Pause(pause))
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
