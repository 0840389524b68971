//! Which workers may be chosen for an attempt.

use std::sync::Arc;

use crate::workers::{Fleet, Worker};

/// The workers that earlier attempts of an exchange have failed on.
#[derive(Debug, Default)]
pub struct Tried(Vec<usize>);

impl Tried {
    /// No attempt yet.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// The worker at `position` failed.
    pub fn add(&mut self, position: usize) {
        self.0.push(position);
    }

    /// Number of failed attempts.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    fn contains(&self, position: usize) -> bool {
        self.0.contains(&position)
    }
}

/// The workers that a policy may choose from.
#[derive(Debug)]
pub struct Candidates<'a> {
    workers: &'a [Arc<Worker>],
    positions: &'a [usize],
}

impl<'a> Candidates<'a> {
    /// Those of `serving` (positions in the fleet) that are usable and have not been tried. Where none is
    /// left, the unusable ones stand in: the last worker is never taken out, and a wrong verdict about all of
    /// them costs one refused connect. `scratch` is where the positions are kept.
    pub fn of(fleet: &'a Fleet, serving: &[usize], tried: &Tried, scratch: &'a mut Vec<usize>) -> Self {
        scratch.clear();
        let untried = || serving.iter().copied().filter(|&position| !tried.contains(position));
        scratch.extend(untried().filter(|&position| fleet.workers[position].usable()));
        if scratch.is_empty() {
            scratch.extend(untried());
        }
        Self { workers: &fleet.workers, positions: scratch }
    }

    /// The candidates with their positions in the fleet, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &'a Worker)> {
        self.positions.iter().map(|&position| (position, &*self.workers[position]))
    }

    /// Whether there is nobody to choose.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::{Health, ModelSettings, Registry};

    fn positions(fleet: &Fleet, tried: &Tried) -> Vec<usize> {
        let mut scratch = Vec::new();
        Candidates::of(fleet, &[0, 1, 2], tried, &mut scratch).iter().map(|(at, _)| at).collect()
    }

    #[test]
    fn the_unusable_stand_in_when_nobody_else_is_left() {
        let urls = ["http://a:1", "http://b:1", "http://c:1"].map(|url| url.parse().unwrap());
        let fleet = Registry::new(urls, ModelSettings::default()).handle().load_full();
        let mut tried = Tried::none();
        assert_eq!(positions(&fleet, &tried), [0, 1, 2], "nothing is known of anybody");
        fleet.workers[1].set_health(Health::Up);
        fleet.workers[2].set_health(Health::Down);
        assert_eq!(positions(&fleet, &tried), [1]);
        tried.add(1);
        assert_eq!(positions(&fleet, &tried), [0, 2]);
        tried.add(0);
        tried.add(2);
        assert!(positions(&fleet, &tried).is_empty(), "nobody is tried twice");
    }
}
