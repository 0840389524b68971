//! TCP connections in two halves, and the few calls for which neither std nor monoio has a name.

#![expect(unsafe_code, reason = "shutdown, poll and reset of a socket are calls of libc")]

use std::{
    fmt,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Waker},
    time::Duration,
};

use monoio::{
    io::{AsyncReadRent, AsyncWriteRent, OwnedReadHalf, OwnedWriteHalf, Splitable},
    net::{TcpListener, TcpStream},
};

use crate::net::{
    Buffer, Driver, Elapsed, Settings, Watch,
    outbox::{self, Outbox},
};

/// Connections that the kernel completes before we accept them. Capped by `net.core.somaxconn`.
pub(super) const BACKLOG: i32 = 4096;

/// Probes without an answer after which a silent connection is given up (where no time of
/// `--tcp-user-timeout-secs` says so earlier), and how often they come: this part of `--tcp-keepalive-secs`.
const KEEPALIVE_PROBES: u32 = 3;

/// How often a write that does not get on is looked at within its limit.
const LOOKS: u64 = 4;

/// The half of a connection that is read.
#[derive(Debug)]
pub struct ReadHalf {
    half: OwnedReadHalf<TcpStream>,
    fd: RawFd,
}

/// The half of a connection that is written. When it is dropped the peer is sent a FIN, even while a read on
/// the other half is still with the kernel.
#[derive(Debug)]
pub struct WriteHalf {
    half: OwnedWriteHalf<TcpStream>,
    fd: RawFd,
    /// Where writes of one turn are collected, with epoll.
    outbox: Option<Rc<Outbox>>,
}

impl ReadHalf {
    /// Reads at least one byte behind what `buffer` holds; 0 is the end of the stream, or a full buffer.
    ///
    /// # Cancellation
    /// Bytes that have arrived may be lost: the connection must be dropped with the future.
    pub async fn read(&mut self, buffer: Buffer) -> (io::Result<usize>, Buffer) {
        self.half.read(buffer).await
    }
}

impl ReadHalf {
    /// Waits until `ready` has a buffer to read into; meanwhile `watch` looks whether the peer is still there,
    /// which otherwise a read would tell.
    ///
    /// # Cancellation
    /// As `ready`.
    pub async fn rest<T>(&self, watch: &Watch, ready: impl Future<Output = T>) -> T {
        let mut ready = pin!(ready);
        poll_fn(|context| {
            let polled = ready.as_mut().poll(context);
            watch.reading(if polled.is_pending() { Some(self.fd) } else { None });
            polled
        })
        .await
    }
}

/// Whether the peer has closed its side, or the connection broke, whatever is still to be read before that.
pub(super) fn has_hung_up(fd: RawFd) -> bool {
    let mut asked = libc::pollfd { fd, events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one entry is given; a descriptor that is closed already is no error.
    let found = unsafe { libc::poll(&raw mut asked, 1, 0) };
    found > 0 && asked.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// A read that owns its half until it is done.
type Armed = Pin<Box<dyn Future<Output = (ReadHalf, io::Result<usize>, Buffer)>>>;

/// A half that can be read ahead of time: while a connection rests, its next read is under way, so that the
/// end of the connection, or bytes that nobody asked for, are known without asking the kernel.
pub struct ReadAhead(Ahead);

enum Ahead {
    Idle(ReadHalf),
    Armed(Armed),
    /// A read was dropped before it was done.
    Lost,
}

impl ReadAhead {
    /// Nothing is read yet.
    pub fn new(half: ReadHalf) -> Self {
        Self(Ahead::Idle(half))
    }

    /// Begins the next read, behind what `buffer` holds. What is there already counts as what nobody asked for.
    pub fn arm(&mut self, buffer: Buffer) {
        self.prepare(buffer);
        // the operation exists from its first poll on
        self.is_quiet();
    }

    /// Prepares the next read, behind what `buffer` holds, so that [`ReadAhead::read`] can be given up and taken up
    /// again.
    pub fn prepare(&mut self, buffer: Buffer) {
        if !matches!(self.0, Ahead::Idle(_)) {
            return;
        }
        if let Ahead::Idle(mut half) = std::mem::replace(&mut self.0, Ahead::Lost) {
            self.0 = Ahead::Armed(Box::pin(async move {
                let (result, buffer) = half.read(buffer).await;
                (half, result, buffer)
            }));
        }
    }

    /// Whether a read is under way and nothing has come: neither bytes nor the end.
    pub fn is_quiet(&mut self) -> bool {
        let Ahead::Armed(armed) = &mut self.0 else { return false };
        if armed.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            return true;
        }
        self.0 = Ahead::Lost;
        false
    }

    /// Ends the read that is under way, or reads into what `buffer` makes. 0 is the end of the stream.
    ///
    /// # Cancellation
    /// A read that was under way before ([`ReadAhead::arm`], [`ReadAhead::prepare`]) stays so, and nothing is lost; else as
    /// [`ReadHalf::read`].
    pub async fn read(&mut self, buffer: impl FnOnce() -> Buffer) -> (io::Result<usize>, Buffer) {
        if let Ahead::Armed(armed) = &mut self.0 {
            let (half, result, buffer) = armed.as_mut().await;
            self.0 = Ahead::Idle(half);
            return (result, buffer);
        }
        match std::mem::replace(&mut self.0, Ahead::Lost) {
            Ahead::Idle(mut half) => {
                let (result, buffer) = half.read(buffer()).await;
                self.0 = Ahead::Idle(half);
                (result, buffer)
            }
            Ahead::Armed(_) | Ahead::Lost => (Err(io::ErrorKind::NotConnected.into()), buffer()),
        }
    }
}

impl fmt::Debug for ReadAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Ahead::Idle(_) => "ReadAhead::Idle",
            Ahead::Armed(_) => "ReadAhead::Armed",
            Ahead::Lost => "ReadAhead::Lost",
        })
    }
}

