//! Many vLLM servers behind one address that behaves exactly like one vLLM.
//!
//! # Threads and what they own
//!
//! ```text
//!              one shard                                      several shards (--threads)
//!
//!  clients ──▶ ┌─────────────────────────┐         clients ──▶ SO_REUSEPORT: the kernel deals
//!              │ shard-0   pinned thread │                       │          │          │
//!              │ listener · connections  │──▶ workers       ┌────▼───┐ ┌────▼───┐ ┌────▼───┐
//!              │ upstream pools · buffers│                  │shard-0 │ │shard-1 │ │shard-2 │──▶ workers
//!              └──────▲───────────┬──────┘                  └─▲────┬─┘ └─▲────┬─┘ └─▲────┬─┘
//!              Fleet  │           │ admin paths,              │    │     │    │     │    │
//!           (arc-swap)│           │ as to a worker            └────┼─────┴────┼─────┘    │
//!              ┌──────┴───────────▼──────┐                  ┌──────┴──────────▼──────────▼─┐
//!              │ control   tokio, 1 thread│                 │ control                      │
//!              │ probes · models · DNS    │──▶ workers      └──────────────────────────────┘
//!              │ admin endpoints (axum)   │
//!              └─────────────────────────┘
//! ```
//!
//! * **Shards** ([`shard`]) own everything on the data path: a listener, the clients that it accepted, the
//!   connections to workers, the buffers. A shard never blocks, takes no lock (but one for a moment where requests
//!   have to queue, see [`admission`]) and waits for no other thread;
//!   it reads the newest [`workers::Fleet`] and counts in atomics of its own. What runs on each worker
//!   ([`workers::Load`]) and which prompts it holds ([`routing::PrefixIndex`]) all shards know together, in
//!   atomics as well.
//! * **The control thread** ([`control`]) owns the [`workers::Registry`]: it probes, learns models, reads
//!   workers' metrics, resolves names, and publishes a fleet after every change. It also serves the admin
//!   endpoints ([`admin`]) on a private socket. To a shard they are one more worker, so they stream, and are
//!   given up when the client goes, by the very same code.
//! * **The sync thread** ([`sync`]) is there where a Redis is used, and the only one that talks to it, with a second
//!   one that waits there for news: it adds what shards have put into a bounded queue ([`routing::Journal`]), and what
//!   runs on each worker, to a stream that all proxies read. Nothing waits for it but the start, and that for two seconds
//!   at most.
//! * **The main thread** starts the others ([`app`]), waits for signals, and ends the process if a shard
//!   dies. A panic within a connection costs that connection only ([`net::contain`]).
//!
//! The driver under the sockets, io_uring or epoll, is chosen once for the whole process and before anything
//! is bound ([`net::Driver`]); over epoll a shard gives what it writes in one turn to the kernel together
//! (`net/outbox/mod.rs`).
//!
//! # The way of a request
//!
//! One function tells it from top to bottom: `exchange` in `src/proxy/exchange.rs`. What it calls computes.
//!
//! 1. **Head.** A read on the client is always armed (`proxy/inbox.rs`): it waits for the next request, takes
//!    what is pipelined and notices at once when the client goes. [`http::RequestHead`] parses; what
//!    RFC 9112 forbids is refused here and reaches no worker.
//! 2. **Ours?** [`vllm::lookup`] finds the endpoint's row. `/health`, `/ping`, `/v1/models` and `/version`
//!    are answered from the fleet.
//! 3. **Body and facts** (`proxy/inspect.rs`, `proxy/body.rs`): as much of the body as the way depends on.
//!    [`vllm::scan_json`] and [`vllm::ModelField`] find the model, and where prompt and session lie, without
//!    parsing the rest.
//! 4. **Who may serve it**: [`workers::Fleet::resolve`], or vLLM's own 404. What the policy needs is read of the
//!    body ([`routing::Prompt`], [`routing::SessionKeys`]), and an alias is spliced into it.
//!    Then it is let in (`proxy/admit.rs`), where a limit is set: [`admission::Admission`] has the slots and the queue.
//! 5. **Attempts**, each on the worker that the [`routing::Router`] chooses by the model's [`routing::Policy`]:
//!    [`workers::InFlight`] counts it, [`upstream::Pool`] has a connection, head and body leave in one send
//!    (`proxy/attempt.rs`), and the answer's head is awaited at the same time. However it ends, the router hears
//!    of it.
//! 6. **Another attempt?** `proxy/retry/` decides, and nothing else does. An answer that may still turn out to be
//!    none is held back until then (`proxy/peek.rs`). What a failure says of its worker decides `proxy/judge.rs`: a
//!    breaker hears only of what the request cannot have caused.
//! 7. **Relay** (`proxy/relay.rs`): each read is sent at once out of the buffer that it was read into;
//!    [`http::ChunkTracker`] watches for the end without changing a byte, and `proxy/listener.rs` for the first
//!    token, the usage, and the id of a response that its worker stores ([`workers::StoredResponses`]). A stream of
//!    events that breaks is ended as vLLM ends its own ([`vllm::errors::stream`], [`http::EventTail`]); anything else
//!    that breaks is left without an end.
//! 8. **Account** (`proxy/account.rs`): a guard counts the exchange when it is dropped, however it ended.
//!
//! Every wait has its limit in one place, the connection's [`net::Watch`]; what each limit ends in stands in README.
//!
//! Answers that we make ourselves come from one place, `proxy/respond.rs`.
//!
//! # Where a line belongs
//!
//! `http`, `vllm`, `workers` and `routing` know no socket, clock or runtime: time and chance are arguments.
//! Only `net` and `shard` name monoio; `proxy` and `control` never name each other and meet in `workers`.
//! `tests/architecture.rs` holds the sources against that table.

pub mod admin;
pub mod admission;
pub mod app;
pub mod base;
pub mod config;
pub mod control;
pub mod demo;
pub mod healthcheck;
pub mod http;
pub mod net;
pub mod proxy;
pub mod routing;
pub mod shard;
#[cfg(test)]
mod simulation;
pub mod sync;
pub mod telemetry;
pub mod upstream;
pub mod vllm;
pub mod workers;
