//! HTTP/1.1 as values: heads, framing and chunked coding. No sockets, no clock, no runtime.
//!
//! Bytes go in, values come out, and values are written as bytes again:
//!
//! - [`RequestHead`] and [`ResponseHead`] take a growing prefix of a connection's bytes until a head is
//!   complete. They belong to a connection and are reused, so a steady connection allocates nothing.
//! - [`ChunkTracker`] walks a chunked body in whatever pieces it arrives, and changes none of it;
//!   [`EventTail`] knows where a stream of events stands.
//! - A head is written anew from its parsed parts, so that nothing which two parsers could read in two ways ever
//!   leaves this process (`faults.md` §2.1, RFC 9112 §11). A line that would be written byte for byte as it came is
//!   copied, together with its neighbours.
//!
//! The reading of lines is ours too: what a library takes that knows no proxies (a bare LF for the end of a line) is
//! request smuggling here, and what the lines mean to a proxy is learnt in the same pass. The tests hold it against
//! `httparse`. What is refused is refused; nothing is repaired.
//!
//! It deliberately does not know what an answer of ours looks like: [`RequestError`] says why, and
//! `proxy::respond` says it to the client.

mod bytes;
mod chunked;
mod events;
mod fields;
mod lines;
mod request;
mod response;
mod target;

pub use chunked::{
    ChunkError, ChunkTracker, Decoded, MAX_EXTENSION_BYTES, MAX_TRAILER_BYTES, Tracked, chunk_head,
};
pub use events::EventTail;
pub use request::{RequestError, RequestFraming, RequestHead, UpstreamHead};
pub use response::{DownstreamHead, ResponseError, ResponseFraming, ResponseHead};

/// Most bytes of a request head, including skipped empty lines before it (`faults.md` §1).
pub const MAX_HEAD_BYTES: usize = 128 * 1024;

/// Most fields of a request head (`faults.md` §1).
pub const MAX_FIELDS: usize = 128;

/// Most bytes of a request target: what hyper, and with it vLLM's Rust front end, takes before it answers
/// 414 itself. Its Python front end refuses targets of this size with 400.
pub const MAX_TARGET_BYTES: usize = 65_534;

/// Most bytes of a response head (`faults.md` §2.3).
pub const MAX_RESPONSE_HEAD_BYTES: usize = 1 << 20;

/// Most fields of a response head. vLLM sends fewer than ten; twice the bound of requests leaves room for
/// whatever middleware a worker runs.
pub const MAX_RESPONSE_FIELDS: usize = 256;

/// What a head keeps of its buffers between two exchanges of a connection, in bytes. A rare giant head must
/// not be held in memory by ten thousand idle connections.
const RETAINED_BYTES: usize = 16 * 1024;

/// A version of HTTP that is spoken here; every other one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// HTTP/1.0: no chunked coding, and a connection ends after its exchange unless both sides agree.
    Http10,
    /// HTTP/1.1.
    #[default]
    Http11,
}

/// How the end of a body is told in a head that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutFraming {
    /// As in the head that was read: its own framing field, in its place.
    AsReceived,
    /// `Content-Length` of this many bytes, in the spelling and place of the received one if there was one.
    Length(u64),
    /// `Transfer-Encoding: chunked`, in the spelling and place of the received one if there was one.
    Chunked,
    /// No framing field: the end of the connection ends the body. Responses only.
    UntilClose,
}

/// Appends `name: value CRLF`.
fn push_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends `name: n CRLF`.
fn push_length(out: &mut Vec<u8>, name: &[u8], length: u64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    let mut rest = length;
    loop {
        at -= 1;
        if let Some(digit) = digits.get_mut(at) {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        }
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    push_field(out, name, digits.get(at..).unwrap_or_default());
}

/// Appends fields of our own.
fn push_extra(out: &mut Vec<u8>, extra: &[(&str, &str)]) {
    for (name, value) in extra {
        debug_assert!(!name.is_empty() && name.bytes().all(bytes::is_token_byte), "field name {name:?}");
        debug_assert!(value.bytes().all(bytes::is_value_byte), "field value {value:?}");
        push_field(out, name.as_bytes(), value.as_bytes());
    }
}

#[cfg(test)]
mod tests;
