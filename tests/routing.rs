//! Least requests, the policy for now: fewest in flight, ties spread evenly.

use crate::support::{Gate, client, eventually, proxy, variants, worker};

variants! {
    fn requests_in_flight_spread_over_the_workers(v: Variant) {
        let gate = Gate::new();
        let workers: Vec<_> = (0..3).map(|_| worker().holds(&gate).start()).collect();
        let proxy = workers.iter().fold(proxy(v).arg("--policy", "least_requests"), |proxy, worker| proxy.worker(worker)).start();
        let mut clients: Vec<_> = (0..9).map(|_| proxy.client()).collect();
        for (count, client) in clients.iter_mut().enumerate() {
            client.send(client::post("/v1/chat/completions", client::chat("m")));
            eventually("the request has arrived", || gate.waiting() == count + 1);
            let least = workers.iter().map(|worker| worker.requests().len()).min().unwrap();
            let most = workers.iter().map(|worker| worker.requests().len()).max().unwrap();
            assert!(most - least <= 1, "after {} requests one worker has {most}, another {least}", count + 1);
        }
        gate.open();
        clients.iter_mut().for_each(|client| assert_eq!(client.response().expect(200).completion(), "ok"));
    }

    fn ties_spread_evenly(v: Variant) {
        let workers: Vec<_> = (0..3).map(|_| worker().start()).collect();
        let proxy = workers.iter().fold(proxy(v).arg("--policy", "least_requests"), |proxy, worker| proxy.worker(worker)).start();
        let mut client = proxy.client();
        for _ in 0..30 {
            client.chat("m").expect(200);
        }
        let counts: Vec<_> = workers.iter().map(|worker| worker.requests().len()).collect();
        assert!(counts.iter().all(|count| *count >= 5), "30 requests one after the other went {counts:?}");
    }

    fn an_aborted_request_is_not_in_flight_any_more(v: Variant) {
        let gate = Gate::new();
        let workers = [worker().holds(&gate).start(), worker().holds(&gate).start()];
        let proxy = proxy(v).arg("--policy", "least_requests").worker(&workers[0]).worker(&workers[1]).start();
        for round in 1..=3 {
            let mut gone: Vec<_> = (0..4).map(|_| proxy.client()).collect();
            for client in &mut gone {
                client.send(client::post("/v1/chat/completions", client::chat("m")));
            }
            eventually("four wait", || gate.waiting() == 4);
            drop(gone);
            eventually("nobody waits", || gate.waiting() == 0);
            eventually("the count is back at zero", || {
                proxy.metric("vllm_proxy_worker_in_flight").ok_or("no metric").and_then(|count| {
                    if count == 0.0 { Ok(()) } else { Err("in flight") }
                })
            });
            let counts = workers.each_ref().map(|worker| worker.requests().len());
            assert_eq!(counts, [2 * round, 2 * round], "round {round}");
        }
    }
}