impl WriteHalf {
    #[cfg(test)]
    pub(super) fn fd(&self) -> RawFd {
        self.fd
    }

    /// Writes all that `buffer` holds and gives it back as it was.
    ///
    /// # Errors
    /// The kernel's, after which some bytes may have been written.
    ///
    /// # Cancellation
    /// Some bytes may have been written: the connection must not be written to again.
    pub async fn write_all(&mut self, mut buffer: Buffer) -> (io::Result<()>, Buffer) {
        let len = buffer.len();
        let mut written = 0;
        while written < len {
            let result;
            (result, buffer) = self.write(buffer).await;
            match result {
                Ok(0) => {
                    buffer.retreat(written);
                    return (Err(io::ErrorKind::WriteZero.into()), buffer);
                }
                Ok(count) => {
                    written += count;
                    if written < len {
                        buffer.advance(count);
                    } else {
                        buffer.retreat(written - count);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    buffer.retreat(written);
                    return (Err(error), buffer);
                }
            }
        }
        (Ok(()), buffer)
    }

    /// Writes what the kernel takes of `buffer`: with the other writes of this turn, or when there is room.
    async fn write(&mut self, mut buffer: Buffer) -> (io::Result<usize>, Buffer) {
        if let Some(outbox) = &self.outbox {
            let result;
            (result, buffer) = outbox.write(self.fd, buffer).await;
            if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return (result, buffer);
            }
        }
        self.half.write(buffer).await
    }

    /// As [`WriteHalf::write_all`], but gives up when the peer has taken nothing for `millis` milliseconds (late by
    /// up to half of that); 0 waits for ever. What counts is what the peer acknowledges: the kernel takes more of a
    /// large buffer only when a third of its own is free, which a slow reader may need hours for.
    ///
    /// # Errors
    /// [`Elapsed`] when the peer takes nothing, or when the watch's total time is over.
    ///
    /// # Cancellation
    /// As [`WriteHalf::write_all`].
    pub async fn write_all_within(
        &mut self,
        buffer: Buffer,
        watch: &Watch,
        millis: u64,
    ) -> Result<(io::Result<()>, Buffer), Elapsed> {
        let fd = self.fd;
        let mut writing = pin!(self.write_all(buffer));
        let mut seen = None;
        let mut stalled = 0;
        loop {
            match watch.limit(millis.div_ceil(LOOKS), writing.as_mut()).await {
                Ok(written) => return Ok(written),
                Err(Elapsed) if watch.is_total_over() => return Err(Elapsed),
                Err(Elapsed) => {
                    let taken = Some(acknowledged(fd));
                    stalled = if seen == taken { stalled + 1 } else { 0 };
                    seen = taken;
                    if stalled == LOOKS {
                        return Err(Elapsed);
                    }
                }
            }
        }
    }

    /// Ends the connection with a reset instead of a FIN: what the peer has is not the whole.
    pub fn break_off(&self) {
        let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
        let size = size_of::<libc::sockaddr>() as libc::socklen_t;
        // SAFETY: the descriptor lives as long as self, and the address is of the size given. To connect to
        // nowhere dissolves a connection with a reset; if that fails the peer is sent a FIN.
        unsafe { libc::connect(self.fd, &raw const nowhere, size) };
    }

