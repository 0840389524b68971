//! What is learnt from an answer while it passes: when its first token came, how many tokens it took, and what a
//! response is called that may be asked for later. It reads
//! along and changes nothing. A line that is torn apart by two reads is missed: the next event tells as much.

use memchr::memmem;

use crate::{
    http::ResponseHead,
    proxy::{account::Account, storing::Storing},
    vllm::{Usage, usage_of_events, usage_of_tail},
    workers::InFlight,
};

/// Events of `/v1/responses` that vLLM sends before it computes anything
/// (`vllm/entrypoints/openai/responses/serving.py`).
const OPENINGS: [&[u8]; 2] = [b"event: response.created", b"event: response.in_progress"];

/// Listens to one answer.
pub(super) struct Listener<'a> {
    /// Until the first token has come.
    waiting: Option<&'a mut InFlight>,
    events: bool,
    /// Who wants to know the usage.
    account: Option<&'a Account<'a>>,
    usage: Usage,
    /// Until the response's id has come, where somebody may ask for it later.
    storing: Option<Box<Storing<'a>>>,
}

impl<'a> Listener<'a> {
    /// Listens to the answer with this head, a stream of `events` or not. If not, its first token has come with the
    /// head: vLLM writes that when all is done.
    pub(super) fn of(
        head: &ResponseHead,
        events: bool,
        in_flight: &'a mut InFlight,
        account: Option<&'a Account<'a>>,
        storing: Option<Box<Storing<'a>>>,
    ) -> Self {
        let mut waiting = Some(in_flight);
        if !events && let Some(in_flight) = waiting.take() {
            in_flight.first_token();
        }
        let account = account.filter(|_| head.status() == 200);
        Self { waiting, events, account, usage: Usage::default(), storing }
    }

    /// A part of the body, framing included, is about to be passed on; `last`: nothing follows it.
    pub(super) fn part(&mut self, bytes: &[u8], last: bool) {
        if self.waiting.is_some()
            && has_token(bytes)
            && let Some(in_flight) = self.waiting.take()
        {
            in_flight.first_token();
        }
        self.storing = self.storing.take().and_then(|storing| storing.part(bytes));
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

/// Whether a stream of events has begun to tell what was computed: an event has data, and is none of [`OPENINGS`].
fn has_token(bytes: &[u8]) -> bool {
    memmem::find_iter(bytes, b"data:").any(|at| {
        let before = bytes.get(..at).unwrap_or_default();
        // within the data of an event there are no lines
        let is_field = before.last().is_none_or(|&byte| byte == b'\n');
        let before = before.trim_ascii_end();
        is_field && !OPENINGS.iter().any(|opening| before.ends_with(opening))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_is_the_first_token_unless_nothing_was_computed_for_it() {
        let opening = |name: &str| {
            format!("2e\r\nevent: response.{name}\ndata: {{\"instructions\":\"see data: x\"}}\n\n\r\n")
        };
        let (created, started) = (opening("created"), opening("in_progress"));
        for nothing in
            ["", ": ping\n\n", "event: response.created\n", &created, &started, &(created.clone() + &started)]
        {
            assert!(!has_token(nothing.as_bytes()), "{nothing}");
        }
        let item = opening("output_item.added");
        for token in [
            "data: {}\n\n",
            "7\r\ndata: {}\n\n",
            "event: message_start\ndata: {}\n\n",
            &item,
            &(started + &item),
        ] {
            assert!(has_token(token.as_bytes()), "{token}");
        }
    }
}
