//! Every metric that `/metrics` shows, a row each.

use std::{
    fmt,
    sync::{OnceLock, atomic::Ordering},
};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeGaugeValue, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{
    AcceptError, Break, Ejection, ProbeVerdict, Reader, Refusal, Retry, Scrape, ShardMetrics, Shed,
    StatusClass, TTFB_BUCKETS_MICROS, WorkerSample,
};
use crate::telemetry::Resource;

/// What kind of metric a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; shown with `_total` behind its name.
    Counter,
    /// A value of this moment.
    Gauge,
    /// A distribution, in buckets.
    Histogram,
}

/// How a row's values are read.
#[derive(Debug, Clone, Copy)]
enum Values {
    /// A figure of the process.
    One(fn(&Scrape) -> u64),
    /// A figure of each worker.
    PerWorker(fn(&WorkerSample) -> u64),
    /// A figure that a worker may not tell.
    IfTold(fn(&WorkerSample) -> Option<f64>),
    /// Figures of each worker, one for each value of a label.
    PerWord(&'static str, fn() -> Vec<&'static str>, fn(&WorkerSample) -> &[u64]),
    /// A figure of each policy with each worker: by position in the table of policies.
    PerPolicy(fn(&WorkerSample) -> &[u64]),
    /// Labels of its own.
    Labelled(fn(&Scrape, &mut MetricEncoder<'_>) -> fmt::Result),
}

/// One metric.
#[derive(Debug)]
pub struct Row {
    /// Its name without the `_total` of counters.
    pub name: &'static str,
    /// What it counts, as scrapers show it.
    pub help: &'static str,
    /// Its kind.
    pub kind: Kind,
    values: Values,
}

/// Every metric, in the order of a scrape.
pub const CATALOGUE: &[Row] = &[
    Row {
        name: "vllm_proxy_build_info",
        help: "The version that runs",
        kind: Kind::Gauge,
        values: Values::Labelled(|_, metric| gauge(metric, &[("version", env!("CARGO_PKG_VERSION"))], 1)),
    },
    Row {
        name: "vllm_proxy_io_backend",
        help: "What drives the sockets: 1 for the backend in use",
        kind: Kind::Gauge,
        values: Values::Labelled(|scrape, metric| {
            let used = scrape.metrics.backend.get();
            ["io_uring", "epoll"].into_iter().try_for_each(|backend| {
                gauge(metric, &[("backend", backend)], u64::from(used == Some(&backend)))
            })
        }),
    },
    Row {
        name: "vllm_proxy_shards",
        help: "Shards, each a pinned thread",
        kind: Kind::Gauge,
        values: Values::One(|scrape| scrape.metrics.shards.len() as u64),
    },
    Row {
        name: "vllm_proxy_requests",
        help: "Requests that ended, by endpoint and class of the status that the client got; 499 is a client that went away",
        kind: Kind::Counter,
        values: Values::Labelled(requests),
    },
    Row {
        name: "vllm_proxy_requests_in_flight",
        help: "Requests that are being served now, the one for this page among them",
        kind: Kind::Gauge,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.in_flight())),
    },
    Row {
        name: "vllm_proxy_connections_open",
        help: "Connections of clients that are open now, the one that asks for this page among them",
        kind: Kind::Gauge,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.connections_open())),
    },
    Row {
        name: "vllm_proxy_connections",
        help: "Connections of clients that were accepted",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.connections())),
    },
    Row {
        name: "vllm_proxy_connections_max",
        help: "Connections of clients that may be open: half of the open files that are left for them, since each may need one to a worker",
        kind: Kind::Gauge,
        values: Values::One(|scrape| {
            scrape.metrics.open_files.get().map_or(0, |files| files.most_connections)
        }),
    },
    Row {
        name: "vllm_proxy_accept_errors",
        help: "Connections of clients that could not be accepted, by reason",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            AcceptError::ALL.iter().try_for_each(|reason| {
                let count = scrape.metrics.sum(|shard| shard.accept_errors(*reason));
                counter(metric, &[("reason", reason.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_shed_connections",
        help: "Connections of clients that were closed with no more than a 503, by what was short",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            Shed::ALL.iter().try_for_each(|reason| {
                let count = scrape.metrics.sum(|shard| shard.sheds(*reason));
                counter(metric, &[("reason", reason.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_open_files",
        help: "Open files of the process; every connection of a client takes one, and every connection to a worker",
        kind: Kind::Gauge,
        values: Values::One(|scrape| scrape.metrics.open_files.get().map_or(0, |files| (files.read)())),
    },
    Row {
        name: "vllm_proxy_open_files_max",
        help: "Limit of open files of the process",
        kind: Kind::Gauge,
        values: Values::One(|scrape| scrape.metrics.open_files.get().map_or(0, |files| files.most)),
    },
    Row {
        name: "vllm_proxy_shortages",
        help: "Times that a connection could not be made or accepted because this host was out of something",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            Resource::ALL.iter().try_for_each(|resource| {
                let count = scrape.metrics.shortages.total(*resource);
                counter(metric, &[("resource", resource.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_shard_stalls",
        help: "Times that a shard was found not to come round for seconds: something blocks its thread",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.stalls())),
    },
    Row {
        name: "vllm_proxy_received_bytes",
        help: "Bytes received from clients",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.received_bytes())),
    },
    Row {
        name: "vllm_proxy_sent_bytes",
        help: "Bytes sent to clients",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.sent_bytes())),
    },
    Row {
        name: "vllm_proxy_time_to_first_byte_seconds",
        help: "Time from a request's first byte to its answer's first byte",
        kind: Kind::Histogram,
        values: Values::Labelled(|scrape, metric| {
            histogram(scrape, metric, ShardMetrics::ttfb_bucket, ShardMetrics::ttfb_sum_micros)
        }),
    },
    Row {
        name: "vllm_proxy_retries",
        help: "Further attempts, by what made them necessary",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            Retry::ALL.iter().try_for_each(|reason| {
                let count = scrape.metrics.sum(|shard| shard.retries(*reason));
                counter(metric, &[("reason", reason.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_retries_exhausted",
        help: "Failures that were passed on because there was no further attempt or no other worker left, by what another attempt would have been made for",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            Retry::ALL.iter().try_for_each(|reason| {
                let count = scrape.metrics.sum(|shard| shard.exhausted(*reason));
                counter(metric, &[("reason", reason.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_retries_over_budget",
        help: "Failures that were passed on because too many requests were being tried again already",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.over_budget())),
    },
    Row {
        name: "vllm_proxy_refused_requests",
        help: "Requests that got an error of the proxy's own, by reason",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            Refusal::ALL.iter().try_for_each(|reason| {
                let count = scrape.metrics.sum(|shard| shard.refusals(*reason));
                counter(metric, &[("reason", reason.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_panic_choices",
        help: "Requests sent to a worker that should not be used (down, or its breaker open), because none was left that should",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.panic_choices())),
    },
    Row {
        name: "vllm_proxy_broken_answers",
        help: "Answers that broke off after they had begun, by reason; a stream of events was ended with an error event where that was possible",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            Break::ALL.iter().try_for_each(|reason| {
                let count = scrape.metrics.sum(|shard| shard.breaks(*reason));
                counter(metric, &[("reason", reason.label())], count)
            })
        }),
    },
    Row {
        name: "vllm_proxy_queue_depth",
        help: "Requests that wait to be let in now",
        kind: Kind::Gauge,
        values: Values::One(|scrape| told(&scrape.metrics.queue_depth)),
    },
    Row {
        name: "vllm_proxy_slots",
        help: "Requests that may be served at a time now: --max-concurrent-requests, or this proxy's part of --fleet-max-concurrent-requests; 0 without a limit",
        kind: Kind::Gauge,
        values: Values::One(|scrape| told(&scrape.metrics.slots)),
    },
    Row {
        name: "vllm_proxy_slots_in_use",
        help: "Requests that hold one of these slots now",
        kind: Kind::Gauge,
        values: Values::One(|scrape| told(&scrape.metrics.slots_in_use)),
    },
    Row {
        name: "vllm_proxy_queue_wait_seconds",
        help: "Time that requests which had to wait to be let in have waited, until then or until they went",
        kind: Kind::Histogram,
        values: Values::Labelled(|scrape, metric| {
            histogram(scrape, metric, ShardMetrics::queue_bucket, ShardMetrics::queue_sum_micros)
        }),
    },
    Row {
        name: "vllm_proxy_body_memory_bytes",
        help: "Bytes of request bodies in memory now, those up to 64 KiB not counted",
        kind: Kind::Gauge,
        values: Values::One(|scrape| told(&scrape.metrics.body_bytes)),
    },
    Row {
        name: "vllm_proxy_panics",
        help: "Tasks that panicked; each cost its connection",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sum(|shard| shard.panics())),
    },
    Row {
        name: "vllm_proxy_dropped_log_lines",
        help: "Log lines dropped because their queue was full",
        kind: Kind::Counter,
        values: Values::One(|scrape| told(&scrape.metrics.dropped_lines)),
    },
    Row {
        name: "vllm_proxy_redis_up",
        help: "Whether Redis is in use; 0 also where none is set",
        kind: Kind::Gauge,
        values: Values::One(|scrape| {
            let exchange = scrape.metrics.sync.get();
            exchange.map_or(0, |exchange| exchange.figures.up.load(Ordering::Relaxed).into())
        }),
    },
    Row {
        name: "vllm_proxy_redis_lag_seconds",
        help: "How long the last of this process's own batches took through Redis and back",
        kind: Kind::Gauge,
        values: Values::Labelled(|scrape, metric| {
            gauge(metric, &[], seconds(scrape.metrics.synced(|figures| &figures.lag_micros)))
        }),
    },
    Row {
        name: "vllm_proxy_redis_losses",
        help: "Times that Redis could not be used any more",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.synced(|figures| &figures.losses)),
    },
    Row {
        name: "vllm_proxy_redis_sent_events",
        help: "Events that other proxies were told through Redis",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.synced(|figures| &figures.events_sent)),
    },
    Row {
        name: "vllm_proxy_redis_sent_bytes",
        help: "Bytes of batches that were added to the stream in Redis",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.synced(|figures| &figures.bytes_sent)),
    },
    Row {
        name: "vllm_proxy_redis_received_events",
        help: "Events that other proxies told through Redis",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.synced(|figures| &figures.events_received)),
    },
    Row {
        name: "vllm_proxy_redis_received_bytes",
        help: "Bytes of batches of other proxies that were read from Redis",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.synced(|figures| &figures.bytes_received)),
    },
    Row {
        name: "vllm_proxy_redis_dropped_events",
        help: "Events that other proxies are not told because their queue was full",
        kind: Kind::Counter,
        values: Values::One(|scrape| scrape.metrics.sync.get().map_or(0, |exchange| (exchange.dropped)())),
    },
    Row {
        name: "vllm_proxy_redis_skipped_batches",
        help: "Batches in Redis that were not read, or not to their end: of another version, or malformed",
        kind: Kind::Counter,
        values: Values::Labelled(|scrape, metric| {
            let version = scrape.metrics.synced(|figures| &figures.skipped_version);
            counter(metric, &[("reason", "version")], version)?;
            let malformed = scrape.metrics.synced(|figures| &figures.skipped_malformed);
            counter(metric, &[("reason", "malformed")], malformed)
        }),
    },
    Row {
        name: "vllm_proxy_peers",
        help: "Other proxies on the same Redis that are heard",
        kind: Kind::Gauge,
        values: Values::One(|scrape| scrape.metrics.synced(|figures| &figures.peers)),
    },
    Row {
        name: "vllm_proxy_worker_health",
        help: "Whether a worker takes requests",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.healthy)),
    },
    Row {
        name: "vllm_proxy_worker_breaker_state",
        help: "What a worker's breaker does: 0 closed, 1 open, 2 half-open",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.breaker)),
    },
    Row {
        name: "vllm_proxy_worker_asleep",
        help: "Whether a worker sleeps, which keeps requests away from it",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.asleep)),
    },
    Row {
        name: "vllm_proxy_worker_paused",
        help: "Whether a worker is paused, which keeps requests away from it",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.paused)),
    },
    Row {
        name: "vllm_proxy_worker_ejections",
        help: "Times that a worker was taken out, by reason",
        kind: Kind::Counter,
        values: Values::PerWord(
            "reason",
            || Ejection::ALL.iter().map(|reason| reason.label()).collect(),
            |worker| &worker.ejections,
        ),
    },
    Row {
        name: "vllm_proxy_worker_probes",
        help: "Probes of a worker, by what they found",
        kind: Kind::Counter,
        values: Values::PerWord(
            "verdict",
            || ProbeVerdict::ALL.iter().map(|verdict| verdict.label()).collect(),
            |worker| &worker.probes,
        ),
    },
    Row {
        name: "vllm_proxy_worker_in_flight",
        help: "Requests of this process that run on a worker now",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.in_flight)),
    },
    Row {
        name: "vllm_proxy_worker_peer_requests",
        help: "Requests of other proxies that run on a worker now, as they tell through Redis",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.peers)),
    },
    Row {
        name: "vllm_proxy_worker_attempts",
        help: "Attempts on a worker",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.attempts),
    },
    Row {
        name: "vllm_proxy_worker_transport_errors",
        help: "Attempts on a worker that ended in a refused connect, a reset or a malformed answer",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.transport_errors),
    },
    Row {
        name: "vllm_proxy_worker_connects",
        help: "Connections opened to a worker",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.connects),
    },
    Row {
        name: "vllm_proxy_worker_selections",
        help: "Times that a policy chose a worker",
        kind: Kind::Counter,
        values: Values::PerPolicy(|worker| &worker.selections),
    },
    Row {
        name: "vllm_proxy_worker_queued_tokens",
        help: "What a worker has to compute for requests of this process that have no first token yet, in prompt tokens: without those believed to be in its prefix cache, and those behind a long context for more than one",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| worker.queued_tokens),
    },
    Row {
        name: "vllm_proxy_worker_decode_tokens",
        help: "Prompt tokens of requests of this process that a worker generates for",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| worker.decode_tokens),
    },
    Row {
        name: "vllm_proxy_worker_engine_running",
        help: "Requests that a worker computes, as it said last",
        kind: Kind::Gauge,
        values: Values::IfTold(|worker| worker.engine_running.map(f64::from)),
    },
    Row {
        name: "vllm_proxy_worker_engine_waiting",
        help: "Requests that wait in a worker, as it said last",
        kind: Kind::Gauge,
        values: Values::IfTold(|worker| worker.engine_waiting.map(f64::from)),
    },
    Row {
        name: "vllm_proxy_worker_kv_cache_usage_ratio",
        help: "Share of a worker's KV cache in use, 0 to 1, as it said last",
        kind: Kind::Gauge,
        values: Values::IfTold(|worker| worker.kv_usage),
    },
    Row {
        name: "vllm_proxy_worker_cache_tokens",
        help: "Tokens that a worker's prefix cache holds, as it says",
        kind: Kind::Gauge,
        values: Values::IfTold(|worker| worker.cache_tokens.map(|tokens| tokens as f64)),
    },
    Row {
        name: "vllm_proxy_worker_block_tokens",
        help: "Tokens of a block of a worker's prefix cache, which holds whole blocks only, as it says",
        kind: Kind::Gauge,
        values: Values::IfTold(|worker| worker.block_tokens.map(f64::from)),
    },
    Row {
        name: "vllm_proxy_worker_foreign_requests",
        help: "Requests on a worker that did not come through this process",
        kind: Kind::Gauge,
        values: Values::PerWorker(|worker| u64::from(worker.foreign)),
    },
    Row {
        name: "vllm_proxy_worker_prompt_tokens",
        help: "Tokens of the prompts sent to a worker, as they were estimated",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.prompt_tokens),
    },
    Row {
        name: "vllm_proxy_worker_predicted_cached_tokens",
        help: "Tokens of the prompts sent to a worker that were believed to be in its prefix cache",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.predicted_cached_tokens),
    },
    Row {
        name: "vllm_proxy_worker_reported_prompt_tokens",
        help: "Tokens of the prompts for which a worker told how many of them were cached",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.reported_prompt_tokens),
    },
    Row {
        name: "vllm_proxy_worker_reported_cached_tokens",
        help: "Tokens of prompts that a worker found in its prefix cache, as its answers say",
        kind: Kind::Counter,
        values: Values::PerWorker(|worker| worker.reported_cached_tokens),
    },
];

