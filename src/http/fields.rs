//! The field lines of a head: kept in order and case, and read once for what they say about framing and
//! connection.

use std::ops::Range;

use super::bytes::token_len;
use super::lines::{Damage, Lines};
use super::{MAX_FIELDS, RETAINED_BYTES, push_field, push_length};

/// The largest body length that is believed, in bytes (`faults.md` §2.1).
pub(super) const MAX_LENGTH: u64 = 1 << 63;

/// Why field lines are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FieldError {
    /// A line is no field line.
    Syntax,
    /// There are more of them than are allowed.
    TooMany,
    /// The lines contradict each other, or nobody knows for sure, where the body ends.
    Framing,
}

/// What a field is to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Passed on.
    EndToEnd,
    /// Ends here.
    HopByHop,
    /// Ends here; says what else does.
    Connection,
    /// Passed on only in an upgrade.
    Upgrade,
    /// The length of the body.
    ContentLength,
    /// The coding of the body.
    TransferEncoding,
    /// Passed on, or replaced by the authority of the target.
    Host,
    /// Answered here.
    Expect,
    /// Announces trailer fields: passed on with a chunked body only.
    Trailer,
    /// Passed on; `Connection` cannot remove it.
    ContentType,
}

impl From<Damage> for FieldError {
    fn from(_: Damage) -> Self {
        Self::Syntax
    }
}

/// One field line: ranges of [`Fields::head`].
#[derive(Debug, Clone, Copy)]
struct Line {
    name_at: u32,
    name_end: u32,
    value_at: u32,
    value_end: u32,
    kind: Kind,
    /// It reads `name: value CRLF`, as it would be written.
    plain: bool,
}

/// What becomes of a field in a head that is written.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fate<'a> {
    /// It is not written.
    Dropped,
    /// It is written with its own value.
    Kept,
    /// It is written with its own value, behind another field.
    KeptBehind(&'static str, &'static str),
    /// It is written with this value.
    Valued(&'a [u8]),
    /// It is written with this number as its value.
    Counted(u64),
}

/// What the fields of a head said.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Summary {
    /// The value of `Content-Length`, in bytes.
    pub(super) length: Option<u64>,
    /// `Transfer-Encoding` is exactly `chunked`.
    pub(super) chunked: bool,
    /// How many `Host` fields there are.
    pub(super) hosts: u32,
    /// How many `Upgrade` fields there are.
    pub(super) upgrades: u32,
    /// `Expect: 100-continue`.
    pub(super) expects_continue: bool,
    /// `Connection` names `close`.
    pub(super) close: bool,
    /// `Connection` names `keep-alive`.
    pub(super) keep_alive: bool,
    /// `Connection` names `upgrade`.
    pub(super) upgrade: bool,
    /// `Connection` names fields of this message.
    names_fields: bool,
}

/// The fields of one head, in the order of arrival.
#[derive(Debug, Default)]
pub(super) struct Fields {
    /// The whole head as it came, from the first byte; empty until it is complete.
    head: Vec<u8>,
    lines: Vec<Line>,
    /// What they say; all of it once the head is complete.
    pub(super) summary: Summary,
}

impl Fields {
    /// Forgets the fields and keeps a bounded part of the memory.
    pub(super) fn clear(&mut self) {
        self.head.clear();
        self.lines.clear();
        if self.head.capacity() > RETAINED_BYTES {
            self.head.shrink_to(RETAINED_BYTES);
        }
        self.summary = Summary::default();
    }

    /// About how many bytes the head takes when written.
    pub(super) fn size(&self) -> usize {
        self.head.len() + 2 * self.lines.len()
    }

