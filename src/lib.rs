//! Many vLLM servers behind one address that behaves exactly like one vLLM.

pub mod admin;
pub mod base;
pub mod config;
pub mod control;
pub mod demo;
pub mod net;
pub mod proxy;
pub mod shard;
pub mod telemetry;
pub mod upstream;
pub mod vllm;
pub mod workers;
