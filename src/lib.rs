//! Many vLLM servers behind one address that behaves exactly like one vLLM.

pub mod admin;
pub mod app;
pub mod base;
pub mod config;
pub mod control;
pub mod healthcheck;
pub mod http;
pub mod net;
pub mod proxy;
pub mod routing;
pub mod shard;
pub mod telemetry;
pub mod upstream;
pub mod vllm;
pub mod workers;
