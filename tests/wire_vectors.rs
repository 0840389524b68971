//! Raw HTTP/1.1 vectors through the whole proxy: llhttp's, gunicorn's and our own.
//!
//! Whatever a vector is, no worker may see two requests where it holds one, or a body that it does not hold;
//! what the vector holds is found by the harness's own strict reader. Beyond that the verdicts hold: `reject`
//! reaches no worker, our own vectors get the answers written in them.
//!
//! The vectors are data beside the project (see its README); `VLLM_PROXY_CORPORA` names their folder.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use base64::Engine;
use serde_json::Value;

use crate::support::{
    Client, Proxy, Variant, Worker, answer,
    client::End,
    eventually,
    head::{self, Body, Framing},
    json_answer, patience, proxy, script, variants, worker,
};

/// Groups that run at the same time, each with a worker and a proxy of its own: most of the time is silence.
const GROUPS: usize = 8;

/// After so long without a byte nothing more is expected.
const SILENCE: Duration = Duration::from_millis(300);

/// Vectors up to this size are also sent byte by byte.
const SPLIT_BYTES: usize = 4096;

#[derive(Debug, Clone)]
struct Vector {
    id: String,
    row: Value,
    raw: Vec<u8>,
}

/// The folder of the vectors.
fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("VLLM_PROXY_CORPORA") {
        return folder.into();
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = here.ancestors().map(|above| above.join("shared/corpora")).find(|folder| folder.is_dir());
    found.unwrap_or_else(|| {
        panic!(
            "no shared/corpora beside {} or above; VLLM_PROXY_CORPORA must name the folder",
            here.display()
        )
    })
}

fn vectors(file: &str, kind: &str) -> Vec<Vector> {
    let path = folder().join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a row is JSON"));
    let vectors: Vec<Vector> = rows
        .filter(|row| row["kind"] == kind)
        .map(|row| {
            let raw =
                base64::engine::general_purpose::STANDARD.decode(row["raw_b64"].as_str().unwrap()).unwrap();
            Vector { id: row["id"].as_str().unwrap().to_owned(), row, raw }
        })
        .collect();
    assert!(vectors.len() > 80, "{} holds only {} vectors", path.display(), vectors.len());
    vectors
}

/// What a strict reader finds in the bytes of a connection: method and body of each complete request.
fn held(raw: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut rest = raw.to_vec();
    let mut found = Vec::new();
    loop {
        while rest.starts_with(b"\r\n") {
            rest.drain(..2);
        }
        let Some(end) = head::head_end(&rest) else { return found };
        let head: Vec<u8> = rest.drain(..end).collect();
        let Ok((start, headers)) = head::parse(&head) else { return found };
        let Ok(framing) = head::declared(&headers) else { return found };
        let mut body = Body::new(if framing == Framing::UntilClose { Framing::None } else { framing });
        if body.take(&mut rest).is_err() || !body.complete {
            return found;
        }
        found.push((start.split(' ').next().unwrap_or_default().to_owned(), body.decoded));
    }
}

/// What came back for a vector.
struct Outcome {
    statuses: Vec<u64>,
    closed: bool,
    /// Whether the bytes went out one by one.
    split: bool,
    /// Method and body of what the worker got complete.
    got: Vec<(String, Vec<u8>)>,
}

fn play(proxy: &Proxy, worker: &Worker, vector: &Vector, split: bool) -> Outcome {
    worker.forget();
    let mut client = proxy.client();
    if split {
        client.send_bytewise(&vector.raw);
    } else {
        client.try_send(&vector.raw);
    }
    let mut statuses = Vec::new();
    let method =
        String::from_utf8_lossy(&vector.raw).trim_start().split(' ').next().unwrap_or_default().to_owned();
    // only the own vector of a body that stops has an answer that comes late
    let limit = if vector.id == "own/truncated-cl" || vector.id == "own/extra-after-body" {
        patience()
    } else {
        SILENCE
    };
    let closed = loop {
        match client.try_response_to(&method, limit) {
            Ok(answer) => {
                statuses.push(u64::from(answer.status));
                assert!(statuses.len() < 20, "{} is answered without end", vector.id);
            }
            Err((End::Silence, rest)) => {
                assert!(rest.is_empty(), "{}: half an answer: {}", vector.id, rest.escape_ascii());
                break false;
            }
            Err(_) => break true,
        }
    };
    if !closed && vector.row["expect_connection"] == "keep" {
        assert_eq!(client.get("/health").status, 200, "{}: the connection does not go on", vector.id);
    }
    drop(client);
    eventually("the vector's requests have ended", || worker.open_connections() <= 1);
    let got = worker.complete_requests().into_iter().map(|got| (got.method, got.body)).collect();
    Outcome { statuses, closed, split, got }
}

