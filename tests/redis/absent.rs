//! Redis that is not there, goes, stalls, forgets, or refuses: nobody but the log and the metrics notices, and when it
//! is back proxies choose as one again.

use std::process::Command;

use crate::redis::{PROMPTS, figure, is_up, known_again, on, peers, together};
use crate::support::{
    Log, NEWS, Proxy, Redis, Variant, Worker, absent_redis, binary_with_log, eventually, redis, redis_with,
    variants, worker,
};

fn workers(count: usize) -> Vec<Worker> {
    (0..count).map(|_| worker().start()).collect()
}

/// Requests through a proxy all succeed.
fn serves(proxy: &Proxy) {
    let mut client = proxy.client();
    for _ in 0..20 {
        client.chat("m").expect(200);
    }
}

/// Two proxies that share prompts, `fault`, which both notice, what happens meanwhile, `repair`, and then they share
/// again.
fn lost_and_found(v: Variant, mut redis: Redis, fault: fn(&mut Redis), repair: fn(&mut Redis)) {
    let workers = workers(3);
    let [first, second] = together(v, &redis, &workers);
    assert_eq!(known_again(&first, &second, &workers, &PROMPTS[..3]), 3);
    fault(&mut redis);
    for proxy in [&first, &second] {
        serves(proxy);
        eventually("it is noticed", || !is_up(proxy));
        serves(proxy);
        eventually("nobody is heard", || peers(proxy) == 0);
        assert_eq!(figure(proxy, "losses"), 1.0);
    }
    repair(&mut redis);
    for proxy in [&first, &second] {
        eventually("it is in use again", || is_up(proxy) && peers(proxy) == 1);
    }
    assert_eq!(known_again(&first, &second, &workers, &PROMPTS[3..]), 3);
}