    /// Reads the field lines of a growing head, at most `most`, from where `lines` stands up to the empty line.
    /// Whether the head is complete.
    ///
    /// # Errors
    /// [`FieldError`], as soon as a complete line is illegal, or a byte of an unfinished one.
    pub(super) fn read(&mut self, lines: &mut Lines, input: &[u8], most: usize) -> Result<bool, FieldError> {
        loop {
            let Some(line) = lines.next(input)? else { return Ok(false) };
            if line.is_empty() {
                break;
            }
            if self.lines.len() == most {
                return Err(FieldError::TooMany);
            }
            self.take(input, line)?;
        }
        if self.summary.chunked && self.summary.length.is_some() {
            return Err(FieldError::Framing);
        }
        self.head.extend_from_slice(input.get(..lines.start()).unwrap_or_default());
        if self.summary.names_fields {
            self.drop_named()?;
        }
        Ok(true)
    }

    /// Takes a field line apart (RFC 9112 §5): `name ":" OWS value OWS`. It holds no control character but HTAB.
    #[inline]
    fn take(&mut self, input: &[u8], line: Range<usize>) -> Result<(), FieldError> {
        let text = input.get(line.clone()).unwrap_or_default();
        let (name, after) = text.split_at_checked(token_len(text)).unwrap_or_default();
        let Some((b':', padded)) = after.split_first() else { return Err(FieldError::Syntax) };
        if name.is_empty() {
            return Err(FieldError::Syntax);
        }
        let unpadded = padded.trim_ascii_start();
        let value = unpadded.trim_ascii_end();
        let kind = kind_of(name);
        self.summary.note(kind, value)?;
        // No line ends beyond the longest head, so all of these fit.
        let name_end = line.start + name.len();
        let value_at = line.end - unpadded.len();
        let value_end = value_at + value.len();
        self.lines.push(Line {
            name_at: line.start as u32,
            name_end: name_end as u32,
            value_at: value_at as u32,
            value_end: value_end as u32,
            kind,
            plain: padded.starts_with(b" ") && (value_at, value_end) == (name_end + 2, line.end),
        });
        Ok(())
    }

    /// Applies RFC 9110 §7.6.1: a field that `Connection` names ends here. It cannot remove what says where
    /// the message ends, whom it is for, who sent it or what it is (`faults.md` §2.2).
    fn drop_named(&mut self) -> Result<(), FieldError> {
        let Self { head, lines, .. } = self;
        let part = |at: u32, end: u32| head.get(at as usize..end as usize).unwrap_or_default();
        let mut budget = MAX_FIELDS;
        for at in 0..lines.len() {
            let Some(line) = lines.get(at).filter(|line| line.kind == Kind::Connection) else { continue };
            for option in members(part(line.value_at, line.value_end)).filter(|option| names_field(option)) {
                // As many names as there may be fields: a longer list is there to cost time.
                budget = budget.checked_sub(1).ok_or(FieldError::Syntax)?;
                for line in lines.iter_mut().filter(|line| line.kind == Kind::EndToEnd) {
                    if part(line.name_at, line.name_end).eq_ignore_ascii_case(option) {
                        line.kind = Kind::HopByHop;
                    }
                }
            }
        }
        Ok(())
    }

