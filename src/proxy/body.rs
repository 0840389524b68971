//! The body of a request: as much of it as the route needs, and the rest as it comes.
//!
//! A body with Content-Length is sent on as it was received. A chunked one is decoded: its extensions and
//! trailers must not reach a worker (`faults.md` §2.1), so the framing is ours from here on.

use crate::{
    base::Millis,
    http::{ChunkTracker, RequestFraming, chunk_head},
    net::{Buffer, Elapsed, Parting, Watch, WriteHalf},
    proxy::{
        client::{Client, grow},
        context::{Context, HEADROOM, LARGE_BYTES},
        inbox::{Gone, Inbox},
        retry::Failure,
    },
};

/// Room behind a body, so that a longer model name can be spliced in without moving it.
const TAILROOM: usize = 64;

/// Room that is taken, and counted as held, because a client says that it will send so much; more is taken as it comes. A
/// prompt of 1 MiB is a little longer as JSON, and need not move.
const TRUSTED_BYTES: usize = 2 << 20;

/// Bytes of a chunked body that are read at a time: what follows its end is copied.
const CHUNKED_BYTES: usize = 256 * 1024;

/// A client may be slow for so long before the rate of its body counts, in milliseconds.
const RATE_AFTER_MS: Millis = 30_000;

/// A request's body, decoded.
#[derive(Debug)]
pub(super) enum Body {
    /// All of it.
    Whole(Buffer),
    /// Its beginning; the rest is still with the client.
    Streaming(Box<Streaming>),
}

/// A body that is passed on while it arrives.
#[derive(Debug)]
pub(super) struct Streaming {
    /// What has arrived.
    pub(super) first: Buffer,
    rest: Rest,
    /// Bytes of the body that have arrived.
    received: u64,
    rate: Rate,
}

#[derive(Debug)]
enum Rest {
    /// So many bytes.
    Length(u64),
    /// Until the last chunk.
    Chunked(ChunkTracker),
}

impl Body {
    /// The bytes that have arrived.
    pub(super) fn arrived(&mut self) -> &mut Buffer {
        match self {
            Self::Whole(buffer) => buffer,
            Self::Streaming(streaming) => &mut streaming.first,
        }
    }

    /// Length of the whole body; `None` if only its end will tell.
    pub(super) fn len(&self) -> Option<u64> {
        match self {
            Self::Whole(buffer) => Some(buffer.len() as u64),
            Self::Streaming(streaming) => match streaming.rest {
                Rest::Length(left) => Some(streaming.first.len() as u64 + left),
                Rest::Chunked(_) => None,
            },
        }
    }
}

/// Reads the body whose first bytes are in `buffer`, until its end or until `enough` of it has arrived
/// (asked with what there is). `whole`: the end will be needed, so room for all of it is taken at once.
///
/// # Errors
/// The framing is broken, the body too large or too slow, the client gone.
///
/// # Cancellation
/// What was read is lost: the connection must be closed.
pub(super) async fn read(
    client: &mut Client<'_>,
    buffer: Buffer,
    whole: bool,
    enough: impl FnMut(&[u8]) -> bool,
) -> Result<Body, Failure> {
    let body = read_framed(client, buffer, whole, enough).await?;
    if matches!(body, Body::Whole(_)) {
        client.inbox.watch();
    }
    Ok(body)
}

