//! Images and the like that stand in a prompt as base64.
//!
//! A model reads an image as a thousand tokens or so, and its base64 has a million characters: counted as text it
//! would outweigh everything else. To look for it must cost nothing where there is none, so it is not searched:
//! a look at a few characters of every [`STRIDE`] bytes tells whether they can be base64 at all, which text, with
//! its spaces and its escapes, hardly ever is. What is too short to be found so counts as text, which is not
//! far wrong.

use std::ops::Range;

use memchr::{memchr, memrchr};

/// A run of base64 that is longer than this, and what is around it, is found.
const STRIDE: usize = 8 * 1024;

/// Characters that are looked at.
const LOOK: usize = 64;

/// Media of one value that are found; the rest counts as text.
const MOST: usize = 256;

/// Appends to `found` where in `value` media lie: the insides of their strings, in order.
pub(super) fn find(value: &[u8], found: &mut Vec<Range<usize>>) {
    let (mut from, mut at) = (0, STRIDE);
    while let Some(look) = value.get(at..at + LOOK)
        && found.len() < MOST
    {
        if look.iter().all(|&byte| is_base64(byte))
            && let Some(inside) = around(value, from, at)
        {
            at = inside.end;
            found.push(inside);
        }
        from = at;
        at += STRIDE;
    }
}

/// The inside of the string that is around `at` and begins behind `from`, if it is base64 that says so.
fn around(value: &[u8], from: usize, at: usize) -> Option<Range<usize>> {
    let start = from + memrchr(b'"', value.get(from..at)?)? + 1;
    let end = at + memchr(b'"', value.get(at..)?)?;
    let inside = value.get(start..end)?;
    let head = inside.get(..LOOK.min(inside.len()))?;
    // a URL as OpenAI has it, or Anthropic's source and OpenAI's audio, whose key is `data`
    let before = value.get(..start - 1)?;
    // a quote that is escaped is within a text
    let url = head.starts_with(b"data:") && !before.ends_with(b"\\");
    let before = before.trim_ascii_end().strip_suffix(b":");
    let keyed = before.is_some_and(|before| before.trim_ascii_end().ends_with(b"\"data\""));
    (url || keyed).then_some(start..end)
}

/// Also a backslash, for encoders that escape slashes.
fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=' | b'\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(value: &str) -> Vec<&str> {
        let mut found = Vec::new();
        find(value.as_bytes(), &mut found);
        found.into_iter().map(|range| &value[range]).collect()
    }

    /// As long as an image is, and no two are alike.
    fn image(seed: u8) -> String {
        let byte = |n: usize| (n * 31 % 251) as u8 ^ seed;
        base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            (0..30_000).map(byte).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn images_are_found_in_every_api_s_form() {
        let (one, two, three) = (image(1), image(2), image(3));
        let value = format!(
            r#"[{{"content":[{{"image_url":{{"url":"data:image/png;base64,{one}"}}}},{{"text":"{}"}},
            {{"source":{{"media_type":"image/png","data" : "{two}"}}}},
            {{"input_audio":{{"data":"{three}","format":"wav"}}}}]}}]"#,
            "some words ".repeat(500)
        );
        assert_eq!(found(&value), [&format!("data:image/png;base64,{one}"), &two, &three]);
    }

    #[test]
    fn text_is_not_taken_for_an_image() {
        let image = image(1);
        let cases = [
            format!(r#"{{"text":"{image}"}}"#),
            format!(r#"["{image}"]"#),
            format!(r#"{{"text":"see \"data:image/png;base64,{image}"}}"#),
            image.clone(),
            "a".repeat(100_000),
            format!(r#"{{"data":"{}"}}"#, "words and words ".repeat(5_000)),
            format!(r#"{{"text":"{}"}}"#, r"\u4f60\u597d".repeat(9_000)),
            format!(r#"{{"data":"{}"#, image),
            String::new(),
        ];
        for case in cases {
            assert!(found(&case).is_empty(), "{}", &case[..case.len().min(60)]);
        }
    }

    #[test]
    fn there_are_no_more_than_the_bound() {
        let one = format!(r#""data:x,{}","#, "A".repeat(2 * STRIDE));
        assert_eq!(found(&one.repeat(MOST + 50)).len(), MOST);
    }
}
