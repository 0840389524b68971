//! A client's request head: read strictly, written for a worker.

use memchr::{memchr, memchr2};
use thiserror::Error;

use super::bytes::token_len;
use super::fields::{Fate, FieldError, Fields, Kind, members};
use super::lines::{Damage, Lines};
use super::target::{Target, is_authority, take_apart};
use super::{
    MAX_FIELDS, MAX_HEAD_BYTES, MAX_TARGET_BYTES, OutFraming, RETAINED_BYTES, Version, push_extra,
    push_field, push_length,
};

/// The longest method token, in bytes. The longest registered one has 17.
const MAX_METHOD_BYTES: usize = 64;

/// The longest request line, in bytes: method, target, version, two spaces.
const MAX_REQUEST_LINE_BYTES: usize = MAX_METHOD_BYTES + MAX_TARGET_BYTES + 10;

/// Empty lines before a request line that are forgiven (RFC 9112 §2.2).
const MAX_EMPTY_LINES: u8 = 2;

/// How the end of a request body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestFraming {
    /// So many bytes; 0 when there is no body, which is also what a missing `Content-Length` means.
    Length(u64),
    /// Chunked coding.
    Chunked,
}

/// Why a client's bytes are no request. Each is answered and the connection closed (`faults.md` §1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RequestError {
    /// Not legal HTTP/1.1, or legal in more than one way: 400.
    #[error("the bytes are no legal HTTP/1.1 request head")]
    Malformed,
    /// More than [`MAX_HEAD_BYTES`]: 431.
    #[error("the request head is longer than {MAX_HEAD_BYTES} bytes")]
    HeadTooLarge,
    /// More than [`MAX_FIELDS`]: 431.
    #[error("the request head has more than {MAX_FIELDS} fields")]
    TooManyFields,
    /// More than [`MAX_TARGET_BYTES`]: 414.
    #[error("the request target is longer than {MAX_TARGET_BYTES} bytes")]
    TargetTooLong,
    /// A well-formed version that is neither 1.0 nor 1.1: 505.
    #[error("the request's HTTP version is neither 1.0 nor 1.1")]
    Version,
    /// CONNECT or TRACE, which this proxy never answers: 405.
    #[error("CONNECT and TRACE are not allowed")]
    Method,
}

impl From<Damage> for RequestError {
    fn from(_: Damage) -> Self {
        Self::Malformed
    }
}

impl From<FieldError> for RequestError {
    fn from(error: FieldError) -> Self {
        match error {
            FieldError::Syntax | FieldError::Framing => Self::Malformed,
            FieldError::TooMany => Self::TooManyFields,
        }
    }
}

/// A request head. It belongs to a client connection and is reused between its exchanges.
#[derive(Debug, Default)]
pub struct RequestHead {
    lines: Lines,
    empty_lines: u8,
    /// Where the request line begins.
    line_at: usize,
    /// Where the field lines begin; 0 until the request line was read.
    fields_at: usize,
    /// A verdict was given: the next call begins a new head.
    finished: bool,

    method: String,
    target: String,
    /// The authority of an absolute-form target, else empty.
    authority: String,
    /// The length of the target's path.
    path_bytes: usize,
    version: Version,
    fields: Fields,
    upgrades: bool,
}

/// How a request head goes to a worker.
#[derive(Debug, Clone, Copy)]
pub struct UpstreamHead<'a> {
    /// The worker's path prefix, put before the target; empty, or `/…` without a slash at its end.
    pub prefix: &'a str,
    /// How the end of the body is told. [`OutFraming::UntilClose`] does not exist for requests and is taken
    /// for [`OutFraming::AsReceived`].
    pub framing: OutFraming,
    /// Fields of our own, appended as they are, in place of the client's end-to-end fields of the same names.
    /// They must name no framing field.
    pub extra: &'a [(&'a str, &'a str)],
}

