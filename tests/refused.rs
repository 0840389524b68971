//! Requests that never reach a worker: what is not HTTP, what is too large, what comes too slowly.

use crate::support::{Client, client, eventually, proxy, variants, worker};

/// What is damaged, and the bytes (`faults.md` §2.1).
fn illegal() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut head = |name: &str, lines: &str| {
        all.push((
            name.to_owned(),
            format!("POST /e HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\nhello").into_bytes(),
        ));
    };
    for value in [
        "+5",
        "-5",
        "0x5",
        "5_0",
        "5 5",
        "",
        "five",
        "9223372036854775809",
        "5,5",
        "5, 6",
        "5;",
        "\"5\"",
        "5.0",
    ] {
        head(&format!("content-length {value:?}"), &format!("Content-Length: {value}"));
    }
    head("two lengths", "Content-Length: 5\r\ncontent-length: 6");
    head("two equal lengths", "Content-Length: 5\r\nContent-Length: 5");
    head("length and coding", "Content-Length: 5\r\nTransfer-Encoding: chunked");
    head("coding and length", "tRANSFER-eNCODING: cHUNKED\r\ncONTENT-lENGTH: 5");
    for value in [
        "gzip",
        "gzip, chunked",
        "chunked, gzip",
        "chunked, chunked",
        "identity",
        "\"chunked\"",
        "chunked,",
        ",chunked",
        "chunked;q=1",
        "xchunked",
        "chunked x",
        "",
        ",",
        "chunked\u{b}",
    ] {
        head(&format!("transfer-encoding {value:?}"), &format!("Transfer-Encoding: {value}"));
    }
    head("two codings", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked");
    head("space before the colon", "Content-Length : 5");
    head("tab before the colon", "X-A\t: 5");
    head("obs-fold", "X-A: 1\r\n 2");
    head("obs-fold of a length", "Content-Length:\r\n 5");
    head("no colon", "X-A");
    head("no name", ": 1");
    head("space before a name", " X-A: 1");
    head("two hosts", "Host: b");
    head("lf", "X-A: 1\nX-B: 2");
    head("cr", "X-A: 1\rX-B: 2");
    head("cr at the end", "X-A: 1\r");
    for byte in (0..=8).chain(11..=12).chain(14..=31).chain([127]) {
        let byte = char::from(byte);
        head(&format!("{byte:?} in a value"), &format!("X-A: a{byte}b"));
        head(&format!("{byte:?} in a name"), &format!("X{byte}A: b"));
        head(&format!("{byte:?} before a coding"), &format!("Transfer-Encoding:{byte}chunked"));
        head(&format!("{byte:?} after a coding"), &format!("Transfer-Encoding: chunked{byte}"));
        head(&format!("{byte:?} before the name of a coding"), &format!("{byte}Transfer-Encoding: chunked"));
    }
    for name in ["X A", "X(A", "X\"A", "X/A", "X@A", "X{A", "X\u{e9}A"] {
        head(&format!("name {name}"), &format!("{name}: 1"));
    }
    for line in [
        "GET / HTTP/1.2",
        "GET / HTTP/2.0",
        "GET / HTTP/0.9",
        "GET / http/1.1",
        "GET / HTTP/1.1 ",
        "GET /",
        "GET  / HTTP/1.1",
        " GET / HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET * HTTP/1.1",
        "GET a HTTP/1.1",
        "G@T / HTTP/1.1",
        "/ HTTP/1.1",
        "GET / HTTP/1.1x",
        "GET /\u{1} HTTP/1.1",
        "GET /\u{7f} HTTP/1.1",
        "GET\t/ HTTP/1.1",
        "GET / HTTP/1.10",
        "GET /\u{e9} HTTP/1.1",
        "PRI * HTTP/2.0",
    ] {
        all.push((format!("line {line:?}"), format!("{line}\r\nHost: a\r\n\r\n").into_bytes()));
    }
    all.push(("no host".to_owned(), b"GET / HTTP/1.1\r\n\r\n".to_vec()));
    all.push(("host with userinfo".to_owned(), b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".to_vec()));
    all.push(("host with a path".to_owned(), b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".to_vec()));
    all.push((
        "chunked in 1.0".to_owned(),
        b"POST /e HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
    ));
    all.push(("bare lf".to_owned(), b"GET / HTTP/1.1\nHost: a\n\n".to_vec()));
    all.push(("tls".to_owned(), b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03".to_vec()));
    all.push((
        "cr cr lf".to_owned(),
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\r\nGET /evil HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
    ));
    for body in [
        "+1\r\na\r\n0\r\n\r\n",
        "-1\r\n",
        "0x1\r\na\r\n0\r\n\r\n",
        "1_0\r\na\r\n",
        "\r\n",
        " 1\r\na\r\n0\r\n\r\n",
        "1 \r\na\r\n0\r\n\r\n",
        "1\na\r\n0\r\n\r\n",
        "1\r\naX\r\n0\r\n\r\n",
        "1\r\nab\r\n0\r\n\r\n",
        "11111111111111111\r\n",
        "g\r\n",
        "1;a\nb\r\na\r\n0\r\n\r\n",
        "1;a=\"b\r\na\r\n0\r\n\r\n",
        "1;a\u{1}\r\na\r\n0\r\n\r\n",
        "0\r\nContent-Length: 1\r\n\r\n",
        "0\r\nTransfer-Encoding: x\r\n\r\n",
        "0\r\nHost: b\r\n\r\n",
        "0\r\nX A: b\r\n\r\n",
        "0\r\n X: b\r\n\r\n",
        "0\nX: b\r\n\r\n",
    ] {
        let head = "POST /e HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        all.push((format!("chunks {body:?}"), format!("{head}{body}").into_bytes()));
    }
    let long = format!("1;{}\r\na\r\n0\r\n\r\n", "a".repeat(5000));
    all.push((
        "5 KB of extension".to_owned(),
        format!("POST /e HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{long}").into_bytes(),
    ));
    all
}

variants! {
    fn what_is_not_http_is_refused_as_vllm_does_and_never_reaches_a_worker(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut wrong = Vec::new();
        for (name, bytes) in illegal() {
            worker.forget();
            let mut client = proxy.client();
            client.try_send(&bytes);
            let answer = match client.try_response_to("GET", crate::support::patience()) {
                Ok(answer) => answer,
                Err(end) => {
                    wrong.push(format!("{name}: {end:?}"));
                    continue;
                }
            };
            let fine = match answer.status {
                400 => answer.text() == "Invalid HTTP request received."
                    && answer.header("content-type").as_deref() == Some("text/plain; charset=utf-8")
                    && answer.header("connection").as_deref() == Some("close"),
                501 => name.starts_with("transfer-encoding"),
                505 => name.starts_with("line"),
                _ => false,
            };
            if !fine {
                wrong.push(format!("{name}: {answer}"));
            }
            client.expect_closed();
            if worker.requests().iter().any(|got| got.complete) {
                wrong.push(format!("{name}: a worker got {:?}", worker.requests()));
            }
        }
        assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    }

    fn connect_and_trace_are_405(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        for bytes in ["CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n", "TRACE / HTTP/1.1\r\nHost: x\r\n\r\n"] {
            let mut client = proxy.client();
            client.send(bytes);
            assert_eq!(client.response().status, 405, "{bytes}");
        }
        assert!(worker.requests().is_empty());
    }

    fn garbage_after_a_request_is_refused_after_its_answer(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send([&client::request("POST", "/e", "", b"hi")[..], b"XX XX\r\n\r\n"].concat());
        assert_eq!(client.response().expect(200).text(), "hi");
        assert_eq!(client.response().status, 400);
        client.expect_closed();
        assert_eq!(worker.only_request().body, b"hi");
    }

    fn a_body_over_the_limit_is_413_in_vllms_shape_before_it_is_read(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).arg("--max-body-bytes", "100000").start();
        assert_eq!(proxy.client().request("POST", "/e", "", &[b'x'; 100_000]).expect(200).body.len(), 100_000);
        worker.forget();
        let mut client = proxy.client();
        client.send("POST /e HTTP/1.1\r\nHost: a\r\nContent-Length: 100001\r\n\r\n");
        too_large(&mut client);
        let mut client = proxy.client();
        client.send("POST /e HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n186a1\r\n");
        client.try_send([b'x'; 100_001]);
        too_large(&mut client);
        let mut client = proxy.client();
        client.send("POST /e HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        for _ in 0..12 {
            client.try_send([&b"2710\r\n"[..], &[b'x'; 10_000], b"\r\n"].concat());
        }
        too_large(&mut client);
        assert!(worker.complete_requests().is_empty());
    }

    fn a_head_that_is_too_large_is_431_or_414(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let large = format!("X-Large: {}\r\n", "a".repeat(70_000));
        client.request("POST", "/e", &large, b"as vLLM takes it").expect(200);
        let many: String = (0..120).map(|number| format!("X-{number}: 1\r\n")).collect();
        client.request("POST", "/e", &many, b"").expect(200);
        worker.forget();
        let too_many: String = (0..200).map(|number| format!("X-{number}: 1\r\n")).collect();
        for (status, bytes) in [
            (431, format!("GET / HTTP/1.1\r\nHost: a\r\n{too_many}\r\n")),
            (431, format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(200_000))),
            (431, format!("GET / HTTP/1.1\r\nHost: a\r\n{}", "X: 123456789\r\n".repeat(100_000))),
            (414, format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(1_000_000))),
        ] {
            let mut client = proxy.client();
            client.try_send(bytes);
            let answer = client.response();
            assert_eq!(answer.status, status, "{answer}");
            client.expect_closed();
        }
        assert!(worker.requests().is_empty());
    }

    fn a_head_that_comes_too_slowly_is_408(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).arg("--head-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.send("POST /e HTTP/1.1\r\nHost: a\r\nX-Slow: ");
        assert_eq!(client.response().status, 408);
        client.expect_closed();
        // bytes that trickle in do not buy time
        let mut client = proxy.client();
        client.send("POST /e HTTP/1.1\r\n");
        eventually("it is cut although it never pauses", || {
            client.try_send("X: y\r\n");
            client.fill(std::time::Duration::from_millis(50)).is_ok() || client.seen.len() > 12
        });
        assert!(client.seen.starts_with(b"HTTP/1.1 408 "), "{}", client.seen.escape_ascii());
        // the second request of a connection has the same time
        let mut client = proxy.client();
        client.request("POST", "/e", "", b"hi").expect(200);
        client.send("POST /e HTT");
        assert_eq!(client.response().status, 408);
        assert_eq!(worker.requests().len(), 1);
    }

    fn a_body_that_stops_is_408_and_never_a_whole_request(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).arg("--body-timeout-secs", "1").start();
        for framing in ["Content-Length: 100\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "Transfer-Encoding: chunked\r\n\r\n5\r\nhe"] {
            let mut client = proxy.client();
            client.send(format!("POST /e HTTP/1.1\r\nHost: a\r\n{framing}"));
            assert_eq!(client.response().status, 408, "{framing:?}");
            client.expect_closed();
        }
        assert!(worker.complete_requests().is_empty());
    }
}

fn too_large(client: &mut Client) {
    let answer = client.response();
    assert_eq!(answer.status, 413, "{answer}");
    let error = answer.json()["error"].clone();
    assert_eq!(error["code"], 413);
    assert!(error["param"].is_null() && error["message"].is_string(), "{answer}");
    let kind = error["type"].as_str().unwrap();
    assert!(matches!(kind, "Request Entity Too Large" | "Content Too Large"), "{answer}");
    assert_eq!(answer.header("content-type").as_deref(), Some("application/json"));
    client.expect_closed();
}
