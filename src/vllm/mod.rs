//! What a vLLM server is on the wire, as values. No sockets, no clock.
//!
//! - [`endpoints`]: the table of its paths and what the proxy does with each;
//! - [`facts`] and [`multipart`]: what must be known of a request before a worker can be chosen;
//! - [`errors`]: the bodies that the proxy answers itself, worded like vLLM's Python front end;
//! - [`dummy`]: small requests of our own, one for each type of model;
//! - [`models`]: model lists and versions of many workers made into those of one;
//! - [`engine`]: what a server says of its engines, in `/metrics` and beside an answer;
//! - [`opening`]: whether an answer has begun to say anything;
//! - [`response_id`]: what a response is called that a worker stores;
//! - [`usage`]: how many tokens an answer took;
//! - [`mod@aggregate`]: the answers of many workers to one broadcast made into one.
//!
//! "vLLM" without a version means 0.32.0 with its Python front end; `golden` in a test's name means recorded
//! bytes of that server.

pub mod aggregate;
pub mod dummy;
pub mod endpoints;
pub mod engine;
pub mod errors;
pub mod facts;
pub mod models;
pub mod multipart;
pub mod opening;
pub mod response_id;
pub mod usage;

#[cfg(test)]
mod golden;

/// The field by which a request names the data-parallel engine that is to serve it (vLLM 0.32; a number out of
/// range is answered 400).
pub const RANK_FIELD: &str = "X-data-parallel-rank";

pub use aggregate::{Aggregate, Combine, aggregate};
pub use dummy::{DUMMIES, Dummy, ModelType};
pub use endpoints::{Endpoint, ErrorShape, Local, ModelSource, Treatment, lookup};
pub use engine::{EngineReport, Figures, parse_engines, parse_orca};
pub use facts::{Facts, Key, ModelFact, Ranges, json_field, scan_json};
pub use models::{ModelCard, lowest_version, merge_models, parse_models};
pub use multipart::{ModelField, MultipartFact, boundary, query_model};
pub use opening::{
    Opening, Unbegun, is_aborted, is_busy, is_engine_dead, is_unknown_model, opening_of_events,
};
pub use response_id::{ResponseId, Sought};
pub use usage::{Usage, usage_of_events, usage_of_tail};
