//! How much is let in at a time, who waits, and who is sent away.
//!
//! [`Admission`] is one for all shards: a number of slots (`--max-concurrent-requests`), the room that workers with a
//! limit of their own have, a rate, and one [`Queue`] for all who wait. [`Budget`] bounds the bytes of request bodies
//! in memory. Both know neither sockets nor clocks nor wakers: who waits is told by a flag, and its shard is rung
//! (`net` has the bell).

mod bucket;
mod budget;
mod limiter;
mod queue;
mod settings;

pub use bucket::Bucket;
pub use budget::{Budget, FREE_BYTES, Held};
pub use limiter::{
    Admission, Admitted, Entry, FindRoom, Full, Newcomer, Permit, Reason, Refused, Room, RoomWanted, Waiter,
    Waiting,
};
pub use queue::{Joined, Queue, Ticket, Verdict};
pub use settings::Settings;
