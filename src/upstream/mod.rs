//! Connections to workers: opened on demand, kept for a while, never shared between shards.

mod pool;
mod settings;

pub use pool::{ConnectFault, Connection, Pool};
pub use settings::Settings;
