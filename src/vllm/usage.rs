//! What an answer says of the tokens that it took, found without parsing it.
//!
//! Only `"usage":{…}` is looked for: within a JSON string its quotes would be escaped, so what a model writes
//! cannot be mistaken for it. An object that is torn apart by two reads is missed; nobody depends on every answer.

use std::sync::LazyLock;

use memchr::memmem::{Finder, FinderRev};

/// What a worker reports of an answer. `None`: not told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u64>,
    /// Those of them that were found in the prefix cache.
    pub cached_tokens: Option<u64>,
    /// Tokens that were generated.
    pub completion_tokens: Option<u64>,
}

const OPENING: &[u8] = b"\"usage\":{";

/// A usage object of vLLM has at most some 500 bytes; lists in it (tokens per turn) are not needed.
const LONGEST: usize = 1024;

/// The usage stands at an answer's end, behind it only a few fields that are `null` mostly.
const TAIL: usize = 8 * 1024;

static FORWARD: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(OPENING));
static BACKWARD: LazyLock<FinderRev<'static>> = LazyLock::new(|| FinderRev::new(OPENING));

/// The usage that this part of a stream tells, if it tells any.
pub fn usage_of_events(part: &[u8]) -> Option<Usage> {
    // most parts have none, and the search from the front is the faster one
    FORWARD.find(part)?;
    last_usage(part)
}

/// The usage at the end of an answer of one JSON document, of which `part` is the last piece.
pub fn usage_of_tail(part: &[u8]) -> Option<Usage> {
    last_usage(part.get(part.len().saturating_sub(TAIL)..)?)
}

fn last_usage(part: &[u8]) -> Option<Usage> {
    let at = BACKWARD.rfind(part)? + OPENING.len();
    let object = part.get(at..)?;
    let object = object.get(..LONGEST).unwrap_or(object);
    let object = object.get(..end(object)?)?;
    let either = |one: &[u8], other: &[u8]| number(object, one).or_else(|| number(object, other));
    let usage = Usage {
        prompt_tokens: either(b"\"prompt_tokens\":", b"\"input_tokens\":"),
        cached_tokens: number(object, b"\"cached_tokens\":"),
        completion_tokens: either(b"\"completion_tokens\":", b"\"output_tokens\":"),
    };
    (usage != Usage::default()).then_some(usage)
}

/// Where the object ends whose brace stands before `rest`. There are no braces in its strings: it has none.
fn end(rest: &[u8]) -> Option<usize> {
    let mut depth = 1_usize;
    for (at, byte) in rest.iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// The number behind `key`; `None` also for `null`.
fn number(object: &[u8], key: &[u8]) -> Option<u64> {
    let at = memchr::memmem::find(object, key)? + key.len();
    let digits = object.get(at..)?.iter().take_while(|byte| byte.is_ascii_digit());
    let mut value = None;
    for digit in digits {
        value = Some(value.unwrap_or(0_u64).checked_mul(10)?.checked_add(u64::from(digit - b'0'))?);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(prompt: u64, cached: Option<u64>, completion: u64) -> Option<Usage> {
        Some(Usage {
            prompt_tokens: Some(prompt),
            cached_tokens: cached,
            completion_tokens: Some(completion),
        })
    }

    #[test]
    fn every_shape_of_vllms_answers_is_read() {
        let chat = br#"{"id":"c","choices":[{"message":{"content":"\"usage\":{\"prompt_tokens\":99}"}}],"usage":{"prompt_tokens":12,"total_tokens":18,"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":8,"created_cache_tokens":0,"multimodal_tokens":null},"completion_tokens_details":null},"prompt_logprobs":null,"kv_transfer_params":null}"#;
        assert_eq!(usage_of_tail(chat), usage(12, Some(8), 6));
        let responses = br#""usage":{"input_tokens":11,"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0,"input_tokens_per_turn":[]},"output_tokens":6,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":17},"user":null}"#;
        assert_eq!(usage_of_tail(responses), usage(11, Some(0), 6));
        let messages = br#""usage":{"input_tokens":12,"output_tokens":6,"cache_creation_input_tokens":0,"cache_read_input_tokens":0}}"#;
        assert_eq!(usage_of_tail(messages), usage(12, None, 6));
        let without = br#""usage":{"prompt_tokens":3,"total_tokens":9,"completion_tokens":6,"prompt_tokens_details":null}}"#;
        assert_eq!(usage_of_tail(without), usage(3, None, 6));
    }

    #[test]
    fn a_stream_tells_it_in_one_event() {
        let event = b"112\r\ndata: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"total_tokens\":9,\"completion_tokens\":6}}\n\n\r\n";
        assert_eq!(usage_of_events(event), usage(3, None, 6));
        assert_eq!(usage_of_events(b"data: {\"choices\":[],\"usage\":null}\n\n"), None);
        assert_eq!(usage_of_events(b"data: [DONE]\n\n"), None);
    }

    #[test]
    fn what_is_torn_or_absurd_tells_nothing() {
        let whole = br#""usage":{"prompt_tokens":12,"completion_tokens":6}"#;
        for cut in 0..whole.len() {
            assert_eq!(usage_of_tail(&whole[..cut]), None, "cut at {cut}");
        }
        assert_eq!(usage_of_tail(br#""usage":{}"#), None);
        assert_eq!(usage_of_tail(br#""usage":{"prompt_tokens":99999999999999999999}"#), None);
        assert_eq!(usage_of_tail(&[b'{'; 5000]), None);
    }
}