    /// Sends a FIN; reading goes on.
    pub async fn finish(&mut self) {
        // an error means that the connection is gone already
        self.half.shutdown().await.ok();
    }
}

/// Bytes that the peer has acknowledged so far; `None` where the kernel does not tell (before Linux 4.1).
fn acknowledged(fd: RawFd) -> Option<u64> {
    /// `tcpi_bytes_acked` of `struct tcp_info` (linux/tcp.h), which libc's own struct does not reach.
    const AT: usize = 120;
    let mut info = [0_u8; AT + 8];
    let mut size = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes no more than `size` bytes; a descriptor that is closed already is an error.
    let result = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut size)
    };
    let told = result == 0 && size as usize == info.len();
    let bytes = info.last_chunk::<8>()?;
    told.then(|| u64::from_ne_bytes(*bytes))
}

/// Sets what finds peers that have vanished (RFC 9293 §3.8.4, RFC 5482), and that small heads and events do not wait
/// for an acknowledgement. A refusal only costs latency or patience.
fn tune(socket: BorrowedFd<'_>, settings: &Settings) {
    let socket = socket2::SockRef::from(&socket);
    socket.set_tcp_nodelay(true).ok();
    let keepalive = settings.tcp_keepalive_secs;
    if keepalive > 0 {
        let every = (keepalive / u64::from(KEEPALIVE_PROBES)).max(1);
        let probes = socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(keepalive))
            .with_interval(Duration::from_secs(every))
            .with_retries(KEEPALIVE_PROBES);
        socket.set_tcp_keepalive(&probes).ok();
    }
    if settings.tcp_user_timeout_secs > 0 {
        socket.set_tcp_user_timeout(Some(Duration::from_secs(settings.tcp_user_timeout_secs))).ok();
    }
}

fn split(stream: TcpStream) -> (ReadHalf, WriteHalf) {
    let fd = stream.as_raw_fd();
    let (read, write) = stream.into_split();
    (ReadHalf { half: read, fd }, WriteHalf { half: write, fd, outbox: outbox::current() })
}

/// Opens a connection to `address`.
///
/// # Errors
/// The kernel's: refused, unreachable, no free port, no free descriptor.
///
/// # Cancellation
/// The attempt is given up; nothing leaks.
pub async fn connect(address: SocketAddr, settings: &Settings) -> io::Result<(ReadHalf, WriteHalf)> {
    let stream = TcpStream::connect_addr(address).await?;
    // SAFETY: the descriptor lives as long as the stream, which outlives the call.
    tune(unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }, settings);
    Ok(split(stream))
}

