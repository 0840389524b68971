//! Everything an operator can set: flags over environment over defaults, validated.
//!
//! A setting is declared once, as a field of its module's `Settings`: name, environment variable, default and
//! help stand there, and what is allowed stands in one row of the `rules` of this module. [`command`] reads
//! the command line and the environment; whatever is wrong is told in one line that names the setting as the
//! operator wrote it. An environment variable that is set but empty counts as not set.
//!
//! It reads no files and changes nothing while the process runs.

mod cli;
mod rules;
mod show;

use crate::{
    admission, control, net, proxy, routing, shard, sync,
    telemetry::log,
    upstream,
    workers::{self, WorkerSpec},
};

pub use cli::{Command, Refused, command, definition};
pub use rules::Invalid;

/// All settings of the proxy.
#[derive(Debug, Clone, clap::Parser)]
#[command(
    name = "vllm-proxy",
    version,
    about = "Many vLLM servers behind one address that behaves like one vLLM"
)]
pub struct Config {
    /// The vLLM servers, as `http://host[:port][/prefix]`, separated by commas, on the command line also by
    /// spaces; one that is named twice is one server. What is to be known of one stands behind it, as
    /// `#priority=10&cost=0.5&max_concurrent_requests=8`: a higher priority is used first, a cost of 2 gets half
    /// of what a cost of 1 gets, and nobody gets more requests at a time than it may have
    #[arg(long, visible_alias = "static-backends", env = "VLLM_PROXY_WORKER_URLS", num_args = 1.., value_delimiter = ',', value_name = "URL", value_parser = worker)]
    pub worker_urls: Vec<WorkerSpec>,

    /// Data-parallel ranks of every server: with more than 1, each rank counts as a worker of its own, and
    /// requests carry `X-data-parallel-rank`
    #[arg(
        long,
        visible_alias = "intra-node-data-parallel-size",
        env = "VLLM_PROXY_DATA_PARALLEL_SIZE",
        default_value_t = 1,
        value_name = "RANKS"
    )]
    pub data_parallel_size: u32,

    /// Model names of our own, as alias:model; the model's name is what workers are sent
    #[arg(long, env = "VLLM_PROXY_STATIC_ALIASES", num_args = 1.., value_delimiter = ',', value_name = "ALIAS:MODEL", value_parser = alias)]
    pub static_aliases: Vec<(String, String)>,

    /// The model of a request that names none [default: the only one there is]
    #[arg(long, env = "VLLM_PROXY_DEFAULT_MODEL", value_name = "MODEL")]
    pub default_model: Option<String>,

    /// Listener, threads and driver.
    #[command(flatten, next_help_heading = "Listener and threads")]
    pub shards: shard::Settings,

    /// The choice of a worker.
    #[command(flatten, next_help_heading = "Choosing a worker")]
    pub routing: routing::Settings,

    /// Limits of an exchange.
    #[command(flatten, next_help_heading = "Clients and their requests")]
    pub proxy: proxy::Settings,

    /// How vanished peers are found, on both sides.
    #[command(flatten, next_help_heading = "TCP, on both sides")]
    pub net: net::Settings,
    /// Further attempts.
    #[command(flatten, next_help_heading = "Retries")]
    pub retries: proxy::RetrySettings,
    /// How much is let in at a time.
    #[command(flatten, next_help_heading = "Admission")]
    pub admission: admission::Settings,

    /// Connections to workers.
    #[command(flatten, next_help_heading = "Connections to workers")]
    pub upstream: upstream::Settings,

    /// Probes and learning.
    #[command(flatten, next_help_heading = "Health and models of workers")]
    pub control: control::Settings,

    /// Breakers.
    #[command(flatten, next_help_heading = "Breakers of workers")]
    pub breakers: workers::Settings,

    /// What several proxies share.
    #[command(flatten, next_help_heading = "Several proxies as one")]
    pub sync: sync::Settings,

    /// Verbosity and format of the logs.
    #[command(flatten, next_help_heading = "Logs")]
    pub log: log::Settings,
}

impl Config {
    /// The workers: every server, or every rank of every server, in the order of configuration.
    pub fn workers(&self) -> impl Iterator<Item = WorkerSpec> {
        self.worker_urls.iter().cloned().flat_map(|server| server.ranks(self.data_parallel_size))
    }
}

fn worker(text: &str) -> Result<WorkerSpec, String> {
    let text = text.trim();
    if text.contains(char::is_whitespace) {
        return Err("commas separate URLs, not spaces".to_owned());
    }
    text.parse().map_err(|error: crate::workers::UrlError| error.to_string())
}

fn alias(text: &str) -> Result<(String, String), String> {
    match text.trim().split_once(':') {
        Some((alias, model)) if !alias.is_empty() && !model.is_empty() => {
            Ok((alias.to_owned(), model.to_owned()))
        }
        _ => Err("a colon separates alias and model".to_owned()),
    }
}