    /// These bytes of the head; none where there are no such.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.head.get(range).unwrap_or_default()
    }

    fn name(&self, line: &Line) -> &[u8] {
        self.bytes(line.name_at as usize..line.name_end as usize)
    }

    fn value(&self, line: &Line) -> &[u8] {
        self.bytes(line.value_at as usize..line.value_end as usize)
    }

    /// The value of the first field of `kind`.
    pub(super) fn first(&self, kind: Kind) -> Option<&[u8]> {
        self.lines.iter().find(|line| line.kind == kind).map(|line| self.value(line))
    }

    /// The value of the first field of this name that does not end here.
    pub(super) fn named(&self, name: &str) -> Option<&[u8]> {
        self.lines
            .iter()
            .find(|line| {
                (line.name_end - line.name_at) as usize == name.len()
                    && !matches!(
                        line.kind,
                        Kind::HopByHop
                            | Kind::Connection
                            | Kind::Upgrade
                            | Kind::Expect
                            | Kind::TransferEncoding
                    )
                    && self.name(line).eq_ignore_ascii_case(name.as_bytes())
            })
            .map(|line| self.value(line))
    }

    /// Appends the fields, each as its `fate` says, which is told the name. What stood together in the head and is
    /// written as it came is copied at once; `start` is the part of the head before the fields with which that begins.
    pub(super) fn write<'a>(
        &'a self,
        out: &mut Vec<u8>,
        start: Range<usize>,
        mut fate: impl FnMut(Kind, &'a [u8]) -> Fate<'a>,
    ) {
        let mut run = start;
        for line in &self.lines {
            let name = self.name(line);
            let fate = match fate(line.kind, name) {
                Fate::Dropped => continue,
                Fate::Counted(number) if self.is_written(line, number) => Fate::Kept,
                Fate::Valued(value) if self.value(line) == value => Fate::Kept,
                fate => fate,
            };
            let whole = line.name_at as usize..line.value_end as usize + 2;
            if matches!(fate, Fate::Kept) && line.plain && run.end == whole.start {
                run.end = whole.end;
                continue;
            }
            out.extend_from_slice(self.bytes(run));
            run = whole.end..whole.end;
            match fate {
                Fate::Kept if line.plain => run.start = whole.start,
                Fate::KeptBehind(other, value) => {
                    push_field(out, other.as_bytes(), value.as_bytes());
                    push_field(out, name, self.value(line));
                }
                Fate::Kept => push_field(out, name, self.value(line)),
                Fate::Valued(value) => push_field(out, name, value),
                Fate::Counted(number) => push_length(out, name, number),
                Fate::Dropped => {}
            }
        }
        out.extend_from_slice(self.bytes(run));
    }

    /// Whether `line` is that of the body's length, which is `number`, without zeros in front.
    fn is_written(&self, line: &Line, number: u64) -> bool {
        line.kind == Kind::ContentLength
            && self.summary.length == Some(number)
            && !self.value(line).starts_with(b"0")
    }
}

impl Summary {
    /// Notes what one field says.
    fn note(&mut self, kind: Kind, value: &[u8]) -> Result<(), FieldError> {
        match kind {
            Kind::EndToEnd | Kind::HopByHop | Kind::Trailer | Kind::ContentType => {}
            Kind::ContentLength => {
                // RFC 9110 §8.6 lets equal values pass; whoever sends two of them has an intermediary that
                // may have seen something else.
                if self.length.replace(length(value)?).is_some() {
                    return Err(FieldError::Framing);
                }
            }
            Kind::TransferEncoding => {
                if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(FieldError::Framing);
                }
                self.chunked = true;
            }
            Kind::Host => self.hosts += 1,
            Kind::Upgrade => self.upgrades += 1,
            Kind::Expect => self.expects_continue |= value.eq_ignore_ascii_case(b"100-continue"),
            Kind::Connection => {
                for option in members(value) {
                    self.close |= option.eq_ignore_ascii_case(b"close");
                    self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                    self.upgrade |= option.eq_ignore_ascii_case(b"upgrade");
                    self.names_fields |= names_field(option);
                }
            }
        }
        Ok(())
    }
}

/// What a field of this name, which is a token, is. Lengths come first, so most names are compared with nothing.
fn kind_of(name: &[u8]) -> Kind {
    match name.len() {
        2 if is(name, b"te") => Kind::HopByHop,
        4 if is(name, b"host") => Kind::Host,
        6 if is(name, b"expect") => Kind::Expect,
        7 if is(name, b"upgrade") => Kind::Upgrade,
        7 if is(name, b"trailer") => Kind::Trailer,
        10 if is(name, b"connection") => Kind::Connection,
        10 if is(name, b"keep-alive") => Kind::HopByHop,
        12 if is(name, b"content-type") => Kind::ContentType,
        14 if is(name, b"content-length") => Kind::ContentLength,
        // RFC 7540 §3.2.1: speaks of this connection only, whether or not `Connection` names it.
        14 if is(name, b"http2-settings") => Kind::HopByHop,
        17 if is(name, b"transfer-encoding") => Kind::TransferEncoding,
        6.. if name.get(..6).is_some_and(|start| is(start, b"proxy-")) => Kind::HopByHop,
        _ => Kind::EndToEnd,
    }
}

