//! What is allowed for each setting, in one row each; the words serve the parser's refusals too.

use std::{
    collections::{HashMap, HashSet},
    fmt::Display,
    ops::RangeInclusive,
};

use thiserror::Error;

use super::Config;
use crate::workers::MOST_FAILURES;

/// A year. Longer times have no use, and sums with them must not overflow.
const MAX_SECONDS: u64 = 31_536_000;

/// Linux takes no longer pause before the probes of a silent connection (`MAX_TCP_KEEPIDLE`).
const MAX_KEEPALIVE_SECONDS: u64 = 32_767;

/// Linux counts it in milliseconds of 32 bits with a sign.
const MAX_USER_TIMEOUT_SECONDS: u64 = i32::MAX as u64 / 1000;

/// The shortest interval between two probes or looks, in seconds: below it a worker would see little else.
const MIN_INTERVAL_SECONDS: f64 = 0.01;

/// More shards than any machine has cores is a slip of the pen.
const MAX_SHARDS: usize = 1024;

/// More data-parallel ranks than any vLLM server has.
const MAX_RANKS: u32 = 1024;

/// Probes that a judgement may need: more than a day of them.
const MAX_PROBES: u32 = 1000;

/// Idle connections per shard and worker; the ports of one address are 65,536.
const MAX_POOL: usize = 65_536;

/// Attempts of one request; more would only keep its client waiting.
const MAX_ATTEMPTS: u32 = 100;

/// The longest pause between two attempts, an hour, in milliseconds.
const MAX_PAUSE_MS: u64 = 3_600_000;

/// The longest interval between two batches of news, in milliseconds: a proxy that is silent for two and a half times
/// as long counts as gone.
const MAX_SYNC_MS: u64 = 1000;

const MILLISECONDS: &str = "a whole number of milliseconds from 0 to 3600000";
/// Waiting requests. More could not be served in any time that a client waits.
const MAX_QUEUE: u32 = 1 << 20;

const SECONDS: &str = "a whole number of seconds from 1 to 31536000";
const SECONDS_OR_ZERO: &str = "a whole number of seconds from 0 to 31536000";
const INTERVAL: &str = "a number of seconds from 0.01 to 31536000";
const INTERVAL_OR_ZERO: &str = "0, or a number of seconds from 0.01 to 31536000";
const POLICY: &str =
    "cache_aware, least_requests, round_robin, random, power_of_two, capacity, consistent_hash";
const SWITCH: &str = "true or false";

/// What is allowed for one setting.
pub(super) struct Rule {
    /// The setting's field, which is clap's id of its argument.
    pub(super) id: &'static str,
    /// Completes the sentence "must be …".
    pub(super) allowed: &'static str,
    /// The value that is not allowed, as it is shown.
    check: fn(&Config) -> Result<(), String>,
}

/// A setting whose value has the right form but is not allowed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("--{}={value}: must be {allowed}", id.replace('_', "-"))]
pub struct Invalid {
    /// The setting's field.
    pub id: &'static str,
    /// Its value as it may be shown; a secret is masked.
    pub value: String,
    /// Completes the sentence "must be …".
    pub allowed: &'static str,
}

