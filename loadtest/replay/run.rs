//! One run: a workload at a speed against workers and a chooser, in virtual time.

use crate::{
    chooser::Chooser,
    engine::{Engine, Event, Model},
    workload::Workload,
};

/// Seconds between two looks at the workers' metrics (`--engine-stats-interval`).
pub(crate) const SCRAPE_S: f64 = 5.0;
/// Seconds between two losses of a cache.
const FLUSH_S: f64 = 60.0;
/// A run has drained when its last request ends so many seconds, and so large a share of its length, after it
/// came.
const DRAIN_S: f64 = 30.0;
const DRAIN_SHARE: f64 = 0.03;

/// What goes wrong in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The first worker loses its cache every minute and the proxy knows.
    FlushSeen,
    /// The same, and nobody tells the proxy.
    FlushUnseen,
}

/// The terms of a run.
#[derive(Debug, Clone)]
pub(crate) struct Terms<'a> {
    pub(crate) workload: &'a Workload,
    /// How much faster than at speed 1 the requests come.
    pub(crate) speed: f64,
    /// The workers.
    pub(crate) models: &'a [Model],
    pub(crate) fault: Fault,
    /// Whether the chooser asks for quotes.
    pub(crate) foresight: bool,
    /// Whether to give up as soon as it is sure that the run does not drain in time.
    pub(crate) only_drain: bool,
}

/// What came out of a run. Times in seconds.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub(crate) struct Measures {
    /// Share of prompt tokens that were found in caches.
    pub(crate) hit: f64,
    /// Times to the first token.
    pub(crate) mean_s: f64,
    pub(crate) p50_s: f64,
    pub(crate) p90_s: f64,
    pub(crate) p99_s: f64,
    /// Computed prompt tokens of the worker with most, relative to the mean.
    pub(crate) imbalance: f64,
    /// Whether the last request ended soon after it came; false also where the run was given up.
    pub(crate) drained: bool,
}

impl Measures {
    /// The mean of several runs; drained only if all have.
    pub(crate) fn mean(runs: &[Self]) -> Self {
        let mean = |figure: fn(&Self) -> f64| runs.iter().map(figure).sum::<f64>() / runs.len() as f64;
        Self {
            hit: mean(|run| run.hit),
            mean_s: mean(|run| run.mean_s),
            p50_s: mean(|run| run.p50_s),
            p90_s: mean(|run| run.p90_s),
            p99_s: mean(|run| run.p99_s),
            imbalance: mean(|run| run.imbalance),
            drained: runs.iter().all(|run| run.drained),
        }
    }
}

/// Runs to the end.
pub(crate) fn run(terms: &Terms<'_>, chooser: &mut dyn Chooser) -> Measures {
    let mut run = Run::new(terms);
    let duration = terms.workload.duration_s() / terms.speed;
    let limit = duration + DRAIN_S + DRAIN_SHARE * duration;
    let ended = run.play(chooser, if terms.only_drain { limit } else { f64::INFINITY });
    if run.left > 0 {
        return Measures::default();
    }
    run.measures(ended <= limit)
}

struct Run<'a, 'b> {
    terms: &'b Terms<'a>,
    engines: Vec<Engine<'a>>,
    /// Time to the first token, by request.
    first_token_s: Vec<f64>,
    /// The worker of each request.
    worker_of: Vec<u32>,
    /// The next request to come.
    next: usize,
    /// Requests that have not ended.
    left: usize,
    scrape: f64,
    flush: f64,
}

impl<'a, 'b> Run<'a, 'b> {
    fn new(terms: &'b Terms<'a>) -> Self {
        let requests = terms.workload.requests.len();
        let engine = |model: &Model| Engine::new(model.clone(), terms.workload, terms.foresight);
        Self {
            terms,
            engines: terms.models.iter().map(engine).collect(),
            first_token_s: vec![0.0; requests],
            worker_of: vec![0; requests],
            next: 0,
            left: requests,
            scrape: 0.0,
            flush: if terms.fault == Fault::None { f64::INFINITY } else { FLUSH_S },
        }
    }

