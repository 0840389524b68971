//! What has come from the client.
//!
//! A read on the client is armed during the whole exchange: it waits for the next request, takes what is
//! pipelined, and notices at once when the client goes away. [`keep_reading`] is that reader; it and the
//! exchange are two futures of one task, so that they share an [`Inbox`] without wakers between them.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    task::Poll,
};

use crate::{
    net::{Buffer, ReadHalf, Watch},
    proxy::context::{Buffers, HEADROOM, SMALL_BYTES},
};

/// Bytes that a client may send ahead of the request that is being answered. Beyond it they wait in the
/// socket.
const AHEAD_BYTES: usize = 16 * 1024;

/// The client has closed its connection, or it broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// Who decides when is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The exchange does: it wants a request, or more of it, and says into which buffer.
    Demand,
    /// Nobody wants anything, but the end of the connection must be noticed.
    Watch,
}

/// Received bytes, in order.
pub(super) struct Inbox {
    queue: RefCell<VecDeque<Buffer>>,
    queued: Cell<usize>,
    mode: Cell<Mode>,
    /// In mode Demand: something is waited for, and where to put it.
    wanted: Cell<bool>,
    target: Cell<Option<Buffer>>,
    /// A target that was read into.
    returned: Cell<Option<Buffer>>,
    arrivals: Cell<u64>,
    received: Cell<u64>,
    ended: Cell<bool>,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            queue: RefCell::default(),
            queued: Cell::new(0),
            mode: Cell::new(Mode::Demand),
            wanted: Cell::new(false),
            target: Cell::new(None),
            returned: Cell::new(None),
            arrivals: Cell::new(0),
            received: Cell::new(0),
            ended: Cell::new(false),
        }
    }

    /// Changes with every arrival: whoever waits must look again.
    pub(super) fn arrivals(&self) -> u64 {
        self.arrivals.get()
    }

    /// Bytes received since the last call.
    pub(super) fn take_received(&self) -> u64 {
        self.received.replace(0)
    }

    /// The request has been read to its end: from now on only what comes unasked is taken.
    pub(super) fn watch(&self) {
        self.mode.set(Mode::Watch);
    }

    /// Whether the request has been read to its end.
    pub(super) fn request_read(&self) -> bool {
        self.mode.get() == Mode::Watch
    }

    /// Waits for the first bytes of something.
    ///
    /// # Cancellation
    /// Nothing is lost.
    pub(super) async fn next(&self) -> Result<Buffer, Gone> {
        self.mode.set(Mode::Demand);
        poll_fn(|_| {
            if let Some(buffer) = self.pop() {
                self.wanted.set(false);
                return Poll::Ready(Ok(buffer));
            }
            self.wanted.set(true);
            if self.ended.get() { Poll::Ready(Err(Gone)) } else { Poll::Pending }
        })
        .await
    }

    /// Waits for at least one byte more behind what `into` holds; `into` must have room.
    ///
    /// # Cancellation
    /// What `into` holds is lost: the connection must be closed.
    pub(super) async fn more(&self, mut into: Buffer) -> Result<Buffer, Gone> {
        debug_assert!(into.spare() > 0, "nothing can be read into a full buffer");
        if self.fill(&mut into) {
            return Ok(into);
        }
        self.mode.set(Mode::Demand);
        self.target.set(Some(into));
        poll_fn(|_| {
            if let Some(buffer) = self.returned.take() {
                return Poll::Ready(Ok(buffer));
            }
            if !self.queue.borrow().is_empty() {
                // it came by a read that was armed before the target was known
                if let Some(mut buffer) = self.target.take() {
                    self.fill(&mut buffer);
                    return Poll::Ready(Ok(buffer));
                }
            }
            if self.ended.get() { Poll::Ready(Err(Gone)) } else { Poll::Pending }
        })
        .await
    }

    /// Puts back what belongs to the next request.
    pub(super) fn put_back(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.queued.set(self.queued.get() + bytes.len());
            let mut buffer = Buffer::new(HEADROOM, bytes.len().max(SMALL_BYTES));
            buffer.append(bytes);
            self.queue.borrow_mut().push_front(buffer);
        }
    }

    /// Queues what came unasked; small pieces share a buffer, so that many of them take no more room than their
    /// bytes.
    fn push(&self, buffer: Buffer, buffers: &Buffers) {
        self.queued.set(self.queued.get() + buffer.len());
        let mut queue = self.queue.borrow_mut();
        match queue.back_mut() {
            Some(last) if last.spare() >= buffer.len() => {
                last.append(buffer.filled());
                buffers.recycle(buffer);
            }
            _ => queue.push_back(buffer),
        }
    }

    fn pop(&self) -> Option<Buffer> {
        let buffer = self.queue.borrow_mut().pop_front()?;
        self.queued.set(self.queued.get() - buffer.len());
        Some(buffer)
    }

    /// Moves queued bytes behind what `into` holds, as many as fit; false if there were none.
    fn fill(&self, into: &mut Buffer) -> bool {
        let mut queue = self.queue.borrow_mut();
        let mut moved = 0;
        while let Some(front) = queue.front_mut() {
            let count = front.len().min(into.spare());
            into.append(&front.filled()[..count]);
            moved += count;
            front.advance(count);
            if !front.is_empty() {
                break;
            }
            queue.pop_front();
        }
        self.queued.set(self.queued.get() - moved);
        moved > 0
    }

    fn arrived(&self, count: usize) {
        self.received.set(self.received.get() + count as u64);
        self.arrivals.set(self.arrivals.get() + 1);
    }
}

/// Reads from the client for as long as it is there.
///
/// # Cancellation
/// Bytes may be lost: the connection must be closed.
pub(super) async fn keep_reading(mut reader: ReadHalf, inbox: &Inbox, buffers: &Buffers, watch: &Watch) {
    loop {
        let ready = poll_fn(|_| match inbox.mode.get() {
            // what is queued comes before what would be read now
            Mode::Demand if !inbox.queue.borrow().is_empty() => Poll::Pending,
            Mode::Demand => match inbox.target.take() {
                Some(target) => Poll::Ready((target, true)),
                None if inbox.wanted.get() => Poll::Ready((buffers.small(), false)),
                None => Poll::Pending,
            },
            Mode::Watch if inbox.queued.get() < AHEAD_BYTES => Poll::Ready((buffers.small(), false)),
            Mode::Watch => Poll::Pending,
        });
        let (buffer, targeted) = reader.rest(watch, ready).await;
        let (result, buffer) = reader.read(buffer).await;
        match result {
            Ok(count) if count > 0 => {
                if targeted {
                    inbox.returned.set(Some(buffer));
                } else {
                    inbox.push(buffer, buffers);
                }
                inbox.arrived(count);
            }
            _ => {
                inbox.ended.set(true);
                inbox.arrived(0);
                return;
            }
        }
    }
}
