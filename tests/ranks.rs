//! Data-parallel ranks: each is a worker of its own to the choice, and one server to everything else.

use std::collections::BTreeMap;

use crate::support::{Gate, Worker, client, eventually, json_answer, proxy, script, variants, worker};

const FIELD: &str = "X-data-parallel-rank";

/// How many requests each rank got; a request without a rank counts for "".
fn by_rank(worker: &Worker) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for request in worker.requests() {
        let ranks = request.headers.all(FIELD);
        assert!(ranks.len() <= 1, "{ranks:?}");
        *counts.entry(ranks.concat()).or_default() += 1;
    }
    counts
}

fn counted(counts: &[(&str, usize)]) -> BTreeMap<String, usize> {
    counts.iter().map(|(rank, count)| ((*rank).to_owned(), *count)).collect()
}

variants! {
    fn every_rank_has_its_own_load(v: Variant) {
        let gate = Gate::new();
        let servers = [worker().holds(&gate).start(), worker().holds(&gate).start()];
        let proxy = servers.iter().fold(proxy(v), |proxy, server| proxy.worker(server));
        let proxy = proxy.arg("--data-parallel-size", "2").start();
        let mut clients: Vec<_> = (0..8).map(|_| proxy.client()).collect();
        for (count, client) in clients.iter_mut().enumerate() {
            client.send(client::post("/v1/chat/completions", client::chat("m")));
            eventually("the request has arrived", || gate.waiting() == count + 1);
        }
        for server in &servers {
            assert_eq!(by_rank(server), counted(&[("0", 2), ("1", 2)]));
            for rank in [0, 1] {
                let gauge = format!("vllm_proxy_worker_in_flight{{worker=\"{}@{rank}\"}}", server.url());
                assert_eq!(proxy.metric(&gauge), Some(2.0), "{gauge}");
            }
        }
        gate.open();
        clients.iter_mut().for_each(|client| drop(client.response().expect(200)));
    }

    fn a_clients_own_rank_is_replaced(v: Variant) {
        let server = worker().start();
        let proxy = proxy(v).worker(&server).arg("--intra-node-data-parallel-size", "3").start();
        let mut client = proxy.client();
        for _ in 0..6 {
            let own = "x-data-parallel-rank: 9\r\nX-Data-Parallel-Rank: 8\r\nx-own: 1\r\n";
            client.request("POST", "/v1/chat/completions", own, br#"{"model":"m"}"#).expect(200);
        }
        let ranks = by_rank(&server);
        assert!(ranks.keys().all(|rank| ["0", "1", "2"].contains(&&rank[..])), "{ranks:?}");
        assert!(server.requests().iter().all(|request| request.header("x-own").as_deref() == Some("1")));
    }

    fn without_ranks_a_clients_own_passes(v: Variant) {
        let server = worker().start();
        let proxy = proxy(v).worker(&server).arg("--data-parallel-size", "1").start();
        proxy.client().request("POST", "/v1/completions", "x-DATA-parallel-rank: 9\r\n", b"{}").expect(200);
        proxy.client().post("/v1/completions", "{}").expect(200);
        assert_eq!(by_rank(&server), counted(&[("", 1), ("9", 1)]));
        let head = String::from_utf8(server.requests()[0].head.clone()).unwrap();
        assert!(head.contains("\r\nx-DATA-parallel-rank: 9\r\n"), "as it was written: {head}");
    }

    fn what_concerns_a_server_is_done_once(v: Variant) {
        let sleeps = || json_answer(r#"{"status":"sleeping"}"#);
        let servers = [3, 4].map(|load| worker().load(load).on("/sleep", script().send(sleeps())).start());
        let proxy = servers.iter().fold(proxy(v), |proxy, server| proxy.worker(server));
        let proxy = proxy.arg("--data-parallel-size", "2").start();
        assert_eq!(proxy.get("/load").expect(200).text(), r#"{"server_load":7}"#);
        proxy.post("/sleep", "").expect(200);
        for server in &servers {
            let sleeps = server.requests().into_iter().filter(|request| request.path() == "/sleep");
            assert_eq!(sleeps.map(|request| request.headers.all(FIELD)).collect::<Vec<_>>(), [Vec::<String>::new()]);
        }
        let ids: Vec<_> = proxy.get("/v1/models").expect(200).json()["data"].as_array().unwrap().to_vec();
        assert_eq!(ids.len(), 1);
    }

    fn what_a_server_stores_all_its_ranks_have(v: Variant) {
        let server = worker().start();
        let proxy = proxy(v).worker(&server).arg("--data-parallel-size", "2").flag("--worker-header").start();
        let body = r#"{"model":"m","previous_response_id":"resp_1","input":"hi"}"#;
        let named = proxy.post("/v1/responses", body).header("x-vllm-proxy-worker").unwrap_or_default();
        assert!(named.starts_with(&format!("{}@", server.url())), "{named:?}");
        let asked: Vec<_> = server.requests().into_iter().map(|request| (request.method, request.target)).collect();
        assert_eq!(asked, [("POST".to_owned(), "/v1/responses".to_owned())], "nobody has to be looked for");
    }

    fn a_server_that_is_gone_is_gone_with_all_its_ranks(v: Variant) {
        let servers = [worker().start(), worker().start()];
        let proxy = servers.iter().fold(proxy(v), |proxy, server| proxy.worker(server));
        let proxy = proxy.arg("--data-parallel-size", "2").start();
        servers[0].go_down();
        for _ in 0..8 {
            proxy.client().chat("m").expect(200);
        }
        let usable = |server: &Worker| {
            proxy.usable_workers().iter().filter(|name| name.starts_with(&server.url())).count()
        };
        eventually("both ranks are out", || usable(&servers[0]) == 0);
        assert_eq!(usable(&servers[1]), 2);
        servers[0].come_back();
        eventually("both ranks are back", || usable(&servers[0]) == 2);
    }

    fn what_a_worker_says_of_itself_is_shown(v: Variant) {
        let figures = |engine: u32, running: u32| format!(
            "vllm:num_requests_running{{engine=\"{engine}\",model_name=\"m\"}} {running}.0\n\
             vllm:kv_cache_usage_perc{{engine=\"{engine}\",model_name=\"m\"}} 0.5\n\
             vllm:cache_config_info{{block_size=\"16\",engine=\"{engine}\",num_gpu_blocks=\"10\"}} 1.0\n");
        let text = figures(0, 1) + &figures(1, 2);
        let server = worker().on("/metrics", script().send(json_answer(text))).start();
        let proxy = proxy(v).worker(&server).arg("--data-parallel-size", "2");
        let proxy = proxy.arg("--engine-stats-interval", "0.1").start();
        for (rank, running) in [(0, 1.0), (1, 2.0)] {
            let shown = |name: &str| {
                proxy.metric(&format!("vllm_proxy_worker_{name}{{worker=\"{}@{rank}\"}}", server.url()))
            };
            eventually("its figures are shown", || shown("engine_running") == Some(running));
            assert_eq!((shown("kv_cache_usage_ratio"), shown("cache_tokens")), (Some(0.5), Some(160.0)));
            assert_eq!(shown("block_tokens"), Some(16.0));
            eventually("foreign requests are seen", || shown("foreign_requests") == Some(running));
        }
    }

    fn attributes_of_a_worker_do_not_reach_its_name(v: Variant) {
        let server = worker().start();
        let proxy = proxy(v).url(&format!("{}#priority=1&cost=0.5", server.url())).start();
        proxy.client().post("/v1/completions", "{}").expect(200);
        let attempts = format!("vllm_proxy_worker_attempts_total{{worker=\"{}\"}}", server.url());
        assert_eq!(proxy.metric(&attempts), Some(1.0));
        assert_eq!(server.requests()[0].target, "/v1/completions");
    }
}
