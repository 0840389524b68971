//! One answer, read as its bytes come, and judged: it must have status 200 and be whole. No sockets.

use thiserror::Error;

use crate::{chunked::Chunked, events::Events};

/// The longest head that is read.
const LONGEST_HEAD: usize = 64 * 1024;
/// The most fields that a head may have.
const MOST_FIELDS: usize = 64;
/// How much of an answer that is not 200 is shown.
const EXCERPT: usize = 200;

/// Why a request has no whole answer.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    #[error("the connection broke: {0}")]
    Broken(std::io::Error),
    #[error("the connection was closed before an answer")]
    NoAnswer,
    #[error("the connection was closed within the answer")]
    Cut,
    #[error("answered before the request was sent whole")]
    Early,
    #[error("status {0}: {1}")]
    Status(u16, String),
    #[error("a head that cannot be read: {0}")]
    Head(&'static str),
    #[error("a body that cannot be read: {0}")]
    Body(&'static str),
    #[error("bytes behind the answer's end")]
    Surplus,
    #[error("a stream that ends without [DONE], after {0} events")]
    NotDone(u64),
}

/// What comes next.
#[derive(Debug)]
enum Part {
    Head,
    /// So many bytes of the body.
    Length(u64),
    Chunked(Chunked),
    /// The body ends with the connection.
    UntilClosed,
    Over,
}

/// How far an answer is read.
#[derive(Debug)]
pub(crate) struct Answer {
    part: Part,
    /// The beginning of a head of which the rest has not come.
    head: Vec<u8>,
    /// Of an answer that must be a stream.
    events: Option<Events>,
    /// Whether the connection may be used again.
    keeps: bool,
    received: u64,
}

/// What a head says.
struct Head {
    /// Its length.
    bytes: usize,
    status: u16,
    part: Part,
    keeps: bool,
}

impl Answer {
    /// `streams`: whether the body must be a stream of events.
    pub(crate) fn new(streams: bool) -> Self {
        let events = streams.then(Events::default);
        Self { part: Part::Head, head: Vec::new(), events, keeps: true, received: 0 }
    }

    /// Bytes so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Events so far.
    pub(crate) fn events(&self) -> u64 {
        self.events.as_ref().map_or(0, |events| events.count)
    }

    /// Whether the connection can be used for another request after this answer.
    pub(crate) fn keeps(&self) -> bool {
        self.keeps
    }

    /// Reads on; `seen` gets each event's time of writing, if it has one. Returns whether the answer is whole.
    ///
    /// # Errors
    /// The answer is none that was asked for.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut seen: impl FnMut(Option<u64>)) -> Result<bool, Failure> {
        self.received += bytes.len() as u64;
        if !matches!(self.part, Part::Head) {
            return self.body(bytes, &mut seen);
        }
        if self.head.is_empty() {
            // nearly always the head is whole, and need not be kept
            let body = self.heads(bytes)?;
            return match self.part {
                Part::Head => {
                    self.head.extend_from_slice(&bytes[body..]);
                    Ok(false)
                }
                _ => self.body(&bytes[body..], &mut seen),
            };
        }
        let mut head = std::mem::take(&mut self.head);
        head.extend_from_slice(bytes);
        let body = self.heads(&head)?;
        match self.part {
            Part::Head if head.len() - body > LONGEST_HEAD => Err(Failure::Head("it is too long")),
            Part::Head => {
                head.drain(..body);
                self.head = head;
                Ok(false)
            }
            _ => self.body(&head[body..], &mut seen),
        }
    }

    /// The connection was closed by the other side.
    ///
    /// # Errors
    /// That was too early.
    pub(crate) fn closed(&mut self) -> Result<(), Failure> {
        self.keeps = false;
        match self.part {
            Part::UntilClosed => {
                self.part = Part::Over;
                self.judge()
            }
            Part::Head if self.received == 0 => Err(Failure::NoAnswer),
            _ => Err(Failure::Cut),
        }
    }

    /// Reads heads, of which only the last one is not interim. Returns where the rest begins.
    fn heads(&mut self, bytes: &[u8]) -> Result<usize, Failure> {
        let mut at = 0;
        while let Some(head) = read_head(&bytes[at..])? {
            at += head.bytes;
            match head.status {
                100..200 => continue,
                200 => {}
                status => {
                    let excerpt = &bytes[at..bytes.len().min(at + EXCERPT)];
                    return Err(Failure::Status(status, String::from_utf8_lossy(excerpt).into_owned()));
                }
            }
            (self.part, self.keeps) = (head.part, head.keeps);
            break;
        }
        Ok(at)
    }

    fn body(&mut self, bytes: &[u8], seen: &mut impl FnMut(Option<u64>)) -> Result<bool, Failure> {
        let Self { part, events, .. } = self;
        let mut wrong = Ok(());
        let mut data = |piece: &[u8]| {
            if let (Some(events), Ok(())) = (&mut *events, wrong) {
                wrong = events.feed(piece, seen);
            }
        };
        let taken = match part {
            Part::Head | Part::Over => 0,
            Part::Length(left) => {
                let taken = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                data(&bytes[..taken]);
                *left -= taken as u64;
                taken
            }
            Part::Chunked(chunked) => chunked.feed(bytes, data).map_err(Failure::Body)?,
            Part::UntilClosed => {
                data(bytes);
                bytes.len()
            }
        };
        wrong.map_err(Failure::Body)?;
        let over = match part {
            Part::Length(left) => *left == 0,
            Part::Chunked(chunked) => chunked.is_over(),
            Part::UntilClosed => false,
            Part::Head | Part::Over => true,
        };
        if taken < bytes.len() {
            return Err(Failure::Surplus);
        }
        if over {
            *part = Part::Over;
            self.judge()?;
        }
        Ok(over)
    }

    /// Whether what is whole is what was asked for.
    fn judge(&self) -> Result<(), Failure> {
        match &self.events {
            Some(events) if !events.done => Err(Failure::NotDone(events.count)),
            _ => Ok(()),
        }
    }
}