impl RequestHead {
    /// Reads the head at the start of `input`. `None`: it is not complete, call again with the same bytes and
    /// those that follow them. `Some(n)`: the first `n` bytes were the head and the empty lines (at most two)
    /// before it. Nothing borrows `input` afterwards.
    ///
    /// Between two verdicts (`Some` or an error) every `input` must begin with the one before, or
    /// [`reset`](Self::reset) be called: what was looked at is not looked at again, so that a head which
    /// trickles in costs no more than one that comes at once. The verdict does not depend on how the bytes
    /// were split.
    ///
    /// # Errors
    /// [`RequestError`], as soon as a complete line is illegal, or the bytes of an unfinished request line are.
    pub fn parse(&mut self, input: &[u8]) -> Result<Option<usize>, RequestError> {
        if self.finished || input.len() < self.lines.scanned() {
            self.reset();
        }
        let verdict = self.advance(input);
        self.finished = verdict != Ok(None);
        verdict
    }

    /// Forgets everything; the next call of [`parse`](Self::parse) begins a new head.
    pub fn reset(&mut self) {
        self.lines = Lines::default();
        self.empty_lines = 0;
        self.line_at = 0;
        self.fields_at = 0;
        self.finished = false;
        for text in [&mut self.method, &mut self.target, &mut self.authority] {
            text.clear();
            if text.capacity() > RETAINED_BYTES {
                text.shrink_to(RETAINED_BYTES);
            }
        }
        self.path_bytes = 0;
        self.version = Version::default();
        self.fields.clear();
        self.upgrades = false;
    }

    fn advance(&mut self, input: &[u8]) -> Result<Option<usize>, RequestError> {
        let view = input.get(..MAX_HEAD_BYTES).unwrap_or(input);
        if self.fields_at == 0 && !self.read_request_line(view)? {
            return Ok(None);
        }
        if !self.fields.read(&mut self.lines, view, MAX_FIELDS)? {
            return if view.len() == MAX_HEAD_BYTES { Err(RequestError::HeadTooLarge) } else { Ok(None) };
        }
        self.check_fields()?;
        Ok(Some(self.lines.start()))
    }

    /// Reads the request line, if all of it is there.
    fn read_request_line(&mut self, view: &[u8]) -> Result<bool, RequestError> {
        loop {
            let limit = self.lines.start() + MAX_REQUEST_LINE_BYTES + 2;
            let view = view.get(..limit).unwrap_or(view);
            let unseen = self.lines.scanned();
            let line = self.lines.next(view)?;
            let seen = line.as_ref().map_or(self.lines.scanned(), |line| line.end);
            // Other protocols show themselves in their first bytes, so this does not wait for the line's end.
            if !is_printable_ascii(view.get(unseen..seen).unwrap_or_default()) {
                return Err(RequestError::Malformed);
            }
            match line {
                None if view.len() == limit => return Err(RequestError::TargetTooLong),
                None => return Ok(false),
                Some(line) if line.is_empty() && self.empty_lines == MAX_EMPTY_LINES => {
                    return Err(RequestError::Malformed);
                }
                Some(line) if line.is_empty() => self.empty_lines += 1,
                Some(line) => {
                    self.line_at = line.start;
                    self.fields_at = self.lines.start();
                    self.take_request_line(view.get(line).unwrap_or_default())?;
                    return Ok(true);
                }
            }
        }
    }

