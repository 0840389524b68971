//! The vectors of llhttp, gunicorn and our own against the parsers, without sockets. They lie outside of the
//! repository: `VLLM_PROXY_CORPORA` names their folder, else it is `shared/corpora` beside the package or
//! beside one of the folders around it. `VLLM_PROXY_CORPORA=skip` skips them.

use std::path::{Path, PathBuf};

use base64::Engine;
use serde_json::Value;
use vllm_proxy::http::{
    ChunkTracker, DownstreamHead, OutFraming, RequestError, RequestFraming, RequestHead, ResponseFraming,
    ResponseHead, Version,
};

/// How a connection's bytes were read.
#[derive(Debug, Default, PartialEq)]
struct Reading {
    /// Requests or answers that were complete to the last byte of their body.
    complete: usize,
    /// What came after them was refused.
    refused: bool,
    /// Why, if a request head was.
    error: Option<RequestError>,
    /// The last complete message ends the connection: what follows is nobody's.
    closed: bool,
    /// Bytes of a message that is not complete.
    partial: bool,
}

fn folder() -> Option<PathBuf> {
    if let Some(set) = std::env::var_os("VLLM_PROXY_CORPORA") {
        return (set != "skip").then(|| PathBuf::from(set));
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = package.ancestors().map(|folder| folder.join("shared/corpora")).find(|path| path.is_dir());
    Some(found.unwrap_or_else(|| {
        panic!(
            "no shared/corpora beside {} or above: set VLLM_PROXY_CORPORA to it, or to `skip`",
            package.display()
        )
    }))
}

/// The rows of a file, and their bytes.
fn rows(file: &str) -> Vec<(Value, Vec<u8>)> {
    let Some(folder) = folder() else { return Vec::new() };
    let path = folder.join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let rows: Vec<_> = text
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).expect("a row is JSON");
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(row["raw_b64"].as_str().unwrap_or_default())
                .expect("raw_b64 is base64");
            (row, bytes)
        })
        .collect();
    assert!(rows.len() > 90, "{} has only {} rows", path.display(), rows.len());
    rows
}

/// Takes a body off the front of `rest`: how many bytes it has, or `None` if it is incomplete. `Err`: refused.
fn body(rest: &[u8], length: Option<u64>) -> Result<Option<usize>, ()> {
    match length {
        Some(length) => Ok(usize::try_from(length).ok().filter(|length| *length <= rest.len())),
        None => {
            let tracked = ChunkTracker::new().track(rest).map_err(|_| ())?;
            Ok(tracked.done.then_some(tracked.consumed))
        }
    }
}

fn read_requests(input: &[u8]) -> Reading {
    let (mut reading, mut head, mut rest) = (Reading::default(), RequestHead::default(), input);
    while !rest.is_empty() {
        let end = match head.parse(rest) {
            Ok(Some(end)) => end,
            Ok(None) => {
                reading.partial = rest != b"\r\n";
                break;
            }
            Err(error) => {
                (reading.refused, reading.error) = (true, Some(error));
                break;
            }
        };
        let length = match head.framing() {
            RequestFraming::Length(length) => Some(length),
            RequestFraming::Chunked => None,
        };
        match body(&rest[end..], length) {
            Ok(Some(body)) => rest = &rest[end + body..],
            Ok(None) => {
                reading.partial = true;
                break;
            }
            Err(()) => {
                reading.refused = true;
                break;
            }
        }
        reading.complete += 1;
        reading.closed = !head.keep_alive();
        if reading.closed || head.upgrade().is_some() {
            break;
        }
    }
    reading
}

fn read_responses(input: &[u8]) -> Reading {
    let (mut reading, mut head, mut rest) = (Reading::default(), ResponseHead::default(), input);
    while !rest.is_empty() {
        let end = match head.parse(rest, false) {
            Ok(Some(end)) => end,
            Ok(None) => {
                reading.partial = true;
                break;
            }
            Err(_) => {
                reading.refused = true;
                break;
            }
        };
        let length = match head.framing() {
            ResponseFraming::None => Some(0),
            ResponseFraming::Length(length) => Some(length),
            ResponseFraming::Chunked => None,
            ResponseFraming::UntilClose => Some(rest.len() as u64 - end as u64),
        };
        match body(&rest[end..], length) {
            Ok(Some(body)) => rest = &rest[end + body..],
            Ok(None) => {
                reading.partial = true;
                break;
            }
            Err(()) => {
                reading.refused = true;
                break;
            }
        }
        reading.complete += 1;
        reading.closed = !head.keep_alive();
        if reading.closed {
            break;
        }
    }
    reading
}

