//! What an operator may set of probes and of learning.

use crate::vllm::ModelType;

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

    /// Good probes in a row after which a worker that was down is used again
    #[arg(
        long,
        env = "VLLM_PROXY_HEALTH_CHECK_SUCCESS_THRESHOLD",
        default_value_t = 1,
        value_name = "COUNT"
    )]
    pub health_check_success_threshold: u32,

    /// Probes in a row that are not answered in time after which a worker is down; a single one says nothing, the
    /// worker may be busy
    #[arg(
        long,
        env = "VLLM_PROXY_HEALTH_CHECK_CONSECUTIVE_FAILURES",
        default_value_t = 3,
        value_name = "COUNT"
    )]
    pub health_check_consecutive_failures: u32,

    /// Probes over which success rate and response time are reckoned; 0: they are not
    #[arg(long, env = "VLLM_PROXY_HEALTH_CHECK_WINDOW_SIZE", default_value_t = 10, value_name = "COUNT")]
    pub health_check_window_size: usize,

    /// Share of good probes in the window below which a worker is ejected for a while
    #[arg(
        long,
        env = "VLLM_PROXY_HEALTH_CHECK_MIN_SUCCESS_RATE",
        default_value_t = 0.8,
        value_name = "SHARE"
    )]
    pub health_check_min_success_rate: f64,

    /// Mean seconds of the probes in the window above which a worker is ejected for a while
    #[arg(
        long,
        env = "VLLM_PROXY_HEALTH_CHECK_MAX_RESPONSE_TIME",
        default_value_t = 10.0,
        value_name = "SECONDS"
    )]
    pub health_check_max_response_time: f64,

    /// Share of a model's workers that may be ejected at a time for success rate or response time; the last one
    /// never is
    #[arg(
        long,
        env = "VLLM_PROXY_HEALTH_CHECK_MAX_EJECTED_SHARE",
        default_value_t = 0.5,
        value_name = "SHARE"
    )]
    pub health_check_max_ejected_share: f64,

    /// Also send each worker a real request for one token now and then; what it does wrong counts as a failed
    /// probe
    #[arg(long, env = "VLLM_PROXY_STATIC_BACKEND_HEALTH_CHECKS")]
    pub static_backend_health_checks: bool,

    /// What the workers' models do, for these requests: one for all, or one for each of --worker-urls, out of chat
    /// completion embeddings rerank score transcription vision messages
    #[arg(
        long,
        env = "VLLM_PROXY_STATIC_MODEL_TYPES",
        num_args = 1..,
        value_delimiter = ',',
        default_value = "chat",
        value_name = "TYPE"
    )]
    pub static_model_types: Vec<ModelType>,

    /// Seconds between two such requests to a worker
    #[arg(
        long,
        env = "VLLM_PROXY_STATIC_BACKEND_HEALTH_CHECK_INTERVAL",
        default_value_t = 60.0,
        value_name = "SECONDS"
    )]
    pub static_backend_health_check_interval: f64,

    /// Seconds that such a request may take
    #[arg(
        long,
        env = "VLLM_PROXY_STATIC_BACKEND_HEALTH_CHECK_TIMEOUT_SECONDS",
        default_value_t = 10.0,
        value_name = "SECONDS"
    )]
    pub static_backend_health_check_timeout_seconds: f64,

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

#[cfg(test)]
impl Settings {
    /// What is set where nobody says anything, whatever the environment says.
    pub(crate) fn defaults() -> Self {
        use clap::{Args, Command, FromArgMatches, builder::Resettable};
        let command = Self::augment_args(Command::new("test")).no_binary_name(true);
        let command = command.mut_args(|arg| arg.env(Resettable::Reset));
        Self::from_arg_matches(&command.get_matches_from([""; 0])).unwrap()
    }
}
