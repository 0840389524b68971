//! One request to one worker, from the control thread.
//!
//! Each attempt has a connection of its own to the addresses that shards use, is written as it was given
//! (target, header names, `Host`), follows no redirect and knows no proxy variables. Nothing is spawned: the
//! connection is driven by whoever waits for the head or reads the body, so dropping either closes the socket
//! at once. There is no pool: these requests are few, and vLLM closes idle connections after 5 s.

use std::{
    future::{Future, poll_fn},
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::{net::TcpStream, time::timeout};

use crate::workers::Worker;

/// Fields of a head. Shards accept 128 in a request; an answer may carry a few more.
pub(crate) const MAX_FIELDS: usize = 256;

/// Bytes of a head that are read at most (`faults.md` §2.3), which bounds hyper's buffer.
pub(crate) const MAX_HEAD_BYTES: usize = 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, Error)]
pub(crate) enum AttemptError {
    /// The worker's name has not been resolved yet.
    #[error("its name is not resolved")]
    Unresolved,
    /// No address took a connection; nothing was sent.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// Time was up.
    #[error("no answer in time")]
    Late,
    /// The connection broke, or what came is no HTTP.
    #[error("{0}")]
    Transport(#[from] hyper::Error),
    /// The body broke off.
    #[error("the answer broke off: {0}")]
    Body(#[source] axum::Error),
    /// The body is larger than is reasonable.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// The target cannot be written for this worker.
    #[error("the target is no URI")]
    Target,
}

/// Sends `request` to `worker` and returns the answer as soon as its head is there. The target gets the
/// worker's path prefix; `Host` is added where it is missing. Connecting may take `connect_timeout` (all
/// addresses together); the wait for the head has no limit, because some of vLLM's own work takes minutes.
///
/// # Errors
/// [`AttemptError::Unresolved`], [`AttemptError::Connect`] (a time limit included), [`AttemptError::Transport`],
/// [`AttemptError::Target`].
///
/// # Cancellation
/// Dropping the future, or the body of the answer, closes the connection.
pub(crate) async fn send(
    worker: &Worker,
    mut request: Request<Body>,
    connect_timeout: Duration,
) -> Result<Response<Body>, AttemptError> {
    *request.uri_mut() = target(worker, request.uri())?;
    if !request.headers().contains_key(header::HOST) {
        let authority = worker.url().as_str().trim_start_matches("http://");
        let authority = authority.split('/').next().unwrap_or_default();
        let host = HeaderValue::from_str(authority).map_err(|_| AttemptError::Target)?;
        request.headers_mut().insert(header::HOST, host);
    }
    let stream = connect(worker, connect_timeout).await?;
    let (mut sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .max_headers(MAX_FIELDS)
        .max_header_size(MAX_HEAD_BYTES)
        .handshake(TokioIo::new(stream))
        .await?;
    let mut driver = Driver { connection: Some(Box::pin(connection)) };
    let mut head = std::pin::pin!(sender.send_request(request));
    let response = poll_fn(|cx| {
        driver.drive(cx);
        head.as_mut().poll(cx)
    })
    .await?;
    Ok(response.map(|body| Body::new(Driven { driver, body })))
}

/// Sends `request` and reads the whole answer, all within `limit` and up to `max_bytes` of body.
///
/// # Errors
/// Those of [`send`], and [`AttemptError::Late`], [`AttemptError::Body`], [`AttemptError::TooLarge`].
pub(crate) async fn fetch(
    worker: &Worker,
    request: Request<Body>,
    limit: Duration,
    max_bytes: usize,
) -> Result<Response<Bytes>, AttemptError> {
    let whole = async {
        let (head, body) = send(worker, request, limit).await?.into_parts();
        Ok(Response::from_parts(head, collect(body, max_bytes).await?))
    };
    timeout(limit, whole).await.unwrap_or(Err(AttemptError::Late))
}

/// A `GET` of `path`, read whole; with the proxy's own key, if it has one.
///
/// # Errors
/// Those of [`fetch`].
pub(super) async fn get(
    worker: &Worker,
    path: &'static str,
    key: Option<&HeaderValue>,
    limit: Duration,
    max_bytes: usize,
) -> Result<(StatusCode, Bytes), AttemptError> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = Uri::from_static(path);
    if let Some(key) = key {
        request.headers_mut().insert(header::AUTHORIZATION, key.clone());
    }
    let response = fetch(worker, request, limit, max_bytes).await?;
    Ok((response.status(), response.into_body()))
}

/// Reads a body to its end.
///
/// # Errors
/// [`AttemptError::TooLarge`] beyond `max_bytes`, [`AttemptError::Body`] if it breaks off.
pub(crate) async fn collect(body: Body, max_bytes: usize) -> Result<Bytes, AttemptError> {
    match Limited::new(body, max_bytes).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(AttemptError::TooLarge(max_bytes)),
        Err(error) => Err(AttemptError::Body(axum::Error::new(error))),
    }
}

/// The origin-form target for this worker: its prefix before path and query, unchanged otherwise.
fn target(worker: &Worker, uri: &Uri) -> Result<Uri, AttemptError> {
    let rest = uri.path_and_query().map_or("/", |rest| rest.as_str());
    format!("{}{rest}", worker.url().prefix()).parse().map_err(|_| AttemptError::Target)
}

/// A connection to the first of the worker's addresses that takes one. Each gets an equal share of `limit`, so
/// that one which swallows packets does not use up the time of the others.
async fn connect(worker: &Worker, limit: Duration) -> Result<TcpStream, AttemptError> {
    let addresses = worker.addresses();
    let mut last = AttemptError::Unresolved;
    let share = limit / u32::try_from(addresses.list.len()).unwrap_or(u32::MAX).max(1);
    for address in &addresses.list {
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Only speed is lost where the kernel refuses it.
                stream.set_nodelay(true).unwrap_or_default();
                return Ok(stream);
            }
            Ok(Err(error)) => last = AttemptError::Connect(error),
            Err(_) => last = AttemptError::Connect(io::ErrorKind::TimedOut.into()),
        }
    }
    Err(last)
}

type Connection = http1::Connection<TokioIo<TcpStream>, Body>;

/// The connection under an answer; gone once it has ended.
struct Driver {
    connection: Option<Pin<Box<Connection>>>,
}

impl Driver {
    /// Does what can be done now. How the connection ends is told by the head or the body that it carries.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection
            && connection.as_mut().poll(cx).is_ready()
        {
            self.connection = None;
        }
    }
}

/// The body of an answer together with the connection that it comes from.
struct Driven {
    driver: Driver,
    body: Incoming,
}

impl HttpBody for Driven {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.driver.drive(cx);
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
