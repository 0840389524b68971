//! Everything that is tested from outside: a client, the proxy and mock workers, on loopback.
//!
//! Each test runs on io_uring and on epoll, with one shard and with two. `VLLM_PROXY_TEST_PATIENCE=4` makes
//! every deadline four times as long; `VLLM_PROXY_CORPORA` names the folder of the vectors.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test may stop at once, read the clock and say why it is skipped"
)]

mod support; // the harness: mock workers, raw client, the proxy in this process

mod compat; // HTTP/1.1 in both directions: framing, heads, upgrades, streams
mod corpora; // vectors of llhttp, of gunicorn and of our own, whole and split at every byte
mod disconnect; // clients that go away, clients and workers that do not read
mod failover; // workers that die: retries, ejection, return
mod models; // the way of a request by its model: lists, aliases, defaults, unknown names
mod own_answers; // /v1/models, /health, /load, broadcasts, /metrics
mod refused; // what never reaches a worker: 400, 408, 413, 414, 431
mod routing; // least requests
mod shutdown; // draining, signals
