//! Plots as SVG, written by hand: lines of TTFT over load, and bars of ratios; both with logarithmic axes.

use std::fmt::Write as _;

use crate::{
    report::{Compared, distinct, geometric_mean},
    scenario::MAIN,
};

/// Colours that stay apart for most eyes (Okabe and Ito 2008), then darker ones.
const COLOURS: [&str; 11] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d00", "#7f3c8d", "#5b5b5b",
    "#a01a1a", "#117733",
];
const ORACLE_COLOUR: &str = "#000000";
const ORACLE: &str = "best oracle";
const PANEL_WIDTH: f64 = 300.0;
const PANEL_HEIGHT: f64 = 240.0;
const MARGIN: f64 = 56.0;
const LINE_HEIGHT: f64 = 18.0;
const COLUMNS: usize = 3;

/// A line of a panel.
struct Series {
    name: String,
    /// Load in percent, and seconds.
    points: Vec<(f64, f64)>,
}

/// Mean time to the first token over load: a panel per workload and number of workers.
pub(crate) fn curves(results: &[Compared<'_>], oracles: &[String]) -> String {
    let main: Vec<_> = results.iter().filter(|result| result.outcome.scenario.group == MAIN).collect();
    let panels = distinct(
        main.iter().map(|result| (result.outcome.scenario.workload, result.outcome.scenario.workers)),
    );
    let names = legend_names(&main, oracles);
    let rows = panels.len().div_ceil(COLUMNS);
    let width = COLUMNS as f64 * (PANEL_WIDTH + MARGIN) + MARGIN / 2.0;
    let panels_height = rows as f64 * (PANEL_HEIGHT + MARGIN + 20.0);
    let legend_rows = names.len().div_ceil(4) as f64;
    let mut svg = open(width, panels_height + legend_rows * LINE_HEIGHT + 20.0);
    for (at, (workload, workers)) in panels.iter().enumerate() {
        let x = MARGIN + (at % COLUMNS) as f64 * (PANEL_WIDTH + MARGIN);
        let y = 30.0 + (at / COLUMNS) as f64 * (PANEL_HEIGHT + MARGIN + 20.0);
        let mine: Vec<_> = main
            .iter()
            .copied()
            .filter(|r| (r.outcome.scenario.workload, r.outcome.scenario.workers) == (*workload, *workers))
            .collect();
        let title = format!("{}, {workers} workers: mean TTFT, s", workload.text());
        panel(&mut svg, (x, y), &title, &series(&mine, &names, oracles), &names);
    }
    for (at, name) in names.iter().enumerate() {
        let x = MARGIN + (at % 4) as f64 * (width - MARGIN) / 4.0;
        let y = panels_height + 10.0 + (at / 4) as f64 * LINE_HEIGHT;
        let colour = colour(&names, name);
        let _ = writeln!(
            svg,
            r#"<line x1="{x}" y1="{y}" x2="{}" y2="{y}" stroke="{colour}" stroke-width="2"{}/>"#,
            x + 24.0,
            dashes(name)
        );
        label(&mut svg, x + 30.0, y + 4.0, "start", name);
    }
    svg + "</svg>\n"
}

/// Everybody but the single oracles, of which only the best is drawn.
fn legend_names(results: &[&Compared<'_>], oracles: &[String]) -> Vec<String> {
    let all = results.iter().map(|result| result.outcome.contender.clone());
    let mut names = distinct(all.filter(|name| !oracles.contains(name)));
    names.push(ORACLE.to_owned());
    names
}

fn series(results: &[&Compared<'_>], names: &[String], oracles: &[String]) -> Vec<Series> {
    let loads = distinct(results.iter().map(|result| result.outcome.scenario.load));
    let at = |name: &String, load: u32| {
        let named = |contender: &String| contender == name || (name == ORACLE && oracles.contains(contender));
        let chosen =
            results.iter().filter(|r| r.outcome.scenario.load == load && named(&r.outcome.contender));
        chosen.map(|result| result.outcome.measures.mean_s).reduce(f64::min)
    };
    let points =
        |name: &String| loads.iter().filter_map(|load| Some((f64::from(*load), at(name, *load)?))).collect();
    names.iter().map(|name| Series { name: name.clone(), points: points(name) }).collect()
}

fn panel(svg: &mut String, (x, y): (f64, f64), title: &str, series: &[Series], names: &[String]) {
    let points = || series.iter().flat_map(|line| &line.points);
    let (left, right) = limits(points().map(|point| point.0));
    let (low, high) = limits(points().map(|point| point.1.max(1e-3).log10()));
    let (low, high) = (low.floor(), high.ceil().max(low.floor() + 1.0));
    let across = |load: f64| x + 12.0 + (load - left) / (right - left).max(1.0) * (PANEL_WIDTH - 24.0);
    let up = |seconds: f64| y + PANEL_HEIGHT * (high - seconds.max(1e-3).log10()) / (high - low);
    label(svg, x, y - 10.0, "start", title);
    for power in low as i32..=high as i32 {
        let seconds = 10f64.powi(power);
        let line = up(seconds);
        let _ = writeln!(
            svg,
            r##"<line x1="{x}" y1="{line:.1}" x2="{}" y2="{line:.1}" stroke="#dddddd"/>"##,
            x + PANEL_WIDTH
        );
        label(svg, x - 6.0, line + 4.0, "end", &seconds.to_string());
    }
    for load in distinct(points().map(|point| point.0)) {
        label(svg, across(load), y + PANEL_HEIGHT + 16.0, "middle", &format!("{load} %"));
    }
    for line in series.iter().filter(|line| !line.points.is_empty()) {
        let path: Vec<String> =
            line.points.iter().map(|point| format!("{:.1},{:.1}", across(point.0), up(point.1))).collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{}" stroke-width="2"{}/>"#,
            path.join(" "),
            colour(names, &line.name),
            dashes(&line.name)
        );
    }
}

/// Geometric mean over the matrix of the ratio to the best oracle: a bar per policy and load.
pub(crate) fn bars(results: &[Compared<'_>]) -> String {
    let main: Vec<_> = results.iter().filter(|result| result.outcome.scenario.group == MAIN).collect();
    let loads = distinct(main.iter().map(|result| result.outcome.scenario.load));
    let names = distinct(main.iter().map(|result| &result.outcome.contender));
    let ratio = |name: &String, load: u32| {
        let chosen = main.iter().filter(|r| (&r.outcome.contender, r.outcome.scenario.load) == (name, load));
        geometric_mean(chosen.filter_map(|result| result.mean))
    };
    let most = names.iter().flat_map(|name| loads.iter().filter_map(move |load| ratio(name, *load)));
    let decades = most.fold(1.0, f64::max).log10().ceil().max(1.0);
    let (left, full) = (170.0, 560.0);
    let group = loads.len() as f64 * 12.0 + 10.0;
    let height = 50.0 + names.len() as f64 * group;
    let mut svg = open(left + full + 90.0, height + 10.0);
    label(
        &mut svg,
        10.0,
        20.0,
        "start",
        "mean TTFT relative to the best oracle (geometric mean of all scenarios)",
    );
    for (at, load) in loads.iter().enumerate() {
        label(&mut svg, left + full - 120.0 + at as f64 * 60.0, 38.0, "start", &format!("{load} %"));
        let colour = COLOURS[at % COLOURS.len()];
        let x = left + full - 134.0 + at as f64 * 60.0;
        let _ = writeln!(svg, r#"<rect x="{x}" y="28" width="10" height="10" fill="{colour}"/>"#);
    }
    for (at, name) in names.iter().enumerate() {
        let y = 50.0 + at as f64 * group;
        label(&mut svg, left - 8.0, y + group / 2.0, "end", name);
        for (nth, load) in loads.iter().enumerate() {
            let Some(ratio) = ratio(name, *load) else { continue };
            let width = (ratio.log10() / decades * full).max(1.0);
            let (y, colour) = (y + nth as f64 * 12.0, COLOURS[nth % COLOURS.len()]);
            let _ =
                writeln!(svg, r#"<rect x="{left}" y="{y}" width="{width:.1}" height="10" fill="{colour}"/>"#);
            label(&mut svg, left + width + 4.0, y + 9.0, "start", &format!("{ratio:.2}"));
        }
    }
    svg + "</svg>\n"
}

fn limits(figures: impl Iterator<Item = f64>) -> (f64, f64) {
    figures
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), figure| (low.min(figure), high.max(figure)))
}

fn colour(names: &[String], name: &str) -> &'static str {
    match names.iter().position(|other| other == name) {
        Some(at) if name != ORACLE => COLOURS[at % COLOURS.len()],
        _ => ORACLE_COLOUR,
    }
}

fn dashes(name: &str) -> &'static str {
    if name == ORACLE { r#" stroke-dasharray="5 4""# } else { "" }
}

fn open(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    )
}

fn label(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#);
}
