//! What a worker is sent: the client's request, with its own head written anew and not a byte of its body
//! changed.

use crate::support::{Worker, answer, client, eventually, proxy, script, variants, worker};

/// Bytes of every value in no pattern that framing could hide behind; the same for the same `count`.
pub(crate) fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

fn echo() -> Worker {
    worker().echo().start()
}

fn chunked(target: &str, chunks: &[&[u8]], extension: &str, trailers: &str) -> Vec<u8> {
    let mut bytes =
        format!("POST {target} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").into_bytes();
    for chunk in chunks {
        bytes.extend_from_slice(format!("{:X}{extension}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(format!("0\r\n{trailers}\r\n").as_bytes());
    bytes
}

variants! {
    fn every_method_and_path_goes_through_with_its_query(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let asked = [
            ("GET", "/some/path"),
            ("POST", "/v1/something/new?stream=true&x=%20%2F&empty="),
            ("PUT", "//double//slash/"),
            ("PATCH", "/%F0%9F%A6%99?a=b?c=d"),
            ("DELETE", "/v1/responses/resp_1"),
            ("OPTIONS", "/x"),
            ("PROPFIND", "/a;b=c,d~e!$&'()*+=:@"),
        ];
        for (method, target) in asked {
            let answer = client.request(method, target, "", b"body").expect(200);
            assert_eq!(answer.body, b"body", "{method} {target}");
        }
        let got: Vec<_> = worker.requests().into_iter().map(|got| (got.method, got.target)).collect();
        assert_eq!(got, asked.map(|(method, target)| (method.to_owned(), target.to_owned())));
    }

    fn a_prefix_in_the_workers_url_stands_before_every_target(v: Variant) {
        let worker = worker()
            .on("/team/health", script().send(answer("200 OK", "", "", "")))
            .on("/team/v1/models", script().send(answer("200 OK", "application/json", "",
                r#"{"object":"list","data":[{"id":"m","object":"model","parent":null}]}"#)))
            .echo().start();
        let proxy = proxy(v).url(&format!("{}/team", worker.url())).start();
        eventually("the worker is in use", || proxy.get("/health").status == 200);
        proxy.post("/v1/chat/completions?x=1", client::chat("m")).expect(200);
        let got = worker.requests().into_iter().find(|got| got.method == "POST").unwrap();
        assert_eq!(got.target, "/team/v1/chat/completions?x=1");
    }

    fn headers_keep_their_order_case_and_duplicates(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let lines = [
            "uSeR-aGeNt: x/1", "Host: some.name:8000", "X-Twice: 1", "authorization: Bearer sk-1", "x-twice: 2",
            "X-Empty:", "X_Under: 1", "X-Odd!#$%&'*+.^`|~: \u{e9}\u{1f999}", "Content-Type: application/json",
            "Content-Length: 2", "X-Twice: 1", "Cookie: a=b; c=d", "X-Tab: a\tb", "X-Request-Id: id-1",
        ];
        let mut client = proxy.client();
        client.send(format!("POST /e HTTP/1.1\r\n{}\r\n\r\nhi", lines.join("\r\n")));
        client.response().expect(200);
        let got: Vec<_> = worker.only_request().headers.lines_without(&[]);
        assert_eq!(got, lines.map(|line| if line.ends_with(':') { format!("{line} ") } else { line.to_owned() }));
    }

    fn what_belongs_to_the_clients_connection_stays_there(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let headers = "Connection: keep-alive, X-Mine ,x-other\r\nX-Mine: 1\r\nKeep-Alive: timeout=5\r\n\
            Proxy-Connection: keep-alive\r\nX-OTHER: 2\r\nTE: trailers\r\nProxy-Authorization: Basic eA==\r\n\
            Upgrade: h2c\r\nX-Kept: 3\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n";
        proxy.client().request("POST", "/e", headers, b"hi").expect(200);
        let got = worker.only_request();
        assert_eq!(got.header("x-kept").as_deref(), Some("3"));
        for name in ["x-mine", "x-other", "keep-alive", "proxy-connection", "te", "proxy-authorization", "upgrade"] {
            assert_eq!(got.headers.all(name), Vec::<String>::new(), "{name} got through");
        }
    }

    fn connection_cannot_take_away_framing_or_authorization(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let headers = "Connection: content-length, host, transfer-encoding\r\nAuthorization: Bearer k\r\n";
        let answer = proxy.client().request("POST", "/e", headers, b"hello");
        if answer.status == 200 {
            assert_eq!(worker.only_request().body, b"hello");
        } else {
            assert_eq!(answer.status, 400);
            assert!(worker.requests().is_empty());
        }
    }

    fn a_body_with_a_length_arrives_byte_for_byte(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for size in [0, 1, 100, 65_535, 65_536, 65_537, 1 << 20, 5_000_001] {
            let body = noise(size);
            let answer = client.request("POST", "/e", "Content-Type: application/octet-stream\r\n", &body).expect(200);
            assert!(answer.body == body, "{size} bytes came back changed");
            let got = worker.requests().pop().unwrap();
            assert!(got.body == body && got.complete, "{size} bytes arrived changed");
            assert_eq!(got.header("content-length"), Some(size.to_string()));
        }
    }

    fn a_chunked_body_arrives_with_its_bytes_in_order(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let big = noise(3_000_000);
        for chunks in [vec![], vec![&b"a"[..]], vec![b"one", b"two", &big[..70_000]], vec![&big[..], b"end"]] {
            client.send(chunked("/e", &chunks, "", ""));
            let answer = client.response().expect(200);
            assert!(answer.body == chunks.concat(), "{} bytes came back changed", chunks.concat().len());
            let got = worker.requests().pop().unwrap();
            assert!(got.body == chunks.concat() && got.complete);
        }
    }

    fn chunk_extensions_and_trailers_of_a_request_do_no_harm(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(chunked("/e", &[b"hello", b" world"], ";a;b=c;d=\"e;f\"", "X-Trailer: 1\r\nContent-MD5: q\r\n"));
        assert_eq!(client.response().expect(200).body, b"hello world");
        let got = worker.complete_requests().pop().unwrap();
        assert_eq!(got.body, b"hello world");
        assert_eq!(got.headers.all("x-trailer"), Vec::<String>::new(), "a trailer got into the head");
        assert_eq!(client.request("POST", "/e", "", b"next").expect(200).body, b"next");
    }

    fn a_chunked_chat_request_arrives_whole(v: Variant) {
        let worker = worker().model("m").streams(["he", "llo"]).start();
        let proxy = proxy(v).worker(&worker).start();
        let body = client::chat("m");
        let (one, two) = body.as_bytes().split_at(20);
        let mut client = proxy.client();
        client.send(chunked("/v1/chat/completions", &[one, two], "", ""));
        assert_eq!(client.response().expect(200).completion(), "hello");
        assert_eq!(worker.only_request().body, body.as_bytes());
    }

    fn multipart_and_compressed_bodies_are_not_looked_into(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut form = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n".to_vec();
        form.extend_from_slice(&noise(2_000_000));
        form.extend_from_slice(b"\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b--\r\n");
        let mut client = proxy.client();
        let kind = "Content-Type: multipart/form-data; boundary=b\r\n";
        assert!(client.request("POST", "/v1/audio/transcriptions", kind, &form).expect(200).body == form);
        let gzip = [&[0x1f, 0x8b, 8, 0][..], &noise(1000)].concat();
        let kind = "Content-Type: application/json\r\nContent-Encoding: gzip\r\n";
        assert!(client.request("POST", "/v1/embeddings", kind, &gzip).expect(200).body == gzip);
        assert_eq!(worker.requests()[1].header("content-encoding").as_deref(), Some("gzip"));
    }

    fn what_only_vllm_can_judge_goes_to_vllm(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let deep = format!("{{\"model\":\"m\",\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let bodies: [&[u8]; 9] = [
            b"", b"{", b"[]", b"{\"model\":5}", b"\xff\xfe{}", b"{\"model\":\"\\ud800\"", deep.as_bytes(), b"\0\0\0", b"1e999",
        ];
        for body in bodies {
            let answer = client.request("POST", "/v1/embeddings", "Content-Type: application/json\r\n", body);
            assert_eq!(answer.status, 200, "{:?}: {answer}", &body[..body.len().min(40)]);
            assert!(answer.body == body);
        }
    }

    fn a_get_may_have_a_body(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        assert_eq!(client.request("GET", "/e", "", b"GET /evil HTTP/1.1").expect(200).body, b"GET /evil HTTP/1.1");
        client.request("GET", "/v1/models", "", b"hello").expect(200);
        client.request("POST", "/e", "", b"after").expect(200);
        let targets: Vec<_> = worker.requests().into_iter().map(|got| got.target).collect();
        assert_eq!(targets, ["/e", "/e"]);
    }

    fn a_request_split_at_every_byte_is_the_same_request(v: Variant) {
        let worker = worker().echo().streams(["hello"]).start();
        let proxy = proxy(v).worker(&worker).start();
        let with_length = client::post("/v1/chat/completions?a=b", client::chat("m"));
        let in_chunks = chunked("/e", &[b"hello", b" ", b"world"], ";x=\"y\"", "X-T: 1\r\n");
        let mut client = proxy.client();
        assert!(client.send_bytewise(&with_length));
        assert_eq!(client.response().expect(200).completion(), "hello");
        assert!(client.send_bytewise(&in_chunks));
        assert_eq!(client.response().expect(200).body, b"hello world");
        let got = worker.requests();
        assert_eq!(got[0].body, client::chat("m").as_bytes());
        assert_eq!(got[1].body, b"hello world");
        assert_eq!(got.len(), 2);
    }

    fn an_absolute_target_becomes_a_path_and_its_authority_the_host(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send("POST http://Real.Name:81/e?q=1 HTTP/1.1\r\nHost: other\r\nContent-Length: 2\r\n\r\nhi");
        client.response().expect(200);
        client.send("POST http://real.name HTTP/1.1\r\nHost: real.name\r\nContent-Length: 0\r\n\r\n");
        client.response().expect(200);
        let got = worker.requests();
        assert_eq!((&got[0].target[..], got[0].header("host").as_deref()), ("/e?q=1", Some("Real.Name:81")));
        assert_eq!(got[1].target, "/");
    }

    fn one_hundred_is_sent_when_the_body_is_wanted(v: Variant) {
        let worker = worker().streams(["hello"]).start();
        let proxy = proxy(v).worker(&worker).start();
        let body = client::chat("m");
        let mut client = proxy.client();
        client.send(format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\
             Content-Length: {}\r\n\r\n", body.len()));
        let interim = client.response();
        assert_eq!((interim.status, &interim.head[..]), (100, &b"HTTP/1.1 100 Continue\r\n\r\n"[..]));
        client.send(&body);
        assert_eq!(client.response().expect(200).completion(), "hello");
        assert_eq!(worker.only_request().body, body.as_bytes());
        assert_eq!(client.chat("m").expect(200).completion(), "hello");
    }

    fn one_hundred_is_not_needed_by_a_client_that_does_not_wait(v: Variant) {
        let worker = worker().streams(["hello"]).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let headers = "Content-Type: application/json\r\nexpect: 100-Continue\r\n";
        client.send(client::request("POST", "/v1/chat/completions", headers, client::chat("m").as_bytes()));
        let first = client.response();
        let last = if first.status == 100 { client.response() } else { first };
        assert_eq!(last.expect(200).completion(), "hello");
        client.chat("m").expect(200);
    }

    fn a_body_that_is_too_large_is_refused_instead_of_asked_for(v: Variant) {
        let worker = echo();
        let proxy = proxy(v).worker(&worker).arg("--max-body-bytes", "1000").start();
        let mut client = proxy.client();
        client.send("POST /e HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n");
        let answer = client.response();
        assert_eq!(answer.status, 413, "{answer}");
        client.expect_closed();
        assert!(worker.requests().is_empty());
    }

    fn an_early_answer_comes_while_the_client_still_sends(v: Variant) {
        let refusal = answer("401 Unauthorized", "application/json", "", r#"{"error":"Unauthorized"}"#);
        let worker = worker().on("/v1/files/upload", script().early().send(refusal)).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send("POST /v1/files/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n");
        client.send(noise(1_000_000));
        let answer = client.response();
        assert_eq!(answer.status, 401, "{answer}");
        assert_eq!(answer.text(), r#"{"error":"Unauthorized"}"#);
    }

    fn nothing_is_asked_of_the_worker_in_advance(v: Variant) {
        let worker = worker().on("/up", script().early().read_body().send(answer("200 OK", "", "", ""))).start();
        let proxy = proxy(v).worker(&worker).arg("--body-peek-bytes", "1000").start();
        let mut client = proxy.client();
        // one model: the body is not needed to choose, so what is over the peek limit does not wait for its end
        client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n").send(noise(200_000));
        let got = eventually("the worker has the first part", || {
            worker.requests().pop().filter(|got| got.body.len() == 200_000).ok_or(worker.requests().len())
        });
        assert!(!got.complete && got.body == noise(200_000));
        client.send(&noise(500_000)[200_000..]);
        client.response().expect(200);
        assert!(worker.only_request().body == noise(500_000));
    }
}

#[test]
fn noise_has_every_byte_value() {
    let noise = noise(5000);
    assert!((0..=255).all(|byte| noise.contains(&byte)));
}
