//! What is learnt from an answer while it passes: when its first token came, and how many tokens it took. It reads
//! along and changes nothing.

use memchr::memmem;

use crate::{
    http::ResponseHead,
    proxy::account::Account,
    vllm::{Usage, usage_of_events, usage_of_tail},
    workers::InFlight,
};

/// Listens to one answer.
pub(super) struct Listener<'a> {
    /// Until the first token has come.
    waiting: Option<&'a mut InFlight>,
    events: bool,
    /// Who wants to know the usage.
    account: Option<&'a Account<'a>>,
    usage: Usage,
}

impl<'a> Listener<'a> {
    /// Listens to the answer with this head. Without a stream of events its first token has come with the head:
    /// vLLM writes that when all is done.
    pub(super) fn of(
        head: &ResponseHead,
        in_flight: &'a mut InFlight,
        account: Option<&'a Account<'a>>,
    ) -> Self {
        let events = head.is_event_stream();
        let mut waiting = Some(in_flight);
        if !events && let Some(in_flight) = waiting.take() {
            in_flight.first_token();
        }
        let account = account.filter(|_| head.status() == 200);
        Self { waiting, events, account, usage: Usage::default() }
    }

    /// A part of the body, framing included, is about to be passed on; `last`: nothing follows it.
    pub(super) fn part(&mut self, bytes: &[u8], last: bool) {
        if self.waiting.is_some()
            && memmem::find(bytes, b"data:").is_some()
            && let Some(in_flight) = self.waiting.take()
        {
            in_flight.first_token();
        }
        let Some(account) = self.account else { return };
        let found = match self.events {
            true => usage_of_events(bytes),
            false if last => usage_of_tail(bytes),
            false => None,
        };
        if let Some(usage) = found {
            // of several in one stream only some tell what was cached
            self.usage = Usage { cached_tokens: usage.cached_tokens.or(self.usage.cached_tokens), ..usage };
            account.used(self.usage);
        }
    }
}
