//! Answers of workers that are not HTTP: 502, the worker's connection closed and never used again.

use crate::support::{Gate, client, json_answer, proxy, script, variants, worker};

/// `faults.md` §2.3, by name.
fn illegal() -> Vec<(&'static str, Vec<u8>)> {
    let ok = "HTTP/1.1 200 OK\r\n";
    let mut all: Vec<(&str, Vec<u8>)> = [
        ("cl-and-te", format!("{ok}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
        ("two-cl", format!("{ok}content-length: 5\r\ncontent-length: 6\r\n\r\nhello!")),
        ("bad-cl", format!("{ok}content-length: +5\r\n\r\nhello")),
        ("bad-te", format!("{ok}transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n")),
        ("status-line", "HTTP/1.1 OK\r\ncontent-length: 0\r\n\r\n".to_owned()),
        ("not-http", "SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned()),
        ("version", "HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned()),
        ("control", format!("{ok}x-a: a\x07b\r\ncontent-length: 0\r\n\r\n")),
        ("bare-lf", format!("{ok}x-a: a\nx-b: c\r\ncontent-length: 0\r\n\r\n")),
        ("name", format!("{ok}x a: b\r\ncontent-length: 0\r\n\r\n")),
        (
            "unasked-101",
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n".to_owned(),
        ),
        ("flood-of-1xx", "HTTP/1.1 102 Processing\r\n\r\n".repeat(20)),
        ("nothing-but-eof", String::new()),
        ("half-a-head", "HTTP/1.1 200 OK\r\ncontent-le".to_owned()),
    ]
    .map(|(name, bytes)| (name, bytes.into_bytes()))
    .into();
    all.push((
        "head-of-2-MiB",
        format!("{ok}x: {}\r\ncontent-length: 0\r\n\r\n", "a".repeat(2 << 20)).into_bytes(),
    ));
    all
}

variants! {
    fn an_illegal_answer_becomes_a_502_in_vllms_shape(v: Variant) {
        for (name, bytes) in illegal() {
            let worker = worker().on("/bad", script().send(&bytes).close()).start();
            let proxy = proxy(v).worker(&worker).start();
            let mut client = proxy.client();
            client.send(client::request("POST", "/bad", "", b"x"));
            let mut answer = client.response();
            while answer.status < 200 && answer.status != 101 {
                answer = client.response();
            }
            assert_eq!(answer.status, 502, "{name}: {answer}");
            let json = answer.json();
            assert_eq!((&json["error"]["type"], &json["error"]["code"]), (&"Bad Gateway".into(), &502.into()), "{name}");
            assert!(json["error"]["message"].is_string() && json["error"]["param"].is_null(), "{name}: {json}");
            // the client's connection goes on, and there is another one to the worker
            assert_eq!(client.chat("m").expect(200).completion(), "ok", "{name}");
            let got = worker.requests();
            assert_ne!(got.first().unwrap().connection, got.last().unwrap().connection, "{name}: reused");
        }
    }

    fn chunks_that_are_illegal_from_the_start_are_a_502_and_later_ones_cut_the_answer(v: Variant) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        for chunks in ["+5\r\nhello\r\n0\r\n\r\n", "5 \r\nhello\r\n0\r\n\r\n", "5\nhello\n0\n\n", "\r\n\r\n", "5\r\nhelloX\r\n0\r\n\r\n"] {
            let (at_once, later) = (format!("{head}{chunks}"), format!("{head}3\r\nabc\r\n"));
            let gate = Gate::new();
            let worker = worker().on("/at-once", script().send(at_once).close())
                .on("/later", script().send(later).wait(&gate).send(chunks).close()).start();
            let proxy = proxy(v).worker(&worker).start();
            let mut client = proxy.client();
            client.send(client::request("GET", "/at-once", "", b""));
            let answer = client.response();
            assert!(answer.status == 502 || !answer.complete, "{chunks:?}: {answer}");
            let mut client = proxy.client();
            client.send(client::request("GET", "/later", "", b""));
            client.read_until("abc\r\n");
            gate.open();
            while client.fill(crate::support::patience()).is_ok() {}
            let seen = client.seen.escape_ascii().to_string();
            assert!(!seen.ends_with("0\\r\\n\\r\\n"), "{chunks:?} looks finished: {seen}");
        }
    }

    fn bytes_after_the_end_of_an_answer_are_not_the_next_answer(v: Variant) {
        let evil = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
        let extra = [&json_answer("{}")[..], evil.as_bytes()].concat();
        let to_head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{evil}", evil.len());
        let worker = worker()
            .on("/extra", script().send(extra))
            .on("/head", script().send(to_head))
            .on("/204", script().send(format!("HTTP/1.1 204 No Content\r\n\r\n{evil}")))
            .on("/304", script().send(format!("HTTP/1.1 304 Not Modified\r\n\r\n{evil}")))
            .start();
        let proxy = proxy(v).worker(&worker).start();
        for (method, target, status) in
            [("GET", "/extra", 200), ("HEAD", "/head", 200), ("GET", "/204", 204), ("GET", "/304", 304)]
        {
            let mut client = proxy.client();
            let answer = client.request(method, target, "", b"");
            assert_eq!(answer.status, status, "{target}");
            assert!(!answer.text().contains("evil"), "{target}: {answer}");
            assert_eq!(client.chat("m").expect(200).completion(), "ok", "{target}");
            let got = worker.requests();
            let (last, before) = (&got[got.len() - 1], &got[got.len() - 2]);
            assert_ne!(last.connection, before.connection, "{target}: the connection was used again");
        }
    }
}
