//! Looking at an answer before the client is told of it: as long as it says nothing it may be given up.
//!
//! What was looked at is passed on as it came, framing included. The ordinary answer is decided on by what came
//! with its head; [`Peek::hold`] is for the rest, and never holds more than [`Question::most_bytes`].

use crate::{
    http::{ChunkTracker, ResponseFraming, ResponseHead},
    net::{Buffer, ReadAhead, Watch},
    proxy::{
        context::{Context, HEADROOM, LARGE_BYTES},
        relay::{Plan, Step},
        retry::{Failure, Question, Refusing},
    },
    vllm::{self, Opening, Unbegun},
};

/// Bytes that are looked at before more are: a fast worker sends many events at once, of which the first ones decide.
const LOOK_BYTES: usize = 1024;

/// What the first bytes of an answer have come to.
#[derive(Debug)]
pub(crate) enum Seen {
    /// More has to be seen.
    NeedMore,
    /// It is passed on.
    Pass,
    /// It is worth giving up.
    Poor(Failure),
}

/// A look at one answer.
#[derive(Debug)]
pub(super) struct Peek {
    question: Question,
    refusing: Refusing,
    framing: ResponseFraming,
    tracker: ChunkTracker,
    /// The body so far, framing taken off.
    data: Vec<u8>,
}

impl Question {
    /// Bytes of an answer's body that are held at most.
    fn most_bytes(self) -> usize {
        match self {
            Self::Whole => 64 * 1024,
            Self::Begins | Self::Busy | Self::EngineDead | Self::ModelLost | Self::Nothing => 16 * 1024,
        }
    }

    /// What an answer is of which `body` has come so far, at its `end` all of it.
    pub(crate) fn look(self, body: &[u8], end: bool, refusing: Refusing) -> Seen {
        let poor = |is: bool, failure: Failure| if is { Seen::Poor(failure) } else { Seen::Pass };
        match self {
            Self::Begins => match vllm::opening_of_events(body, end) {
                Opening::NeedMore => Seen::NeedMore,
                Opening::Commit => Seen::Pass,
                Opening::Failed(why) => Seen::Poor(Failure::Unbegun(why)),
            },
            Self::Nothing => Seen::Poor(Failure::Status(refusing)),
            Self::Busy if refusing.status == 429 => Seen::Poor(Failure::Busy(refusing)),
            _ if !end => Seen::NeedMore,
            Self::Whole if body.is_empty() => Seen::Poor(Failure::Unbegun(Unbegun::Empty)),
            Self::Whole => poor(vllm::is_aborted(body), Failure::Aborted),
            Self::Busy => poor(vllm::is_busy(body), Failure::Busy(refusing)),
            Self::EngineDead => poor(vllm::is_engine_dead(body), Failure::EngineDead),
            Self::ModelLost => poor(vllm::is_unknown_model(body), Failure::ModelLost),
        }
    }
}

impl Peek {
    /// Begins to look at the answer with this head. `scratch` is given back by [`Peek::into_scratch`].
    pub(super) fn new(question: Question, answer: &ResponseHead, mut scratch: Vec<u8>) -> Self {
        scratch.clear();
        // an answer that is one is not searched for it
        let refuses = answer.status() >= 400;
        let retry_after_secs = if refuses { answer.field("retry-after").and_then(seconds) } else { None };
        Self {
            question,
            refusing: Refusing { status: answer.status(), retry_after_secs },
            framing: answer.framing(),
            tracker: ChunkTracker::new(),
            data: scratch,
        }
    }

    /// What has been allocated, for others to use.
    pub(super) fn into_scratch(self) -> Vec<u8> {
        self.data
    }

    /// Looks at the part of the body that came with the head.
    pub(super) fn first(&mut self, part: &[u8]) -> Seen {
        let about_body = matches!(self.question, Question::Begins | Question::Whole);
        if about_body && self.framing == ResponseFraming::None {
            return Seen::Pass;
        }
        // mostly all of it is there, and need not be copied
        if let ResponseFraming::Length(length) = self.framing
            && let Some(body) = usize::try_from(length).ok().and_then(|length| part.get(..length))
        {
            return self.question.look(body, true, self.refusing);
        }
        if self.is_too_large() { Seen::Pass } else { self.look(part) }
    }

    /// Looks at a further part of the body, no further than it takes.
    fn look(&mut self, part: &[u8]) -> Seen {
        // other questions take the whole of an answer
        let most = if self.question == Question::Begins { LOOK_BYTES } else { part.len().max(1) };
        let mut pieces = part.chunks(most);
        let first = self.look_at(pieces.next().unwrap_or_default());
        pieces.fold(first, |seen, piece| match seen {
            Seen::NeedMore => self.look_at(piece),
            seen => seen,
        })
    }

