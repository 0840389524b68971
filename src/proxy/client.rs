//! One connection of a client, from its first byte to its last.

use std::{fmt::Display, future::poll_fn, pin::pin, rc::Rc, task::Poll};

use crate::{
    admission::Held,
    http::{MAX_HEAD_BYTES, RequestHead, ResponseHead, Version},
    net::{Buffer, Elapsed, Parting, ReadHalf, Watch, WriteHalf, contain, wake_later},
    proxy::{
        context::Context,
        exchange::exchange,
        inbox::{Gone, Inbox, keep_reading},
        respond::{self, Answer},
        retry::Failure,
    },
    telemetry::metrics::{Break, Refusal},
};

/// After an answer that ends the connection, what the client still sends is read and thrown away: closing with unread
/// bytes would reset the connection and destroy the answer on its way (RFC 9112 §9.6), and many clients (Python's
/// `http.client` among them) look for an answer only when all of their request is sent. Until the client pauses for
/// this long, for no longer than [`LINGER_MS`] and no further than [`LINGER_BYTES`].
const LINGER_PAUSE_MS: u64 = 2000;
const LINGER_MS: u64 = 10_000;
const LINGER_BYTES: usize = 64 << 20;

/// Reads from a client in a row without waiting after which others have the shard: a client that uploads or pipelines
/// as fast as it is read would else keep it for itself.
const ARRIVALS_IN_A_ROW: usize = 64;

/// Bytes for heads that a connection keeps between exchanges at most.
const RETAINED_BYTES: usize = 16 * 1024;

/// A request follows the one before if it comes within so many milliseconds, about; for so long its connection keeps the memory
/// of an exchange (5 KB) for the next one. Who asks request after request is not given it anew with each, and of many
/// who ask once and rest none leaves a hole in the heap.
const BRIEFLY_MS: u64 = 200;

/// What becomes of the connection after an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// The next request may come.
    KeepAlive,
    /// It is closed; an answer that is not complete must look so.
    Close,
    /// It is closed after a complete answer, but the client may still be sending.
    Linger,
}

/// A client, as an exchange sees it.
pub(super) struct Client<'a> {
    pub(super) cx: &'a Context,
    pub(super) inbox: &'a Inbox,
    pub(super) request: RequestHead,
    pub(super) outlet: Outlet<'a>,
    /// Bytes of the request's head as it came.
    pub(super) received_head: usize,
    /// The request's head as it goes to a worker.
    pub(super) head: Vec<u8>,
    /// Memory for the request's body.
    pub(super) held: Held<'a>,
}

/// The way to the client, and what is needed to write to it.
pub(super) struct Outlet<'a> {
    cx: &'a Context,
    pub(super) writer: WriteHalf,
    pub(super) watch: Rc<Watch>,
    /// The head of the worker's answer.
    pub(super) answer: ResponseHead,
    /// Where heads are written before they are laid into a buffer.
    pub(super) scratch: Vec<u8>,
}

/// Serves a client until its connection ends. A panic costs this connection only.
pub async fn serve(cx: Rc<Context>, reader: ReadHalf, writer: WriteHalf) {
    let _open = Open::new(&cx);
    if contain(connection(&cx, reader, writer)).await.is_err() {
        cx.metrics().panicked();
        tracing::error!("a connection was lost to a panic");
    }
}

/// Polls the reader and the conversation side by side: they are one task, and whatever the reader finds the
/// conversation sees at once. When the client goes away the conversation is dropped where it stands, and with
/// it the connection to the worker.
async fn connection(cx: &Context, reader: ReadHalf, writer: WriteHalf) {
    let inbox = Inbox::new();
    let watch = cx.watches.watch();
    let mut reading = pin!(keep_reading(reader, &inbox, &cx.buffers, &watch));
    let mut talking = pin!(converse(cx, &inbox, writer, watch.clone()));
    poll_fn(|context| {
        watch.belongs_to(context.waker());
        if watch.is_cut() {
            return Poll::Ready(());
        }
        for _ in 0..ARRIVALS_IN_A_ROW {
            if talking.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            let arrivals = inbox.arrivals();
            if reading.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            if inbox.arrivals() == arrivals {
                return Poll::Pending;
            }
        }
        wake_later(context.waker(), cx.clock.is_late());
        Poll::Pending
    })
    .await;
    cx.metrics().bytes_in(inbox.take_received());
}

