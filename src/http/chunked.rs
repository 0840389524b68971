//! Chunked transfer coding (RFC 9112 §7.1), tracked over any split of its bytes.
//!
//! One state machine serves requests and answers, walking ([`ChunkTracker::track`]) and decoding
//! ([`ChunkTracker::decode`]). It is exact: what it calls legal, every parser behind it reads in the same
//! way. Extensions and trailer fields are checked and bounded, but mean nothing here.

use thiserror::Error;

use super::bytes::{is_token_byte, is_value_byte};
use super::fields::MAX_LENGTH;

/// Most bytes of chunk extensions in one message (`faults.md` §2.1).
pub const MAX_EXTENSION_BYTES: u16 = 4 * 1024;

/// Most bytes of trailer fields in one message, line ends included.
pub const MAX_TRAILER_BYTES: u16 = 16 * 1024;

/// Most digits of a chunk size: those of a 64-bit number.
const MAX_SIZE_DIGITS: u8 = 16;

/// Most digits of a chunk size that is read at once: more than any chunk of a model's answer has.
const USUAL_SIZE_DIGITS: usize = 8;

/// The longest name that a trailer field must not have: `transfer-encoding`.
const LONGEST_FORBIDDEN: usize = 17;

/// Why bytes are no chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChunkError {
    /// Not 1 to 16 hexadecimal digits and then CRLF or an extension, or more than 2^63.
    #[error("the chunk size is malformed")]
    Size,
    /// An extension is malformed.
    #[error("the chunk extension is malformed")]
    Extension,
    /// More than [`MAX_EXTENSION_BYTES`] of extensions.
    #[error("the chunk extensions are longer than {MAX_EXTENSION_BYTES} bytes")]
    ExtensionsTooLong,
    /// The data of a chunk is not followed by CRLF.
    #[error("the chunk data does not end in CRLF")]
    DataEnd,
    /// A trailer field is malformed, or its name is one that frames or addresses a message.
    #[error("the trailer field is malformed or forbidden")]
    Trailer,
    /// More than [`MAX_TRAILER_BYTES`] of trailer fields.
    #[error("the trailer fields are longer than {MAX_TRAILER_BYTES} bytes")]
    TrailersTooLong,
}

/// What a walk over some bytes found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracked {
    /// Bytes that belong to the body's coding: all of the input, unless the body ended within it.
    pub consumed: usize,
    /// How many of them were data.
    pub data: usize,
    /// The body is complete.
    pub done: bool,
}

/// What decoding some bytes in place gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded {
    /// Bytes of data that now stand at the front of the input.
    pub data: usize,
    /// Bytes that belonged to the body's coding: all of the input, unless the body ended within it.
    pub consumed: usize,
    /// The body is complete.
    pub done: bool,
}

/// Where in a chunked body the next byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// The first digit of a chunk size.
    #[default]
    SizeStart,
    /// Another digit, or what ends the size.
    Size,
    /// After `;`: white space or a name.
    ExtensionStart,
    ExtensionName,
    /// White space after a name: `=` or `;` must follow.
    ExtensionNameEnd,
    /// After `=`: white space or a value.
    ExtensionValueStart,
    ExtensionValue,
    ExtensionQuoted,
    /// After a backslash in a quoted value.
    ExtensionEscape,
    /// After a quoted value.
    ExtensionQuotedEnd,
    /// White space after a value: `;` must follow.
    ExtensionValueEnd,
    /// The LF that ends a size line.
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// The first byte of a trailer line, or the CR that ends the body.
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    /// The LF that ends the body.
    EndLf,
    Done,
}

/// Follows a chunked body from its first byte to its last. Made anew for every message.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChunkTracker {
    state: State,
    digits: u8,
    extension_bytes: u16,
    trailer_bytes: u16,
    /// The size so far, then the data bytes of the chunk that are still to come.
    remaining: u64,
    /// The start of a trailer field's name, in lower case.
    name: [u8; LONGEST_FORBIDDEN],
    /// Its length, which may exceed what is kept of it.
    name_bytes: u16,
}

impl ChunkTracker {
    /// A tracker before the first byte of a body.
    pub fn new() -> Self {
        Self::default()
    }

    /// Walks over `input`, which continues where the last call ended, without changing it.
    ///
    /// # Errors
    /// [`ChunkError`]. The tracker must not be used after it.
    pub fn track(&mut self, input: &[u8]) -> Result<Tracked, ChunkError> {
        self.track_data(input, |_| {})
    }

