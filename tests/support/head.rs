//! A strict reader of HTTP/1.1 heads and bodies, for the mock worker (requests) and the client (responses).
//!
//! It shares no code with the proxy on purpose: what the proxy gets wrong, this must not get wrong alike.

/// What is not legal HTTP/1.1, in words.
pub(crate) type Illegal = String;

/// A head's header lines, in order, names as they came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(pub(crate) Vec<(String, Vec<u8>)>);

impl Headers {
    /// All values under `name`, whatever its case.
    pub(crate) fn all(&self, name: &str) -> Vec<String> {
        self.0
            .iter()
            .filter(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
            .collect()
    }

    /// The only value under `name`.
    #[track_caller]
    pub(crate) fn get(&self, name: &str) -> Option<String> {
        let mut all = self.all(name);
        assert!(all.len() < 2, "{name} stands there {} times: {all:?}", all.len());
        all.pop()
    }

    /// `(name, value)` lines as text, in order, without those named.
    pub(crate) fn lines_without(&self, names: &[&str]) -> Vec<String> {
        self.0
            .iter()
            .filter(|(name, _)| !names.iter().any(|not| name.eq_ignore_ascii_case(not)))
            .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value)))
            .collect()
    }
}

/// How the end of a body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
    /// Responses only.
    UntilClose,
}

/// Where the head in `bytes` ends (after the empty line), if it does.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// The start line and the header lines of a complete head.
pub(crate) fn parse(head: &[u8]) -> Result<(String, Headers), Illegal> {
    let text = head.strip_suffix(b"\r\n\r\n").ok_or("no empty line at the end")?;
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(2).position(|window| window == b"\r\n") {
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    let mut lines = lines.into_iter();
    let start = lines.next().unwrap_or_default();
    if start.iter().any(|byte| byte.is_ascii_control()) {
        return Err(format!("control byte in the start line {:?}", start.escape_ascii().to_string()));
    }
    let mut headers = Vec::new();
    for line in lines {
        let shown = line.escape_ascii().to_string();
        let colon = line.iter().position(|&byte| byte == b':').ok_or(format!("no colon in {shown}"))?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if name.is_empty() || !name.iter().all(|&byte| is_token(byte)) {
            return Err(format!("bad header name in {shown}"));
        }
        if value.iter().any(|&byte| byte != b'\t' && byte.is_ascii_control()) {
            return Err(format!("control byte in the value of {shown}"));
        }
        headers.push((String::from_utf8_lossy(name).into_owned(), value.trim_ascii().to_vec()));
    }
    Ok((String::from_utf8_lossy(start).into_owned(), Headers(headers)))
}

/// The framing that a head declares; `UntilClose` stands for none declared.
pub(crate) fn declared(headers: &Headers) -> Result<Framing, Illegal> {
    let (lengths, codings) = (headers.all("content-length"), headers.all("transfer-encoding"));
    match (&lengths[..], &codings[..]) {
        ([], []) => Ok(Framing::UntilClose),
        ([length], []) if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().map(Framing::Length).map_err(|_| format!("content-length {length}"))
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => Ok(Framing::Chunked),
        _ => Err(format!("framing: content-length {lengths:?}, transfer-encoding {codings:?}")),
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A body taken in piece by piece.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    framing: Framing,
    /// Bytes that belong to the body, framing and all.
    pub(crate) raw: Vec<u8>,
    /// The body without its framing.
    pub(crate) decoded: Vec<u8>,
    /// Size of each chunk of a chunked body, the last one (0) not counted.
    pub(crate) chunks: Vec<usize>,
    /// Trailer lines of a chunked body.
    pub(crate) trailers: Vec<String>,
    /// Bytes of `raw` that chunk decoding has used.
    used: usize,
    /// Bytes that the present chunk still lacks, its CRLF included; 0 between chunks.
    in_chunk: usize,
    in_trailers: bool,
    pub(crate) complete: bool,
}

impl Body {
    pub(crate) fn new(framing: Framing) -> Self {
        Self {
            framing,
            raw: Vec::new(),
            decoded: Vec::new(),
            chunks: Vec::new(),
            trailers: Vec::new(),
            used: 0,
            in_chunk: 0,
            in_trailers: false,
            complete: matches!(framing, Framing::None | Framing::Length(0)),
        }
    }

    /// Takes from the front of `buffer` what belongs to the body.
    pub(crate) fn take(&mut self, buffer: &mut Vec<u8>) -> Result<(), Illegal> {
        if self.complete {
            return Ok(());
        }
        match self.framing {
            Framing::None => {}
            Framing::Length(length) => {
                let missing = length as usize - self.raw.len();
                let now = missing.min(buffer.len());
                self.raw.extend_from_slice(&buffer[..now]);
                self.decoded.extend_from_slice(&buffer[..now]);
                buffer.drain(..now);
                self.complete = now == missing;
            }
            Framing::UntilClose => {
                self.raw.extend_from_slice(buffer);
                self.decoded.append(buffer);
            }
            Framing::Chunked => {
                self.raw.append(buffer);
                self.decode_chunks()?;
                if self.complete {
                    *buffer = self.raw.split_off(self.used);
                }
            }
        }
        Ok(())
    }

    fn decode_chunks(&mut self) -> Result<(), Illegal> {
        while !self.complete {
            let rest = &self.raw[self.used..];
            if self.in_chunk > 2 {
                let now = (self.in_chunk - 2).min(rest.len());
                if now == 0 {
                    return Ok(());
                }
                self.decoded.extend_from_slice(&rest[..now]);
                self.used += now;
                self.in_chunk -= now;
                continue;
            }
            if self.in_chunk == 2 {
                if rest.len() < 2 {
                    return Ok(());
                }
                if &rest[..2] != b"\r\n" {
                    return Err(format!("chunk data not followed by CRLF but {:?}", &rest[..2]));
                }
                self.used += 2;
                self.in_chunk = 0;
                continue;
            }
            let Some(at) = rest.windows(2).position(|window| window == b"\r\n") else {
                return if rest.len() > 65536 { Err("endless chunk line".to_owned()) } else { Ok(()) };
            };
            let line = rest[..at].to_vec();
            self.used += at + 2;
            if line.iter().any(|&byte| byte != b'\t' && byte.is_ascii_control()) {
                return Err(format!("control byte in {}", line.escape_ascii()));
            }
            if self.in_trailers {
                if line.is_empty() {
                    self.complete = true;
                } else {
                    self.trailers.push(String::from_utf8_lossy(&line).into_owned());
                }
                continue;
            }
            let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
            let after = line.get(digits).copied();
            if digits == 0 || digits > 16 || !matches!(after, None | Some(b';')) {
                return Err(format!("chunk size line {}", line.escape_ascii()));
            }
            let size = usize::from_str_radix(std::str::from_utf8(&line[..digits]).unwrap(), 16).unwrap();
            if size == 0 {
                self.in_trailers = true;
            } else {
                self.chunks.push(size);
                self.in_chunk = size + 2;
            }
        }
        Ok(())
    }
}
