//! Where strings and containers of JSON end: the search that nearly all of a body is gone through with.
//!
//! Text without escapes is left to a vector search that stops at the first quote or backslash. Where such bytes stand
//! close together, in source code or in the schemas of tools, each stop is a branch that cannot be predicted. So
//! a block that has some is taken as a whole, with a bit for each byte, and costs the same however many there are.
//! Per byte that is 0.11 ns for source code (0.46 with stops), 0.45 for schemas (0.71), 0.04 for arrays of numbers, and
//! 0.01 for plain text.

#![expect(
    unsafe_code,
    reason = "the vector instructions that every x86-64 has are called like those that it may not have"
)]

use memchr::memchr2;

/// Bytes that are looked at together. With 64 the dearest text costs a quarter less, and short strings a quarter more.
const SIZE: usize = 32;

/// Every second bit, from the lowest on.
const EVEN: u32 = 0x5555_5555;

type Block = [u8; SIZE];

/// End of the string whose quote is at `at`, behind its other quote.
pub(super) fn string(body: &[u8], at: usize) -> Option<usize> {
    text(body, super::expect(body, at, b'"')?, 0)
}

/// End of the string that is gone through at `at`, where the next byte is `escaped` (1) or not (0).
fn text(body: &[u8], mut at: usize, mut escaped: u32) -> Option<usize> {
    loop {
        let mut padded = [0; SIZE];
        let block = block(body, at, &mut padded)?;
        let (quotes, backslashes) = (places(block, b'"'), places(block, b'\\'));
        let plain = backslashes | escaped == 0;
        let quotes = if plain { quotes } else { quotes & !escapes(backslashes, &mut escaped) };
        if quotes != 0 {
            return Some(at + quotes.trailing_zeros() as usize + 1);
        }
        at += SIZE;
        if plain {
            at += memchr2(b'"', b'\\', body.get(at..)?)?;
        }
    }
}

/// End of the object or array whose bracket is at `at`. Which kind a closing bracket has is left to the worker, and so
/// is a backslash outside of strings, which is no JSON.
pub(super) fn container(body: &[u8], mut at: usize) -> Option<usize> {
    let (mut depth, mut escaped) = (0_u32, 0);
    // all bits if the block begins within a string
    let mut within = 0_u32;
    loop {
        let mut padded = [0; SIZE];
        let block = block(body, at, &mut padded)?;
        let mut quotes = places(block, b'"');
        let backslashes = places(block, b'\\');
        if backslashes | escaped != 0 {
            quotes &= !escapes(backslashes, &mut escaped);
        }
        if quotes == 0 && within != 0 {
            // a string that is longer than a block
            at = text(body, at + SIZE, escaped)?;
            (within, escaped) = (0, 0);
            continue;
        }
        let text = toggled(quotes) ^ within;
        within = (text.cast_signed() >> 31).cast_unsigned();
        // brackets and braces differ in one bit
        let folded = block.map(|byte| byte | 0x20);
        let opening = places(&folded, b'{') & !text;
        let closing = places(&folded, b'}') & !text;
        if closing.count_ones() >= depth {
            let mut brackets = opening | closing;
            while brackets != 0 {
                let place = brackets.trailing_zeros();
                if opening >> place & 1 == 1 {
                    depth = depth.checked_add(1)?;
                } else if depth <= 1 {
                    return Some(at + place as usize + 1);
                } else {
                    depth -= 1;
                }
                brackets &= brackets - 1;
            }
        } else {
            depth = depth.checked_add(opening.count_ones())? - closing.count_ones();
        }
        at += SIZE;
        if quotes | opening | closing == 0 {
            at += numbers(body.get(at..)?);
        }
    }
}

/// The block at `at`; the last one, if it is not whole, is laid out in `padded`. `None`: nothing is there.
fn block<'a>(body: &'a [u8], at: usize, padded: &'a mut Block) -> Option<&'a Block> {
    let rest = body.get(at..)?;
    if let Some(block) = rest.first_chunk() {
        return Some(block);
    }
    padded.get_mut(..rest.len())?.copy_from_slice(rest);
    (!rest.is_empty()).then_some(padded)
}