async fn converse(cx: &Context, inbox: &Inbox, writer: WriteHalf, watch: Rc<Watch>) {
    let (request, answer, scratch, head) = Default::default();
    let outlet = Outlet { cx, writer, watch, answer, scratch };
    let held = Held::nothing(&cx.body_budget);
    let mut client = Client { cx, inbox, request, outlet, received_head: 0, head, held };
    let idle_ms = cx.settings.keepalive_timeout_secs.saturating_mul(1000);
    let mut rests_ms = idle_ms;
    let mut ended = None;
    while let Some(first) = client.rest(rests_ms).await {
        let follows = ended.is_some_and(|ended| cx.clock.now().saturating_sub(ended) <= BRIEFLY_MS);
        match Box::pin(client.serve(first, follows)).await {
            After::KeepAlive => {}
            After::Close => return,
            After::Linger => return Box::pin(client.linger()).await,
        }
        ended = Some(cx.clock.now());
        let rested_ms = if follows { BRIEFLY_MS } else { 0 };
        rests_ms = if idle_ms == 0 { 0 } else { idle_ms.saturating_sub(rested_ms).max(1) };
    }
}

impl Client<'_> {
    /// Waits for the first bytes of a request for so many milliseconds; 0 is no limit. `None`: nothing has come.
    async fn rest(&self, millis: u64) -> Option<Buffer> {
        self.outlet.watch.idle(millis, self.inbox.next()).await.ok()?.ok()
    }

    /// Serves the request that begins with `first`, and if it `follows` another one also those that follow it. Its state
    /// is large beside that of a connection that rests.
    async fn serve(&mut self, mut first: Buffer, follows: bool) -> After {
        loop {
            let after = match self.read_head(first).await {
                Ok(Some(rest)) => {
                    let total = self.cx.settings.request_timeout_secs.saturating_mul(1000);
                    self.outlet.watch.set_total(total);
                    let after = exchange(self, rest).await;
                    self.outlet.watch.set_total(0);
                    after
                }
                Ok(None) => After::Close,
                Err(failure) => Box::pin(self.refuse(&failure)).await,
            };
            self.cx.metrics().bytes_in(self.inbox.take_received());
            self.shrink();
            if after != After::KeepAlive {
                return after;
            }
            self.outlet.watch.set_parting(Parting::Silent);
            let next = if follows { self.rest(BRIEFLY_MS).await } else { None };
            let Some(next) = next else { return After::KeepAlive };
            first = next;
        }
    }

    /// Reads the head of the next request, of which `buffer` holds the beginning, into `self.request`; what came behind
    /// it is returned. `None`: there is no further request.
    async fn read_head(&mut self, mut buffer: Buffer) -> Result<Option<Buffer>, Failure> {
        let (cx, watch) = (self.cx, self.outlet.watch.clone());
        let deadline = cx.clock.now() + cx.settings.head_timeout_secs.saturating_mul(1000);
        loop {
            if let Some(count) = self.request.parse(buffer.filled())? {
                buffer.advance(count);
                self.received_head = count;
                return Ok(Some(buffer));
            }
            if buffer.spare() == 0 {
                buffer = grow(buffer, MAX_HEAD_BYTES);
            }
            let left = deadline.saturating_sub(cx.clock.now()).max(1);
            // a line end that some clients send behind a body is no request (RFC 9112 §2.2)
            let begun = buffer.filled().iter().any(|byte| !matches!(byte, b'\r' | b'\n'));
            buffer = match watch.limit(left, self.inbox.more(buffer)).await {
                Ok(Ok(buffer)) => buffer,
                Ok(Err(Gone)) => return Ok(None),
                Err(_) if !begun => return Ok(None),
                Err(_) => return Err(Failure::Late),
            };
        }
    }

    /// Gives back what an unusually large head took: the connection may rest for long.
    fn shrink(&mut self) {
        self.request.reset();
        self.outlet.answer.reset();
        self.held.release();
        for bytes in [&mut self.head, &mut self.outlet.scratch] {
            if bytes.capacity() > RETAINED_BYTES {
                *bytes = Vec::new();
            }
        }
    }

    /// How much of a body is read before what does not depend on it goes on.
    pub(super) fn peek_bytes(&self) -> usize {
        usize::try_from(self.cx.settings.body_peek_bytes).unwrap_or(usize::MAX)
    }

    /// Answers a failure, if there is anybody to answer.
    pub(super) async fn refuse(&mut self, failure: &Failure) -> After {
        let Some((answer, reason)) = respond::failure(failure) else { return After::Close };
        // there is no head, or none that means anything
        self.cx.metrics().refused(reason);
        tracing::debug!(reason = reason.label(), why = %failure, "a request was refused");
        self.answer(&answer).await
    }

    /// Counts and tells that the request, whose head is there, gets an error of ours, and why.
    pub(super) fn refused(&self, reason: Refusal, why: &dyn Display) {
        self.cx.metrics().refused(reason);
        let (method, path) = (self.request.method(), self.request.path());
        tracing::debug!(method, path, reason = reason.label(), %why, "a request was refused");
    }

    /// Sends an answer of ours.
    pub(super) async fn answer(&mut self, answer: &Answer) -> After {
        // what is sent because the time is over is sent nevertheless
        self.outlet.watch.set_total(0);
        let keep_alive = !answer.close
            && self.inbox.request_read()
            && self.request.keep_alive()
            && !self.cx.watches.draining();
        let to_http10 = self.request.version() == Version::Http10;
        let mut bytes = std::mem::take(&mut self.outlet.scratch);
        bytes.clear();
        answer.write(&mut bytes, &self.cx.date(), keep_alive, to_http10, self.request.is_head());
        let sent = self.outlet.send(Buffer::from_slice(&bytes)).await;
        self.outlet.scratch = bytes;
        match sent {
            Ok(_) if keep_alive => After::KeepAlive,
            Ok(_) => After::Linger,
            Err(_) => After::Close,
        }
    }

    /// Lets the client read the last answer before the connection is closed.
    async fn linger(&mut self) {
        self.outlet.writer.finish().await;
        let deadline = self.cx.clock.now() + LINGER_MS;
        let mut read = 0;
        while read < LINGER_BYTES {
            let left = deadline.saturating_sub(self.cx.clock.now()).min(LINGER_PAUSE_MS);
            if left == 0 {
                return;
            }
            let into = self.cx.buffers.large();
            let Ok(Ok(buffer)) = self.outlet.watch.limit(left, self.inbox.more(into)).await else { return };
            read += buffer.len();
            self.cx.buffers.recycle(buffer);
        }
    }
}

