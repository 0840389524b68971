//! A response that its worker may be asked for later: what it is called, and that it is there.

use crate::{
    http::{ChunkTracker, ResponseHead},
    vllm::{ResponseId, Sought},
    workers::{StoredResponses, Worker},
};

/// Waits for the id in one answer.
pub(super) struct Storing<'a> {
    id: ResponseId,
    /// Of a body in chunks.
    chunks: Option<ChunkTracker>,
    stored: &'a StoredResponses,
    worker: &'a Worker,
}

impl<'a> Storing<'a> {
    /// For an answer of `worker` with this head, a stream of `events` or not, which comes in chunks or not. `None`: it
    /// is no response, or cannot be read.
    pub(super) fn of(
        head: &ResponseHead,
        events: bool,
        chunked: bool,
        stored: &'a StoredResponses,
        worker: &'a Worker,
    ) -> Option<Box<Self>> {
        if head.status() != 200 || head.field("content-encoding").is_some() {
            return None;
        }
        let chunks = chunked.then(ChunkTracker::default);
        // in a box, so that other answers carry no more than a pointer along
        Some(Box::new(Self { id: ResponseId::new(events), chunks, stored, worker }))
    }

    /// A part of the body, framing included, is about to be passed on. Remembers the worker as soon as the client can
    /// know the id; `None` from then on, or if there is no id.
    pub(super) fn part(mut self: Box<Self>, bytes: &[u8]) -> Option<Box<Self>> {
        let Self { id, chunks, .. } = &mut *self;
        let mut sought = Sought::NeedMore;
        match chunks {
            Some(chunks) => {
                let tracked = chunks.track_data(bytes, |data| {
                    if sought == Sought::NeedMore {
                        sought = id.push(data);
                    }
                });
                // the relay has found the coding to be right
                tracked.ok()?;
            }
            None => sought = id.push(bytes),
        }
        match sought {
            Sought::NeedMore => Some(self),
            Sought::Nothing => None,
            Sought::Id(id) => {
                self.stored.made(StoredResponses::hash(&id), self.worker);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker() -> Worker {
        Worker::new(3, "http://a:1".parse().unwrap())
    }

    fn head(fields: &str) -> ResponseHead {
        let mut head = ResponseHead::default();
        let bytes = format!("HTTP/1.1 {fields}\r\ncontent-length: 9\r\n\r\n");
        head.parse(bytes.as_bytes(), false).unwrap();
        head
    }

    /// Who is remembered for `resp_1`, after how many parts.
    fn remembered(
        head: &ResponseHead,
        events: bool,
        chunked: bool,
        parts: &[&str],
    ) -> (Option<usize>, usize) {
        let (stored, worker) = (StoredResponses::default(), worker());
        let mut storing = Storing::of(head, events, chunked, &stored, &worker);
        let mut count = 0;
        for part in parts {
            let Some(waiting) = storing else { break };
            assert_eq!(stored.get(StoredResponses::hash("resp_1")), None, "before {part}");
            storing = waiting.part(part.as_bytes());
            count += 1;
        }
        (stored.get(StoredResponses::hash("resp_1")), count)
    }

    const PLAIN: &str = r#"{"id":"resp_1","output":[{"id":"msg_1"}]}"#;
    const EVENT: &str = "event: response.created\ndata: {\"response\":{\"id\":\"resp_1\"}}\n\n";

    /// `text` in two chunks, parted at any place.
    fn in_chunks(text: &str, at: usize) -> String {
        let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
        let (before, after) = text.split_at(at);
        format!("{}{}0\r\n\r\n", chunk(before), chunk(after))
    }

    #[test]
    fn the_id_is_found_in_every_framing_and_the_worker_remembered_at_once() {
        let head = head("200 OK");
        for (events, text) in [(false, PLAIN), (true, EVENT)] {
            assert_eq!(remembered(&head, events, false, &[text, "more"]), (Some(3), 1));
            for at in 1..text.len() {
                let chunked = in_chunks(text, at);
                assert_eq!(remembered(&head, events, true, &[&chunked]), (Some(3), 1), "{chunked}");
                let (before, after) = chunked.split_at(at);
                assert_eq!(remembered(&head, events, true, &[before, after]).0, Some(3), "{chunked} at {at}");
            }
        }
    }

    #[test]
    fn what_is_no_response_or_cannot_be_read_names_nobody() {
        for no in ["201 Created", "404 Not Found", "200 OK\r\ncontent-encoding: gzip"] {
            assert_eq!(remembered(&head(no), false, false, &[PLAIN]), (None, 0), "{no}");
        }
        let head = head("200 OK");
        assert_eq!(
            remembered(&head, false, false, &["{\"x\":1}", PLAIN]),
            (None, 1),
            "it has ended without one"
        );
        assert_eq!(remembered(&head, false, true, &["zz", PLAIN]), (None, 1), "no coding");
    }
}
