//! The body of an answer, from the worker to the client: each read is sent as it came, at once, out of the
//! buffer that it was read into. Nothing more is read before it is sent, so a client that does not read holds
//! its worker's stream and not our memory.
//!
//! A stream of events that breaks is ended as vLLM ends its own, with an error event and a clean end of its framing
//! ([`Plan::tell`]); anything else that breaks must look broken.

use std::pin::pin;

use crate::{
    http::{ChunkTracker, EventTail, OutFraming, ResponseFraming, Version, chunk_head},
    net::{Buffer, ReadAhead, Watch, give_way},
    proxy::{
        client::Outlet,
        context::{Context, HEADROOM},
        inbox::Gone,
        listener::Listener,
    },
    telemetry::metrics::Break,
};

/// What keeps a client, and whatever stands between it and us, from taking a silent stream for a dead one: a comment
/// (HTML §9.2.7), as vLLM's own `--sse-keep-alive-interval` sends it.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// A chunk that is open when a stream breaks is filled up to its end if no more than this is missing.
const MOST_FILLED: usize = 64 * 1024;

/// Reads and writes in a row without waiting after which a relay lets others have the shard. With epoll a worker that
/// always has more to send would else keep it for itself; 1 MiB in 32 parts takes less than
/// a millisecond.
const PARTS_IN_A_ROW: u32 = 32;

/// What is done to each part of a body.
#[derive(Debug, Clone, Copy)]
enum Framer {
    /// There is no body.
    Empty,
    /// So many bytes are left.
    Counted(u64),
    /// The worker's chunked coding goes through unchanged, and its end is watched for.
    Tracked(ChunkTracker),
    /// The worker's chunked coding is taken off: the client speaks HTTP/1.0.
    Decoded(ChunkTracker),
    /// The worker ends the body by closing; the client is sent chunks. Whether one was sent.
    Wrapped(bool),
    /// The worker ends the body by closing, and so do we.
    Raw,
}

/// How relaying an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relayed {
    /// Completely; whether the worker's connection is clean and may be used again.
    Complete { clean: bool },
    /// It ended before its end: the client must not take what it has for the whole.
    Broken(Break),
    /// The client is gone.
    ClientGone,
}

/// How an answer's body is framed for a client of one version, and where it stands.
#[derive(Debug)]
pub(super) struct Plan {
    body: Body,
    /// For the head.
    pub(super) framing: OutFraming,
    /// Whether only closing tells the client where the body ends.
    pub(super) closes: bool,
}

/// A body on its way.
#[derive(Debug, Clone, Copy)]
struct Body {
    framer: Framer,
    /// Of a stream of events: how its last one ended.
    tail: Option<EventTail>,
    /// Of a stream that must have events.
    speaks: bool,
}

impl Plan {
    /// For a body that is framed so, of `events` or not, and a client of `version`.
    pub(super) fn of(framing: ResponseFraming, events: bool, version: Version) -> Self {
        let (framer, framing, closes) = match (framing, version) {
            (ResponseFraming::None, _) => (Framer::Empty, OutFraming::AsReceived, false),
            (ResponseFraming::Length(length), _) => (Framer::Counted(length), OutFraming::AsReceived, false),
            (ResponseFraming::Chunked, Version::Http11) => {
                (Framer::Tracked(ChunkTracker::default()), OutFraming::AsReceived, false)
            }
            (ResponseFraming::Chunked, Version::Http10) => {
                (Framer::Decoded(ChunkTracker::default()), OutFraming::UntilClose, true)
            }
            (ResponseFraming::UntilClose, Version::Http11) => {
                (Framer::Wrapped(false), OutFraming::Chunked, false)
            }
            (ResponseFraming::UntilClose, Version::Http10) => (Framer::Raw, OutFraming::UntilClose, true),
        };
        let tail = events.then(EventTail::default);
        Self { body: Body { framer, tail, speaks: false }, framing, closes }
    }

    /// A stream without an event is none: it ends as one that broke.
    pub(super) fn must_speak(&mut self) {
        self.body.speaks = self.body.tail.is_some();
    }