    /// As [`track`](Self::track), and shows each run of data bytes to `seen`.
    ///
    /// # Errors
    /// As [`track`](Self::track).
    pub fn track_data(&mut self, input: &[u8], mut seen: impl FnMut(&[u8])) -> Result<Tracked, ChunkError> {
        let mut tracked = Tracked { consumed: 0, data: 0, done: false };
        loop {
            tracked.consumed += self.skip_framing(input.get(tracked.consumed..).unwrap_or_default())?;
            let data = self.take_data(input.len() - tracked.consumed);
            if data == 0 {
                tracked.done = self.state == State::Done;
                debug_assert!(tracked.done || tracked.consumed == input.len(), "walked to the end");
                return Ok(tracked);
            }
            let from = tracked.consumed;
            tracked.consumed += data;
            tracked.data += data;
            seen(input.get(from..tracked.consumed).unwrap_or_default());
        }
    }

    /// Like [`track`](Self::track), but moves the data bytes to the front of `input`. What stood behind the
    /// body's end stays where it is.
    ///
    /// # Errors
    /// [`ChunkError`]. The tracker and `input` must not be used after it.
    pub fn decode(&mut self, input: &mut [u8]) -> Result<Decoded, ChunkError> {
        let mut decoded = Decoded { data: 0, consumed: 0, done: false };
        loop {
            decoded.consumed += self.skip_framing(input.get(decoded.consumed..).unwrap_or_default())?;
            let data = self.take_data(input.len() - decoded.consumed);
            if data == 0 {
                decoded.done = self.state == State::Done;
                debug_assert!(decoded.done || decoded.consumed == input.len(), "walked to the end");
                return Ok(decoded);
            }
            input.copy_within(decoded.consumed..decoded.consumed + data, decoded.data);
            decoded.consumed += data;
            decoded.data += data;
        }
    }

    /// Whether the body's last byte was seen.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether a new chunk may be written after the last byte that was seen.
    pub fn is_between_chunks(&self) -> bool {
        self.state == State::SizeStart
    }

    /// Data bytes of the current chunk that are still to come; 0 outside of one.
    pub fn remaining(&self) -> u64 {
        if self.state == State::Data { self.remaining } else { 0 }
    }

