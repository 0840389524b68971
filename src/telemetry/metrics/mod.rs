//! The process's own metrics: what shards count, and how `/metrics` shows it.
//!
//! Every shard has a slot of plain atomics that only it writes ([`ShardMetrics`]), on cache lines of its own;
//! a scrape reads all slots and adds them up, so counting costs a shard nothing but its own memory. What can
//! be scraped stands in one table, the [`CATALOGUE`]: a metric is a row there and the call where it happens.
//!
//! All label sets are bounded (`operations.md` §4.3): endpoints by vLLM's table, workers by configuration,
//! reasons by enums. Every series exists from the start, at 0.

mod catalogue;
mod slot;
mod sync;

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    registry::Registry,
};

use crate::telemetry::Shortages;
pub use catalogue::{CATALOGUE, Kind, Row};
pub use slot::{
    AcceptError, Break, Ejection, ProbeVerdict, Refusal, Retry, ShardMetrics, Shed, StatusClass,
    TTFB_BUCKETS_MICROS,
};

pub use sync::SyncFigures;

/// How a scrape is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// OpenMetrics, as prometheus-client writes it: what Prometheus asks for.
    OpenMetrics,
    /// Prometheus' older text format, for everybody who does not ask for OpenMetrics (`promtool`, many agents). In
    /// it, `_total` is part of a counter's name.
    Text,
}