    /// Looks at the part of the body that came with the head, while the client can still be told if it is
    /// broken: `None`.
    pub(super) fn begin(&mut self, buffer: &mut Buffer) -> Option<Step> {
        self.body.step(buffer)
    }

    /// Whether it is a stream of events, which can be told that it broke.
    pub(super) fn is_events(&self) -> bool {
        self.body.tail.is_some()
    }

    /// Whether the client is sent chunks.
    pub(super) fn is_chunked(&self) -> bool {
        matches!(self.body.framer, Framer::Tracked(_) | Framer::Wrapped(_))
    }

    /// Whether the stream itself has said that it failed.
    pub(super) fn is_erred(&self) -> bool {
        self.body.tail.is_some_and(|tail| tail.is_erred())
    }

    /// Ends a stream that broke with `events`, so that the client sees a failure and a clean end. False: that cannot
    /// be done, and the answer must be left without an end.
    ///
    /// # Cancellation
    /// Bytes may be lost: the client's connection must be closed.
    pub(super) async fn tell(&self, outlet: &mut Outlet<'_>, events: &[u8]) -> bool {
        match self.body.last_words(events) {
            Some(words) => outlet.send(Buffer::from_slice(&words)).await.is_ok(),
            None => false,
        }
    }
}

impl Body {
    /// Leaves in `buffer` what is to be sent. `None`: the coding is broken, and the body stands where it did before.
    fn step(&mut self, buffer: &mut Buffer) -> Option<Step> {
        if self.tail.is_none() {
            return self.framer.step(buffer, |_| {});
        }
        let before = *self;
        let tail = &mut self.tail;
        let step = self.framer.step(buffer, |data| {
            if let Some(tail) = tail {
                tail.push(data);
            }
        });
        if step.is_none() {
            *self = before;
        }
        step
    }

    /// Whether it would be wrong to end it here.
    fn is_mute(&self) -> bool {
        self.speaks && self.tail.is_some_and(|tail| tail.is_empty())
    }

    /// What ends a stream of events cleanly, with `events` as its last; without them if its last event has passed.
    fn last_words(&self, events: &[u8]) -> Option<Vec<u8>> {
        let tail = self.tail?;
        let mut text = Vec::with_capacity(events.len() + 2);
        if !tail.is_done() {
            if !tail.is_between_events() {
                // whatever stands there becomes an event of its own
                text.extend_from_slice(b"\n\n");
            }
            text.extend_from_slice(events);
        }
        match &self.framer {
            Framer::Tracked(tracker) => tracker.conclude(&text, b'\n', MOST_FILLED),
            Framer::Wrapped(begun) => {
                let mut words = Vec::with_capacity(text.len() + 32);
                push_chunk(&mut words, &text, *begun);
                words.extend_from_slice(Framer::Wrapped(*begun || !text.is_empty()).end()?);
                Some(words)
            }
            Framer::Decoded(_) | Framer::Raw => Some(text),
            Framer::Empty | Framer::Counted(_) => None,
        }
    }

    /// A comment that may be sent now; `None` within an event or a chunk, and of what is no stream of events.
    fn comment(&mut self) -> Option<Vec<u8>> {
        if !self.tail?.is_between_events() {
            return None;
        }
        let mut comment = Vec::with_capacity(KEEP_ALIVE.len() + 16);
        match &mut self.framer {
            Framer::Tracked(tracker) if tracker.is_between_chunks() => {
                push_chunk(&mut comment, KEEP_ALIVE, false);
                comment.extend_from_slice(b"\r\n");
            }
            Framer::Wrapped(begun) => {
                push_chunk(&mut comment, KEEP_ALIVE, *begun);
                *begun = true;
            }
            Framer::Decoded(_) | Framer::Raw => comment.extend_from_slice(KEEP_ALIVE),
            Framer::Tracked(_) | Framer::Empty | Framer::Counted(_) => return None,
        }
        Some(comment)
    }
}

/// Appends a chunk of `text`, if it is not empty, without the line end behind it; `begun`: with that of the chunk
/// before it.
fn push_chunk(out: &mut Vec<u8>, text: &[u8], begun: bool) {
    if text.is_empty() {
        return;
    }
    if begun {
        out.extend_from_slice(b"\r\n");
    }
    let (head, count) = chunk_head(text.len());
    out.extend_from_slice(head.get(..count).unwrap_or_default());
    out.extend_from_slice(text);
}

