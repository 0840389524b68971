//! The harness: a mock vLLM that is scriptable to the byte, a raw client, and the proxy between them.
//!
//! A test reads as its story: workers, a proxy in front of them, a client, what must hold. Dropped handles join
//! their threads and re-raise panics. Nothing waits by sleeping: gates hold an answer until the test opens
//! them, [`eventually`] looks again until a deadline.

pub(crate) mod client;
mod eventually;
pub(crate) mod head;
mod process;
mod proxy;
mod redis;
pub(crate) mod variants;
pub(crate) mod worker;

pub(crate) use client::{Client, End, Response};
pub(crate) use eventually::{eventually, patience, tick};
pub(crate) use process::{Ended, Log, binary, binary_with_log};
pub(crate) use proxy::{Builder as ProxyBuilder, Proxy, proxy};
pub(crate) use redis::{NEWS, Redis, absent_redis, redis, redis_with};
pub(crate) use variants::{Io, Variant, variants};
pub(crate) use worker::{Gate, Worker, answer, dead_url, json_answer, script, sse_event, worker};
