//! What an operator may set of probes and of learning.

/// Probes, model lists and names. Intervals in seconds; fractions are allowed.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Seconds between two probes of a worker's `/health`
    #[arg(
        long,
        env = "VLLM_PROXY_HEALTH_CHECK_INTERVAL_SECS",
        default_value_t = 5.0,
        value_name = "SECONDS"
    )]
    pub health_check_interval_secs: f64,

    /// Seconds that a probe may take
    #[arg(long, env = "VLLM_PROXY_HEALTH_CHECK_TIMEOUT_SECS", default_value_t = 5.0, value_name = "SECONDS")]
    pub health_check_timeout_secs: f64,

    /// Seconds between two looks at a worker's `/v1/models`
    #[arg(long, env = "VLLM_PROXY_MODEL_REFRESH_SECS", default_value_t = 30.0, value_name = "SECONDS")]
    pub model_refresh_secs: f64,

    /// Seconds between two resolutions of a worker's host name
    #[arg(long, env = "VLLM_PROXY_DNS_REFRESH_SECS", default_value_t = 30.0, value_name = "SECONDS")]
    pub dns_refresh_secs: f64,

    /// Seconds between two looks at a worker's `/metrics` (requests running and waiting, size of its cache); 0:
    /// never
    #[arg(long, env = "VLLM_PROXY_ENGINE_STATS_INTERVAL", default_value_t = 5.0, value_name = "SECONDS")]
    pub engine_stats_interval: f64,

    /// Bearer key that the proxy's own probes send to workers; clients' keys pass through untouched
    #[arg(long, env = "VLLM_PROXY_WORKER_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub worker_api_key: Option<String>,
}
