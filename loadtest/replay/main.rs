//! Compares policies without GPUs: replays requests against a model of vLLM's scheduler and its prefix cache, in
//! virtual time, with the very policy code that the proxy runs.
//!
//! `cargo run --profile replay --example replay -- --trace mooncake_conversation_trace.jsonl --out target/replay`
//!
//! `-- --trace mooncake_conversation_trace.jsonl --proxies 1,2,8` compares one proxy with several before the same workers,
//! that hear of each other in all ways: through Redis, which is a stream in memory that loses nothing, with the very
//! code that composes and reads what goes through it; and not at all, which is when Redis is down, or there is none.
//!
//! Not modelled: preemption, the network, tokenizers that split text otherwise than the index does, speculative
//! decoding. What a step costs is a guess at a large model on
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
mod proxies;
mod report;
mod run;
mod scenario;
mod workload;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Parser;
use vllm_proxy::base::Clock;

use crate::{
    contender::{Contender, ORACLES},
    matrix::{Plan, Rates},
    proxies::Setup,
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

    /// Numbers of workers [default: 8,16; of several proxies 8]
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    workers: Vec<usize>,

    /// Percent of the load that the oracle just sustains [default: 50,75,90; of several proxies 75,90]
    #[arg(long, num_args = 1.., value_delimiter = ',')]
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

    /// Compare so many proxies before the same workers with one; requests come to any of them. By default `conv` and
    /// `agent` are replayed, with cache_aware
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "COUNT")]
    proxies: Vec<usize>,

    /// Intervals at which they tell each other what they do
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [10, 50, 100, 1000], value_name = "MS")]
    sync_intervals_ms: Vec<u64>,

    /// Scenarios at a time
    #[arg(long, default_value_t = 2)]
    threads: usize,

    /// Flags for the proxy, behind `--`
    #[arg(last = true)]
    flags: Vec<String>,
}

impl Args {
    /// Puts in what depends on other flags.
    fn complete(&mut self) {
        let one = self.proxies.is_empty();
        if self.workers.is_empty() {
            self.workers = if one { vec![8, 16] } else { vec![8] };
        }
        if self.loads.is_empty() {
            self.loads = if one { vec![50, 75, 90] } else { vec![75, 90] };
        }
    }

    fn contenders(&self) -> anyhow::Result<Vec<Contender>> {
        let policies = match (&*self.policies, &*self.proxies) {
            ([], []) => return Ok(Contender::all()),
            ([], _) => &["cache_aware".to_owned()],
            (policies, _) => policies,
        };
        let named = |name: &String| Contender::named(name).with_context(|| format!("`{name}` is no policy"));
        let mut all: Vec<Contender> = policies.iter().map(named).collect::<Result<_, _>>()?;
        if !self.proxies.is_empty() {
            return Ok(all);
        }
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
        let all = if self.proxies.is_empty() { &all[..] } else { &[Name::Conv, Name::Agent] };
        all.iter().copied().filter(|name| self.trace.is_some() || !name.needs_trace()).collect()
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = Args::parse();
    if args.quick {
        (args.workers, args.seeds, args.plain) = (vec![4], 1, true);
    }
    args.complete();
    let zero = args.workers.contains(&0) || args.loads.contains(&0) || args.proxies.contains(&0);
    if zero || args.sync_intervals_ms.contains(&0) || args.seeds == 0 {
        bail!("workers, loads, proxies, intervals and seeds must be greater than 0");
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
    let mut rates = if args.find_rates { Rates::default() } else { Rates::known()? };
    let clock = Clock::start();
    let progress = |text: &str| eprintln!("{:6.1} s  {text}", clock.millis() as f64 / 1000.0);
    if !args.proxies.is_empty() {
        let setups = Setup::all(&args.proxies, &args.sync_intervals_ms);
        let results = plan.proxies(&scenarios, &setups, &mut rates, &progress)?;
        let text = report::proxies(&results);
        print!("{text}");
        return args.out.as_deref().map_or(Ok(()), |folder| write(folder, &[("proxies.md", text)]));
    }
    if !args.plain {
        scenarios.extend(special(&workloads, args.workers[0]));
    }
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
        let json = serde_json::to_string_pretty(&report::json(&compared, &sustained, &rates, &seeds))?;
        let files = [
            ("report.md", text),
            ("results.json", json),
            ("ttft.svg", plot::curves(&compared, &oracles)),
            ("ratios.svg", plot::bars(&compared)),
        ];
        write(folder, &files)?;
    }
    progress("done");
    Ok(())
}

fn write(folder: &Path, files: &[(&str, String)]) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, content) in files {
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{matrix::Outcome, proxies::Sharing, run::Measures};

    fn quick() -> Vec<Outcome> {
        let plan = Plan { contenders: &Contender::all(), flags: &[], trace: None, seeds: &[1], threads: 2 };
        let scenarios = matrix(&[Name::Quick], &[4], &[75]);
        plan.results(&scenarios, &mut Rates::known().unwrap(), &|_| ()).unwrap()
    }

    fn together(setups: &[Setup]) -> Vec<Measures> {
        let cache_aware = [Contender::named("cache_aware").unwrap()];
        let plan = Plan { contenders: &cache_aware, flags: &[], trace: None, seeds: &[1], threads: 2 };
        let scenarios = matrix(&[Name::Quick], &[4], &[75]);
        let results = plan.proxies(&scenarios, setups, &mut Rates::known().unwrap(), &|_| ()).unwrap();
        results.into_iter().map(|result| result.measures).collect()
    }

    #[test]
    fn several_proxies_that_hear_each_other_are_nearly_as_one_and_others_are_not() {
        let four = |sharing| Setup { proxies: 4, sharing };
        let setups =
            [Setup::ONE, four(Sharing::IntervalMs(50)), four(Sharing::Alone), four(Sharing::Isolated)];
        let [one, shared, alone, isolated] = &together(&setups)[..] else { panic!("a result for each") };
        assert!(shared.hit > one.hit * 0.97, "{shared:?} {one:?}");
        assert!(shared.mean_s < one.mean_s * 1.1, "{shared:?} {one:?}");
        assert!(shared.hit > isolated.hit + 0.1, "{shared:?} {isolated:?}");
        assert!(alone.hit > isolated.hit + 0.05, "{alone:?} {isolated:?}");
        assert_eq!(together(&setups[1..2]), std::slice::from_ref(shared), "a run repeats itself");
    }

    #[test]
    fn one_proxy_that_hears_itself_is_as_if_it_heard_nothing() {
        let talking = Setup { proxies: 1, sharing: Sharing::IntervalMs(50) };
        let [one, talking] = &together(&[Setup::ONE, talking])[..] else { panic!("a result for each") };
        assert_eq!(one, talking);
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
