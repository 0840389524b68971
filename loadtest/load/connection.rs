//! One connection, and one exchange on it.

use std::{
    cell::RefCell,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
    sync::Semaphore,
    time::sleep,
};

use crate::{
    answer::{Answer, Failure},
    clock::now_ns,
};

/// Bytes that are read at once. There is one such buffer for all connections.
const READ_BYTES: usize = 128 * 1024;

/// How many connections are opened at a time, and how long the listener is given to accept them: what its queue has no
/// room for is only tried again by the kernel after a second.
const OPENING: usize = 64;
const ACCEPTED_IN: Duration = Duration::from_millis(5);

static MAY_OPEN: Semaphore = Semaphore::const_new(OPENING);

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

/// A connection to what is measured.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    /// Whether it had an exchange before.
    used: bool,
}

/// What an exchange has come to so far.
#[derive(Debug)]
pub(crate) struct Exchange<'a> {
    request: &'a [u8],
    sent: usize,
    answer: Answer,
    /// After so many events the client leaves.
    leaves_after: u64,
    /// When the first event was there.
    pub(crate) first_event_ns: Option<u64>,
}

/// How an exchange ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Whole,
    /// The client left.
    Left,
}

impl<'a> Exchange<'a> {
    /// `streams`: whether the answer must be a stream; `leaves_after`: how many events of it the client awaits.
    pub(crate) fn new(request: &'a [u8], streams: bool, leaves_after: u64) -> Self {
        Self { request, sent: 0, answer: Answer::new(streams), leaves_after, first_event_ns: None }
    }

    pub(crate) fn sent(&self) -> usize {
        self.sent
    }

    pub(crate) fn received(&self) -> u64 {
        self.answer.received()
    }

    pub(crate) fn events(&self) -> u64 {
        self.answer.events()
    }
}

impl Connection {
    /// # Errors
    /// There is nobody, or no port left.
    pub(crate) async fn open(address: SocketAddr) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address).await.map_err(Failure::Connect)?;
        stream.set_nodelay(true).map_err(Failure::Connect)?;
        Ok(Self { stream, used: false })
    }

    /// The same where many are opened that are then kept: not all at once.
    pub(crate) async fn open_in_turn(address: SocketAddr) -> Result<Self, Failure> {
        let _turn = MAY_OPEN.acquire().await;
        let opened = Self::open(address).await?;
        sleep(ACCEPTED_IN).await;
        Ok(opened)
    }

    /// Whether a failure means no more than that the other side had closed a connection that was kept: then the request
    /// is sent once more, on a new one, as every client does.
    pub(crate) fn was_stale(&self, failure: &Failure, exchange: &Exchange<'_>) -> bool {
        let closed = matches!(failure, Failure::NoAnswer | Failure::Broken(_));
        self.used && closed && exchange.received() == 0
    }

    /// Sends the request and reads the answer; `seen` gets the delay of each event that says when it was written.
    ///
    /// # Errors
    /// There is no whole answer; then the connection must not be used any more.
    pub(crate) async fn exchange(
        &mut self,
        exchange: &mut Exchange<'_>,
        mut seen: impl FnMut(u64),
    ) -> Result<End, Failure> {
        let end = std::future::poll_fn(|cx| self.poll(cx, exchange, &mut seen)).await;
        self.used = true;
        end
    }

    /// Whether the connection can be used for another exchange after this one.
    pub(crate) fn keeps(&self, exchange: &Exchange<'_>) -> bool {
        exchange.answer.keeps()
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange<'_>,
        seen: &mut impl FnMut(u64),
    ) -> Poll<Result<End, Failure>> {
        while exchange.sent < exchange.request.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &exchange.request[exchange.sent..]) {
                Poll::Ready(Ok(bytes)) => exchange.sent += bytes,
                // what came instead of an answer says more
                Poll::Ready(Err(error)) if exchange.sent == 0 => {
                    return Poll::Ready(Err(Failure::Broken(error)));
                }
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        BUFFER.with_borrow_mut(|buffer| {
            loop {
                let mut read = ReadBuf::new(buffer);
                match Pin::new(&mut self.stream).poll_read(cx, &mut read) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::Broken(error))),
                    Poll::Ready(Ok(())) => {}
                }
                if read.filled().is_empty() {
                    return Poll::Ready(exchange.answer.closed().map(|()| End::Whole));
                }
                if let Some(end) = exchange.read(read.filled(), seen)? {
                    return Poll::Ready(Ok(end));
                }
            }
        })
    }

    /// Becomes ready when the other side closes a connection that is not in use.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut byte = [0];
        Pin::new(&mut self.stream).poll_read(cx, &mut ReadBuf::new(&mut byte)).map(|_| ())
    }

    /// Whether a connection that is not in use is still there.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Exchange<'_> {
    /// Reads what came at once; how the exchange ended, if it did.
    fn read(&mut self, bytes: &[u8], seen: &mut impl FnMut(u64)) -> Result<Option<End>, Failure> {
        let mut now = None;
        let over = self.answer.feed(bytes, |written_ns| {
            let now_ns = *now.get_or_insert_with(now_ns);
            if let Some(written_ns) = written_ns {
                seen(now_ns.saturating_sub(written_ns));
            }
        })?;
        if self.first_event_ns.is_none() {
            self.first_event_ns = now;
        }
        Ok(match over {
            true if self.sent < self.request.len() => return Err(Failure::Early),
            true => Some(End::Whole),
            false if self.events() >= self.leaves_after => Some(End::Left),
            false => None,
        })
    }
}
