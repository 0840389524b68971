//! What an operator may set of the logs.

use std::{fmt, str::FromStr};

use thiserror::Error;
use tracing_subscriber::filter::LevelFilter;

/// Verbosity and format of the logs, which go to stdout.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// How much is logged: 1 or Loud, Verbose, Debug, Info, Warning, 0 or Quiet or Error; in any case
    #[arg(long, env = "VLLM_PXY_VERBOSITY", default_value_t = Verbosity::Info, value_name = "LEVEL")]
    pub verbosity: Verbosity,

    /// One step more than --verbosity says; may be repeated
    #[arg(short = 'v', long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// One step less than --verbosity says; may be repeated
    #[arg(short = 'q', long, action = clap::ArgAction::Count)]
    pub quiet: u8,

    /// Format of a record: txt (brackets), json or yml [default: txt on a terminal, json elsewhere]
    #[arg(short = 'L', long, env = "VLLM_PXY_LOGFORMAT", value_name = "txt|json|yml")]
    pub log_format: Option<Format>,

    /// No colours on a terminal
    #[arg(long, env = "NO_COLOR", value_parser = clap::builder::FalseyValueParser::new())]
    pub no_color: bool,
}

impl Settings {
    /// The verbosity after all steps of `-v` and `-q`, which end at the ends of the ladder.
    pub fn effective(&self) -> Verbosity {
        let from = LADDER.iter().position(|(rung, _)| *rung == self.verbosity).unwrap_or_default();
        let to = (from + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet));
        LADDER[to.min(LADDER.len() - 1)].0
    }
}

/// How much is logged, from little to much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Errors.
    Error,
    /// Errors and warnings.
    Warning,
    /// These, and what happens to the process and its workers.
    #[default]
    Info,
    /// Every record.
    Debug,
    /// Every record, with where in the program it was made.
    Verbose,
    /// Every record, with all details.
    Loud,
}

/// The rungs from quiet to loud, and the names by which each can be chosen; the first is the one shown.
const LADDER: [(Verbosity, &[&str]); 6] = [
    (Verbosity::Error, &["Error", "Quiet", "0"]),
    (Verbosity::Warning, &["Warning", "Warn"]),
    (Verbosity::Info, &["Info"]),
    (Verbosity::Debug, &["Debug"]),
    (Verbosity::Verbose, &["Verbose"]),
    (Verbosity::Loud, &["Loud", "1"]),
];

impl Verbosity {
    /// The least severe tracing level that is shown. `Debug` already means every record; what lies above it
    /// adds details to each.
    pub fn level_filter(self) -> LevelFilter {
        match self {
            Self::Error => LevelFilter::ERROR,
            Self::Warning => LevelFilter::WARN,
            Self::Info => LevelFilter::INFO,
            Self::Debug | Self::Verbose | Self::Loud => LevelFilter::TRACE,
        }
    }
}

impl fmt::Display for Verbosity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(LADDER.iter().find(|(rung, _)| rung == self).map_or("", |(_, names)| names[0]))
    }
}

/// A verbosity or a format that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no such {0}")]
pub struct ParseLevelError(&'static str);

impl FromStr for Verbosity {
    type Err = ParseLevelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        LADDER
            .iter()
            .find(|(_, names)| names.iter().any(|name| name.eq_ignore_ascii_case(text)))
            .map(|(rung, _)| *rung)
            .ok_or(ParseLevelError("verbosity"))
    }
}

/// How a record is written, named by the suffix of a file that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One line: time, level in brackets, message, fields in brackets.
    Txt,
    /// One line with one JSON object.
    Json,
    /// One YAML document.
    Yml,
}

impl FromStr for Format {
    type Err = ParseLevelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const NAMES: [(&str, Format); 4] =
            [("txt", Format::Txt), ("json", Format::Json), ("yml", Format::Yml), ("yaml", Format::Yml)];
        NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, format)| *format)
            .ok_or(ParseLevelError("log format"))
    }
}
