//! What one shard counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the histogram of times to the first byte, in microseconds: vLLM's own buckets of
/// `vllm:time_to_first_token_seconds` (`operations.md` §4.2), so that both lie over each other in one panel.
pub const TTFB_BUCKETS_MICROS: [u64; 22] = [
    1_000,
    5_000,
    10_000,
    20_000,
    40_000,
    60_000,
    80_000,
    100_000,
    250_000,
    500_000,
    750_000,
    1_000_000,
    2_500_000,
    5_000_000,
    7_500_000,
    10_000_000,
    20_000_000,
    40_000_000,
    80_000_000,
    160_000_000,
    640_000_000,
    2_560_000_000,
];

/// An enum that is a metric label: its values in order, and a word for each.
macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$value_doc])* $value,)* }

        impl $name {
            /// All values, each at the position of its discriminant.
            pub const ALL: &'static [Self] = &[$(Self::$value,)*];

            /// The word of the metric label.
            pub fn label(self) -> &'static str {
                match self { $(Self::$value => $label,)* }
            }
        }
    };
}

labels! {
    /// Statuses in groups, as a label: bounded, and what dashboards ask for.
    StatusClass {
        /// Switching protocols: the only 1xx that ends an exchange.
        Informational = "1xx",
        /// 2xx.
        Success = "2xx",
        /// 3xx.
        Redirect = "3xx",
        /// 4xx but 499.
        Client = "4xx",
        /// 5xx, and whatever is no status.
        Server = "5xx",
        /// 499: the client went away before the answer was complete.
        ClientGone = "499",
    }
}

impl StatusClass {
    /// The group of a status.
    pub fn of(status: u16) -> Self {
        match status {
            499 => Self::ClientGone,
            100..=199 => Self::Informational,
            200..=299 => Self::Success,
            300..=399 => Self::Redirect,
            400..=498 => Self::Client,
            _ => Self::Server,
        }
    }
}

labels! {
    /// Why another attempt was made.
    Retry {
        /// The worker could not be connected to: refused, unreachable or timed out.
        Refused = "connect_refused",
        /// A reused connection died before its first answer byte.
        StaleConnection = "stale_connection",
        /// The worker does not have the path; one of another kind may.
        OtherKind = "other_kind",
        /// A fresh connection died after the request was sent, before an answer had begun.
        ConnectionLost = "connection_lost",
        /// The worker had too much to do: 429, or vLLM's own 503.
        Busy = "busy",
        /// A status of `--retry-statuses`.
        Status = "status",
        /// The worker's engine is dead.
        EngineDead = "engine_dead",
        /// The worker does not have a model any more that it had listed.
        ModelLost = "model_lost",
        /// An error stood where the text should begin.
        ErrorEvent = "error_event",
        /// The worker broke the request off (`finish_reason: "abort"`).
        Aborted = "aborted",
        /// The answer ended without having said anything.
        EmptyAnswer = "empty_answer",
    }
}

labels! {
    /// Why an answer that had begun did not come to its proper end.
    Break {
        /// The worker closed or reset its connection before the end.
        WorkerBroke = "worker_broke",
        /// The worker's chunked coding broke.
        BadCoding = "bad_coding",
        /// The worker ended a stream of events before the first one.
        Empty = "empty",
        /// Nothing came from the worker for `--stream-idle-timeout-secs`.
        IdleTimeout = "idle_timeout",
        /// `--request-timeout-secs` were over.
        TotalTimeout = "total_timeout",
        /// The time for draining was over.
        Draining = "draining",
        /// The client took nothing for `--write-timeout-secs`.
        SlowClient = "slow_client",
        /// The worker itself ended a stream with an error.
        WorkerError = "worker_error",
    }
}