/// The head that begins here, once it is whole. Framing as in RFC 9112 §6.3.
fn read_head(bytes: &[u8]) -> Result<Option<Head>, Failure> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut head = httparse::Response::new(&mut fields);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Failure::Head("it is no HTTP/1")),
    };
    let (mut chunked, mut body_bytes) = (false, None);
    let mut keeps = head.version == Some(1);
    for field in head.headers.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("transfer-encoding") {
            if !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(Failure::Head("an unknown transfer-encoding"));
            }
            chunked = true;
        } else if is("content-length") {
            let value = std::str::from_utf8(field.value).ok().and_then(|value| value.trim().parse().ok());
            let value: u64 = value.ok_or(Failure::Head("content-length is no number"))?;
            if body_bytes.replace(value).is_some_and(|other| other != value) {
                return Err(Failure::Head("two content-lengths"));
            }
        } else if is("connection") {
            let mut words = field.value.split(|byte| *byte == b',');
            keeps &= !words.any(|word| word.trim_ascii().eq_ignore_ascii_case(b"close"));
        }
    }
    let part = match (chunked, body_bytes) {
        (true, Some(_)) => return Err(Failure::Head("content-length beside transfer-encoding")),
        (true, None) => Part::Chunked(Chunked::new()),
        (false, Some(bytes)) => Part::Length(bytes),
        (false, None) => Part::UntilClosed,
    };
    keeps &= !matches!(part, Part::UntilClosed);
    Ok(Some(Head { bytes: length, status: head.code.unwrap_or(0), part, keeps }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
    const EMPTY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    const INTERIM: &str =
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: x, Close\r\ncontent-length: 2\r\n\r\n{}";
    const STREAM: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nc\r\ndata: {\"a\":1\r\n3\r\n}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    const CLOSED: &str = "HTTP/1.1 200 OK\r\n\r\ndata: x\n\ndata: [DONE]\n\n";

    /// Reads an answer in parts of this size. Whether it was whole before the connection was closed, whether the connection
    /// is kept, and events.
    fn read(answer: &str, streams: bool, size: usize) -> Result<(bool, bool, u64), Failure> {
        let mut reader = Answer::new(streams);
        let (mut over, mut seen) = (false, 0);
        for part in answer.as_bytes().chunks(size) {
            assert!(!over, "over before its end");
            over = reader.feed(part, |_| seen += 1)?;
        }
        if !over {
            reader.closed()?;
        }
        assert_eq!(seen, reader.events());
        assert_eq!(reader.received(), answer.len() as u64);
        Ok((over, reader.keeps(), seen))
    }

    #[test]
    fn any_split_of_an_answer_reads_alike() {
        for size in 1..200 {
            assert_eq!(read(LENGTH, false, size).unwrap(), (true, true, 0));
            assert_eq!(read(EMPTY, false, size).unwrap(), (true, true, 0));
            assert_eq!(read(INTERIM, false, size).unwrap(), (true, false, 0));
            assert_eq!(read(STREAM, true, size).unwrap(), (true, true, 1));
            assert_eq!(read(CLOSED, true, size).unwrap(), (false, false, 1));
        }
    }

    #[test]
    fn an_answer_that_is_cut_anywhere_is_a_failure() {
        for (answer, streams) in [(LENGTH, false), (INTERIM, false), (STREAM, true)] {
            for cut in 1..answer.len() {
                let failure = read(&answer[..cut], streams, 1000).unwrap_err();
                assert!(matches!(failure, Failure::Cut), "{failure}");
            }
        }
        assert!(matches!(Answer::new(false).closed(), Err(Failure::NoAnswer)));
        // a body that the connection's end ends cannot be known to be cut, unless it is a stream
        let cut = &CLOSED[..CLOSED.len() - 5];
        assert!(matches!(read(cut, true, 1000), Err(Failure::NotDone(1))));
    }

    #[test]
    fn what_was_not_asked_for_is_a_failure() {
        let refused = "HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\nno";
        assert!(matches!(read(refused, false, 1000), Err(Failure::Status(503, text)) if text == "no"));
        assert!(matches!(read(LENGTH, true, 1000), Err(Failure::NotDone(0))));
        assert!(matches!(read(&format!("{LENGTH}x"), false, 1000), Err(Failure::Surplus)));
        assert!(matches!(read("SSH-2.0\r\n\r\n", false, 1000), Err(Failure::Head(_))));
        let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(2 * LONGEST_HEAD));
        assert!(matches!(read(&endless, false, 1000), Err(Failure::Head(_))));
        let wrong = STREAM.replacen("\r\nc\r\n", "\r\nx\r\n", 1);
        assert!(matches!(read(&wrong, true, 1000), Err(Failure::Body(_))));
        for framing in ["content-length: 6", "transfer-encoding: chunked", "content-length: x"] {
            for twice in
                [format!("{framing}\r\ncontent-length: 5"), format!("content-length: 5\r\n{framing}")]
            {
                let answer = LENGTH.replacen("content-length: 5", &twice, 1);
                assert!(matches!(read(&answer, false, 1000), Err(Failure::Head(_))), "{answer}");
            }
        }
        let coded = STREAM.replacen("chunked", "gzip", 1);
        assert!(matches!(read(&coded, true, 1000), Err(Failure::Head(_))));
    }
}
