//! Runs all scenarios with all contenders, several at a time.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::{
    contender::{Contender, FULL_LOAD_ORACLE},
    engine::Model,
    fleet::Told,
    proxies::{Setup, Traffic},
    report::distinct,
    run::{Fault, Measures, Terms, highest_speed, run},
    scenario::{Name, Scenario},
    workload::Workload,
};

/// The rates that were found before: see `--find-rates`.
const RATES: &str = include_str!("rates.json");

/// Requests per second that are a load of 100 %, by [`Scenario::rate_key`]: the most that the oracle of weight 2
/// drains in time. They depend on the workloads and the step model only.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rates(pub(crate) BTreeMap<String, f64>);

impl Rates {
    /// Those that were found before.
    ///
    /// # Errors
    /// The file in the sources is broken.
    pub(crate) fn known() -> anyhow::Result<Self> {
        serde_json::from_str(RATES).context("rates.json")
    }
}

/// What is the same for all runs.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) contenders: &'a [Contender],
    /// For the proxy.
    pub(crate) flags: &'a [String],
    pub(crate) trace: Option<&'a Path>,
    pub(crate) seeds: &'a [u64],
    pub(crate) threads: usize,
}

/// What a contender reached in a scenario; the mean of all seeds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) scenario: Scenario,
    pub(crate) contender: String,
    pub(crate) measures: Measures,
}

/// What several proxies reached in a scenario.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Together {
    pub(crate) scenario: Scenario,
    pub(crate) contender: String,
    pub(crate) setup: Setup,
    /// The mean of all seeds.
    pub(crate) measures: Measures,
    /// The sum of all seeds.
    pub(crate) traffic: Traffic,
    /// Of all seeds.
    pub(crate) requests: u64,
}

/// The highest rates that a contender sustains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Sustained {
    pub(crate) workload: Name,
    pub(crate) workers: usize,
    pub(crate) contender: String,
    pub(crate) requests_per_s: f64,
}