labels! {
    /// Why we answered a request with an error of our own.
    Refusal {
        /// The bytes are no legal HTTP/1.1 (400).
        Malformed = "malformed",
        /// Head, field count or target over the limit (431, 414).
        HeadTooLarge = "head_too_large",
        /// Body over the limit (413).
        BodyTooLarge = "body_too_large",
        /// Head or body came too slowly (408).
        ClientTimeout = "client_timeout",
        /// A path or method that we answer ourselves and do not have (404, 405).
        UnknownPath = "unknown_path",
        /// No worker has the model (404).
        UnknownModel = "unknown_model",
        /// No worker could be reached, or none is usable (502, 503).
        NoWorker = "no_worker",
        /// A worker's answer could not be used (502).
        BadAnswer = "bad_answer",
        /// A worker did not answer in time (504).
        WorkerTimeout = "worker_timeout",
        /// The request took longer than it may in all (504).
        RequestTimeout = "request_timeout",
        /// We are shutting down (503).
        Draining = "draining",
        /// A limit of ours on connections or memory (429, 503).
        Overload = "overload",
        /// More requests a second than are let in (429).
        RateLimit = "rate_limit",
        /// All slots are in use, and as many requests wait as may (429).
        QueueFull = "queue_full",
        /// Waited for a slot for too long (429).
        QueueTimeout = "queue_timeout",
        /// All workers of the model have as many requests as they may, and as many wait as may (503).
        WorkersBusy = "workers_busy",
        /// Waited for one of these for too long (503).
        WorkersTimeout = "workers_timeout",
        /// The memory for request bodies is used up (503).
        BodyMemory = "body_memory",
    }
}

labels! {
    /// Why a worker was taken out.
    Ejection {
        /// A request could not connect to it.
        Connect = "connect",
        /// A request was answered that its engine is dead.
        EngineDead = "engine_dead",
        /// A probe found it unreachable, or it said that it does not serve.
        Probe = "probe",
        /// Several probes in a row were not answered in time.
        LateProbes = "late_probes",
        /// Too many of its last probes failed.
        SuccessRate = "success_rate",
        /// Its last probes took too long.
        ResponseTime = "response_time",
        /// Its breaker opened.
        Breaker = "breaker",
    }
}

labels! {
    /// Why a connection of a client could not be accepted.
    AcceptError {
        /// No free descriptor, of the process or of the host (`EMFILE`, `ENFILE`).
        Descriptors = "descriptors",
        /// No memory for another socket (`ENOBUFS`, `ENOMEM`).
        Memory = "memory",
        /// The client was gone before (`ECONNABORTED` and errors of the network, `accept(2)`).
        Aborted = "aborted",
        /// Anything else.
        Other = "other",
    }
}

labels! {
    /// What a probe found.
    ProbeVerdict {
        /// The worker serves.
        Good = "good",
        /// It says that it does not, or cannot be reached.
        Bad = "bad",
        /// It did not answer in time.
        Late = "late",
    }
}

labels! {
    /// Why a connection of a client was closed with no more than a 503.
    Shed {
        /// It was let in on the last descriptor, which is kept for that.
        Descriptors = "descriptors",
        /// As many clients as the limit of open files allows are connected.
        Limit = "limit",
    }
}

/// One shard's counters. Only the shard writes (its `stalls` the watchdog); anybody may read. A slot lies on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub struct ShardMetrics {
    /// Row of an endpoint times [`StatusClass::ALL`]'s length, plus the class.
    requests: Box<[AtomicU64]>,
    /// Rows in `requests`, the last one for unknown endpoints. At least 1.
    endpoints: usize,
    in_flight: AtomicU64,
    connections_open: AtomicU64,
    connections: AtomicU64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    /// Indexed like [`TTFB_BUCKETS_MICROS`], and what is above all of them last. Not cumulative.
    ttfb: [AtomicU64; TTFB_BUCKETS_MICROS.len() + 1],
    ttfb_sum_micros: AtomicU64,
    /// As `ttfb`: the time that requests waited to be let in.
    queue: [AtomicU64; TTFB_BUCKETS_MICROS.len() + 1],
    queue_sum_micros: AtomicU64,
    retries: [AtomicU64; Retry::ALL.len()],
    retries_exhausted: [AtomicU64; Retry::ALL.len()],
    retries_over_budget: AtomicU64,
    refusals: [AtomicU64; Refusal::ALL.len()],
    breaks: [AtomicU64; Break::ALL.len()],
    panics: AtomicU64,
    panic_choices: AtomicU64,
    accept_errors: [AtomicU64; AcceptError::ALL.len()],
    shed: [AtomicU64; Shed::ALL.len()],
    ticks: AtomicU64,
    /// The one figure that another thread writes: the one that watches.
    stalls: AtomicU64,
}

