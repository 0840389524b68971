//! The field lines of a head: kept in order and case, and read once for what they say about framing and
//! connection.

use httparse::{EMPTY_HEADER, Header};

use super::{MAX_FIELDS, MAX_RESPONSE_FIELDS, RETAINED_BYTES};

/// Few heads have more fields; tokenising into a small array saves clearing a large one.
const USUAL_FIELDS: usize = 16;

/// The largest body length that is believed, in bytes (`faults.md` §2.1).
pub(super) const MAX_LENGTH: u64 = 1 << 63;

/// Why field lines are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FieldError {
    /// A line is no field line.
    Syntax,
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

/// One field line: ranges of [`Fields::bytes`].
#[derive(Debug, Clone, Copy)]
struct Line {
    name_at: u32,
    name_end: u32,
    value_at: u32,
    value_end: u32,
    kind: Kind,
}

/// A field as it was received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field<'a> {
    pub(super) name: &'a [u8],
    pub(super) value: &'a [u8],
    pub(super) kind: Kind,
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
    /// The field lines as they came.
    bytes: Vec<u8>,
    lines: Vec<Line>,
}

impl Fields {
    /// Forgets the fields and keeps a bounded part of the memory.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.lines.clear();
        if self.bytes.capacity() > RETAINED_BYTES {
            self.bytes.shrink_to(RETAINED_BYTES);
        }
    }

    /// About how many bytes the fields take when written.
    pub(super) fn size(&self) -> usize {
        self.bytes.len() + 2 * self.lines.len()
    }

    /// Reads `section`, which begins with the first field line, ends with the empty line and holds `count`
    /// field lines. Its line ends were checked before.
    ///
    /// # Errors
    /// [`FieldError`].
    pub(super) fn read(&mut self, section: &[u8], count: usize) -> Result<Summary, FieldError> {
        self.clear();
        self.bytes.extend_from_slice(section);
        if count <= USUAL_FIELDS {
            self.tokenise(section, count, &mut [EMPTY_HEADER; USUAL_FIELDS])
        } else if count <= MAX_FIELDS {
            self.tokenise(section, count, &mut [EMPTY_HEADER; MAX_FIELDS])
        } else {
            self.tokenise(section, count, &mut [EMPTY_HEADER; MAX_RESPONSE_FIELDS])
        }
    }

    fn tokenise<'b>(
        &mut self,
        section: &'b [u8],
        count: usize,
        room: &mut [Header<'b>],
    ) -> Result<Summary, FieldError> {
        let headers = match httparse::parse_headers(section, room) {
            Ok(httparse::Status::Complete((end, headers)))
                if end == section.len() && headers.len() == count =>
            {
                headers
            }
            _ => return Err(FieldError::Syntax),
        };
        let base = section.as_ptr() as usize;
        let offset = |part: &[u8]| {
            let at = (part.as_ptr() as usize).checked_sub(base)?;
            Some((u32::try_from(at).ok()?, u32::try_from(at + part.len()).ok()?))
        };
        let mut summary = Summary::default();
        for header in headers {
            let name = header.name.as_bytes();
            let kind = kind_of(name);
            summary.note(kind, header.value)?;
            let (name_at, name_end) = offset(name).ok_or(FieldError::Syntax)?;
            let (value_at, value_end) = offset(header.value).ok_or(FieldError::Syntax)?;
            self.lines.push(Line { name_at, name_end, value_at, value_end, kind });
        }
        if summary.chunked && summary.length.is_some() {
            return Err(FieldError::Framing);
        }
        if summary.names_fields {
            self.drop_named(headers)?;
        }
        Ok(summary)
    }

    /// Applies RFC 9110 §7.6.1: a field that `Connection` names ends here. It cannot remove what says where
    /// the message ends, whom it is for, who sent it or what it is (`faults.md` §2.2).
    fn drop_named(&mut self, headers: &[Header<'_>]) -> Result<(), FieldError> {
        let mut budget = MAX_FIELDS;
        for header in headers.iter().filter(|header| kind_of(header.name.as_bytes()) == Kind::Connection) {
            for option in members(header.value).filter(|option| names_field(option)) {
                // As many names as there may be fields: a longer list is there to cost time.
                budget = budget.checked_sub(1).ok_or(FieldError::Syntax)?;
                for (line, named) in self.lines.iter_mut().zip(headers) {
                    if line.kind == Kind::EndToEnd && named.name.as_bytes().eq_ignore_ascii_case(option) {
                        line.kind = Kind::HopByHop;
                    }
                }
            }
        }
        Ok(())
    }

    /// All fields in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Field<'_>> {
        let part = |at: u32, end: u32| self.bytes.get(at as usize..end as usize).unwrap_or_default();
        self.lines.iter().map(move |line| Field {
            name: part(line.name_at, line.name_end),
            value: part(line.value_at, line.value_end),
            kind: line.kind,
        })
    }

    /// The value of the first field of `kind`.
    pub(super) fn first(&self, kind: Kind) -> Option<&[u8]> {
        self.iter().find(|field| field.kind == kind).map(|field| field.value)
    }

    /// The value of the first field of this name that does not end here.
    pub(super) fn named(&self, name: &str) -> Option<&[u8]> {
        self.iter()
            .find(|field| {
                !matches!(
                    field.kind,
                    Kind::HopByHop | Kind::Connection | Kind::Upgrade | Kind::Expect | Kind::TransferEncoding
                ) && field.name.eq_ignore_ascii_case(name.as_bytes())
            })
            .map(|field| field.value)
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

/// What a field of this name is. Lengths come first, so most names are compared with nothing.
fn kind_of(name: &[u8]) -> Kind {
    let is = |known: &[u8]| name.eq_ignore_ascii_case(known);
    match name.len() {
        2 if is(b"te") => Kind::HopByHop,
        4 if is(b"host") => Kind::Host,
        6 if is(b"expect") => Kind::Expect,
        7 if is(b"upgrade") => Kind::Upgrade,
        7 if is(b"trailer") => Kind::Trailer,
        10 if is(b"connection") => Kind::Connection,
        10 if is(b"keep-alive") => Kind::HopByHop,
        12 if is(b"content-type") => Kind::ContentType,
        14 if is(b"content-length") => Kind::ContentLength,
        // RFC 7540 §3.2.1: speaks of this connection only, whether or not `Connection` names it.
        14 if is(b"http2-settings") => Kind::HopByHop,
        17 if is(b"transfer-encoding") => Kind::TransferEncoding,
        6.. if name.get(..6).is_some_and(|start| start.eq_ignore_ascii_case(b"proxy-")) => Kind::HopByHop,
        _ => Kind::EndToEnd,
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

/// RFC 9110 §5.6.2: `tchar`.
pub(super) fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// RFC 9110 §5.5: what a field value may hold, HTAB and obs-text included.
pub(super) fn is_value_byte(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}