async fn read_framed(
    client: &mut Client<'_>,
    mut buffer: Buffer,
    whole: bool,
    mut enough: impl FnMut(&[u8]) -> bool,
) -> Result<Body, Failure> {
    let limit = client.cx.settings.max_body_bytes;
    let too_large = Failure::BodyTooLarge { limit };
    let mut rate = Rate::default();
    match client.request.framing() {
        RequestFraming::Length(0) => {
            client.inbox.put_back(buffer.filled());
            buffer.truncate(0);
            Ok(Body::Whole(buffer))
        }
        RequestFraming::Length(length) => {
            if length > limit {
                return Err(too_large);
            }
            let length = usize::try_from(length).map_err(|_| too_large)?;
            if buffer.len() >= length {
                client.inbox.put_back(&buffer.filled()[length..]);
                buffer.truncate(length);
                client.go_on().await?;
                return Ok(Body::Whole(buffer));
            }
            let most = if whole { TRUSTED_BYTES } else { LARGE_BYTES };
            let room = length.min(buffer.len().max(most));
            if buffer.len() + buffer.spare() < room {
                client.hold(room)?;
                let mut larger = Buffer::new(HEADROOM + client.received_head, room + TAILROOM);
                larger.append(buffer.filled());
                client.cx.buffers.recycle(std::mem::replace(&mut buffer, larger));
            }
            client.go_on().await?;
            loop {
                let left = length - buffer.len();
                if left == 0 {
                    return Ok(Body::Whole(buffer));
                }
                if enough(buffer.filled()) {
                    let received = buffer.len() as u64;
                    let rest = Rest::Length(left as u64);
                    let streaming = Streaming { first: buffer, rest, received, rate };
                    return Ok(Body::Streaming(Box::new(streaming)));
                }
                buffer.limit_spare(left);
                if buffer.spare() == 0 {
                    client.hold(length.min(buffer.len() * 2))?;
                    buffer = grow(buffer, length + TAILROOM);
                    buffer.limit_spare(left);
                }
                buffer = more(client.cx, client.inbox, &client.outlet.watch, buffer, &mut rate).await?;
            }
        }
        RequestFraming::Chunked => {
            client.go_on().await?;
            let mut tracker = ChunkTracker::default();
            let mut decoded = 0;
            loop {
                let done = decode(&mut tracker, client.inbox, &mut buffer, &mut decoded)?;
                if decoded as u64 > limit {
                    return Err(too_large);
                }
                if done {
                    return Ok(Body::Whole(buffer));
                }
                if decoded > 0 && enough(buffer.filled()) {
                    let received = decoded as u64;
                    let rest = Rest::Chunked(tracker);
                    let streaming = Streaming { first: buffer, rest, received, rate };
                    return Ok(Body::Streaming(Box::new(streaming)));
                }
                buffer.limit_spare(CHUNKED_BYTES);
                if buffer.spare() == 0 {
                    client.hold(buffer.len() * 2)?;
                    let most = usize::try_from(limit).unwrap_or(usize::MAX).saturating_add(LARGE_BYTES);
                    buffer = grow(buffer, most);
                    buffer.limit_spare(CHUNKED_BYTES);
                }
                buffer = more(client.cx, client.inbox, &client.outlet.watch, buffer, &mut rate).await?;
            }
        }
    }
}

/// Decodes what stands in `buffer` behind its first `decoded` bytes; true at the end of the body, and what
/// follows it is put back.
fn decode(
    tracker: &mut ChunkTracker,
    inbox: &Inbox,
    buffer: &mut Buffer,
    decoded: &mut usize,
) -> Result<bool, Failure> {
    let fresh = &mut buffer.filled_mut()[*decoded..];
    let result = tracker.decode(fresh).map_err(|_| Failure::RequestBody)?;
    if result.done {
        inbox.put_back(&fresh[result.consumed..]);
    }
    *decoded += result.data;
    buffer.truncate(*decoded);
    Ok(result.done)
}

/// How fast a client sends a body: only the time in which it was waited for counts.
#[derive(Debug, Default)]
struct Rate {
    waited_ms: Millis,
    bytes: u64,
}

impl Rate {
    /// Whether `bytes` more in `waited_ms` more are too few for `least` bytes a second in the mean. The first
    /// [`RATE_AFTER_MS`] are everybody's.
    fn is_too_low(&mut self, waited_ms: Millis, bytes: usize, least: u64) -> bool {
        self.waited_ms = self.waited_ms.saturating_add(waited_ms);
        self.bytes = self.bytes.saturating_add(bytes as u64);
        self.waited_ms > RATE_AFTER_MS
            && self.bytes.saturating_mul(1000) < least.saturating_mul(self.waited_ms)
    }
}

