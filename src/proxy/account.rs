//! What is counted of an exchange, however it ends.

use std::cell::Cell;

use crate::{proxy::context::Context, vllm::Usage};

/// The status of an exchange whose client went away before it had one (nginx's).
const CLIENT_GONE: u16 = 499;

/// Counts an exchange from its beginning to its drop; there is no other place that does.
pub(super) struct Account<'a> {
    cx: &'a Context,
    endpoint: usize,
    began_micros: u64,
    ttfb_micros: Cell<Option<u64>>,
    status: Cell<u16>,
    complete: Cell<bool>,
    usage: Cell<Option<Usage>>,
}

impl<'a> Account<'a> {
    /// An exchange with the endpoint at this position of the table begins.
    pub(super) fn begin(cx: &'a Context, endpoint: usize) -> Self {
        cx.metrics().began();
        Self {
            cx,
            endpoint,
            began_micros: cx.clock.exact().micros(),
            ttfb_micros: Cell::new(None),
            status: Cell::new(CLIENT_GONE),
            complete: Cell::new(false),
            usage: Cell::new(None),
        }
    }

    /// The answer's first byte is there.
    pub(super) fn answered(&self, status: u16) {
        if self.ttfb_micros.get().is_none() {
            let now = self.cx.clock.exact().micros();
            self.ttfb_micros.set(Some(now.saturating_sub(self.began_micros)));
        }
        self.status.set(status);
    }

    /// The answer says how many tokens it took; the last word counts.
    pub(super) fn used(&self, usage: Usage) {
        self.usage.set(Some(usage));
    }

    /// What the answer says of its tokens.
    pub(super) fn usage(&self) -> Option<Usage> {
        self.usage.get()
    }

    /// What the client was answered; 499 as long as it was not.
    pub(super) fn status(&self) -> u16 {
        if self.complete.get() { self.status.get() } else { CLIENT_GONE }
    }

    /// The answer has been sent to its end.
    pub(super) fn complete(&self) {
        self.complete.set(true);
    }

    /// The answer broke off after it had begun, which is counted as this status.
    pub(super) fn broken(&self, status: u16) {
        self.status.set(status);
        self.complete.set(true);
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        let status = self.status();
        let metrics = self.cx.metrics();
        metrics.request_ended(self.endpoint, status, self.ttfb_micros.get());
        metrics.ended();
    }
}