/// Length of the blocks, from the beginning of `body`, that have neither a quote nor a bracket.
fn numbers(body: &[u8]) -> usize {
    let is = |byte: &u8| *byte == b'"' || matches!(byte | 0x20, b'{' | b'}');
    // no early exit within a block, so that the compiler makes vectors of it
    let (blocks, _) = body.as_chunks::<SIZE>();
    SIZE * blocks.iter().take_while(|block| !block.iter().fold(false, |any, byte| any | is(byte))).count()
}

/// The bits from each odd one of `bits` up to the next one.
fn toggled(bits: u32) -> u32 {
    [1, 2, 4, 8, 16].into_iter().fold(bits, |bits, shift| bits ^ bits << shift)
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

/// Where a byte is in a block: a bit for each place, the first one's lowest.
#[cfg(target_arch = "x86_64")]
fn places(block: &Block, byte: u8) -> u32 {
    use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};

    #[inline]
    #[target_feature(enable = "sse2")]
    fn with_sse2(block: &Block, byte: u8) -> u32 {
        let words = block.as_chunks().0;
        let half = |at: usize| {
            let half = _mm_set_epi64x(i64::from_le_bytes(words[at + 1]), i64::from_le_bytes(words[at]));
            _mm_movemask_epi8(_mm_cmpeq_epi8(half, _mm_set1_epi8(byte.cast_signed()))).cast_unsigned()
        };
        half(0) | half(2) << 16
    }

    // SAFETY: SSE2 is part of x86-64.
    unsafe { with_sse2(block, byte) }
}

/// Where a byte is in a block: a bit for each place, the first one's lowest.
#[cfg(not(target_arch = "x86_64"))]
fn places(block: &Block, byte: u8) -> u32 {
    block.iter().enumerate().fold(0, |bits, (at, &other)| bits | u32::from(other == byte) << at)
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

    /// Ends of a container: of brackets that are in no string, each of which is gone over as a string is.
    fn naive_container(body: &[u8]) -> Option<usize> {
        let (mut at, mut depth) = (0, 0_usize);
        loop {
            match body.get(at)? {
                b'"' => {
                    at = naive(body, at)?;
                    continue;
                }
                b'[' | b'{' => depth += 1,
                b']' | b'}' if depth == 1 => return Some(at + 1),
                b']' | b'}' => depth -= 1,
                _ => {}
            }
            at += 1;
        }
    }

    /// Values as they stand in JSON, and what is between them.
    fn piece() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => prop_oneof![Just("["), Just("]"), Just("{"), Just("}"), Just(","), Just(" : ")].prop_map(String::from),
            2 => (0_usize..90).prop_map(|length| "17, ".repeat(length)),
            4 => vec(prop_oneof![
                6 => "[a-z]{0,12}", 2 => Just("\\\\".to_owned()), 2 => Just("\\\"".to_owned()), 1 => Just("]}[{".to_owned()),
                1 => "[a-z ]{60,120}",
            ], 0..8).prop_map(|parts| format!("\"{}\"", parts.concat())),
        ]
    }

    #[test]
    fn runs_of_backslashes_of_any_length_anywhere_escape_every_second_byte() {
        for before in 0..2 * SIZE + 3 {
            for run in 0..2 * SIZE + 3 {
                for behind in ["\"", "\"\"", "a\"", "", "a"] {
                    let text = format!("\"{}{}{behind}", ".".repeat(before), "\\".repeat(run));
                    assert_eq!(string(text.as_bytes(), 0), naive(text.as_bytes(), 0), "{text}");
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
            prop_assert_eq!(string(&body, 0), naive(&body, 0));
            prop_assert_eq!(string(&body, at), naive(&body, at));
        }

        #[test]
        fn a_container_ends_where_a_walk_over_its_bytes_says(pieces in vec(piece(), 0..40), cut in 0_usize..400) {
            let body = format!("[{}]]]]", pieces.concat());
            prop_assert_eq!(container(body.as_bytes(), 0), naive_container(body.as_bytes()), "{}", body);
            let cut = &body.as_bytes()[..body.len().saturating_sub(cut).max(1)];
            prop_assert_eq!(container(cut, 0), naive_container(cut), "{}", body);
        }
    }
}
