//! What an operator may set of the exchanges.

use crate::base::Backoff;

/// Limits of an exchange with a client. Times in whole units as the flag says.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Largest request body; 413 beyond it
    #[arg(long, env = "VLLM_PROXY_MAX_BODY_BYTES", default_value_t = 512 * 1024 * 1024, value_name = "BYTES")]
    pub max_body_bytes: u64,

    /// Bodies up to this size are read whole before a worker is chosen; a larger one waits only where its
    /// model decides the way
    #[arg(long, env = "VLLM_PROXY_BODY_PEEK_BYTES", default_value_t = 64 * 1024, value_name = "BYTES")]
    pub body_peek_bytes: u64,

    /// JSON bodies up to this size are read whole before a worker is chosen where the policy looks at the prompt
    /// or the session; for a larger one a worker is chosen by its length alone
    #[arg(long, env = "VLLM_PROXY_PROMPT_PEEK_BYTES", default_value_t = 8 * 1024 * 1024, value_name = "BYTES")]
    pub prompt_peek_bytes: u64,

    /// Name the chosen worker in its answers, in the field `x-vllm-proxy-worker`
    #[arg(long, env = "VLLM_PROXY_WORKER_HEADER")]
    pub worker_header: bool,

    /// Seconds that a client has for the head of a request
    #[arg(long, env = "VLLM_PROXY_HEAD_TIMEOUT_SECS", default_value_t = 10, value_name = "SECONDS")]
    pub head_timeout_secs: u64,

    /// Seconds that a client may pause within the body of a request
    #[arg(long, env = "VLLM_PROXY_BODY_TIMEOUT_SECS", default_value_t = 30, value_name = "SECONDS")]
    pub body_timeout_secs: u64,

    /// Bytes a second that the body of a request must come at, in the mean, once it was waited for 30 seconds; 0: any
    #[arg(long, env = "VLLM_PROXY_BODY_MIN_RATE_BYTES", default_value_t = 100, value_name = "BYTES")]
    pub body_min_rate_bytes: u64,

    /// Seconds that an idle client connection is kept
    #[arg(long, env = "VLLM_PROXY_KEEPALIVE_TIMEOUT_SECS", default_value_t = 90, value_name = "SECONDS")]
    pub keepalive_timeout_secs: u64,

    /// Seconds without progress after which a client that does not read its answer is cut
    #[arg(long, env = "VLLM_PROXY_WRITE_TIMEOUT_SECS", default_value_t = 300, value_name = "SECONDS")]
    pub write_timeout_secs: u64,

    /// Seconds that a worker has for the head of its answer; 0: as long as it takes, since a long prompt may need
    /// minutes
    #[arg(long, env = "VLLM_PROXY_RESPONSE_TIMEOUT_SECS", default_value_t = 0, value_name = "SECONDS")]
    pub response_timeout_secs: u64,

    /// Seconds that a worker may pause within an answer, from its body's first byte on; 0: as long as it likes
    #[arg(long, env = "VLLM_PROXY_STREAM_IDLE_TIMEOUT_SECS", default_value_t = 1800, value_name = "SECONDS")]
    pub stream_idle_timeout_secs: u64,

    /// Seconds that a request may take from its head to the end of its answer; 0: no limit
    #[arg(long, env = "VLLM_PROXY_REQUEST_TIMEOUT_SECS", default_value_t = 0, value_name = "SECONDS")]
    pub request_timeout_secs: u64,

    /// Seconds without progress after which a worker that does not read its request is given up
    #[arg(long, env = "VLLM_PROXY_WORKER_WRITE_TIMEOUT_SECS", default_value_t = 60, value_name = "SECONDS")]
    pub worker_write_timeout_secs: u64,

    /// Seconds of silence in a stream of events after which the client is sent a comment (`: keep-alive`); 0: never
    #[arg(long, env = "VLLM_PROXY_SSE_KEEPALIVE_SECS", default_value_t = 0, value_name = "SECONDS")]
    pub sse_keepalive_secs: u64,
}

