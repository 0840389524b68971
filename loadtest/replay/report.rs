//! What is shown of the results: tables in Markdown, and everything in JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::{
    matrix::{Outcome, Rates, Sustained, Together},
    proxies::{Setup, Sharing, Traffic},
    run::Measures,
    scenario::{MAIN, Scenario},
};

/// A result with how it compares to the best oracle of its scenario.
#[derive(Debug)]
pub(crate) struct Compared<'a> {
    pub(crate) outcome: &'a Outcome,
    /// Mean time to the first token, relative to the lowest of the oracles; `None`: no oracle took part.
    pub(crate) mean: Option<f64>,
    /// The same of the 99th percentile.
    pub(crate) p99: Option<f64>,
}

/// Compares each result with the oracles (their names) in its scenario.
pub(crate) fn compare<'a>(outcomes: &'a [Outcome], oracles: &[String]) -> Vec<Compared<'a>> {
    let best = |scenario: &Scenario, figure: fn(&Measures) -> f64| {
        let same = outcomes.iter().filter(|o| o.scenario == *scenario && oracles.contains(&o.contender));
        same.map(|outcome| figure(&outcome.measures)).reduce(f64::min)
    };
    let compared = |outcome: &'a Outcome| Compared {
        mean: best(&outcome.scenario, |m| m.mean_s).map(|best| outcome.measures.mean_s / best),
        p99: best(&outcome.scenario, |m| m.p99_s).map(|best| outcome.measures.p99_s / best),
        outcome,
    };
    outcomes.iter().map(compared).collect()
}

