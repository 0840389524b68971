//! The vLLM servers behind the proxy, as values that every thread can read.
//!
//! The control thread owns the mutable truth (the [`Registry`]) and publishes an immutable [`Fleet`] after
//! every change; shards read the newest one through a [`FleetHandle`] without a lock. What changes with every
//! request (requests in flight, health, counters) lives in atomics of the [`Worker`] itself, so a new fleet
//! forgets nothing.

mod fleet;
mod registry;
mod url;
mod worker;

pub use fleet::{Fleet, FleetHandle, Model, Resolved};
pub use registry::{Learnt, ModelSettings, Registry};
pub use url::{UrlError, WorkerUrl};
pub use worker::{Addresses, Health, InFlight, Worker, WorkerCounters};