/// Binds one listener for each of `count` shards to the same port; port 0 takes a free one. What `settings` say is
/// set on the listeners, from which Linux gives it to every accepted socket.
///
/// # Errors
/// The kernel's, with the address in its text.
pub fn listen(
    address: SocketAddr,
    count: usize,
    settings: &Settings,
) -> io::Result<Vec<std::net::TcpListener>> {
    let cannot =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    if address.port() != 0 {
        // SO_REUSEPORT would share the port with another proxy of this user, and each get half of the clients
        drop(bind(address, false).map_err(cannot)?);
    }
    let mut listeners: Vec<std::net::TcpListener> = Vec::with_capacity(count);
    let mut address = address;
    for _ in 0..count {
        let listener = bind(address, true).map_err(cannot)?;
        tune(listener.as_fd(), settings);
        listener.listen(BACKLOG).map_err(cannot)?;
        let listener: std::net::TcpListener = listener.into();
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<socket2::Socket> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A descriptor that is held for nothing but to be let go of when there are no others: then a client that waits
/// can be let in, told that there is no room, and sent away, where it would wait for ever otherwise.
#[derive(Debug, Default)]
pub struct Reserve(Option<std::os::unix::net::UnixDatagram>);

impl Reserve {
    /// Takes a descriptor, if it has none and there is one; whether it has one now.
    pub fn hold(&mut self) -> bool {
        if self.0.is_none() {
            self.0 = std::os::unix::net::UnixDatagram::unbound().ok();
        }
        self.0.is_some()
    }

    /// Lets go of it.
    pub fn release(&mut self) {
        self.0 = None;
    }

    /// Whether it has one.
    pub fn is_held(&self) -> bool {
        self.0.is_some()
    }
}

/// A listener of a shard, served by its driver.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    fd: RawFd,
}

/// Hands a listener over to the calling shard's driver.
///
/// # Errors
/// The driver cannot watch it: descriptors or memory are short.
pub fn accept_from(listener: std::net::TcpListener, driver: Driver) -> io::Result<Listener> {
    // before Linux 5.18 an accept of io_uring on a listener that does not block gives up at once
    listener.set_nonblocking(driver == Driver::Epoll)?;
    let fd = listener.as_raw_fd();
    Ok(Listener { listener: TcpListener::from_std(listener)?, fd })
}

impl Listener {
    /// The next client.
    ///
    /// # Errors
    /// `EMFILE` and the like, which pass; `EINVAL` after [`Listener::stop`].
    ///
    /// # Cancellation
    /// A client may be lost; never drop this future but with the listener.
    pub async fn accept(&self) -> io::Result<(ReadHalf, WriteHalf)> {
        let (stream, _) = self.listener.accept().await?;
        Ok(split(stream))
    }

    /// Waits until a client can be accepted, or the listener is stopped; takes no descriptor for that.
    ///
    /// # Errors
    /// The driver cannot watch the listener.
    ///
    /// # Cancellation
    /// Nothing is lost.
    pub async fn somebody_waits(&self) -> io::Result<()> {
        self.listener.readable(false).await
    }

    /// Lets no more clients in; a waiting [`Listener::accept`] ends with `EINVAL`.
    pub fn stop(&self) {
        // SAFETY: the descriptor lives as long as self.
        unsafe { libc::shutdown(self.fd, libc::SHUT_RD) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Runtime;

    /// What is set on a socket: whether it is probed, after how many seconds, how often, how many times; its user
    /// timeout in seconds; whether it sends at once.
    fn options(socket: &impl AsFd) -> (bool, u64, u64, u32, u64, bool) {
        let socket = socket2::SockRef::from(socket);
        (
            socket.keepalive().unwrap(),
            socket.tcp_keepalive_time().unwrap().as_secs(),
            socket.tcp_keepalive_interval().unwrap().as_secs(),
            socket.tcp_keepalive_retries().unwrap(),
            socket.tcp_user_timeout().unwrap().map_or(0, |timeout| timeout.as_secs()),
            socket.tcp_nodelay().unwrap(),
        )
    }

    fn borrowed(half: &WriteHalf) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the half that is borrowed.
        unsafe { BorrowedFd::borrow_raw(half.fd) }
    }

    #[test]
    fn u8_vanished_peers_are_found_on_both_sides() {
        let settings = Settings { tcp_keepalive_secs: 30, tcp_user_timeout_secs: 60 };
        let off = Settings { tcp_keepalive_secs: 0, tcp_user_timeout_secs: 0 };
        for driver in [Driver::UringPlain, Driver::Epoll] {
            let Ok(mut runtime) = Runtime::build(driver) else { continue };
            for (settings, expected) in
                [(&settings, (true, 30, 10, 3, 60, true)), (&off, (false, 7200, 75, 9, 0, true))]
            {
                let listener = listen("127.0.0.1:0".parse().unwrap(), 1, settings).unwrap().remove(0);
                let address = listener.local_addr().unwrap();
                runtime.block_on(async {
                    let listener = accept_from(listener, driver).unwrap();
                    let (_reader, connected) = connect(address, settings).await.unwrap();
                    assert_eq!(options(&borrowed(&connected)), expected, "{driver} connected");
                    let (_reader, accepted) = listener.accept().await.unwrap();
                    assert_eq!(options(&borrowed(&accepted)), expected, "{driver} accepted");
                });
            }
        }
    }

    #[test]
    fn a_slow_reader_is_given_as_long_as_its_write_may_take() {
        let settings = Settings { tcp_keepalive_secs: 30, tcp_user_timeout_secs: 60 };
        assert_eq!(settings.patient(300).tcp_user_timeout_secs, 300);
        assert_eq!(settings.patient(10).tcp_user_timeout_secs, 60);
        let off = Settings { tcp_user_timeout_secs: 0, ..settings };
        assert_eq!(off.patient(300).tcp_user_timeout_secs, 0);
    }

    #[test]
    fn what_a_peer_has_acknowledged_is_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_receiver, _) = listener.accept().unwrap();
        let before = acknowledged(sender.as_raw_fd()).expect("this kernel tells");
        std::io::Write::write_all(&mut sender, &[0; 1000]).unwrap();
        while acknowledged(sender.as_raw_fd()) != Some(before + 1000) {
            std::thread::yield_now();
        }
    }
}
