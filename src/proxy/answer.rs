//! The head of a worker's answer.

use crate::{
    http::{DownstreamHead, MAX_RESPONSE_HEAD_BYTES, OutFraming, Version},
    net::{Buffer, Parting, ReadAhead},
    proxy::{
        client::{Outlet, grow},
        context::Context,
        retry::Failure,
    },
};

/// Interim answers (1xx) before the final one at most (`faults.md` §2.3).
const MAX_INTERIM: usize = 8;

/// What the answer to a request may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// It has no body, whatever its head says.
    pub(super) to_head: bool,
    /// It may be 101.
    pub(super) upgrade: bool,
    pub(super) version: Version,
}

/// Reads the head of the final answer into `outlet.answer`; what came behind it is returned. Interim answers
/// are passed on to clients that understand them.
pub(super) async fn receive(
    cx: &Context,
    outlet: &mut Outlet<'_>,
    reader: &mut ReadAhead,
    wanted: Wanted,
    reused: bool,
) -> Result<Buffer, Failure> {
    let mut interim = 0;
    outlet.answer.reset();
    let (mut result, mut buffer) = reader.read(|| cx.buffers.large()).await;
    loop {
        match result {
            Ok(count) if count > 0 => {}
            _ if buffer.is_empty() && interim == 0 => return Err(Failure::NoAnswer { reused }),
            _ => return Err(Failure::AnswerCut),
        }
        while !buffer.is_empty() {
            let parsed = outlet.answer.parse(buffer.filled(), wanted.to_head).map_err(Failure::BadAnswer)?;
            if let Some(count) = parsed {
                buffer.advance(count);
                match outlet.answer.status() {
                    101 if wanted.upgrade => return Ok(buffer),
                    101 => return Err(Failure::Unexpected("101 without an upgrade")),
                    100..=199 => {
                        interim += 1;
                        if interim > MAX_INTERIM {
                            return Err(Failure::Unexpected("too many interim answers"));
                        }
                        Box::pin(pass_interim(outlet, wanted.version)).await?;
                        outlet.answer.reset();
                        continue;
                    }
                    _ => return Ok(buffer),
                }
            }
            break;
        }
        if buffer.spare() == 0 {
            buffer = grow(buffer, MAX_RESPONSE_HEAD_BYTES + 1);
        }
        (result, buffer) = reader.read(|| buffer).await;
    }
}

/// Passes an interim answer on. Our own 100 has been sent when the body was read, and HTTP/1.0 knows none.
async fn pass_interim(outlet: &mut Outlet<'_>, version: Version) -> Result<(), Failure> {
    if outlet.answer.status() == 100 || version == Version::Http10 {
        return Ok(());
    }
    let mut head = std::mem::take(&mut outlet.scratch);
    head.clear();
    let downstream =
        DownstreamHead { version, framing: OutFraming::AsReceived, keep_alive: true, extra: &[] };
    outlet.answer.write_downstream(&mut head, &downstream);
    let sent = outlet.send(Buffer::from_slice(&head)).await;
    outlet.scratch = head;
    // the answer itself is still to come
    outlet.watch.set_parting(Parting::Unanswered);
    sent.map(drop).map_err(|_| Failure::ClientGone)
}
