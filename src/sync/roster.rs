//! The workers of this proxy as the exchange names them.

use std::{collections::HashMap, sync::Arc};

use crate::workers::{Fleet, FleetHandle, Worker};

/// The fleet at one moment, to be found in by what workers are called on the wire and in the journal.
#[derive(Debug, Default)]
pub(super) struct Roster {
    fleet: Arc<Fleet>,
    /// Position in the fleet by [`Worker::key`].
    by_key: HashMap<u64, usize>,
    /// The same by [`Worker::id`].
    by_id: HashMap<usize, usize>,
    /// By position in the fleet.
    places: Vec<Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    /// Position of the first rank of the worker's server.
    server: usize,
    /// Losses of that server's cache that peers told of, as they were counted on the worker here; of the first rank only.
    applied: u32,
}

/// Where workers are since the fleet has changed.
#[derive(Debug)]
pub(super) struct Moved {
    /// By position in the new fleet: position in the old one.
    pub(super) from: Vec<Option<usize>>,
    /// Workers that are not in the fleet any more.
    pub(super) left: Vec<Arc<Worker>>,
}

impl Roster {
    pub(super) fn workers(&self) -> &[Arc<Worker>] {
        &self.fleet.workers
    }

    pub(super) fn worker(&self, position: usize) -> Option<&Arc<Worker>> {
        self.fleet.workers.get(position)
    }

    /// Position of the worker with this [`Worker::key`].
    pub(super) fn by_key(&self, key: u64) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    /// Position of the worker with this [`Worker::id`].
    pub(super) fn by_id(&self, id: usize) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// Position of the first rank of the server of the worker at `position`.
    pub(super) fn server_of(&self, position: usize) -> usize {
        self.places.get(position).map_or(position, |place| place.server)
    }

    /// How often this proxy itself has seen the cache of the worker at `position` lost, modulo 2³².
    pub(super) fn own_losses(&self, position: usize) -> u32 {
        let applied = self.places.get(self.server_of(position)).map_or(0, |place| place.applied);
        self.worker(position).map_or(0, |worker| worker.cache_generation().wrapping_sub(applied))
    }

    /// A peer has seen the cache of the worker at `position` lost.
    pub(super) fn lost_elsewhere(&mut self, position: usize) {
        let server = self.server_of(position);
        if let (Some(worker), Some(place)) = (self.fleet.workers.get(server), self.places.get_mut(server)) {
            place.applied = place.applied.wrapping_add(1);
            worker.cache_lost();
        }
    }

    /// Takes over the newest fleet; `None`: it is the one that is known.
    pub(super) fn follow(&mut self, handle: &FleetHandle) -> Option<Moved> {
        if Arc::ptr_eq(&self.fleet, &handle.load()) {
            return None;
        }
        let old = std::mem::replace(self, Self { fleet: handle.load_full(), ..Self::default() });
        let workers = &self.fleet.workers;
        let mut from = Vec::with_capacity(workers.len());
        for (position, worker) in workers.iter().enumerate() {
            self.by_key.insert(worker.key(), position);
            self.by_id.insert(worker.id(), position);
            from.push(old.by_key(worker.key()));
            // the ranks of a server follow each other
            let before = position.checked_sub(1).and_then(|before| workers.get(before));
            let server = match before {
                Some(other) if other.shares_server(worker) => self.server_of(position - 1),
                _ => position,
            };
            let was = old.by_id(worker.id()).and_then(|was| old.places.get(old.server_of(was)));
            let applied = was.map_or(0, |place| place.applied);
            self.places.push(Place { server, applied });
            // a first rank that is new has the count of those that were there
            if let (Some(_), Some(first)) = (was, self.places.get_mut(server)) {
                first.applied = applied;
            }
        }
        let left = old.fleet.workers.iter().filter(|worker| self.by_id(worker.id()).is_none());
        Some(Moved { from, left: left.cloned().collect() })
    }
}
