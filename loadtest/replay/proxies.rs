//! Several proxies before the same workers: how many there are, and how they hear of each other.
//!
//! Each has its own [`Replica`], whose batches go to all of them as they would through Redis: added to the one stream
//! at an own beat, and read by everybody, in the same order, a moment later.

use std::{collections::VecDeque, sync::Arc};

use vllm_proxy::{
    routing::{Event, Shared},
    sync::{Parts, Replica},
    telemetry::metrics::SyncFigures,
    workers::{FleetHandle, StoredResponses},
};

use crate::chance::Chance;

/// Milliseconds from a batch's being composed to its being read.
const WAY_MS: u64 = 1;
/// Events that fit between two batches.
pub(crate) const JOURNAL_EVENTS: usize = 1 << 16;
/// What the stream may take in Redis.
const STREAM_BYTES: u64 = 64 << 20;
/// Batches that one may add at a time: what is more waits for the next beat.
const BATCHES: usize = 64;

/// How proxies hear of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sharing {
    /// Not at all, and they know of no others.
    Isolated,
    /// Not at all, and they know that they should: Redis is down.
    Alone,
    /// Through Redis, at intervals of so many milliseconds.
    IntervalMs(u64),
}

/// The proxies of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Setup {
    /// How many; requests are sprayed over them at random.
    pub(crate) proxies: usize,
    pub(crate) sharing: Sharing,
}

impl Setup {
    /// One proxy.
    pub(crate) const ONE: Self = Self { proxies: 1, sharing: Sharing::Isolated };

    /// Each of these numbers of proxies with each way of hearing; of one proxy there is only how it fares with and
    /// without Redis' being down. The first is the one that others are compared with.
    pub(crate) fn all(proxies: &[usize], intervals_ms: &[u64]) -> Vec<Self> {
        let mut all = vec![Self::ONE, Self { sharing: Sharing::Alone, ..Self::ONE }];
        for proxies in proxies.iter().copied().filter(|proxies| *proxies > 1) {
            let shared = intervals_ms.iter().map(|interval| Sharing::IntervalMs(*interval));
            let ways = shared.chain([Sharing::Alone, Sharing::Isolated]);
            all.extend(ways.map(|sharing| Self { proxies, sharing }));
        }
        all
    }

    /// How it is shown.
    pub(crate) fn title(&self) -> String {
        let count = match self.proxies {
            1 => "one proxy".to_owned(),
            proxies => format!("{proxies} proxies"),
        };
        match self.sharing {
            Sharing::Isolated if self.proxies == 1 => count,
            Sharing::Isolated => format!("{count}, isolated"),
            Sharing::Alone => format!("{count}, Redis down"),
            Sharing::IntervalMs(interval) => format!("{count}, every {interval} ms"),
        }
    }
}

/// What proxies told each other in a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Traffic {
    /// Of all batches that were added to the stream.
    pub(crate) bytes: u64,
    pub(crate) batches: u64,
    /// Events that did not fit into a journal.
    pub(crate) dropped: u64,
}

impl Traffic {
    /// Both together.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            batches: self.batches + other.batches,
            dropped: self.dropped + other.dropped,
        }
    }
}

/// What one proxy brings into the exchange.
pub(crate) struct Member {
    pub(crate) shared: Shared,
    pub(crate) events: crossbeam_channel::Receiver<Event>,
    pub(crate) fleet: FleetHandle,
}

/// The stream, and everybody who writes and reads it.
pub(crate) struct Exchange {
    interval_ms: u64,
    members: Vec<(Replica, Shared)>,
    /// When each of `members` tells next, in milliseconds.
    beats: Vec<u64>,
    /// What was told and is not read yet, with the time when it is.
    coming: VecDeque<(u64, Vec<u8>)>,
    traffic: Traffic,
}

impl Exchange {
    /// Nothing was told yet. Each of `members` begins at a moment of its own.
    pub(crate) fn new(interval_ms: u64, members: Vec<Member>, chance: &mut Chance) -> Self {
        let beats = members.iter().map(|_| chance.below(interval_ms as usize) as u64).collect();
        let replica = |member: Member| {
            let shared = member.shared.clone();
            let replica = Replica::new(Parts {
                instance: chance.bits(),
                events: member.events,
                shared: member.shared,
                fleet: member.fleet,
                stored: Arc::new(StoredResponses::default()),
                quota: None,
                figures: Arc::new(SyncFigures::default()),
                stream_bytes: STREAM_BYTES,
            });
            (replica, shared)
        };
        let members = members.into_iter().map(replica).collect();
        Self { interval_ms, members, beats, coming: VecDeque::new(), traffic: Traffic::default() }
    }

    /// When [`Exchange::go_on`] is to be called, in milliseconds.
    pub(crate) fn due(&self) -> u64 {
        let read = self.coming.front().map_or(u64::MAX, |(at, _)| *at);
        self.beats.iter().copied().min().unwrap_or(u64::MAX).min(read)
    }

    /// Does what is due: first is read what was told before.
    pub(crate) fn go_on(&mut self, now: u64) {
        while self.coming.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, batch)) = self.coming.pop_front() else { break };
            for (replica, _) in &mut self.members {
                replica.receive(now, WAY_MS, &batch);
            }
        }
        for ((replica, _), beat) in self.members.iter_mut().zip(&mut self.beats) {
            if *beat > now {
                continue;
            }
            *beat += self.interval_ms;
            replica.expire(now);
            for batch in std::iter::from_fn(|| replica.compose(now)).take(BATCHES) {
                self.traffic.bytes += batch.len() as u64;
                self.traffic.batches += 1;
                self.coming.push_back((now + WAY_MS, batch));
            }
        }
    }

    /// What was told so far.
    pub(crate) fn traffic(&self) -> Traffic {
        let dropped = self.members.iter().map(|(_, shared)| shared.journal.dropped()).sum();
        Traffic { dropped, ..self.traffic }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_proxy_comes_first_and_shares_with_nobody() {
        let all = Setup::all(&[1, 2], &[10, 50]);
        let titles: Vec<String> = all.iter().map(Setup::title).collect();
        assert_eq!(
            titles,
            [
                "one proxy",
                "one proxy, Redis down",
                "2 proxies, every 10 ms",
                "2 proxies, every 50 ms",
                "2 proxies, Redis down",
                "2 proxies, isolated"
            ]
        );
    }
}
