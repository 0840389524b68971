//! What proxies on one Redis know of each other.

use crate::redis::{PROMPTS, ask, figure_at, is_up, known_again, of_others, on, peers, together, who_got_it};
use crate::support::{
    Client, Gate, Io, NEWS, Variant, Worker, binary, client, eventually, redis, variants, worker,
};

fn workers(count: usize) -> Vec<Worker> {
    (0..count).map(|_| worker().start()).collect()
}

variants! {
    fn what_others_have_in_flight_counts_in_the_choice(v: Variant) {
        let (redis, gate) = (redis(), Gate::new());
        let workers: Vec<_> = (0..2).map(|_| worker().holds(&gate).start()).collect();
        let [first, second] = together(v, &redis, &workers);
        let mut clients = Vec::new();
        for turn in 0..6 {
            let (sends, hears) = if turn % 2 == 0 { (&first, &second) } else { (&second, &first) };
            let before: u32 = of_others(hears, &workers).iter().sum();
            let mut client = sends.client();
            client.send(client::post("/v1/chat/completions", client::chat("m")));
            eventually("it has arrived", || gate.waiting() == turn + 1);
            eventually("the other knows", || of_others(hears, &workers).iter().sum::<u32>() == before + 1);
            clients.push(client);
        }
        let counts: Vec<_> = workers.iter().map(|worker| worker.requests().len()).collect();
        assert_eq!(counts, [3, 3], "as one proxy would deal them");
        gate.open();
        clients.iter_mut().for_each(|client| drop(client.response().expect(200)));
        for proxy in [&first, &second] {
            eventually("nothing is in flight", || of_others(proxy, &workers) == [0, 0]);
        }
    }

    fn four_proxies_deal_requests_as_one(v: Variant) {
        let (redis, gate) = (redis(), Gate::new());
        let workers: Vec<_> = (0..4).map(|_| worker().holds(&gate).start()).collect();
        let proxies: [_; 4] = together(v, &redis, &workers);
        let mut clients = Vec::new();
        for turn in 0..8 {
            let mut client = proxies[turn % 4].client();
            client.send(client::post("/v1/chat/completions", client::chat("m")));
            eventually("it has arrived", || gate.waiting() == turn + 1);
            clients.push(client);
            for (at, proxy) in proxies.iter().enumerate() {
                let own = (0..=turn).filter(|turn| turn % 4 == at).count();
                let others = (turn + 1 - own) as u32;
                eventually("all know", || of_others(proxy, &workers).iter().sum::<u32>() == others);
            }
        }
        let counts: Vec<_> = workers.iter().map(|worker| worker.requests().len()).collect();
        assert_eq!(counts, [2, 2, 2, 2]);
        gate.open();
        clients.iter_mut().for_each(|client| drop(client.response().expect(200)));
    }

    fn a_prompt_hits_its_worker_through_another_proxy(v: Variant) {
        let (redis, workers) = (redis(), workers(3));
        let [first, second] = together(v, &redis, &workers);
        assert_eq!(known_again(&first, &second, &workers, &PROMPTS), PROMPTS.len());
        let reverse: Vec<_> = PROMPTS.iter().map(|prompt| format!("Again: {prompt}")).collect();
        let reverse: Vec<_> = reverse.iter().map(String::as_str).collect();
        assert_eq!(known_again(&second, &first, &workers, &reverse), reverse.len());
    }

    fn a_newcomer_knows_what_was_sent_before_it_serves(v: Variant) {
        let (redis, workers) = (redis(), workers(3));
        let [first, second] = together(v, &redis, &workers);
        let homes: Vec<_> = PROMPTS
            .iter()
            .map(|prompt| {
                ask(&first, prompt, &["hello"]);
                who_got_it(&workers)
            })
            .collect();
        eventually("all is in Redis", || {
            second.metric("vllm_proxy_redis_received_events") == Some(2.0 * PROMPTS.len() as f64)
        });
        let newcomer = on(v, &redis.url(), &workers).start();
        for (prompt, home) in PROMPTS.iter().zip(homes) {
            ask(&newcomer, prompt, &["hello", "and then?"]);
            assert_eq!(who_got_it(&workers), home, "{prompt}");
        }
    }

    fn who_ends_says_so(v: Variant) {
        let (redis, gate) = (redis(), Gate::new());
        let workers = [worker().start()];
        let [first, second] = together(v, &redis, &workers);
        drop((first, gate));
        // a peer that says nothing is heard for 2.5 s more; on a busy machine this may be as late
        eventually("it is gone", || peers(&second) == 0);
        assert_eq!(of_others(&second, &workers), [0]);
    }

    fn proxies_meet_over_a_unix_socket(v: Variant) {
        let (redis, workers) = (redis(), workers(1));
        let url = format!("unix://{}?db=3", redis.socket().display());
        let proxies = [(); 2].map(|()| on(v, &url, &workers).start());
        for proxy in &proxies {
            eventually("they hear each other", || is_up(proxy) && peers(proxy) == 1);
        }
        assert_eq!(redis.ask::<u32>(&["EXISTS", NEWS]), 0, "it is in another database");
    }

    fn the_stream_ends_with_the_last_proxy(v: Variant) {
        let (redis, workers) = (redis(), workers(1));
        let proxy = on(v, &redis.url(), &workers).start();
        eventually("it is used", || is_up(&proxy));
        let left = || redis.ask::<i64>(&["PTTL", NEWS]);
        eventually("it has an end", || (1..=3_600_000).contains(&left()));
        assert_eq!(redis.ask::<Vec<String>>(&["KEYS", "*"]), [NEWS], "and nothing else is there");
    }
}

/// `kill -9`: nobody says goodbye.
#[test]
fn the_load_of_a_proxy_that_was_killed_expires() {
    let (redis, gate) = (redis(), Gate::new());
    let workers = [worker().holds(&gate).start()];
    let (url, worker_url) = (redis.url(), workers[0].url());
    let flags = ["--threads", "1", "--no-pin", "--redis", &url, "--worker-urls", &worker_url];
    let (mut killed, addr) = binary(&flags, |_| ());
    let v = Variant { io: Io::Epoll, shards: 1 };
    let proxy = on(v, &url, &workers).start();
    eventually("it knows its worker", || Client::connect(addr).get("/health").status == 200);
    let mut client = Client::connect(addr);
    client.send(client::post("/v1/chat/completions", client::chat("m")));
    eventually("its load is heard", || of_others(&proxy, &workers) == [1]);
    assert_eq!(figure_at(&mut Client::connect(addr), "vllm_proxy_peers "), 1.0);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    eventually("its load has expired", || of_others(&proxy, &workers) == [0] && peers(&proxy) == 0);
    gate.open();
}