impl Plan<'_> {
    /// Runs everything, and adds to `rates` what it lacks. In the order of `scenarios`, within one in that of the
    /// contenders.
    ///
    /// # Errors
    /// A workload cannot be had, or the proxy refuses its flags.
    pub(crate) fn results(
        &self,
        scenarios: &[Scenario],
        rates: &mut Rates,
        progress: &(dyn Fn(&str) + Sync),
    ) -> anyhow::Result<Vec<Outcome>> {
        let mut sums: Vec<Vec<Measures>> = vec![Vec::new(); scenarios.len() * self.contenders.len()];
        let mut batches: Vec<(Name, usize)> = Vec::new();
        for scenario in scenarios {
            if !batches.contains(&(scenario.workload, scenario.workers)) {
                batches.push((scenario.workload, scenario.workers));
            }
        }
        for (name, workers) in batches {
            let mine = |scenario: &Scenario| (scenario.workload, scenario.workers) == (name, workers);
            let chosen: Vec<&Scenario> = scenarios.iter().filter(|scenario| mine(scenario)).collect();
            for seed in self.seeds {
                let workload = name.load(self.trace, workers, *seed)?;
                self.complete(rates, &workload, &chosen, *seed, progress)?;
                progress(&format!(
                    "{} on {workers} workers, seed {seed}: {}",
                    name.text(),
                    workload.summary()
                ));
                let jobs: Vec<(usize, usize)> = scenarios
                    .iter()
                    .enumerate()
                    .filter(|(_, scenario)| mine(scenario))
                    .flat_map(|(at, _)| (0..self.contenders.len()).map(move |who| (at, who)))
                    .filter(|(at, who)| takes_part(&self.contenders[*who], &scenarios[*at]))
                    .collect();
                let done = in_parallel(self.threads, &jobs, |(at, who)| {
                    let contender = &self.contenders[*who];
                    self.one(&workload, &scenarios[*at], contender, Setup::ONE, rates, *seed)
                });
                for ((at, who), measures) in jobs.iter().zip(done) {
                    sums[at * self.contenders.len() + who].push(measures?.0);
                }
            }
        }
        let names = scenarios.iter().flat_map(|s| self.contenders.iter().map(move |c| (s, c)));
        let results = names.zip(sums).filter(|(_, runs)| !runs.is_empty());
        Ok(results
            .map(|((scenario, contender), runs)| Outcome {
                scenario: *scenario,
                contender: contender.name(),
                measures: Measures::mean(&runs),
            })
            .collect())
    }

    /// What each contender reaches with each of these setups in each of these scenarios. In the order of `scenarios`, then of the contenders, then of `setups`.
    ///
    /// # Errors
    /// As for [`Plan::results`].
    pub(crate) fn proxies(
        &self,
        scenarios: &[Scenario],
        setups: &[Setup],
        rates: &mut Rates,
        progress: &(dyn Fn(&str) + Sync),
    ) -> anyhow::Result<Vec<Together>> {
        let mut all = Vec::new();
        for scenario in scenarios {
            let who = self.contenders.iter().flat_map(|contender| setups.iter().map(move |s| (contender, s)));
            let jobs: Vec<(&Contender, &Setup)> = who.collect();
            let mut sums: Vec<Vec<(Measures, Traffic)>> = vec![Vec::new(); jobs.len()];
            let mut requests = 0;
            for seed in self.seeds {
                let workload = scenario.workload.load(self.trace, scenario.workers, *seed)?.in_whole_chunks();
                self.complete(rates, &workload, &[scenario], *seed, progress)?;
                progress(&format!("{}, seed {seed}", scenario.title()));
                let done = in_parallel(self.threads, &jobs, |(contender, setup)| {
                    self.one(&workload, scenario, contender, **setup, rates, *seed)
                });
                for (sum, result) in sums.iter_mut().zip(done) {
                    sum.push(result?);
                }
                requests += workload.requests.len() as u64;
            }
            all.extend(jobs.iter().zip(sums).map(|((contender, setup), runs)| {
                let (measures, traffic): (Vec<Measures>, Vec<Traffic>) = runs.into_iter().unzip();
                Together {
                    scenario: *scenario,
                    contender: contender.name(),
                    setup: **setup,
                    measures: Measures::mean(&measures),
                    traffic: traffic.into_iter().fold(Traffic::default(), Traffic::plus),
                    requests,
                }
            }));
        }
        Ok(all)
    }

    /// The highest rate of each contender on each workload.
    ///
    /// # Errors
    /// As for [`Plan::results`].
    pub(crate) fn sustained(
        &self,
        workloads: &[Name],
        workers: usize,
        rates: &mut Rates,
        progress: &(dyn Fn(&str) + Sync),
    ) -> anyhow::Result<Vec<Sustained>> {
        let mut all = Vec::new();
        for name in workloads {
            let (scenario, seed) = (Scenario::plain(*name, workers, 100), self.seeds[0]);
            let workload = name.load(self.trace, workers, seed)?;
            self.complete(rates, &workload, &[&scenario], seed, progress)?;
            progress(&format!("highest rates of {} on {workers} workers", name.text()));
            let (models, full) = (scenario.models(), rate(rates, &scenario, seed)? / workload.rate());
            let found = in_parallel(self.threads, self.contenders, |contender| {
                self.highest(&workload, &models, contender, full, seed)
            });
            for (contender, speed) in self.contenders.iter().zip(found) {
                let requests_per_s = speed? * workload.rate();
                all.push(Sustained { workload: *name, workers, contender: contender.name(), requests_per_s });
            }
        }
        Ok(all)
    }

    /// Finds the rates that `scenarios` of a workload need and `rates` lacks.
    fn complete(
        &self,
        rates: &mut Rates,
        workload: &Workload,
        scenarios: &[&Scenario],
        seed: u64,
        progress: &(dyn Fn(&str) + Sync),
    ) -> anyhow::Result<()> {
        let missing = distinct(scenarios.iter().map(|scenario| (scenario.rate_key(seed), scenario.models())))
            .into_iter()
            .filter(|(key, _)| !rates.0.contains_key(key))
            .collect::<Vec<_>>();
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = missing.iter().map(|(key, _)| &**key).collect();
        progress(&format!("looking for the full load of {}", names.join(", ")));
        let oracle = Contender::Oracle(FULL_LOAD_ORACLE);
        let found = in_parallel(self.threads, &missing, |(_, models)| {
            self.highest(workload, models, &oracle, 2.0, seed)
        });
        for ((key, _), speed) in missing.into_iter().zip(found) {
            rates.0.insert(key, (speed? * workload.rate() * 1000.0).round() / 1000.0);
        }
        Ok(())
    }

    fn highest(
        &self,
        workload: &Workload,
        models: &[Model],
        contender: &Contender,
        guess: f64,
        seed: u64,
    ) -> anyhow::Result<f64> {
        let told = Told { cache_tokens: models[0].cache_tokens, cached: true };
        let mut refused = Ok(());
        let speed = highest_speed(guess, |speed| {
            let mut chooser =
                match contender.build(self.flags, workload, models.len(), told, Setup::ONE, seed) {
                    Ok(chooser) => chooser,
                    Err(error) => {
                        refused = Err(error);
                        return false;
                    }
                };
            let foresight = contender.foresight();
            let terms = Terms { workload, speed, models, fault: Fault::None, foresight, only_drain: true };
            run(&terms, &mut *chooser).drained
        });
        refused.map(|()| speed)
    }

    fn one(
        &self,
        workload: &Workload,
        scenario: &Scenario,
        contender: &Contender,
        setup: Setup,
        rates: &Rates,
        seed: u64,
    ) -> anyhow::Result<(Measures, Traffic)> {
        let models = scenario.models();
        let cache_tokens = (models[0].cache_tokens as f64 * scenario.guess) as u64;
        let told = Told { cache_tokens, cached: scenario.feedback };
        let mut chooser = contender.build(self.flags, workload, models.len(), told, setup, seed)?;
        let terms = Terms {
            workload,
            speed: rate(rates, scenario, seed)? / workload.rate() * f64::from(scenario.load) / 100.0,
            models: &models,
            fault: scenario.fault,
            foresight: contender.foresight(),
            only_drain: false,
        };
        let measures = run(&terms, &mut *chooser);
        Ok((measures, chooser.traffic()))
    }
}

fn rate(rates: &Rates, scenario: &Scenario, seed: u64) -> anyhow::Result<f64> {
    rates.0.get(&scenario.rate_key(seed)).copied().context("a rate is missing")
}

/// Who neither reads prompts nor knows all is not run again where only knowledge differs.
fn takes_part(contender: &Contender, scenario: &Scenario) -> bool {
    !scenario.is_about_knowledge() || contender.learns() || contender.is_measure()
}

/// Does `work` for all items on some threads; the answers are in the items' order.
fn in_parallel<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while let Some((at, item)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    items.get(at).map(|item| (at, item))
                } {
                    let answer = work(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((at, answer));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, answer)| answer).collect()
}
