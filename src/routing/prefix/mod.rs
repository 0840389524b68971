//! Which prompts share how much with what a worker has computed before.
//!
//! A [`Prompt`] is the chained hashes of a request's text, [`PrefixIndex`] says how many of them each worker holds,
//! and [`TokenRates`] how many tokens that text is.

mod digest;
mod index;
mod media;
mod memory;
mod partings;
mod prompt;
mod rates;
mod seat;
mod sizes;

/// Of the chunks of a prompt other proxies are told every so many-th, and the last one: who holds a chunk holds those
/// before it, so that nothing is lost but how far a prompt is shared that parts between two of them.
pub const STRIDE: usize = 4;

pub use index::{MAX_SEATS, PrefixIndex};
pub use partings::Partings;
pub use prompt::{CHUNK_BITS, CHUNK_BYTES, MAX_CHUNKS, Prompt};
pub use rates::TokenRates;
pub use sizes::CacheSizes;

#[cfg(test)]
mod tests;
