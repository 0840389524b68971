//! Exchanges: a request of a client, the attempts to have it answered, and the answer.
//!
//! [`serve`] owns one client connection. `exchange` tells the way of one request from top to bottom; what it
//! calls computes.

mod account;
pub(crate) mod admit;
mod answer;
mod attempt;
mod body;
mod budget;
pub(crate) mod choice;
mod client;
mod context;
pub(crate) mod exchange;
mod failure;
mod inbox;
mod inspect;
pub(crate) mod judge;
mod listener;
pub(crate) mod peek;
mod relay;
pub(crate) mod respond;
pub(crate) mod retry;
mod serving;
mod settings;
mod shed;
mod storing;
mod tunnel;

pub use budget::Budget;
pub use client::serve;
pub use context::{Context, Parts};
pub use settings::{RetrySettings, Settings};
pub use shed::shed;
