//! What an operator may set of the choice.

use std::{str::FromStr, time::Duration};

use crate::routing::{Definition, Needs, POLICIES, Terms};

/// A policy by its name in [`POLICIES`].
#[derive(Debug, Clone, Copy)]
pub struct PolicyName(pub &'static Definition);

impl PolicyName {
    /// Its position in [`POLICIES`].
    pub fn position(self) -> usize {
        POLICIES.iter().position(|row| row.name == self.0.name).unwrap_or(0)
    }
}

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

    /// By name or alias, in any case, with `-` or `_` or neither: `round_robin` is RoundRobin in Python.
    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |name: &str| name.trim().to_ascii_lowercase().replace(['-', '_'], "");
        let meant = plain(text);
        let named = |policy: &&Definition| {
            plain(policy.name) == meant || policy.aliases.iter().any(|alias| plain(alias) == meant)
        };
        POLICIES.iter().find(named).map(Self).ok_or_else(|| {
            let names: Vec<&str> = POLICIES.iter().map(|policy| policy.name).collect();
            format!("`{text}` is no policy; allowed: {}", names.join(", "))
        })
    }
}

/// The policy of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelPolicy {
    /// The model's own name.
    pub model: String,
    /// How a worker is chosen among those that have it.
    pub policy: PolicyName,
}

impl FromStr for ModelPolicy {
    type Err = String;

    /// `MODEL=POLICY`; a model's name may have a `=` in it, a policy's has none.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().rsplit_once('=') {
            Some((model, policy)) if !model.is_empty() => {
                Ok(Self { model: model.to_owned(), policy: policy.parse()? })
            }
            _ => Err("a `=` separates model and policy".to_owned()),
        }
    }
}

/// The choice of a worker.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// How a worker is chosen among those that have the model
    #[arg(
        long,
        visible_alias = "routing-logic",
        env = "VLLM_PROXY_POLICY",
        default_value = "cache_aware",
        value_name = "POLICY",
        value_parser = policy_name
    )]
    pub policy: PolicyName,

    /// Bytes of memory for the index of which prompts are in which worker's prefix cache
    #[arg(long, env = "VLLM_PROXY_PREFIX_INDEX_BYTES", default_value_t = 64 * 1024 * 1024, value_name = "BYTES")]
    pub prefix_index_bytes: u64,

    /// Tokens that the prefix cache of a worker holds which does not tell it in its `/metrics`
    #[arg(long, env = "VLLM_PROXY_WORKER_CACHE_TOKENS", default_value_t = 500_000, value_name = "TOKENS")]
    pub worker_cache_tokens: u64,

    /// Most that `cache_aware` counts a token that is not cached for, in queued tokens; 5 favours the
    /// time to the first token over throughput
    #[arg(long, env = "VLLM_PROXY_CACHE_MISS_WEIGHT_MAX", default_value_t = 10.0, value_name = "NUMBER")]
    pub cache_miss_weight_max: f64,

    /// While other proxies on the same Redis cannot be heard: the share of a prompt's uncached tokens that `cache_aware`
    /// does not charge the worker for which the prompt's hash speaks, and up to a third of it while they are; 0: nothing
    #[arg(long, env = "VLLM_PROXY_HASH_CREDIT", default_value_t = 0.15, value_name = "SHARE")]
    pub hash_credit: f64,

    /// Policies of single models, as model=policy; models have nothing to do with each other's
    #[arg(long, env = "VLLM_PROXY_MODEL_POLICY", num_args = 1.., value_delimiter = ',', value_name = "MODEL=POLICY")]
    pub model_policy: Vec<ModelPolicy>,

    /// Headers that name a request's session, the first that is there; then the body's `session_id`,
    /// `prompt_cache_key` or `user`. A name without a hyphen may also be another field of the body
    #[arg(
        long,
        visible_aliases = ["session-key", "routing-key-headers"],
        env = "VLLM_PROXY_SESSION_HEADERS",
        num_args = 1..,
        value_delimiter = ',',
        default_value = "x-session-id,x-user-id,x-tenant-id",
        value_name = "NAME",
        value_parser = session_name
    )]
    pub session_headers: Vec<String>,

    /// consistent_hash: load of a worker, relative to the mean, beyond which sessions go on to the next one; 0:
    /// never
    #[arg(long, env = "VLLM_PROXY_HASH_LOAD_FACTOR", default_value_t = 1.25, value_name = "FACTOR")]
    pub hash_load_factor: f64,

    /// capacity: weight of a request that is being computed
    #[arg(long, env = "VLLM_PROXY_CAPACITY_RUNNING_WEIGHT", default_value_t = 3.0, value_name = "WEIGHT")]
    pub capacity_running_weight: f64,

    /// capacity: weight of a request that waits in the worker
    #[arg(long, env = "VLLM_PROXY_CAPACITY_WAITING_WEIGHT", default_value_t = 1.0, value_name = "WEIGHT")]
    pub capacity_waiting_weight: f64,

    /// Seconds in which a worker that came up beside others rises from a tenth of its share of the requests to the
    /// whole; 0: it has it at once
    #[arg(long, env = "VLLM_PROXY_SLOW_START_SECS", default_value_t = 30.0, value_name = "SECONDS")]
    pub slow_start_secs: f64,

    /// Answer 503 where no worker is left that should be used, instead of trying the least bad one
    #[arg(long, env = "VLLM_PROXY_NO_PANIC_MODE")]
    pub no_panic_mode: bool,
}

