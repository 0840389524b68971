//! What can go wrong with an exchange, and whether another attempt is made: decided here and nowhere else.

use std::io;

use thiserror::Error;

use crate::{
    admission::Refused,
    http::{RequestError, ResponseError},
    telemetry::metrics::Retry,
    vllm::ErrorShape,
};

/// Attempts of one exchange at most, however many workers there are.
pub(super) const MAX_ATTEMPTS: usize = 5;

/// Why an exchange, or one attempt of it, failed.
#[derive(Debug, Error)]
pub(super) enum Failure {
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
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Tell the client.
    GiveUp,
    /// Try another worker, while there is one; the reason is counted.
    Another(Retry),
    /// Try the same worker on a fresh connection.
    Fresh(Retry),
    /// Try a worker of another kind.
    OtherKind(Retry),
}

impl Failure {
    /// Whether another attempt is safe (`faults.md` §4). Nothing has been sent to the client yet.
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            // never seen by a worker
            Self::Connect(_) => Verdict::Another(Retry::Refused),
            // a worker that closes an idle connection has not read the request
            Self::NoAnswer { reused: true } => Verdict::Fresh(Retry::StaleConnection),
            // nothing was done
            Self::NoSuchPath => Verdict::OtherKind(Retry::OtherKind),
            _ => Verdict::GiveUp,
        }
    }

    /// Whether the worker is out until a probe says otherwise. A reused connection that was closed says
    /// nothing; nor does anything that the client caused.
    pub(super) fn condemns(&self) -> bool {
        match self {
            Self::Connect(error) => !ours(error),
            Self::NoAnswer { reused: false } => true,
            _ => false,
        }
    }

    /// Whether the worker has certainly not seen the request.
    pub(super) fn is_unsent(&self) -> bool {
        matches!(self, Self::Connect(_))
    }

    /// Whether it is counted as the worker's transport error.
    pub(super) fn is_transport(&self) -> bool {
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
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::EADDRNOTAVAIL | libc::ENOBUFS | libc::ENOMEM)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(code: i32) -> Failure {
        Failure::Connect(io::Error::from_raw_os_error(code))
    }

    #[test]
    fn what_no_worker_has_seen_goes_to_another() {
        assert_eq!(connect(libc::ECONNREFUSED).verdict(), Verdict::Another(Retry::Refused));
        assert_eq!(connect(libc::ETIMEDOUT).verdict(), Verdict::Another(Retry::Refused));
    }

    #[test]
    fn a_stale_connection_is_tried_again_fresh_and_a_fresh_one_is_not() {
        assert_eq!(Failure::NoAnswer { reused: true }.verdict(), Verdict::Fresh(Retry::StaleConnection));
        assert_eq!(Failure::NoAnswer { reused: false }.verdict(), Verdict::GiveUp);
    }

    #[test]
    fn what_the_client_caused_is_never_tried_again_and_condemns_nobody() {
        for failure in
            [Failure::RequestBody, Failure::ClientGone, Failure::Late, Failure::BodyTooLarge { limit: 1 }]
        {
            assert_eq!(failure.verdict(), Verdict::GiveUp);
            assert!(!failure.condemns() && !failure.is_transport());
        }
    }

    #[test]
    fn a_shortage_of_ours_is_not_the_workers_fault() {
        assert!(connect(libc::ECONNREFUSED).condemns());
        assert!(!connect(libc::EMFILE).condemns());
        assert!(!connect(libc::EADDRNOTAVAIL).condemns());
        assert!(!Failure::NoAnswer { reused: true }.condemns());
    }
}
