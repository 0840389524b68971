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
    net::{Buffer, Parting},
    proxy::{
        account::Account,
        answer::{Wanted, receive},
        body::{self, Body, Sending, Sent},
        choice::Chosen,
        client::{After, Client},
        context::Context,
        failure::SET_BACK_MS,
        judge,
        listener::Listener,
        peek::{Peek, Seen},
        relay::{Plan, Relayed, Step, relay},
        respond,
        retry::{Failure, Kind, Retries},
        storing::Storing,
        tunnel::tunnel,
    },
    telemetry::metrics::Break,
    upstream::Connection,
    vllm::{self, Unbegun},
    workers::Worker,
};

/// The field in which vLLM tells its load to who asked for it with `endpoint-load-metrics-format` (ORCA).
const LOAD_FIELD: &str = "endpoint-load-metrics";

/// The field that names the worker in an answer, where that is asked for.
const WORKER_FIELD: &str = "x-vllm-proxy-worker";

/// What a client is told of a busy worker that does not say itself when to come back, in seconds.
const RETRY_AFTER: (&str, &str) = ("retry-after", "1");

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
    /// Whether the answer is a response that the worker may be asked for later.
    pub(super) storable: bool,
    /// The worker is our own control thread.
    pub(super) ours: bool,
}

/// Sends the request to the chosen worker and its answer to the client.
///
/// # Cancellation
/// The worker's connection is closed, which makes vLLM abort the request.
pub(super) async fn attempt(
    client: &mut Client<'_>,
    account: &Account<'_>,
    chosen: &mut Chosen<'_>,
    body: Body,
    manner: Manner,
    retries: &mut Retries<'_>,
) -> Attempted {
    let cx = client.cx;
    // what can't be sent again is not risked on a connection that may be stale; our own control thread closes none
    let keeps = matches!(&body, Body::Whole(buffer) if retries.keeps(buffer.len()));
    let may_rest = keeps || manner.ours && matches!(body, Body::Whole(_));
    let fresh = manner.fresh || !may_rest;
    let mut connection = match checkout(client, chosen.worker, fresh).await {
        Ok(connection) => connection,
        Err(failure) => return Attempted::Failed(failure, Some(body)),
    };
    match run(client, account, chosen, &mut connection, body, manner, retries).await {
        Ran::Over { attempted, reusable } => {
            if reusable {
                cx.pool.put(chosen.worker, connection, cx.buffers.large());
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
    let watch = &client.outlet.watch;
    Box::pin(cx.pool.open(worker, watch)).await.map_err(|error| {
        // a time that is over says nothing of the worker
        if watch.is_total_over() { Failure::TotalTime } else { Failure::Connect(error) }
    })
}

/// Sends the request and relays its answer, if it is worth it; both at once, because a worker may answer before it has
/// read all.
async fn run(
    client: &mut Client<'_>,
    account: &Account<'_>,
    chosen: &mut Chosen<'_>,
    connection: &mut Connection,
    body: Body,
    manner: Manner,
    retries: &mut Retries<'_>,
) -> Ran {
    let framing = manner.framing;
    let Chosen { worker, trial, room, .. } = chosen;
    let Client { cx, inbox, request, outlet, head, held, .. } = client;
    let Connection { reader, writer, reused, .. } = connection;
    head.clear();
    let prefix = worker.url().prefix();
    let rank = worker.rank().map(|rank| [(vllm::RANK_FIELD, rank)]);
    let extra = rank.as_ref().map_or(&[][..], |field| field);
    request.write_upstream(head, &UpstreamHead { prefix, framing, extra });
    let chunked = framing == OutFraming::Chunked;
    let keeps = matches!(&body, Body::Whole(buffer) if retries.keeps(buffer.len()));
    let how = Sending { chunked, keep: keeps };
    let watch = outlet.watch.clone();
    let mut sending = pin!(maybe_done(body::send(cx, inbox, &watch, writer, head, body, how)));

    let version = request.version();
    let wanted = Wanted { to_head: request.is_head(), upgrade: request.upgrade().is_some(), version };
    let received = {
        // behind the control thread stand several workers, or none
        let ours = Arc::ptr_eq(worker, &cx.admin);
        let limit = if ours { 0 } else { cx.settings.response_timeout_secs.saturating_mul(1000) };
        let receiving = pin!(watch.limit(limit, receive(cx, outlet, reader, wanted, *reused)));
        alongside(sending.as_mut(), receiving, true).await
    };
    let received = received.map(|received| received.unwrap_or(Err(Failure::NoHead)));
    let mut buffer = match received {
        Ok(Ok(buffer)) => buffer,
        Ok(Err(_)) if watch.is_total_over() => {
            return Ran::over(Attempted::Failed(Failure::TotalTime, None));
        }
        Ok(Err(failure)) => {
            if keeps && failure.reason().is_some() {
                outlet.watch.limit(GIVE_BACK_MS, sending.as_mut()).await.ok();
            }
            return Ran::over(Attempted::Failed(failure, kept(sending).map(Body::Whole)));
        }
        Err(Failure::Unread) if watch.is_total_over() => {
            return Ran::over(Attempted::Refused(Failure::TotalTime));
        }
        Err(failure) => return Ran::over(Attempted::Refused(failure)),
    };

    let body_sent = matches!(sending.as_mut().output_mut(), Some(Sent::Complete(Some(_))));
    if manner.other_kinds && body_sent && is_no_such_path(&outlet.answer) {
        return Ran::over(Attempted::Failed(Failure::NoSuchPath, kept(sending).map(Body::Whole)));
    }
    let events = outlet.answer.is_event_stream();
    // nothing can be read in a stream that is compressed, nor said
    let speaks = events && outlet.answer.field("content-encoding").is_none();
    let mut plan = Plan::of(outlet.answer.framing(), speaks, version);
    let status = outlet.answer.status();
    if retries.generates() && status == 200 {
        plan.must_speak();
    }
    let switched = status == 101;
    let kind = if speaks == events { Kind::of(&outlet.answer) } else { Kind::Other };
    let question = retries.question(status, kind);
    // the body is only there once all of it is sent; without it the answer is as good as any
    let holds = body_sent && question.is_some_and(|(_, holds)| holds);
    let mut peek = question
        .map(|(question, _)| Peek::new(question, &outlet.answer, std::mem::take(&mut outlet.scratch)));
    let mut seen = peek.as_mut().map_or(Seen::Pass, |peek| peek.first(buffer.filled()));
    let mut step = if switched { None } else { plan.begin(&mut buffer) };
    if let (true, Seen::NeedMore, Some(peek), Some(step)) = (holds, &seen, &mut peek, &mut step) {
        seen = match Box::pin(peek.hold(cx, &watch, reader, &mut plan, step, &mut buffer)).await {
            Ok(seen) => seen,
            Err(failure) => return Ran::over(Attempted::Failed(failure, kept(sending).map(Body::Whole))),
        };
    }
    if let Some(peek) = peek {
        outlet.scratch = peek.into_scratch();
    }
    if step.is_none() && !switched {
        return Ran::over(Attempted::Failed(Failure::AnswerBody, None));
    }
    if matches!(seen, Seen::Poor(Failure::ModelLost))
        && let Some(Sent::Complete(Some(body))) = sending.as_mut().output_mut()
        && !retries.is_listed(body.filled())
    {
        seen = Seen::Pass;
    }
    let mut counted = status;
    if let Seen::Poor(failure) = seen {
        if retries.gives_up(&cx.moment(), worker, &failure, body_sent) {
            let reusable = step.is_some_and(Step::is_clean_end) && outlet.answer.keep_alive();
            cx.buffers.recycle(buffer);
            return Ran::Over {
                attempted: Attempted::Failed(failure, kept(sending).map(Body::Whole)),
                reusable,
            };
        }
        if matches!(failure, Failure::Unbegun(Unbegun::Empty)) {
            // a success that says nothing must not be taken for one
            return Ran::over(Attempted::Failed(failure, None));
        }
        // whatever its status, it is no success
        counted = failure.counted_as(status);
        retries.passed(failure);
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
    account.answered(counted);
    judge::begins(worker, trial, counted, cx.clock.now());
    let closes = plan.closes;
    let keep_alive = request.keep_alive() && !plan.closes && !cx.watches.draining() && inbox.request_read();
    let mut answer_head = std::mem::take(&mut outlet.scratch);
    answer_head.clear();
    let mut extra = [("", ""); 2];
    let mut extras = 0;
    // what the control thread says comes from several workers or from none, and its own listener is nobody's business
    if cx.settings.worker_header && !manner.ours {
        extra[extras] = (WORKER_FIELD, worker.name());
        extras += 1;
    }
    // vLLM does not say when to come back (`faults.md` §1)
    if matches!(status, 429 | 503) && !manner.ours && outlet.answer.field(RETRY_AFTER.0).is_none() {
        extra[extras] = RETRY_AFTER;
        extras += 1;
    }
    let extra = &extra[..extras];
    let downstream = DownstreamHead { version, framing: plan.framing, keep_alive, extra };
    outlet.answer.write_downstream(&mut answer_head, &downstream);

    let Some(step) = step else {
        return Ran::Switched { head: answer_head, buffer };
    };
    let relayed = {
        let storing = || Storing::of(&outlet.answer, events, plan.is_chunked(), &cx.stored, worker);
        let storing = if manner.storable { storing() } else { None };
        let listener = Listener::of(
            &outlet.answer,
            events,
            &mut room.in_flight,
            manner.listens.then_some(account),
            storing,
        );
        watch.set_parting(if plan.is_events() { Parting::Speaking } else { Parting::Silent });
        let relaying =
            pin!(relay(cx, outlet, &watch, reader, &mut plan, &answer_head, step, buffer, listener));
        alongside(sending.as_mut(), relaying, false).await
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
            if plan.is_erred() {
                cx.metrics().broke(Break::WorkerError);
                // its engine may have died; a probe tells
                doubt(cx, worker);
            }
            let body_sent = matches!(sending.as_mut().output_mut(), Some(Sent::Complete(_)));
            let after = if keep_alive { After::KeepAlive } else { After::Linger };
            let reusable = clean && body_sent && outlet.answer.keep_alive();
            Ran::Over { attempted: Attempted::Answered(after), reusable }
        }
        Relayed::Broken(reason) => {
            if matches!(reason, Break::WorkerBroke | Break::BadCoding | Break::Empty) {
                worker.counters().transport_errors.fetch_add(1, Ordering::Relaxed);
                // it may have died, or the request was at fault: a probe tells
                doubt(cx, worker);
            }
            cx.metrics().broke(reason);
            account.broken(respond::status_of(reason));
            let endpoint = vllm::lookup(request.method(), request.path());
            let events = respond::last_events(endpoint, reason);
            if Box::pin(plan.tell(outlet, &events)).await {
                let after = if keep_alive { After::KeepAlive } else { After::Linger };
                return Ran::over(Attempted::Answered(after));
            }
            if closes {
                // only a reset tells that this is not the end of the answer
                outlet.writer.break_off();
            }
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

/// The worker has failed within an answer: it is looked at, and others are preferred for a moment.
fn doubt(cx: &Context, worker: &Worker) {
    worker.doubt();
    worker.set_back(cx.clock.now().saturating_add(SET_BACK_MS));
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
/// The client's fault, if sending found one; and while an answer is `awaited`, that the worker does not read. `main`
/// is dropped then.
///
/// # Cancellation
/// As both.
async fn alongside<F: Future<Output = Sent>, T>(
    mut sending: Pin<&mut MaybeDone<F>>,
    mut main: Pin<&mut impl Future<Output = T>>,
    awaited: bool,
) -> Result<T, Failure> {
    poll_fn(|context| {
        if sending.as_mut().poll(context).is_ready() {
            match sending.as_mut().output_mut() {
                Some(Sent::ClientFault(failure)) => {
                    return Poll::Ready(Err(std::mem::replace(failure, Failure::ClientGone)));
                }
                Some(Sent::Unread) if awaited => return Poll::Ready(Err(Failure::Unread)),
                _ => {}
            }
        }
        main.as_mut().poll(context).map(Ok)
    })
    .await
}
