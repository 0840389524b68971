use std::{env, fmt::Write, fs, path::PathBuf};

use clap::{Arg, Command};
use vllm_proxy::{
    config::definition,
    routing::POLICIES,
    vllm::{ModelSource, Treatment, endpoints::TABLE},
};

/// Holds a file against what the code says; `UPDATE_GOLDEN=1` writes it instead.
fn agrees(path: &str, expected: impl FnOnce(&str) -> String) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    let found = fs::read_to_string(&path).unwrap_or_default();
    let expected = expected(&found);
    if env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        fs::write(&path, expected).expect("it can be written");
        return;
    }
    let differs = found.lines().zip(expected.lines()).position(|(found, expected)| found != expected);
    assert!(
        found == expected,
        "{} is not what the code says, from line {}; UPDATE_GOLDEN=1 cargo test readme writes it",
        path.display(),
        differs.map_or(found.lines().count().min(expected.lines().count()) + 1, |at| at + 1),
    );
}

/// The text with `content` between `<!-- name -->` and `<!-- /name -->`.
fn with_section(text: &str, name: &str, content: &str) -> String {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->\n"));
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("README has no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("README has no {end}"));
    format!("{before}{begin}{content}{end}{after}")
}

#[test]
fn readme_lists_every_flag() {
    agrees("README.md", |readme| with_section(readme, "flags", &flags(definition())));
}

#[test]
fn readme_lists_every_route() {
    agrees("README.md", |readme| with_section(readme, "routes", &routes()));
}

#[test]
fn readme_lists_every_policy() {
    agrees("README.md", |readme| with_section(readme, "policies", &policies()));
}

/// A table of the policies and of all names that they can be set by.
fn policies() -> String {
    let mut out = String::from("| policy | chooses | also accepted as |\n|---|---|---|\n");
    for row in POLICIES {
        let aliases: Vec<String> = row.aliases.iter().map(|alias| format!("`{alias}`")).collect();
        writeln!(out, "| `{}` | {} | {} |", row.name, row.summary, aliases.join(" "))
            .expect("a String takes it");
    }
    out
}

/// A table of what is done with vLLM's paths, from the table of endpoints.
fn routes() -> String {
    let mut out = String::from("| what the proxy does | routes |\n|---|---|\n");
    let mut known = 0;
    for (what, treated) in TREATMENTS {
        let rows = TABLE.iter().filter(|row| treated(row.treatment));
        let paths: Vec<String> = rows.map(|row| format!("`{}`", row.path)).collect();
        known += paths.len();
        writeln!(out, "| {what} | {} |", paths.join(" ")).expect("a String takes it");
    }
    assert_eq!(known, TABLE.len(), "a treatment stands in no row, or in two");
    out.push_str("| sends to a worker that has the model in the JSON body, or to any | everything else |\n");
    out
}

type Treated = fn(Treatment) -> bool;

#[rustfmt::skip]
const TREATMENTS: &[(&str, Treated)] = &[
    ("sends to a worker that has the model named in the JSON body", |t| t == Treatment::Route(ModelSource::Json)),
    ("sends to a worker that has the model named in the form, which may come after the file", |t| t == Treatment::Route(ModelSource::Multipart)),
    ("tunnels the WebSocket to a worker that has the model named by `?model=`", |t| t == Treatment::Route(ModelSource::Query)),
    ("sends to any worker", |t| t == Treatment::Route(ModelSource::None)),
    ("answers itself, from what it knows of all workers", |t| matches!(t, Treatment::Local(_))),
    ("answers with its own metrics", |t| t == Treatment::Admin),
    ("sends to every worker (of the model) and makes one answer of theirs", |t| matches!(t, Treatment::Broadcast(_))),
    ("finds the worker that holds the response", |t| t == Treatment::Sticky),
];

#[test]
fn help_is_as_written_down() {
    agrees("tests/golden/help.txt", |_| {
        let help = definition().term_width(100).render_long_help().to_string();
        help.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    });
}

/// A table of the command's own flags, in the order of `--help`.
fn flags(command: Command) -> String {
    let mut out = String::from("| flag | environment | default | meaning |\n|---|---|---|---|\n");
    for arg in command.get_arguments() {
        let variable = arg.get_env().map_or(String::new(), |name| format!("`{}`", name.display()));
        let (meaning, default) = meaning_and_default(arg);
        writeln!(out, "| {} | {variable} | {default} | {meaning} |", names(arg)).expect("a String takes it");
    }
    out
}

fn names(arg: &Arg) -> String {
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let aliases = arg.get_visible_aliases().unwrap_or_default();
    let names = short.into_iter().chain(long).chain(aliases.into_iter().map(|alias| format!("--{alias}")));
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Defaults that are no value stand in brackets at the end of the help.
fn meaning_and_default(arg: &Arg) -> (String, String) {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let help = help.replace('|', "\\|");
    let values = arg.get_default_values().iter().map(|value| format!("`{}`", value.display()));
    let values = values.collect::<Vec<_>>().join(" ");
    match help.split_once(" [default: ") {
        Some((meaning, default)) => (meaning.to_owned(), default.trim_end_matches(']').to_owned()),
        None if arg.get_action().takes_values() => (help, values),
        None => (help, String::new()),
    }
}