    /// Takes `method SP target SP version` apart; all of it is printable ASCII.
    fn take_request_line(&mut self, line: &[u8]) -> Result<(), RequestError> {
        let text = std::str::from_utf8(line).map_err(|_| RequestError::Malformed)?;
        let (method, rest) = text.split_at_checked(token_len(line)).ok_or(RequestError::Malformed)?;
        let rest = rest.strip_prefix(' ').ok_or(RequestError::Malformed)?;
        let target_len = memchr(b' ', rest.as_bytes()).ok_or(RequestError::Malformed)?;
        let (target, version) = rest.split_at_checked(target_len).ok_or(RequestError::Malformed)?;
        if method.is_empty() || target.is_empty() {
            return Err(RequestError::Malformed);
        }
        self.version = match version.as_bytes() {
            b" HTTP/1.1" => Version::Http11,
            b" HTTP/1.0" => Version::Http10,
            [b' ', b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0' | b'1', ..] => {
                return Err(RequestError::Malformed);
            }
            _ if names_other_version(line) => return Err(RequestError::Version),
            _ => return Err(RequestError::Malformed),
        };
        if matches!(method, "CONNECT" | "TRACE") {
            return Err(RequestError::Method);
        }
        if method.len() > MAX_METHOD_BYTES {
            return Err(RequestError::Malformed);
        }
        if target.len() > MAX_TARGET_BYTES {
            return Err(RequestError::TargetTooLong);
        }
        self.method.push_str(method);
        match take_apart(method, target).ok_or(RequestError::Malformed)? {
            Target::Origin(target) => self.target.push_str(target),
            Target::Asterisk => self.target.push('*'),
            Target::Absolute { authority, rest } => {
                self.authority.push_str(authority);
                // RFC 9112 §3.2.4: OPTIONS for a whole server ends as `*` at the last proxy.
                if rest.is_empty() && method == "OPTIONS" {
                    self.target.push('*');
                } else {
                    if !rest.starts_with('/') {
                        self.target.push('/');
                    }
                    self.target.push_str(rest);
                }
            }
        }
        let path_end = memchr2(b'?', b'#', self.target.as_bytes());
        self.path_bytes = path_end.unwrap_or(self.target.len());
        Ok(())
    }

    /// What only a request's fields must satisfy, or may ask for.
    fn check_fields(&mut self) -> Result<(), RequestError> {
        let modern = self.version == Version::Http11;
        // RFC 9112 §6.1: Transfer-Encoding in HTTP/1.0 means that somebody between did not understand it.
        if self.fields.summary.chunked && !modern {
            return Err(RequestError::Malformed);
        }
        match self.fields.summary.hosts {
            0 if !modern => {}
            1 => {
                if !self.fields.first(Kind::Host).is_some_and(is_authority) {
                    return Err(RequestError::Malformed);
                }
            }
            _ => return Err(RequestError::Malformed),
        }
        self.fields.summary.expects_continue &= modern;
        // To ignore an Upgrade is always legal. It is kept where it can be tunnelled: one field, no body to
        // bring before the switch, and no version of HTTP, which would hide requests from us.
        self.upgrades = modern
            && self.fields.summary.upgrade
            && self.fields.summary.upgrades == 1
            && self.framing() == RequestFraming::Length(0)
            && self.fields.first(Kind::Upgrade).is_some_and(is_tunnel);
        Ok(())
    }

    /// The method, in the client's spelling: methods are case-sensitive.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// Whether the answer has no body.
    pub fn is_head(&self) -> bool {
        self.method == "HEAD"
    }

    /// `/path?query` or `*`; an absolute-form target was turned into it.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The target up to its query.
    pub fn path(&self) -> &str {
        self.target.get(..self.path_bytes).unwrap_or_default()
    }

    /// What follows `?`, if there is one. A fragment, which no client should send, is no part of it.
    pub fn query(&self) -> Option<&str> {
        let query = self.target.get(self.path_bytes..)?.strip_prefix('?')?;
        Some(query.split_once('#').map_or(query, |(query, _)| query))
    }

    /// The client's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How the end of the body is known.
    pub fn framing(&self) -> RequestFraming {
        if self.fields.summary.chunked {
            RequestFraming::Chunked
        } else {
            RequestFraming::Length(self.fields.summary.length.unwrap_or(0))
        }
    }

    /// Whether the client wants to send another request on this connection (RFC 9112 §9.3).
    pub fn keep_alive(&self) -> bool {
        !self.fields.summary.close && (self.version == Version::Http11 || self.fields.summary.keep_alive)
    }

    /// Whether the client waits for `100 Continue` before it sends the body.
    pub fn expects_continue(&self) -> bool {
        self.fields.summary.expects_continue
    }

    /// The protocol to switch to, such as `websocket`. `None` also where an upgrade is asked for that is
    /// ignored: to any version of HTTP or TLS, in HTTP/1.0, with a body, or not named by `Connection`.
    pub fn upgrade(&self) -> Option<&str> {
        let value = self.upgrades.then(|| self.fields.first(Kind::Upgrade)).flatten()?;
        std::str::from_utf8(value).ok()
    }