variants! {
    fn a_redis_that_does_nothing_delays_nobody(v: Variant) {
        lost_and_found(v, redis(), |redis| redis.stop(), |redis| redis.cont());
    }

    fn a_redis_that_hangs_keeps_nobody_from_the_start(v: Variant) {
        let (redis, workers) = (redis(), workers(1));
        redis.stop();
        let proxy = on(v, &redis.url(), &workers).start();
        serves(&proxy);
        assert!(!is_up(&proxy), "it still hangs");
        redis.cont();
        eventually("it is used", || is_up(&proxy));
    }

    fn a_redis_that_restarts_without_its_data_is_used_again(v: Variant) {
        lost_and_found(v, redis(), Redis::kill, Redis::start);
    }

    fn a_redis_that_was_flushed_is_filled_anew(v: Variant) {
        let (redis, workers) = (redis(), workers(3));
        let [first, second] = together(v, &redis, &workers);
        assert_eq!(known_again(&first, &second, &workers, &PROMPTS[..2]), 2);
        for round in 1..3 {
            redis.ask::<()>(&["FLUSHALL"]);
            eventually("the stream is there again", || redis.ask::<u32>(&["EXISTS", NEWS]) == 1);
            let prompts = &PROMPTS[2 * round..2 * round + 2];
            assert_eq!(known_again(&first, &second, &workers, prompts), 2);
        }
        // what was told in full before is told in full again: a newcomer has no other way to know
        assert_eq!(known_again(&first, &second, &workers, &PROMPTS[..2]), 2);
        let newcomer = on(v, &redis.url(), &workers).start();
        eventually("all three hear each other", || peers(&newcomer) == 2 && peers(&first) == 2);
        assert_eq!(known_again(&newcomer, &first, &workers, &PROMPTS[..2]), 2);
        assert_eq!(figure(&first, "losses"), 0.0, "an empty Redis is none that is lost");
    }

    fn a_redis_without_memory_is_used_again_when_it_has_some(v: Variant) {
        let full = |redis: &mut Redis| redis.ask::<()>(&["CONFIG", "SET", "maxmemory", "1"]);
        let room = |redis: &mut Redis| redis.ask::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
        lost_and_found(v, redis_with(&["--maxmemory-policy", "noeviction"]), full, room);
    }

    fn a_redis_that_may_only_be_read_is_used_again_when_it_is_written(v: Variant) {
        let copy = |redis: &mut Redis| redis.ask::<()>(&["REPLICAOF", "127.0.0.1", "1"]);
        let own = |redis: &mut Redis| redis.ask::<()>(&["REPLICAOF", "NO", "ONE"]);
        lost_and_found(v, redis(), copy, own);
    }

    fn what_somebody_else_has_put_under_our_name_is_left_alone(v: Variant) {
        let foreign = |redis: &mut Redis| redis.ask::<()>(&["SET", NEWS, "not yours"]);
        let gone = |redis: &mut Redis| {
            assert_eq!(redis.ask::<String>(&["GET", NEWS]), "not yours");
            redis.ask::<()>(&["DEL", NEWS]);
        };
        lost_and_found(v, redis(), foreign, gone);
    }

    fn a_redis_that_comes_later_is_used_then(v: Variant) {
        let (mut redis, workers) = (absent_redis(&[]), workers(1));
        let proxies = [(); 2].map(|()| on(v, &redis.url(), &workers).start());
        for proxy in &proxies {
            serves(proxy);
            assert!(!is_up(proxy));
        }
        redis.start();
        for proxy in &proxies {
            eventually("they hear each other", || is_up(proxy) && peers(proxy) == 1);
            assert_eq!(figure(proxy, "losses"), 0.0, "what was never there was not lost");
        }
    }

    fn who_may_not_come_in_serves_on(v: Variant) {
        let redis = redis_with(&["--requirepass", "secret"]);
        let mut admin = redis.client_of(":secret");
        let user = ["SETUSER", "me", "on", ">p@ss", "~vllm-proxy:*", "+xadd", "+xread", "+xrange", "+pexpire", "+time", "+select"];
        redis::cmd("ACL").arg(&user).exec(&mut admin).unwrap();
        let workers = workers(1);
        for url in [redis.url(), redis.url_of(":wrong", 0), redis.url_of("me:wrong", 0), redis.url_of("nobody:p", 2)] {
            let proxy = on(v, &url, &workers).start();
            serves(&proxy);
            assert!(!is_up(&proxy), "{url}");
        }
        for url in [redis.url_of(":secret", 0), redis.url_of("me:p%40ss", 2)] {
            let proxies = [(); 2].map(|()| on(v, &url, &workers).start());
            for proxy in &proxies {
                eventually("they hear each other", || is_up(proxy) && peers(proxy) == 1);
            }
        }
        redis::cmd("ACL").arg(&["SETUSER", "me", "-xadd"]).exec(&mut admin).unwrap();
        let proxy = on(v, &redis.url_of("me:p%40ss", 2), &workers).start();
        serves(&proxy);
        assert!(!is_up(&proxy), "it may read only");
    }
}

/// The binary with what it logs of Redis.
fn logging(url: &str, worker: &Worker) -> (crate::support::Ended, Log) {
    let command = Command::new(env!("CARGO_BIN_EXE_vllm-proxy"));
    let worker = worker.url();
    let flags = ["--threads", "1", "--no-pin", "--redis", url, "--worker-urls", &worker];
    let (child, _, log) = binary_with_log(command, &flags, |_| ());
    (child, log)
}

/// Level and reason of what is told of Redis.
fn told(log: &Log) -> Vec<(String, String)> {
    let record = |line: String| serde_json::from_str::<serde_json::Value>(&line).expect("JSON");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let lines = log.lines_with("\"redis\":").into_iter().map(record);
    lines.map(|line| (text(&line["level"]).to_lowercase(), text(&line["reason"]))).collect()
}

#[test]
fn every_change_is_one_line_without_a_password() {
    let mut redis = redis_with(&["--requirepass", "tiger"]);
    let worker = worker().start();
    let (_child, log) = logging(&redis.url_of(":tiger", 1), &worker);
    eventually("it is found", || told(&log).len() == 1);
    redis.kill();
    eventually("it is lost", || told(&log).len() >= 2);
    redis.start();
    eventually("it is back", || log.lines_with("in use again").len() == 1);
    let lines = told(&log);
    let levels: Vec<_> = lines.iter().map(|(level, _)| level.as_str()).collect();
    assert!(levels.starts_with(&["info", "warn"]) && levels.ends_with(&["info"]), "{lines:?}");
    let mut reasons: Vec<_> =
        lines.iter().map(|(_, reason)| reason).filter(|reason| !reason.is_empty()).collect();
    let said = reasons.len();
    reasons.sort();
    reasons.dedup();
    assert_eq!((reasons.len(), levels.len()), (said, said + 2), "each reason once: {lines:?}");
    assert!(log.lines_with("tiger").is_empty(), "{lines:?}");
}

