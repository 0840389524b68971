//! How long connections live, in which order answers come, and clients that speak HTTP/1.0.

use crate::support::{Gate, client, eventually, head::Framing, proxy, script, variants, worker};

variants! {
    fn requests_one_after_the_other_use_one_connection_on_both_sides(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for count in 0..20 {
            let body = format!("request {count}");
            assert_eq!(client.request("POST", "/tokenize", "", body.as_bytes()).expect(200).text(), body);
        }
        assert_eq!(worker.connections(), 1, "the worker's connection was not reused");
        assert_eq!(worker.requests().last().map(|last| last.nth), Some(19));
    }

    fn pipelined_requests_are_answered_in_order(v: Variant) {
        let gate = Gate::new();
        let worker = worker().echo().on("/slow", script().wait(&gate).send(crate::support::json_answer("1"))).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let mut bytes = client::request("POST", "/slow", "", b"x");
        for number in 2..=6 {
            bytes.extend(client::request("POST", "/e", "", number.to_string().as_bytes()));
            bytes.extend(client::request("GET", "/health", "", b""));
        }
        client.send(bytes);
        eventually("the first one waits", || gate.waiting() == 1);
        gate.open();
        assert_eq!(client.response().expect(200).text(), "1");
        for number in 2..=6 {
            assert_eq!(client.response().expect(200).text(), number.to_string());
            assert_eq!(client.response().expect(200).text(), "");
        }
        assert_eq!(worker.complete_requests().len(), 6);
    }

    fn pipelined_requests_may_come_byte_by_byte(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let bytes: Vec<u8> = ["a", "bb", "ccc"]
            .iter().flat_map(|body| client::request("POST", "/e", "", body.as_bytes())).collect();
        assert!(client.send_bytewise(&bytes));
        for body in ["a", "bb", "ccc"] {
            assert_eq!(client.response().expect(200).text(), body);
        }
    }

    fn empty_lines_before_a_request_are_skipped(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send("\r\nPOST /e HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(client.response().expect(200).text(), "a");
        client.response().expect(200);
        assert_eq!(worker.only_request().body, b"a");
    }

    fn a_connection_that_said_close_is_closed_after_its_answer(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(client::request("POST", "/tokenize", "Connection: Close\r\n", b"a"));
        client.try_send(client::request("POST", "/never", "", b"b"));
        let answer = client.response().expect(200);
        assert_eq!(answer.text(), "a");
        assert_eq!(answer.header("connection").map(|value| value.to_lowercase()).as_deref(), Some("close"));
        client.expect_closed();
        assert_eq!(worker.only_request().target, "/tokenize");
        // the worker's connection is not the client's: it lives on
        proxy.client().request("POST", "/tokenize", "", b"c").expect(200);
        if v.shards == 1 {
            assert_eq!(worker.connections(), 1);
        }
    }

    fn an_http_1_0_client_gets_its_answer_with_a_length_and_then_the_end(v: Variant) {
        let worker = worker().streams(["hello"]).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let body = client::chat("m");
        client.send(format!("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        let answer = client.response().expect(200);
        assert_eq!(answer.completion(), "hello");
        assert!(matches!(answer.framing, Framing::Length(_)), "{answer}");
        client.expect_closed();
        let got = worker.only_request();
        assert!(got.head.starts_with(b"POST /v1/chat/completions HTTP/1.1\r\n"), "upstream is 1.1");
    }

    fn an_http_1_0_client_never_gets_chunks(v: Variant) {
        let worker = worker().streams(["he", "llo"]).start();
        let proxy = proxy(v).worker(&worker).start();
        for keep_alive in ["", "Connection: keep-alive\r\n"] {
            let mut client = proxy.client();
            let body = client::chat_stream("m");
            client.send(format!(
                "POST /v1/chat/completions HTTP/1.0\r\n{keep_alive}Content-Length: {}\r\n\r\n{body}", body.len()));
            let answer = client.response().expect(200);
            assert_eq!(answer.framing, Framing::UntilClose, "{answer}");
            assert_eq!(answer.completion(), "hello");
            assert!(answer.text().ends_with("data: [DONE]\n\n"), "{answer}");
            assert_eq!(answer.headers.all("transfer-encoding"), Vec::<String>::new());
        }
    }

    fn an_http_1_0_client_may_keep_its_connection(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        for body in ["a", "b"] {
            client.send(format!("POST /e HTTP/1.0\r\nConnection: Keep-Alive\r\nContent-Length: 1\r\n\r\n{body}"));
            let answer = client.response().expect(200);
            assert_eq!(answer.text(), body);
            let connection = answer.header("connection").map(|value| value.to_lowercase());
            assert_eq!(connection.as_deref(), Some("keep-alive"), "{answer}");
        }
    }

    fn an_idle_worker_connection_is_not_kept_longer_than_set(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).arg("--pool-idle-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.request("POST", "/e", "", b"a").expect(200);
        assert_eq!(worker.open_connections(), 1);
        eventually("the idle connection is closed", || worker.open_connections() == 0);
        assert_eq!(client.request("POST", "/e", "", b"b").expect(200).text(), "b");
    }

    fn an_idle_client_connection_is_closed_after_its_time(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).arg("--keepalive-timeout-secs", "1").start();
        let mut client = proxy.client();
        client.request("POST", "/e", "", b"a").expect(200);
        client.expect_closed();
    }
}
