//! The kinds of bytes in a head, and the search for those that no line may hold. A head is short lines with short
//! names, for which the set-up of a searcher costs more than the search.

/// RFC 9110 §5.6.2: `tchar`.
static TOKEN: [bool; 256] = alphanumeric_and(b"!#$%&'*+-.^_`|~");

/// RFC 3986 §3.2.2: what a registered name is made of, besides percent-encoded bytes.
static REGISTERED: [bool; 256] = alphanumeric_and(b"-._~!$&'()*+,;=");

const fn alphanumeric_and(others: &[u8]) -> [bool; 256] {
    let mut class = [false; 256];
    let mut byte = 0_u8;
    while byte < 128 {
        class[byte as usize] = byte.is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < others.len() {
        class[others[at] as usize] = true;
        at += 1;
    }
    class
}

/// Where the first byte is for which [`is_value_byte`] does not hold.
pub(super) fn control_at(bytes: &[u8]) -> Option<usize> {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const TOP: u64 = 0x80 * EACH;
    let (words, rest) = bytes.as_chunks::<8>();
    let mut at = 0;
    for word in words {
        // Eight bytes in one number, whose top bits tell: no sum is larger than a byte, so none spoils its neighbour.
        let word = u64::from_le_bytes(*word);
        let low = word & !TOP;
        let below_space = !(low + (0x80 - 0x20) * EACH);
        let is_del = low + EACH;
        let no_tab = (low ^ (0x09 * EACH)) + 0x7f * EACH;
        let hits = (below_space | is_del) & no_tab & !word & TOP;
        if hits != 0 {
            return Some(at + hits.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    rest.iter().position(|&byte| !is_value_byte(byte)).map(|offset| at + offset)
}

/// How many bytes at the start of `bytes` may stand in a token.
pub(super) fn token_len(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|&&byte| is_token_byte(byte)).count()
}

/// How many bytes at the start of `bytes` may stand in a registered name as they are.
pub(super) fn registered_len(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|&&byte| REGISTERED[usize::from(byte)]).count()
}

/// Whether `byte` may stand in a token.
pub(super) fn is_token_byte(byte: u8) -> bool {
    TOKEN[usize::from(byte)]
}

/// RFC 9110 §5.5: what a field value may hold, HTAB and obs-text included.
pub(super) fn is_value_byte(byte: u8) -> bool {
    (byte == b'\t') | ((byte >= b' ') & (byte != 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_control_character_is_found_wherever_it_stands() {
        for len in 0..70 {
            let mut bytes = vec![b'\t'; len];
            assert_eq!(control_at(&bytes), None);
            for at in (0..len).rev() {
                bytes[at] = b'\r';
                assert_eq!(control_at(&bytes), Some(at), "{len}");
            }
        }
    }

    #[test]
    fn every_byte_is_of_the_classes_of_the_grammar() {
        for byte in 0..=255_u8 {
            let tchar = byte.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(&byte);
            assert_eq!(is_token_byte(byte), tchar, "{byte:#x}");
            assert_eq!(token_len(&[byte; 3]), if tchar { 3 } else { 0 }, "{byte:#x}");
            let unreserved_or_sub_delim = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte);
            assert_eq!(registered_len(&[byte]), usize::from(unreserved_or_sub_delim), "{byte:#x}");
            let value = byte == b'\t' || !byte.is_ascii_control();
            assert_eq!(is_value_byte(byte), value, "{byte:#x}");
            for at in 0..8 {
                // also where its neighbours are what it must not be taken for
                for other in [b' ', b'\t', b'~', 0xff, 0x80] {
                    let mut word = [other; 8];
                    word[at] = byte;
                    assert_eq!(control_at(&word), (!value).then_some(at), "{byte:#x}");
                }
            }
        }
    }
}
