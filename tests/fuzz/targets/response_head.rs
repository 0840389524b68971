//! A response head against the reference, split in any way, and written and read again.

#![no_main]

#[expect(dead_code, reason = "each target uses its part of it")]
#[path = "../../reference.rs"]
mod reference;

use libfuzzer_sys::fuzz_target;
use reference::check_response;

// The first byte says how many of the next ones are lengths of pieces.
fuzz_target!(|data: &[u8]| {
    let Some((count, rest)) = data.split_first() else { return };
    let (cuts, input) = rest.split_at(rest.len().min(usize::from(count % 8)));
    let cuts: Vec<usize> = cuts.iter().copied().map(usize::from).collect();
    check_response(input, &cuts, cuts.len() % 2 == 1);
});
