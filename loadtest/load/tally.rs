//! What was measured, and how it is told.

use serde_json::{Value, json};

use crate::histogram::Histogram;

/// Sums of all measured requests.
#[derive(Debug)]
pub(crate) struct Tally {
    /// Requests that were answered whole, and those that the client left.
    pub(crate) whole: u64,
    pub(crate) aborted: u64,
    pub(crate) failed: u64,
    pub(crate) first_failure: Option<String>,
    /// Heads and bodies.
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) events: u64,
    /// From when a request was due to its answer's end; to the first event; from an event's writing to its arrival.
    pub(crate) latency: Histogram,
    pub(crate) first_event: Histogram,
    pub(crate) event_delay: Histogram,
    /// In an open loop, from when a request was due to when a connection had it: what the generator itself or too few
    /// connections add.
    pub(crate) sent_late: Histogram,
    /// When the last one ended.
    pub(crate) last_ns: u64,
}

/// What a report says about the load itself.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) workload: &'static str,
    pub(crate) connections: usize,
    pub(crate) rate: Option<f64>,
    /// When the first measured request could be due.
    pub(crate) begin_ns: u64,
    /// Connections that were held to the end.
    pub(crate) idle: usize,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            whole: 0,
            aborted: 0,
            failed: 0,
            first_failure: None,
            bytes_sent: 0,
            bytes_received: 0,
            events: 0,
            latency: Histogram::new(),
            first_event: Histogram::new(),
            event_delay: Histogram::new(),
            sent_late: Histogram::new(),
            last_ns: 0,
        }
    }

    /// So many requests failed for this reason.
    pub(crate) fn fail(&mut self, count: u64, reason: impl FnOnce() -> String) {
        if count > 0 {
            self.failed += count;
            self.first_failure.get_or_insert_with(reason);
        }
    }

    /// Requests that ended, whichever way.
    pub(crate) fn ended(&self) -> u64 {
        self.whole + self.aborted + self.failed
    }

    /// The report. The rate is that of requests which were answered whole or left on purpose.
    pub(crate) fn report(&self, load: &Load) -> Value {
        let seconds = self.last_ns.saturating_sub(load.begin_ns) as f64 / 1e9;
        let done = (self.whole + self.aborted) as f64;
        let rate = if seconds > 0.0 { done / seconds } else { 0.0 };
        let some = |histogram: &Histogram| (!histogram.is_empty()).then(|| histogram.report_us());
        json!({
            "workload": load.workload,
            "connections": load.connections,
            "offered_rate": load.rate,
            "seconds": (seconds * 1e6).round() / 1e6,
            "requests": self.whole,
            "rate": (rate * 10.0).round() / 10.0,
            "failed": self.failed,
            "first_failure": self.first_failure,
            "aborted": self.aborted,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "latency_us": self.latency.report_us(),
            "first_event_us": some(&self.first_event),
            "event_delay_us": some(&self.event_delay),
            "events": self.events,
            "idle": load.idle,
            "sent_late_us": some(&self.sent_late),
        })
    }
}
