//! Finds the lines of a head in bytes that arrive in any pieces, and looks at no byte twice.
//!
//! A line ends in CRLF and in nothing else: a CR without LF and an LF without CR are what parsers disagree
//! about, so both are damage (RFC 9112 §2.2 allows to refuse them).

use std::ops::Range;

use memchr::memchr2;

/// A CR without LF after it, or an LF without CR before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BareLineEnd;

/// How far the lines of a growing prefix have been read.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lines {
    /// Bytes before this one need no second look.
    scanned: usize,
    /// Where the next line begins.
    start: usize,
}

impl Lines {
    /// Bytes that were looked at; a CR at the end of the input waits for its LF and is not counted.
    pub(super) fn scanned(&self) -> usize {
        self.scanned
    }

    /// Where the line begins that was not returned yet.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// The next line's range without its CRLF; `None` if its end is not in `input` yet. Every call sees the
    /// same bytes as the call before it, and maybe more of them.
    ///
    /// # Errors
    /// [`BareLineEnd`].
    pub(super) fn next(&mut self, input: &[u8]) -> Result<Option<Range<usize>>, BareLineEnd> {
        let unseen = input.get(self.scanned..).unwrap_or_default();
        let Some(offset) = memchr2(b'\r', b'\n', unseen) else {
            self.scanned = self.scanned.max(input.len());
            return Ok(None);
        };
        let end = self.scanned + offset;
        match (unseen.get(offset), unseen.get(offset + 1)) {
            (Some(b'\r'), Some(b'\n')) => {
                let line = self.start..end;
                self.start = end + 2;
                self.scanned = self.start;
                Ok(Some(line))
            }
            (Some(b'\r'), None) => {
                self.scanned = end;
                Ok(None)
            }
            _ => Err(BareLineEnd),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_once_its_last_byte_is_there() {
        let mut lines = Lines::default();
        assert_eq!(lines.next(b"ab"), Ok(None));
        assert_eq!(lines.next(b"ab\r"), Ok(None));
        assert_eq!(lines.next(b"ab\r\n\r\n"), Ok(Some(0..2)));
        assert_eq!(lines.next(b"ab\r\n\r\n"), Ok(Some(4..4)));
        assert_eq!(lines.next(b"ab\r\n\r\n"), Ok(None));
    }

    #[test]
    fn half_of_a_line_end_is_damage() {
        assert_eq!(Lines::default().next(b"a\nb\r\n"), Err(BareLineEnd));
        assert_eq!(Lines::default().next(b"a\rb\r\n"), Err(BareLineEnd));
        assert_eq!(Lines::default().next(b"a\r\rb\r\n"), Err(BareLineEnd));
    }
}
