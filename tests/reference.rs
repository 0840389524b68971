//! HTTP/1.1 a second time, naively: whole inputs only, line by line, no state. `properties` and the fuzz
//! targets hold `vllm_proxy::http` against it.

use vllm_proxy::http::{
    ChunkError, ChunkTracker, DownstreamHead, OutFraming, RequestFraming, RequestHead, ResponseHead,
    UpstreamHead, Version,
};

/// What the reference says about the bytes of a chunked body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chunked {
    /// Complete: its data, and how many bytes it took.
    Done(Vec<u8>, usize),
    /// Nothing wrong so far; the data of what is there.
    Partial(Vec<u8>),
    /// No chunked body begins like this.
    Bad,
}

/// Decodes a chunked body.
pub(crate) fn chunked(input: &[u8]) -> Chunked {
    let (mut data, mut at, mut extensions, mut trailers) = (Vec::new(), 0, 0, 0);
    loop {
        let Some(line) = line(input, at) else { return Chunked::Partial(data) };
        at += line.len() + 2;
        let (size, extension) = match line.iter().position(|&byte| byte == b';') {
            Some(end) => line.split_at(end),
            None => (line, &[][..]),
        };
        extensions += extension.len();
        let Ok(size) = std::str::from_utf8(size) else { return Chunked::Bad };
        let hexadecimal = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !hexadecimal || size.len() > 16 || extensions > 4096 || !extensions_are_legal(extension) {
            return Chunked::Bad;
        }
        let size = u64::from_str_radix(size, 16).expect("at most 16 hexadecimal digits");
        if size > 1 << 63 {
            return Chunked::Bad;
        }
        if size == 0 {
            break;
        }
        let rest = &input[at..];
        if size > rest.len() as u64 {
            data.extend_from_slice(rest);
            return Chunked::Partial(data);
        }
        let (chunk, rest) = rest.split_at(size as usize);
        data.extend_from_slice(chunk);
        at += chunk.len();
        match rest {
            [] | [b'\r'] => return Chunked::Partial(data),
            [b'\r', b'\n', ..] => at += 2,
            _ => return Chunked::Bad,
        }
    }
    loop {
        let Some(line) = line(input, at) else { return Chunked::Partial(data) };
        at += line.len() + 2;
        if line.is_empty() {
            return Chunked::Done(data, at);
        }
        trailers += line.len() + 2;
        let Some((name, _)) = field(line) else { return Chunked::Bad };
        if trailers > 16384 || ["host", "content-length", "transfer-encoding"].contains(&name.as_str()) {
            return Chunked::Bad;
        }
    }
}

/// The line at `at`, up to the first CR or LF; `None` if it is not complete. A line with a damaged end comes
/// back with the damage in it.
fn line(input: &[u8], at: usize) -> Option<&[u8]> {
    let rest = &input[at..];
    let end = rest.iter().position(|byte| b"\r\n".contains(byte))?;
    match (rest[end], rest.get(end + 1)) {
        (b'\r', Some(b'\n')) => Some(&rest[..end]),
        (b'\r', None) => None,
        _ => Some(&rest[..=end]),
    }
}

fn is_token(text: &[u8]) -> bool {
    !text.is_empty()
        && text.iter().all(|byte| byte.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(byte))
}

fn is_value(text: &[u8]) -> bool {
    text.iter().all(|&byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f))
}