impl Exposition {
    /// What the value of a scraper's `Accept` asks for.
    pub fn accepted(accept: Option<&str>) -> Self {
        match accept {
            Some(accept) if accept.contains("application/openmetrics-text") => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    /// The Content-Type of the format.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The label of whatever is in no table.
const OTHER: &str = "other";

/// Counts that someone else keeps.
type Reader = Box<dyn Fn() -> u64 + Send + Sync>;

/// All counters of the process.
pub struct Metrics {
    /// Indexed by shard.
    shards: Box<[ShardMetrics]>,
    /// Indexed like vLLM's table, and [`OTHER`] behind its last row.
    endpoints: Vec<&'static str>,
    backend: OnceLock<&'static str>,
    /// Names of the policies, in the order of their table, and whether each is in use.
    policies: OnceLock<Vec<(&'static str, bool)>>,
    dropped_lines: OnceLock<Reader>,
    /// Requests that wait to be let in.
    queue_depth: OnceLock<Reader>,
    /// Slots that there are.
    slots: OnceLock<Reader>,
    /// Slots in use.
    slots_in_use: OnceLock<Reader>,
    /// Bytes of request bodies in memory.
    body_bytes: OnceLock<Reader>,
    open_files: OnceLock<OpenFiles>,
    shortages: Shortages,
    sync: OnceLock<Exchange>,
}

/// What is known of the exchange with other proxies.
struct Exchange {
    figures: Arc<SyncFigures>,
    /// Events that had no room.
    dropped: Reader,
}

/// What is known of the process's open files.
struct OpenFiles {
    /// How many there are.
    read: Reader,
    /// How many there may be.
    most: u64,
    /// How many clients may be connected.
    most_connections: u64,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics")
            .field("shards", &self.shards.len())
            .field("endpoints", &self.endpoints.len())
            .finish_non_exhaustive()
    }
}

/// What a scrape says of one worker, read where the workers are known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WorkerSample {
    /// Its configured name.
    pub worker: String,
    /// Whether it takes requests.
    pub healthy: bool,
    /// What its breaker does: 0 closed, 1 open, 2 half-open.
    pub breaker: u8,
    /// Whether it sleeps.
    pub asleep: bool,
    /// Whether it is paused.
    pub paused: bool,
    /// Times that it was taken out, in the order of [`Ejection::ALL`].
    pub ejections: Vec<u64>,
    /// Probes, in the order of [`ProbeVerdict::ALL`].
    pub probes: Vec<u64>,
    /// Requests of this process that run on it now.
    pub in_flight: u32,
    /// Requests of other proxies that run on it now, as they tell.
    pub peers: u32,
    /// Attempts sent or tried to be sent.
    pub attempts: u64,
    /// Attempts that ended in a transport error.
    pub transport_errors: u64,
    /// Connections opened.
    pub connects: u64,
    /// What it has to compute for our requests that have not had their first token, in prompt tokens.
    pub queued_tokens: u64,
    /// Prompt tokens of our requests that have.
    pub decode_tokens: u64,
    /// Requests that it computes, as it says; `None`: it does not.
    pub engine_running: Option<u32>,
    /// Requests that wait in it, as it says.
    pub engine_waiting: Option<u32>,
    /// Share of its KV cache in use, 0 to 1, as it says.
    pub kv_usage: Option<f64>,
    /// Tokens that its prefix cache holds, as it says.
    pub cache_tokens: Option<u64>,
    /// Tokens of a block of its prefix cache, as it says.
    pub block_tokens: Option<u32>,
    /// Requests on it that are not ours.
    pub foreign: u32,
    /// Tokens of the prompts that were sent to it, as they were estimated.
    pub prompt_tokens: u64,
    /// Those of them that were believed to be in its prefix cache.
    pub predicted_cached_tokens: u64,
    /// Tokens of the prompts whose answer told how many were cached.
    pub reported_prompt_tokens: u64,
    /// Those of them that it found in its prefix cache.
    pub reported_cached_tokens: u64,
    /// Times that a policy chose it, in the order of the policies.
    pub selections: Vec<u64>,
}

impl Metrics {
    /// Slots for `shards` shards and the labels of vLLM's table of endpoints, in the table's order. Requests to
    /// what the table does not know are counted under the index behind its last one.
    pub fn new(shards: usize, endpoints: impl IntoIterator<Item = &'static str>) -> Self {
        let mut endpoints: Vec<&'static str> = endpoints.into_iter().collect();
        endpoints.push(OTHER);
        let shards = (0..shards).map(|_| ShardMetrics::new(endpoints.len())).collect();
        Self {
            shards,
            endpoints,
            backend: OnceLock::new(),
            policies: OnceLock::new(),
            dropped_lines: OnceLock::new(),
            open_files: OnceLock::new(),
            shortages: Shortages::default(),
            queue_depth: OnceLock::new(),
            slots: OnceLock::new(),
            slots_in_use: OnceLock::new(),
            body_bytes: OnceLock::new(),
            sync: OnceLock::new(),
        }
    }

    /// The slot of the shard with the number `index`.
    ///
    /// # Panics
    /// If there is no such shard: called when shards are started, never for a request.
    pub fn shard(&self, index: usize) -> &ShardMetrics {
        &self.shards[index]
    }

    /// Requests that are being served now, over all shards.
    pub fn in_flight(&self) -> u64 {
        self.sum(|shard| shard.in_flight())
    }

    /// Says once which kernel interface drives the sockets: `io_uring` or `epoll`.
    pub fn set_io_backend(&self, backend: &'static str) {
        self.backend.get_or_init(|| backend);
    }

    /// Says once which policies there are, in the order in which [`WorkerSample::selections`] counts them, and
    /// whether each is in use: those are shown from the start, the others once they were.
    pub fn set_policies(&self, policies: impl IntoIterator<Item = (&'static str, bool)>) {
        self.policies.get_or_init(|| policies.into_iter().collect());
    }

    /// Says once how the number of log lines that were dropped is read.
    pub fn set_dropped_lines(&self, read: impl Fn() -> u64 + Send + Sync + 'static) {
        self.dropped_lines.get_or_init(|| Box::new(read));
    }

    /// Says once how the number of open files is read, how many there may be, and how many clients may be connected.
    pub fn set_open_files(
        &self,
        most: u64,
        most_connections: u64,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) {
        self.open_files.get_or_init(|| OpenFiles { read: Box::new(read), most, most_connections });
    }

    /// What was short, and how often.
    pub fn shortages(&self) -> &Shortages {
        &self.shortages
    }

    /// Connections of clients that are open, on all shards.
    pub fn connections_open(&self) -> u64 {
        self.sum(|shard| shard.connections_open())
    }

    /// Says once how the number of requests that wait to be let in is read, that of slots, and that of those in use.
    pub fn set_admission(
        &self,
        waiting: impl Fn() -> u64 + Send + Sync + 'static,
        slots: impl Fn() -> u64 + Send + Sync + 'static,
        in_use: impl Fn() -> u64 + Send + Sync + 'static,
    ) {
        self.queue_depth.get_or_init(|| Box::new(waiting));
        self.slots.get_or_init(|| Box::new(slots));
        self.slots_in_use.get_or_init(|| Box::new(in_use));
    }

    /// Says once how the bytes of request bodies in memory are read.
    pub fn set_body_bytes(&self, read: impl Fn() -> u64 + Send + Sync + 'static) {
        self.body_bytes.get_or_init(|| Box::new(read));
    }

    /// Says once where the exchange with other proxies is counted, and how the events that had no room are read.
    pub fn set_sync(&self, figures: Arc<SyncFigures>, dropped: impl Fn() -> u64 + Send + Sync + 'static) {
        self.sync.get_or_init(|| Exchange { figures, dropped: Box::new(dropped) });
    }

    /// A figure of the exchange with other proxies; 0 where there is none.
    fn synced(&self, read: fn(&SyncFigures) -> &AtomicU64) -> u64 {
        self.sync.get().map_or(0, |sync| read(&sync.figures).load(Ordering::Relaxed))
    }

    /// The text of a scrape; of the workers it says what `workers` holds.
    ///
    /// # Errors
    /// None but the encoder's own, which a `String` never causes.
    pub fn encode(
        self: &Arc<Self>,
        format: Exposition,
        workers: Vec<WorkerSample>,
    ) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Scrape { metrics: self.clone(), workers }));
        let mut text = String::new();
        match format {
            Exposition::OpenMetrics => text::encode(&mut text, &registry)?,
            Exposition::Text => {
                text::encode_registry(&mut text, &registry)?;
                for row in CATALOGUE.iter().filter(|row| row.kind == Kind::Counter) {
                    for word in ["HELP", "TYPE"] {
                        let line = format!("# {word} {} ", row.name);
                        text = text.replacen(&line, &format!("# {word} {}_total ", row.name), 1);
                    }
                }
            }
        }
        Ok(text)
    }

