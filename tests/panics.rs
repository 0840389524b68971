//! A task that panics costs its own connection and nothing else; a shard that panics ends the process.

use std::time::Duration;

use vllm_proxy::{
    app::{Faults, start_with},
    config::Config,
};

use crate::support::{
    Gate, client, eventually, proxy, script, sse_event, variants, worker,
    worker::{sse_end, sse_head},
};

fn boom(target: &str) {
    assert!(!target.starts_with("/boom"), "a panic that this test wants");
}

variants! {
    fn a_panic_costs_its_connection_only(v: Variant) {
        let gate = Gate::new();
        let events = script().send(sse_head()).send(sse_event("one")).wait(&gate).send(sse_event("two")).send(sse_end());
        let worker = worker().on("/stream", events).echo().start();
        let proxy = proxy(v).worker(&worker).fault(boom).start();
        let mut streams: Vec<_> = (0..4).map(|_| proxy.client()).collect();
        for stream in &mut streams {
            stream.send(client::post("/stream", client::chat_stream("m")));
            stream.read_until("\"one\"");
        }
        for count in 1..=6 {
            let mut client = proxy.client();
            client.request("POST", "/e", "", b"fine").expect(200);
            client.send(client::request("POST", "/boom", "", b"x"));
            client.expect_closed();
            eventually("the panic is counted", || proxy.metric("vllm_proxy_panics_total") == Some(f64::from(count)));
        }
        gate.open();
        for stream in &mut streams {
            stream.read_until("[DONE]\n\n\r\n0\r\n\r\n");
        }
        eventually("nothing is in flight", || {
            proxy.metric("vllm_proxy_worker_in_flight") == Some(0.0) && proxy.metric("vllm_proxy_connections_open").is_some()
        });
        assert!(worker.requests().iter().all(|got| got.path() != "/boom"));
    }
}

#[test]
fn a_dead_shard_is_told_and_ends_the_process() {
    let flags = [
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--threads",
        "2",
        "--redis",
        "none",
        "--worker-urls",
        "http://127.0.0.1:9",
    ];
    let faults =
        Faults { on_tick: Some(|| panic!("a dead shard that this test wants")), ..Faults::default() };
    let running = start_with(Config::from_flags(flags).unwrap(), faults).unwrap();
    assert!(running.shard_ended_within(Duration::from_secs(30)), "nobody was told");
    // the binary gives up as soon as it is told; here the end is waited for
    running.drain();
    assert_eq!(running.wait().unwrap_err().to_string(), "a shard panicked");
}
