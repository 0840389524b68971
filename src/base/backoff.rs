//! Pauses that grow, with chance in them.

/// How long to wait before trying again: each pause is `multiplier` times the one before, and chance spreads
/// them, so that who failed together does not come back together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// The first pause, in milliseconds.
    pub initial_ms: u64,
    /// The longest pause before chance is added, in milliseconds.
    pub max_ms: u64,
    /// What each pause is longer by.
    pub multiplier: f64,
    /// Share of a pause that chance adds or takes, 0 to 1.
    pub jitter: f64,
}

impl Backoff {
    /// The pause number `n`, counted from 0, in milliseconds. `chance` is between 0 and 1: 0.5 changes nothing.
    pub fn pause_ms(&self, n: u32, chance: f64) -> u64 {
        let exponent = i32::try_from(n).unwrap_or(i32::MAX);
        let plain = (self.initial_ms as f64 * self.multiplier.powi(exponent)).min(self.max_ms as f64);
        let spread = 1.0 + self.jitter * (2.0 * chance.clamp(0.0, 1.0) - 1.0);
        // a cast from a float saturates, and makes 0 of what is not a number
        (plain * spread) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: Backoff = Backoff { initial_ms: 50, max_ms: 30_000, multiplier: 1.5, jitter: 0.2 };

    #[test]
    fn pauses_grow_up_to_the_longest() {
        let pauses: Vec<u64> = (0..5).map(|n| USUAL.pause_ms(n, 0.5)).collect();
        assert_eq!(pauses, [50, 75, 112, 168, 253]);
        assert_eq!(USUAL.pause_ms(100, 0.5), 30_000);
        assert_eq!(USUAL.pause_ms(u32::MAX, 0.5), 30_000, "beyond every float");
    }

    #[test]
    fn chance_adds_or_takes_its_share_and_no_more() {
        assert_eq!([0.0, 0.25, 0.75, 1.0].map(|chance| USUAL.pause_ms(0, chance)), [40, 45, 55, 60]);
        assert_eq!([-3.0, 7.0].map(|chance| USUAL.pause_ms(0, chance)), [40, 60]);
    }

    #[test]
    fn a_fixed_pause_neither_grows_nor_varies() {
        let fixed = Backoff { initial_ms: 2000, max_ms: 2000, multiplier: 1.0, jitter: 0.0 };
        for (n, chance) in [(0, 0.0), (3, 1.0), (1000, 0.3)] {
            assert_eq!(fixed.pause_ms(n, chance), 2000);
        }
        assert_eq!(Backoff { initial_ms: 0, ..USUAL }.pause_ms(9, 1.0), 0);
    }
}
