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
        let plain = text.trim().to_ascii_lowercase().replace('-', "_");
        let named = |policy: &&Definition| policy.name == plain || policy.aliases.contains(&&*plain);
        POLICIES.iter().find(named).map(Self).ok_or_else(|| {
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

#[cfg(test)]
impl Settings {
    /// The settings that these flags make, whatever the environment says.
    pub(crate) fn of_flags(flags: &[&str]) -> Self {
        use clap::{Args, Command, FromArgMatches, builder::Resettable};
        let command = Self::augment_args(Command::new("test")).no_binary_name(true);
        let command = command.mut_args(|arg| arg.env(Resettable::Reset));
        Self::from_arg_matches(&command.get_matches_from(flags)).unwrap()
    }
}
