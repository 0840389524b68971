//! One try of a request on one worker.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    task::Poll,
};

use futures_util::future::{MaybeDone, maybe_done};

use crate::{
    http::{DownstreamHead, OutFraming, ResponseFraming, ResponseHead, UpstreamHead},
    net::Buffer,
    proxy::{
        account::Account,
        answer::{Wanted, receive},
        body::{self, Body, Sent},
        client::{After, Client},
        listener::Listener,
        relay::{Plan, Relayed, relay},
        retry::{Failure, Verdict},
        tunnel::tunnel,
    },
    upstream::Connection,
    vllm,
    workers::{InFlight, Worker},
};

/// The field in which vLLM tells its load to who asked for it with `endpoint-load-metrics-format` (ORCA).
const LOAD_FIELD: &str = "endpoint-load-metrics";

/// The field that names the worker in an answer, where that is asked for.
const WORKER_FIELD: &str = "x-vllm-proxy-worker";

/// After a connection was found dead, its unfinished write is given this long to fail too, so that the body
/// comes back from the kernel.
const GIVE_BACK_MS: u64 = 1000;

/// How an attempt ended.
pub(super) enum Attempted {
    /// The client has its answer, or at least the beginning of one.
    Answered(After),
    /// Nothing has been sent to the client; the body is there for another attempt, if it could be kept.
    Failed(Failure, Option<Body>),
    /// The request itself is at fault; nothing has been sent to the client.
    Refused(Failure),
}

/// How an attempt is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    /// How the body goes to the worker.
    pub(super) framing: OutFraming,
    /// On a new connection.
    pub(super) fresh: bool,
    /// Whether there are workers of another kind, which may have the path if this one does not.
    pub(super) other_kinds: bool,
    /// Whether what the answer says of its tokens is of use.
    pub(super) listens: bool,
}

/// Sends the request to `worker` and its answer to the client.
///
/// # Cancellation
/// The worker's connection is closed, which makes vLLM abort the request.
pub(super) async fn attempt(
    client: &mut Client<'_>,
    account: &Account<'_>,
    worker: &Arc<Worker>,
    in_flight: &mut InFlight,
    body: Body,
    manner: Manner,
) -> Attempted {
    let cx = client.cx;
    // a body that is not kept can't be sent again, so it is not risked on a connection that may be stale
    let fresh = manner.fresh || matches!(body, Body::Streaming(_));
    let mut connection = match checkout(client, worker, fresh).await {
        Ok(connection) => connection,
        Err(failure) => return Attempted::Failed(failure, Some(body)),
    };
    match run(client, account, worker, in_flight, &mut connection, body, manner).await {
        Ran::Over { attempted, reusable } => {
            if reusable {
                cx.pool.put(worker, connection, cx.buffers.large());
            }
            attempted
        }
        Ran::Switched { head, buffer } => {
            // whoever ends a tunnel, it has served its purpose
            account.complete();
            Box::pin(tunnel(cx, &mut client.outlet, client.inbox, &mut connection, &head, buffer)).await;
            Attempted::Answered(After::Close)
        }
    }
}

/// What became of an attempt on its connection.
enum Ran {
    /// The exchange of messages is over; whether the connection may be used for another.
    Over { attempted: Attempted, reusable: bool },
    /// The worker switched protocols: its head for the client, and what it sent behind it.
    Switched { head: Vec<u8>, buffer: Buffer },
}

impl Ran {
    fn over(attempted: Attempted) -> Self {
        Self::Over { attempted, reusable: false }
    }
}

/// A connection to `worker`: one that has rested, or a new one.
async fn checkout(client: &Client<'_>, worker: &Arc<Worker>, fresh: bool) -> Result<Connection, Failure> {
    let cx = client.cx;
    let rested = if fresh { None } else { cx.pool.take(worker) };
    if let Some(connection) = rested {
        return Ok(connection);
    }
    // rare beside the exchanges on rested connections, which should not carry its state
    Box::pin(cx.pool.open(worker, &client.outlet.watch)).await.map_err(Failure::Connect)
}