#[test]
fn own_vectors_have_the_verdict_that_is_written_there() {
    for (row, bytes) in rows("own_edge_vectors.jsonl") {
        let id = row["id"].as_str().unwrap();
        let reading = read_requests(&bytes);
        let statuses: Vec<u64> =
            row["expect_status"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
        let status_of = |error: RequestError| match error {
            RequestError::Malformed => 400,
            RequestError::HeadTooLarge | RequestError::TooManyFields => 431,
            RequestError::TargetTooLong => 414,
            RequestError::Version => 505,
            RequestError::Method => 405,
        };
        if let Some(error) = reading.error {
            assert!(statuses.contains(&status_of(error)), "{id}: {error:?}, expected one of {statuses:?}");
        }
        // What the application refuses is none of this layer's business.
        if id.starts_with("own/body-") || id.starts_with("own/path-") {
            assert!(!reading.refused && reading.complete == 1, "{id}: {reading:?}");
        } else if let Some(requests) = row["expect_upstream_requests"].as_u64() {
            assert_eq!(reading.complete as u64, requests, "{id}: {reading:?}");
            let refused = statuses.iter().any(|status| matches!(status, 400 | 405 | 414 | 431 | 505));
            let short = matches!(id, "own/truncated-cl" | "own/chunk-trailer-cl");
            assert!(reading.refused == refused || (short && reading.partial), "{id}: {reading:?}");
        }
        if row["expect_connection"] == "keep" {
            assert!(!reading.closed, "{id}: {reading:?}");
        }
    }
}

/// What llhttp and gunicorn refuse and we, on purpose, do not.
fn may_complete(id: &str, detail: &str) -> bool {
    // The first request is answered, the rest goes with the connection.
    detail.contains("Data after `Connection: close`")
        // Well-formed method tokens are the worker's business.
        || detail.contains("Expected space after method")
        || id.ends_with("/003c")
}

#[test]
fn what_llhttp_and_gunicorn_refuse_never_becomes_a_complete_request() {
    let (mut seen, mut refused) = (0, 0);
    for (row, bytes) in [rows("llhttp_vectors.jsonl"), rows("gunicorn_requests.jsonl")].concat() {
        let (id, detail) = (row["id"].as_str().unwrap(), row["detail"].as_str().unwrap_or_default());
        let reject = row["verdict"] == "reject" && row["kind"] == "request";
        let plain = row["lenient"] != true && row["cfg"].as_array().is_none_or(Vec::is_empty);
        // gunicorn's limits are smaller than ours, and two equal content types are no danger.
        let ours = !detail.starts_with("Limit") && !id.ends_with("/041");
        if !(reject && plain && ours) || may_complete(id, detail) {
            continue;
        }
        let reading = read_requests(&bytes);
        seen += 1;
        refused += usize::from(reading.refused);
        assert_eq!(reading.complete, 0, "{id} ({detail}): {reading:?} {:?}", String::from_utf8_lossy(&bytes));
        assert!(reading.refused || reading.partial, "{id}: {reading:?}");
    }
    if folder().is_some() {
        assert!(seen > 80 && refused * 10 > seen * 7, "{refused} of {seen} were refused outright");
    }
}

#[test]
fn what_llhttp_and_gunicorn_accept_is_served_or_refused_by_a_rule_of_ours() {
    let mut served = 0;
    for (row, bytes) in [rows("llhttp_vectors.jsonl"), rows("gunicorn_requests.jsonl")].concat() {
        let id = row["id"].as_str().unwrap();
        let plain = row["lenient"] != true && row["cfg"].as_array().is_none_or(Vec::is_empty);
        if row["verdict"] != "accept" || row["kind"] != "request" || !plain {
            continue;
        }
        // Most vectors lack a Host. With one, only the stricter rules of corpora/README are left.
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        let with_host = if text.contains("\nhost:") { bytes.clone() } else { add_hosts(&bytes) };
        let reading = read_requests(&with_host);
        served += reading.complete;
        let first = text.trim_start().lines().next().unwrap_or_default();
        let coding = text.lines().any(|line| {
            line.starts_with("transfer-encoding:") && line.trim() != "transfer-encoding: chunked"
        });
        let stricter = coding
            || !(first.ends_with("http/1.1") || first.ends_with("http/1.0"))
            || first.starts_with("connect ")
            || !bytes.split(|&byte| byte == b'\n').next().unwrap_or_default().is_ascii()
            || first.contains('@')
            // `*` and PRI are legal for other methods only in other protocols.
            || (first.contains(" * ") && !first.starts_with("options"));
        assert!(!reading.refused || stricter, "{id}: {reading:?} {:?}", String::from_utf8_lossy(&with_host));
        let heads = bytes.windows(5).filter(|window| window == b"HTTP/").count();
        assert!(reading.complete <= heads, "{id}: {reading:?} but {heads} request lines");
    }
    if folder().is_some() {
        assert!(served > 60, "only {served} requests were served");
    }
}

/// Puts a Host after every request line of HTTP/1.1.
fn add_hosts(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        out.extend_from_slice(line);
        if line.ends_with(b" HTTP/1.1\r\n") {
            out.extend_from_slice(b"Host: x\r\n");
        }
    }
    out
}