impl Settings {
    /// What candidates depend on, but for time and chance.
    pub fn terms(&self) -> Terms {
        let slow_start = Duration::try_from_secs_f64(self.slow_start_secs).unwrap_or_default();
        Terms {
            slow_start_ms: u64::try_from(slow_start.as_millis()).unwrap_or(u64::MAX),
            panics: !self.no_panic_mode,
            ..Terms::default()
        }
    }

    /// All policies that are used.
    pub fn policies(&self) -> impl Iterator<Item = PolicyName> {
        self.model_policy.iter().map(|of_model| of_model.policy).chain([self.policy])
    }

    /// What one or the other of these policies has to know of a request.
    pub fn needs(&self) -> Needs {
        self.policies().fold(Needs::default(), |all, PolicyName(row)| Needs {
            prompt: all.prompt || row.needs.prompt,
            session: all.session || row.needs.session,
        })
    }

    /// The first model that has two policies.
    pub fn twice(&self) -> Option<&ModelPolicy> {
        let mut models = std::collections::HashSet::new();
        self.model_policy.iter().find(|of_model| !models.insert(&of_model.model))
    }
}

/// What is allowed is told with every wrong value, so the reason need not.
fn policy_name(text: &str) -> Result<PolicyName, String> {
    text.parse().map_err(|_: String| "there is no such policy".to_owned())
}

/// The name of a header (RFC 9110 §5.1), in lower case.
fn session_name(text: &str) -> Result<String, String> {
    let name = text.trim().to_ascii_lowercase();
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(token) {
        return Err("not the name of a header".to_owned());
    }
    Ok(name)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_routers_are_understood() {
        for (name, texts) in [
            ("round_robin", &["roundrobin", "Round-Robin", "RoundRobin", "ROUND_ROBIN", " rr "][..]),
            ("random", &["random"]),
            (
                "least_requests",
                &["least_load", "least-loaded", "least_active", "least-request", "leastconn", "LeastLoad"],
            ),
            ("power_of_two", &["p2c", "power-of-two", "PowerOfTwo", "pow-2"]),
            ("capacity", &["Capacity"]),
            (
                "consistent_hash",
                &[
                    "session",
                    "consistent_hashing",
                    "rendezvous_hash",
                    "sticky_least_loaded",
                    "manual",
                    "prefix_hash",
                    "PrefixHash",
                    "ConsistentHash",
                    "StickyLeastLoaded",
                    "CHWBL",
                ],
            ),
        ] {
            for text in texts {
                assert_eq!(text.parse::<PolicyName>().map(|policy| policy.0.name), Ok(name), "{text}");
            }
        }
    }

    #[test]
    fn what_we_do_not_have_is_refused_with_what_is_allowed() {
        let missing = [
            "kvaware",
            "kv_aware",
            "disaggregated_prefill",
            "disaggregated_prefill_orchestrated",
            "bucket",
            "passthrough",
            "",
            "rand0m",
        ];
        for text in missing {
            let error = text.parse::<PolicyName>().unwrap_err();
            assert!(error.starts_with(&format!("`{text}` is no policy; allowed: ")), "{error}");
            assert!(POLICIES.iter().all(|row| error.contains(row.name)), "{error}");
        }
    }

    #[test]
    fn a_models_policy_stands_behind_the_last_equals_sign() {
        let parse = |text: &str| text.parse::<ModelPolicy>().map(|of| (of.model, of.policy.0.name));
        assert_eq!(parse("org/m:8b=session"), Ok(("org/m:8b".to_owned(), "consistent_hash")));
        assert_eq!(parse("a=b=p2c"), Ok(("a=b".to_owned(), "power_of_two")));
        assert!(parse("m").unwrap_err().contains('='));
        assert!(parse("=random").unwrap_err().contains('='));
        assert!(parse("m=kvaware").unwrap_err().contains("`kvaware` is no policy"));
    }

    #[test]
    fn what_is_needed_is_what_any_of_the_policies_needs() {
        let needs = |flags: &[&str]| Settings::of_flags(flags).needs();
        assert_eq!(needs(&["--policy=random"]), Needs::default());
        let both = Needs { prompt: true, session: true };
        assert_eq!(needs(&["--policy=random", "--model-policy=a=rr,b=session"]), both);
        assert_eq!(needs(&["--routing-logic=session", "--model-policy", "a=rr"]), both);
    }

    #[test]
    fn a_model_with_two_policies_is_found() {
        let twice = |list: &str| {
            let settings = Settings::of_flags(&["--model-policy", list]);
            settings.twice().map(|of| of.model.clone())
        };
        assert_eq!(twice("a=rr,b=random,c=rr"), None);
        assert_eq!(twice("a=rr,b=random,a=rr"), Some("a".to_owned()));
    }

    #[test]
    fn session_names_are_names_of_headers() {
        let names = |flag: &str| Settings::of_flags(&[flag]).session_headers;
        assert_eq!(Settings::of_flags(&[]).session_headers, ["x-session-id", "x-user-id", "x-tenant-id"]);
        assert_eq!(names("--session-key=X-Flow"), ["x-flow"]);
        assert_eq!(names("--routing-key-headers=a, b"), ["a", "b"]);
        assert!(session_name("a b").is_err() && session_name("").is_err() && session_name("ä").is_err());
    }
}
