//! The body of an answer, from the worker to the client: each read is sent as it came, at once, out of the
//! buffer that it was read into. Nothing more is read before it is sent, so a client that does not read holds
//! its worker's stream and not our memory.

use crate::{
    http::{ChunkTracker, OutFraming, ResponseFraming, Version, chunk_head},
    net::{Buffer, ReadAhead},
    proxy::{client::Outlet, context::HEADROOM, inbox::Gone, listener::Listener},
};

/// What is done to each part of a body.
#[derive(Debug)]
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
    /// The worker broke off: the client must not take what it has for the whole.
    Broken,
    /// The client is gone.
    ClientGone,
}

/// How an answer's body is framed for a client of `version`, and whether that lets the connection live on.
#[derive(Debug)]
pub(super) struct Plan {
    framer: Framer,
    /// For the head.
    pub(super) framing: OutFraming,
    /// Whether only closing tells the client where the body ends.
    pub(super) closes: bool,
}

impl Plan {
    /// Looks at the part of the body that came with the head, while the client can still be told if it is
    /// broken: `None`.
    pub(super) fn begin(&mut self, buffer: &mut Buffer) -> Option<Step> {
        self.framer.step(buffer)
    }

    pub(super) fn of(framing: ResponseFraming, version: Version) -> Self {
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
        Self { framer, framing, closes }
    }
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
    /// Leaves in `buffer` what is to be sent. `None`: the coding is broken.
    fn step(&mut self, buffer: &mut Buffer) -> Option<Step> {
        let len = buffer.len();
        let (kept, done) = match self {
            Self::Empty => (0, true),
            Self::Counted(left) => {
                let kept = usize::try_from(*left).map_or(len, |left| left.min(len));
                *left -= kept as u64;
                (kept, *left == 0)
            }
            Self::Tracked(tracker) => {
                let tracked = tracker.track(buffer.filled()).ok()?;
                (tracked.consumed, tracked.done)
            }
            Self::Decoded(tracker) => {
                let decoded = tracker.decode(buffer.filled_mut()).ok()?;
                buffer.truncate(decoded.data);
                return Some(Step { done: decoded.done, surplus: decoded.consumed < len });
            }
            Self::Wrapped(begun) => {
                if len > 0 {
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

/// Sends `head` and the body whose first part, `step`, stands in `buffer`.
///
/// # Cancellation
/// Bytes may be lost: both connections must be closed.
pub(super) async fn relay(
    outlet: &mut Outlet<'_>,
    reader: &mut ReadAhead,
    plan: Plan,
    head: &[u8],
    mut step: Step,
    mut buffer: Buffer,
    mut listener: Listener<'_>,
) -> (Relayed, Buffer) {
    let mut framer = plan.framer;
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
        let result;
        (result, buffer) = reader.read(|| buffer).await;
        match result {
            Ok(count) if count > 0 => match framer.step(&mut buffer) {
                Some(next) => {
                    step = next;
                    listener.part(buffer.filled(), step.done);
                }
                None => return (Relayed::Broken, buffer),
            },
            ended => {
                let rest = if ended.is_ok() { framer.end() } else { None };
                let Some(rest) = rest else { return (Relayed::Broken, buffer) };
                if !rest.is_empty() && outlet.send(Buffer::from_slice(rest)).await.is_err() {
                    return (Relayed::ClientGone, buffer);
                }
                return (Relayed::Complete { clean: false }, buffer);
            }
        }
    }
}
