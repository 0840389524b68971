//! What an operator may set of TCP, on both sides.

/// How peers that have vanished without a word are found.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Seconds after which a silent connection, to a client or a worker, is probed; then every third of it. 0: never
    #[arg(long, env = "VLLM_PROXY_TCP_KEEPALIVE_SECS", default_value_t = 30, value_name = "SECONDS")]
    pub tcp_keepalive_secs: u64,

    /// Seconds after which a connection is given up whose peer acknowledges nothing; 0: when the kernel does. For
    /// clients no less than --write-timeout-secs, because it also ends a connection whose peer reads nothing
    #[arg(long, env = "VLLM_PROXY_TCP_USER_TIMEOUT_SECS", default_value_t = 60, value_name = "SECONDS")]
    pub tcp_user_timeout_secs: u64,
}

impl Settings {
    /// As they are for connections on which a peer may be slow to read for `secs` seconds: Linux also gives up a
    /// connection whose window stays closed for as long as the user timeout.
    pub fn patient(&self, secs: u64) -> Self {
        let timeout = self.tcp_user_timeout_secs;
        Self {
            tcp_keepalive_secs: self.tcp_keepalive_secs,
            tcp_user_timeout_secs: if timeout == 0 { 0 } else { timeout.max(secs) },
        }
    }
}
