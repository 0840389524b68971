//! One vLLM on the wire: whatever a client and a worker may legally say to each other gets through unchanged.

mod answers;
mod connections;
mod harness;
mod illegal_answers;
mod requests;
mod streams;
mod tunnel;

pub(crate) use requests::noise;
