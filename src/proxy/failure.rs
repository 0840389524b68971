//! What can go wrong with an exchange, or with one attempt of it, and what that says of the worker.

use std::io;

use thiserror::Error;

use crate::{
    admission::Refused,
    http::{RequestError, ResponseError},
    telemetry::{Resource, metrics::Retry},
    vllm::{ErrorShape, Unbegun},
};

/// For how long others are preferred to a worker that failed a request, in milliseconds: a second, in which a probe
/// tells more.
pub(super) const SET_BACK_MS: u64 = 1000;

/// What a worker may ask for with its `Retry-After` in this respect, in seconds.
const MOST_SET_BACK_SECS: u64 = 30;

/// Why an exchange, or one attempt of it, failed.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    /// The client's bytes are no legal request.
    #[error("{0}")]
    Request(#[from] RequestError),
    /// The framing of the request's body is broken.
    #[error("the chunked coding of the request body is broken")]
    RequestBody,
    /// The request's body is larger than `--max-body-bytes`.
    #[error("the request body is larger than {limit} bytes")]
    BodyTooLarge {
        /// What is allowed, in bytes.
        limit: u64,
    },
    /// The head or the body of the request did not come in time.
    #[error("the request did not arrive in time")]
    Late,
    /// The client closed its connection.
    #[error("the client went away")]
    ClientGone,
    /// Too much is going on: it is not let in. With the form of its endpoint's errors.
    #[error("{0}")]
    NotAdmitted(Refused, ErrorShape),
    /// The time for draining is over.
    #[error("the proxy is shutting down")]
    Draining,
    /// There is no worker to try.
    #[error("no worker is up")]
    NoWorker,
    /// The worker could not be connected to.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// The connection ended or broke before the first byte of an answer.
    #[error("the connection ended before an answer came")]
    NoAnswer {
        /// Whether an exchange had ended on this connection before.
        reused: bool,
    },
    /// The head of the answer did not come within `--response-timeout-secs`.
    #[error("the answer did not begin in time")]
    NoHead,
    /// The worker did not read the request for `--worker-write-timeout-secs`.
    #[error("the request was not read")]
    Unread,
    /// The answer had begun, and nothing came for `--stream-idle-timeout-secs`.
    #[error("the answer stopped within itself")]
    Stalled,
    /// `--request-timeout-secs` are over.
    #[error("the request took too long")]
    TotalTime,
    /// The answer is no legal HTTP/1.1.
    #[error("the answer is not legal HTTP: {0}")]
    BadAnswer(ResponseError),
    /// The answer's head broke off.
    #[error("the answer broke off within its head")]
    AnswerCut,
    /// The framing of the answer's body is broken, and was so before any of it was passed on.
    #[error("the chunked coding of the answer is broken")]
    AnswerBody,
    /// The worker does not have the path, and there are workers of other kinds.
    #[error("the worker does not have the path")]
    NoSuchPath,
    /// An answer that nobody asked for: 101 without an upgrade, or a flood of interim answers.
    #[error("the answer is out of place: {0}")]
    Unexpected(&'static str),
    /// The worker has too much to do and has done nothing: 429, or vLLM's own 503.
    #[error("the worker is busy")]
    Busy(Refusing),
    /// A status of `--retry-statuses`.
    #[error("the worker answered {}", .0.status)]
    Status(Refusing),
    /// vLLM's 500, or first event, of a server whose engine is dead.
    #[error("the worker's engine is dead")]
    EngineDead,
    /// 404 for a model that the worker has listed.
    #[error("the worker has lost the model")]
    ModelLost,
    /// A 200 that is no answer.
    #[error("the answer is none: {0}")]
    Unbegun(Unbegun),
    /// A whole answer that the worker has broken off (`finish_reason: "abort"`).
    #[error("the worker aborted the request")]
    Aborted,
}

/// An answer by which a worker refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusing {
    pub(crate) status: u16,
    /// How long the worker wants to be left alone, in seconds.
    pub(crate) retry_after_secs: Option<u64>,
}

