//! Everything an operator can set: flags over environment over defaults, validated.

use crate::{control, proxy, routing, shard, upstream, workers::WorkerUrl};

/// All settings of the proxy.
#[derive(Debug, Clone, clap::Parser)]
#[command(
    name = "vllm-proxy",
    version,
    about = "Many vLLM servers behind one address that behaves like one vLLM"
)]
pub struct Config {
    /// The vLLM servers, as http://host[:port][/prefix]; separated by spaces or commas
    #[arg(long, visible_alias = "static-backends", env = "VLLM_PROXY_WORKER_URLS", num_args = 1.., value_delimiter = ',', value_name = "URL")]
    pub worker_urls: Vec<WorkerUrl>,

    /// Model names of our own, as alias:model; the model's name is what workers are sent
    #[arg(long, env = "VLLM_PROXY_STATIC_ALIASES", num_args = 1.., value_delimiter = ',', value_name = "ALIAS:MODEL", value_parser = alias)]
    pub static_aliases: Vec<(String, String)>,

    /// The model of a request that names none [default: the only one there is]
    #[arg(long, env = "VLLM_PROXY_DEFAULT_MODEL", value_name = "MODEL")]
    pub default_model: Option<String>,

    /// Listener, threads and driver.
    #[command(flatten)]
    pub shards: shard::Settings,

    /// The choice of a worker.
    #[command(flatten)]
    pub routing: routing::Settings,

    /// Limits of an exchange.
    #[command(flatten)]
    pub proxy: proxy::Settings,

    /// Connections to workers.
    #[command(flatten)]
    pub upstream: upstream::Settings,

    /// Probes and learning.
    #[command(flatten)]
    pub control: control::Settings,
}

fn alias(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((alias, model)) if !alias.is_empty() && !model.is_empty() => {
            Ok((alias.to_owned(), model.to_owned()))
        }
        _ => Err(format!("`{text}` is not of the form alias:model")),
    }
}
