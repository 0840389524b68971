//! A worker as the operator describes it.

use std::str::FromStr;

use crate::workers::{UrlError, WorkerUrl};

/// What the operator says of a worker besides its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Traits {
    /// Workers of a higher priority are used first; the others when those are saturated.
    pub priority: i32,
    /// Relative price of a request: a worker that costs 2 is given half of what one that costs 1 is given.
    /// Greater than 0.
    pub cost: f64,
    /// Requests that it should have in flight at most; `None`: not told.
    pub max_concurrent_requests: Option<u32>,
}

impl Default for Traits {
    fn default() -> Self {
        Self { priority: 0, cost: 1.0, max_concurrent_requests: None }
    }
}

/// A worker as the operator describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerSpec {
    /// Where it is.
    pub url: WorkerUrl,
    /// Which of the server's data-parallel engines it is; `None`: the server has one, or chooses itself.
    pub rank: Option<u32>,
    /// What else is said of it.
    pub traits: Traits,
}

impl From<WorkerUrl> for WorkerSpec {
    fn from(url: WorkerUrl) -> Self {
        Self { url, rank: None, traits: Traits::default() }
    }
}

impl FromStr for WorkerSpec {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        text.parse().map(|url: WorkerUrl| url.into())
    }
}
