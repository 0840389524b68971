use std::process::{Command, Output};

use vllm_proxy::config::{Config, definition};

fn vllm_proxy(environment: &[(&str, &str)], flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vllm-proxy"))
        .env_clear()
        .envs(environment.iter().copied())
        .args(flags)
        .output()
        .expect("the binary runs")
}

/// The one line on stderr of a start that is refused as a usage error.
fn refused(environment: &[(&str, &str)], flags: &[&str]) -> String {
    let output = vllm_proxy(environment, flags);
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(2), "{environment:?} {flags:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.ends_with('\n'), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(output.stdout.is_empty(), "{stderr}");
    stderr.trim_end().trim_start_matches("error: ").to_owned()
}

/// Value and origin of a setting, as `--print-config` shows them.
fn setting(environment: &[(&str, &str)], flags: &[&str], name: &str) -> (String, String) {
    let mut all = vec!["--print-config", "--worker-urls", "http://w:1"];
    all.extend(flags);
    let output = vllm_proxy(environment, &all);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8(output.stdout).expect("text");
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(name));
    let mut words = line.unwrap_or_else(|| panic!("no {name} in {table}")).split_whitespace().skip(1);
    let value = words.next().expect("a value").to_owned();
    (value, words.collect::<Vec<_>>().join(" "))
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_default() {
    let environment = [("VLLM_PROXY_PORT", "7")];
    let pair = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    assert_eq!(setting(&environment, &["--port", "9"], "port"), pair("9", "flag"));
    assert_eq!(setting(&environment, &[], "port"), pair("7", "environment, VLLM_PROXY_PORT"));
    assert_eq!(setting(&[], &[], "port"), pair("8000", "default"));
}

#[test]
fn every_setting_has_an_environment_variable() {
    let steps = ["verbose", "quiet", "help", "version", "print_config"];
    for arg in definition().get_arguments() {
        let id = arg.get_id().as_str();
        let name = arg.get_env().and_then(|name| name.to_str());
        match id {
            _ if steps.contains(&id) => assert_eq!(name, None),
            "verbosity" => assert_eq!(name, Some("VLLM_PXY_VERBOSITY")),
            "log_format" => assert_eq!(name, Some("VLLM_PXY_LOGFORMAT")),
            "no_color" => assert_eq!(name, Some("NO_COLOR")),
            "redis" => assert_eq!(name, Some("VLLM_PXY_REDIS")),
            _ => assert_eq!(name, Some(format!("VLLM_PROXY_{}", id.to_uppercase()).as_str())),
        }
    }
}

/// A value that no setting takes; where any text is a value, one that the rules refuse.
fn nonsense(id: &str) -> &'static str {
    match id {
        "default_model" => "alias",
        _ => "no such thing",
    }
}

#[test]
fn a_wrong_value_is_refused_by_the_name_under_which_it_was_given() {
    let command = definition();
    let settings = command.get_arguments().filter(|arg| arg.get_env().is_some());
    let mut count = 0;
    for arg in settings {
        let (id, flag) = (arg.get_id().as_str(), arg.get_long().expect("a long flag"));
        let variable = arg.get_env().and_then(|name| name.to_str()).expect("a variable");
        if id == "no_color" {
            continue; // By its convention any value is a yes.
        }
        count += 1;
        let value = nonsense(id);
        let shown = if id == "worker_api_key" { "***" } else { value };
        let alias = ["demo", "--static-aliases", "alias:model"];
        let line = refused(&[(variable, value)], &alias[..if id == "static_aliases" { 1 } else { 3 }]);
        assert!(line.starts_with(&format!("{variable}={shown} (which sets --{flag}): must be ")), "{line}");
        if !arg.get_action().takes_values() || id == "no_pin" {
            continue;
        }
        let value = format!("--{flag}={value}");
        let mut flags = alias.to_vec();
        flags.push(&value);
        // The environment is not blamed for the flag's value.
        let line = refused(&[(variable, "1")], &flags);
        assert!(line.starts_with(&format!("--{flag}={shown}: must be ")), "{line}");
    }
    assert!(count > 20, "{count} settings were tried");
}

