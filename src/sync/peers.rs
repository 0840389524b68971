//! What the other proxies say, each for itself, and what that makes together.

use std::collections::HashMap;

use crate::{
    base::Millis,
    sync::{Claim, PEER_MS, codec::State, roster::Moved},
    workers::{Load, Worker},
};

/// Peers at most; further ones are not heard until one is gone.
pub(super) const MOST_PEERS: usize = 1024;

/// Another proxy.
#[derive(Debug, Default)]
pub(super) struct Peer {
    heard_at: Millis,
    /// Of the batch that was heard last.
    sequence: u64,
    /// What it claims of the common limit; `None`: it never said.
    claim: Option<Claim>,
    /// By position in the fleet; shorter where it has said nothing of the rest.
    workers: Vec<Heard>,
    /// Whether it has named a worker of ours; `None`: it has named none yet.
    shares: Option<bool>,
}

/// What a peer says of a worker.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    load: Load,
    state: Option<State>,
}

impl Peer {
    /// It has named workers, one or more of which are ours or not. True if that makes it a stranger, who was none
    /// before: one with another fleet, or with other names for the same.
    pub(super) fn names(&mut self, ours: bool) -> bool {
        let before = self.shares;
        self.shares = Some(ours || before == Some(true));
        before.is_none() && !ours
    }

    /// Whether it may have workers of ours; who has none has nothing to do with this proxy.
    fn is_ours(&self) -> bool {
        self.shares != Some(false)
    }

    /// Takes over what it thinks of the worker at `position`; returns what it thought before.
    pub(super) fn thinks(&mut self, position: usize, state: State) -> Option<State> {
        self.at(position).state.replace(state)
    }

    /// Takes over what it claims of the common limit.
    pub(super) fn claims(&mut self, claim: Claim) {
        self.claim = Some(claim);
    }

    fn at(&mut self, position: usize) -> &mut Heard {
        if self.workers.len() <= position {
            self.workers.resize(position + 1, Heard::default());
        }
        &mut self.workers[position]
    }
}

/// How often a proxy has seen the caches of workers lost. Unlike what it has running that stays true when it is old:
/// what was sent before a loss is not there, whoever begins to read when.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Of the batch that was read last.
    sequence: u64,
    /// By position in the fleet, of the first rank of a server only; shorter where it has said nothing of the rest.
    counts: Vec<Option<u32>>,
}

impl Losses {
    /// Takes over the count of the server whose first rank is at `position`; true if that is more than it said before.
    pub(super) fn grow(&mut self, position: usize, losses: u32) -> bool {
        if self.counts.len() <= position {
            self.counts.resize(position + 1, None);
        }
        let before = self.counts[position].replace(losses);
        // counts go round; one that begins anew is a new worker by the same name
        before.is_some_and(|before| losses.wrapping_sub(before).cast_signed() > 0)
    }
}

/// The peers that are heard.
#[derive(Debug, Default)]
pub(super) struct Peers {
    by_instance: HashMap<u64, Peer>,
    /// Also of proxies that are not heard any more.
    losses: HashMap<u64, Losses>,
    /// By position in the fleet.
    sums: Vec<Sum>,
    /// Positions whose sum has changed since it was asked for.
    changed: Vec<usize>,
}

/// What all have running on a worker. What is added is subtracted again, so nothing of it may saturate: it is the
/// sum of [`MOST_PEERS`] small numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    in_flight: u64,
    queued_tokens: u64,
    decode_tokens: u64,
    changed: bool,
}

impl Sum {
    fn replace(&mut self, old: Load, new: Load) {
        let swap = |sum: u64, old: u64, new: u64| sum.saturating_add(new).saturating_sub(old);
        self.in_flight = swap(self.in_flight, old.in_flight.into(), new.in_flight.into());
        self.queued_tokens = swap(self.queued_tokens, old.queued_tokens, new.queued_tokens);
        self.decode_tokens = swap(self.decode_tokens, old.decode_tokens, new.decode_tokens);
    }

    fn load(&self) -> Load {
        Load {
            in_flight: u32::try_from(self.in_flight).unwrap_or(u32::MAX),
            queued_tokens: self.queued_tokens,
            decode_tokens: self.decode_tokens,
        }
    }
}

impl Peers {
    pub(super) fn len(&self) -> usize {
        self.by_instance.values().filter(|peer| peer.is_ours()).count()
    }