    /// The value of `Content-Type`.
    pub fn content_type(&self) -> Option<&[u8]> {
        self.fields.first(Kind::ContentType)
    }

    /// The value of the first end-to-end field of this name, in any case. For a request with an absolute-form
    /// target the Host is that of the target.
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        if !self.authority.is_empty() && name.eq_ignore_ascii_case("host") {
            return Some(self.authority.as_bytes());
        }
        self.fields.named(name)
    }

    /// Appends the head as it goes to a worker: HTTP/1.1, the end-to-end fields in the client's order and
    /// case and with its duplicates, the framing as `head` says. A request that had no Host (HTTP/1.0) gets
    /// an empty one (RFC 9112 §3.2), unless `head.extra` brings one. An upgrade goes along unless `head`
    /// gives the request a body.
    pub fn write_upstream(&self, out: &mut Vec<u8>, head: &UpstreamHead<'_>) {
        let extra_bytes: usize = head.extra.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        out.reserve(
            self.method.len() + head.prefix.len() + self.target.len() + self.fields.size() + extra_bytes + 96,
        );
        let as_received = self.version == Version::Http11 && self.authority.is_empty();
        let start = if as_received && head.prefix.is_empty() {
            self.line_at..self.fields_at
        } else {
            self.push_request_line(out, head.prefix);
            self.fields_at..self.fields_at
        };
        let framing = match (head.framing, self.framing()) {
            (OutFraming::AsReceived | OutFraming::UntilClose, RequestFraming::Chunked) => OutFraming::Chunked,
            (OutFraming::AsReceived | OutFraming::UntilClose, RequestFraming::Length(_)) => {
                OutFraming::AsReceived
            }
            (framing, _) => framing,
        };
        let mut framed = framing == OutFraming::AsReceived;
        // A body would stand between the head and the other protocol.
        let upgrades = self.upgrades && matches!(framing, OutFraming::AsReceived | OutFraming::Length(0));
        let replaced =
            |field: &[u8]| head.extra.iter().any(|(name, _)| field.eq_ignore_ascii_case(name.as_bytes()));
        self.fields.write(out, start, |kind, name| match kind {
            Kind::EndToEnd | Kind::ContentType | Kind::Host if replaced(name) => Fate::Dropped,
            Kind::EndToEnd | Kind::ContentType => Fate::Kept,
            Kind::Host if self.authority.is_empty() => Fate::Kept,
            Kind::Host => Fate::Valued(self.authority.as_bytes()),
            Kind::ContentLength => match framing {
                OutFraming::AsReceived => Fate::Kept,
                OutFraming::Length(length) => {
                    framed = true;
                    Fate::Counted(length)
                }
                OutFraming::Chunked | OutFraming::UntilClose => Fate::Dropped,
            },
            Kind::TransferEncoding if framing == OutFraming::Chunked => {
                framed = true;
                Fate::Valued(b"chunked")
            }
            Kind::Trailer if framing == OutFraming::Chunked => Fate::Kept,
            Kind::Upgrade if upgrades => Fate::KeptBehind("Connection", "Upgrade"),
            Kind::HopByHop
            | Kind::Connection
            | Kind::Upgrade
            | Kind::TransferEncoding
            | Kind::Trailer
            | Kind::Expect => Fate::Dropped,
        });
        if self.fields.summary.hosts == 0
            && !head.extra.iter().any(|(name, _)| name.eq_ignore_ascii_case("host"))
        {
            push_field(out, b"Host", self.authority.as_bytes());
        }
        push_extra(out, head.extra);
        match framing {
            OutFraming::Length(length) if !framed => push_length(out, b"Content-Length", length),
            OutFraming::Chunked if !framed => push_field(out, b"Transfer-Encoding", b"chunked"),
            _ => {}
        }
        out.extend_from_slice(b"\r\n");
    }

    /// Appends the request line for a worker whose paths begin with `prefix`.
    fn push_request_line(&self, out: &mut Vec<u8>, prefix: &str) {
        out.extend_from_slice(self.method.as_bytes());
        out.push(b' ');
        if self.target != "*" {
            out.extend_from_slice(prefix.as_bytes());
        }
        out.extend_from_slice(self.target.as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
    }
}

