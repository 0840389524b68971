//! Many proxies as one: what each of them does is told to the others through Redis.
//!
//! Every proxy adds its news to one capped stream, a batch per interval, and reads what all of them have added, its
//! own batches included: so all of them see the same things in the same order. A [`Replica`] is what one of them makes
//! of it, without a socket or a clock; [`start`] starts the thread that carries its batches to Redis and back.
//!
//! What is in a batch: the load of workers as this proxy counts it and what it thinks of their state, as absolute
//! figures that need no history; which prompts were sent where; who has stored a response. Redis may lose any of
//! it at any time: loads are told anew with every heartbeat, prompts when they come again.

mod ancestry;
mod codec;
mod ear;
mod link;
mod peers;
mod quota;
mod replica;
mod roster;
mod settings;
mod standing;
mod thread;

/// Events of shards that may wait for the sync thread, two per request: those of an absence of Redis of 8 s at 1,000
/// requests a second; of a longer one the last 4 to 8 s. With the chunks of 12,000 tokens each they take 4 MB.
pub const EVENTS: usize = 16_384;

pub use quota::{Claim, Quota};
pub use replica::{HEARTBEAT_MS, PEER_MS, Parts, Replica};
pub use settings::{Address, Server, Settings};
pub use thread::{Handle, Parts as ThreadParts, instance, start};