    /// What ends the body legally after the last byte that was seen, with `text` as its last data, in however many
    /// chunks that takes. A chunk that is open is filled with `text`, and with `filler` where `text` is too short for
    /// it. Where the sender has announced the end already, no more data can be sent and none is.
    ///
    /// `None` if it cannot be ended: more than `most` bytes are missing in the open chunk, an extension or the name
    /// of a trailer field is torn apart, or the body has ended.
    pub fn conclude(&self, text: &[u8], filler: u8, most: usize) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(text.len() + 32);
        // what ends the line that is open, and the data bytes that it announces
        let (line, open) = match self.state {
            State::SizeStart => (&b""[..], 0),
            State::Data => (&b""[..], self.remaining),
            State::DataCr => {
                out.extend_from_slice(b"\r\n");
                (&b""[..], 0)
            }
            State::DataLf => {
                out.extend_from_slice(b"\n");
                (&b""[..], 0)
            }
            State::Size | State::ExtensionName | State::ExtensionValue | State::ExtensionQuotedEnd
                if self.remaining > 0 =>
            {
                (&b"\r\n"[..], self.remaining)
            }
            State::Size => return Some(self.conclude_zero(text)),
            State::SizeLf if self.remaining > 0 => (&b"\n"[..], self.remaining),
            State::ExtensionName | State::ExtensionValue | State::ExtensionQuotedEnd => {
                return Some(b"\r\n\r\n".to_vec());
            }
            State::SizeLf | State::TrailerLf => return Some(b"\n\r\n".to_vec()),
            State::TrailerStart => return Some(b"\r\n".to_vec()),
            State::TrailerValue => return Some(b"\r\n\r\n".to_vec()),
            State::EndLf => return Some(b"\n".to_vec()),
            _ => return None,
        };
        out.extend_from_slice(line);
        let open = usize::try_from(open).ok().filter(|open| *open <= most)?;
        let (filling, rest) = text.split_at(open.min(text.len()));
        if open > 0 {
            out.extend_from_slice(filling);
            out.resize(out.len() + open - filling.len(), filler);
            out.extend_from_slice(b"\r\n");
        }
        push_last_chunks(&mut out, rest);
        Some(out)
    }

    /// A size line that says no more than `0` so far: with more digits it still announces data.
    fn conclude_zero(&self, text: &[u8]) -> Vec<u8> {
        let (head, count) = chunk_head(text.len());
        let mut out = Vec::with_capacity(text.len() + 32);
        // `count` has two bytes of a line end in it
        if text.is_empty() || usize::from(self.digits) + count - 2 > usize::from(MAX_SIZE_DIGITS) {
            out.extend_from_slice(b"\r\n\r\n");
            return out;
        }
        out.extend_from_slice(head.get(..count).unwrap_or_default());
        out.extend_from_slice(text);
        out.extend_from_slice(b"\r\n");
        push_last_chunks(&mut out, b"");
        out
    }

    /// Takes up to `available` bytes of the current chunk's data; 0 outside of a chunk's data.
    fn take_data(&mut self, available: usize) -> usize {
        if self.state != State::Data {
            return 0;
        }
        let data = usize::try_from(self.remaining).map_or(available, |remaining| remaining.min(available));
        self.remaining -= data as u64;
        if self.remaining == 0 {
            self.state = State::DataCr;
        }
        data
    }

    /// Walks over everything that is not data, up to the next data byte, the end of the body or the end of
    /// `input`; returns how many bytes that were.
    #[inline]
    fn skip_framing(&mut self, input: &[u8]) -> Result<usize, ChunkError> {
        match self.skip_usual_framing(input) {
            Some(skipped) => Ok(skipped),
            None => self.skip_any_framing(input),
        }
    }

    /// As [`skip_framing`](Self::skip_framing), byte by byte.
    #[inline(never)]
    fn skip_any_framing(&mut self, input: &[u8]) -> Result<usize, ChunkError> {
        for (at, &byte) in input.iter().enumerate() {
            if matches!(self.state, State::Data | State::Done) {
                return Ok(at);
            }
            self.state = self.after(byte)?;
        }
        Ok(input.len())
    }

    /// Walks at once over what nearly every sender writes between the data of two chunks, or before the first:
    /// `[CRLF] size CRLF`. `None`, and nothing is changed, if anything else stands there or a part of it is missing.
    #[inline]
    fn skip_usual_framing(&mut self, input: &[u8]) -> Option<usize> {
        let line = match self.state {
            State::DataCr => input.strip_prefix(b"\r\n")?,
            State::SizeStart => input,
            _ => return None,
        };
        let mut size = 0;
        for (at, &byte) in line.iter().take(USUAL_SIZE_DIGITS + 1).enumerate() {
            if let Some(digit) = char::from(byte).to_digit(16) {
                size = (size << 4) | u64::from(digit);
                continue;
            }
            let rest = line.get(at..)?.strip_prefix(b"\r\n").filter(|_| size > 0)?;
            self.state = State::Data;
            self.remaining = size;
            return Some(input.len() - rest.len());
        }
        None
    }

    /// The state after `byte`.
    fn after(&mut self, byte: u8) -> Result<State, ChunkError> {
        match self.state {
            State::SizeStart | State::Size => self.after_size(byte),
            State::SizeLf => match byte {
                b'\n' if self.remaining == 0 => Ok(State::TrailerStart),
                b'\n' => Ok(State::Data),
                _ => Err(ChunkError::Size),
            },
            State::DataCr if byte == b'\r' => Ok(State::DataLf),
            State::DataLf if byte == b'\n' => {
                self.digits = 0;
                Ok(State::SizeStart)
            }
            State::DataCr | State::DataLf => Err(ChunkError::DataEnd),
            State::TrailerStart
            | State::TrailerName
            | State::TrailerValue
            | State::TrailerLf
            | State::EndLf => self.after_trailer(byte),
            State::Data | State::Done => Ok(self.state),
            _ => self.after_extension(byte),
        }
    }

    fn after_size(&mut self, byte: u8) -> Result<State, ChunkError> {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' => byte - b'A' + 10,
            b'\r' if self.state == State::Size => return Ok(State::SizeLf),
            b';' if self.state == State::Size => return self.extension(State::ExtensionStart),
            _ => return Err(ChunkError::Size),
        };
        self.digits += 1;
        // Between two chunks nothing remains of the one before, so the digits add up from zero.
        self.remaining = (self.remaining << 4) | u64::from(digit);
        if self.digits > MAX_SIZE_DIGITS || self.remaining > MAX_LENGTH {
            return Err(ChunkError::Size);
        }
        Ok(State::Size)
    }

    /// Counts a byte of an extension.
    fn extension(&mut self, next: State) -> Result<State, ChunkError> {
        self.extension_bytes += 1;
        if self.extension_bytes > MAX_EXTENSION_BYTES { Err(ChunkError::ExtensionsTooLong) } else { Ok(next) }
    }

    /// RFC 9112 §7.1.1: `*( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] )`.
    fn after_extension(&mut self, byte: u8) -> Result<State, ChunkError> {
        use State::{
            ExtensionEscape, ExtensionName, ExtensionNameEnd, ExtensionQuoted, ExtensionQuotedEnd,
            ExtensionStart, ExtensionValue, ExtensionValueEnd, ExtensionValueStart,
        };
        let blank = matches!(byte, b' ' | b'\t');
        let next = match (self.state, byte) {
            (ExtensionName | ExtensionValue | ExtensionQuotedEnd, b'\r') => return Ok(State::SizeLf),
            (ExtensionStart | ExtensionNameEnd | ExtensionValueStart | ExtensionValueEnd, _) if blank => {
                self.state
            }
            (ExtensionName, _) if blank => ExtensionNameEnd,
            (ExtensionValue | ExtensionQuotedEnd, _) if blank => ExtensionValueEnd,
            (ExtensionName | ExtensionNameEnd, b'=') => ExtensionValueStart,
            (
                ExtensionName | ExtensionNameEnd | ExtensionValue | ExtensionQuotedEnd | ExtensionValueEnd,
                b';',
            ) => ExtensionStart,
            (ExtensionStart | ExtensionName, _) if is_token_byte(byte) => ExtensionName,
            (ExtensionValueStart, b'"') => ExtensionQuoted,
            (ExtensionValueStart | ExtensionValue, _) if is_token_byte(byte) => ExtensionValue,
            (ExtensionQuoted, b'"') => ExtensionQuotedEnd,
            (ExtensionQuoted, b'\\') => ExtensionEscape,
            (ExtensionQuoted | ExtensionEscape, _) if is_value_byte(byte) => ExtensionQuoted,
            _ => return Err(ChunkError::Extension),
        };
        self.extension(next)
    }

    fn after_trailer(&mut self, byte: u8) -> Result<State, ChunkError> {
        let next = match (self.state, byte) {
            (State::TrailerStart, b'\r') => return Ok(State::EndLf),
            (State::EndLf, b'\n') => return Ok(State::Done),
            (State::TrailerStart, _) if is_token_byte(byte) => {
                self.name_bytes = 0;
                self.note_name(byte);
                State::TrailerName
            }
            (State::TrailerName, b':') if !self.is_forbidden() => State::TrailerValue,
            (State::TrailerName, _) if is_token_byte(byte) => {
                self.note_name(byte);
                State::TrailerName
            }
            (State::TrailerValue, b'\r') => State::TrailerLf,
            (State::TrailerValue, _) if is_value_byte(byte) => State::TrailerValue,
            (State::TrailerLf, b'\n') => State::TrailerStart,
            _ => return Err(ChunkError::Trailer),
        };
        self.trailer_bytes += 1;
        if self.trailer_bytes > MAX_TRAILER_BYTES { Err(ChunkError::TrailersTooLong) } else { Ok(next) }
    }

    fn note_name(&mut self, byte: u8) {
        if let Some(place) = self.name.get_mut(usize::from(self.name_bytes)) {
            *place = byte.to_ascii_lowercase();
        }
        self.name_bytes = self.name_bytes.saturating_add(1);
    }

    /// RFC 9110 §6.5.1: fields that frame or route a message must not come after its content.
    fn is_forbidden(&self) -> bool {
        let name = self.name.get(..usize::from(self.name_bytes)).unwrap_or_default();
        matches!(name, b"content-length" | b"transfer-encoding" | b"host")
    }
}

/// A chunk of `text`, if it is not empty, and the end of the body.
fn push_last_chunks(out: &mut Vec<u8>, text: &[u8]) {
    if !text.is_empty() {
        let (head, count) = chunk_head(text.len());
        out.extend_from_slice(head.get(..count).unwrap_or_default());
        out.extend_from_slice(text);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\n\r\n");
}

/// The line before a chunk of `len` bytes of data: the bytes and how many of them count. Lower-case digits
/// without leading zeros, as uvicorn writes them. A `len` of 0 gives the first line of a body's end.
pub fn chunk_head(len: usize) -> ([u8; 18], usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = len.checked_ilog2().map_or(1, |log| log as usize / 4 + 1);
    let mut head = [0; 18];
    for (place, byte) in head.iter_mut().take(digits).enumerate() {
        let nibble = (len >> (4 * (digits - 1 - place))) & 0xf;
        *byte = DIGITS.get(nibble).copied().unwrap_or(b'0');
    }
    for (byte, end) in head.iter_mut().skip(digits).zip(*b"\r\n") {
        *byte = end;
    }
    (head, digits + 2)
}