async fn more(
    cx: &Context,
    inbox: &Inbox,
    watch: &Watch,
    buffer: Buffer,
    rate: &mut Rate,
) -> Result<Buffer, Failure> {
    let limit = cx.settings.body_timeout_secs.saturating_mul(1000);
    let (began, len) = (cx.clock.now(), buffer.len());
    match watch.limit(limit, inbox.more(buffer)).await {
        Ok(Ok(buffer)) => {
            let waited = cx.clock.now().saturating_sub(began);
            match rate.is_too_low(waited, buffer.len() - len, cx.settings.body_min_rate_bytes) {
                true => Err(Failure::Late),
                false => Ok(buffer),
            }
        }
        Ok(Err(Gone)) => Err(Failure::ClientGone),
        Err(_) => Err(Failure::Late),
    }
}

impl Client<'_> {
    /// Tells a client that waits for it to send the body (RFC 9110 §10.1.1): it is about to be read.
    async fn go_on(&mut self) -> Result<(), Failure> {
        if !self.request.expects_continue() {
            return Ok(());
        }
        let go_on = Buffer::from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        let sent = Box::pin(self.outlet.send(go_on)).await;
        self.outlet.watch.set_parting(Parting::Unanswered);
        match sent {
            Ok(_) => Ok(()),
            Err(Gone) => Err(Failure::ClientGone),
        }
    }
}

/// How sending a request ended.
#[derive(Debug)]
pub(super) enum Sent {
    /// All of it is on its way; the body is kept for another attempt, if it was whole.
    Complete(Option<Buffer>),
    /// The worker's connection broke; what can be kept is kept.
    Broken(Option<Buffer>),
    /// The client did not send a legal body to its end; the attempt must not be completed.
    ClientFault(Failure),
    /// The worker has read nothing for `--worker-write-timeout-secs`, or the request's time is over.
    Unread,
}

/// How a body is sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sending {
    /// In chunks of our own.
    pub(super) chunked: bool,
    /// It is kept for another attempt.
    pub(super) keep: bool,
}

/// Sends `head` and `body`, head and what is there of the body in one write where the headroom allows. What is not
/// to be kept for another attempt is let go as soon as it is sent.
///
/// # Cancellation
/// Part of it may have been sent: the worker's connection must be closed.
pub(super) async fn send(
    cx: &Context,
    inbox: &Inbox,
    watch: &Watch,
    writer: &mut WriteHalf,
    head: &[u8],
    body: Body,
    Sending { chunked, keep }: Sending,
) -> Sent {
    match body {
        Body::Whole(buffer) => {
            let len = buffer.len();
            let written = write_with_head(cx, watch, writer, head, buffer).await;
            let Ok((result, mut buffer)) = written else { return Sent::Unread };
            if !keep {
                cx.buffers.recycle(buffer);
                return if result.is_ok() { Sent::Complete(None) } else { Sent::Broken(None) };
            }
            buffer.advance(buffer.len() - len);
            match result {
                Ok(()) => Sent::Complete(Some(buffer)),
                Err(_) => Sent::Broken(Some(buffer)),
            }
        }
        Body::Streaming(streaming) => {
            // rare and large: the many exchanges without it should not carry its state
            Box::pin(stream(cx, inbox, watch, writer, head, *streaming, chunked)).await
        }
    }
}

async fn write_with_head(
    cx: &Context,
    watch: &Watch,
    writer: &mut WriteHalf,
    head: &[u8],
    mut body: Buffer,
) -> Result<(std::io::Result<()>, Buffer), Elapsed> {
    if !body.prepend(head) {
        let (result, _) = write(cx, watch, writer, Buffer::from_slice(head)).await?;
        if result.is_err() {
            return Ok((result, body));
        }
    }
    write(cx, watch, writer, body).await
}

/// Writes all of `buffer` to a worker.
fn write<'a>(
    cx: &Context,
    watch: &'a Watch,
    writer: &'a mut WriteHalf,
    buffer: Buffer,
) -> impl Future<Output = Result<(std::io::Result<()>, Buffer), Elapsed>> + use<'a> {
    let limit = cx.settings.worker_write_timeout_secs.saturating_mul(1000);
    writer.write_all_within(buffer, watch, limit)
}

