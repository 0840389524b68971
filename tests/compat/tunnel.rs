//! WebSocket upgrades become tunnels; other upgrades do not exist.

use crate::support::{answer, client, eventually, proxy, script, variants, worker};

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
const UPGRADE: &str = "GET /v1/realtime?model=m HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";

variants! {
    fn a_websocket_is_a_tunnel_in_both_directions(v: Variant) {
        let worker = worker().on("/v1/realtime", script().send(SWITCH).tunnel()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(UPGRADE);
        let switched = client.response();
        assert_eq!(switched.status, 101, "{switched}");
        assert_eq!(switched.header("upgrade").as_deref(), Some("websocket"));
        assert_eq!(switched.header("connection").map(|value| value.to_lowercase()).as_deref(), Some("upgrade"));
        assert_eq!(switched.header("sec-websocket-accept").as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        let asked = worker.only_request();
        assert_eq!(asked.target, "/v1/realtime?model=m");
        assert_eq!(asked.header("upgrade").as_deref(), Some("websocket"));
        assert_eq!(asked.header("sec-websocket-key").as_deref(), Some("dGhlIHNhbXBsZSBub25jZQ=="));
        for frame in [&b"\x81\x02hi"[..], b"GET / HTTP/1.1\r\n\r\n", &super::requests::noise(300_000)] {
            client.send(frame);
            while client.buffer.len() < frame.len() {
                client.fill(crate::support::patience()).unwrap();
            }
            assert!(std::mem::take(&mut client.buffer) == frame);
        }
        drop(client);
        eventually("the worker sees its end closed", || worker.only_request().gone.is_some());
        assert_eq!(worker.requests().len(), 1, "bytes of the tunnel became a request");
    }

    fn bytes_sent_with_the_upgrade_reach_the_worker(v: Variant) {
        let worker = worker().on("/v1/realtime", script().send(SWITCH).tunnel()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(format!("{UPGRADE}early bird"));
        assert_eq!(client.response().status, 101);
        assert_eq!(client.read_until("early bird"), b"early bird");
        client.send("more");
        assert_eq!(client.read_until("more"), b"more");
    }

    fn bytes_sent_with_the_101_reach_the_client(v: Variant) {
        let worker = worker()
            .on("/v1/realtime", script().send(format!("{SWITCH}session.created")).tunnel())
            .on("/bytewise", script().send_bytewise(format!("{SWITCH}session.created")).tunnel())
            .start();
        let proxy = proxy(v).worker(&worker).start();
        for upgrade in [UPGRADE.to_owned(), UPGRADE.replace("/v1/realtime?model=m", "/bytewise")] {
            let mut client = proxy.client();
            client.send(upgrade);
            assert_eq!(client.response().status, 101);
            assert_eq!(client.read_until("session.created"), b"session.created");
            client.send("x");
            assert_eq!(client.read_until("x"), b"x");
        }
    }

    fn the_worker_may_end_a_tunnel(v: Variant) {
        let worker = worker().on("/v1/realtime", script().send(SWITCH).send("bye").close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(UPGRADE);
        assert_eq!(client.response().status, 101);
        assert_eq!(client.read_until("bye"), b"bye");
        client.expect_closed();
    }

    fn a_refused_upgrade_is_an_answer_like_any_other(v: Variant) {
        let refusal = answer("403 Forbidden", "text/plain; charset=utf-8", "connection: close\r\n", "");
        let worker = worker().on("/v1/realtime", script().send(refusal).close()).start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        client.send(UPGRADE);
        let answer = client.response().expect(403);
        assert_eq!(answer.text(), "");
        proxy.client().chat("m").expect(200);
    }

    fn h2c_is_not_an_upgrade(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).start();
        let mut client = proxy.client();
        let headers = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n";
        client.send(client::request("POST", "/e", headers, b"hi"));
        assert_eq!(client.response().expect(200).text(), "hi");
        let got = worker.only_request();
        assert_eq!(got.headers.all("upgrade"), Vec::<String>::new());
        assert_eq!(got.headers.all("http2-settings"), Vec::<String>::new());
    }
}