impl Outlet<'_> {
    /// Sends all that `buffer` holds and gives it back.
    ///
    /// # Errors
    /// The client is gone, or has not read for `--write-timeout-secs`.
    pub(super) async fn send(&mut self, buffer: Buffer) -> Result<Buffer, Gone> {
        let len = buffer.len();
        let limit = self.cx.settings.write_timeout_secs.saturating_mul(1000);
        self.watch.speaks();
        match self.writer.write_all_within(buffer, &self.watch, limit).await {
            Ok((Ok(()), buffer)) => {
                self.cx.metrics().bytes_out(len as u64);
                Ok(buffer)
            }
            Ok((Err(_), _)) => Err(Gone),
            Err(Elapsed) => {
                let total = self.watch.is_total_over();
                self.cx.metrics().broke(if total { Break::TotalTimeout } else { Break::SlowClient });
                Err(Gone)
            }
        }
    }
}

/// The buffer with twice the room, but room for no more than `most` bytes.
pub(super) fn grow(mut buffer: Buffer, most: usize) -> Buffer {
    let len = buffer.len();
    buffer.reserve((len * 2).clamp(4096, most.max(len + 1)) - len);
    buffer
}

/// An open connection, counted until dropped.
struct Open<'a>(&'a Context);

impl<'a> Open<'a> {
    fn new(cx: &'a Context) -> Self {
        cx.connection_opened();
        Self(cx)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.connection_closed();
    }
}
