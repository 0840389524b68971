//! Values as an operator may see them, and `--print-config`.

use std::fmt::Write;

use clap::{ArgMatches, parser::ValueSource};

use super::Config;

/// Stands for a secret.
pub(super) const MASK: &str = "***";

/// Settings that are secrets.
const SECRETS: [&str; 1] = ["worker_api_key"];

/// A line per setting: name, value (`-`: none), origin.
pub(super) fn table(config: &Config, command: &clap::Command, matches: &ArgMatches) -> String {
    let mut out = String::new();
    for arg in command.get_arguments() {
        let (id, Some(flag)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
        let Some((value, source)) = effective(config, id, matches) else { continue };
        let origin = match (source, arg.get_env()) {
            (Some(ValueSource::CommandLine), _) => "flag".to_owned(),
            (Some(ValueSource::EnvVariable), Some(name)) => format!("environment, {}", name.display()),
            _ => "default".to_owned(),
        };
        // Writing to a String cannot fail.
        let value = if value.is_empty() { "-".to_owned() } else { shown(id, &value) };
        let _ = writeln!(out, "{flag:<28} {value:<40} {origin}");
    }
    out
}

/// What a setting has come to, and from where; `None` for what is no setting of its own.
fn effective(config: &Config, id: &str, matches: &ArgMatches) -> Option<(String, Option<ValueSource>)> {
    let source = matches.value_source(id);
    match id {
        "print_config" | "verbose" | "quiet" => None,
        "verbosity" if config.log.verbose > 0 || config.log.quiet > 0 => {
            Some((config.log.effective().to_string(), Some(ValueSource::CommandLine)))
        }
        "verbosity" => Some((config.log.effective().to_string(), source)),
        "worker_urls" => {
            let urls: Vec<_> = config.worker_urls.iter().map(ToString::to_string).collect();
            Some((urls.join(","), source))
        }
        _ => {
            let raw = matches.get_raw(id).into_iter().flatten();
            let raw: Vec<_> = raw.map(|value| value.to_string_lossy().into_owned()).collect();
            Some((raw.join(","), source))
        }
    }
}

/// A value on one line, without secrets.
pub(super) fn shown(id: &str, value: &str) -> String {
    if SECRETS.contains(&id) {
        return MASK.to_owned();
    }
    if id == "redis" {
        return escaped(&redis(value));
    }
    match (value.find("://"), value.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 < at => {
            escaped(&format!("{}{MASK}{}", &value[..scheme + 3], &value[at..]))
        }
        _ => escaped(value),
    }
}

/// An address of a Redis without whatever may be a secret, however wrong it is written.
fn redis(value: &str) -> String {
    let (scheme, rest) = match value.find("://") {
        Some(at) => value.split_at(at + 3),
        None if value.contains(['@', '?', ':']) => return MASK.to_owned(),
        None => return value.to_owned(),
    };
    let (place, parameters) = match rest.rsplit_once('@') {
        // in the path of a socket it is a letter as any other, and in its parameters part of a secret
        Some((_, place)) if !scheme.contains("unix") => (format!("{MASK}@{place}"), None),
        _ => match rest.split_once('?') {
            Some((place, parameters)) => (place.to_owned(), Some(parameters)),
            None => (rest.to_owned(), None),
        },
    };
    let database = |text: &str| {
        text.strip_prefix("db=").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    // a password whose host was forgotten stands where a port would
    let authority = place.split(['/', '#']).next().unwrap_or_default();
    let port = authority.rsplit_once(':').map_or("", |(_, port)| port);
    if !port.bytes().all(|byte| byte.is_ascii_digit()) && !authority.ends_with(']') {
        return format!("{scheme}{MASK}");
    }
    match parameters {
        Some(parameters) if database(parameters) => format!("{scheme}{place}?{parameters}"),
        Some(_) => format!("{scheme}{place}?{MASK}"),
        None => format!("{scheme}{place}"),
    }
}

/// The text on one line.
pub(super) fn escaped(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_address_of_a_redis_shows_a_secret() {
        for (value, shown) in [
            ("local", "local"),
            ("nonsense", "nonsense"),
            ("redis://host:6379/1", "redis://host:6379/1"),
            ("redis://[::1]/1", "redis://[::1]/1"),
            ("unix:///run/a@b.sock?db=1", "unix:///run/a@b.sock?db=1"),
            ("redis://user:secret@host/1", "redis://***@host/1"),
            ("redis://user:sec@ret?x/y#@host/1", "redis://***@host/1"),
            ("redis://:secret", "redis://***"),
            ("redis://user:se7cret/1", "redis://***"),
            ("user:secret@host", "***"),
            ("redis:/user:secret", "***"),
            ("unix:///run/a.sock?db=1&pass=sec@ret", "unix:///run/a.sock?***"),
            ("redis://host?secret", "redis://host?***"),
        ] {
            assert_eq!(super::shown("redis", value), shown, "{value}");
        }
    }
}