fn zeros<const N: usize>() -> [AtomicU64; N] {
    std::array::from_fn(|_| AtomicU64::new(0))
}

/// Counts. With a single writer nothing can come between the load and the store, and an atomic addition would take
/// ten times as long.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(read(counter).wrapping_add(n), Ordering::Relaxed);
}

/// Counts down, as [`add`].
fn subtract(counter: &AtomicU64, n: u64) {
    counter.store(read(counter).wrapping_sub(n), Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl ShardMetrics {
    /// A slot at zero; `endpoints` counts the row for unknown ones.
    pub(super) fn new(endpoints: usize) -> Self {
        // A multiple of 128 bytes would need an aligned allocation; 16 spare cells behind the last one keep
        // the next allocation (another shard's cells) off its line.
        let cells = endpoints * StatusClass::ALL.len() + 16;
        Self {
            endpoints,
            requests: (0..cells).map(|_| AtomicU64::new(0)).collect(),
            in_flight: AtomicU64::new(0),
            connections_open: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            ttfb: zeros(),
            ttfb_sum_micros: AtomicU64::new(0),
            queue: zeros(),
            queue_sum_micros: AtomicU64::new(0),
            retries: zeros(),
            retries_exhausted: zeros(),
            retries_over_budget: AtomicU64::new(0),
            refusals: zeros(),
            breaks: zeros(),
            panics: AtomicU64::new(0),
            panic_choices: AtomicU64::new(0),
            accept_errors: zeros(),
            shed: zeros(),
            ticks: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
        }
    }

    /// A client's connection was accepted.
    pub fn connection_opened(&self) {
        add(&self.connections, 1);
        add(&self.connections_open, 1);
    }

    /// A client's connection is closed.
    pub fn connection_closed(&self) {
        subtract(&self.connections_open, 1);
    }

    /// An exchange began.
    pub fn began(&self) {
        add(&self.in_flight, 1);
    }

    /// An exchange that [`ShardMetrics::began`] is over, however.
    pub fn ended(&self) {
        subtract(&self.in_flight, 1);
    }

    /// Counts an exchange: its row in vLLM's table (anything beyond the table is `other`), the status that the
    /// client got (499: it went away), and the microseconds from the request's first byte to the answer's, if
    /// there was an answer.
    pub fn request_ended(&self, endpoint: usize, status: u16, ttfb_micros: Option<u64>) {
        let row = endpoint.min(self.endpoints - 1);
        add(&self.requests[row * StatusClass::ALL.len() + StatusClass::of(status) as usize], 1);
        if let Some(micros) = ttfb_micros {
            add(&self.ttfb[TTFB_BUCKETS_MICROS.partition_point(|bound| *bound < micros)], 1);
            add(&self.ttfb_sum_micros, micros);
        }
    }

    /// A request has waited so long to be let in, whether it was or not.
    pub fn queued(&self, micros: u64) {
        add(&self.queue[TTFB_BUCKETS_MICROS.partition_point(|bound| *bound < micros)], 1);
        add(&self.queue_sum_micros, micros);
    }

    /// Bytes were received from a client.
    pub fn bytes_in(&self, bytes: u64) {
        add(&self.received_bytes, bytes);
    }

    /// Bytes were sent to a client.
    pub fn bytes_out(&self, bytes: u64) {
        add(&self.sent_bytes, bytes);
    }

    /// Another attempt is made.
    pub fn retried(&self, reason: Retry) {
        add(&self.retries[reason as usize], 1);
    }

    /// Another attempt would have been made, but there were no attempts or workers left.
    pub fn retries_exhausted(&self, reason: Retry) {
        add(&self.retries_exhausted[reason as usize], 1);
    }

    /// Another attempt would have been made, but there were too many over all traffic.
    pub fn retry_over_budget(&self) {
        add(&self.retries_over_budget, 1);
    }

    /// A request was answered with an error of our own.
    pub fn refused(&self, reason: Refusal) {
        add(&self.refusals[reason as usize], 1);
    }

    /// An answer that had begun broke off.
    pub fn broke(&self, reason: Break) {
        add(&self.breaks[reason as usize], 1);
    }

    /// A task panicked; its connection is gone.
    pub fn panicked(&self) {
        add(&self.panics, 1);
    }

    /// A worker that should not be used was chosen, because none is left that should.
    pub fn chose_in_panic(&self) {
        add(&self.panic_choices, 1);
    }

    pub(super) fn panic_choices(&self) -> u64 {
        read(&self.panic_choices)
    }

    /// A client could not be accepted.
    pub fn accept_failed(&self, error: AcceptError) {
        add(&self.accept_errors[error as usize], 1);
    }

    /// A client was turned away at the door.
    pub fn shed(&self, why: Shed) {
        add(&self.shed[why as usize], 1);
    }

    /// The shard has come round once more.
    pub fn ticked(&self) {
        add(&self.ticks, 1);
    }

    /// How often the shard has come round.
    pub fn ticks(&self) -> u64 {
        read(&self.ticks)
    }

    /// The shard was found not to come round.
    pub fn stalled(&self) {
        self.stalls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn requests(&self, endpoint: usize, class: StatusClass) -> u64 {
        read(&self.requests[endpoint * StatusClass::ALL.len() + class as usize])
    }

    pub(super) fn in_flight(&self) -> u64 {
        read(&self.in_flight)
    }

    pub(super) fn connections_open(&self) -> u64 {
        read(&self.connections_open)
    }

    pub(super) fn connections(&self) -> u64 {
        read(&self.connections)
    }

    pub(super) fn received_bytes(&self) -> u64 {
        read(&self.received_bytes)
    }

    pub(super) fn sent_bytes(&self) -> u64 {
        read(&self.sent_bytes)
    }

    pub(super) fn ttfb_bucket(&self, bucket: usize) -> u64 {
        read(&self.ttfb[bucket])
    }

    pub(super) fn ttfb_sum_micros(&self) -> u64 {
        read(&self.ttfb_sum_micros)
    }

    pub(super) fn queue_bucket(&self, bucket: usize) -> u64 {
        read(&self.queue[bucket])
    }

    pub(super) fn queue_sum_micros(&self) -> u64 {
        read(&self.queue_sum_micros)
    }

    pub(super) fn retries(&self, reason: Retry) -> u64 {
        read(&self.retries[reason as usize])
    }

    pub(super) fn exhausted(&self, reason: Retry) -> u64 {
        read(&self.retries_exhausted[reason as usize])
    }

    pub(crate) fn over_budget(&self) -> u64 {
        read(&self.retries_over_budget)
    }

    pub(super) fn refusals(&self, reason: Refusal) -> u64 {
        read(&self.refusals[reason as usize])
    }

    pub(super) fn breaks(&self, reason: Break) -> u64 {
        read(&self.breaks[reason as usize])
    }

    pub(super) fn panics(&self) -> u64 {
        read(&self.panics)
    }

    pub(super) fn accept_errors(&self, error: AcceptError) -> u64 {
        read(&self.accept_errors[error as usize])
    }

    pub(super) fn sheds(&self, why: Shed) -> u64 {
        read(&self.shed[why as usize])
    }

    pub(super) fn stalls(&self) -> u64 {
        read(&self.stalls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_class() {
        let classes =
            [101, 200, 206, 307, 404, 499, 500, 503, 0, 600].map(|status| StatusClass::of(status).label());
        assert_eq!(classes, ["1xx", "2xx", "2xx", "3xx", "4xx", "499", "5xx", "5xx", "5xx", "5xx"]);
    }

    #[test]
    fn a_bucket_holds_what_equals_its_bound() {
        let slot = ShardMetrics::new(1);
        for micros in [0, 1_000, 1_001, 2_560_000_000, 2_560_000_001] {
            slot.request_ended(0, 200, Some(micros));
        }
        assert_eq!([0, 1, 21, 22].map(|bucket| slot.ttfb_bucket(bucket)), [2, 1, 1, 1]);
    }

    #[test]
    fn labels_stand_at_their_discriminants() {
        for (at, reason) in Refusal::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, at);
        }
        for (at, class) in StatusClass::ALL.iter().enumerate() {
            assert_eq!(*class as usize, at);
        }
    }
}
