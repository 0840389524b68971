//! A limit for all proxies together: how much of it is this proxy's.
//!
//! Every proxy tells a [`Claim`]: how many slots it holds and how many it could use. As all read the same stream, all
//! compute the same fair parts from the wants ([`share`]). Parts alone would not keep the limit: what runs cannot be
//! taken back, and for as long as answers last a proxy has more than a part that became smaller. So a part grows only
//! by what is free, and what is free is settled by the order of the stream:
//!
//! - A claim is told before it is used. Once it has been read again, at most so many slots are taken as those that others
//!   have claimed in the stream up to there leave of the limit: of two who claim the same slots, the first has them.
//! - Slots are given up before that is told: no fewer are ever claimed than are in use or may be.
//! - A further claim for more is told only when the last one has come back, so that what is told meanwhile only shrinks,
//!   and the last that was told bounds all that are on their way.
//!
//! So together no more than the limit run at any time, however long the stream takes to whom, as long as nobody is taken
//! for gone who is not. What can exceed it:
//!
//! - A proxy that hears of nobody has the whole limit, which is of concern only until it has read the stream to its end.
//!   As soon as it hears of others it has nothing until its own claim is back.
//! - A proxy that Redis does not reach keeps the part that it had. The others take it for gone after `PEER_MS` and divide
//!   its slots; when it is back, nobody starts what would exceed the limit. If Redis is gone for all, all keep their
//!   parts, and nobody takes those of who is not back as soon as itself for gone. A proxy that has never reached Redis has the whole limit.
//! - With more proxies that have requests than the limit has slots, each has one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{admission::Admission, base::Millis, sync::HEARTBEAT_MS};

mod share;

/// When Redis is back, other proxies come back in as long again as it was away, for their pauses double; in milliseconds,
/// at most this: their longest pause and the time to tell everything.
const MOST_BACK_MS: u64 = 8000;

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
pub struct Quota {
    /// Slots of all proxies together.
    limit: u32,
    /// Slots that this proxy may have at most.
    most: u32,
    admission: Arc<Admission>,
    /// Only the sync thread looks into it.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Slots that may be used.
    part: u32,
    /// Slots that ought to be claimed; not less than the part.
    goal: u32,
    /// What was claimed last.
    told: u32,
    /// The last claim that was read again; `None`: there was none yet.
    heard: Option<u32>,
    /// Since when Redis cannot be used.
    alone_since: Option<Millis>,
    /// The part does not grow before that: others may not have come back yet.
    grows_from: Millis,
    /// [`Admission::refused`] when that was looked at last.
    refused: u64,
    /// How many were refused lately; an eighth less with every claim.
    refused_lately: u64,
}

impl Quota {
    /// Nothing is known of others: all of `limit` is this proxy's.
    pub fn new(limit: u32, admission: Arc<Admission>) -> Self {
        let most = admission.slots().unwrap_or(limit).min(limit);
        let state = State {
            part: most,
            goal: most,
            told: most,
            heard: None,
            alone_since: None,
            grows_from: 0,
            refused: admission.refused(),
            refused_lately: 0,
        };
        Self { limit, most, admission, state: Mutex::new(state) }
    }

    /// What is to be told now: asked for with every batch (it need not be written again where it is as before, but
    /// at least once a second), and told in the order in which it was asked for.
    pub fn claim(&self) -> Claim {
        let mut state = self.state();
        let in_use = to_u32(self.admission.in_use());
        let refused = self.admission.refused();
        let lately = state.refused_lately;
        // Remembered for a while: a proxy where nobody can wait wants slots between two refusals, too.
        state.refused_lately =
            refused.saturating_sub(state.refused).max(lately - lately.div_ceil(8).min(lately));
        state.refused = refused;
        let wanted = u64::from(in_use) + self.admission.waiting() + state.refused_lately;
        // what is on its way may only shrink until the last claim is back
        let grows = state.heard == Some(state.told);
        let goal = if grows { state.goal } else { state.goal.min(state.told) };
        state.told = goal.max(state.part).max(in_use);
        Claim { held: state.told, wanted: to_u32(wanted).min(self.most) }
    }

    /// Sets this proxy's part by what all have told, as it stands in the stream: `own` by the last of this proxy's
    /// batches that was read again (`None`: there is none yet), `peers` in any order, with the numbers of their
    /// instances. To be called after entries were read and when a peer has expired.
    pub fn settle(&self, now: Millis, own: (u64, Option<Claim>), peers: &[(u64, Claim)]) {
        let mut state = self.state();
        let (id, heard) = own;
        // as a newcomer asks: for what is free
        let unheard = Claim { held: 0, wanted: self.most };
        // who claims more than there is divides another limit, or has miscounted
        let divides = |peer: &(u64, Claim)| peer.0 != id && peer.1.held <= self.limit;
        let mut all: Vec<(u64, Claim)> = peers.iter().copied().filter(divides).collect();
        let hears_nobody = all.is_empty();
        let others: u64 = all.iter().map(|peer| u64::from(peer.1.held)).sum();
        all.push((id, heard.unwrap_or(unheard)));
        // the slots that are left over go by this order, which is the same for all
        all.sort_unstable_by_key(|member| member.0);
        let wants: Vec<u32> = all.iter().map(|member| member.1.wanted).collect();
        let held: Vec<u32> = all.iter().map(|member| member.1.held).collect();
        let limit = share::at_least_one_each(self.limit, wants.iter().copied());
        let fair = share::fair(limit, &wants);
        let attainable = share::attainable(limit, &fair, &held);
        let at = all.partition_point(|member| member.0 < id);
        let of = |parts: &[u32]| parts.get(at).copied().unwrap_or(0).min(self.most);
        let (fair, attainable) = (of(&fair), of(&attainable).min(of(&fair)));
        let free = to_u32(u64::from(limit).saturating_sub(others));

        if let Some(since) = state.alone_since.take() {
            let away_ms = now.saturating_sub(since);
            state.grows_from = now + 2 * HEARTBEAT_MS + (2 * away_ms).min(MOST_BACK_MS);
        }
        let grows = now >= state.grows_from;
        let before = std::mem::replace(&mut state.heard, heard.map(|claim| claim.held));
        let claimed = fair.min(free).min(state.told).min(state.heard.unwrap_or(0));
        let part = match heard {
            // Others do not know what this one takes.
            None if hears_nobody => state.part,
            None => 0,
            Some(_) if before.is_none() => state.part.min(claimed),
            Some(_) if fair < state.part => fair,
            Some(_) if grows => state.part.max(claimed),
            Some(_) => state.part,
        };
        if part != state.part {
            state.part = part;
            self.admission.set_slots(part);
        }
        state.goal = if grows { attainable.max(part) } else { part };
    }

    /// Redis cannot be used. To be called instead of [`Quota::settle`]: the part stays as it is.
    pub fn alone(&self, now: Millis) {
        self.state().alone_since.get_or_insert(now);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn to_u32(slots: u64) -> u32 {
    u32::try_from(slots).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