/// Whether all of `bytes` may stand in a request line. Without an early end, so that it is vectorised.
fn is_printable_ascii(bytes: &[u8]) -> bool {
    bytes.iter().fold(true, |good, byte| good & (byte.wrapping_sub(b' ') < 0x7f - b' '))
}

/// Whether a request line ends in a well-formed version which is not ours.
fn names_other_version(line: &[u8]) -> bool {
    let version = line.trim_ascii_end().rsplit(|&byte| byte == b' ').next().unwrap_or_default();
    matches!(version, [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
        if major.is_ascii_digit() && minor.is_ascii_digit() && !(*major == b'1' && matches!(minor, b'0' | b'1')))
}

/// Whether `Upgrade` names protocols that are tunnelled as bytes.
fn is_tunnel(value: &[u8]) -> bool {
    let starts =
        |member: &[u8], with: &[u8]| member.get(..with.len()).is_some_and(|m| m.eq_ignore_ascii_case(with));
    value.iter().all(|byte| (b' '..0x7f).contains(byte))
        && members(value).next().is_some()
        && members(value)
            .all(|member| !starts(member, b"h2") && !starts(member, b"http") && !starts(member, b"tls"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &[u8]) -> Result<(String, Version), RequestError> {
        let mut head = RequestHead::default();
        head.take_request_line(line)?;
        Ok((format!("{} {}", head.method, head.target), head.version))
    }

    /// The same on top of `httparse`.
    fn read_by_httparse(line: &[u8]) -> Result<(String, Version), RequestError> {
        let line = [line, b"\r\n"].concat();
        let mut parsed = httparse::Request::new(&mut []);
        match parsed.parse(&line) {
            Ok(httparse::Status::Partial) => {}
            Err(httparse::Error::Version) if names_other_version(&line) => return Err(RequestError::Version),
            _ => return Err(RequestError::Malformed),
        }
        let (method, target) = (parsed.method.unwrap(), parsed.path.unwrap());
        if matches!(method, "CONNECT" | "TRACE") {
            return Err(RequestError::Method);
        }
        let version = if parsed.version == Some(0) { Version::Http10 } else { Version::Http11 };
        match take_apart(method, target) {
            Some(Target::Origin(target)) => Ok((format!("{method} {target}"), version)),
            Some(Target::Asterisk) => Ok((format!("{method} *"), version)),
            _ => Err(RequestError::Malformed),
        }
    }

    #[test]
    fn a_changed_request_line_is_read_as_httparse_reads_it() {
        let agrees = |line: &[u8]| {
            assert_eq!(read(line), read_by_httparse(line), "{}", line.escape_ascii());
        };
        for whole in [
            &b"POST /v1/chat/completions?a=b#c HTTP/1.1"[..],
            b"GET / HTTP/1.0",
            b"OPTIONS * HTTP/1.1",
            b"M-SEARCH / HTTP/1.1",
            b"CONNECT h:1 HTTP/1.1",
            b"TRACE / HTTP/1.1",
            b"PRI * HTTP/2.0",
            b"GET / HTTP/1.1 HTTP/2.0",
            b"GET / x HTTP/2.0",
            b"GET / x HTTP/2.0 ",
            b"GET / HTTP/1.",
            b"GET  HTTP/2.0",
        ] {
            agrees(whole);
            for at in 0..whole.len() {
                let (before, after) = whole.split_at(at);
                agrees(&[before, &after[1..]].concat());
                agrees(&whole[..=at]);
                for byte in b' '..0x7f {
                    agrees(&[before, &[byte], after].concat());
                    agrees(&[before, &[byte], &after[1..]].concat());
                }
                for other in at..whole.len() {
                    for (one, two) in [(b' ', b' '), (b'1', b' '), (b'(', b' '), (b' ', b'2'), (b'/', b'2')] {
                        let mut changed = whole.to_vec();
                        (changed[at], changed[other]) = (one, two);
                        agrees(&changed);
                    }
                }
            }
        }
    }
}
