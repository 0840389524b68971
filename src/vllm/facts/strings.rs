//! Where a JSON string ends: the search that nearly all of a body is gone through with.
//!
//! Text without escapes is left to a vector search that stops at the first quote or backslash. Where there are
//! escapes, as in source code, such a search stops every few bytes and each stop is a branch that cannot be predicted:
//! 0.46 ns a byte. So a block that has some is taken as a whole, with a bit for each byte, and costs the same however
//! many there are: 0.11 ns a byte.

#![expect(
    unsafe_code,
    reason = "the vector instructions that every x86-64 has are called like those that it may not have"
)]

use memchr::memchr2;

/// Bytes that are looked at together. With 64 the dearest text costs a quarter less, and short strings a quarter more.
const BLOCK: usize = 32;

/// Every second bit, from the lowest on.
const EVEN: u32 = 0x5555_5555;

/// Where the quotes and the backslashes of a block are, a bit for each byte, the first byte's lowest.
struct Found {
    quotes: u32,
    backslashes: u32,
}

/// End of the string whose quote is at `at`, behind its other quote.
pub(super) fn end(body: &[u8], at: usize) -> Option<usize> {
    let mut at = super::expect(body, at, b'"')?;
    // whether the next byte is escaped: 1 or 0
    let mut escaped = 0;
    loop {
        let rest = body.get(at..)?;
        let Found { quotes, backslashes } = match rest.first_chunk() {
            Some(block) => find(block),
            None if rest.is_empty() => return None,
            None => {
                let mut block = [0; BLOCK];
                block[..rest.len()].copy_from_slice(rest);
                find(&block)
            }
        };
        let plain = backslashes | escaped == 0;
        let quotes = if plain { quotes } else { quotes & !escapes(backslashes, &mut escaped) };
        if quotes != 0 {
            return Some(at + quotes.trailing_zeros() as usize + 1);
        }
        at += BLOCK;
        if plain {
            at += memchr2(b'"', b'\\', body.get(at..)?)?;
        }
    }
}

/// The bytes of a block that a backslash stands before which is none of these itself; `carry` is 1 if the first one is, and
/// becomes 1 if the next block's first one is. (Langdale and Lemire, "Parsing gigabytes of JSON per second", §3.1.1.)
fn escapes(backslashes: u32, carry: &mut u32) -> u32 {
    let backslashes = backslashes & !*carry;
    let behind = backslashes << 1 | *carry;
    // adding the start of a run to it carries to the bit behind its end
    let (ends, over) = (backslashes & !EVEN & !behind).overflowing_add(backslashes);
    *carry = u32::from(over);
    (EVEN ^ ends << 1) & behind
}

#[cfg(target_arch = "x86_64")]
fn find(block: &[u8; BLOCK]) -> Found {
    use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};

    #[inline]
    #[target_feature(enable = "sse2")]
    fn with_sse2(block: &[u8; BLOCK]) -> Found {
        let (words, _) = block.as_chunks();
        let half =
            |at: usize| _mm_set_epi64x(i64::from_le_bytes(words[at + 1]), i64::from_le_bytes(words[at]));
        let halves = [half(0), half(2)];
        let places = |byte: u8| {
            let wanted = _mm_set1_epi8(byte.cast_signed());
            let [low, high] =
                halves.map(|half| _mm_movemask_epi8(_mm_cmpeq_epi8(half, wanted)).cast_unsigned());
            low | high << 16
        };
        Found { quotes: places(b'"'), backslashes: places(b'\\') }
    }

    // SAFETY: SSE2 is part of x86-64.
    unsafe { with_sse2(block) }
}

#[cfg(not(target_arch = "x86_64"))]
fn find(block: &[u8; BLOCK]) -> Found {
    let places = |wanted: u8| {
        let bits = block.iter().enumerate().map(|(at, &byte)| u32::from(byte == wanted) << at);
        bits.fold(0, |all, bit| all | bit)
    };
    Found { quotes: places(b'"'), backslashes: places(b'\\') }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn naive(body: &[u8], at: usize) -> Option<usize> {
        let mut bytes = body.iter().enumerate().skip(at);
        bytes.next().filter(|(_, byte)| **byte == b'"')?;
        loop {
            match bytes.next()? {
                (at, b'"') => return Some(at + 1),
                (_, b'\\') => bytes.next().map(|_| ())?,
                _ => {}
            }
        }
    }

    #[test]
    fn runs_of_backslashes_of_any_length_anywhere_escape_every_second_byte() {
        for before in 0..2 * BLOCK + 3 {
            for run in 0..2 * BLOCK + 3 {
                for behind in ["\"", "\"\"", "a\"", "", "a"] {
                    let text = format!("\"{}{}{behind}", ".".repeat(before), "\\".repeat(run));
                    assert_eq!(end(text.as_bytes(), 0), naive(text.as_bytes(), 0), "{text}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_string_ends_where_a_walk_over_its_bytes_says(
            text in vec(prop_oneof![6 => Just(b'x'), 3 => Just(b'\\'), 1 => Just(b'"'), 1 => any::<u8>()], 0..300),
            at in 0_usize..40,
        ) {
            let body = [b"\"", &text[..]].concat();
            prop_assert_eq!(end(&body, 0), naive(&body, 0));
            prop_assert_eq!(end(&body, at), naive(&body, at));
        }
    }
}
