//! TCP connections in two halves, and the few calls for which neither std nor monoio has a name.

#![expect(unsafe_code, reason = "shutdown, poll and reset of a socket are calls of libc")]

use std::{
    fmt,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, RawFd},
    pin::{Pin, pin},
    task::{Context, Waker},
};

use monoio::{
    io::{AsyncReadRent, AsyncWriteRent, OwnedReadHalf, OwnedWriteHalf, Splitable},
    net::{TcpListener, TcpStream},
};

use crate::net::{Buffer, Driver, Watch};

/// Connections that the kernel completes before we accept them. Capped by `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

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

    /// Begins the next read, behind what `buffer` holds.
    pub fn arm(&mut self, buffer: Buffer) {
        if let Ahead::Idle(mut half) = std::mem::replace(&mut self.0, Ahead::Lost) {
            self.0 = Ahead::Armed(Box::pin(async move {
                let (result, buffer) = half.read(buffer).await;
                (half, result, buffer)
            }));
            // the operation exists from its first poll on
            self.is_quiet();
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
    /// A read that was under way before ([`ReadAhead::arm`]) stays so, and nothing is lost; else as
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
            (result, buffer) = self.half.write(buffer).await;
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

fn split(stream: TcpStream) -> (ReadHalf, WriteHalf) {
    // small heads and events must not wait for an acknowledgement; a refusal only costs latency
    stream.set_nodelay(true).ok();
    let fd = stream.as_raw_fd();
    let (read, write) = stream.into_split();
    (ReadHalf { half: read, fd }, WriteHalf { half: write, fd })
}

/// Opens a connection to `address`.
///
/// # Errors
/// The kernel's: refused, unreachable, no free port, no free descriptor.
///
/// # Cancellation
/// The attempt is given up; nothing leaks.
pub async fn connect(address: SocketAddr) -> io::Result<(ReadHalf, WriteHalf)> {
    Ok(split(TcpStream::connect_addr(address).await?))
}

/// Binds one listener for each of `count` shards to the same port; port 0 takes a free one.
///
/// # Errors
/// The kernel's, with the address in its text.
pub fn listen(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
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

    /// Lets no more clients in; a waiting [`Listener::accept`] ends with `EINVAL`.
    pub fn stop(&self) {
        // SAFETY: the descriptor lives as long as self.
        unsafe { libc::shutdown(self.fd, libc::SHUT_RD) };
    }
}
