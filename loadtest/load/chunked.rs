//! The chunked framing of a body (RFC 9112 §7.1), read as it comes. The proxy's own reader is not used: what is
//! measured shall not be judged by itself.

/// Where in the framing the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The first digit of a chunk's size.
    Size,
    /// A further digit, or what ends them.
    Digits,
    /// An extension, up to the line's end.
    Extension,
    /// The line feed after a size.
    SizeEnd,
    Data,
    /// Carriage return and line feed after a chunk's data.
    DataReturn,
    DataEnd,
    /// The first byte of a trailer's line; an empty line is the end.
    Trailer,
    /// The rest of a trailer's line.
    TrailerLine,
    /// The last line feed.
    LastEnd,
    Over,
}

/// How far a chunked body is read.
#[derive(Debug)]
pub(crate) struct Chunked {
    next: Next,
    /// Bytes of the chunk that are still to come; while its size is read, the size so far.
    left: u64,
}

impl Chunked {
    pub(crate) fn new() -> Self {
        Self { next: Next::Size, left: 0 }
    }

    /// Whether the body has come to its end.
    pub(crate) fn is_over(&self) -> bool {
        self.next == Next::Over
    }

    /// Reads on; `data` gets what the body is made of. Returns how many bytes belong to the body: all, unless it is over.
    ///
    /// # Errors
    /// A byte that must not be there.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut data: impl FnMut(&[u8])) -> Result<usize, &'static str> {
        let mut at = 0;
        while at < bytes.len() && self.next != Next::Over {
            if self.next == Next::Data {
                let ready =
                    usize::try_from(self.left).map_or(bytes.len() - at, |left| left.min(bytes.len() - at));
                data(&bytes[at..at + ready]);
                at += ready;
                self.left -= ready as u64;
                if self.left == 0 {
                    self.next = Next::DataReturn;
                }
            } else {
                self.next = self.step(bytes[at])?;
                at += 1;
            }
        }
        Ok(at)
    }

    fn step(&mut self, byte: u8) -> Result<Next, &'static str> {
        Ok(match (self.next, byte) {
            (Next::Size | Next::Digits, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                if self.left >> 56 != 0 {
                    return Err("a chunk's size is too large");
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                self.left = self.left << 4 | u64::from(digit);
                Next::Digits
            }
            (Next::Digits, b'\r') | (Next::Extension, b'\r') => Next::SizeEnd,
            (Next::Digits, b';' | b' ' | b'\t') => Next::Extension,
            (Next::Extension, byte) if byte != b'\n' => Next::Extension,
            (Next::SizeEnd, b'\n') => match self.left {
                0 => Next::Trailer,
                _ => Next::Data,
            },
            (Next::DataReturn, b'\r') => Next::DataEnd,
            (Next::DataEnd, b'\n') => Next::Size,
            (Next::Trailer, b'\r') => Next::LastEnd,
            (Next::TrailerLine, b'\n') => Next::Trailer,
            (Next::Trailer | Next::TrailerLine, _) => Next::TrailerLine,
            (Next::LastEnd, b'\n') => Next::Over,
            _ => return Err("no chunked framing"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"5\r\nhello\r\n1A;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nx-left: 1\r\n\r\nHTTP";

    /// Reads the body in parts of this size; what was data, and what belonged to the body.
    fn read(size: usize) -> (Vec<u8>, usize) {
        let (mut chunked, mut data, mut taken) = (Chunked::new(), Vec::new(), 0);
        for part in BODY.chunks(size) {
            taken += chunked.feed(part, |piece| data.extend_from_slice(piece)).unwrap();
        }
        assert!(chunked.is_over());
        (data, taken)
    }

    #[test]
    fn any_split_of_a_chunked_body_reads_alike() {
        for size in 1..=BODY.len() {
            assert_eq!(read(size), (b"helloabcdefghijklmnopqrstuvwxyz".to_vec(), BODY.len() - 4), "{size}");
        }
    }

    #[test]
    fn what_is_no_framing_is_refused() {
        for wrong in
            ["\r\n", "g\r\n", "5\nhello", "5\r\nhello0\r\n", "fffffffffffffffff\r\n", "0\r\n\rx", "5 \n"]
        {
            assert!(Chunked::new().feed(wrong.as_bytes(), |_| ()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_body_that_is_cut_is_not_over() {
        let mut chunked = Chunked::new();
        for part in ["3\r\nab", "c\r\n0\r\n", "\r"] {
            assert_eq!(chunked.feed(part.as_bytes(), |_| ()), Ok(part.len()));
            assert!(!chunked.is_over());
        }
    }
}
