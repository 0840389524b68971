//! A limit on requests in flight that proxies on one Redis share.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::redis::{is_up, on, peers};
use crate::support::{
    Client, Gate, Proxy, Redis, Variant, Worker, client, eventually, proxy, redis, script, variants, worker,
    worker::{sse_end, sse_event, sse_head},
};

/// A worker whose answers end in the order of these gates, in which requests come to it.
fn held_by(gates: &[Gate]) -> Worker {
    let (gates, next) = (gates.to_vec(), Arc::new(AtomicUsize::new(0)));
    let held = move |_: &_| {
        let gate = &gates[next.fetch_add(1, Ordering::SeqCst)];
        script().send(sse_head()).send(sse_event("one")).wait(gate).send(sse_end())
    };
    worker().on_request("/v1/chat/completions", held).start()
}

/// Two proxies that may have four requests in flight together.
fn two(v: Variant, redis: &Redis, worker: &Worker) -> [Proxy; 2] {
    let one = || {
        let proxy = on(v, &redis.url(), std::slice::from_ref(worker));
        proxy.arg("--fleet-max-concurrent-requests", "4").start()
    };
    let proxies = [one(), one()];
    for proxy in &proxies {
        eventually("both are heard", || peers(proxy) == 1);
    }
    slots_are(&proxies, [2, 2]);
    proxies
}

#[track_caller]
fn slots_are(proxies: &[Proxy; 2], expected: [u32; 2]) {
    let slots = || proxies.each_ref().map(|proxy| proxy.metric("vllm_proxy_slots ").expect("a gauge") as u32);
    eventually("the slots are divided", || match slots() {
        slots if slots == expected => Ok(()),
        slots => Err(format!("{slots:?}, not {expected:?}")),
    });
}

fn begin(proxy: &Proxy, name: &str, count: usize) -> Vec<Client> {
    let chat = format!(r#"{{"model":"m","stream":true,"messages":[{{"role":"user","content":"{name}"}}]}}"#);
    let begin = |_| {
        let mut client = proxy.client();
        client.send(client::post("/v1/chat/completions", &chat));
        client
    };
    (0..count).map(begin).collect()
}

fn waiting(proxy: &Proxy) -> usize {
    proxy.metric("vllm_proxy_queue_depth ").expect("a gauge") as usize
}

variants! {
    fn together_no_more_run_than_the_limit_and_both_are_served(v: Variant) {
        let gates: Vec<Gate> = (0..10).map(|_| Gate::new()).collect();
        let (redis, worker) = (redis(), held_by(&gates));
        let [first, second] = two(v, &redis, &worker);
        let mut clients = begin(&first, "first", 7);
        worker.wait_for_requests(4);
        eventually("the rest waits", || waiting(&first) == 3);
        let proxies = [first, second];
        slots_are(&proxies, [4, 0]);
        clients.extend(begin(&proxies[1], "second", 3));
        eventually("there is no slot", || waiting(&proxies[1]) == 3);
        // who has more than half gives up what ends
        slots_are(&proxies, [2, 0]);
        assert_eq!(worker.requests().len(), 4);
        let who = |at: usize| worker.requests()[at].json()["messages"][0]["content"].as_str().unwrap().to_owned();
        for ended in 1..=6 {
            gates[ended - 1].open();
            worker.wait_for_requests(4 + ended);
            assert_eq!(worker.requests().len(), 4 + ended, "one has ended, one has come in");
        }
        assert_eq!([4, 5].map(who), ["second"; 2], "what the first has too much");
        gates.iter().for_each(Gate::open);
        for client in &mut clients {
            client.read_until("[DONE]");
        }
        let served = |name: &str| (0..10).filter(|&at| who(at) == name).count();
        assert_eq!((served("first"), served("second")), (7, 3));
        slots_are(&proxies, [2, 2]);
    }

    fn without_redis_the_parts_stay(v: Variant) {
        let gates: Vec<Gate> = (0..8).map(|_| Gate::new()).collect();
        let (mut redis, worker) = (redis(), held_by(&gates));
        let proxies = two(v, &redis, &worker);
        redis.kill();
        for proxy in &proxies {
            eventually("nobody is heard", || !is_up(proxy) && peers(proxy) == 0);
        }
        let clients = proxies.each_ref().map(|proxy| begin(proxy, "any", 4));
        for proxy in &proxies {
            eventually("two wait", || waiting(proxy) == 2);
        }
        assert_eq!(worker.wait_for_requests(4).len(), 4);
        slots_are(&proxies, [2, 2]);
        gates.iter().for_each(Gate::open);
        for mut client in clients.into_iter().flatten() {
            client.read_until("[DONE]");
        }
    }

    fn who_ends_leaves_its_part_to_the_others(v: Variant) {
        let (redis, worker) = (redis(), worker().start());
        let [first, second] = two(v, &redis, &worker);
        drop(second);
        eventually("all is had by who is left", || first.metric("vllm_proxy_slots ") == Some(4.0));
    }

    fn a_proxy_without_redis_has_the_whole_limit(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).worker(&worker).arg("--redis", "none").arg("--fleet-max-concurrent-requests", "4");
        assert_eq!(proxy.start().metric("vllm_proxy_slots "), Some(4.0));
    }
}
