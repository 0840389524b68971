//! The three forms of a record: bracket text, JSON, YAML.
//!
//! What clients and workers sent may stand in a value, so nothing in a message or value can end a line, begin
//! a record, move a terminal's cursor or turn its writing round: all control characters are escaped.

use std::fmt::Write;

use tracing::Level;

use crate::base::Date;

use super::{
    record::{Record, Value},
    settings::Format,
};

/// Names that a record itself uses; a field of such a name is given a `_` at its end.
const RESERVED: [&str; 7] = ["time", "level", "message", "target", "thread", "file", "line"];

/// Words that YAML 1.1 takes for something else than a text.
const YAML_WORDS: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];

/// The record with its line end; `colours` matter to [`Format::Txt`] only.
pub(super) fn format(record: &Record<'_>, format: Format, colours: bool) -> Vec<u8> {
    let mut out = String::with_capacity(256);
    match format {
        Format::Txt => txt(&mut out, record, colours),
        Format::Json => json(&mut out, record),
        Format::Yml => yml(&mut out, record),
    }
    out.into_bytes()
}

fn txt(out: &mut String, record: &Record<'_>, colours: bool) {
    timestamp(out, record.unix_ms);
    match colour(record.level).filter(|_| colours) {
        Some(code) => put(out, format_args!(" \x1b[{code}m[{}]\x1b[0m ", record.level)),
        None => put(out, format_args!(" [{}] ", record.level)),
    }
    escaped(out, &record.fields.message, false);
    let mut separator = if record.fields.message.is_empty() { "[" } else { ": [" };
    for (name, value) in pairs(record) {
        out.push_str(separator);
        put(out, format_args!("{name}="));
        scalar(out, value);
        separator = " ";
    }
    out.push_str(if separator == " " { "]\n" } else { "\n" });
}

fn json(out: &mut String, record: &Record<'_>) {
    out.push_str("{\"time\":\"");
    timestamp(out, record.unix_ms);
    put(out, format_args!("\",\"level\":\"{}\",\"message\":", record.level));
    quoted(out, &record.fields.message);
    for (name, value) in pairs(record) {
        out.push(',');
        quoted(out, &name);
        out.push(':');
        scalar(out, value);
    }
    out.push_str("}\n");
}

fn yml(out: &mut String, record: &Record<'_>) {
    out.push_str("---\ntime: \"");
    timestamp(out, record.unix_ms);
    put(out, format_args!("\"\nlevel: {}\nmessage: ", record.level));
    quoted(out, &record.fields.message);
    for (name, value) in pairs(record) {
        out.push('\n');
        if plain(&name) {
            out.push_str(&name)
        } else {
            quoted(out, &name)
        }
        out.push_str(": ");
        scalar(out, value);
    }
    out.push('\n');
}

/// Fields and origin, by the names under which they are written.
fn pairs<'a>(record: &'a Record<'_>) -> impl Iterator<Item = (String, &'a Value)> {
    let fields = record.fields.list.iter().map(|(name, value)| {
        let suffix = if RESERVED.contains(name) { "_" } else { "" };
        (format!("{name}{suffix}"), value)
    });
    fields.chain(record.origin.iter().map(|(name, value)| ((*name).to_owned(), value)))
}

/// Whether a name needs no quotes in YAML.
fn plain(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
        && !YAML_WORDS.iter().any(|word| word.eq_ignore_ascii_case(name))
}

/// A value, in a spelling that JSON and YAML read alike.
fn scalar(out: &mut String, value: &Value) {
    match value {
        Value::Bool(value) => put(out, format_args!("{value}")),
        Value::Signed(value) => put(out, format_args!("{value}")),
        Value::Unsigned(value) => put(out, format_args!("{value}")),
        // Display never writes an exponent, which YAML 1.1 would take for a text.
        Value::Float(value) if value.is_finite() => put(out, format_args!("{value}")),
        Value::Float(value) => put(out, format_args!("\"{value}\"")),
        Value::Text(text) => quoted(out, text),
    }
}

fn quoted(out: &mut String, text: &str) {
    out.push('"');
    escaped(out, text, true);
    out.push('"');
}

/// The text with JSON's escapes, which double-quoted YAML shares.
fn escaped(out: &mut String, text: &str, quotes: bool) {
    for c in text.chars() {
        match c {
            '"' if quotes => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if deceives(c) => put(out, format_args!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
}

/// Controls, further line ends, and what changes the direction of writing; all of them below U+10000.
fn deceives(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The number of the ANSI colour in which a terminal shows a level.
fn colour(level: Level) -> Option<u8> {
    match level {
        Level::ERROR => Some(31),
        Level::WARN => Some(33),
        Level::INFO => Some(32),
        _ => None,
    }
}

/// RFC 3339 in UTC with milliseconds.
fn timestamp(out: &mut String, unix_ms: u64) {
    put(out, format_args!("{}", Date::from_unix_millis(unix_ms).rfc3339()));
}

/// Appends what is formatted.
fn put(out: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = out.write_fmt(what);
}
