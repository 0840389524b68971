//! What an operator may set of the shards.

use std::num::NonZeroUsize;

use crate::net::IoChoice;

/// Listener, threads and driver.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Address to listen on
    #[arg(long, env = "VLLM_PROXY_HOST", default_value = "0.0.0.0", value_name = "ADDRESS")]
    pub host: std::net::IpAddr,

    /// Port to listen on; 0 takes a free one and says which
    #[arg(long, env = "VLLM_PROXY_PORT", default_value_t = 8000)]
    pub port: u16,

    /// Number of shards, each a thread with its own listener and pools [default: the allowed cores, at most 4]
    #[arg(long, env = "VLLM_PROXY_THREADS", value_name = "N")]
    pub threads: Option<NonZeroUsize>,

    /// Leave it to the kernel on which core a shard runs
    #[arg(long, env = "VLLM_PROXY_NO_PIN", value_parser = clap::builder::BoolishValueParser::new())]
    pub no_pin: bool,

    /// How sockets are driven: `auto` takes io_uring where the kernel grants it, else epoll
    #[arg(long, env = "VLLM_PROXY_IO", default_value = "auto", value_name = "auto|uring|epoll")]
    pub io: IoChoice,

    /// Seconds that running exchanges have to end after the first SIGTERM
    #[arg(long, env = "VLLM_PROXY_SHUTDOWN_GRACE_SECS", default_value_t = 120, value_name = "SECONDS")]
    pub shutdown_grace_secs: u64,
}
