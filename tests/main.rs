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