    /// Handles one event after the other until all requests have ended or `limit` has passed; returns the time of
    /// the last one.
    fn play(&mut self, chooser: &mut dyn Chooser, limit: f64) -> f64 {
        let mut events = Vec::new();
        let mut now = 0.0;
        while self.left > 0 {
            let (worker, event) = self.next_event();
            let arrival = self.arrival(self.next);
            let due = chooser.due();
            now = event.min(arrival).min(self.scrape).min(self.flush).min(due);
            if now > limit {
                break;
            }
            if event <= now {
                self.engines[worker].advance(&mut events);
                self.tell(now, worker, &mut events, chooser);
            } else if self.scrape <= now {
                chooser.scraped(&self.engines);
                self.scrape += SCRAPE_S;
            } else if due <= now {
                chooser.go_on(now, &self.engines);
            } else if self.flush <= now {
                self.engines[0].flush();
                if self.terms.fault == Fault::FlushSeen {
                    chooser.cache_lost(0);
                }
                self.flush += FLUSH_S;
            } else {
                let request = self.next as u32;
                let chosen = chooser.choose(now, request, &self.engines);
                self.worker_of[self.next] = chosen as u32;
                self.engines[chosen].arrive(now, request);
                self.next += 1;
            }
        }
        now
    }

    fn next_event(&self) -> (usize, f64) {
        let mut first = (0, f64::INFINITY);
        for (worker, engine) in self.engines.iter().enumerate() {
            if engine.next_event() < first.1 {
                first = (worker, engine.next_event());
            }
        }
        first
    }

    fn arrival(&self, request: usize) -> f64 {
        let request = self.terms.workload.requests.get(request);
        request.map_or(f64::INFINITY, |request| request.arrival_s / self.terms.speed)
    }

    fn tell(&mut self, now: f64, worker: usize, events: &mut Vec<Event>, chooser: &mut dyn Chooser) {
        for event in events.drain(..) {
            match event {
                Event::FirstToken(request) => {
                    self.first_token_s[request as usize] = now - self.arrival(request as usize);
                    chooser.first_token(request);
                }
                Event::Ended(request) => {
                    let found = self.engines[worker].take_found(request);
                    chooser.ended(request, found);
                    self.left -= 1;
                }
            }
        }
    }

    fn measures(&self, drained: bool) -> Measures {
        let mut times = self.first_token_s.clone();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() as f64 * share) as usize).min(times.len() - 1)];
        let (mut found, mut computed, mut most) = (0, 0, 0);
        for engine in &self.engines {
            let (found_here, computed_here) = engine.work();
            found += found_here;
            computed += computed_here;
            most = most.max(computed_here);
        }
        Measures {
            hit: found as f64 / (found + computed) as f64,
            mean_s: times.iter().sum::<f64>() / times.len() as f64,
            p50_s: at(0.5),
            p90_s: at(0.9),
            p99_s: at(0.99),
            imbalance: most as f64 * self.engines.len() as f64 / computed as f64,
            drained,
        }
    }
}

/// The highest speed, within one part in `1 << halvings`, at which `drains` holds; `guess` is a speed of the right
/// order.
pub(crate) fn highest_speed(guess: f64, mut drains: impl FnMut(f64) -> bool) -> f64 {
    const HALVINGS: usize = 7;
    const WIDENINGS: usize = 12;
    let (mut low, mut high) = (guess, guess);
    if drains(guess) {
        for _ in 0..WIDENINGS {
            high *= 1.3;
            if !drains(high) {
                break;
            }
            low = high;
        }
    } else {
        for _ in 0..WIDENINGS {
            low /= 1.3;
            if drains(low) {
                break;
            }
            high = low;
        }
    }
    for _ in 0..HALVINGS {
        let middle = (low * high).sqrt();
        if drains(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_speed_is_found_from_above_and_below() {
        for guess in [0.5, 2.0, 9.0] {
            let found = highest_speed(guess, |speed| speed <= 3.0);
            assert!((2.98..=3.0).contains(&found), "{guess}: {found}");
        }
    }
}
