//! Finds the lines of a head in bytes that arrive in any pieces, and looks at no byte twice.
//!
//! A line ends in CRLF and in nothing else: a CR without LF and an LF without CR are what parsers disagree
//! about, so both are damage (RFC 9112 §2.2 allows to refuse them). No line of a head may hold another control
//! character than HTAB (RFC 9110 §5.5, RFC 9112 §3 and §4), so all of them are looked for at once.

use std::ops::Range;

use super::bytes::control_at;

/// A CR without LF after it, an LF without CR before it, or another control character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Damage;

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
    /// [`Damage`].
    #[inline]
    pub(super) fn next(&mut self, input: &[u8]) -> Result<Option<Range<usize>>, Damage> {
        let unseen = input.get(self.scanned..).unwrap_or_default();
        let Some(offset) = control_at(unseen) else {
            self.scanned = self.scanned.max(input.len());
            return Ok(None);
        };
        let end = self.scanned + offset;
        match unseen.get(offset..) {
            Some([b'\r', b'\n', ..]) => {
                let line = self.start..end;
                self.start = end + 2;
                self.scanned = self.start;
                Ok(Some(line))
            }
            Some([b'\r']) => {
                self.scanned = end;
                Ok(None)
            }
            _ => Err(Damage),
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
        assert_eq!(Lines::default().next(b"a\nb\r\n"), Err(Damage));
        assert_eq!(Lines::default().next(b"a\rb\r\n"), Err(Damage));
        assert_eq!(Lines::default().next(b"a\r\rb\r\n"), Err(Damage));
    }

    #[test]
    fn a_control_character_is_damage_before_its_line_ends() {
        for byte in (0..0x20).chain([0x7f]).filter(|byte| !b"\t\r".contains(byte)) {
            assert_eq!(Lines::default().next(&[b'a', byte]), Err(Damage), "{byte:#x}");
        }
        assert_eq!(Lines::default().next(b"\t\xff\r\n"), Ok(Some(0..2)));
    }
}
