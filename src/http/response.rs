//! A worker's response head: read strictly, written for a client.

use thiserror::Error;

use super::fields::{Fate, FieldError, Fields, Kind};
use super::lines::{Damage, Lines};
use super::{
    MAX_RESPONSE_FIELDS, MAX_RESPONSE_HEAD_BYTES, OutFraming, Version, push_extra, push_field, push_length,
};

/// `HTTP/1.1 200`: the part of a status line before its reason.
const STATUS_BYTES: usize = 12;

/// How the end of a response body is known (RFC 9112 §6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseFraming {
    /// There is no body, whatever the fields say: the answer to a HEAD, 1xx, 204, 304.
    None,
    /// So many bytes.
    Length(u64),
    /// Chunked coding.
    Chunked,
    /// The worker closes the connection after it.
    UntilClose,
}

/// Why a worker's bytes are no answer. All of them end in 502, and in the end of the worker's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ResponseError {
    /// The status line or a field line is not legal, or the version is neither 1.0 nor 1.1.
    #[error("the bytes are no legal HTTP/1.1 response head")]
    Malformed,
    /// Content-Length and Transfer-Encoding contradict each other, are repeated or unknown.
    #[error("the response's framing fields are contradictory or unknown")]
    Framing,
    /// More than [`MAX_RESPONSE_HEAD_BYTES`].
    #[error("the response head is longer than {MAX_RESPONSE_HEAD_BYTES} bytes")]
    HeadTooLarge,
    /// More than [`MAX_RESPONSE_FIELDS`].
    #[error("the response head has more than {MAX_RESPONSE_FIELDS} fields")]
    TooManyFields,
}

impl From<Damage> for ResponseError {
    fn from(_: Damage) -> Self {
        Self::Malformed
    }
}

impl From<FieldError> for ResponseError {
    fn from(error: FieldError) -> Self {
        match error {
            FieldError::Syntax => Self::Malformed,
            FieldError::TooMany => Self::TooManyFields,
            FieldError::Framing => Self::Framing,
        }
    }
}

/// A response head. It belongs to a worker connection and is reused between its exchanges.
#[derive(Debug, Default)]
pub struct ResponseHead {
    lines: Lines,
    /// Where the field lines begin; 0 until the status line was read.
    fields_at: usize,
    /// A verdict was given: the next call begins a new head.
    finished: bool,

    version: Version,
    status: u16,
    /// It answers a HEAD.
    to_head: bool,
    fields: Fields,
}

/// How a response head goes to a client.
#[derive(Debug, Clone, Copy)]
pub struct DownstreamHead<'a> {
    /// The client's version. HTTP/1.0 is never told of chunked coding.
    pub version: Version,
    /// How the end of the body is told. Ignored for 1xx and 204, which have no framing (RFC 9110 §8.6).
    pub framing: OutFraming,
    /// Whether the client's connection stays open.
    pub keep_alive: bool,
    /// Fields of our own, appended as they are; no framing field among them.
    pub extra: &'a [(&'a str, &'a str)],
}

impl ResponseHead {
    /// Reads the head at the start of `input`; `to_head` says that it answers a HEAD request. `None`: it is
    /// not complete, call again with the same bytes and those that follow. `Some(n)`: the first `n` bytes
    /// were the head. An interim answer (1xx) is a head of its own. The contract on growing inputs is that of
    /// [`RequestHead::parse`](super::RequestHead::parse).
    ///
    /// # Errors
    /// [`ResponseError`], as soon as a complete line is illegal, or a byte of an unfinished one.
    pub fn parse(&mut self, input: &[u8], to_head: bool) -> Result<Option<usize>, ResponseError> {
        if self.finished || input.len() < self.lines.scanned() {
            self.reset();
        }
        self.to_head = to_head;
        let verdict = self.advance(input);
        self.finished = verdict != Ok(None);
        verdict
    }

    /// Forgets everything; the next call of [`parse`](Self::parse) begins a new head.
    pub fn reset(&mut self) {
        self.lines = Lines::default();
        self.fields_at = 0;
        self.finished = false;
        self.version = Version::default();
        self.status = 0;
        self.to_head = false;
        self.fields.clear();
    }