/// Sends the request and relays its answer; both at once, because a worker may answer before it has read all.
async fn run(
    client: &mut Client<'_>,
    account: &Account<'_>,
    worker: &Worker,
    in_flight: &mut InFlight,
    connection: &mut Connection,
    body: Body,
    manner: Manner,
) -> Ran {
    let framing = manner.framing;
    let Client { cx, inbox, request, outlet, head, held, .. } = client;
    let Connection { reader, writer, reused, .. } = connection;
    head.clear();
    let prefix = worker.url().prefix();
    let rank = worker.rank().map(|rank| [(vllm::RANK_FIELD, rank)]);
    let extra = rank.as_ref().map_or(&[][..], |field| field);
    request.write_upstream(head, &UpstreamHead { prefix, framing, extra });
    let chunked = framing == OutFraming::Chunked;
    let mut sending = pin!(maybe_done(body::send(cx, inbox, writer, head, body, chunked)));

    let version = request.version();
    let wanted = Wanted { to_head: request.is_head(), upgrade: request.upgrade().is_some(), version };
    let received = {
        let receiving = pin!(receive(cx, outlet, reader, wanted, *reused));
        alongside(sending.as_mut(), receiving).await
    };
    let mut buffer = match received {
        Ok(Ok(buffer)) => buffer,
        Ok(Err(failure)) => {
            if failure.verdict() != Verdict::GiveUp {
                outlet.watch.limit(GIVE_BACK_MS, sending.as_mut()).await.ok();
            }
            return Ran::over(Attempted::Failed(failure, kept(sending).map(Body::Whole)));
        }
        Err(failure) => return Ran::over(Attempted::Refused(failure)),
    };

    let body_sent = matches!(sending.as_mut().output_mut(), Some(Sent::Complete(Some(_))));
    if manner.other_kinds && body_sent && is_no_such_path(&outlet.answer) {
        return Ran::over(Attempted::Failed(Failure::NoSuchPath, kept(sending).map(Body::Whole)));
    }
    let mut plan = Plan::of(outlet.answer.framing(), version);
    let switched = outlet.answer.status() == 101;
    let step = if switched { None } else { plan.begin(&mut buffer) };
    if step.is_none() && !switched {
        return Ran::over(Attempted::Failed(Failure::AnswerBody, None));
    }

    // it is said of the server, not of one of its ranks
    let load = if worker.rank().is_none() { outlet.answer.field(LOAD_FIELD) } else { None };
    if let Some((waiting, kv_usage)) = load.and_then(vllm::parse_orca) {
        worker.engine().set_waiting(waiting, kv_usage);
    }
    // The answer has begun: nothing is tried again from here on, and the body is not needed any more.
    if let Some(body) = kept(sending.as_mut()) {
        cx.buffers.recycle(body);
    }
    held.release();
    account.answered(outlet.answer.status());
    let closes = plan.closes;
    let keep_alive = request.keep_alive() && !plan.closes && !cx.watches.draining() && inbox.request_read();
    let mut answer_head = std::mem::take(&mut outlet.scratch);
    answer_head.clear();
    let named = [(WORKER_FIELD, worker.name())];
    // what the control thread says comes from several workers or from none, and its own listener is nobody's business
    let names = cx.settings.worker_header && !std::ptr::eq(worker, &*cx.admin);
    let extra = if names { &named[..] } else { &[] };
    let downstream = DownstreamHead { version, framing: plan.framing, keep_alive, extra };
    outlet.answer.write_downstream(&mut answer_head, &downstream);

    let Some(step) = step else {
        return Ran::Switched { head: answer_head, buffer };
    };
    let relayed = {
        let listener = Listener::of(&outlet.answer, in_flight, manner.listens.then_some(account));
        let relaying = pin!(relay(outlet, reader, plan, &answer_head, step, buffer, listener));
        alongside(sending.as_mut(), relaying).await
    };
    outlet.scratch = answer_head;
    let Ok((relayed, buffer)) = relayed else {
        // the client broke its own request off after the answer had begun
        return Ran::over(Attempted::Answered(After::Close));
    };
    cx.buffers.recycle(buffer);
    match relayed {
        Relayed::Complete { clean } => {
            account.complete();
            let body_sent = matches!(sending.as_mut().output_mut(), Some(Sent::Complete(_)));
            let after = if keep_alive { After::KeepAlive } else { After::Linger };
            let reusable = clean && body_sent && outlet.answer.keep_alive();
            Ran::Over { attempted: Attempted::Answered(after), reusable }
        }
        Relayed::Broken => {
            worker.counters().transport_errors.fetch_add(1, Ordering::Relaxed);
            if closes {
                // only a reset tells that this is not the end of the answer
                outlet.writer.break_off();
            }
            account.broken();
            Ran::over(Attempted::Answered(After::Close))
        }
        Relayed::ClientGone => Ran::over(Attempted::Answered(After::Close)),
    }
}

/// Whether this is a front end's answer to a path that it does not have: Python's `{"detail":"Not Found"}`, or
/// the empty 404 of the Rust one.
fn is_no_such_path(answer: &ResponseHead) -> bool {
    const DETAIL_BYTES: u64 = r#"{"detail":"Not Found"}"#.len() as u64;
    answer.status() == 404 && matches!(answer.framing(), ResponseFraming::Length(0 | DETAIL_BYTES))
}

/// The body that a finished write gave back.
fn kept<F: Future<Output = Sent>>(sending: Pin<&mut MaybeDone<F>>) -> Option<Buffer> {
    match sending.output_mut() {
        Some(Sent::Complete(kept) | Sent::Broken(kept)) => kept.take(),
        _ => None,
    }
}

/// Runs `main` to its end, and `sending` beside it for as long.
///
/// # Errors
/// The client's fault, if sending found one: `main` is dropped then.
///
/// # Cancellation
/// As both.
async fn alongside<F: Future<Output = Sent>, T>(
    mut sending: Pin<&mut MaybeDone<F>>,
    mut main: Pin<&mut impl Future<Output = T>>,
) -> Result<T, Failure> {
    poll_fn(|context| {
        let sent = sending.as_mut().poll(context).is_ready();
        if let (true, Some(Sent::ClientFault(failure))) = (sent, sending.as_mut().output_mut()) {
            return Poll::Ready(Err(std::mem::replace(failure, Failure::ClientGone)));
        }
        main.as_mut().poll(context).map(Ok)
    })
    .await
}
