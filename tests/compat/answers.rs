//! What a client gets: the worker's answer, with nothing changed but what belongs to the connection.

use super::requests::noise;
use crate::support::{
    answer, client, head::Framing, json_answer, proxy, script, variants, worker, worker::chunk,
};

/// Header lines that concern one connection only.
const CONNECTION: [&str; 3] = ["connection", "keep-alive", "transfer-encoding"];

variants! {
    fn status_reason_and_headers_come_unchanged_and_in_order(v: Variant) {
        let head = "HTTP/1.1 299 Something Odd\r\nX-First: 1\r\ndate: Sat, 21 Nov 2026 09:10:10 GMT\r\nServer: uvicorn\r\n\
            set-cookie: a=1\r\nSet-Cookie: b=2\r\nx-empty:\r\nX-Tab: a\tb\r\nX-Utf8: \u{e9}\r\ncontent-length: 2\r\n\
            Content-Type: text/x\r\nx-request-id: 7\r\nretry-after: 3\r\n";
        let worker = worker().on("/e", script().send(format!("{head}Connection: keep-alive, x-mine\r\nX-Mine: 1\r\n\r\nhi"))).start();
        let proxy = proxy(v).worker(&worker).start();
        let answer = proxy.client().request("POST", "/e", "", b"x").expect(299);
        assert_eq!((&answer.version[..], &answer.reason[..], answer.text()), ("HTTP/1.1", "Something Odd", "hi"));
        let want: Vec<String> = head.lines().skip(1)
            .map(|line| if line.ends_with(':') { format!("{line} ") } else { line.to_owned() }).collect();
        assert_eq!(answer.headers.lines_without(&CONNECTION), want);
    }

    fn errors_and_redirects_of_a_worker_are_passed_on(v: Variant) {
        let worker = worker().on_request("*", |request| {
            let code = request.path().trim_start_matches('/');
            let location = if code == "307" { "location: http://elsewhere.test/v1/x\r\n" } else { "" };
            script().send(answer(&format!("{code} Whatever"), "application/json", location, r#"{"error":"own words"}"#))
        }).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for code in [200, 201, 206, 301, 307, 308, 400, 401, 403, 404, 405, 409, 413, 418, 422, 429, 500, 501, 599] {
            let answer = client.post(&format!("/{code}"), "{}").expect(code);
            assert_eq!(answer.text(), r#"{"error":"own words"}"#);
            assert_eq!(answer.header("location").is_some(), code == 307);
        }
        assert_eq!(worker.requests().len(), 19, "a redirect was followed or an error retried");
    }

    fn a_body_with_a_length_comes_byte_for_byte(v: Variant) {
        let worker = worker().on_request("*", |request| {
            let size: usize = request.path()[1..].parse().unwrap();
            script().send(answer("200 OK", "application/octet-stream", "", noise(size)))
        }).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for size in [0, 1, 1000, 65_536, 1 << 20, 8_000_001] {
            let answer = client.get(&format!("/{size}")).expect(200);
            assert!(answer.body == noise(size), "{size} bytes came changed");
            assert_eq!(answer.framing, Framing::Length(size as u64));
        }
        assert_eq!(worker.connections(), 1);
    }

    fn chunks_come_as_they_were_with_extensions_and_trailers(v: Variant) {
        let big = noise(300_000);
        let mut raw = b"3;ext=\"a;b\"\r\nabc\r\n0001;x\r\nd\r\n".to_vec();
        raw.extend(chunk(&big));
        raw.extend_from_slice(b"000\r\nX-Trailer: 1\r\nx-other: 2\r\n\r\n");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        let sent = [head.as_bytes(), &raw].concat();
        let worker = worker().on("/c", script().send(&sent)).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..2 {
            let answer = client.get("/c").expect(200);
            assert_eq!(answer.framing, Framing::Chunked);
            assert!(answer.body == [b"abcd", &big[..]].concat());
            assert!(answer.raw_body == raw, "the chunks were coded anew");
            assert_eq!(answer.trailers, ["X-Trailer: 1", "x-other: 2"]);
        }
        assert_eq!(worker.connections(), 1);
    }

    fn a_body_that_ends_with_the_connection_becomes_chunked(v: Variant) {
        let body = noise(200_000);
        let sent = [b"HTTP/1.1 200 OK\r\ncontent-type: text/x\r\n\r\n", &body[..]].concat();
        let worker = worker().on("/c", script().send(sent).close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..2 {
            let answer = client.get("/c").expect(200);
            assert_eq!(answer.framing, Framing::Chunked, "{answer}");
            assert!(answer.body == body);
        }
        assert_eq!(worker.connections(), 2);
        let mut old = proxy.client();
        old.send("GET /c HTTP/1.0\r\n\r\n");
        let answer = old.response().expect(200);
        assert!(answer.framing == Framing::UntilClose && answer.body == body);
    }

    fn a_worker_that_speaks_http_1_0_is_understood(v: Variant) {
        let worker = worker()
            .on("/l", script().send("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi").close())
            .on("/c", script().send("HTTP/1.0 200 OK\r\n\r\nhello").close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for (target, body) in [("/l", "hi"), ("/c", "hello"), ("/l", "hi")] {
            assert_eq!(client.get(target).expect(200).text(), body);
        }
        assert_eq!(worker.connections(), 3);
    }

    fn an_answer_to_head_has_a_length_and_no_body(v: Variant) {
        let worker = worker()
            .on("/h", script().send("HTTP/1.1 200 OK\r\ncontent-length: 447\r\ncontent-type: application/json\r\n\r\n"))
            .on("/c", script().send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..2 {
            let answer = client.request("HEAD", "/h", "", b"").expect(200);
            assert_eq!(answer.header("content-length").as_deref(), Some("447"));
            client.request("HEAD", "/c", "", b"").expect(200);
        }
        assert_eq!(client.chat("m").expect(200).completion(), "ok");
        assert_eq!(worker.connections(), 1);
    }

    fn answers_that_never_have_a_body_do_not_end_the_connection(v: Variant) {
        let worker = worker()
            .on("/204", script().send("HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n"))
            .on("/304", script().send("HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\ncontent-length: 10\r\n\r\n"))
            .start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..2 {
            let answer = client.get("/204").expect(204);
            assert_eq!(answer.headers.all("transfer-encoding"), Vec::<String>::new(), "{answer}");
            assert_eq!(client.get("/304").expect(304).header("etag").as_deref(), Some("\"1\""));
        }
        assert_eq!(client.chat("m").expect(200).completion(), "ok");
    }

    fn early_hints_reach_a_client_of_1_1_and_not_one_of_1_0(v: Variant) {
        let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n";
        let bytes = [hints.as_bytes(), &json_answer("{}")].concat();
        let worker = worker().on("/h", script().send(bytes)).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::request("GET", "/h", "", b""));
        let interim = client.response();
        assert_eq!((interim.status, interim.header("link").as_deref()), (103, Some("</a>; rel=preload")));
        assert_eq!(client.response().expect(200).text(), "{}");
        let mut old = proxy.client();
        old.send("GET /h HTTP/1.0\r\n\r\n");
        assert_eq!(old.response().expect(200).text(), "{}");
    }

    fn an_answer_split_at_every_byte_is_the_same_answer(v: Variant) {
        let plain = answer("200 OK", "application/json", "x-a: b\r\n", r#"{"a":1}"#);
        let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;a=\"b\"\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n";
        let interim = [b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", &plain[..]].concat();
        let worker = worker()
            .on("/plain", script().send_bytewise(&plain))
            .on("/chunked", script().send_bytewise(chunked))
            .on("/interim", script().send_bytewise(interim))
            .on("/until-close", script().send_bytewise("HTTP/1.1 200 OK\r\n\r\nhello").close())
            .start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..3 {
            assert_eq!(client.get("/plain").expect(200).text(), r#"{"a":1}"#);
            let answer = client.get("/chunked").expect(200);
            assert_eq!((answer.text(), &answer.trailers[..]), ("abc0123456789", &["X-T: 1".to_owned()][..]));
            assert_eq!(client.get("/interim").expect(200).text(), r#"{"a":1}"#);
            assert_eq!(client.get("/until-close").expect(200).text(), "hello");
        }
    }

    fn a_cut_body_stays_cut(v: Variant) {
        let chunked = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
        let short = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\nhello";
        let open = "HTTP/1.1 200 OK\r\ncontent-type: text/x\r\n\r\nhello";
        let worker = worker()
            .on("/chunked", script().send(chunked).close())
            .on("/in-chunk", script().send(format!("{chunked}5\r\nwo")).close())
            .on("/short", script().send(short).close())
            .on("/short-rst", script().send(short).reset())
            .on("/open-rst", script().send(open).reset())
            .start();
        let proxy = proxy(v).worker(&worker).start();
        for target in ["/chunked", "/in-chunk", "/short", "/short-rst", "/open-rst"] {
            let mut client = proxy.client();
            client.send(client::request("GET", target, "", b""));
            // what was not sent yet may still become a 502; what was sent must not look finished
            match client.try_response_to("GET", crate::support::patience()) {
                Ok(answer) => {
                    assert!(!answer.complete || answer.status == 502, "{target} looks finished: {answer}");
                }
                Err((end, _)) => panic!("{target}: {end:?} without a head"),
            }
        }
        proxy.client().chat("m").expect(200);
    }

    fn a_worker_that_says_close_is_taken_at_its_word_and_the_client_is_not_closed(v: Variant) {
        let worker = worker()
            .on("/c", script().send(answer("200 OK", "text/x", "connection: close\r\n", "bye"))).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for _ in 0..3 {
            let answer = client.get("/c").expect(200);
            assert_eq!(answer.text(), "bye");
            assert_eq!(answer.headers.all("connection"), Vec::<String>::new());
        }
        assert_eq!(worker.connections(), 3);
    }
}
