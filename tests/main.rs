//! Everything that is tested from outside.
//!
//! The end-to-end tests put the proxy between a raw client and mock workers, on loopback, and run on io_uring
//! and on epoll, with one shard and with two. `VLLM_PROXY_TEST_PATIENCE=4` makes every deadline four times as
//! long; `VLLM_PROXY_CORPORA` names the folder of the vectors.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test may stop at once, read the clock and say why it is skipped"
)]

/// The harness: mock workers, a raw client, the proxy in this process.
mod support;

/// Who may name whom in the sources.
mod architecture;
/// HTTP/1.1 in both directions, end to end: framing, heads, connections, upgrades, streams.
mod compat;
/// Flags and environment, on the real binary.
mod config;
/// The vectors of llhttp, gunicorn and our own, through the parsers.
mod corpora;
/// Clients that go away; clients and workers that do not read.
mod disconnect;
/// What drives the sockets, and what happens where the kernel refuses it.
mod driver;
/// Workers that die: retries, ejection, return.
mod failover;
/// The table of faults, row by row.
mod faults;
/// Logs that cannot be written, on the real binary.
mod logging;
/// The way of a request by its model: lists, aliases, defaults, unknown names.
mod models;
/// What the proxy answers by itself: `/v1/models`, `/health`, `/load`, broadcasts, `/metrics`.
mod own_answers;
/// A task that panics.
mod panics;
/// Workers by name, by IPv6, below a path.
mod places;
/// Who gets a request: distribution, stickiness, spill, loss, policy by policy.
mod policies;
/// Any split of the bytes parses alike.
mod properties;
/// Data-parallel ranks of a server, and what workers and operators say of workers.
mod ranks;
/// README and `--help` say what the code says.
mod readme;
/// Several proxies on a real Redis: what they share, and what happens when it is gone.
mod redis;
/// HTTP/1.1 a second time, naively.
mod reference;
/// What never reaches a worker: 400, 408, 413, 414, 431.
mod refused;
/// One test per fixed bug. Try not to add more.
mod regression;
/// Least requests.
mod routing;
/// Draining and signals.
mod shutdown;
/// The vectors of llhttp, gunicorn and our own, through the whole proxy.
mod wire_vectors;