/// One part of a body has been looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// The body ends with this part.
    done: bool,
    /// Bytes came behind its end: they belong to nothing.
    surplus: bool,
}

impl Step {
    /// Whether the body has ended, and nothing came behind it.
    pub(super) fn is_clean_end(self) -> bool {
        self.done && !self.surplus
    }
}

impl Framer {
    /// Leaves in `buffer` what is to be sent, and shows the data in it to `seen`. `None`: the coding is broken.
    fn step(&mut self, buffer: &mut Buffer, mut seen: impl FnMut(&[u8])) -> Option<Step> {
        let len = buffer.len();
        let (kept, done) = match self {
            Self::Empty => (0, true),
            Self::Counted(left) => {
                let kept = usize::try_from(*left).map_or(len, |left| left.min(len));
                *left -= kept as u64;
                (kept, *left == 0)
            }
            Self::Tracked(tracker) => {
                let tracked = tracker.track_data(buffer.filled(), seen).ok()?;
                buffer.truncate(tracked.consumed);
                return Some(Step { done: tracked.done, surplus: tracked.consumed < len });
            }
            Self::Decoded(tracker) => {
                let decoded = tracker.decode(buffer.filled_mut()).ok()?;
                buffer.truncate(decoded.data);
                seen(buffer.filled());
                return Some(Step { done: decoded.done, surplus: decoded.consumed < len });
            }
            Self::Wrapped(begun) => {
                if len > 0 {
                    seen(buffer.filled());
                    let (head, count) = chunk_head(len);
                    buffer.prepend(&head[..count]);
                    if *begun {
                        buffer.prepend(b"\r\n");
                    }
                    *begun = true;
                }
                return Some(Step { done: false, surplus: false });
            }
            Self::Raw => (len, false),
        };
        buffer.truncate(kept);
        seen(buffer.filled());
        Some(Step { done, surplus: kept < len })
    }

    /// The worker has closed: what is still to be sent, or `None` if the body is not complete.
    fn end(&self) -> Option<&'static [u8]> {
        match self {
            Self::Empty | Self::Raw => Some(b""),
            Self::Wrapped(true) => Some(b"\r\n0\r\n\r\n"),
            Self::Wrapped(false) => Some(b"0\r\n\r\n"),
            Self::Counted(left) => (*left == 0).then_some(b""),
            Self::Tracked(_) | Self::Decoded(_) => None,
        }
    }
}

/// When a part of an answer must be there.
struct Pace<'a> {
    watch: &'a Watch,
    /// Milliseconds without a byte after which the worker is given up; 0: never.
    idle_ms: u64,
    /// Milliseconds without an event after which the client is sent a comment; 0: never.
    keepalive_ms: u64,
}

impl Pace<'_> {
    /// Why waiting for a part ended without one; `None` if it goes on.
    fn broken(&self, deadline: u64) -> Option<Break> {
        if self.watch.is_total_over() {
            Some(Break::TotalTimeout)
        } else if self.watch.is_ending() {
            Some(Break::Draining)
        } else {
            self.watch.is_over(deadline).then_some(Break::IdleTimeout)
        }
    }
}

/// Counts the parts of a body between which a task never waited.
#[derive(Debug, Default)]
struct InARow {
    /// What [`Watch::waits`] was.
    waits: u32,
    parts: u32,
}

impl InARow {
    /// Counts a part; whether it is time to let others have the shard.
    fn is_enough(&mut self, waits: u32) -> bool {
        if waits != self.waits {
            *self = Self { waits, parts: 0 };
        }
        self.parts += 1;
        if self.parts <= PARTS_IN_A_ROW {
            return false;
        }
        self.parts = 0;
        true
    }
}

