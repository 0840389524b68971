//! The scenarios: which workload meets which fleet under which load, and what goes wrong.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use crate::{
    engine::Model,
    run::Fault,
    workload::{AGENT, AGENT2, HOT, MIX, Mould, Workload, generate, read_trace},
};

/// More workers than this are given two copies of a workload: one copy would be too thin for them.
const WORKERS_PER_COPY: usize = 12;

/// A workload by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Name {
    /// The Mooncake conversation trace; needs --trace
    Conv,
    /// The same on workers that hold two million tokens
    Conv2m,
    /// Chats of all kinds, generated
    Mix,
    /// 60 tools with long system prompts, sessions of four requests
    Agent,
    /// Six tools, one of which has most of the requests
    Hot,
    /// 200 tools: parameters were not tuned on it
    Agent2,
    /// A small mix for a first look
    Quick,
}

impl Name {
    /// How it is called.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Conv => "conv",
            Self::Conv2m => "conv2m",
            Self::Mix => "mix",
            Self::Agent => "agent",
            Self::Hot => "hot",
            Self::Agent2 => "agent2",
            Self::Quick => "quick",
        }
    }

    /// Whether it is read from a trace.
    pub(crate) fn needs_trace(self) -> bool {
        matches!(self, Self::Conv | Self::Conv2m)
    }

    /// Makes or reads it.
    ///
    /// # Errors
    /// It needs a trace and there is none, or it cannot be read.
    pub(crate) fn load(self, trace: Option<&Path>, workers: usize, seed: u64) -> anyhow::Result<Workload> {
        let quick = Mould { requests: 2500, length_s: 600.0, ..MIX };
        let one = match self {
            Self::Conv | Self::Conv2m => read_trace(trace.context("no trace was given")?, seed)?,
            Self::Mix => generate(&MIX, seed),
            Self::Agent => generate(&AGENT, seed),
            Self::Hot => generate(&HOT, seed),
            Self::Agent2 => generate(&AGENT2, seed ^ 0xa2),
            Self::Quick => generate(&quick, seed),
        };
        Ok(if workers > WORKERS_PER_COPY { one.doubled() } else { one })
    }
}

/// The trace file: the path itself, or in that folder the file that Mooncake calls so.
pub(crate) fn trace_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("mooncake_conversation_trace.jsonl") } else { path.to_owned() }
}

/// What workers are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Build {
    /// All alike.
    Even,
    /// Half of them take 0.7 of the time for a step, half 1.6.
    Unequal,
    /// All alike, of another make: 30,000 tokens per second, 300,000 tokens of cache.
    Other,
}

impl Build {
    fn text(self) -> &'static str {
        match self {
            Self::Even => "even",
            Self::Unequal => "unequal",
            Self::Other => "other",
        }
    }
}

/// One scenario.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scenario {
    /// Heading that it is shown under.
    pub(crate) group: &'static str,
    pub(crate) workload: Name,
    pub(crate) workers: usize,
    pub(crate) build: Build,
    /// Percent of the speed that the oracle just sustains.
    pub(crate) load: u32,
    pub(crate) fault: Fault,
    /// What the proxy takes a cache's size for, relative to the truth.
    pub(crate) guess: f64,
    /// Whether workers report how many tokens they found cached.
    pub(crate) feedback: bool,
}

/// The group whose scenarios the summary is made of.
pub(crate) const MAIN: &str = "matrix";

impl Scenario {
    /// A plain one of the matrix.
    pub(crate) fn plain(workload: Name, workers: usize, load: u32) -> Self {
        Self {
            group: MAIN,
            workload,
            workers,
            build: Build::Even,
            load,
            fault: Fault::None,
            guess: 1.0,
            feedback: true,
        }
    }

    /// What the speed of 100 % depends on.
    pub(crate) fn rate_key(&self, seed: u64) -> String {
        format!("{}/{}/{}/{seed}", self.workload.text(), self.workers, self.build.text())
    }

    /// How it is shown.
    pub(crate) fn title(&self) -> String {
        format!("{}, {} workers, {} %", self.workload.text(), self.workers, self.load)
    }

    /// The workers.
    pub(crate) fn models(&self) -> Vec<Model> {
        let mut model = Model::default();
        match (self.workload, self.build) {
            (_, Build::Other) => (model.prefill_rate, model.cache_tokens) = (30_000.0, 300_000),
            (Name::Conv2m, _) => model.cache_tokens = 2_000_000,
            _ => {}
        }
        let mut models = vec![model; self.workers];
        if self.build == Build::Unequal {
            for (at, model) in models.iter_mut().enumerate() {
                model.slowness = if at % 2 == 0 { 0.7 } else { 1.6 };
            }
        }
        models
    }

    /// Whether the proxy's knowledge is made worse than it usually is: who knows nothing, or all, does not mind.
    pub(crate) fn is_about_knowledge(&self) -> bool {
        self.guess != 1.0 || !self.feedback
    }
}

/// Every workload with every number of workers under every load.
pub(crate) fn matrix(workloads: &[Name], workers: &[usize], loads: &[u32]) -> Vec<Scenario> {
    let mut all = Vec::new();
    for workload in workloads {
        for workers in workers {
            all.extend(loads.iter().map(|load| Scenario::plain(*workload, *workers, *load)));
        }
    }
    all
}

/// What is unusual: unequal workers, lost caches, wrong guesses, and numbers that nothing was tuned on.
pub(crate) fn special(workloads: &[Name], workers: usize) -> Vec<Scenario> {
    let mut all = Vec::new();
    let chosen = [Name::Conv, Name::Mix, Name::Agent].into_iter().filter(|name| workloads.contains(name));
    let plain: Vec<Scenario> =
        chosen.flat_map(|name| [75, 90].map(|load| Scenario::plain(name, workers, load))).collect();
    let mut group = |group: &'static str, change: &dyn Fn(&mut Scenario)| {
        all.extend(plain.iter().map(|scenario| {
            let mut scenario = Scenario { group, ..*scenario };
            change(&mut scenario);
            scenario
        }));
    };
    group("unequal workers", &|s| s.build = Build::Unequal);
    group("a cache lost every minute, seen", &|s| s.fault = Fault::FlushSeen);
    group("a cache lost every minute, unseen", &|s| s.fault = Fault::FlushUnseen);
    group("a cache lost every minute, unseen, no cached_tokens", &|s| {
        (s.fault, s.feedback) = (Fault::FlushUnseen, false);
    });
    group("capacity right, no cached_tokens", &|s| s.feedback = false);
    group("capacity taken for half", &|s| s.guess = 0.5);
    group("capacity taken for half, no cached_tokens", &|s| (s.guess, s.feedback) = (0.5, false));
    group("capacity taken for twice", &|s| s.guess = 2.0);
    group("capacity taken for twice, no cached_tokens", &|s| (s.guess, s.feedback) = (2.0, false));
    let others = [Name::Conv, Name::Mix, Name::Agent2];
    for name in others.into_iter().filter(|name| *name == Name::Agent2 || workloads.contains(name)) {
        all.extend([60, 85].map(|load| Scenario {
            group: "other workers and workloads",
            build: Build::Other,
            ..Scenario::plain(name, 12, load)
        }));
    }
    all
}