/// Further attempts to have a request answered. Times in whole units as the flag says.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct RetrySettings {
    /// Attempts that a request gets in all: 5 is one and four further ones
    #[arg(long, env = "VLLM_PROXY_RETRY_MAX_RETRIES", default_value_t = 5, value_name = "ATTEMPTS")]
    pub retry_max_retries: u32,

    /// Milliseconds of the first pause before workers are tried again that have failed; trying another one takes no
    /// pause
    #[arg(long, env = "VLLM_PROXY_RETRY_INITIAL_BACKOFF_MS", default_value_t = 50, value_name = "MS")]
    pub retry_initial_backoff_ms: u64,

    /// Milliseconds of the longest pause, and the longest `Retry-After` that is waited for
    #[arg(long, env = "VLLM_PROXY_RETRY_MAX_BACKOFF_MS", default_value_t = 30_000, value_name = "MS")]
    pub retry_max_backoff_ms: u64,

    /// How much longer each pause is than the one before
    #[arg(long, env = "VLLM_PROXY_RETRY_BACKOFF_MULTIPLIER", default_value_t = 1.5, value_name = "FACTOR")]
    pub retry_backoff_multiplier: f64,

    /// Share of a pause that chance adds or takes
    #[arg(long, env = "VLLM_PROXY_RETRY_JITTER_FACTOR", default_value_t = 0.2, value_name = "SHARE")]
    pub retry_jitter_factor: f64,

    /// Statuses of workers after which a request is tried again that otherwise are passed on (or, as 503, depend on
    /// what the worker says)
    #[arg(long, env = "VLLM_PROXY_RETRY_STATUSES", num_args = 1.., value_delimiter = ',', value_name = "STATUS")]
    pub retry_statuses: Vec<u16>,

    /// Make one attempt only
    #[arg(long, env = "VLLM_PROXY_DISABLE_RETRIES")]
    pub disable_retries: bool,

    /// Largest request body that is kept for another attempt; a larger one is let go as soon as it is sent
    #[arg(long, env = "VLLM_PROXY_RETRY_BUFFER_BYTES", default_value_t = 8 * 1024 * 1024, value_name = "BYTES")]
    pub retry_buffer_bytes: u64,

    /// Further attempts, in place of --retry-max-retries: 4 is what 5 is there [default: --retry-max-retries]
    #[arg(long, env = "VLLM_PROXY_MAX_RETRIES", value_name = "N", conflicts_with = "retry_max_retries")]
    pub max_retries: Option<u32>,

    /// Seconds of every pause, in place of those that grow [default: pauses grow]
    #[arg(
        long,
        env = "VLLM_PROXY_RETRY_DELAY",
        value_name = "SECONDS",
        conflicts_with_all = ["retry_initial_backoff_ms", "retry_max_backoff_ms", "retry_backoff_multiplier", "retry_jitter_factor"]
    )]
    pub retry_delay: Option<f64>,
}

impl RetrySettings {
    /// Attempts that a request gets in all, at least one.
    pub(super) fn attempts(&self) -> u32 {
        match (self.disable_retries, self.max_retries) {
            (true, _) => 1,
            (false, Some(further)) => further.saturating_add(1),
            (false, None) => self.retry_max_retries.max(1),
        }
    }

    /// The pauses between attempts on the same workers.
    pub(super) fn backoff(&self) -> Backoff {
        match self.retry_delay {
            Some(seconds) => {
                // what is negative or no number is refused when settings are read
                let delay_ms = (seconds * 1000.0) as u64;
                Backoff { initial_ms: delay_ms, max_ms: delay_ms, multiplier: 1.0, jitter: 0.0 }
            }
            None => Backoff {
                initial_ms: self.retry_initial_backoff_ms,
                max_ms: self.retry_max_backoff_ms,
                multiplier: self.retry_backoff_multiplier,
                jitter: self.retry_jitter_factor,
            },
        }
    }

    /// Whether a request is tried again for a worker's status, whatever else the worker says.
    pub(super) fn is_retried(&self, status: u16) -> bool {
        self.retry_statuses.contains(&status)
    }
}
