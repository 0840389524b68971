//! Many vLLM servers behind one address that behaves exactly like one vLLM.

pub mod base;
pub mod config;
pub mod control;
pub mod healthcheck;
pub mod net;
pub mod proxy;
pub mod shard;
pub mod telemetry;
pub mod upstream;
pub mod workers;