    fn advance(&mut self, input: &[u8]) -> Result<Option<usize>, ResponseError> {
        let view = input.get(..MAX_RESPONSE_HEAD_BYTES).unwrap_or(input);
        if !(self.fields_at > 0 || self.read_status_line(view)?)
            || !self.fields.read(&mut self.lines, view, MAX_RESPONSE_FIELDS)?
        {
            let full = view.len() == MAX_RESPONSE_HEAD_BYTES;
            return if full { Err(ResponseError::HeadTooLarge) } else { Ok(None) };
        }
        // RFC 9112 §6.1, as for requests.
        if self.fields.summary.chunked && self.version == Version::Http10 {
            return Err(ResponseError::Framing);
        }
        Ok(Some(self.lines.start()))
    }

    /// Reads the status line, if all of it is there.
    fn read_status_line(&mut self, view: &[u8]) -> Result<bool, ResponseError> {
        let Some(line) = self.lines.next(view)? else {
            // What begins otherwise is no HTTP; the rest of its line may never come.
            let begins = view.iter().zip(b"HTTP/1.").all(|(byte, good)| byte == good);
            return if begins { Ok(false) } else { Err(ResponseError::Malformed) };
        };
        self.take_status_line(view.get(line).unwrap_or_default())?;
        self.fields_at = self.lines.start();
        Ok(true)
    }

    /// Takes `HTTP/1.x SP 3DIGIT [ SP reason ]` apart. The reason may be missing with its space, which many
    /// servers do and all clients accept.
    fn take_status_line(&mut self, line: &[u8]) -> Result<(), ResponseError> {
        let (start, reason) = line.split_at_checked(STATUS_BYTES).ok_or(ResponseError::Malformed)?;
        let &[b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor, b' ', hundreds, tens, ones] = start else {
            return Err(ResponseError::Malformed);
        };
        self.version = match minor {
            b'0' => Version::Http10,
            b'1' => Version::Http11,
            _ => return Err(ResponseError::Malformed),
        };
        let digits = [hundreds, tens, ones];
        if !digits.iter().all(u8::is_ascii_digit) || hundreds == b'0' {
            return Err(ResponseError::Malformed);
        }
        self.status = digits.iter().fold(0, |status, digit| status * 10 + u16::from(digit - b'0'));
        if !matches!(reason.first(), None | Some(b' ')) {
            return Err(ResponseError::Malformed);
        }
        Ok(())
    }

    /// The status code, 100 to 999.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The worker's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How the end of the body is known. After a 101 there is no body; what follows is the other protocol.
    pub fn framing(&self) -> ResponseFraming {
        if self.to_head || self.is_bodiless() || self.status == 304 {
            ResponseFraming::None
        } else if self.fields.summary.chunked {
            ResponseFraming::Chunked
        } else {
            self.fields.summary.length.map_or(ResponseFraming::UntilClose, ResponseFraming::Length)
        }
    }

    /// A status that has neither a body nor a field about one: 1xx, 204.
    fn is_bodiless(&self) -> bool {
        self.status < 200 || self.status == 204
    }

    /// Whether the worker's connection can be used again after this answer.
    pub fn keep_alive(&self) -> bool {
        !self.fields.summary.close
            && (self.version == Version::Http11 || self.fields.summary.keep_alive)
            && self.framing() != ResponseFraming::UntilClose
            && self.status != 101
    }

    /// Whether the body is a stream of server-sent events.
    pub fn is_event_stream(&self) -> bool {
        const EVENT_STREAM: &[u8] = b"text/event-stream";
        self.content_type().and_then(|value| value.split_at_checked(EVENT_STREAM.len())).is_some_and(
            |(essence, parameters)| {
                essence.eq_ignore_ascii_case(EVENT_STREAM)
                    && matches!(parameters.first(), None | Some(b';' | b' ' | b'\t'))
            },
        )
    }

    /// The value of `Content-Type`.
    pub fn content_type(&self) -> Option<&[u8]> {
        self.fields.first(Kind::ContentType)
    }