/// Name in lower case and value without white space around it.
fn field(line: &[u8]) -> Option<(String, Vec<u8>)> {
    let colon = line.iter().position(|&byte| byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let value: &[u8] = value.trim_ascii();
    (is_token(name) && is_value(&line[colon..]))
        .then(|| (String::from_utf8_lossy(name).to_ascii_lowercase(), value.to_vec()))
}

/// `*( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] )`, but no white space before the first `;`.
fn extensions_are_legal(text: &[u8]) -> bool {
    let blanks = |text: &[u8]| text.iter().take_while(|byte| b" \t".contains(byte)).count();
    let token = |text: &[u8]| text.iter().take_while(|&&byte| is_token(&[byte])).count();
    let mut rest = text;
    while !rest.is_empty() {
        let skipped = if rest.len() == text.len() { rest } else { &rest[blanks(rest)..] };
        let Some(after) = skipped.strip_prefix(b";") else { return false };
        let after = &after[blanks(after)..];
        let name = token(after);
        if name == 0 {
            return false;
        }
        rest = &after[name..];
        if let Some(value) = rest[blanks(rest)..].strip_prefix(b"=") {
            let value = &value[blanks(value)..];
            rest = if value.first() == Some(&b'"') {
                let mut end = 1;
                while value.get(end).is_some_and(|&byte| byte != b'"') {
                    end += if value[end] == b'\\' { 2 } else { 1 };
                }
                if end >= value.len() || !is_value(&value[..end]) {
                    return false;
                }
                &value[end + 1..]
            } else {
                let value_bytes = token(value);
                if value_bytes == 0 {
                    return false;
                }
                &value[value_bytes..]
            };
        }
    }
    true
}

/// Walks over `pieces` and decodes them; both must agree with each other at every step.
fn walk(pieces: &[&[u8]]) -> Result<(Vec<u8>, usize, bool), ChunkError> {
    let (mut tracker, mut decoder) = (ChunkTracker::new(), ChunkTracker::new());
    let (mut data, mut consumed, mut done) = (Vec::new(), 0, false);
    for piece in pieces {
        let mut copy = piece.to_vec();
        let (tracked, decoded) = (tracker.track(piece), decoder.decode(&mut copy));
        assert_eq!(
            tracked.map(|t| (t.data, t.consumed, t.done)),
            decoded.map(|d| (d.data, d.consumed, d.done))
        );
        let decoded = decoded?;
        assert!(decoded.done || decoded.consumed == piece.len(), "stopped before the end of the input");
        assert!(!done || decoded.consumed == 0, "walked beyond the end of the body");
        data.extend_from_slice(&copy[..decoded.data]);
        (consumed, done) = (consumed + decoded.consumed, decoded.done);
    }
    Ok((data, consumed, done))
}

/// Cuts `input` into pieces whose lengths are those of `cuts`, over and over; an empty list means one piece.
pub(crate) fn pieces<'a>(input: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let (mut rest, mut pieces) = (input, Vec::new());
    for cut in cuts.iter().cycle() {
        let (piece, after) = rest.split_at((*cut).clamp(1, 1 << 20).min(rest.len()));
        pieces.push(piece);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    if !rest.is_empty() || pieces.is_empty() {
        pieces.push(rest);
    }
    pieces
}

/// Holds the chunk tracker against the reference, for `input` whole, cut by `cuts` and byte by byte.
pub(crate) fn check_chunked(input: &[u8], cuts: &[usize]) {
    let whole = walk(&[input]);
    assert_eq!(walk(&pieces(input, cuts)), whole, "a split changes the verdict");
    if input.len() <= 4096 {
        assert_eq!(walk(&pieces(input, &[1])), whole, "single bytes change the verdict");
    }
    match (chunked(input), whole) {
        (Chunked::Done(data, end), whole) => assert_eq!(whole, Ok((data, end, true))),
        (Chunked::Partial(data), Ok(whole)) => assert_eq!(whole, (data, input.len(), false)),
        (Chunked::Bad, whole) => assert!(whole.is_err(), "the reference refuses, the tracker says {whole:?}"),
        // The tracker knows before the line ends. Then nothing that follows makes it good.
        (Chunked::Partial(_), Err(_)) => {
            for rest in [
                "\n",
                "\r\n",
                "\r\n\r\n",
                "0\r\n\r\n",
                "\n0\r\n\r\n",
                "\r\n0\r\n\r\n",
                "a\r\n\r\n",
                ": a\r\n\r\n",
                "\"\r\n\r\n",
            ] {
                let more = [input, rest.as_bytes()].concat();
                assert!(!matches!(chunked(&more), Chunked::Done(..)), "{rest:?} makes it good");
            }
        }
    }
}

/// A legal request head as the reference sees it: its end, its framing, method and target, its fields.
type Request = (usize, RequestFraming, String, Vec<(String, Vec<u8>)>);

/// Reads a request head that is complete, legal and within all bounds; `None` for anything else.
pub(crate) fn request(input: &[u8]) -> Option<Request> {
    let mut at = 0;
    while at < 4 && input[at..].starts_with(b"\r\n") {
        at += 2;
    }
    let first = line(input, at)?;
    at += first.len() + 2;
    let parts: Vec<&[u8]> = first.split(|&byte| byte == b' ').collect();
    let &[method, target, version] = parts.as_slice() else { return None };
    let modern = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return None,
    };
    let visible = target.iter().all(u8::is_ascii_graphic);
    if !is_token(method) || method.len() > 64 || !visible || target.len() > 65_534 {
        return None;
    }
    let method = String::from_utf8_lossy(method).into_owned();
    if method == "CONNECT" || method == "TRACE" || !target_is_legal(&method, &String::from_utf8_lossy(target))
    {
        return None;
    }
    let mut fields = Vec::new();
    loop {
        let line = line(input, at)?;
        at += line.len() + 2;
        if line.is_empty() {
            break;
        }
        fields.push(field(line)?);
    }
    let all =
        |name: &str| fields.iter().filter(|field| field.0 == name).map(|field| &field.1).collect::<Vec<_>>();
    let (lengths, codings, hosts) = (all("content-length"), all("transfer-encoding"), all("host"));
    let framing = match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => RequestFraming::Length(0),
        ([length], []) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
            let length: u64 = std::str::from_utf8(length).ok()?.parse().ok()?;
            (length <= 1 << 63).then_some(RequestFraming::Length(length))?
        }
        ([], [coding]) if modern && coding.eq_ignore_ascii_case(b"chunked") => RequestFraming::Chunked,
        _ => return None,
    };
    match hosts.as_slice() {
        [host] if authority_is_legal(&String::from_utf8_lossy(host)) => {}
        [] if !modern => {}
        _ => return None,
    }
    let names = all("connection").into_iter().flat_map(|value| value.split(|&byte| byte == b','));
    let known = ["", "close", "keep-alive", "upgrade", "authorization", "x-request-id"];
    let named = names
        .filter(|name| !known.contains(&String::from_utf8_lossy(name.trim_ascii()).to_lowercase().as_str()));
    let bounded = at <= 128 * 1024 && fields.len() <= 128 && named.count() <= 128;
    bounded.then_some((at, framing, method, fields))
}