#[test]
fn values_out_of_range_are_refused_with_what_is_allowed() {
    for (flag, value, allowed) in [
        ("--port", "65536", "a port from 0 to 65535"),
        ("--threads", "0", "a whole number from 1 to 1024"),
        ("--threads", "1025", "a whole number from 1 to 1024"),
        ("--max-body-bytes", "0", "a whole number of bytes from 1 to 2^63 - 1"),
        ("--max-body-bytes", "9223372036854775808", "a whole number of bytes from 1 to 2^63 - 1"),
        ("--body-peek-bytes", "536870913", "a whole number of bytes, not more than --max-body-bytes"),
        ("--head-timeout-secs", "0", "a whole number of seconds from 1 to 31536000"),
        ("--head-timeout-secs", "18446744073709551615", "a whole number of seconds from 1 to 31536000"),
        ("--shutdown-grace-secs", "-1", "a whole number of seconds from 0 to 31536000"),
        ("--pool-size", "65537", "a whole number from 0 to 65536"),
        ("--health-check-interval-secs", "0", "a number of seconds from 0.01 to 31536000"),
        ("--health-check-interval-secs", "-0.5", "a number of seconds from 0.01 to 31536000"),
        ("--model-refresh-secs", "NaN", "a number of seconds from 0.01 to 31536000"),
        ("--engine-stats-interval", "0.001", "0, or a number of seconds from 0.01 to 31536000"),
        ("--engine-stats-interval", "-1", "0, or a number of seconds from 0.01 to 31536000"),
        ("--data-parallel-size", "0", "a whole number from 1 to 1024"),
        ("--data-parallel-size", "1025", "a whole number from 1 to 1024"),
        ("--dns-refresh-secs", "inf", "a number of seconds from 0.01 to 31536000"),
        ("--default-model", "", "the name of a model, not empty and not an alias"),
        ("--policy", "kvaware", "cache_aware, least_requests, round_robin, "),
        ("--prompt-peek-bytes", "536870913", "a whole number of bytes, not more than --max-body-bytes"),
        ("--prefix-index-bytes", "1099511627777", "a whole number of bytes from 0 to 2^40"),
        ("--cache-miss-weight-max", "1.1", "a number from 1.2 to 100"),
        ("--model-policy", "a=kv-aware", "model=policy, "),
        ("--model-policy", "=random", "model=policy, "),
        ("--hash-load-factor", "0.9", "0, or a number from 1 to 1000"),
        ("--hash-load-factor", "NaN", "0, or a number from 1 to 1000"),
        ("--max-concurrent-requests", "-1", "a whole number from 0 to 4294967295"),
        ("--queue-size", "1048577", "a whole number from 0 to 1048576"),
        ("--queue-timeout-secs", "0", "a whole number of seconds from 1 to 31536000"),
        ("--rate-limit-tokens-per-second", "-1", "0, or a number from 0.001 to 1000000000"),
        ("--rate-limit-tokens-per-second", "NaN", "0, or a number from 0.001 to 1000000000"),
        ("--queue-fairness-header", "a b", "the name of a header"),
        ("--body-memory-bytes", "9223372036854775808", "a whole number of bytes from 0 to 2^63 - 1"),
        ("--capacity-running-weight", "-1", "a number from 0 to 1000"),
        ("--capacity-waiting-weight", "inf", "a number from 0 to 1000"),
        ("--sync-interval-ms", "4", "a whole number of milliseconds from 5 to 1000"),
        ("--sync-interval-ms", "1001", "a whole number of milliseconds from 5 to 1000"),
        ("--redis-stream-bytes", "65535", "a whole number of bytes from 65536 to 2^40"),
    ] {
        let line = refused(&[], &["demo", flag, value]);
        assert!(line.starts_with(&format!("{flag}={value}: must be {allowed}")), "{line}");
    }
}

#[test]
fn a_model_has_one_policy_under_its_own_name() {
    let reason = "must be model=policy, or several of them separated by commas, each model once";
    let line = refused(&[], &["demo", "--model-policy=a=random,b=random,a=session"]);
    assert!(line.starts_with(&format!("--model-policy=a=consistent_hash: {reason}")), "{line}");
    let line = refused(&[], &["demo", "--static-aliases=x:m", "--model-policy=x=random"]);
    assert!(line.starts_with(&format!("--model-policy=x=random: {reason}")), "{line}");
    let (value, _) =
        setting(&[], &["--static-aliases=x:m", "--model-policy", "m=random", "n=p2c"], "model-policy");
    assert_eq!(value, "m=random,n=p2c");
}

#[test]
fn names_that_other_routers_have_for_a_flag_are_read() {
    assert_eq!(setting(&[], &["--routing-logic", "roundrobin"], "policy").0, "roundrobin");
    for flag in ["--session-key", "--routing-key-headers"] {
        assert_eq!(setting(&[], &[flag, "x-flow"], "session-headers").0, "x-flow");
    }
}

