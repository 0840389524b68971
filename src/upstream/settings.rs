//! What an operator may set of the connections to workers.

/// Connecting and pooling.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Seconds that connecting to a worker may take
    #[arg(long, env = "VLLM_PROXY_CONNECT_TIMEOUT_SECS", default_value_t = 5, value_name = "SECONDS")]
    pub connect_timeout_secs: u64,

    /// Seconds that an idle connection to a worker is kept; vLLM itself closes after 5
    #[arg(long, env = "VLLM_PROXY_POOL_IDLE_TIMEOUT_SECS", default_value_t = 4, value_name = "SECONDS")]
    pub pool_idle_timeout_secs: u64,

    /// Idle connections kept per shard and worker
    #[arg(long, env = "VLLM_PROXY_POOL_SIZE", default_value_t = 512, value_name = "N")]
    pub pool_size: usize,
}
