//! Where a stream of server-sent events stands: what its last bytes say, over any split of them.
//!
//! It looks at ends only, so that it costs next to nothing while a stream passes.

/// Bytes at the end of a stream that are kept: the longest end that is looked for.
const KEPT: usize = 16;

/// The last bytes of a stream of events that have passed.
#[derive(Debug, Clone, Copy, Default)]
pub struct EventTail {
    last: [u8; KEPT],
    /// Bytes passed, at most [`KEPT`].
    count: u8,
    /// An event that is an error has passed.
    erred: bool,
}

impl EventTail {
    /// The next bytes have passed. They may end anywhere; that an event is an error is noticed only where they begin
    /// with it, as vLLM's chunks do.
    #[inline]
    pub fn push(&mut self, data: &[u8]) {
        self.erred |= data.starts_with(b"data: {\"error\"") || data.starts_with(b"event: error\n");
        match data.last_chunk::<KEPT>() {
            Some(last) => (self.last, self.count) = (*last, KEPT as u8),
            None => self.push_short(data),
        }
    }

    /// Keeps less than [`KEPT`] bytes, and what is left of those before them.
    #[inline(never)]
    fn push_short(&mut self, data: &[u8]) {
        self.last.rotate_left(data.len());
        let from = KEPT - data.len();
        for (place, byte) in self.last.iter_mut().skip(from).zip(data) {
            *place = *byte;
        }
        self.count = (self.count + data.len() as u8).min(KEPT as u8);
    }

    /// Whether nothing has passed yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether an event of the stream itself said that it failed.
    pub fn is_erred(&self) -> bool {
        self.erred
    }

    /// Whether a new event may begin after the last byte: before the first one, and after an empty line.
    pub fn is_between_events(&self) -> bool {
        self.is_empty() || [&b"\n\n"[..], b"\n\r\n", b"\r\r"].iter().any(|end| self.last.ends_with(end))
    }

    /// Whether the last event was the one after which none comes: OpenAI's `[DONE]`, Anthropic's `message_stop`.
    pub fn is_done(&self) -> bool {
        [&b"data: [DONE]\n\n"[..], b"data: [DONE]\r\n\r\n", b"message_stop\"}\n\n"]
            .iter()
            .any(|end| self.last.ends_with(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &str, split: usize) -> EventTail {
        let mut tail = EventTail::default();
        text.as_bytes().chunks(split).for_each(|part| tail.push(part));
        tail
    }

    #[test]
    fn the_end_of_a_stream_is_known_however_it_is_split() {
        let anthropic = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
        for split in [1, 2, 3, 5, 7, 15, 16, 17, 100] {
            for done in
                ["data: {}\n\ndata: [DONE]\n\n", "data: [DONE]\n\n", "data: [DONE]\r\n\r\n", anthropic]
            {
                assert!(after(done, split).is_done() && after(done, split).is_between_events(), "{done}");
            }
            for between in ["", "data: x\n\n", ": comment\n\n", "data: x\r\n\r\n", "data: x\r\r", "\n\n"] {
                assert!(after(between, split).is_between_events(), "{between:?}");
                assert!(!after(between, split).is_done(), "{between:?}");
            }
            for within in ["d", "\n", "data: x", "data: x\n", "data: x\r\n", "data: [DONE]", "data: [DONE]\n"]
            {
                assert!(!after(within, split).is_between_events(), "{within:?}");
                assert!(!after(within, split).is_done(), "{within:?}");
            }
        }
    }

    #[test]
    fn an_event_that_is_an_error_is_noticed() {
        assert!(after("data: {\"error\": {\"message\": \"x\"}}\n\n", 100).is_erred());
        assert!(after("event: error\ndata: {}\n\n", 100).is_erred());
        assert!(!after("data: {\"id\": \"error\"}\n\n", 100).is_erred());
    }
}