    /// The sum of one figure over all shards.
    fn sum(&self, read: impl Fn(&ShardMetrics) -> u64) -> u64 {
        self.shards.iter().map(read).fold(0, u64::wrapping_add)
    }
}

/// All that one scrape shows.
#[derive(Debug)]
struct Scrape {
    metrics: Arc<Metrics>,
    workers: Vec<WorkerSample>,
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for row in CATALOGUE {
            row.encode(self, &mut encoder)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Resource;

    fn metrics() -> Arc<Metrics> {
        Arc::new(Metrics::new(2, ["/v1/chat/completions", "/health"]))
    }

    fn sample(worker: &str) -> WorkerSample {
        WorkerSample {
            worker: worker.to_owned(),
            healthy: true,
            breaker: 2,
            asleep: true,
            paused: false,
            ejections: vec![17; Ejection::ALL.len()],
            probes: vec![18; ProbeVerdict::ALL.len()],
            in_flight: 3,
            peers: 19,
            attempts: 4,
            transport_errors: 5,
            connects: 6,
            queued_tokens: 7,
            decode_tokens: 8,
            engine_running: Some(9),
            engine_waiting: Some(0),
            kv_usage: Some(0.25),
            cache_tokens: Some(4096),
            block_tokens: Some(128),
            foreign: 10,
            prompt_tokens: 11,
            predicted_cached_tokens: 12,
            reported_prompt_tokens: 13,
            reported_cached_tokens: 14,
            selections: vec![15, 0, 16],
        }
    }

    /// The value of the series that begins with `series`.
    fn value(text: &str, series: &str) -> String {
        let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|v| v.starts_with(' ')));
        line.unwrap_or_else(|| panic!("no series {series} in\n{text}"))[series.len() + 1..].to_owned()
    }

    #[test]
    fn every_series_exists_at_zero_from_the_start() {
        let text = metrics().encode(Exposition::OpenMetrics, vec![]).unwrap();
        for class in StatusClass::ALL {
            let labels = format!("endpoint=\"/v1/chat/completions\",code=\"{}\"", class.label());
            assert_eq!(value(&text, &format!("vllm_proxy_requests_total{{{labels}}}")), "0");
        }
        for reason in Retry::ALL {
            let series = format!("vllm_proxy_retries_total{{reason=\"{}\"}}", reason.label());
            assert_eq!(value(&text, &series), "0");
        }
        for reason in Refusal::ALL {
            let series = format!("vllm_proxy_refused_requests_total{{reason=\"{}\"}}", reason.label());
            assert_eq!(value(&text, &series), "0");
        }
        for reason in Break::ALL {
            let series = format!("vllm_proxy_broken_answers_total{{reason=\"{}\"}}", reason.label());
            assert_eq!(value(&text, &series), "0");
        }
        for row in CATALOGUE.iter().filter(|row| !row.per_worker()) {
            let shown = text.lines().any(|line| !line.starts_with('#') && line.starts_with(row.name));
            assert!(shown, "{} has no series", row.name);
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_scrape_adds_up_the_shards() {
        let metrics = metrics();
        for shard in 0..2 {
            let slot = metrics.shard(shard);
            slot.connection_opened();
            slot.began();
            slot.began();
            slot.bytes_in(10);
            slot.bytes_out(100);
            slot.ended();
            slot.request_ended(0, 200, Some(30_000));
            slot.retried(Retry::Refused);
            slot.refused(Refusal::UnknownModel);
            slot.panicked();
            slot.accept_failed(AcceptError::Memory);
            slot.shed(Shed::Limit);
            slot.stalled();
        }
        metrics.shortages().happened(Resource::Ports, 0);
        metrics.set_open_files(1000, 400, || 30);
        metrics.shard(1).connection_closed();
        let text = metrics.encode(Exposition::OpenMetrics, vec![]).unwrap();
        let chat = "endpoint=\"/v1/chat/completions\",code=\"2xx\"";
        assert_eq!(value(&text, &format!("vllm_proxy_requests_total{{{chat}}}")), "2");
        assert_eq!(value(&text, "vllm_proxy_requests_in_flight"), "2");
        assert_eq!(value(&text, "vllm_proxy_connections_open"), "1");
        assert_eq!(value(&text, "vllm_proxy_connections_total"), "2");
        assert_eq!(value(&text, "vllm_proxy_received_bytes_total"), "20");
        assert_eq!(value(&text, "vllm_proxy_sent_bytes_total"), "200");
        assert_eq!(value(&text, "vllm_proxy_panics_total"), "2");
        assert_eq!(value(&text, "vllm_proxy_retries_total{reason=\"connect_refused\"}"), "2");
        assert_eq!(value(&text, "vllm_proxy_refused_requests_total{reason=\"unknown_model\"}"), "2");
        assert_eq!(value(&text, "vllm_proxy_accept_errors_total{reason=\"memory\"}"), "2");
        assert_eq!(value(&text, "vllm_proxy_shed_connections_total{reason=\"limit\"}"), "2");
        assert_eq!(value(&text, "vllm_proxy_shortages_total{resource=\"ports\"}"), "1");
        assert_eq!(value(&text, "vllm_proxy_shard_stalls_total"), "2");
        assert_eq!(value(&text, "vllm_proxy_open_files"), "30");
        assert_eq!(value(&text, "vllm_proxy_open_files_max"), "1000");
        assert_eq!(value(&text, "vllm_proxy_connections_max"), "400");
        assert_eq!(value(&text, "vllm_proxy_time_to_first_byte_seconds_count"), "2");
        assert_eq!(value(&text, "vllm_proxy_time_to_first_byte_seconds_sum"), "0.06");
        assert_eq!(value(&text, "vllm_proxy_time_to_first_byte_seconds_bucket{le=\"0.02\"}"), "0");
        assert_eq!(value(&text, "vllm_proxy_time_to_first_byte_seconds_bucket{le=\"0.04\"}"), "2");
        assert_eq!(value(&text, "vllm_proxy_time_to_first_byte_seconds_bucket{le=\"+Inf\"}"), "2");
    }

    #[test]
    fn what_the_table_does_not_know_is_counted_as_other() {
        let metrics = metrics();
        metrics.shard(0).request_ended(2, 404, None);
        metrics.shard(0).request_ended(usize::MAX, 404, None);
        let text = metrics.encode(Exposition::OpenMetrics, vec![]).unwrap();
        let other = "endpoint=\"other\",code=\"4xx\"";
        assert_eq!(value(&text, &format!("vllm_proxy_requests_total{{{other}}}")), "2");
        assert_eq!(value(&text, "vllm_proxy_time_to_first_byte_seconds_count"), "0");
    }

    #[test]
    fn a_client_that_went_away_has_a_class_of_its_own() {
        let metrics = metrics();
        metrics.shard(0).request_ended(0, 499, None);
        let text = metrics.encode(Exposition::OpenMetrics, vec![]).unwrap();
        let chat = "endpoint=\"/v1/chat/completions\"";
        assert_eq!(value(&text, &format!("vllm_proxy_requests_total{{{chat},code=\"499\"}}")), "1");
        assert_eq!(value(&text, &format!("vllm_proxy_requests_total{{{chat},code=\"4xx\"}}")), "0");
    }

    #[test]
    fn workers_are_shown_by_their_names() {
        let metrics = metrics();
        metrics.set_io_backend("epoll");
        metrics.set_dropped_lines(|| 7);
        metrics.set_admission(|| 8, || 12, || 9);
        metrics.set_body_bytes(|| 10);
        metrics.shard(1).queued(30_000);
        let text = metrics
            .encode(Exposition::OpenMetrics, vec![sample("http://a:8000"), sample("http://b:8000")])
            .unwrap();
        for worker in ["http://a:8000", "http://b:8000"] {
            let series =
                |name: &str| value(&text, &format!("vllm_proxy_worker_{name}{{worker=\"{worker}\"}}"));
            assert_eq!(series("health"), "1");
            assert_eq!(series("breaker_state"), "2");
            assert_eq!((series("asleep"), series("paused")), ("1".to_owned(), "0".to_owned()));
            let counted = |name: &str, label: &str, word: &str| {
                value(
                    &text,
                    &format!("vllm_proxy_worker_{name}_total{{worker=\"{worker}\",{label}=\"{word}\"}}"),
                )
            };
            for reason in Ejection::ALL {
                assert_eq!(counted("ejections", "reason", reason.label()), "17");
            }
            for verdict in ProbeVerdict::ALL {
                assert_eq!(counted("probes", "verdict", verdict.label()), "18");
            }
            assert_eq!(series("in_flight"), "3");
            assert_eq!(series("peer_requests"), "19");
            assert_eq!(series("attempts_total"), "4");
            assert_eq!(series("transport_errors_total"), "5");
            assert_eq!(series("connects_total"), "6");
            assert_eq!(series("queued_tokens"), "7");
            assert_eq!(series("decode_tokens"), "8");
            assert_eq!(series("engine_running"), "9.0");
            assert_eq!(series("engine_waiting"), "0.0");
            assert_eq!(series("kv_cache_usage_ratio"), "0.25");
            assert_eq!(series("cache_tokens"), "4096.0");
            assert_eq!(series("block_tokens"), "128.0");
            assert_eq!(series("foreign_requests"), "10");
            assert_eq!(series("prompt_tokens_total"), "11");
            assert_eq!(series("predicted_cached_tokens_total"), "12");
            assert_eq!(series("reported_prompt_tokens_total"), "13");
            assert_eq!(series("reported_cached_tokens_total"), "14");
        }
        assert_eq!(value(&text, "vllm_proxy_io_backend{backend=\"epoll\"}"), "1");
        assert_eq!(value(&text, "vllm_proxy_io_backend{backend=\"io_uring\"}"), "0");
        assert_eq!(value(&text, "vllm_proxy_dropped_log_lines_total"), "7");
        assert_eq!(value(&text, "vllm_proxy_queue_depth"), "8");
        assert_eq!(value(&text, "vllm_proxy_slots"), "12");
        assert_eq!(value(&text, "vllm_proxy_slots_in_use"), "9");
        assert_eq!(value(&text, "vllm_proxy_body_memory_bytes"), "10");
        assert_eq!(value(&text, "vllm_proxy_queue_wait_seconds_sum"), "0.03");
        assert_eq!(value(&text, "vllm_proxy_queue_wait_seconds_bucket{le=\"0.02\"}"), "0");
        assert_eq!(value(&text, "vllm_proxy_queue_wait_seconds_bucket{le=\"0.04\"}"), "1");
    }

    #[test]
    fn what_a_worker_does_not_tell_is_not_shown() {
        let silent = WorkerSample { worker: "w".to_owned(), ..WorkerSample::default() };
        let text = metrics().encode(Exposition::OpenMetrics, vec![silent, sample("v")]).unwrap();
        for name in
            ["engine_running", "engine_waiting", "kv_cache_usage_ratio", "cache_tokens", "block_tokens"]
        {
            let series = |worker: &str| format!("\nvllm_proxy_worker_{name}{{worker=\"{worker}\"}} ");
            assert!(!text.contains(&series("w")) && text.contains(&series("v")), "{name}");
        }
        assert_eq!(value(&text, "vllm_proxy_worker_foreign_requests{worker=\"w\"}"), "0");
    }

    #[test]
    fn policies_are_shown_that_are_in_use_or_were() {
        let metrics = metrics();
        metrics.set_policies([("a", false), ("b", true), ("c", false), ("d", false)]);
        let text = metrics.encode(Exposition::OpenMetrics, vec![sample("w")]).unwrap();
        let series = "vllm_proxy_worker_selections_total{worker=\"w\",policy=";
        let shown: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(series)).collect();
        assert_eq!(shown, ["\"a\"} 15", "\"b\"} 0", "\"c\"} 16"]);
    }

    #[test]
    fn the_older_format_names_counters_in_full_and_has_no_end_mark() {
        let text = metrics().encode(Exposition::Text, vec![sample("w")]).unwrap();
        for row in CATALOGUE {
            let name = format!("{}{}", row.name, if row.kind == Kind::Counter { "_total" } else { "" });
            assert_eq!(text.matches(&format!("# TYPE {name} ")).count(), 1, "{name}");
            assert_eq!(text.matches(&format!("# HELP {name} ")).count(), 1, "{name}");
        }
        assert!(!text.contains("# EOF"));
    }

    #[test]
    fn a_scraper_gets_the_format_that_it_asks_for() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(Exposition::accepted(Some(prometheus)), Exposition::OpenMetrics);
        assert_eq!(Exposition::accepted(Some("*/*")), Exposition::Text);
        assert_eq!(Exposition::accepted(None), Exposition::Text);
    }

    #[test]
    fn the_exchange_is_told_as_it_is_counted() {
        let metrics = metrics();
        let figures = Arc::new(SyncFigures::default());
        metrics.set_sync(figures.clone(), || 1);
        figures.up.store(true, Ordering::Relaxed);
        for (figure, count) in [
            (&figures.lag_micros, 2_500),
            (&figures.peers, 3),
            (&figures.bytes_sent, 4),
            (&figures.bytes_received, 5),
            (&figures.events_sent, 6),
            (&figures.events_received, 7),
            (&figures.skipped_version, 8),
            (&figures.skipped_malformed, 9),
            (&figures.losses, 10),
        ] {
            figure.store(count, Ordering::Relaxed);
        }
        let text = metrics.encode(Exposition::OpenMetrics, vec![]).unwrap();
        for (series, told) in [
            ("redis_up", "1"),
            ("redis_dropped_events_total", "1"),
            ("redis_lag_seconds", "0.0025"),
            ("peers", "3"),
            ("redis_sent_bytes_total", "4"),
            ("redis_received_bytes_total", "5"),
            ("redis_sent_events_total", "6"),
            ("redis_received_events_total", "7"),
            ("redis_skipped_batches_total{reason=\"version\"}", "8"),
            ("redis_skipped_batches_total{reason=\"malformed\"}", "9"),
            ("redis_losses_total", "10"),
        ] {
            assert_eq!(value(&text, &format!("vllm_proxy_{series}")), told, "{series}");
        }
    }

    #[test]
    fn names_are_ours_unique_and_carry_their_unit() {
        let mut names: Vec<&str> = CATALOGUE.iter().map(|row| row.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        for row in CATALOGUE {
            assert!(row.name.starts_with("vllm_proxy_"), "{}", row.name);
            assert!(!row.name.ends_with("_total"), "{}: the encoder adds `_total`", row.name);
            assert!(row.kind != Kind::Histogram || row.name.ends_with("_seconds"), "{}", row.name);
        }
    }
}
