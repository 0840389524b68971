//! The vLLM servers behind the proxy, as values that every thread can read.
//!
//! The control thread owns the mutable truth (the [`Registry`]) and publishes an immutable [`Fleet`] after
//! every change; shards read the newest one through a [`FleetHandle`] without a lock. What changes with every
//! request (requests in flight, health, counters) lives in atomics of the [`Worker`] itself, so a new fleet
//! forgets nothing.

mod breaker;
mod engine;
mod fleet;
mod load;
mod registry;
mod settings;
mod spec;
mod stored;
mod url;
mod worker;

pub use breaker::{Breaker, BreakerRules, BreakerState, MOST_FAILURES, Trial, Turn};
pub use engine::{Engine, EngineStats};
pub use fleet::{Fleet, FleetHandle, Model, Resolved, Standing};
pub use load::{Demand, InFlight, Load};
pub use registry::{Learnt, ModelSettings, Registry};
pub use settings::Settings;
pub use spec::{Traits, WorkerSpec};
pub use stored::StoredResponses;
pub use url::{UrlError, WorkerUrl};
pub use worker::{Addresses, Health, MAX_POLICIES, Rest, Worker, WorkerCounters};
