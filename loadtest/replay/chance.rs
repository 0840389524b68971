//! Seeded chance: the same seed gives the same run on every machine.

/// A stream of numbers (SplitMix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

/// The finaliser of SplitMix64: a hash of 64 bits.
pub(crate) fn hash(key: u64) -> u64 {
    let key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ (key >> 31)
}

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(hash(seed))
    }

    /// Any 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        hash(self.0)
    }

    /// 0 to 1, without 1.
    pub(crate) fn share(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `low` to `high`, without `high`.
    pub(crate) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + self.share() * (high - low)
    }

    /// One of `count`.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        (self.share() * count as f64) as usize
    }

    /// Exponential.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.share()).ln()
    }

    /// Log-normal with this mean, within limits; `sigma` is that of the logarithm.
    pub(crate) fn log_normal(&mut self, mean: f64, sigma: f64, low: f64, high: f64) -> f64 {
        let radius = (-2.0 * (1.0 - self.share()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.share()).cos();
        (mean.ln() - sigma * sigma / 2.0 + sigma * normal).exp().clamp(low, high)
    }
}

/// Zipf's law over some ranks.
#[derive(Debug)]
pub(crate) struct Zipf {
    /// Sums of the ranks' weights, ascending to 1.
    sums: Vec<f64>,
}

impl Zipf {
    pub(crate) fn new(count: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let mut sums: Vec<f64> = (1..=count)
            .map(|rank| {
                sum += (rank as f64).powf(-exponent);
                sum
            })
            .collect();
        sums.iter_mut().for_each(|part| *part /= sum);
        Self { sums }
    }

    /// A rank, from 0.
    pub(crate) fn draw(&self, chance: &mut Chance) -> usize {
        let share = chance.share();
        self.sums.partition_point(|sum| *sum <= share).min(self.sums.len() - 1)
    }
}
