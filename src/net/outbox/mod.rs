//! What a shard writes within one turn, given to the kernel at once.
//!
//! With epoll each write is a system call of its own, and a write wakes whoever reads it. Where that is on our core
//! the kernel likes to let it run at once, so that a shard with much to write is interrupted once per write. A ring
//! takes all writes of a turn in one call; here that is `io_submit` of Linux' older AIO, which containers may use
//! where they may not use io_uring. On a socket that does not block it writes what a plain write would, before
//! it returns. It knows no `MSG_NOSIGNAL`: that a peer is gone is an error and does not end the process only where SIGPIPE
//! is ignored, which Rust's start-up sees to.
//!
//! Without it (`fs.aio-max-nr` used up, a kernel without AIO or one whose AIO refuses sockets, as gVisor's) there is no
//! outbox and every write is a call of its own; so is it as long as there is no more than one in a turn.

#![expect(unsafe_code, reason = "AIO is system calls that libc has no functions for")]

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io::{self, Read},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    pin::pin,
    ptr::null_mut,
    rc::Rc,
    task::{Poll, Waker},
};

use crate::net::{Buffer, Driver, Ringer, bell, spawn};

/// Writes that are given to the kernel in one call at most.
const BATCH: usize = 64;

/// Turns with something to send whose writers are woken at once. monoio looks at its timers only when no task can go on,
/// which with many writers may never be: those of the next such turn are woken by the driver. Whether the shard has
/// slept in between is not known here, and not worth asking.
const TURNS_AT_ONCE: u32 = 16;

/// `struct iocb` (linux/aio_abi.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Order {
    /// Comes back with the result.
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    bytes: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

impl Order {
    /// A write whose result comes back with `data`.
    fn write(data: u64, fd: RawFd, bytes: *const u8, len: usize) -> Self {
        let (fd, bytes, len) = (fd.cast_unsigned(), bytes as u64, len as u64);
        Self { data, opcode: WRITE, fd, bytes, len, ..Self::default() }
    }
}

/// `IOCB_CMD_PWRITE`; of a socket there is no offset.
const WRITE: u16 = 1;

/// `struct io_event`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    data: u64,
    order: u64,
    /// Bytes written, or an error's negative number.
    result: i64,
    second: i64,
}

/// Of a write whose result the kernel did not tell.
const NO_RESULT: i64 = -(libc::EIO as i64);

/// One write.
#[derive(Debug)]
enum Letter {
    /// None; its place is free.
    Free,
    /// To be sent at the end of the turn.
    Posted { fd: RawFd, bytes: *const u8, len: usize, waker: Waker },
    /// Nobody waits for it any more, and it must not be sent.
    Withdrawn,
    /// What the kernel said: bytes written, or an error's negative number.
    Sent(i64),
}

impl Letter {
    fn replace(&mut self, with: Self) -> Self {
        std::mem::replace(self, with)
    }
}

/// The writes of one shard that wait for the end of the turn.
#[derive(Debug)]
pub(super) struct Outbox {
    /// The kernel's name for what is given to it.
    aio: libc::c_ulong,
    /// Whether AIO or the bell has failed: nothing is given to AIO any more, nor posted, and nobody sleeps.
    broken: Cell<bool>,
    /// As many as there ever were writes at a time: one per connection at most.
    letters: RefCell<Vec<Letter>>,
    /// Of the letters, those whose place is free.
    free: RefCell<Vec<usize>>,
    /// Of the letters, those to be sent, in order.
    posted: RefCell<Vec<usize>>,
    /// Writes in this turn, and in the one before.
    writes: Cell<u32>,
    before: Cell<u32>,
    /// Wakes who calls [`Outbox::flush`].
    flusher: RefCell<Option<Waker>>,
    /// Turns whose writers were woken at once, since the driver woke those of one.
    turns: Cell<u32>,
    /// Writers that are woken by the driver, and what makes it do so.
    sleepers: RefCell<Vec<Waker>>,
    ringer: Ringer,
}

thread_local! {
    /// That of the shard on this thread.
    static OUTBOX: RefCell<Option<Rc<Outbox>>> = const { RefCell::new(None) };
}

