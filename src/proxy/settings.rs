//! What an operator may set of the exchanges.

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
    #[arg(long, env = "VLLM_PROXY_STREAM_IDLE_TIMEOUT_SECS", default_value_t = 600, value_name = "SECONDS")]
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