#[test]
fn limits_themselves_are_allowed() {
    for flags in [
        ["--threads", "1024"],
        ["--shutdown-grace-secs", "0"],
        ["--pool-size", "0"],
        ["--max-concurrent-requests", "4294967295"],
        ["--queue-size", "0"],
        ["--rate-limit-tokens-per-second", "0.5"],
        ["--body-memory-bytes", "0"],
        ["--hash-load-factor", "0"],
        ["--hash-load-factor", "1"],
        ["--capacity-waiting-weight", "0"],
        ["--health-check-interval-secs", "0.01"],
        ["--max-body-bytes", "9223372036854775807"],
        ["--engine-stats-interval", "0"],
        ["--data-parallel-size", "1024"],
        ["--write-timeout-secs", "31536000"],
    ] {
        assert!(Config::from_flags(flags).is_ok(), "{flags:?}");
    }
}

#[test]
fn attempts_are_counted_in_one_way_and_pauses_set_in_one_way() {
    for (first, second) in [
        ("--max-retries=3", "--retry-max-retries=4"),
        ("--retry-delay=1", "--retry-initial-backoff-ms=5"),
        ("--retry-delay=1", "--retry-max-backoff-ms=5"),
        ("--retry-delay=1", "--retry-backoff-multiplier=2"),
        ("--retry-delay=1", "--retry-jitter-factor=0"),
    ] {
        let told = refused(&[], &[first, second]);
        let name = |flag: &str| flag.split('=').next().map(str::to_owned).unwrap_or_default();
        assert!(told.contains("cannot be used with") && told.contains(&name(first)), "{told}");
        assert!(told.contains(&name(second)), "{told}");
    }
    let both = [("VLLM_PROXY_MAX_RETRIES", "2"), ("VLLM_PROXY_RETRY_MAX_RETRIES", "3")];
    assert!(refused(&both, &[]).contains("cannot be used with"));
}

#[test]
fn worker_urls_and_static_backends_are_one_list() {
    for flags in [
        &["--worker-urls", "http://a", "http://b:80/"][..],
        &["--worker-urls", "http://a,http://b"],
        &["--static-backends", "http://a,http://b"],
        &["--static-backends", "http://a", "--worker-urls", "http://b", "http://a:80"],
        &["--worker-urls=http://a", "--worker-urls=http://b"],
    ] {
        let config = Config::from_flags(flags.iter().copied()).unwrap();
        let urls: Vec<_> = config.worker_urls.iter().map(|server| server.url.as_str()).collect();
        assert_eq!(urls, ["http://a:80", "http://b:80"], "{flags:?}");
    }
    let (urls, _) = setting(&[("VLLM_PROXY_WORKER_URLS", "http://a,http://b")], &[], "worker-urls");
    assert_eq!(urls, "http://w:1", "a flag replaces the environment's list, it does not add to it");
}

#[test]
fn what_is_said_of_a_worker_stands_behind_its_url_and_is_shown() {
    let flags =
        ["--worker-urls", "http://a#priority=10&cost=0.5&max_concurrent_requests=8,http://b", "http://b:80"];
    let config = Config::from_flags(flags).unwrap();
    let traits: Vec<_> =
        config.worker_urls.iter().map(|server| (server.traits.priority, server.traits.cost)).collect();
    assert_eq!(traits, [(10, 0.5), (0, 1.0)]);
    let (urls, _) = setting(&[], &flags, "worker-urls");
    assert_eq!(urls, "http://w:1,http://a:80#priority=10&cost=0.5&max_concurrent_requests=8,http://b:80");
}

#[test]
fn what_cannot_be_said_of_a_worker_is_refused_in_one_line() {
    for (worker, named) in [
        ("http://a#cost=0", "`cost=0` behind the `#` of a worker: cost must be a number greater than 0"),
        ("http://a#prio=1", "`prio=1` behind the `#` of a worker: what may stand there is priority=…"),
        ("http://a#cost=2&cost=2", "`cost=2` behind the `#` of a worker: it stands there twice"),
    ] {
        let line = refused(&[], &["--worker-urls", worker]);
        assert!(line.starts_with(&format!("--worker-urls={worker}: must be http://host")), "{line}");
        assert!(line.contains(named), "{line}");
    }
    let line = refused(&[], &["--worker-urls", "http://a#cost=2,http://b,http://a"]);
    assert!(
        line.starts_with("--worker-urls=http://a:80: must be ") && line.contains("same attributes"),
        "{line}"
    );
}