/// The outbox of this shard; `None` where writes are not collected.
pub(super) fn current() -> Option<Rc<Outbox>> {
    OUTBOX.with_borrow(Clone::clone)
}

/// Runs `main` with an outbox, if there can be one. It is emptied with every poll of `main`, which monoio makes when no
/// task can go on.
///
/// # Cancellation
/// As `main`.
pub(super) async fn emptied<T>(main: impl Future<Output = T>) -> T {
    let outbox = Outbox::begin()
        .inspect_err(|error| tracing::debug!(%error, "there is no AIO: every write is a call of its own"))
        .ok();
    OUTBOX.set(outbox.clone());
    let mut main = pin!(main);
    let ended = poll_fn(|context| {
        let polled = main.as_mut().poll(context);
        if let Some(outbox) = &outbox {
            outbox.flush(context.waker());
        }
        polled
    })
    .await;
    OUTBOX.set(None);
    if let Some(outbox) = outbox {
        outbox.close();
    }
    ended
}

impl Outbox {
    fn begin() -> io::Result<Rc<Self>> {
        let (ringer, bell) = bell()?;
        let mut aio: libc::c_ulong = 0;
        // SAFETY: the kernel writes the number of the context into `aio`.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, BATCH, &raw mut aio) };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        let outbox = Rc::new(Self {
            aio,
            broken: Cell::new(false),
            letters: RefCell::default(),
            free: RefCell::default(),
            posted: RefCell::default(),
            writes: Cell::new(0),
            before: Cell::new(0),
            flusher: RefCell::default(),
            turns: Cell::new(0),
            sleepers: RefCell::default(),
            ringer,
        });
        outbox.try_out()?;
        let weak = Rc::downgrade(&outbox);
        spawn(async move {
            let wake = || {
                if let Some(outbox) = weak.upgrade() {
                    outbox.wake_sleepers();
                }
            };
            if let Err(error) = bell.listen(Driver::Epoll, wake).await
                && let Some(outbox) = weak.upgrade()
            {
                tracing::error!(%error, "the bell of an outbox is broken: every write is a call of its own from now on");
                outbox.end();
                outbox.wake_sleepers();
            }
        });
        Ok(outbox)
    }

    /// Sees that what is given to the kernel arrives: there are some that take what is for a socket and refuse it then.
    fn try_out(&self) -> io::Result<()> {
        static BYTE: [u8; 1] = [1];
        let (outer, mut inner) = UnixStream::pair()?;
        outer.set_nonblocking(true)?;
        inner.set_nonblocking(true)?;
        if self.submit(&mut [Order::write(0, outer.as_raw_fd(), BYTE.as_ptr(), BYTE.len())]) == 0 {
            return Err(io::Error::last_os_error());
        }
        let mut results = [Done::default()];
        let result = self.results(&mut results).first().map_or(NO_RESULT, |done| done.result);
        let mut read = [0];
        if written(result)? == BYTE.len() && inner.read(&mut read)? == BYTE.len() && read == BYTE {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    /// Writes what the kernel takes of `buffer`, at the end of this turn if there are other writes in it; `WouldBlock` if
    /// it takes nothing. The socket must be one that does not block.
    ///
    /// # Cancellation
    /// Before the turn ends nothing is written; once it has ended some bytes may have been.
    pub(super) async fn write(&self, fd: RawFd, buffer: Buffer) -> (io::Result<usize>, Buffer) {
        if self.writes.get() == 0
            && let Some(flusher) = &*self.flusher.borrow()
        {
            flusher.wake_by_ref();
        }
        self.writes.set(self.writes.get() + 1);
        let (result, buffer) = if self.before.get() <= 1 || self.broken.get() {
            let bytes = buffer.filled();
            (write_alone(fd, bytes.as_ptr(), bytes.len()), buffer)
        } else {
            let mut posted = Posted { outbox: self, letter: None, buffer };
            let result = poll_fn(|context| posted.poll(fd, context.waker())).await;
            (result, std::mem::replace(&mut posted.buffer, Buffer::new(0, 0)))
        };
        (written(result), buffer)
    }

    /// Ends a turn: sends what was posted in it, and sees that those are woken who wait for that.
    fn flush(&self, waker: &Waker) {
        let mut flusher = self.flusher.borrow_mut();
        if flusher.as_ref().is_none_or(|known| !known.will_wake(waker)) {
            *flusher = Some(waker.clone());
        }
        drop(flusher);
        self.before.set(self.writes.replace(0));
        let posted = &mut *self.posted.borrow_mut();
        if posted.is_empty() {
            return;
        }
        let turns = self.turns.get() + 1;
        let later = turns > TURNS_AT_ONCE && !self.broken.get();
        self.turns.set(if later { 0 } else { turns });
        for batch in posted.chunks(BATCH) {
            self.send(
                batch,
                |waker| if later { self.sleepers.borrow_mut().push(waker) } else { waker.wake() },
            );
        }
        posted.clear();
        if later {
            self.ringer.ring();
        }
    }

    fn wake_sleepers(&self) {
        self.sleepers.borrow_mut().drain(..).for_each(Waker::wake);
    }

    fn send(&self, batch: &[usize], wake: impl Fn(Waker)) {
        let mut orders = [Order::default(); BATCH];
        let mut count = 0;
        for &letter in batch {
            if let Letter::Posted { fd, bytes, len, .. } = self.letters.borrow()[letter] {
                orders[count] = Order::write(letter as u64, fd, bytes, len);
                count += 1;
            } else {
                self.put_away(letter);
            }
        }
        self.give(&mut orders[..count], wake);
    }

    /// Gives the kernel all of `orders`, and those who wait for them what came of it.
    fn give(&self, orders: &mut [Order], wake: impl Fn(Waker)) {
        let mut at = 0;
        while let Some(&first) = orders.get(at) {
            let rest = &mut orders[at..];
            // alone it is cheaper without AIO, which also tells why one is refused
            let taken = if rest.len() == 1 { 0 } else { self.submit(rest) };
            if taken == 0 {
                let result =
                    write_alone(first.fd.cast_signed(), first.bytes as *const u8, first.len as usize);
                self.tell(first.data, result, &wake);
            } else {
                let mut results = [Done::default(); BATCH];
                for done in self.results(&mut results[..taken]) {
                    self.tell(done.data, done.result, &wake);
                }
                if self.broken.get() {
                    // of those who were told nothing yet
                    orders[at..at + taken].iter().for_each(|order| self.tell(order.data, NO_RESULT, &wake));
                }
            }
            at += taken.max(1);
        }
    }

    /// Tells who posted `letter` what came of it, once. What AIO refused is written without it.
    fn tell(&self, letter: u64, result: i64, wake: impl Fn(Waker)) {
        let mut letters = self.letters.borrow_mut();
        let letter = &mut letters[letter as usize];
        let Letter::Posted { fd, bytes, len, .. } = *letter else { return };
        let result = if is_refusal(result) { write_alone(fd, bytes, len) } else { result };
        let told = letter.replace(Letter::Sent(result));
        drop(letters);
        if let Letter::Posted { waker, .. } = told {
            wake(waker);
        }
    }

    /// Lets go of those who wait: what they are woken by keeps them, and they keep the outbox. One that is dropped with
    /// that may take its letter back, so nothing is borrowed then.
    fn close(&self) {
        self.posted.borrow_mut().clear();
        let sleepers = self.sleepers.take();
        drop(sleepers);
        let count = self.letters.borrow().len();
        for at in 0..count {
            let mut letters = self.letters.borrow_mut();
            if matches!(letters[at], Letter::Posted { .. }) {
                let letter = letters[at].replace(Letter::Sent(NO_RESULT));
                drop(letters);
                drop(letter);
            }
        }
    }

    /// Puts a letter where it is sent from, and tells where that is.
    fn post(&self, letter: Letter) -> usize {
        let mut letters = self.letters.borrow_mut();
        let at = self.free.borrow_mut().pop().unwrap_or_else(|| {
            letters.push(Letter::Free);
            letters.len() - 1
        });
        letters[at] = letter;
        self.posted.borrow_mut().push(at);
        at
    }

    fn put_away(&self, at: usize) {
        self.letters.borrow_mut()[at] = Letter::Free;
        self.free.borrow_mut().push(at);
    }

    /// Gives `orders` to the kernel; how many it took, from the front.
    fn submit(&self, orders: &mut [Order]) -> usize {
        if self.broken.get() {
            return 0;
        }
        let mut list = [null_mut::<Order>(); BATCH];
        for (entry, order) in list.iter_mut().zip(&mut *orders) {
            *entry = order;
        }
        // SAFETY: the list has as many entries as said, each points to an order, and the bytes of each order are kept by
        // who posted it until it is told the result, or it withdraws the letter before. Who is told has a result of the
        // kernel's, which is then done with the bytes, or the context is gone (`end`).
        let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.aio, orders.len(), list.as_mut_ptr()) };
        usize::try_from(taken).unwrap_or(0)
    }

    /// The results of what was taken; they are there already. Fewer only if AIO fails with them, which ends it: results
    /// that nobody has read would be taken for those of later writes.
    fn results<'a>(&self, done: &'a mut [Done]) -> &'a [Done] {
        let mut count = 0;
        while let rest @ [_, ..] = &mut done[count..] {
            let (room, none) = (rest.len(), null_mut::<libc::timespec>());
            // SAFETY: there is room for as many results as said; no time limit is given.
            let got = unsafe {
                libc::syscall(libc::SYS_io_getevents, self.aio, room, room, rest.as_mut_ptr(), none)
            };
            match usize::try_from(got) {
                Ok(got @ 1..) => count += got,
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    let error = io::Error::last_os_error();
                    tracing::error!(%error, "AIO is broken: every write is a call of its own from now on");
                    self.end();
                    break;
                }
            }
        }
        &done[..count]
    }

    /// Has no AIO from now on.
    fn end(&self) {
        if !self.broken.replace(true) {
            // SAFETY: the context is ours, and not used again. The call waits for what is under way in it.
            unsafe { libc::syscall(libc::SYS_io_destroy, self.aio) };
        }
    }
}