    fn look_at(&mut self, part: &[u8]) -> Seen {
        let from = self.data.len();
        self.data.extend_from_slice(part);
        let end = match self.framing {
            ResponseFraming::None => true,
            ResponseFraming::Length(length) => self.data.len() as u64 >= length,
            ResponseFraming::UntilClose => false,
            ResponseFraming::Chunked => {
                let fresh = self.data.get_mut(from..).unwrap_or_default();
                // who passes it on finds out what is wrong with it
                let Ok(decoded) = self.tracker.decode(fresh) else { return Seen::Pass };
                self.data.truncate(from + decoded.data);
                decoded.done
            }
        };
        match self.question.look(&self.data, end, self.refusing) {
            Seen::NeedMore if self.is_too_large() => Seen::Pass,
            seen => seen,
        }
    }

    /// Whether it will not be waited for.
    fn is_too_large(&self) -> bool {
        let most = self.question.most_bytes();
        let length = if let ResponseFraming::Length(length) = self.framing { length } else { 0 };
        // a stream of events may be long, it is only its beginning that is waited for
        self.data.len() >= most || self.question != Question::Begins && length > most as u64
    }

    /// Reads on until it is decided what becomes of the answer; what came so far stands in `buffer`, and all that
    /// came does afterwards, as the plan has it. A client that was promised comments
    /// (`--sse-keepalive-secs`) is not kept waiting in silence: then the answer is passed on, and the read goes on.
    ///
    /// # Errors
    /// The answer broke off or has stopped, its framing is broken, or the request's time is over.
    ///
    /// # Cancellation
    /// Bytes may be lost: the worker's connection must be closed.
    pub(super) async fn hold(
        &mut self,
        cx: &Context,
        watch: &Watch,
        reader: &mut ReadAhead,
        plan: &mut Plan,
        step: &mut Step,
        buffer: &mut Buffer,
    ) -> Result<Seen, Failure> {
        let events = self.question == Question::Begins;
        let keepalive_ms = if events { cx.settings.sse_keepalive_secs.saturating_mul(1000) } else { 0 };
        let idle_ms = cx.settings.stream_idle_timeout_secs.saturating_mul(1000);
        loop {
            reader.prepare(cx.buffers.large());
            let quiet = watch.deadline_in(keepalive_ms);
            // silence before the first byte of a body is a prompt that is computed
            let idle = watch.deadline_in(if buffer.is_empty() { 0 } else { idle_ms });
            let reading = reader.read(|| cx.buffers.large());
            let Ok((result, mut part)) = watch.stream_until(quiet.min(idle), reading).await else {
                return match watch.is_total_over() {
                    true => Err(Failure::TotalTime),
                    false if watch.is_over(idle) => Err(Failure::Stalled),
                    false => Ok(Seen::Pass),
                };
            };
            let seen = match result {
                Ok(count) if count > 0 => self.look(part.filled()),
                Ok(_) if self.framing == ResponseFraming::UntilClose => {
                    return Ok(match self.question.look(&self.data, true, self.refusing) {
                        Seen::NeedMore => Seen::Pass,
                        seen => seen,
                    });
                }
                _ => return Err(Failure::AnswerCut),
            };
            *step = plan.begin(&mut part).ok_or(Failure::AnswerBody)?;
            append(buffer, &part);
            cx.buffers.recycle(part);
            if !matches!(seen, Seen::NeedMore) {
                return Ok(seen);
            }
        }
    }
}

/// The seconds of a `Retry-After`; as a date it is not understood, and vLLM sends neither.
fn seconds(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.trim().parse().ok()
}

/// Appends `part`, in a larger block if there is no room.
fn append(buffer: &mut Buffer, part: &Buffer) {
    if buffer.spare() < part.len() {
        let mut larger = Buffer::new(HEADROOM, (buffer.len() + part.len()).max(2 * LARGE_BYTES));
        larger.append(buffer.filled());
        *buffer = larger;
    }
    buffer.append(part.filled());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_events_at_once_no_more_is_looked_at_than_decides() {
        let mut head = ResponseHead::default();
        head.parse(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", false).unwrap();
        let chunk = |event: &str| format!("{:x}\r\n{event}\r\n", event.len());
        let comment = chunk(": ping\n\n");
        let text = chunk("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n").repeat(200);
        for comments in [0, 1, 100, 300] {
            let part = comment.repeat(comments) + &text;
            let mut peek = Peek::new(Question::Begins, &head, Vec::new());
            assert!(matches!(peek.first(part.as_bytes()), Seen::Pass));
            let looked_at = peek.data.len();
            assert!(looked_at <= comment.len() * comments + LOOK_BYTES, "{comments}: {looked_at}");
        }
    }
}