async fn stream(
    cx: &Context,
    inbox: &Inbox,
    watch: &Watch,
    writer: &mut WriteHalf,
    head: &[u8],
    streaming: Streaming,
    chunked: bool,
) -> Sent {
    let Streaming { mut first, mut rest, mut received, mut rate } = streaming;
    let mut framed = Vec::with_capacity(head.len() + 20);
    framed.extend_from_slice(head);
    // between two chunks stands the line end of the first
    let mut begun = !first.is_empty();
    if chunked {
        push_chunk_head(&mut framed, first.len());
    }
    if first.is_empty() {
        first = Buffer::new(HEADROOM, LARGE_BYTES);
    }
    let written = write_with_head(cx, watch, writer, &framed, first).await;
    let Ok((mut result, mut buffer)) = written else { return Sent::Unread };
    loop {
        if result.is_err() {
            return Sent::Broken(None);
        }
        if buffer.capacity() < HEADROOM + LARGE_BYTES {
            buffer = Buffer::new(HEADROOM, LARGE_BYTES);
        }
        buffer.reset(HEADROOM);
        let done;
        (done, buffer) = match next(cx, inbox, watch, buffer, &mut rest, &mut received, &mut rate).await {
            Ok(next) => next,
            Err(failure) => return Sent::ClientFault(failure),
        };
        if chunked {
            if !buffer.is_empty() {
                framed.clear();
                framed.extend_from_slice(if begun { b"\r\n" } else { b"" });
                push_chunk_head(&mut framed, buffer.len());
                buffer.prepend(&framed);
                begun = true;
            }
            if done {
                buffer.append(if begun { b"\r\n0\r\n\r\n" } else { b"0\r\n\r\n" });
            }
        }
        if !buffer.is_empty() {
            let written = write(cx, watch, writer, buffer).await;
            let Ok(written) = written else { return Sent::Unread };
            (result, buffer) = written;
        }
        if done {
            inbox.watch();
            return if result.is_ok() { Sent::Complete(None) } else { Sent::Broken(None) };
        }
    }
}

fn push_chunk_head(out: &mut Vec<u8>, len: usize) {
    if len > 0 {
        let (bytes, count) = chunk_head(len);
        out.extend_from_slice(&bytes[..count]);
    }
}

/// The next part of the body, and whether it is the last one.
async fn next(
    cx: &Context,
    inbox: &Inbox,
    watch: &Watch,
    mut buffer: Buffer,
    rest: &mut Rest,
    received: &mut u64,
    rate: &mut Rate,
) -> Result<(bool, Buffer), Failure> {
    match rest {
        Rest::Length(0) => Ok((true, buffer)),
        Rest::Length(left) => {
            buffer.limit_spare(usize::try_from(*left).unwrap_or(usize::MAX));
            buffer = more(cx, inbox, watch, buffer, rate).await?;
            *left = left.saturating_sub(buffer.len() as u64);
            Ok((*left == 0, buffer))
        }
        Rest::Chunked(tracker) => {
            // room for the end of our own framing
            buffer.limit_spare(buffer.spare().saturating_sub(16));
            buffer = more(cx, inbox, watch, buffer, rate).await?;
            let mut decoded = 0;
            let done = decode(tracker, inbox, &mut buffer, &mut decoded)?;
            *received += decoded as u64;
            let limit = cx.settings.max_body_bytes;
            if *received > limit {
                return Err(Failure::BodyTooLarge { limit });
            }
            Ok((done, buffer))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c11_a_byte_now_and_then_is_too_slow_and_a_pause_alone_is_not() {
        let mut dripping = Rate::default();
        assert!(!dripping.is_too_low(29_000, 1, 100), "nobody is late within the first half minute");
        assert!(dripping.is_too_low(29_000, 1, 100));
        let mut steady = Rate::default();
        assert!((0..600).all(|_| !steady.is_too_low(1000, 100, 100)), "exactly as fast as it must be");
        let mut pausing = Rate::default();
        assert!(!pausing.is_too_low(0, 1_000_000, 100));
        assert!((0..10).all(|_| !pausing.is_too_low(29_000, 1, 100)), "what came before counts");
        assert!((0..10).all(|_| !Rate::default().is_too_low(Millis::MAX, 0, 0)), "0 is no limit");
    }
}
