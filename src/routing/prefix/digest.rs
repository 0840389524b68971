//! The hash of one chunk: XXH3 with 64 bits, without a seed (xxHash's `doc/xxhash_spec.md`, "XXH3 Algorithm Overview").
//!
//! The crate chooses its instructions when it is compiled, for a processor that nobody has any more. Hashing is most
//! of what a long prompt costs, so where the processor has AVX2 it is done here, in half of the time: 13 instead of
//! 27 ns for a chunk. The values are shared with other proxies and are the same.

#![expect(unsafe_code, reason = "instructions that not every processor has are called after a look at it")]

use xxhash_rust::xxh3::xxh3_64;

use crate::routing::prefix::prompt::CHUNK_BYTES;

/// The hash of a chunk.
pub(super) fn of(chunk: &[u8; CHUNK_BYTES]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { avx2::hash(chunk) };
    }
    xxh3_64(chunk)
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi64, _mm256_extract_epi64, _mm256_mul_epu32, _mm256_set_epi64x,
        _mm256_shuffle_epi32, _mm256_srli_epi64, _mm256_xor_si256,
    };

    use crate::routing::prefix::prompt::CHUNK_BYTES;

    /// Words of a stripe, and sums.
    const LANES: usize = 8;

    const STRIPES: usize = CHUNK_BYTES / (8 * LANES);

    // shorter inputs are hashed in another way, and sums are mixed in between in longer ones
    const _: () = assert!(CHUNK_BYTES > 240 && CHUNK_BYTES <= 1024 && CHUNK_BYTES.is_multiple_of(8 * LANES));

    /// `kSecret`.
    const SECRET: &[u8; 192] = b"\
        \xb8\xfe\x6c\x39\x23\xa4\x4b\xbe\x7c\x01\x81\x2c\xf7\x21\xad\x1c\xde\xd4\x6d\xe9\x83\x90\x97\xdb\
        \x72\x40\xa4\xa4\xb7\xb3\x67\x1f\xcb\x79\xe6\x4e\xcc\xc0\xe5\x78\x82\x5a\xd0\x7d\xcc\xff\x72\x21\
        \xb8\x08\x46\x74\xf7\x43\x24\x8e\xe0\x35\x90\xe6\x81\x3a\x26\x4c\x3c\x28\x52\xbb\x91\xc3\x00\xcb\
        \x88\xd0\x65\x8b\x1b\x53\x2e\xa3\x71\x64\x48\x97\xa2\x0d\xf9\x4e\x38\x19\xef\x46\xa9\xde\xac\xd8\
        \xa8\xfa\x76\x3f\xe3\x9c\x34\x3f\xf9\xdc\xbb\xc7\xc7\x0b\x4f\x1d\x8a\x51\xe0\x4b\xcd\xb4\x59\x31\
        \xc8\x9f\x7e\xc9\xd9\x78\x73\x64\xea\xc5\xac\x83\x34\xd3\xeb\xc3\xc5\x81\xa0\xff\xfa\x13\x63\xeb\
        \x17\x0d\xdd\x51\xb7\xf0\xda\x49\xd3\x16\x55\x26\x29\xd4\x68\x9e\x2b\x16\xbe\x58\x7d\x47\xa1\xfc\
        \x8f\xf8\xb8\xd1\x7a\xd0\x31\xce\x45\xcb\x3a\x8f\x95\x16\x04\x28\xaf\xd7\xfb\xca\xbb\x4b\x40\x7e";

    /// What the words of each stripe are mixed with: of the last one the end of the secret but seven bytes.
    const KEYS: [[u64; LANES]; STRIPES] = {
        let mut keys = [secret(SECRET.len() - 8 * LANES - 7); STRIPES];
        let mut stripe = 0;
        while stripe < STRIPES - 1 {
            keys[stripe] = secret(8 * stripe);
            stripe += 1;
        }
        keys
    };

    /// What the sums are mixed with in the end.
    const END: [u64; LANES] = secret(11);

    /// What the sums begin with: xxHash's primes.
    const START: [u64; LANES] = [
        0xc2b2_ae3d,
        LENGTH_FACTOR,
        0xc2b2_ae3d_27d4_eb4f,
        0x1656_67b1_9e37_79f9,
        0x85eb_ca77_c2b2_ae63,
        0x85eb_ca77,
        0x27d4_eb2f_1656_67c5,
        0x9e37_79b1,
    ];

    const LENGTH_FACTOR: u64 = 0x9e37_79b1_85eb_ca87;

    /// The words of the secret from the byte `at` on.
    const fn secret(at: usize) -> [u64; LANES] {
        let mut words = [0; LANES];
        let mut byte = 0;
        while byte < 8 * LANES {
            words[byte / 8] |= (SECRET[at + byte] as u64) << (8 * (byte % 8));
            byte += 1;
        }
        words
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn hash(chunk: &[u8; CHUNK_BYTES]) -> u64 {
        let mut sums = halves(&START);
        let (stripes, _) = chunk.as_chunks::<8>().0.as_chunks::<LANES>();
        for (stripe, keys) in stripes.iter().zip(&KEYS) {
            let (words, keys) = (halves(&stripe.map(u64::from_le_bytes)), halves(keys));
            for half in 0..2 {
                let mixed = _mm256_xor_si256(words[half], keys[half]);
                let product = _mm256_mul_epu32(mixed, _mm256_srli_epi64::<32>(mixed));
                // each word to the sum of its neighbour
                let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(words[half]);
                sums[half] = _mm256_add_epi64(sums[half], _mm256_add_epi64(product, swapped));
            }
        }
        let [[a, b, c, d], [e, f, g, h]] = [words(sums[0]), words(sums[1])];
        merged([a, b, c, d, e, f, g, h])
    }

    #[target_feature(enable = "avx2")]
    fn halves(words: &[u64; LANES]) -> [__m256i; 2] {
        let [a, b, c, d, e, f, g, h] = words.map(u64::cast_signed);
        [_mm256_set_epi64x(d, c, b, a), _mm256_set_epi64x(h, g, f, e)]
    }

    #[target_feature(enable = "avx2")]
    fn words(half: __m256i) -> [u64; 4] {
        [
            _mm256_extract_epi64::<0>(half),
            _mm256_extract_epi64::<1>(half),
            _mm256_extract_epi64::<2>(half),
            _mm256_extract_epi64::<3>(half),
        ]
        .map(i64::cast_unsigned)
    }

    fn merged(sums: [u64; LANES]) -> u64 {
        let mut hash = LENGTH_FACTOR.wrapping_mul(CHUNK_BYTES as u64);
        for at in (0..LANES).step_by(2) {
            let product = u128::from(sums[at] ^ END[at]) * u128::from(sums[at + 1] ^ END[at + 1]);
            hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
        }
        hash = (hash ^ hash >> 37).wrapping_mul(0x1656_6791_9e37_79f9);
        hash ^ hash >> 32
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_chunk_has_the_hash_that_the_crate_has_for_it(words in proptest::collection::vec(any::<u64>(), CHUNK_BYTES / 8)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let chunk = bytes.first_chunk().expect("it is one chunk");
            prop_assert_eq!(of(chunk), xxh3_64(chunk));
        }
    }
}
