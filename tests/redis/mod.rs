//! Proxies on a real redis-server.

mod absent;
mod limit;
mod sharing;
mod strange;

use crate::support::{Client, Proxy, ProxyBuilder, Redis, Variant, Worker, eventually, proxy};

/// A proxy before these workers that uses this Redis.
fn on(v: Variant, redis: &str, workers: &[Worker]) -> ProxyBuilder {
    let proxy = proxy(v).arg("--redis", redis).arg("--sync-interval-ms", "20");
    workers.iter().fold(proxy, |proxy, worker| proxy.worker(worker))
}

/// As many proxies, each of which hears all others.
fn together<const N: usize>(v: Variant, redis: &Redis, workers: &[Worker]) -> [Proxy; N] {
    let proxies = [(); N].map(|()| on(v, &redis.url(), workers).start());
    for proxy in &proxies {
        eventually("every proxy hears the others", || peers(proxy) == N - 1);
    }
    proxies
}

fn peers(proxy: &Proxy) -> usize {
    proxy.metric("vllm_proxy_peers").expect("a gauge") as usize
}

fn is_up(proxy: &Proxy) -> bool {
    proxy.metric("vllm_proxy_redis_up") == Some(1.0)
}

fn figure(proxy: &Proxy, name: &str) -> f64 {
    let name = format!("vllm_proxy_redis_{name}");
    proxy.metric(&name).unwrap_or_else(|| panic!("no {name}"))
}

/// What a process at this address says of itself.
fn figure_at(client: &mut Client, name: &str) -> f64 {
    let metrics = client.get("/metrics").expect(200);
    let line = metrics.text().lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {}", metrics.text()))
}

/// Requests that run on the workers, as a proxy hears from the others.
fn of_others(proxy: &Proxy, workers: &[Worker]) -> Vec<u32> {
    let series = |worker: &Worker| format!("vllm_proxy_worker_peer_requests{{worker=\"{}\"}}", worker.url());
    workers.iter().map(|worker| proxy.metric(&series(worker)).expect("a gauge") as u32).collect()
}

/// A chat whose prompt, some kilobytes long, is known again by its `system` text.
fn chat(system: &str, turns: &[&str]) -> String {
    let system = format!("{system}. ").repeat(6000 / system.len());
    let turns = turns.iter().map(|turn| serde_json::json!({"role": "user", "content": turn}));
    let messages: Vec<_> =
        [serde_json::json!({"role": "system", "content": system})].into_iter().chain(turns).collect();
    serde_json::json!({"messages": messages, "model": "m"}).to_string()
}

fn ask(proxy: &Proxy, system: &str, turns: &[&str]) {
    proxy.post("/v1/chat/completions", chat(system, turns)).expect(200);
}

/// Position of the worker that has got one request more than it had.
fn who_got_it(workers: &[Worker]) -> usize {
    let counts: Vec<usize> = workers.iter().map(|worker| worker.requests().len()).collect();
    assert_eq!(counts.iter().sum::<usize>(), 1, "{counts:?}");
    workers.iter().for_each(Worker::forget);
    counts.iter().position(|&count| count == 1).expect("one")
}

/// Sends each of these prompts through `first`, and then a turn more of it through `second` as soon as `second` has
/// heard of it; says how many went to where they went before. By chance it is one of as many as there are workers.
fn known_again(first: &Proxy, second: &Proxy, workers: &[Worker], prompts: &[&str]) -> usize {
    workers.iter().for_each(Worker::forget);
    let mut again = 0;
    for prompt in prompts {
        let [heard, heard_back] = [second, first].map(|proxy| figure(proxy, "received_events"));
        ask(first, prompt, &["hello"]);
        let there = who_got_it(workers);
        eventually("both events are heard", || figure(second, "received_events") >= heard + 2.0);
        // the load that came with them may be older than they are
        eventually("nothing runs", || of_others(second, workers).iter().all(|&count| count == 0));
        ask(second, prompt, &["hello", "and then?"]);
        again += usize::from(who_got_it(workers) == there);
        // so that they are not taken for what is awaited when the parts are changed
        eventually("its own are heard", || figure(first, "received_events") >= heard_back + 2.0);
    }
    again
}

/// Prompts that begin differently.
const PROMPTS: [&str; 6] =
    ["You are a pirate", "Translate into Dutch", "Answer in verse", "Be brief", "Sum it up", "Write Rust"];
