//! The command line: what it asks for, and one line for whatever is wrong with it.

use std::{
    env,
    error::Error as _,
    ffi::{OsStr, OsString},
    fmt,
};

use clap::{
    Arg, ArgMatches, CommandFactory, FromArgMatches,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

use super::{Config, Invalid, rules, show};
use crate::healthcheck;

/// Columns of `--help`, if the terminal has so many.
const HELP_COLUMNS: usize = 110;

/// What the operator asks for.
#[derive(Debug)]
pub enum Command {
    /// To serve, with at least one worker.
    Serve(Box<Config>),
    /// To show what the proxy does, with workers of our own.
    Demo(Box<Config>),
    /// To ask a running proxy whether it is well.
    Healthcheck(healthcheck::Settings),
    /// To be told something: help, version or settings.
    Print(String),
}

/// Why nothing was started: one line for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

#[derive(clap::Parser)]
#[command(
    name = "vllm-proxy",
    version,
    about = "Many vLLM servers behind one address that behaves like one vLLM",
    after_help = "A flag wins over its environment variable, which wins over the default.",
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    max_term_width = HELP_COLUMNS
)]
struct Arguments {
    #[command(subcommand)]
    subcommand: Option<Subcommand>,

    /// Print every setting with its value and where that comes from, and end
    #[arg(long)]
    print_config: bool,

    #[command(flatten)]
    config: Config,
}

#[derive(clap::Subcommand)]
enum Subcommand {
    /// Start three workers of our own, without a GPU, and the proxy before them; until Ctrl-C
    Demo(Demonstration),
    /// Ask a running proxy for its /health; ends with 0 if it is well and 1 if not
    Healthcheck(healthcheck::Settings),
}

#[derive(clap::Args)]
struct Demonstration {
    /// Print every setting with its value and where that comes from, and end
    #[arg(long)]
    print_config: bool,

    #[command(flatten)]
    config: Box<Config>,
}

/// Whether the environment has a say.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Environment {
    Read,
    Ignored,
}

/// Reads the command line (its first word is the program's name) and the environment.
///
/// # Errors
/// One line that names the setting as the operator wrote it, its value and what is allowed.
pub fn command(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, Refused> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    read(&arguments, Environment::Read)
}

/// All flags and sub-commands, as they are without an environment; `--help` and README are made of it.
pub fn definition() -> clap::Command {
    declared()
}

impl Config {
    /// The settings that these flags (without a program's name) make, whatever the environment says. There
    /// need not be a worker.
    ///
    /// # Errors
    /// As [`command`].
    pub fn from_flags<T: Into<OsString>>(flags: impl IntoIterator<Item = T>) -> Result<Self, Refused> {
        let arguments: Vec<OsString> = ["vllm-proxy", "demo"]
            .map(OsString::from)
            .into_iter()
            .chain(flags.into_iter().map(Into::into))
            .collect();
        match read(&arguments, Environment::Ignored)? {
            Command::Demo(config) => Ok(*config),
            _ => Err(Refused("only settings are expected here".to_owned())),
        }
    }
}

fn read(arguments: &[OsString], environment: Environment) -> Result<Command, Refused> {
    if environment == Environment::Read {
        readable_environment()?;
    }
    let matches = match prepared(environment).try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Command::Print(error.render().to_string()));
        }
        Err(error) => return Err(refused(&error, arguments, environment)),
    };
    let parsed =
        Arguments::from_arg_matches(&matches).map_err(|error| refused(&error, arguments, environment))?;
    match parsed.subcommand {
        Some(Subcommand::Healthcheck(settings)) => Ok(Command::Healthcheck(settings)),
        Some(Subcommand::Demo(demo)) => {
            let matches = matches.subcommand_matches("demo").unwrap_or(&matches);
            settled(*demo.config, demo.print_config, matches, Command::Demo)
        }
        None => {
            if parsed.config.worker_urls.is_empty() {
                return Err(Refused(
                    "no worker: --worker-urls (or VLLM_PROXY_WORKER_URLS) must name at least one vLLM server, \
                     as http://host:port"
                        .to_owned(),
                ));
            }
            settled(parsed.config, parsed.print_config, &matches, Command::Serve)
        }
    }
}

fn settled(
    config: Config,
    print: bool,
    matches: &ArgMatches,
    command: fn(Box<Config>) -> Command,
) -> Result<Command, Refused> {
    let config = config.validated().map_err(|invalid| not_allowed(&invalid, matches))?;
    Ok(if print {
        Command::Print(show::table(&config, &definition(), matches))
    } else {
        command(Box::new(config))
    })
}

