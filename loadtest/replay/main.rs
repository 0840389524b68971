//! Compares policies without GPUs: replays requests against a model of vLLM's scheduler and its prefix cache, in
//! virtual time, with the very policy code that the proxy runs.
//!
//! `cargo run --profile replay --example replay -- --trace mooncake_conversation_trace.jsonl --out target/replay`
//!
//! Not modelled: preemption, the network, tokenizers that split text otherwise than the index does, speculative
//! decoding, requests that other proxies send to the same workers. What a step costs is a guess at a large model on
//! four large GPUs: ratios mean something, seconds little.
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "a tool for the terminal")]

mod cache;
mod chance;
mod chooser;
mod contender;
mod engine;
mod fleet;
mod matrix;
mod plot;
mod report;
mod run;
mod scenario;
mod workload;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Parser;
use vllm_proxy::base::Clock;

use crate::{
    contender::{Contender, ORACLES},
    matrix::{Plan, Rates},
    scenario::{Name, matrix, special, trace_file},
};

/// Compares routing policies on simulated vLLM workers.
#[derive(Debug, Parser)]
struct Args {
    /// Who chooses [default: everybody]: policies of the proxy, `oracle_<weight>`, `reference`
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    policies: Vec<String>,

    /// What is replayed [default: all but quick; without a trace those that are generated]
    #[arg(long, num_args = 1.., value_delimiter = ',', value_enum)]
    workloads: Vec<Name>,

    /// Numbers of workers
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [8, 16])]
    workers: Vec<usize>,

    /// Percent of the load that the oracle just sustains
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [50, 75, 90])]
    loads: Vec<u32>,

    /// Seed of chance
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Seeds that each figure is the mean of, from --seed on
    #[arg(long, default_value_t = 2)]
    seeds: u64,

    /// The Mooncake conversation trace, or the folder that it lies in
    #[arg(long, env = "VLLM_PROXY_TRACES", value_name = "PATH")]
    trace: Option<PathBuf>,

    /// Where results.json, report.md and the plots go [default: nowhere]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// A small generated workload on four workers, nothing unusual
    #[arg(long)]
    quick: bool,

    /// Only the matrix: no unequal workers, no faults, no wrong guesses
    #[arg(long)]
    plain: bool,

    /// Look for the highest rate of each policy too
    #[arg(long)]
    sustainable: bool,

    /// Look for all loads of 100 % anew, and print them: for rates.json beside the sources
    #[arg(long)]
    find_rates: bool,

    /// Scenarios at a time
    #[arg(long, default_value_t = 2)]
    threads: usize,

    /// Flags for the proxy, behind `--`
    #[arg(last = true)]
    flags: Vec<String>,
}

impl Args {
    fn contenders(&self) -> anyhow::Result<Vec<Contender>> {
        if self.policies.is_empty() {
            return Ok(Contender::all());
        }
        let named = |name: &String| Contender::named(name).with_context(|| format!("`{name}` is no policy"));
        let mut all: Vec<Contender> = self.policies.iter().map(named).collect::<Result<_, _>>()?;
        // without them nothing can be compared
        let missing = ORACLES.map(Contender::Oracle).into_iter();
        all.extend(missing.filter(|oracle| !self.policies.contains(&oracle.name())));
        Ok(all)
    }

    fn workloads(&self) -> Vec<Name> {
        if self.quick {
            return vec![Name::Quick];
        }
        if !self.workloads.is_empty() {
            return self.workloads.clone();
        }
        let all = [Name::Conv, Name::Conv2m, Name::Mix, Name::Agent, Name::Hot];
        all.into_iter().filter(|name| self.trace.is_some() || !name.needs_trace()).collect()
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = Args::parse();
    if args.quick {
        (args.workers, args.seeds, args.plain) = (vec![4], 1, true);
    }
    if args.workers.contains(&0) || args.loads.contains(&0) || args.seeds == 0 {
        bail!("workers, loads and seeds must be greater than 0");
    }
    let (contenders, workloads) = (args.contenders()?, args.workloads());
    let trace = args.trace.as_deref().map(trace_file);
    let seeds: Vec<u64> = (args.seed..args.seed + args.seeds).collect();
    let plan = Plan {
        contenders: &contenders,
        flags: &args.flags,
        trace: trace.as_deref(),
        seeds: &seeds,
        threads: args.threads,
    };
    let mut scenarios = matrix(&workloads, &args.workers, &args.loads);
    if !args.plain {
        scenarios.extend(special(&workloads, args.workers[0]));
    }
    let mut rates = if args.find_rates { Rates::default() } else { Rates::known()? };
    let clock = Clock::start();
    let progress = |text: &str| eprintln!("{:6.1} s  {text}", clock.millis() as f64 / 1000.0);
    let outcomes = plan.results(&scenarios, &mut rates, &progress)?;
    let oracles: Vec<String> = ORACLES.map(|weight| Contender::Oracle(weight).name()).to_vec();
    let compared = report::compare(&outcomes, &oracles);
    let mut text = report::scenarios(&compared) + &report::groups(&compared) + &report::summary(&compared);
    let mut sustained = Vec::new();
    if args.sustainable {
        sustained = plan.sustained(&workloads, args.workers[0], &mut rates, &progress)?;
        text += &report::sustained(&sustained);
    }
    print!("{text}");
    if args.find_rates {
        println!("{}", serde_json::to_string_pretty(&rates)?);
    }
    if let Some(folder) = &args.out {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let json = serde_json::to_string_pretty(&report::json(&compared, &sustained, &rates, &seeds))?;
        let files = [
            ("report.md", text),
            ("results.json", json),
            ("ttft.svg", plot::curves(&compared, &oracles)),
            ("ratios.svg", plot::bars(&compared)),
        ];
        for (name, content) in files {
            let path = folder.join(name);
            fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    progress("done");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Outcome;

    fn quick() -> Vec<Outcome> {
        let plan = Plan { contenders: &Contender::all(), flags: &[], trace: None, seeds: &[1], threads: 2 };
        let scenarios = matrix(&[Name::Quick], &[4], &[75]);
        plan.results(&scenarios, &mut Rates::known().unwrap(), &|_| ()).unwrap()
    }

    #[test]
    fn a_quick_run_puts_everybody_where_he_belongs_and_repeats_itself() {
        let outcomes = quick();
        assert_eq!(outcomes, quick());
        let of = |name: &str| &outcomes.iter().find(|outcome| outcome.contender == name).unwrap().measures;
        let (turn, best) = (of("round_robin"), of("oracle_1.5"));
        assert!(best.mean_s < turn.mean_s, "{} {}", best.mean_s, turn.mean_s);
        assert!(of("reference").mean_s < of("least_requests").mean_s);
        assert!(best.hit > turn.hit + 0.1, "{} {}", best.hit, turn.hit);
        let reusable = Name::Quick.load(None, 4, 1).unwrap().reusable();
        for outcome in &outcomes {
            let m = &outcome.measures;
            assert!(m.hit > 0.0 && m.hit <= reusable + 1e-9, "{outcome:?}");
            assert!(m.p50_s <= m.p90_s && m.p90_s <= m.p99_s && m.mean_s > 0.0, "{outcome:?}");
            assert!((1.0..=4.0).contains(&m.imbalance), "{outcome:?}");
        }
    }
}