fn target_is_legal(method: &str, target: &str) -> bool {
    let lower = target.to_ascii_lowercase();
    let absolute = lower.strip_prefix("http://").or(lower.strip_prefix("https://"));
    let authority = absolute.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
    target.starts_with('/')
        || (target == "*" && method == "OPTIONS")
        || authority.is_some_and(|a| !a.is_empty() && !a.starts_with(':') && authority_is_legal(a))
}

fn authority_is_legal(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (text, ""),
    };
    let sub_delims = "!$&'()*+,;=-._~";
    let plain = |c: char| c.is_ascii_alphanumeric() || sub_delims.contains(c);
    let host_is_legal = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) if address.starts_with(['v', 'V']) => address.chars().all(|c| plain(c) || c == ':'),
        Some(address) => {
            !address.is_empty() && address.chars().all(|c| c.is_ascii_hexdigit() || ":.".contains(c))
        }
        None => {
            let mut parts = host.split('%');
            parts.next().unwrap_or_default().chars().all(plain)
                && parts.all(|part| {
                    part.len() >= 2
                        && part.chars().take(2).all(|c| c.is_ascii_hexdigit())
                        && part.chars().skip(2).all(plain)
                })
        }
    };
    host_is_legal && port.len() <= 5 && port.chars().all(|c| c.is_ascii_digit())
}

/// Feeds growing prefixes that end where `cuts` say; the verdict and the bytes that were there when it fell.
fn grow<V: PartialEq>(input: &[u8], cuts: &[usize], unfinished: &V, mut parse: impl FnMut(&[u8]) -> V) -> V {
    let mut end = 0;
    for piece in pieces(input, cuts) {
        end += piece.len();
        let verdict = parse(&input[..end]);
        if verdict != *unfinished {
            return verdict;
        }
    }
    parse(input)
}

/// Holds the request head against the reference and against itself: any split, and written and read again.
pub(crate) fn check_request(input: &[u8], cuts: &[usize]) {
    let mut head = RequestHead::default();
    let split = grow(input, cuts, &Ok(None), |prefix| head.parse(prefix));
    let mut head = RequestHead::default();
    let whole = head.parse(input);
    assert_eq!(split, whole, "a split changes the verdict");
    let Ok(Some(end)) = whole else {
        assert_eq!(request(input), None, "the reference accepts, the head says {whole:?}");
        return;
    };
    let (expected_end, framing, method, fields) = request(input).expect("the reference refuses");
    assert_eq!((end, head.framing(), head.method()), (expected_end, framing, method.as_str()));
    assert!(head.target() == "*" || head.target().starts_with('/'));
    for (name, _) in &fields {
        // Read through every accessor; the first of a name is what `field` gives, if it passes at all.
        if let Some(value) = head.field(name).filter(|_| name != "host") {
            assert_eq!(
                Some(value),
                fields.iter().find(|field| field.0 == *name).map(|field| field.1.as_slice())
            );
        }
    }

    for out in [OutFraming::AsReceived, OutFraming::Length(7), OutFraming::Chunked] {
        let upstream = UpstreamHead { prefix: "", framing: out, extra: &[] };
        let mut written = Vec::new();
        head.write_upstream(&mut written, &upstream);
        let mut again = RequestHead::default();
        let sizes = written.len();
        match again.parse(&written) {
            Ok(Some(end)) => assert_eq!(end, sizes, "more or less than one head was written"),
            // The head may grow by what every HTTP/1.1 head must have.
            verdict => {
                assert!(end > 127 * 1024 || fields.len() > 126, "{verdict:?} for what was written");
                continue;
            }
        }
        let expected = match out {
            OutFraming::Length(length) => RequestFraming::Length(length),
            OutFraming::Chunked => RequestFraming::Chunked,
            _ => framing,
        };
        assert_eq!(again.framing(), expected);
        assert_eq!((again.method(), again.target()), (head.method(), head.target()));
        assert_eq!((again.path(), again.query()), (head.path(), head.query()));
        assert_eq!(again.content_type(), head.content_type());
        assert_eq!(again.field("authorization"), head.field("authorization"));
        if out == OutFraming::AsReceived {
            assert_eq!(again.upgrade(), head.upgrade());
        }
        let mut rewritten = Vec::new();
        again.write_upstream(&mut rewritten, &UpstreamHead { framing: OutFraming::AsReceived, ..upstream });
        assert_eq!(written, rewritten, "writing is not stable");
    }
}

