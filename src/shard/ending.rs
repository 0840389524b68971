//! What a signal to end means: the first one drains, a later one ends at once.
//!
//! Who stops a service may send two in quick succession: systemd with `KillMode=mixed` and a wrapper that passes its
//! own on, a terminal and the shell behind it, an orchestrator beside its hook. That is one wish, not two
//! (`faults.md` P10).

use crate::base::Millis;

/// A signal this soon after the first is the same wish, in milliseconds.
const SAME_MS: Millis = 1000;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// Finish what runs, then end.
    Drain,
    /// Nothing: it was said already.
    Nothing,
    /// End now.
    EndAtOnce,
}

/// The signals to end that have come.
#[derive(Debug, Default)]
pub struct Ending {
    /// When the first one came.
    first: Option<Millis>,
}

impl Ending {
    /// What a signal to end means that comes `now`.
    pub fn signal(&mut self, now: Millis) -> Meaning {
        match self.first {
            None => {
                self.first = Some(now);
                Meaning::Drain
            }
            Some(first) if now.saturating_sub(first) < SAME_MS => Meaning::Nothing,
            Some(_) => Meaning::EndAtOnce,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p10_a_doubled_signal_is_one_and_a_later_one_ends_at_once() {
        let mut ending = Ending::default();
        assert_eq!(ending.signal(5_000), Meaning::Drain);
        for now in [5_000, 5_001, 5_999] {
            assert_eq!(ending.signal(now), Meaning::Nothing);
        }
        // those in between do not put it off
        assert_eq!(ending.signal(6_000), Meaning::EndAtOnce);
        assert_eq!(ending.signal(6_001), Meaning::EndAtOnce);
    }
}