/// Sends `head` and the body whose first part, `step`, stands in `buffer`. After [`Relayed::Broken`] the client can
/// still be told by [`Plan::tell`].
///
/// # Cancellation
/// Bytes may be lost: both connections must be closed.
#[expect(clippy::too_many_arguments, reason = "all that meets in a relay, and none of it belongs together")]
pub(super) async fn relay(
    cx: &Context,
    outlet: &mut Outlet<'_>,
    watch: &Watch,
    reader: &mut ReadAhead,
    plan: &mut Plan,
    head: &[u8],
    mut step: Step,
    mut buffer: Buffer,
    mut listener: Listener<'_>,
) -> (Relayed, Buffer) {
    let body = &mut plan.body;
    let pace = Pace {
        watch,
        idle_ms: cx.settings.stream_idle_timeout_secs.saturating_mul(1000),
        keepalive_ms: match body.tail {
            Some(_) => cx.settings.sse_keepalive_secs.saturating_mul(1000),
            None => 0,
        },
    };
    // silence before the first byte of a body is a prompt that is computed
    let mut begun = !buffer.is_empty();
    let mut in_a_row = InARow::default();
    listener.part(buffer.filled(), step.done);
    if !buffer.prepend(head) {
        let Ok(_) = outlet.send(Buffer::from_slice(head)).await else { return (Relayed::ClientGone, buffer) };
    }
    loop {
        if !buffer.is_empty() {
            buffer = match outlet.send(buffer).await {
                Ok(buffer) => buffer,
                Err(Gone) => return (Relayed::ClientGone, Buffer::new(0, 0)),
            };
        }
        if step.done {
            return (Relayed::Complete { clean: !step.surplus }, buffer);
        }
        buffer.reset(HEADROOM);
        if in_a_row.is_enough(watch.waits()) {
            Box::pin(give_way(cx.clock.is_late())).await;
        }
        let deadline = watch.deadline_in(if begun { pace.idle_ms } else { 0 });
        let result;
        (result, buffer) = {
            // the kernel owns the buffer: whatever is sent meanwhile, the read is not given up
            let mut reading = pin!(reader.read(|| buffer));
            loop {
                let quiet = watch.deadline_in(pace.keepalive_ms);
                if let Ok(read) = watch.stream_until(deadline.min(quiet), reading.as_mut()).await {
                    break read;
                }
                if let Some(reason) = pace.broken(deadline) {
                    return (broken(outlet, body, reason).await, Buffer::new(0, 0));
                }
                if let Some(comment) = body.comment()
                    && outlet.send(Buffer::from_slice(&comment)).await.is_err()
                {
                    return (Relayed::ClientGone, Buffer::new(0, 0));
                }
            }
        };
        let before = *body;
        match result {
            Ok(count) if count > 0 => match body.step(&mut buffer) {
                Some(next) if next.done && body.is_mute() => {
                    *body = before;
                    return (broken(outlet, body, Break::Empty).await, buffer);
                }
                Some(next) => {
                    step = next;
                    begun = true;
                    listener.part(buffer.filled(), step.done);
                }
                None => return (broken(outlet, body, Break::BadCoding).await, buffer),
            },
            ended => {
                if ended.is_ok() && body.is_mute() {
                    return (broken(outlet, body, Break::Empty).await, buffer);
                }
                let rest = if ended.is_ok() { body.framer.end() } else { None };
                let Some(rest) = rest else {
                    return (broken(outlet, body, Break::WorkerBroke).await, buffer);
                };
                if !rest.is_empty() && outlet.send(Buffer::from_slice(rest)).await.is_err() {
                    return (Relayed::ClientGone, buffer);
                }
                return (Relayed::Complete { clean: false }, buffer);
            }
        }
    }
}

