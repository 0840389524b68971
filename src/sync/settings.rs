//! What an operator may set of the exchange with other proxies.

/// Redis, through which proxies tell each other what they do.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {}