/// The n-th root of a product; `None` of nothing.
pub(crate) fn geometric_mean(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = figures.fold((0.0, 0), |(sum, count), figure| (sum + figure.ln(), count + 1));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

/// The values of a key in the order of their first appearance.
pub(crate) fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    for value in values {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

/// A table per scenario.
pub(crate) fn scenarios(results: &[Compared<'_>]) -> String {
    let mut text = String::new();
    for group in distinct(results.iter().map(|result| result.outcome.scenario.group)) {
        let _ = writeln!(text, "## {group}\n");
        let mine = || results.iter().filter(|result| result.outcome.scenario.group == group);
        for scenario in distinct(mine().map(|result| result.outcome.scenario)) {
            let rows = mine().filter(|result| result.outcome.scenario == scenario);
            table(&mut text, &scenario, rows);
        }
    }
    text
}

fn table<'a>(text: &mut String, scenario: &Scenario, rows: impl Iterator<Item = &'a Compared<'a>>) {
    let _ = writeln!(text, "### {}\n", scenario.title());
    text.push_str("| policy | token hit % | TTFT mean s | p50 | p90 | p99 | imbalance | mean × oracle | p99 × oracle |\n");
    text.push_str("|---|--:|--:|--:|--:|--:|--:|--:|--:|\n");
    for row in rows {
        let m = &row.outcome.measures;
        let _ = writeln!(
            text,
            "| {} | {:.1} | {} | {} | {} | {} | {:.2} | {} | {} |",
            row.outcome.contender,
            m.hit * 100.0,
            seconds(m.mean_s),
            seconds(m.p50_s),
            seconds(m.p90_s),
            seconds(m.p99_s),
            m.imbalance,
            times(row.mean),
            times(row.p99),
        );
    }
    text.push('\n');
}

/// Geometric means of the matrix by load, and the worst scenario.
pub(crate) fn summary(results: &[Compared<'_>]) -> String {
    let main: Vec<_> = results.iter().filter(|result| result.outcome.scenario.group == MAIN).collect();
    let loads = distinct(main.iter().map(|result| result.outcome.scenario.load));
    let scenarios = distinct(main.iter().map(|result| result.outcome.scenario)).len();
    let mut text =
        format!("## Summary: {scenarios} scenarios, TTFT relative to the best oracle\n\n| policy |");
    for load in &loads {
        let _ = write!(text, " {load} % mean / p99 |");
    }
    text.push_str(" all mean / p99 | worst mean |\n|---|");
    text.push_str(&"--:|".repeat(loads.len() + 2));
    text.push('\n');
    for contender in distinct(main.iter().map(|result| &result.outcome.contender)) {
        let mine: Vec<_> =
            main.iter().copied().filter(|result| result.outcome.contender == *contender).collect();
        let _ = write!(text, "| {contender} |");
        for load in &loads {
            let under = mine.iter().copied().filter(|result| result.outcome.scenario.load == *load);
            let _ = write!(text, " {} |", pair(&under.collect::<Vec<_>>()));
        }
        let worst = mine.iter().filter_map(|result| Some((result.mean?, result.outcome.scenario)));
        let worst = worst.max_by(|one, two| one.0.total_cmp(&two.0));
        let worst =
            worst.map_or("–".to_owned(), |(ratio, at)| format!("{} ({})", times(Some(ratio)), at.title()));
        let _ = writeln!(text, " {} | {worst} |", pair(&mine));
    }
    text + "\n"
}

/// Geometric means of the other groups.
pub(crate) fn groups(results: &[Compared<'_>]) -> String {
    let groups = distinct(results.iter().map(|result| result.outcome.scenario.group));
    if groups.len() < 2 {
        return String::new();
    }
    let contenders = distinct(results.iter().map(|result| &result.outcome.contender));
    let mut text = "## Groups: mean / p99 TTFT relative to the best oracle\n\n| group |".to_owned();
    for contender in &contenders {
        let _ = write!(text, " {contender} |");
    }
    let _ = writeln!(text, "\n|---|{}", "--:|".repeat(contenders.len()));
    for group in groups {
        let _ = write!(text, "| {group} |");
        for contender in &contenders {
            let mine = results.iter().filter(|result| {
                (result.outcome.scenario.group, &result.outcome.contender) == (group, *contender)
            });
            let _ = write!(text, " {} |", pair(&mine.collect::<Vec<_>>()));
        }
        text.push('\n');
    }
    text + "\n"
}

fn pair(results: &[&Compared<'_>]) -> String {
    let mean = geometric_mean(results.iter().filter_map(|result| result.mean));
    let p99 = geometric_mean(results.iter().filter_map(|result| result.p99));
    format!("{} / {}", times(mean), times(p99))
}

/// The highest rates, a column per workload.
pub(crate) fn sustained(results: &[Sustained]) -> String {
    let workloads = distinct(results.iter().map(|result| (result.workload, result.workers)));
    let mut text =
        "## Highest sustained rate, requests per second (share of the best policy)\n\n| policy |".to_owned();
    for (workload, workers) in &workloads {
        let _ = write!(text, " {}, {workers} workers |", workload.text());
    }
    let _ = writeln!(text, "\n|---|{}", "--:|".repeat(workloads.len()));
    let rate = |result: &Sustained| result.requests_per_s;
    for contender in distinct(results.iter().map(|result| &result.contender)) {
        let _ = write!(text, "| {contender} |");
        for (workload, _) in &workloads {
            let same = || results.iter().filter(|result| result.workload == *workload);
            let best =
                same().filter(|result| !result.contender.starts_with("oracle")).map(rate).fold(0.0, f64::max);
            let own = same().find(|result| result.contender == *contender).map_or(0.0, rate);
            let _ = write!(text, " {own:.2} ({:.0} %) |", 100.0 * own / best);
        }
        text.push('\n');
    }
    text + "\n"
}

/// How several proxies fare, beside one: a table of what they reach and one of what they tell each other, for each who
/// chooses.
pub(crate) fn proxies(results: &[Together]) -> String {
    let mut text = String::new();
    for contender in distinct(results.iter().map(|result| &result.contender)) {
        let mine = || results.iter().filter(|result| result.contender == *contender);
        let scenarios = distinct(mine().map(|result| result.scenario));
        let setups = distinct(mine().map(|result| result.setup));
        let of = |setup: Setup, scenario: &Scenario| {
            mine().find(|result| (result.setup, &result.scenario) == (setup, scenario))
        };
        let mut columns = "|".to_owned();
        for scenario in &scenarios {
            let _ = write!(columns, " {} |", scenario.title());
        }
        let _ = write!(columns, "\n|---|{}\n", "--:|".repeat(scenarios.len()));
        let _ = write!(
            text,
            "## Several proxies, {contender}: token hit %, TTFT mean and p99 in s (mean, p99 × one proxy)\n\n| {columns}"
        );
        for setup in setups.iter().copied() {
            let _ = write!(text, "| {} |", setup.title());
            for scenario in &scenarios {
                let cell = of(setup, scenario).zip(of(Setup::ONE, scenario)).map(|(result, one)| {
                    let (m, one) = (&result.measures, &one.measures);
                    let (mean, p99) = (times(Some(m.mean_s / one.mean_s)), times(Some(m.p99_s / one.p99_s)));
                    let (hit, mean_s, p99_s) = (m.hit * 100.0, seconds(m.mean_s), seconds(m.p99_s));
                    format!("{hit:.1} / {mean_s} / {p99_s} ({mean}, {p99})")
                });
                let _ = write!(text, " {} |", cell.unwrap_or_default());
            }
            text.push('\n');
        }
        let _ = write!(
            text,
            "\n## What they tell: bytes per request, batches per request, events dropped\n\n| {columns}"
        );
        for setup in setups.iter().copied().filter(|setup| matches!(setup.sharing, Sharing::IntervalMs(_))) {
            let _ = write!(text, "| {} |", setup.title());
            for scenario in &scenarios {
                let cell = of(setup, scenario).map(|result| {
                    let Traffic { bytes, batches, dropped } = result.traffic;
                    let per_request = |count: u64| count as f64 / result.requests as f64;
                    format!("{:.0} / {:.2} / {dropped}", per_request(bytes), per_request(batches))
                });
                let _ = write!(text, " {} |", cell.unwrap_or_default());
            }
            text.push('\n');
        }
        text.push('\n');
    }
    text
}

/// Everything.
pub(crate) fn json(results: &[Compared<'_>], sustained: &[Sustained], rates: &Rates, seeds: &[u64]) -> Value {
    let rows: Vec<Value> = results
        .iter()
        .map(|result| {
            let Scenario { group, workload, workers, build, load, fault, guess, feedback } =
                result.outcome.scenario;
            json!({
                "group": group, "workload": workload, "workers": workers, "build": build, "load_percent": load,
                "fault": fault, "capacity_guess": guess, "cached_tokens": feedback,
                "policy": result.outcome.contender, "measures": result.outcome.measures,
                "mean_ratio": result.mean, "p99_ratio": result.p99,
            })
        })
        .collect();
    json!({ "seeds": seeds, "full_load_requests_per_s": rates, "results": rows, "sustained": sustained })
}

fn seconds(figure: f64) -> String {
    match figure {
        _ if figure < 10.0 => format!("{figure:.3}"),
        _ if figure < 100.0 => format!("{figure:.1}"),
        _ => format!("{figure:.0}"),
    }
}

fn times(ratio: Option<f64>) -> String {
    match ratio {
        None => "–".to_owned(),
        Some(ratio) if ratio < 10.0 => format!("{ratio:.3}"),
        Some(ratio) => format!("{ratio:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Name;

    fn outcome(contender: &str, mean_s: f64, p99_s: f64) -> Outcome {
        let measures = Measures { mean_s, p99_s, ..Measures::default() };
        Outcome { scenario: Scenario::plain(Name::Quick, 4, 75), contender: contender.to_owned(), measures }
    }

    #[test]
    fn each_figure_is_compared_with_the_best_oracle_for_it() {
        let outcomes = [outcome("a", 3.0, 9.0), outcome("oracle_1", 1.0, 6.0), outcome("oracle_3", 2.0, 3.0)];
        let oracles = ["oracle_1".to_owned(), "oracle_3".to_owned()];
        let compared = compare(&outcomes, &oracles);
        assert_eq!((compared[0].mean, compared[0].p99), (Some(3.0), Some(3.0)));
        assert!(
            summary(&compared)
                .contains("| a | 3.000 / 3.000 | 3.000 / 3.000 | 3.000 (quick, 4 workers, 75 %) |")
        );
        assert_eq!(compare(&outcomes[..1], &oracles)[0].mean, None);
    }

    #[test]
    fn the_mean_of_ratios_is_geometric() {
        assert!(geometric_mean([2.0, 8.0].into_iter()).is_some_and(|mean| (mean - 4.0).abs() < 1e-12));
        assert_eq!(geometric_mean([].into_iter()), None);
    }
}
