//! A limit for all proxies together: how much of it is this proxy's.

use std::sync::Arc;

use crate::{admission::Admission, base::Millis};

/// What one proxy tells of the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Claim {
    /// Slots that it has, or will take if nobody told before that they are its own. What runs is never more.
    pub held: u32,
    /// Slots that it could use now: for what runs, who waits, and who was refused lately.
    pub wanted: u32,
}

/// This proxy's part of a limit on requests in flight that all proxies share.
#[derive(Debug)]
pub struct Quota {}

impl Quota {
    /// Nothing is known of others: all of `limit` is this proxy's.
    pub fn new(_limit: u32, _admission: Arc<Admission>) -> Self {
        Self {}
    }

    /// What is to be told now: asked for with every batch (it need not be written again where it is as before, but
    /// at least once a second), and told in the order in which it was asked for.
    pub fn claim(&self) -> Claim {
        Claim::default()
    }

    /// Sets this proxy's part by what all have told, as it stands in the stream: `own` by the last of this proxy's
    /// batches that was read again (`None`: there is none yet), `peers` in any order, with the numbers of their
    /// instances. To be called after entries were read and when a peer has expired.
    pub fn settle(&self, _now: Millis, _own: (u64, Option<Claim>), _peers: &[(u64, Claim)]) {}

    /// Redis cannot be used. To be called instead of [`Quota::settle`]: the part stays as it is.
    pub fn alone(&self, _now: Millis) {}
}