    /// The protocol that a 101 switches to; `None` for every other status, and for a 101 that does not say
    /// what it switches to in the form of RFC 9110 §7.8.
    pub fn upgrade(&self) -> Option<&str> {
        if self.status != 101 || !self.fields.summary.upgrade || self.fields.summary.upgrades != 1 {
            return None;
        }
        let value = self.fields.first(Kind::Upgrade).filter(|value| !value.is_empty())?;
        std::str::from_utf8(value).ok()
    }

    /// The value of the first end-to-end field of this name, in any case.
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        self.fields.named(name)
    }

    /// Appends the head as it goes to the client: `HTTP/1.1 status reason`, the end-to-end fields in the
    /// worker's order and case, the framing as `head` says, and what the client must know about its own
    /// connection: `connection: close`, or `connection: keep-alive` for HTTP/1.0. An interim answer says
    /// nothing about the connection; a 101 says what it upgrades to.
    pub fn write_downstream(&self, out: &mut Vec<u8>, head: &DownstreamHead<'_>) {
        let extra_bytes: usize = head.extra.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        out.reserve(self.fields.size() + extra_bytes + 96);
        let bare = self.fields_at == STATUS_BYTES + 2;
        let start = if bare || self.version == Version::Http10 {
            // The version is ours, and a space is there also where there is no reason.
            out.extend_from_slice(b"HTTP/1.1 ");
            out.extend_from_slice(self.fields.bytes(STATUS_BYTES - 3..STATUS_BYTES));
            out.push(b' ');
            STATUS_BYTES + usize::from(!bare)..self.fields_at
        } else {
            0..self.fields_at
        };
        let framing = self.framing_for(head);
        let mut framed = false;
        self.fields.write(out, start, |kind, _| match kind {
            Kind::EndToEnd | Kind::ContentType | Kind::Host | Kind::Expect => Fate::Kept,
            Kind::ContentLength => match framing {
                OutFraming::Length(length) => {
                    framed = true;
                    Fate::Counted(length)
                }
                _ => Fate::Dropped,
            },
            Kind::TransferEncoding if framing == OutFraming::Chunked => {
                framed = true;
                Fate::Valued(b"chunked")
            }
            Kind::Trailer if framing == OutFraming::Chunked => Fate::Kept,
            Kind::Upgrade if self.upgrade().is_some() => Fate::KeptBehind("connection", "upgrade"),
            Kind::HopByHop | Kind::Connection | Kind::Upgrade | Kind::TransferEncoding | Kind::Trailer => {
                Fate::Dropped
            }
        });
        push_extra(out, head.extra);
        match framing {
            OutFraming::Length(length) if !framed => push_length(out, b"content-length", length),
            OutFraming::Chunked if !framed => push_field(out, b"transfer-encoding", b"chunked"),
            _ => {}
        }
        if self.status >= 200 {
            if !head.keep_alive {
                push_field(out, b"connection", b"close");
            } else if head.version == Version::Http10 {
                push_field(out, b"connection", b"keep-alive");
            }
        }
        out.extend_from_slice(b"\r\n");
    }

    /// The framing that is written: never [`OutFraming::AsReceived`].
    fn framing_for(&self, head: &DownstreamHead<'_>) -> OutFraming {
        let framing = match head.framing {
            _ if self.is_bodiless() => OutFraming::UntilClose,
            // Also where there is no body: the fields of an answer to HEAD tell what GET would have got.
            OutFraming::AsReceived if self.fields.summary.chunked => OutFraming::Chunked,
            OutFraming::AsReceived => {
                self.fields.summary.length.map_or(OutFraming::UntilClose, OutFraming::Length)
            }
            framing => framing,
        };
        debug_assert!(
            framing != OutFraming::Chunked
                || head.version == Version::Http11
                || self.framing() == ResponseFraming::None,
            "HTTP/1.0 knows no chunked coding"
        );
        match framing {
            OutFraming::Chunked if head.version == Version::Http10 => OutFraming::UntilClose,
            framing => framing,
        }
    }
}
