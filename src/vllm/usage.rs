//! What an answer says of the tokens that it took, found without parsing it.
//!
//! Only `"usage":{…}` is looked for: within a JSON string its quotes would be escaped, so what a model writes
//! cannot be mistaken for it. An object that is torn apart by two reads is missed; nobody depends on every answer.

use std::sync::LazyLock;

use memchr::memmem::Finder;

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

static FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(OPENING));

/// The usage that this part of a stream tells, if it tells any; the last one counts.
pub fn usage_of_events(part: &[u8]) -> Option<Usage> {
    let finder = &*FINDER;
    let mut from = None;
    // searched from its front, which is faster and mostly finds nothing
    while let Some(at) = finder.find(part.get(from.unwrap_or(0)..)?) {
        from = Some(from.unwrap_or(0) + at + OPENING.len());
    }
    usage(part.get(from?..)?)
}

/// The usage at the end of an answer of one JSON document, of which `part` is the last piece.
pub fn usage_of_tail(part: &[u8]) -> Option<Usage> {
    usage_of_events(part.get(part.len().saturating_sub(TAIL)..)?)
}

/// Reads the object whose brace stands before `rest`. None of its strings holds a quote or a brace.
fn usage(rest: &[u8]) -> Option<Usage> {
    let mut usage = Usage::default();
    let (mut depth, mut at) = (1_usize, 0);
    while depth > 0 {
        match *rest.get(at).filter(|_| at < LONGEST)? {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b'"' => {
                let key = rest.get(at + 1..)?;
                let key = key.get(..key.iter().take(LONGEST).position(|&byte| byte == b'"')?)?;
                at += key.len() + 1;
                let place = match key {
                    b"prompt_tokens" | b"input_tokens" => &mut usage.prompt_tokens,
                    b"cached_tokens" => &mut usage.cached_tokens,
                    b"completion_tokens" | b"output_tokens" => &mut usage.completion_tokens,
                    _ => &mut None,
                };
                if let Some(value) = rest.get(at + 1..)?.strip_prefix(b":") {
                    *place = number(value);
                }
            }
            _ => {}
        }
        at += 1;
    }
    (usage != Usage::default()).then_some(usage)
}

/// The number that `value` begins with; `None` also for `null`, and for more than fits.
fn number(value: &[u8]) -> Option<u64> {
    let mut number = None;
    for digit in value.iter().take_while(|byte| byte.is_ascii_digit()) {
        number = Some(number.unwrap_or(0_u64).checked_mul(10)?.checked_add(u64::from(digit - b'0'))?);
    }
    number
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