/// What became of a write, of its result.
fn written(result: i64) -> io::Result<usize> {
    let error = |_| io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO));
    usize::try_from(result).map_err(error)
}

/// Whether a result says that AIO does not write to such a thing: nothing was written then.
fn is_refusal(result: i64) -> bool {
    [libc::ESPIPE, libc::EINVAL, libc::EOPNOTSUPP, libc::ENOSYS]
        .iter()
        .any(|&error| result == -i64::from(error))
}

/// Writes without AIO; bytes written, or an error's negative number.
fn write_alone(fd: RawFd, bytes: *const u8, len: usize) -> i64 {
    // SAFETY: who posted the bytes keeps them until it is told the result.
    let sent = unsafe { libc::send(fd, bytes.cast(), len, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    match sent {
        0.. => sent as i64,
        _ => -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.end();
    }
}

/// A write that is waited for.
struct Posted<'a> {
    outbox: &'a Outbox,
    letter: Option<usize>,
    /// What is written: it stays where it is until the letter is sent or withdrawn.
    buffer: Buffer,
}

impl Posted<'_> {
    fn poll(&mut self, fd: RawFd, waker: &Waker) -> Poll<i64> {
        let Some(at) = self.letter else {
            let bytes = self.buffer.filled();
            let (bytes, len) = (bytes.as_ptr(), bytes.len());
            self.letter = Some(self.outbox.post(Letter::Posted { fd, bytes, len, waker: waker.clone() }));
            return Poll::Pending;
        };
        let result = match &mut self.outbox.letters.borrow_mut()[at] {
            Letter::Sent(result) => *result,
            Letter::Posted { waker: known, .. } => {
                known.clone_from(waker);
                return Poll::Pending;
            }
            Letter::Free | Letter::Withdrawn => {
                unreachable!("a letter is its poster's until it is taken back")
            }
        };
        self.letter = None;
        self.outbox.put_away(at);
        Poll::Ready(result)
    }
}

impl Drop for Posted<'_> {
    fn drop(&mut self) {
        let Some(at) = self.letter else { return };
        let letter = self.outbox.letters.borrow_mut()[at].replace(Letter::Withdrawn);
        if !matches!(letter, Letter::Posted { .. }) {
            self.outbox.put_away(at);
        }
    }
}

#[cfg(test)]
mod tests;