impl Row {
    /// Whether its series appear with the workers.
    pub fn per_worker(&self) -> bool {
        matches!(
            self.values,
            Values::PerWorker(_) | Values::IfTold(_) | Values::PerPolicy(_) | Values::PerWord(..)
        )
    }

    pub(super) fn encode(&self, scrape: &Scrape, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        let mut metric = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        match self.values {
            Values::One(read) => self.value(&mut metric, &[], read(scrape)),
            Values::PerWorker(read) => scrape.workers.iter().try_for_each(|worker| {
                self.value(&mut metric, &[("worker", worker.worker.as_str())], read(worker))
            }),
            Values::IfTold(read) => scrape.workers.iter().try_for_each(|worker| match read(worker) {
                Some(value) => gauge(&mut metric, &[("worker", worker.worker.as_str())], value),
                None => Ok(()),
            }),
            Values::PerWord(label, words, read) => scrape.workers.iter().try_for_each(|worker| {
                words().into_iter().zip(read(worker)).try_for_each(|(word, &count)| {
                    counter(&mut metric, &[("worker", worker.worker.as_str()), (label, word)], count)
                })
            }),
            Values::PerPolicy(read) => scrape
                .workers
                .iter()
                .try_for_each(|worker| per_policy(scrape, &mut metric, worker, read(worker))),
            Values::Labelled(encode) => encode(scrape, &mut metric),
        }
    }

