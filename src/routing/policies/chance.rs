//! Numbers out of the chance that a policy is given: spread evenly, however few of its bits are.

/// Steps of the sequence that SplitMix64 makes; also what separates two draws out of the same chance.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64: every bit of the result depends on every bit of `bits`.
pub(super) fn mix(bits: u64) -> u64 {
    let bits = bits.wrapping_add(STEP);
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// Another chance, to draw once more.
pub(super) fn again(random: u64) -> u64 {
    mix(random).wrapping_add(STEP)
}

/// A number below `count`, which must not be 0.
pub(super) fn below(random: u64, count: usize) -> usize {
    debug_assert!(count > 0, "there is no number below 0");
    // the upper half of the product is less than `count`
    ((u128::from(mix(random)) * count as u128) >> 64) as usize
}

/// A number from 0 to 1, without 1.
pub(super) fn unit(random: u64) -> f64 {
    (mix(random) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_evenly_even_where_chance_only_counts() {
        let mut counts = [[0; 5]; 5];
        for random in 0..25_000 {
            assert!((0.0..1.0).contains(&unit(random)));
            counts[below(random, 5)][below(again(random), 5)] += 1;
        }
        assert!(counts.as_flattened().iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