    /// The peer that has sent a batch with this number, `age_ms` ago; to be given back with [`Peers::put`]. `None`:
    /// there are too many already, or what it says is old.
    pub(super) fn take(&mut self, instance: u64, sequence: u64, now: Millis, age_ms: u64) -> Option<Peer> {
        if age_ms > PEER_MS {
            return None;
        }
        let mut peer = match self.by_instance.get(&instance) {
            // it was written twice, or out of turn
            Some(known) if sequence <= known.sequence => return None,
            Some(_) => self.by_instance.remove(&instance)?,
            None if self.by_instance.len() >= MOST_PEERS => return None,
            None => Peer::default(),
        };
        peer.sequence = sequence;
        peer.heard_at = peer.heard_at.max(now.saturating_sub(age_ms));
        Some(peer)
    }

    /// Gives back a peer.
    pub(super) fn put(&mut self, instance: u64, peer: Peer) {
        self.by_instance.insert(instance, peer);
    }

    /// What the proxy that has sent a batch with this number has told of losses before; to be given back with
    /// [`Peers::put_losses`]. `None`: the batch was read before.
    pub(super) fn take_losses(&mut self, instance: u64, sequence: u64) -> Option<Losses> {
        let mut losses = match self.losses.get(&instance) {
            Some(known) if sequence <= known.sequence => return None,
            Some(_) => self.losses.remove(&instance)?,
            None => Losses::default(),
        };
        losses.sequence = sequence;
        Some(losses)
    }

    /// Gives back what was told of losses.
    pub(super) fn put_losses(&mut self, instance: u64, losses: Losses) {
        if self.losses.len() >= MOST_PEERS {
            // most of them are of proxies that are long gone; who is there says it again
            self.losses.clear();
        }
        self.losses.insert(instance, losses);
    }

    /// Takes over what a peer has running on the worker at `position`, which is in the fleet.
    pub(super) fn set_load(&mut self, peer: &mut Peer, position: usize, load: Load) {
        let old = std::mem::replace(&mut peer.at(position).load, load);
        self.replace(position, old, load);
    }

    /// Forgets a peer; false if it was not known.
    pub(super) fn remove(&mut self, instance: u64) -> bool {
        let Some(peer) = self.by_instance.remove(&instance) else { return false };
        for (position, heard) in peer.workers.iter().enumerate() {
            self.replace(position, heard.load, Load::default());
        }
        true
    }

    /// Forgets those that were not heard for too long; false if there were none.
    pub(super) fn expire(&mut self, now: Millis) -> bool {
        let gone = |peer: &Peer| now.saturating_sub(peer.heard_at) > PEER_MS;
        let gone = self.by_instance.iter().filter(|(_, peer)| gone(peer)).map(|(&instance, _)| instance);
        let gone: Vec<u64> = gone.collect();
        gone.iter().for_each(|&instance| {
            self.remove(instance);
        });
        !gone.is_empty()
    }

    /// What the peers claim of the common limit, by instance, in any order.
    pub(super) fn claims(&self, claims: &mut Vec<(u64, Claim)>) {
        claims.clear();
        let ours = self.by_instance.iter().filter(|(_, peer)| peer.is_ours());
        claims.extend(ours.filter_map(|(&instance, peer)| Some((instance, peer.claim?))));
    }

    /// The workers are elsewhere now.
    pub(super) fn moved(&mut self, moved: &Moved) {
        self.sums.clear();
        self.sums.resize(moved.from.len(), Sum::default());
        for peer in self.by_instance.values_mut() {
            let heard = |from: &Option<usize>| from.and_then(|from| peer.workers.get(from)).copied();
            peer.workers = moved.from.iter().map(|from| heard(from).unwrap_or_default()).collect();
            for (sum, heard) in self.sums.iter_mut().zip(&peer.workers) {
                sum.replace(Load::default(), heard.load);
            }
        }
        for losses in self.losses.values_mut() {
            let count =
                |from: &Option<usize>| from.and_then(|from| losses.counts.get(from).copied().flatten());
            losses.counts = moved.from.iter().map(count).collect();
        }
        self.sums.iter_mut().for_each(|sum| sum.changed = true);
        self.changed = (0..self.sums.len()).collect();
    }

    /// Tells the workers what runs on them, as far as that has changed.
    pub(super) fn tell(&mut self, workers: &[impl AsRef<Worker>]) {
        for position in self.changed.drain(..) {
            if let (Some(sum), Some(worker)) = (self.sums.get_mut(position), workers.get(position)) {
                sum.changed = false;
                worker.as_ref().set_peers_load(sum.load());
            }
        }
    }

    fn replace(&mut self, position: usize, old: Load, new: Load) {
        if old == new {
            return;
        }
        if let Some(sum) = self.sums.get_mut(position) {
            sum.replace(old, new);
            if !std::mem::replace(&mut sum.changed, true) {
                self.changed.push(position);
            }
        }
    }
}