    fn value(&self, metric: &mut MetricEncoder<'_>, labels: &[(&str, &str)], value: u64) -> fmt::Result {
        match self.kind {
            Kind::Counter => counter(metric, labels, value),
            Kind::Gauge | Kind::Histogram => gauge(metric, labels, value),
        }
    }
}

fn counter(metric: &mut MetricEncoder<'_>, labels: &[(&str, &str)], value: u64) -> fmt::Result {
    if labels.is_empty() {
        return metric.encode_counter::<NoLabelSet, _, u64>(&value, None);
    }
    metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn gauge(
    metric: &mut MetricEncoder<'_>,
    labels: &[(&str, &str)],
    value: impl EncodeGaugeValue,
) -> fmt::Result {
    if labels.is_empty() {
        return metric.encode_gauge(&value);
    }
    metric.encode_family(&labels)?.encode_gauge(&value)
}

fn per_policy(
    scrape: &Scrape,
    metric: &mut MetricEncoder<'_>,
    worker: &WorkerSample,
    counts: &[u64],
) -> fmt::Result {
    let policies = scrape.metrics.policies.get().into_iter().flatten();
    for (&(policy, used), &count) in policies.zip(counts) {
        if used || count > 0 {
            counter(metric, &[("worker", worker.worker.as_str()), ("policy", policy)], count)?;
        }
    }
    Ok(())
}

fn requests(scrape: &Scrape, metric: &mut MetricEncoder<'_>) -> fmt::Result {
    for (row, endpoint) in scrape.metrics.endpoints.iter().enumerate() {
        for class in StatusClass::ALL {
            let count = scrape.metrics.sum(|shard| shard.requests(row, *class));
            let labels = [("endpoint", *endpoint), ("code", class.label())];
            counter(metric, &labels, count)?;
        }
    }
    Ok(())
}

/// What somebody else counts; 0 until it was said who.
fn told(reader: &OnceLock<Reader>) -> u64 {
    reader.get().map_or(0, |read| read())
}

/// A distribution over the buckets of [`TTFB_BUCKETS_MICROS`].
fn histogram(
    scrape: &Scrape,
    metric: &mut MetricEncoder<'_>,
    bucket: fn(&ShardMetrics, usize) -> u64,
    sum_micros: fn(&ShardMetrics) -> u64,
) -> fmt::Result {
    let bounds = TTFB_BUCKETS_MICROS.iter().map(|micros| seconds(*micros)).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds
        .enumerate()
        .map(|(at, bound)| (bound, scrape.metrics.sum(|shard| bucket(shard, at))))
        .collect();
    let count = buckets.iter().map(|(_, count)| count).sum();
    let sum = seconds(scrape.metrics.sum(sum_micros));
    metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

/// Microseconds as seconds; exact enough up to 2^53 µs (285 years).
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}