/// Holds the response head against itself: any split, and written and read again; and its lines against the
/// reference.
pub(crate) fn check_response(input: &[u8], cuts: &[usize], to_head: bool) {
    let mut head = ResponseHead::default();
    let split = grow(input, cuts, &Ok(None), |prefix| head.parse(prefix, to_head));
    let mut head = ResponseHead::default();
    let whole = head.parse(input, to_head);
    assert_eq!(split, whole, "a split changes the verdict");
    let legal = response_is_legal(input);
    let Ok(Some(end)) = whole else {
        assert_eq!(legal, None, "the reference accepts, the head says {whole:?}");
        return;
    };
    assert_eq!(legal, Some(end), "the reference refuses");
    for keep_alive in [false, true] {
        let version = Version::Http11;
        let out = DownstreamHead { version, framing: OutFraming::AsReceived, keep_alive, extra: &[] };
        let mut written = Vec::new();
        head.write_downstream(&mut written, &out);
        let mut again = ResponseHead::default();
        match again.parse(&written, to_head) {
            Ok(Some(end)) => assert_eq!(end, written.len(), "more or less than one head was written"),
            verdict => {
                let fields = input[..end].iter().filter(|&&byte| byte == b'\n').count();
                assert!(end > 1020 * 1024 || fields > 255, "{verdict:?} for what was written");
                continue;
            }
        }
        assert_eq!((again.status(), again.framing()), (head.status(), head.framing()));
        assert_eq!(again.content_type(), head.content_type());
        assert_eq!(again.is_event_stream(), head.is_event_stream());
        assert_eq!(again.upgrade(), head.upgrade());
        let mut rewritten = Vec::new();
        again.write_downstream(&mut rewritten, &out);
        assert_eq!(written, rewritten, "writing is not stable");
    }
}

/// The end of a response head that is complete, legal and within all bounds.
fn response_is_legal(input: &[u8]) -> Option<usize> {
    let first = line(input, 0)?;
    let mut at = first.len() + 2;
    let (start, status) = first.split_at_checked(9)?;
    if !matches!(start, b"HTTP/1.1 " | b"HTTP/1.0 ") {
        return None;
    }
    let (code, reason) = status.split_at_checked(3)?;
    let code_is_legal = code.iter().all(u8::is_ascii_digit) && code.first() != Some(&b'0');
    if !code_is_legal || !(reason.is_empty() || reason.starts_with(b" ")) || !is_value(reason) {
        return None;
    }
    let (mut lengths, mut codings, mut fields, mut names) = (0, 0, 0, 0);
    loop {
        let line = line(input, at)?;
        at += line.len() + 2;
        if line.is_empty() {
            break;
        }
        let (name, value) = field(line)?;
        fields += 1;
        match name.as_str() {
            "content-length" => {
                lengths += 1;
                let text = std::str::from_utf8(&value)
                    .ok()
                    .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
                text.parse::<u64>().ok().filter(|&length| length <= 1 << 63)?;
            }
            "transfer-encoding" => {
                codings += 1;
                (value.eq_ignore_ascii_case(b"chunked") && start == b"HTTP/1.1 ").then_some(())?;
            }
            "connection" => {
                let known = ["", "close", "keep-alive", "upgrade", "authorization", "x-request-id"];
                names += value
                    .split(|&byte| byte == b',')
                    .filter(|n| {
                        !known.contains(&String::from_utf8_lossy(n.trim_ascii()).to_lowercase().as_str())
                    })
                    .count();
            }
            _ => {}
        }
    }
    (lengths + codings <= 1 && at <= 1 << 20 && fields <= 256 && names <= 128).then_some(at)
}