#[test]
fn answers_that_llhttp_refuses_are_refused_and_those_it_accepts_are_read_or_refused_by_a_rule_of_ours() {
    let (mut read, mut refused) = (0, 0);
    for (row, bytes) in rows("llhttp_vectors.jsonl") {
        if row["kind"] != "response" || row["lenient"] == true {
            continue;
        }
        let (id, detail) = (row["id"].as_str().unwrap(), row["detail"].as_str().unwrap_or_default());
        let reading = read_responses(&bytes);
        if row["verdict"] == "reject" {
            let rest_is_dropped = detail.contains("Data after `Connection: close`") && reading.closed;
            assert!(reading.refused || reading.partial || rest_is_dropped, "{id}: {reading:?}");
            assert!(reading.complete == 0 || rest_is_dropped, "{id}: {reading:?}");
            refused += 1;
        } else {
            let text = String::from_utf8_lossy(&bytes).to_lowercase();
            let stricter = !text.starts_with("http/1.")
                || text.lines().any(|line| line.starts_with("transfer-encoding:") && line != "transfer-encoding: chunked")
                // Bytes after an answer; llhttp takes them for the next one.
                || reading.complete > 0;
            assert!(!reading.refused || stricter, "{id}: {reading:?}");
            read += usize::from(!reading.refused);
        }
    }
    if folder().is_some() {
        assert!(read > 30 && refused > 15, "{read} read, {refused} refused");
    }
}

#[test]
fn no_vector_reads_differently_when_it_is_split() {
    use crate::reference::{check_request, check_response};
    for (row, bytes) in
        [rows("llhttp_vectors.jsonl"), rows("gunicorn_requests.jsonl"), rows("own_edge_vectors.jsonl")]
            .concat()
    {
        let cuts: &[usize] = if bytes.len() <= 4096 { &[1] } else { &[977, 1461] };
        if row["kind"] == "response" {
            check_response(&bytes, cuts, false);
        } else {
            check_request(&bytes, cuts);
        }
    }
}

#[test]
fn the_heads_of_a_real_vllm_pass_unchanged() {
    let Some(folder) = folder() else { return };
    let golden = folder.join("../real-vllm/golden");
    let sets = std::fs::read_dir(&golden).unwrap_or_else(|error| panic!("{}: {error}", golden.display()));
    let files = sets.flatten().flat_map(|set| std::fs::read_dir(set.path()).into_iter().flatten().flatten());
    let mut seen = 0;
    for path in files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|end| end == "resp"))
    {
        let bytes = std::fs::read(&path).expect("a golden file can be read");
        let (mut head, mut rest) = (ResponseHead::default(), bytes.as_slice());
        while let Ok(Some(end)) = head.parse(rest, false) {
            let out = DownstreamHead {
                version: Version::Http11,
                framing: OutFraming::AsReceived,
                keep_alive: head.keep_alive(),
                extra: &[],
            };
            let mut written = Vec::new();
            head.write_downstream(&mut written, &out);
            // What is said about the connection is about ours, so it may stand elsewhere.
            let passed = |bytes: &[u8]| {
                let text = String::from_utf8_lossy(bytes).into_owned();
                let lines = text.split_inclusive("\r\n").map(str::to_owned);
                lines.filter(|line| !line.to_lowercase().starts_with("connection:")).collect::<String>()
            };
            assert_eq!(passed(&written), passed(&rest[..end]), "{}", path.display());
            rest = &rest[end..];
            seen += 1;
            if head.status() >= 200 {
                break;
            }
        }
        assert!(head.status() >= 200 || bytes.is_empty(), "{} has no answer we read", path.display());
    }
    assert!(seen > 100, "only {seen} heads");
}