/// A body ended before its end. A stream whose last event has passed is whole all the same, and only its framing is
/// ended.
async fn broken(outlet: &mut Outlet<'_>, body: &Body, reason: Break) -> Relayed {
    // there is no more time than it takes to say so
    outlet.watch.set_total(0);
    match body.tail {
        Some(tail) if tail.is_done() => {}
        _ => return Relayed::Broken(reason),
    }
    let Some(words) = body.last_words(b"") else { return Relayed::Broken(reason) };
    if words.is_empty() {
        return Relayed::Complete { clean: false };
    }
    match Box::pin(outlet.send(Buffer::from_slice(&words))).await {
        Ok(_) => Relayed::Complete { clean: false },
        Err(Gone) => Relayed::ClientGone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_never_waits_gives_way_now_and_then_and_who_waits_does_not() {
        let mut flooding = InARow::default();
        let ways = (0..1000).filter(|_| flooding.is_enough(7)).count();
        assert_eq!(ways, 1000 / (PARTS_IN_A_ROW as usize + 1));
        let mut waiting = InARow::default();
        assert!((0..1000).all(|part| !waiting.is_enough(part / PARTS_IN_A_ROW)));
    }

    fn body(framing: ResponseFraming, version: Version, parts: &[&str]) -> Body {
        let mut body = Plan::of(framing, true, version).body;
        for part in parts {
            let mut buffer = Buffer::new(64, part.len());
            buffer.append(part.as_bytes());
            assert!(body.step(&mut buffer).is_some());
        }
        body
    }

    fn text(bytes: Option<Vec<u8>>) -> String {
        String::from_utf8(bytes.expect("there is something to say")).unwrap()
    }

    #[test]
    fn last_words_fit_every_framing() {
        use {
            ResponseFraming::{Chunked, Length, UntilClose},
            Version::{Http10, Http11},
        };
        let words = |body: Body| text(body.last_words(b"data: e\n\n"));
        assert_eq!(words(body(Chunked, Http11, &["9\r\ndata: x\n\n\r\n"])), "9\r\ndata: e\n\n\r\n0\r\n\r\n");
        assert_eq!(words(body(Chunked, Http11, &["9\r\ndata: x"])), "\n\n\r\n9\r\ndata: e\n\n\r\n0\r\n\r\n");
        assert_eq!(words(body(Chunked, Http10, &["9\r\ndata: x"])), "\n\ndata: e\n\n");
        assert_eq!(words(body(UntilClose, Http11, &[])), "9\r\ndata: e\n\n\r\n0\r\n\r\n");
        assert_eq!(words(body(UntilClose, Http11, &["data: x\n\n"])), "\r\n9\r\ndata: e\n\n\r\n0\r\n\r\n");
        assert_eq!(words(body(UntilClose, Http10, &["data: x\n"])), "\n\ndata: e\n\n");
        assert_eq!(body(Length(9), Http11, &["dat"]).last_words(b"x"), None);
    }

    #[test]
    fn a_comment_is_sent_between_events_and_chunks_only() {
        use {
            ResponseFraming::{Chunked, UntilClose},
            Version::{Http10, Http11},
        };
        let comment = "e\r\n: keep-alive\n\n";
        assert_eq!(text(body(Chunked, Http11, &[]).comment()), format!("{comment}\r\n"));
        assert_eq!(
            text(body(Chunked, Http11, &["9\r\ndata: x\n\n\r\n"]).comment()),
            format!("{comment}\r\n")
        );
        for torn in ["9\r\ndata: x\n\n", "9\r\ndata: x\n\n\r", "3\r\nx\n\n\r\n5", "1\r\nx\r\n"] {
            assert_eq!(body(Chunked, Http11, &[torn]).comment(), None, "{torn:?}");
        }
        assert_eq!(text(body(Chunked, Http10, &["9\r\ndata: x\n\n"]).comment()), ": keep-alive\n\n");
        assert_eq!(text(body(UntilClose, Http11, &["data: x\n\n"]).comment()), format!("\r\n{comment}"));
        assert_eq!(body(UntilClose, Http11, &["data: x\n"]).comment(), None);
        assert_eq!(Plan::of(Chunked, false, Http11).body.comment(), None);
        // our own framing is right after a comment as well
        let mut wrapped = body(UntilClose, Http11, &[]);
        assert_eq!(text(wrapped.comment()), comment);
        assert_eq!(wrapped.framer.end(), Some(&b"\r\n0\r\n\r\n"[..]));
    }

    #[test]
    fn a_body_stands_before_the_part_whose_coding_broke() {
        let mut body = body(ResponseFraming::Chunked, Version::Http11, &["9\r\ndata: x\n\n\r\n"]);
        let mut bad = Buffer::from_slice(b"3\r\nabc\r\nzz");
        assert!(body.step(&mut bad).is_none());
        assert_eq!(text(body.last_words(b"e")), "1\r\ne\r\n0\r\n\r\n");
    }
}