/// Whether `token` is `known` in any case. The bit that tells the cases apart is set in every letter, digit and dash
/// of `known`; without it they are control characters, which no token holds. As numbers of four bytes, of which
/// the last may overlap the one before: a few instructions, since the length is known.
#[inline]
fn is<const N: usize>(token: &[u8], known: &[u8; N]) -> bool {
    const CASES: u32 = 0x2020_2020;
    let Ok(token) = <&[u8; N]>::try_from(token) else { return false };
    let same =
        |(one, other): (&[u8; 4], &[u8; 4])| u32::from_ne_bytes(*one) | CASES == u32::from_ne_bytes(*other);
    match (token.last_chunk(), known.last_chunk()) {
        (Some(one), Some(other)) => {
            same((one, other)) && token.as_chunks().0.iter().zip(known.as_chunks().0).all(same)
        }
        _ => token.map(|byte| byte | 0x20) == *known,
    }
}

/// Whether an option of `Connection` may remove a field of its name. The other fields it cannot remove are
/// those that have a [`Kind`] of their own.
fn names_field(option: &[u8]) -> bool {
    !(option.eq_ignore_ascii_case(b"close")
        || option.eq_ignore_ascii_case(b"keep-alive")
        || option.eq_ignore_ascii_case(b"upgrade")
        || option.eq_ignore_ascii_case(b"authorization")
        || option.eq_ignore_ascii_case(b"x-request-id"))
}

/// The members of a comma-separated list; empty ones are skipped (RFC 9110 §5.6.1.2).
pub(super) fn members(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty())
}