impl Failure {
    /// What another attempt after it is counted as; `None`: there never is one.
    pub(crate) fn reason(&self) -> Option<Retry> {
        Some(match self {
            // nor would there be a descriptor, or memory, for a connection to another worker
            Self::Connect(error)
                if matches!(Resource::of(error), Some(Resource::Descriptors | Resource::Memory)) =>
            {
                return None;
            }
            Self::Connect(_) => Retry::Refused,
            Self::NoAnswer { reused: true } => Retry::StaleConnection,
            Self::NoAnswer { reused: false } | Self::AnswerCut => Retry::ConnectionLost,
            Self::NoSuchPath => Retry::OtherKind,
            Self::Busy(_) => Retry::Busy,
            Self::Status(_) => Retry::Status,
            Self::EngineDead | Self::Unbegun(Unbegun::EngineDead) => Retry::EngineDead,
            Self::ModelLost => Retry::ModelLost,
            Self::Unbegun(Unbegun::Error) => Retry::ErrorEvent,
            Self::Aborted | Self::Unbegun(Unbegun::Aborted) => Retry::Aborted,
            Self::Unbegun(Unbegun::Empty) => Retry::EmptyAnswer,
            Self::Request(_)
            | Self::RequestBody
            | Self::BodyTooLarge { .. }
            | Self::Late
            | Self::ClientGone
            | Self::NotAdmitted(..)
            | Self::Draining
            | Self::NoWorker
            | Self::BadAnswer(_)
            | Self::AnswerBody
            | Self::NoHead
            | Self::Unread
            | Self::Stalled
            | Self::TotalTime
            | Self::Unexpected(_) => return None,
        })
    }

    /// Whether the worker is out until a probe says otherwise. A reused connection that was closed says
    /// nothing; nor does anything that the client may have caused.
    pub(crate) fn condemns(&self) -> bool {
        match self {
            Self::Connect(error) => !ours(error),
            Self::EngineDead | Self::Unbegun(Unbegun::EngineDead) => true,
            _ => false,
        }
    }

    /// Whether something looks wrong with the worker, so that it should be looked at now.
    pub(crate) fn doubts(&self) -> bool {
        matches!(
            self,
            Self::NoAnswer { reused: false }
                | Self::AnswerCut
                | Self::ModelLost
                | Self::Aborted
                | Self::Unbegun(_)
        )
    }

    /// For how long others are preferred to the worker, in milliseconds. Whoever fails or refuses does so faster than
    /// others work, and would look idle meanwhile. A client that brings this about for all workers changes nothing.
    pub(super) fn sets_back_ms(&self) -> Option<u64> {
        match self {
            Self::Busy(refusing) => {
                let asked_for = refusing.retry_after_secs.unwrap_or(1).clamp(1, MOST_SET_BACK_SECS);
                Some(asked_for * 1000)
            }
            Self::Unbegun(_) => Some(SET_BACK_MS),
            Self::Connect(_) | Self::NoAnswer { reused: true } => None,
            _ if self.is_transport() => Some(SET_BACK_MS),
            _ => None,
        }
    }

    /// The status by which an answer is counted that is passed on although it is this failure.
    pub(crate) fn counted_as(&self, status: u16) -> u16 {
        if matches!(self, Self::Aborted | Self::Unbegun(_)) { 502 } else { status }
    }

    /// Whether the worker has certainly not seen the request.
    pub(crate) fn is_unsent(&self) -> bool {
        matches!(self, Self::Connect(_))
    }

    /// Whether it is counted as the worker's transport error.
    pub(crate) fn is_transport(&self) -> bool {
        matches!(
            self,
            Self::Connect(_)
                | Self::NoAnswer { .. }
                | Self::BadAnswer(_)
                | Self::AnswerCut
                | Self::AnswerBody
                | Self::Unexpected(_)
        )
    }
}

/// Errors of connecting that are this host's, not the worker's: no free descriptor, port or memory
/// (`faults.md` P3, P4).
fn ours(error: &io::Error) -> bool {
    Resource::of(error).is_some()
}