#[test]
fn every_rank_of_every_server_is_a_worker() {
    for flag in ["--data-parallel-size", "--intra-node-data-parallel-size"] {
        let config = Config::from_flags(["--worker-urls", "http://a,http://b", flag, "2"]).unwrap();
        let workers: Vec<_> =
            config.workers().map(|worker| (worker.url.host().to_owned(), worker.rank)).collect();
        let a = |rank| ("a".to_owned(), Some(rank));
        let b = |rank| ("b".to_owned(), Some(rank));
        assert_eq!(workers, [a(0), a(1), b(0), b(1)]);
    }
    let config = Config::from_flags(["--worker-urls", "http://a"]).unwrap();
    assert!(config.workers().all(|worker| worker.rank.is_none()));
}

#[test]
fn without_a_worker_the_flag_is_named() {
    for environment in [&[][..], &[("VLLM_PROXY_WORKER_URLS", "")]] {
        let line = refused(environment, &[]);
        assert!(line.contains("--worker-urls") && line.contains("VLLM_PROXY_WORKER_URLS"), "{line}");
    }
}

#[test]
fn an_empty_variable_is_not_set() {
    let (value, origin) = setting(&[("VLLM_PROXY_PORT", ""), ("VLLM_PROXY_IO", "")], &[], "port");
    assert_eq!((value.as_str(), origin.as_str()), ("8000", "default"));
}

#[test]
fn what_kubernetes_puts_into_a_pod_is_no_port() {
    // https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    let variables = [("VLLM_PROXY_PORT", "tcp://10.0.0.11:8000"), ("VLLM_PROXY_SERVICE_PORT", "8000")];
    let (value, origin) = setting(&variables, &[], "port");
    assert_eq!((value.as_str(), origin.as_str()), ("8000", "default"));
}

#[test]
fn secrets_are_told_nowhere() {
    let key = "tops3cret";
    let (value, _) = setting(&[], &["--worker-api-key", key], "worker-api-key");
    assert_eq!(value, "***");
    let variable = [("VLLM_PROXY_WORKER_API_KEY", key)];
    let help = String::from_utf8(vllm_proxy(&variable, &["--help"]).stdout).unwrap();
    assert!(help.contains("VLLM_PROXY_WORKER_API_KEY") && !help.contains(key));
    let line = refused(&[], &["--worker-urls", "http://user:tops3cret@a"]);
    assert!(line.contains("http://***@a") && !line.contains(key), "{line}");
    let line = refused(&[], &["demo", "--worker-api-key", "tops3cret\n"]);
    assert!(!line.contains(key), "{line}");
}

#[test]
fn what_is_wrong_with_the_address_of_a_redis_is_told_without_its_password() {
    for (url, reason) in [
        ("redis://me:tops3cret@host/abc", "(a database is a number from 0)"),
        ("redis://me:tops3cret@host/1?protocol=resp3", "(a parameter that is not known here)"),
        ("http://me:tops3cret@host", "(not the URL of a Redis)"),
        ("redis://tops3cret@host", "(a user without a password; a password alone has a colon before it)"),
    ] {
        let by_flag = refused(&[], &["demo", "--redis", url]);
        let by_variable = refused(&[("VLLM_PXY_REDIS", url)], &["demo"]);
        for line in [by_flag, by_variable] {
            assert!(line.contains(reason) && !line.contains("tops3cret"), "{line}");
        }
    }
}

#[test]
fn unknown_flags_are_refused_with_the_nearest_one() {
    let line = refused(&[], &["--worker-url", "http://a"]);
    assert!(
        line.contains("--worker-url") && line.contains("tip: ") && line.contains("--worker-urls"),
        "{line}"
    );
}

#[test]
fn steps_of_v_and_q_are_counted_from_the_environment() {
    let environment = [("VLLM_PXY_VERBOSITY", "warning")];
    for (flags, verbosity) in [
        (&[][..], "Warning"),
        (&["-v"], "Info"),
        (&["-vvv"], "Verbose"),
        (&["-v", "-v", "-q"], "Info"),
        (&["-qqqq"], "Error"),
        (&["--verbose", "--verbose", "--verbose", "--verbose", "--verbose"], "Loud"),
    ] {
        assert_eq!(setting(&environment, flags, "verbosity").0, verbosity, "{flags:?}");
    }
}

#[test]
fn help_and_version_do_not_need_a_reader() {
    for flag in ["--help", "--version"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let status =
            Command::new(env!("CARGO_BIN_EXE_vllm-proxy")).arg(flag).stdout(writer).status().unwrap();
        assert!(status.success(), "{flag}: {status}");
    }
}
