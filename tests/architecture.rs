use std::{
    fs,
    path::{Path, PathBuf},
};

/// Each module of the crate and what of the crate it may name. `config` may also name every module's
/// `Settings` (and what their fields are made of); `app`, the composition root, may name everything.
#[rustfmt::skip]
const MAY_NAME: &[(&str, &[&str])] = &[
    ("base",        &[]),
    ("telemetry",   &["base"]),
    ("http",        &["base", "telemetry"]),
    ("vllm",        &["base", "telemetry", "http"]),
    ("workers",     &["base", "telemetry"]),
    ("routing",     &["base", "telemetry", "workers", "vllm"]),
    ("net",         &["base", "telemetry"]),
    ("upstream",    &["base", "telemetry", "net", "http", "workers"]),
    ("admission",   &["base", "telemetry", "workers"]),
    ("proxy",       &["base", "telemetry", "admission", "net", "http", "vllm", "workers", "routing", "upstream"]),
    ("shard",       &["base", "telemetry", "proxy", "net", "workers"]),
    ("control",     &["base", "telemetry", "workers", "vllm", "routing"]),
    ("admin",       &["base", "telemetry", "workers", "vllm", "http", "control"]),
    ("sync",        &["base", "telemetry", "admission", "workers", "routing"]),
    ("healthcheck", &["base", "workers"]),
    ("config",      &["base", "telemetry", "workers", "healthcheck", SETTINGS]),
    ("demo",        &["base", "telemetry", "workers", "http", "vllm"]),
    ("app",         &[EVERYTHING]),
    // a test of what decides, in whatever module it stands
    ("simulation",  &[EVERYTHING]),
];

/// `crate::<any module>::Settings`, or `crate::<any module>` alone in a `use`.
const SETTINGS: &str = "every module's Settings";
const EVERYTHING: &str = "everything";

/// Who may name the runtime of the shards.
const MONOIO: &[&str] = &["net", "shard"];

/// The sources, by module of the crate, without comments, and without the tests below them.
fn sources() -> Vec<(String, PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![src.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let relative = path.strip_prefix(&src).expect("below src").to_owned();
            let module =
                relative.components().next().expect("a name").as_os_str().to_string_lossy().into_owned();
            let module = module.trim_end_matches(".rs").to_owned();
            match path.extension() {
                None => folders.push(path),
                Some(_) if path.ends_with("tests.rs") || module == "lib" || module == "main" => {}
                Some(_) => {
                    let code = code(&fs::read_to_string(&path).expect("text"));
                    found.push((module, relative, code));
                }
            }
        }
    }
    found
}

fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// What follows `crate::` wherever it stands, one path per member of `crate::{…}`.
fn named(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let members = match rest.strip_prefix('{') {
            Some(list) => top_level(list),
            None => vec![rest],
        };
        let path = |text: &str| {
            let end = text.find(|c: char| !(c.is_alphanumeric() || "_:".contains(c)));
            text[..end.unwrap_or(text.len())].to_owned()
        };
        paths.extend(members.into_iter().map(|member| path(member.trim_start())));
    }
    paths.retain(|path| !path.is_empty());
    paths
}

/// The members of a list up to its closing brace; what is nested stays with its head.
fn top_level(list: &str) -> Vec<&str> {
    let (mut depth, mut from, mut members) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                members.push(&list[from..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                members.push(&list[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    members
}

/// Whether a module whose row says `allowed` may name this path.
fn may_name(allowed: &[&str], path: &str) -> bool {
    let mut parts = path.split("::");
    let (module, rest) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let settings = allowed.contains(&SETTINGS) && (rest == "Settings" || rest.is_empty());
    settings || allowed.contains(&EVERYTHING) || allowed.contains(&module)
}

#[test]
fn modules_name_only_whom_they_may() {
    let sources = sources();
    assert!(sources.len() > 10, "the sources were found");
    for (module, path, code) in sources {
        let row = MAY_NAME.iter().find(|(name, _)| *name == module);
        let (_, allowed) = row.unwrap_or_else(|| panic!("{}: a module without a row", path.display()));
        for named in named(&code) {
            let own = named.split("::").next() == Some(module.as_str());
            assert!(own || may_name(allowed, &named), "{} may not name crate::{named}", path.display());
        }
    }
}

#[test]
fn only_net_and_shard_name_monoio() {
    for (module, path, code) in sources() {
        let free = MONOIO.contains(&module.as_str());
        assert!(free || !code.contains("monoio"), "{} may not name monoio", path.display());
    }
}

#[test]
fn the_rules_can_be_broken() {
    assert_eq!(named("use crate::{a::{B, C}, d::E};\ncrate::f::g()"), ["a::", "d::E", "f::g"]);
    assert!(!may_name(&["net"], "proxy::Exchange") && may_name(&["net"], "net::Driver"));
    assert!(may_name(&[SETTINGS], "proxy::Settings") && !may_name(&[SETTINGS], "proxy::Exchange"));
    assert_eq!(code("a // crate::proxy\nb\n#[cfg(test)]\nmod tests {\ncrate::proxy"), "a \nb");
    let row = |name| MAY_NAME.iter().find(|(module, _)| *module == name).expect("a row").1;
    assert!(!row("proxy").contains(&"control") && !row("control").contains(&"proxy"));
}
