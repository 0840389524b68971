//! What an operator may set of admission.

use std::num::NonZero;

/// How much is let in at a time, and who waits for how long.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Requests that are served at a time, each until the end of its answer; those beyond wait. 0: no limit
    #[arg(long, env = "VLLM_PROXY_MAX_CONCURRENT_REQUESTS", default_value_t = 0, value_name = "N")]
    pub max_concurrent_requests: u32,

    /// As --max-concurrent-requests, but for all proxies on one Redis together: each has a part of N that follows what
    /// comes to it. Without Redis, for this proxy alone. Where both are set, the smaller number counts. 0: no limit
    #[arg(long, env = "VLLM_PROXY_FLEET_MAX_CONCURRENT_REQUESTS", default_value_t = 0, value_name = "N")]
    pub fleet_max_concurrent_requests: u32,

    /// Requests that wait at most, for --max-concurrent-requests or because every server of their model has as many
    /// as its own max_concurrent_requests; 0: none waits
    #[arg(long, env = "VLLM_PROXY_QUEUE_SIZE", default_value_t = 100, value_name = "N")]
    pub queue_size: u32,

    /// Seconds that a request waits at most
    #[arg(long, env = "VLLM_PROXY_QUEUE_TIMEOUT_SECS", default_value_t = 60, value_name = "SECONDS")]
    pub queue_timeout_secs: u64,

    /// Requests a second that are let in on average; as many at once as --max-concurrent-requests, or those of one
    /// second. 0: no limit
    #[arg(
        long,
        env = "VLLM_PROXY_RATE_LIMIT_TOKENS_PER_SECOND",
        default_value_t = 0.0,
        value_name = "NUMBER"
    )]
    pub rate_limit_tokens_per_second: f64,

    /// Header between whose values the queue is fair; requests without it are of one value
    #[arg(
        long,
        env = "VLLM_PROXY_QUEUE_FAIRNESS_HEADER",
        default_value = "x-gateway-inference-fairness-id",
        value_name = "NAME",
        value_parser = header_name
    )]
    pub queue_fairness_header: String,

    /// Bytes of request bodies that are held in memory at a time, those up to 64 KiB not counted; 503 beyond it. 0: no
    /// limit
    #[arg(long, env = "VLLM_PROXY_BODY_MEMORY_BYTES", default_value_t = 1 << 30, value_name = "BYTES")]
    pub body_memory_bytes: u64,
}

impl Settings {
    /// Slots of this proxy at first, and as long as it hears of no other: the smaller of both limits. `None`: there is
    /// none.
    pub fn slots(&self) -> Option<NonZero<u32>> {
        let limits = [self.max_concurrent_requests, self.fleet_max_concurrent_requests];
        limits.into_iter().filter_map(NonZero::new).min()
    }

    /// Whether there is anything to admit: a limit of its own, or, as `capped` tells, one of a worker.
    pub fn limits(&self, capped: bool) -> bool {
        capped || self.slots().is_some() || self.rate_limit_tokens_per_second > 0.0
    }
}

/// The name of a header (RFC 9110 §5.1).
fn header_name(text: &str) -> Result<String, String> {
    let name = text.trim().to_ascii_lowercase();
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(token) {
        return Err("not the name of a header".to_owned());
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fairness_header_is_the_name_of_a_header() {
        assert_eq!(header_name(" X-Tenant "), Ok("x-tenant".to_owned()));
        assert!(header_name("").is_err() && header_name("a b").is_err() && header_name("a:").is_err());
    }
}
