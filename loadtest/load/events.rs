//! The events of a stream, found as its bytes come.

use std::sync::LazyLock;

use memchr::memmem::Finder;

/// The longest line that is kept when it comes in parts.
const LONGEST_LINE: usize = 1 << 20;
/// What the mock worker's event ids begin with; the time of writing follows, in nanoseconds of `CLOCK_MONOTONIC`.
const STAMP: &str = "chatcmpl-";
static FIND_STAMP: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(STAMP));
/// Digits of that time, zeros before it.
const STAMP_DIGITS: usize = 20;

/// How far a stream is read.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// A line of which the end has not come.
    partial: Vec<u8>,
    /// Events so far, without the last one, `[DONE]`.
    pub(crate) count: u64,
    /// Whether `[DONE]` was there.
    pub(crate) done: bool,
}

impl Events {
    /// Reads on; `seen` gets each event's time of writing, if it has one.
    ///
    /// # Errors
    /// An event is too long, or follows the last one.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        seen: &mut impl FnMut(Option<u64>),
    ) -> Result<(), &'static str> {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            if self.partial.is_empty() {
                self.line(&bytes[..end], seen)?;
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(&bytes[..end]);
                self.line(&whole, seen)?;
                whole.clear();
                self.partial = whole;
            }
            bytes = &bytes[end + 1..];
        }
        if self.partial.len() + bytes.len() > LONGEST_LINE {
            return Err("an event of more than 1 MiB");
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    /// Every event of these APIs is one line of data.
    fn line(&mut self, line: &[u8], seen: &mut impl FnMut(Option<u64>)) -> Result<(), &'static str> {
        let Some(data) = line.strip_prefix(b"data:") else { return Ok(()) };
        if self.done {
            return Err("an event after [DONE]");
        }
        if data.trim_ascii() == b"[DONE]" {
            self.done = true;
        } else {
            self.count += 1;
            seen(stamp(data));
        }
        Ok(())
    }
}

/// When an event was written.
fn stamp(data: &[u8]) -> Option<u64> {
    // whoever writes the event anew may move the id, but not far
    let begin = &data[..data.len().min(256)];
    let digits = begin.get(FIND_STAMP.find(begin)? + STAMP.len()..)?.get(..STAMP_DIGITS)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b": ping\r\n\r\ndata: {\"id\":\"chatcmpl-00000000000000000042\"}\n\ndata: {\"id\":\"x\"}\r\n\r\ndata: [DONE]\n\n";

    #[test]
    fn any_split_of_a_stream_has_the_same_events() {
        for size in 1..=STREAM.len() {
            let (mut events, mut stamps) = (Events::default(), Vec::new());
            for part in STREAM.chunks(size) {
                events.feed(part, &mut |stamp| stamps.push(stamp)).unwrap();
            }
            assert_eq!((stamps, events.count, events.done), (vec![Some(42), None], 2, true), "{size}");
        }
    }

    #[test]
    fn an_event_after_the_last_one_is_refused() {
        let mut events = Events::default();
        events.feed(b"data: [DONE]\n\n", &mut |_| ()).unwrap();
        assert!(events.feed(b"data: {}\n\n", &mut |_| ()).is_err());
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let mut events = Events::default();
        let part = vec![b'x'; LONGEST_LINE];
        events.feed(&part, &mut |_| ()).unwrap();
        assert!(events.feed(b"x", &mut |_| ()).is_err());
    }
}
