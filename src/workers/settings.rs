//! What an operator may set of the breakers.

use crate::workers::BreakerRules;

/// When a server that fails is left alone.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Failures of a server within the window that open its breaker, if they are at least half of the attempts
    #[arg(long, env = "VLLM_PROXY_CB_FAILURE_THRESHOLD", default_value_t = 10, value_name = "COUNT")]
    pub cb_failure_threshold: u32,

    /// Good answers that close a breaker again
    #[arg(long, env = "VLLM_PROXY_CB_SUCCESS_THRESHOLD", default_value_t = 3, value_name = "COUNT")]
    pub cb_success_threshold: u32,

    /// Seconds that a breaker stays open before it lets one request at a time through; doubled, up to 8 times as
    /// long, where that fails or it opens again soon
    #[arg(long, env = "VLLM_PROXY_CB_TIMEOUT_DURATION_SECS", default_value_t = 60, value_name = "SECONDS")]
    pub cb_timeout_duration_secs: u64,

    /// Length of the window in which failures are counted, in seconds
    #[arg(long, env = "VLLM_PROXY_CB_WINDOW_DURATION_SECS", default_value_t = 120, value_name = "SECONDS")]
    pub cb_window_duration_secs: u64,

    /// No breaker ever opens
    #[arg(long, env = "VLLM_PROXY_DISABLE_CIRCUIT_BREAKER")]
    pub disable_circuit_breaker: bool,
}

impl Settings {
    /// What the breakers go by.
    pub fn breaker(&self) -> BreakerRules {
        BreakerRules {
            failures: if self.disable_circuit_breaker { 0 } else { self.cb_failure_threshold },
            successes: self.cb_success_threshold,
            open_ms: self.cb_timeout_duration_secs.saturating_mul(1000),
            window_ms: self.cb_window_duration_secs.saturating_mul(1000),
        }
    }
}
