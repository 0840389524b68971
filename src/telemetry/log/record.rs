//! A record: what an event says, before it is given a form.

use std::{error::Error, fmt, fmt::Write};

use tracing::{
    Level,
    field::{Field, Visit},
};

/// Bytes of one value or message; what is longer is cut and says so. A client's bytes may reach a log, and
/// the queue's memory is the number of its records times their size.
const MAX_VALUE_BYTES: usize = 4096;

/// One value. Numbers and truth values stay what they are in JSON and YAML.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Signed(i128),
    /// A whole number.
    Unsigned(u128),
    /// Any other number.
    Float(f64),
    /// Everything else.
    Text(String),
}

/// Fields by name, in the order of their first mention; a name is there once and its last value counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Fields {
    /// What the event says; empty if it says nothing but its fields.
    pub(super) message: String,
    /// All other fields.
    pub(super) list: Vec<(&'static str, Value)>,
}

impl Fields {
    /// Takes over what another one, of an inner span or of the event, says.
    pub(super) fn overlay(&mut self, inner: &Self) {
        for (name, value) in &inner.list {
            self.set(name, value.clone());
        }
    }

    fn set(&mut self, name: &'static str, value: Value) {
        let name = name.strip_prefix("r#").unwrap_or(name);
        match self.list.iter_mut().find(|(known, _)| *known == name) {
            Some(field) => field.1 = value,
            None => self.list.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), Value::Bool(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), Value::Signed(value.into()));
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.set(field.name(), Value::Signed(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), Value::Unsigned(value.into()));
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.set(field.name(), Value::Unsigned(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field.name(), Value::Float(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.record_debug(field, &format_args!("{}", Chain(value)));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = Bounded::default();
        // It fails only where the text is cut.
        let _ = write!(text, "{value:?}");
        if field.name() == "message" {
            self.message = text.text;
        } else {
            self.set(field.name(), Value::Text(text.text));
        }
    }
}

/// An error and what caused it, and so on.
struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// A text of at most [`MAX_VALUE_BYTES`] and the mark of a cut.
#[derive(Default)]
struct Bounded {
    text: String,
    cut: bool,
}

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.cut {
            return Err(fmt::Error);
        }
        let mut room = MAX_VALUE_BYTES - self.text.len();
        if text.len() <= room {
            self.text.push_str(text);
            return Ok(());
        }
        while !text.is_char_boundary(room) {
            room -= 1;
        }
        self.text.push_str(&text[..room]);
        self.text.push('…');
        self.cut = true;
        Err(fmt::Error)
    }
}

/// How much a record tells of where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Detail {
    /// Nothing.
    Plain,
    /// The module.
    Some,
    /// Module, thread, source file and line.
    All,
}

/// One event, ready to be written.
#[derive(Debug)]
pub(super) struct Record<'a> {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub(super) unix_ms: u64,
    pub(super) level: Level,
    pub(super) fields: &'a Fields,
    /// Where it comes from: names and values, as much as is shown of it.
    pub(super) origin: &'a [(&'static str, Value)],
}
