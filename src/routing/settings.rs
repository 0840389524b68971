//! What an operator may set of the choice.

use std::str::FromStr;

use crate::routing::{Definition, POLICIES};

/// A policy by its name in [`POLICIES`].
#[derive(Debug, Clone, Copy)]
pub struct PolicyName(pub &'static Definition);

impl PartialEq for PolicyName {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl std::fmt::Display for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name)
    }
}

impl FromStr for PolicyName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        POLICIES.iter().find(|policy| policy.name == text).map(Self).ok_or_else(|| {
            let names: Vec<&str> = POLICIES.iter().map(|policy| policy.name).collect();
            format!("`{text}` is no policy; allowed: {}", names.join(", "))
        })
    }
}

/// The choice of a worker.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// How a worker is chosen among those that have the model
    #[arg(long, env = "VLLM_PROXY_POLICY", default_value = "least_requests", value_name = "POLICY")]
    pub policy: PolicyName,
}