/// clap does not say which variable it cannot read.
fn readable_environment() -> Result<(), Refused> {
    let command = declared();
    let unreadable = |name: &&OsStr| env::var_os(name).is_some_and(|value| value.to_str().is_none());
    match command.get_arguments().filter_map(Arg::get_env).find(unreadable) {
        Some(name) => Err(Refused(format!("{}: must be UTF-8", name.display()))),
        None => Ok(()),
    }
}

/// Makes the command of its declaration; without an environment no variable is looked at.
fn prepared(environment: Environment) -> clap::Command {
    let prepare = |arg: Arg| {
        let meant = environment == Environment::Read && arg.get_env().is_none_or(meant);
        let arg = if meant { arg } else { arg.env(Resettable::Reset) };
        // So that `-1` is refused as a value, with what is allowed, and not as an unknown flag.
        let takes_values = arg.get_action().takes_values();
        arg.allow_negative_numbers(takes_values)
    };
    declared().mut_args(prepare).mut_subcommands(|command| command.mut_args(prepare))
}

/// Whether an operator set this variable: one that a compose file passes on empty is not set, and beside a
/// Service of the name `vllm-proxy` Kubernetes puts its own `VLLM_PROXY_PORT=tcp://…` into every pod.
fn meant(name: &OsStr) -> bool {
    let value = env::var_os(name).unwrap_or_default();
    let service_link = name == "VLLM_PROXY_PORT" && value.as_encoded_bytes().starts_with(b"tcp://");
    !value.is_empty() && !service_link
}

/// The command as it is declared. What stands in the environment is shown nowhere: there are secrets in it,
/// and `--help` is to read alike everywhere.
fn declared() -> clap::Command {
    let hide = |arg: Arg| arg.hide_env_values(true);
    Arguments::command().mut_args(hide).mut_subcommands(|command| command.mut_args(hide))
}

/// Says in one line why clap does not take the arguments.
fn refused(error: &clap::Error, arguments: &[OsString], environment: Environment) -> Refused {
    let Some((name, value)) = wrong_value(error) else { return Refused(one_line(error)) };
    let mut command = declared();
    command.build();
    let Some(arg) = find(&command, &name) else { return Refused(one_line(error)) };
    let id = arg.get_id().as_str();
    let Some(rule) = rules::rule(id) else { return Refused(one_line(error)) };
    // What is still wrong without an environment stands on the command line.
    let by_flag = environment == Environment::Ignored
        || prepared(Environment::Ignored)
            .try_get_matches_from(arguments)
            .is_err_and(|error| wrong_value(&error) == Some((name, value.clone())));
    let reason = match error.source() {
        // A URL that is not one is not repeated: there may be a password in it. What is said of a Redis repeats nothing.
        Some(reason) if id == "redis" || !value.contains('@') => format!(" ({reason})"),
        _ => String::new(),
    };
    Refused(line(arg, by_flag, &show::shown(id, &value), rule.allowed) + &reason)
}

/// Says in one line why a value of the right form is not allowed.
fn not_allowed(invalid: &Invalid, matches: &ArgMatches) -> Refused {
    let command = declared();
    match command.get_arguments().find(|arg| arg.get_id() == invalid.id) {
        Some(arg) => {
            let by_flag = matches.value_source(invalid.id) != Some(ValueSource::EnvVariable);
            Refused(line(arg, by_flag, &show::shown(invalid.id, &invalid.value), invalid.allowed))
        }
        None => Refused(invalid.to_string()),
    }
}

fn line(arg: &Arg, by_flag: bool, value: &str, allowed: &str) -> String {
    let flag = arg.get_long().unwrap_or_default();
    match arg.get_env() {
        Some(variable) if !by_flag => {
            format!("{}={value} (which sets --{flag}): must be {allowed}", variable.display())
        }
        _ => format!("--{flag}={value}: must be {allowed}"),
    }
}

/// The argument, as clap writes it, and its value, if the error is about a value.
fn wrong_value(error: &clap::Error) -> Option<(String, String)> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            Some((text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?))
        }
        _ => None,
    }
}

/// The argument that clap writes like this, of the command or a sub-command.
fn find<'a>(command: &'a clap::Command, written: &str) -> Option<&'a Arg> {
    let here = |command: &'a clap::Command| command.get_arguments().find(|arg| arg.to_string() == written);
    here(command).or_else(|| command.get_subcommands().find_map(here))
}

/// What clap says, without usage and in one line.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join("; ").replace(":; ", ": ");
    show::escaped(line.strip_prefix("error: ").unwrap_or(&line))
}