/// One row per setting that takes a value.
#[rustfmt::skip]
pub(super) const RULES: &[Rule] = &[
    Rule { id: "worker_urls", allowed: "http://host[:port][/prefix][#attributes], or several of them separated by commas, with the same attributes for the same URL", check: worker_urls },
    Rule { id: "data_parallel_size", allowed: "a whole number from 1 to 1024", check: |c| within(c.data_parallel_size, 1..=MAX_RANKS) },
    Rule { id: "static_aliases", allowed: "alias:model, or several of them separated by commas, with one model for each alias", check: aliases },
    Rule { id: "default_model", allowed: "the name of a model, not empty and not an alias", check: default_model },

    Rule { id: "host", allowed: "an IPv4 or IPv6 address", check: |_| Ok(()) },
    Rule { id: "port", allowed: "a port from 0 to 65535", check: |_| Ok(()) },
    Rule { id: "threads", allowed: "a whole number from 1 to 1024", check: |c| within(c.shards.threads.map_or(1, usize::from), 1..=MAX_SHARDS) },
    Rule { id: "no_pin", allowed: SWITCH, check: |_| Ok(()) },
    Rule { id: "io", allowed: "auto, uring or epoll", check: |_| Ok(()) },
    Rule { id: "shutdown_grace_secs", allowed: SECONDS_OR_ZERO, check: |c| within(c.shards.shutdown_grace_secs, 0..=MAX_SECONDS) },

    Rule { id: "policy", allowed: POLICY, check: |_| Ok(()) },
    Rule { id: "model_policy", allowed: "model=policy, or several of them separated by commas, each model once and by its own name, not by an alias", check: model_policy },
    Rule { id: "session_headers", allowed: "the name of a header, or several of them separated by commas", check: |_| Ok(()) },
    Rule { id: "hash_load_factor", allowed: "0, or a number from 1 to 1000", check: |c| hash_load_factor(c.routing.hash_load_factor) },
    Rule { id: "capacity_running_weight", allowed: "a number from 0 to 1000", check: |c| within(c.routing.capacity_running_weight, 0.0..=1000.0) },
    Rule { id: "capacity_waiting_weight", allowed: "a number from 0 to 1000", check: |c| within(c.routing.capacity_waiting_weight, 0.0..=1000.0) },
    Rule { id: "prefix_index_bytes", allowed: "a whole number of bytes from 0 to 2^40", check: |c| within(c.routing.prefix_index_bytes, 0..=1 << 40) },
    Rule { id: "worker_cache_tokens", allowed: "a whole number from 0 to 2^40", check: |c| within(c.routing.worker_cache_tokens, 0..=1 << 40) },
    Rule { id: "cache_miss_weight_max", allowed: "a number from 1.2 to 100", check: |c| within(c.routing.cache_miss_weight_max, 1.2..=100.0) },

    Rule { id: "hash_credit", allowed: "a number from 0 to 1", check: |c| within(c.routing.hash_credit, 0.0..=1.0) },
    Rule { id: "slow_start_secs", allowed: INTERVAL_OR_ZERO, check: |c| interval_or_zero(c.routing.slow_start_secs) },
    Rule { id: "no_panic_mode", allowed: SWITCH, check: |_| Ok(()) },

    Rule { id: "max_body_bytes", allowed: "a whole number of bytes from 1 to 2^63 - 1", check: |c| within(c.proxy.max_body_bytes, 1..=i64::MAX as u64) },
    Rule { id: "body_peek_bytes", allowed: "a whole number of bytes, not more than --max-body-bytes", check: |c| within(c.proxy.body_peek_bytes, 0..=c.proxy.max_body_bytes) },
    Rule { id: "prompt_peek_bytes", allowed: "a whole number of bytes, not more than --max-body-bytes", check: |c| within(c.proxy.prompt_peek_bytes, 0..=c.proxy.max_body_bytes) },
    Rule { id: "worker_header", allowed: SWITCH, check: |_| Ok(()) },
    Rule { id: "head_timeout_secs", allowed: SECONDS, check: |c| within(c.proxy.head_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "body_timeout_secs", allowed: SECONDS, check: |c| within(c.proxy.body_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "body_min_rate_bytes", allowed: "a whole number of bytes from 0 to 2^30", check: |c| within(c.proxy.body_min_rate_bytes, 0..=1 << 30) },
    Rule { id: "keepalive_timeout_secs", allowed: SECONDS, check: |c| within(c.proxy.keepalive_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "write_timeout_secs", allowed: SECONDS, check: |c| within(c.proxy.write_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "response_timeout_secs", allowed: SECONDS_OR_ZERO, check: |c| within(c.proxy.response_timeout_secs, 0..=MAX_SECONDS) },
    Rule { id: "stream_idle_timeout_secs", allowed: SECONDS_OR_ZERO, check: |c| within(c.proxy.stream_idle_timeout_secs, 0..=MAX_SECONDS) },
    Rule { id: "request_timeout_secs", allowed: SECONDS_OR_ZERO, check: |c| within(c.proxy.request_timeout_secs, 0..=MAX_SECONDS) },
    Rule { id: "worker_write_timeout_secs", allowed: SECONDS, check: |c| within(c.proxy.worker_write_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "sse_keepalive_secs", allowed: SECONDS_OR_ZERO, check: |c| within(c.proxy.sse_keepalive_secs, 0..=MAX_SECONDS) },

    Rule { id: "tcp_keepalive_secs", allowed: "a whole number of seconds from 0 to 32767", check: |c| within(c.net.tcp_keepalive_secs, 0..=MAX_KEEPALIVE_SECONDS) },
    Rule { id: "tcp_user_timeout_secs", allowed: "a whole number of seconds from 0 to 2147483", check: |c| within(c.net.tcp_user_timeout_secs, 0..=MAX_USER_TIMEOUT_SECONDS) },

    Rule { id: "retry_max_retries", allowed: "a whole number from 1 to 100", check: |c| within(c.retries.retry_max_retries, 1..=MAX_ATTEMPTS) },
    Rule { id: "retry_initial_backoff_ms", allowed: MILLISECONDS, check: |c| within(c.retries.retry_initial_backoff_ms, 0..=MAX_PAUSE_MS) },
    Rule { id: "retry_max_backoff_ms", allowed: MILLISECONDS, check: |c| within(c.retries.retry_max_backoff_ms, 0..=MAX_PAUSE_MS) },
    Rule { id: "retry_backoff_multiplier", allowed: "a number from 1 to 100", check: |c| within(c.retries.retry_backoff_multiplier, 1.0..=100.0) },
    Rule { id: "retry_jitter_factor", allowed: "a number from 0 to 1", check: |c| within(c.retries.retry_jitter_factor, 0.0..=1.0) },
    Rule { id: "retry_statuses", allowed: "408, 429, a status from 500 to 599, or several of them separated by commas", check: retry_statuses },
    Rule { id: "disable_retries", allowed: SWITCH, check: |_| Ok(()) },
    Rule { id: "retry_buffer_bytes", allowed: "a whole number of bytes", check: |_| Ok(()) },
    Rule { id: "max_retries", allowed: "a whole number from 0 to 99", check: |c| within(c.retries.max_retries.unwrap_or(0), 0..=MAX_ATTEMPTS - 1) },
    Rule { id: "retry_delay", allowed: "a number of seconds from 0 to 3600", check: |c| within(c.retries.retry_delay.unwrap_or(0.0), 0.0..=3600.0) },

    Rule { id: "max_concurrent_requests", allowed: "a whole number from 0 to 4294967295", check: |_| Ok(()) },
    Rule { id: "fleet_max_concurrent_requests", allowed: "a whole number from 0 to 4294967295", check: |_| Ok(()) },
    Rule { id: "queue_size", allowed: "a whole number from 0 to 1048576", check: |c| within(c.admission.queue_size, 0..=MAX_QUEUE) },
    Rule { id: "queue_timeout_secs", allowed: SECONDS, check: |c| within(c.admission.queue_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "rate_limit_tokens_per_second", allowed: "0, or a number from 0.001 to 1000000000", check: |c| rate(c.admission.rate_limit_tokens_per_second) },
    Rule { id: "queue_fairness_header", allowed: "the name of a header", check: |_| Ok(()) },
    Rule { id: "body_memory_bytes", allowed: "a whole number of bytes from 0 to 2^63 - 1", check: |c| within(c.admission.body_memory_bytes, 0..=i64::MAX as u64) },

    Rule { id: "connect_timeout_secs", allowed: SECONDS, check: |c| within(c.upstream.connect_timeout_secs, 1..=MAX_SECONDS) },
    Rule { id: "pool_idle_timeout_secs", allowed: SECONDS_OR_ZERO, check: |c| within(c.upstream.pool_idle_timeout_secs, 0..=MAX_SECONDS) },
    Rule { id: "pool_size", allowed: "a whole number from 0 to 65536", check: |c| within(c.upstream.pool_size, 0..=MAX_POOL) },

    Rule { id: "health_check_interval_secs", allowed: INTERVAL, check: |c| interval(c.control.health_check_interval_secs) },
    Rule { id: "health_check_timeout_secs", allowed: INTERVAL, check: |c| interval(c.control.health_check_timeout_secs) },
    Rule { id: "health_check_success_threshold", allowed: "a whole number from 1 to 1000", check: |c| within(c.control.health_check_success_threshold, 1..=MAX_PROBES) },
    Rule { id: "health_check_consecutive_failures", allowed: "a whole number from 1 to 1000", check: |c| within(c.control.health_check_consecutive_failures, 1..=MAX_PROBES) },
    Rule { id: "health_check_window_size", allowed: "a whole number from 0 to 1000", check: |c| within(c.control.health_check_window_size, 0..=MAX_PROBES as usize) },
    Rule { id: "health_check_min_success_rate", allowed: "a number from 0 to 1", check: |c| within(c.control.health_check_min_success_rate, 0.0..=1.0) },
    Rule { id: "health_check_max_response_time", allowed: INTERVAL, check: |c| interval(c.control.health_check_max_response_time) },
    Rule { id: "health_check_max_ejected_share", allowed: "a number from 0 to 1", check: |c| within(c.control.health_check_max_ejected_share, 0.0..=1.0) },
    Rule { id: "static_backend_health_checks", allowed: SWITCH, check: |_| Ok(()) },
    Rule { id: "static_model_types", allowed: "chat, completion, embeddings, rerank, score, transcription, vision or messages, or one of them for each worker, separated by commas", check: model_types },
    Rule { id: "static_backend_health_check_interval", allowed: INTERVAL, check: |c| interval(c.control.static_backend_health_check_interval) },
    Rule { id: "static_backend_health_check_timeout_seconds", allowed: INTERVAL, check: |c| interval(c.control.static_backend_health_check_timeout_seconds) },
    Rule { id: "model_refresh_secs", allowed: INTERVAL, check: |c| interval(c.control.model_refresh_secs) },
    Rule { id: "dns_refresh_secs", allowed: INTERVAL, check: |c| interval(c.control.dns_refresh_secs) },
    Rule { id: "engine_stats_interval", allowed: INTERVAL_OR_ZERO, check: |c| interval_or_zero(c.control.engine_stats_interval) },
    Rule { id: "worker_api_key", allowed: "visible ASCII characters", check: worker_api_key },

    Rule { id: "cb_failure_threshold", allowed: "a whole number from 1 to 1024", check: |c| within(c.breakers.cb_failure_threshold, 1..=MOST_FAILURES) },
    Rule { id: "cb_success_threshold", allowed: "a whole number from 1 to 1000000", check: |c| within(c.breakers.cb_success_threshold, 1..=1_000_000) },
    Rule { id: "cb_timeout_duration_secs", allowed: SECONDS, check: |c| within(c.breakers.cb_timeout_duration_secs, 1..=MAX_SECONDS) },
    Rule { id: "cb_window_duration_secs", allowed: SECONDS, check: |c| within(c.breakers.cb_window_duration_secs, 1..=MAX_SECONDS) },
    Rule { id: "disable_circuit_breaker", allowed: SWITCH, check: |_| Ok(()) },

    Rule { id: "redis", allowed: "redis://[[user]:password@]host[:port][/database], the same with rediss://, unix:///path[?db=N], local or none", check: |_| Ok(()) },
    Rule { id: "sync_interval_ms", allowed: "a whole number of milliseconds from 5 to 1000", check: |c| within(c.sync.sync_interval_ms, 5..=MAX_SYNC_MS) },
    Rule { id: "redis_stream_bytes", allowed: "a whole number of bytes from 65536 to 2^40", check: |c| within(c.sync.redis_stream_bytes, 1 << 16..=1 << 40) },

    Rule { id: "verbosity", allowed: "1, Loud, Verbose, Debug, Info, Warning, 0, Quiet or Error", check: |_| Ok(()) },
    Rule { id: "log_format", allowed: "txt, json, yml or yaml", check: |_| Ok(()) },
    Rule { id: "no_color", allowed: SWITCH, check: |_| Ok(()) },
];

/// The row of a setting.
pub(super) fn rule(id: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.id == id)
}

impl Config {
    /// Holds every value against what is allowed for its setting, and folds workers that are named twice.
    ///
    /// That there is a worker at all is not checked: a demonstration brings its own.
    ///
    /// # Errors
    /// The first setting, in the order of the rules, whose value is not allowed.
    pub fn validated(mut self) -> Result<Self, Invalid> {
        for Rule { id, allowed, check } in RULES {
            check(&self).map_err(|value| Invalid { id, value, allowed })?;
        }
        let mut seen = HashSet::new();
        self.worker_urls.retain(|server| seen.insert(server.url.clone()));
        Ok(self)
    }
}

fn within<T: PartialOrd + Display>(value: T, allowed: RangeInclusive<T>) -> Result<(), String> {
    if allowed.contains(&value) { Ok(()) } else { Err(value.to_string()) }
}

/// NaN is in no range.
fn interval(seconds: f64) -> Result<(), String> {
    within(seconds, MIN_INTERVAL_SECONDS..=MAX_SECONDS as f64)
}

fn interval_or_zero(seconds: f64) -> Result<(), String> {
    if seconds == 0.0 { Ok(()) } else { interval(seconds) }
}

/// Without workers (a demonstration brings its own) any number fits.
fn model_types(config: &Config) -> Result<(), String> {
    let types = &config.control.static_model_types;
    let servers: HashSet<_> = config.worker_urls.iter().map(|server| &server.url).collect();
    if types.len() == 1 || servers.is_empty() || types.len() == servers.len() {
        return Ok(());
    }
    Err(types.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
}

fn rate(per_second: f64) -> Result<(), String> {
    if per_second == 0.0 { Ok(()) } else { within(per_second, 0.001..=1e9) }
}

fn worker_urls(config: &Config) -> Result<(), String> {
    let mut traits = HashMap::new();
    for server in &config.worker_urls {
        if traits.insert(&server.url, &server.traits).is_some_and(|other| *other != server.traits) {
            return Err(server.to_string());
        }
    }
    Ok(())
}

fn aliases(config: &Config) -> Result<(), String> {
    let mut models = HashMap::new();
    for (alias, model) in &config.static_aliases {
        if models.insert(alias, model).is_some_and(|other| other != model) {
            return Err(format!("{alias}:{model}"));
        }
    }
    Ok(())
}

fn default_model(config: &Config) -> Result<(), String> {
    match &config.default_model {
        Some(model) if model.is_empty() || config.static_aliases.iter().any(|(alias, _)| alias == model) => {
            Err(model.clone())
        }
        _ => Ok(()),
    }
}

/// The proxy asks by the model's own name, so an alias would never be found.
fn model_policy(config: &Config) -> Result<(), String> {
    let settings = &config.routing;
    let mut own = settings.model_policy.iter();
    let alias = own.find(|of| config.static_aliases.iter().any(|(alias, _)| *alias == of.model));
    match settings.twice().or(alias) {
        Some(of) => Err(format!("{}={}", of.model, of.policy)),
        None => Ok(()),
    }
}

fn retry_statuses(config: &Config) -> Result<(), String> {
    let mut statuses = config.retries.retry_statuses.iter();
    match statuses.find(|status| !matches!(status, 408 | 429 | 500..=599)) {
        Some(status) => Err(status.to_string()),
        None => Ok(()),
    }
}

/// Below 1 everybody would be walked past.
fn hash_load_factor(factor: f64) -> Result<(), String> {
    if factor == 0.0 { Ok(()) } else { within(factor, 1.0..=1000.0) }
}

/// It becomes a header's value.
fn worker_api_key(config: &Config) -> Result<(), String> {
    match &config.control.worker_api_key {
        Some(key) if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err(super::show::MASK.to_owned())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::POLICIES;

    #[test]
    fn every_policy_is_told_as_allowed() {
        let rule = RULES.iter().find(|rule| rule.id == "policy").unwrap();
        let names: Vec<&str> = POLICIES.iter().map(|policy| policy.name).collect();
        assert_eq!(rule.allowed, names.join(", "));
    }
}
