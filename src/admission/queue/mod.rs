//! The order in which those who wait are served: by priority, then fairly between keys, then first come.
//!
//! Fair is start-time fair queueing (Goyal, Vin, Cheng 1996) with every request of one size: within a priority, a key
//! that has many waiting gets one turn for each turn of a key that has few. What it takes for that is kept for keys
//! that wait, and for those that have just been served until the round is over, so that a key which comes back at
//! once does not overtake. Where the queue is full, who would be served last of all makes room: one key cannot keep the
//! others out by filling it.
//!
//! Pure: who may be served is the caller's to say, and who has left. It wakes nobody and knows no time.

use std::collections::{BTreeMap, HashMap};

/// Keys without anybody waiting that a priority remembers besides twice as many as wait.
const REMEMBERED_KEYS: usize = 64;

/// A place in the queue; lower goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    priority: i64,
    /// The turn of its key, in virtual time.
    start: u64,
    /// Which arrival it is; never given twice.
    number: u64,
}

/// What is done with one who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves the queue.
    Served,
    /// It stays, and the next one is looked at.
    Passed,
    /// It stays, and so do all behind it.
    Enough,
}

/// The turns of one key.
#[derive(Debug, Default)]
struct Flow {
    /// The start of its next turn, unless virtual time is further.
    finish: u64,
    waiting: usize,
}

/// Those of one priority.
#[derive(Debug, Default)]
struct Class {
    /// Virtual time: the start of the latest turn that was served.
    now: u64,
    flows: HashMap<u64, Flow>,
    waiting: usize,
}

/// What is to be known of one who has joined.
#[derive(Debug, PartialEq, Eq)]
pub struct Joined<T> {
    /// Its place.
    pub ticket: Ticket,
    /// Who had to leave for it.
    pub displaced: Option<T>,
}

impl Class {
    /// The turn that one more of `key` would have.
    fn next(&self, key: u64) -> u64 {
        self.flows.get(&key).map_or(0, |flow| flow.finish).max(self.now)
    }

    /// The turn of one more of `key`.
    fn joined(&mut self, key: u64) -> u64 {
        let start = self.next(key);
        let flow = self.flows.entry(key).or_default();
        flow.finish = start.saturating_add(1);
        flow.waiting += 1;
        self.waiting += 1;
        start
    }

    /// One of `key` waits no more.
    fn left(&mut self, key: u64) {
        self.waiting = self.waiting.saturating_sub(1);
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.waiting = flow.waiting.saturating_sub(1);
            if flow.waiting == 0 {
                // turns that were not used are given back, all but the one of this round
                flow.finish = flow.finish.min(self.now.saturating_add(1));
                if flow.finish <= self.now {
                    self.flows.remove(&key);
                }
            }
        }
        let most = 2 * self.waiting + REMEMBERED_KEYS;
        if self.flows.len() > most {
            self.forget();
        }
        if self.flows.len() > most {
            // the round is called over: nobody who does not wait has a turn beyond the next
            self.now = self.now.saturating_add(1);
            self.forget();
        }
    }

    fn forget(&mut self) {
        let now = self.now;
        self.flows.retain(|_, flow| flow.waiting > 0 || flow.finish > now);
    }
}

/// A bounded queue.
#[derive(Debug)]
pub struct Queue<T> {
    /// With their keys, in the order of service.
    places: BTreeMap<Ticket, (u64, T)>,
    /// By priority; only those in which somebody waits.
    classes: BTreeMap<i64, Class>,
    most: usize,
    arrivals: u64,
}

impl<T> Queue<T> {
    /// Nobody waits; at most `most` will.
    pub fn new(most: usize) -> Self {
        Self { places: BTreeMap::new(), classes: BTreeMap::new(), most, arrivals: 0 }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether nobody more may wait.
    pub fn is_full(&self) -> bool {
        self.places.len() >= self.most
    }

    /// Lets one more wait. A lower priority goes first, as in vLLM (`ChatCompletionRequest.priority`).
    ///
    /// # Errors
    /// The queue is full of others that go first; the item comes back.
    pub fn join(&mut self, priority: i64, key: u64, item: T) -> Result<Joined<T>, T> {
        let mut displaced = None;
        if self.is_full() {
            let start = self.classes.get(&priority).map_or(0, |class| class.next(key));
            let ticket = Ticket { priority, start, number: self.arrivals };
            match self.places.last_key_value() {
                Some((&last, _)) if ticket < last => displaced = self.leave(last),
                _ => return Err(item),
            }
        }
        let start = self.classes.entry(priority).or_default().joined(key);
        let ticket = Ticket { priority, start, number: self.arrivals };
        self.arrivals += 1;
        self.places.insert(ticket, (key, item));
        Ok(Joined { ticket, displaced })
    }

    /// Takes out who does not want to wait any longer; `None`: it has been served.
    pub fn leave(&mut self, ticket: Ticket) -> Option<T> {
        let (key, item) = self.places.remove(&ticket)?;
        self.ended(ticket, key, None);
        Some(item)
    }

    /// Shows all who wait to `judge`, in order, until it has had enough.
    pub fn serve(&mut self, mut judge: impl FnMut(&T) -> Verdict) {
        let mut served = Vec::new();
        for (&ticket, (_, item)) in &self.places {
            match judge(item) {
                Verdict::Enough => break,
                Verdict::Passed => {}
                Verdict::Served => served.push(ticket),
            }
        }
        for ticket in served {
            if let Some((key, _)) = self.places.remove(&ticket) {
                self.ended(ticket, key, Some(ticket.start));
            }
        }
    }

    /// One waits no more; its turn, if it was served.
    fn ended(&mut self, ticket: Ticket, key: u64, turn: Option<u64>) {
        let Some(class) = self.classes.get_mut(&ticket.priority) else { return };
        class.now = class.now.max(turn.unwrap_or(0));
        class.left(key);
        if class.waiting == 0 {
            self.classes.remove(&ticket.priority);
        }
        debug_assert_eq!(
            self.places.len(),
            self.classes.values().map(|class| class.waiting).sum::<usize>(),
            "who waits is counted in its class"
        );
    }
}

#[cfg(test)]
mod tests;