/// `Content-Length = 1*DIGIT` and not more than [`MAX_LENGTH`].
fn length(value: &[u8]) -> Result<u64, FieldError> {
    if value.is_empty() {
        return Err(FieldError::Framing);
    }
    value.iter().try_fold(0_u64, |length, digit| {
        if !digit.is_ascii_digit() {
            return Err(FieldError::Framing);
        }
        let longer = length.checked_mul(10).and_then(|tens| tens.checked_add(u64::from(digit - b'0')));
        longer.filter(|&length| length <= MAX_LENGTH).ok_or(FieldError::Framing)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that mean something in a field line, and one of each kind that does not.
    const TELLING: &[u8] = b"a-_:, \t\r\n\0\x7f\x80(";

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    fn read(section: &[u8]) -> Result<Option<Pairs>, FieldError> {
        let mut fields = Fields::default();
        let complete = fields.read(&mut Lines::default(), section, MAX_FIELDS)?;
        let pair = |line: &Line| (fields.name(line).to_vec(), fields.value(line).to_vec());
        Ok(complete.then(|| fields.lines.iter().map(pair).collect()))
    }

    /// What `httparse` makes of it, which takes a bare LF for the end of a line.
    fn read_by_httparse(section: &[u8]) -> Option<Pairs> {
        let mut room = [httparse::EMPTY_HEADER; 16];
        let bare = |at: usize| section[at] == b'\n' && (at == 0 || section[at - 1] != b'\r');
        match httparse::parse_headers(section, &mut room) {
            Ok(httparse::Status::Complete((end, headers))) if !(0..end).any(bare) => Some(
                headers.iter().map(|field| (field.name.as_bytes().to_vec(), field.value.to_vec())).collect(),
            ),
            _ => None,
        }
    }

    /// Sections that both accept, and sections that both refuse.
    #[derive(Debug, Default)]
    struct Agreed {
        accepted: u32,
        refused: u32,
    }

    impl Agreed {
        fn on(&mut self, section: &[u8]) {
            let ours = read(section);
            // of what frames a message `httparse` knows nothing
            if ours == Err(FieldError::Framing) {
                return;
            }
            let ours = ours.ok().flatten();
            *(if ours.is_some() { &mut self.accepted } else { &mut self.refused }) += 1;
            assert_eq!(ours, read_by_httparse(section), "{}", section.escape_ascii());
        }

        fn often(&self) {
            assert!(self.accepted > 100 && self.refused > 100, "{self:?}");
        }
    }

    #[test]
    fn every_short_field_section_is_read_as_httparse_reads_it() {
        let mut agreed = Agreed::default();
        for number in 0..TELLING.len().pow(4) {
            let start: [u8; 4] =
                std::array::from_fn(|at| TELLING[number / TELLING.len().pow(at as u32) % TELLING.len()]);
            for rest in ["\r\n\r\n", ":\r\n\r\n", ""] {
                agreed.on(&[&start, rest.as_bytes()].concat());
            }
        }
        agreed.often();
    }

    #[test]
    fn a_changed_field_section_is_read_as_httparse_reads_it() {
        let mut agreed = Agreed::default();
        let whole: &[u8] =
            b"Content-Length: 12\r\nX_y.z~:\t a  b\t \r\n0:\r\nConnection: a,close\r\nq: \xff\r\n\r\n";
        for at in 0..whole.len() {
            let (before, after) = whole.split_at(at);
            for byte in 0..=255 {
                agreed.on(&[before, &[byte], after].concat());
                agreed.on(&[before, &[byte], &after[1..]].concat());
            }
            for (one, two) in TELLING.iter().flat_map(|one| TELLING.iter().map(move |two| (*one, *two))) {
                agreed.on(&[before, &[one, two], after].concat());
                if let [_, _, behind @ ..] = after {
                    agreed.on(&[before, &[one, two], behind].concat());
                }
            }
        }
        agreed.often();
    }

    #[test]
    fn a_field_line_of_any_length_is_read_as_httparse_reads_it() {
        let mut agreed = Agreed::default();
        for (name, value) in (1..36).flat_map(|name| (0..36).map(move |value| (name, value))) {
            let line = [&vec![b'n'; name], &b": "[..], &vec![b'v'; value], b"\r\n\r\n"].concat();
            agreed.on(&line);
            for at in (0..line.len()).step_by(5) {
                for byte in TELLING {
                    let mut changed = line.clone();
                    changed[at] = *byte;
                    agreed.on(&changed);
                }
            }
        }
        agreed.often();
    }

    #[test]
    fn a_known_name_is_known_in_any_case_and_no_other_name_is_taken_for_it() {
        let known = [
            ("te", Kind::HopByHop),
            ("host", Kind::Host),
            ("expect", Kind::Expect),
            ("upgrade", Kind::Upgrade),
            ("trailer", Kind::Trailer),
            ("connection", Kind::Connection),
            ("keep-alive", Kind::HopByHop),
            ("content-type", Kind::ContentType),
            ("content-length", Kind::ContentLength),
            ("http2-settings", Kind::HopByHop),
            ("transfer-encoding", Kind::TransferEncoding),
            ("proxy-x", Kind::HopByHop),
            ("proxy-", Kind::HopByHop),
        ];
        for (name, kind) in known {
            assert_eq!(kind_of(name.as_bytes()), kind, "{name}");
            assert_eq!(kind_of(name.to_ascii_uppercase().as_bytes()), kind, "{name}");
            for at in 0..name.len() {
                for byte in (0..=255).filter(|byte| token_len(&[*byte]) == 1) {
                    let mut changed = name.as_bytes().to_vec();
                    changed[at] = byte;
                    let same = changed.eq_ignore_ascii_case(name.as_bytes()) || name == "proxy-x" && at == 6;
                    let expected = if same { kind } else { Kind::EndToEnd };
                    assert_eq!(kind_of(&changed), expected, "{}", changed.escape_ascii());
                }
            }
            assert_eq!(kind_of(&name.as_bytes()[1..]), Kind::EndToEnd, "{name}");
        }
    }
}