/// Runs `check` over the vectors, whole and split, in groups; what it complains of fails the test.
fn run(v: Variant, vectors: &[Vector], check: fn(&Vector, &Outcome) -> Result<(), String>) {
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for group in 0..GROUPS {
            let wrong = &wrong;
            scope.spawn(move || {
                let worker = worker()
                    .may_be_sent_nonsense()
                    .on_request("*", |request| {
                        let odd = request.target.contains("..") || request.target.contains("%2f");
                        let unknown = answer("404 Not Found", "application/json", "", r#"{"detail":"Not Found"}"#);
                        script().send(if odd { unknown } else { json_answer("{}") })
                    })
                    .start();
                let proxy = proxy(v)
                    .worker(&worker)
                    .arg("--head-timeout-secs", "4")
                    .arg("--body-timeout-secs", "4")
                    .arg("--health-check-interval-secs", "3600")
                    .arg("--model-refresh-secs", "3600")
                    .start();
                let mine = vectors.iter().skip(group).step_by(GROUPS);
                for vector in mine {
                    for split in [false, true] {
                        if split && vector.raw.len() > SPLIT_BYTES {
                            continue;
                        }
                        let judge = || {
                            let outcome = play(&proxy, &worker, vector, split);
                            let sound = never_more_than_held(vector, &outcome, &worker);
                            (sound.and_then(|()| check(vector, &outcome)), outcome)
                        };
                        // on a machine that is very busy a request of the vector before may come late and be
                        // counted here; a real fault shows again
                        let (mut verdict, mut outcome) = judge();
                        if verdict.is_err() {
                            (verdict, outcome) = judge();
                        }
                        if let Err(why) = verdict {
                            let got: Vec<_> = outcome.got.iter().map(|(method, _)| method).collect();
                            wrong.lock().unwrap().push(format!(
                                "{} (split: {split}): {why}; answers {:?}, closed {}, worker got {got:?}\n    {}",
                                vector.id,
                                outcome.statuses,
                                outcome.closed,
                                vector.raw[..vector.raw.len().min(300)].escape_ascii()
                            ));
                        }
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// The rule above all: a worker sees the vector's requests, or fewer, and nothing that is not HTTP.
fn never_more_than_held(vector: &Vector, outcome: &Outcome, worker: &Worker) -> Result<(), String> {
    if let Some(nonsense) = worker.malformed().first() {
        return Err(format!("the worker was sent nonsense: {nonsense}"));
    }
    let held = held(&vector.raw);
    if !held.starts_with(&outcome.got) {
        return Err(format!("the worker got {:?} where the vector holds {held:?}", outcome.got));
    }
    Ok(())
}

fn own(vector: &Vector, outcome: &Outcome) -> Result<(), String> {
    let expected: Vec<u64> =
        vector.row["expect_status"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    let upstream = vector.row["expect_upstream_requests"].as_u64();
    // the same answer as the worker asked directly: with a mock only the rest can be checked
    let judged_by_vllm = vector.id.starts_with("own/body-");
    // forwarded verbatim, never to the admin endpoints
    let verbatim = vector.id == "own/path-dotdot";
    // answered by us
    let ours = vector.raw.starts_with(b"GET /v1/models ");
    if judged_by_vllm {
        if outcome.statuses.len() != 1 {
            return Err("not one answer".to_owned());
        }
    } else if vector.row["status_is"] == "sequence" {
        let late = vector.id == "own/extra-after-body" && outcome.statuses == [200, 408];
        if outcome.statuses != expected && !late {
            return Err(format!("expected {expected:?}"));
        }
    } else if outcome.statuses.len() != 1 || !expected.contains(&outcome.statuses[0]) {
        return Err(format!("expected one of {expected:?}"));
    }
    if let Some(upstream) = upstream
        && !judged_by_vllm
        && !verbatim
        && outcome.got.len() as u64 != if ours { 0 } else { upstream }
    {
        return Err(format!("expected {upstream} upstream"));
    }
    match vector.row["expect_connection"].as_str() {
        Some("close") if !outcome.closed => Err("the connection was kept".to_owned()),
        // an answer of ours may come before the body has, and then ends the connection
        Some("keep") if outcome.closed && !(ours && outcome.split) => {
            Err("the connection was closed".to_owned())
        }
        _ => Ok(()),
    }
}

/// What of `reject` may still reach a worker, and why.
fn excused(vector: &Vector) -> Option<&'static str> {
    let detail = vector.row["detail"].as_str().unwrap_or_default();
    if detail.contains("Data after `Connection: close`") {
        return Some("the first request is answered, the rest dropped with the connection");
    }
    if detail.contains("LimitRequest") {
        return Some("our limits are vLLM's, not gunicorn's");
    }
    if detail.contains("InvalidRequestMethod") || detail.contains("method") {
        return Some("well-formed methods are passed on");
    }
    match &vector.id[..] {
        "gunicorn/invalid/041" => Some("two Content-Types frame nothing; the worker judges them"),
        _ => None,
    }
}

fn foreign(vector: &Vector, outcome: &Outcome) -> Result<(), String> {
    let strict = vector.row["lenient"] != true && vector.row["cfg"].as_array().is_none_or(Vec::is_empty);
    if vector.row["verdict"] == "reject" && strict && !outcome.got.is_empty() && excused(vector).is_none() {
        return Err(format!("rejected by its authors: {}", vector.row["detail"]));
    }
    Ok(())
}

variants! {
    fn own_vectors_get_the_answers_written_in_them(v: Variant) {
        run(v, &vectors("own_edge_vectors.jsonl", "request"), own);
    }

    fn what_llhttp_rejects_reaches_no_worker_and_nothing_is_smuggled(v: Variant) {
        run(v, &vectors("llhttp_vectors.jsonl", "request"), foreign);
    }

    fn what_gunicorn_rejects_reaches_no_worker_and_nothing_is_smuggled(v: Variant) {
        let mut vectors = vectors("gunicorn_requests.jsonl", "request");
        vectors.retain(|vector| !vector.row["cfg"].to_string().contains("proxy_protocol"));
        run(v, &vectors, foreign);
    }

    fn what_llhttp_rejects_of_a_worker_is_a_502(v: Variant) {
        let bytes = Arc::new(Mutex::new((Vec::new(), false)));
        let sent = bytes.clone();
        let worker = worker().on_request("/vector", move |_| {
            let (bytes, split) = sent.lock().unwrap().clone();
            if split { script().send_bytewise(bytes).close() } else { script().send(bytes).close() }
        }).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut wrong = Vec::new();
        for vector in vectors("llhttp_vectors.jsonl", "response") {
            for split in [false, true] {
                *bytes.lock().unwrap() = (vector.raw.clone(), split);
                let mut client = proxy.client();
                client.send(crate::support::client::request("GET", "/vector", "", b""));
                if let Err(why) = judge_answer(&vector, &mut client) {
                    wrong.push(format!("{} (split: {split}): {why}\n    {}\n    {}", vector.id,
                        vector.raw.escape_ascii(), client.seen.escape_ascii()));
                }
                // bytes behind the answer must be there when the connection is looked at again, not a moment later
                eventually("the worker has sent all", || worker.requests().iter().all(|got| got.answered || got.gone.is_some()));
                proxy.client().chat("m").expect(200);
            }
        }
        assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// An answer that llhttp accepts is relayed or 502; one that it rejects is 502, or cut where it went wrong.
fn judge_answer(vector: &Vector, client: &mut Client) -> Result<(), String> {
    let answer = loop {
        let answer = client.try_response_to("GET", patience()).map_err(|(end, _)| format!("{end:?}"))?;
        if answer.status >= 200 || answer.status == 101 {
            break answer;
        }
    };
    if answer.status == 502 {
        return Ok(());
    }
    // what follows an answer that said close is dropped with the connection, whatever it is
    let after_close = contains(&vector.raw, b"\r\nConnection: close\r\n");
    let rejected = vector.row["verdict"] == "reject" || vector.row["lenient"] == true;
    if rejected && !after_close && answer.complete {
        return Err(format!("rejected by its authors ({}), but relayed", vector.row["detail"]));
    }
    if answer.complete && !contains(&vector.raw, &answer.body) && answer.chunks.len() < 2 {
        return Err("the body is not the worker's".to_owned());
    }
    Ok(())
}

fn contains(whole: &[u8], part: &[u8]) -> bool {
    part.is_empty() || whole.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_reader_of_vectors_finds_what_is_there() {
    assert_eq!(
        held(b"GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhiX").len(),
        2
    );
    assert_eq!(
        held(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")[0].1,
        b"hi"
    );
    assert!(
        held(b"POST / HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
            .is_empty()
    );
}