#[test]
fn what_redis_says_stands_in_the_log() {
    let redis = redis();
    let worker = worker().start();
    redis.ask::<()>(&["SET", NEWS, "not yours"]);
    let (_child, log) = logging(&redis.url(), &worker);
    let says = |what: &str| {
        eventually("it says why", || match told(&log).last() {
            Some((level, reason)) if level.starts_with("warn") && reason.contains(what) => Ok(()),
            _ => Err(told(&log)),
        });
    };
    says("WRONGTYPE");
    redis.ask::<()>(&["DEL", NEWS]);
    eventually("it is found", || log.lines_with("Redis is in use").len() == 1);
    redis.ask::<()>(&["CONFIG", "SET", "maxmemory", "1"]);
    says("OOM");
    redis.ask::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
    eventually("it is back", || log.lines_with("in use again").len() == 1);
    redis.ask::<()>(&["REPLICAOF", "127.0.0.1", "1"]);
    says("READONLY");
}

/// A big Redis reads its data for minutes.
#[test]
fn a_redis_that_is_loading_is_used_when_it_has_loaded() {
    let mut redis = absent_redis(&[
        "--key-load-delay",
        "50000",
        "--loading-process-events-interval-bytes",
        "1024",
        "--rdbcompression",
        "no",
    ]);
    redis.start();
    for key in 0..40 {
        redis.ask::<()>(&["SET", &format!("other:{key}"), &"x".repeat(1024)]);
    }
    redis.ask::<()>(&["SAVE"]);
    redis.kill();
    redis.start();
    let worker = worker().start();
    let (_child, log) = logging(&redis.url(), &worker);
    eventually("it is said", || told(&log).iter().any(|(_, reason)| reason.contains("LOADING")));
    eventually("it is found", || log.lines_with("Redis is in use").len() == 1);
    assert_eq!(redis.ask::<u32>(&["DBSIZE"]), 41, "what is of others is left alone");
}

#[test]
fn an_address_that_is_none_stops_the_start_with_one_line() {
    for (value, shown) in [
        ("redis://user:tiger@", "redis://***@"),
        ("redis://:tiger@host/x", "redis://***@host/x"),
        ("redis://tiger@host", "redis://***@host"),
        ("http://user:tiger@host", "http://***@host"),
        ("redis://:tiger", "redis://***"),
        ("unix:///s?pass=tiger&timeout=1", "unix:///s?***"),
        ("host:6379", "***"),
    ] {
        let refused = |command: &mut Command| {
            let output =
                command.env_remove("RUST_LOG").args(["--worker-urls", "http://w:1"]).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{value}: {output:?}");
            let line = String::from_utf8(output.stderr).unwrap();
            assert_eq!(line.lines().count(), 1, "{line}");
            assert!(!line.contains("tiger") && line.contains(shown) && line.contains("redis://"), "{line}");
            line
        };
        let binary = || Command::new(env!("CARGO_BIN_EXE_vllm-proxy"));
        assert!(refused(binary().args(["-R", value])).contains("--redis="), "{value}");
        assert!(refused(binary().env("VLLM_PXY_REDIS", value)).contains("VLLM_PXY_REDIS="), "{value}");
    }
}

#[test]
fn the_settings_are_shown_without_the_password() {
    let output = Command::new(env!("CARGO_BIN_EXE_vllm-proxy"))
        .args(["--print-config", "--worker-urls", "http://w:1"])
        .env("VLLM_PXY_REDIS", "redis://user:tiger@host/1")
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("redis://***@host/1") && !table.contains("tiger"), "{table}");
}
