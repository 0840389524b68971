//! Takes events from `tracing`, makes a record of each and queues it.

use std::{fmt, io::Write, thread};

use tracing::{
    Event, Level, Metadata, Subscriber,
    span::{Attributes, Id, Record as Changed},
};
use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use super::{
    format,
    record::{Detail, Fields, Record, Value},
    settings::{Format, Settings, Verbosity},
};
use crate::base;

/// Writes every event that reaches it; which do, the level filter above it decides.
pub(super) struct RecordLayer {
    format: Format,
    colours: bool,
    /// For records below an error; an error always tells everything.
    detail: Detail,
    queue: NonBlocking,
}

impl RecordLayer {
    /// Writes to `queue`; `terminal` says whether a human reads at its other end.
    pub(super) fn new(settings: &Settings, terminal: bool, queue: NonBlocking) -> Self {
        let detail = match settings.effective() {
            _ if !terminal => Detail::All,
            Verbosity::Loud => Detail::All,
            Verbosity::Verbose => Detail::Some,
            _ => Detail::Plain,
        };
        let format = settings.log_format.unwrap_or(if terminal { Format::Txt } else { Format::Json });
        Self { format, colours: terminal && !settings.no_color, detail, queue }
    }
}

impl fmt::Debug for RecordLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordLayer")
            .field("format", &self.format)
            .field("detail", &self.detail)
            .finish_non_exhaustive()
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for RecordLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, changed: &Changed<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            changed.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut fields = Fields { message: std::mem::take(&mut own.message), ..Fields::default() };
        for span in context.event_scope(event).into_iter().flat_map(|spans| spans.from_root()) {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.overlay(outer);
            }
        }
        fields.overlay(&own);
        let metadata = event.metadata();
        let detail = if *metadata.level() == Level::ERROR { Detail::All } else { self.detail };
        let record = Record {
            unix_ms: base::unix_millis(),
            level: *metadata.level(),
            fields: &fields,
            origin: &origin(metadata, detail),
        };
        let line = format::format(&record, self.format, self.colours);
        // The queue takes it or counts it as dropped; there is no error.
        drop(self.queue.clone().write(&line));
    }
}

fn origin(metadata: &Metadata<'static>, detail: Detail) -> Vec<(&'static str, Value)> {
    let mut origin = Vec::new();
    if detail >= Detail::Some {
        origin.push(("target", Value::Text(metadata.target().to_owned())));
    }
    if detail >= Detail::All {
        let thread = thread::current();
        origin.push(("thread", Value::Text(thread.name().unwrap_or("unnamed").to_owned())));
        if let Some(file) = metadata.file() {
            origin.push(("file", Value::Text(file.to_owned())));
        }
        if let Some(line) = metadata.line() {
            origin.push(("line", Value::Unsigned(line.into())));
        }
    }
    origin
}
