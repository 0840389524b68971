//! What requests are made of. The same seed makes the same bytes.

use crate::chance::Chance;

/// The content type of a form, and what its parts are divided by.
pub(crate) const FORM: &str = "multipart/form-data; boundary=----measured7f3a";
const BOUNDARY: &str = "------measured7f3a";
/// Bytes of the file that is transcribed.
const AUDIO_BYTES: usize = 10 << 20;
/// Inputs of a request for embeddings, and the bytes of each.
const INPUTS: usize = 64;
const INPUT_BYTES: usize = 200;

/// What was asked for on the command line.
#[derive(Debug)]
pub(crate) struct Asked {
    /// At least one.
    pub(crate) models: Vec<String>,
    pub(crate) seed: u64,
    /// Events of a stream, and the milliseconds between them.
    pub(crate) events: u32,
    pub(crate) gap_ms: u32,
}

/// Chats that grow: each turn is sent with all that was said before.
#[derive(Debug)]
pub(crate) struct Chats {
    model: String,
    chance: Chance,
    /// Prompts that every second chat begins with one of.
    systems: Vec<String>,
    /// Messages so far, each with a comma behind it.
    chats: Vec<String>,
    turn: usize,
}

impl Chats {
    const AT_A_TIME: usize = 64;
    const SYSTEMS: usize = 4;
    const SYSTEM_BYTES: usize = 4096;
    const SAID_BYTES: usize = 1024;
    /// Bytes after which a chat makes room for another one.
    const LONGEST: usize = 48 << 10;

    pub(crate) fn new(asked: &Asked) -> Self {
        let mut chance = Chance::new(asked.seed);
        let systems = (0..Self::SYSTEMS).map(|_| words(&mut chance, Self::SYSTEM_BYTES)).collect();
        Self {
            model: asked.models[0].clone(),
            chance,
            systems,
            chats: vec![String::new(); Self::AT_A_TIME],
            turn: 0,
        }
    }

    /// The next turn of the chat whose turn it is.
    pub(crate) fn next_body(&mut self) -> Vec<u8> {
        let at = self.turn % Self::AT_A_TIME;
        self.turn += 1;
        let chat = &mut self.chats[at];
        if chat.len() > Self::LONGEST {
            chat.clear();
        }
        if chat.is_empty() && at.is_multiple_of(2) {
            let system = &self.systems[self.chance.below(Self::SYSTEMS)];
            *chat += &format!(r#"{{"role":"system","content":"{system}"}},"#);
        }
        let asks = words(&mut self.chance, Self::SAID_BYTES);
        *chat += &format!(r#"{{"role":"user","content":"{asks}"}},"#);
        let messages = &chat[..chat.len() - 1];
        let body = format!(r#"{{"model":"{}","messages":[{messages}],"max_tokens":16}}"#, self.model);
        let answer = words(&mut self.chance, Self::SAID_BYTES);
        *chat += &format!(r#"{{"role":"assistant","content":"{answer}"}},"#);
        body.into_bytes()
    }
}

/// A chat of one message, which is JSON already; `more` are further fields.
fn message(model: &str, content: &str, more: &str) -> Vec<u8> {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"{content}"}}],{more}}}"#)
        .into_bytes()
}

pub(crate) fn chat(model: &str, content: &str) -> Vec<u8> {
    message(model, content, r#""max_tokens":16"#)
}

/// The number of events is what every worker understands; the gap is the mock worker's own.
pub(crate) fn stream(asked: &Asked, model: &str) -> Vec<u8> {
    let Asked { events, gap_ms, .. } = asked;
    let more = format!(r#""max_tokens":{events},"mock_gap_ms":{gap_ms},"stream":true"#);
    message(model, &"x".repeat(930), &more)
}

/// A chat of so many bytes of words.
pub(crate) fn plain(asked: &Asked, model: &str, bytes: usize) -> Vec<u8> {
    chat(model, &words(&mut Chance::new(asked.seed), bytes))
}

/// A chat of about so many bytes of source code.
pub(crate) fn escaped(asked: &Asked, model: &str, bytes: usize) -> Vec<u8> {
    chat(model, &code(&mut Chance::new(asked.seed), bytes))
}

pub(crate) fn embeddings(asked: &Asked, model: &str) -> Vec<u8> {
    let mut chance = Chance::new(asked.seed);
    let inputs: Vec<String> =
        (0..INPUTS).map(|_| format!(r#""{}""#, words(&mut chance, INPUT_BYTES))).collect();
    format!(r#"{{"model":"{model}","input":[{}]}}"#, inputs.join(",")).into_bytes()
}

pub(crate) fn audio(asked: &Asked, model: &str) -> Vec<u8> {
    let mut chance = Chance::new(asked.seed);
    let mut body = format!(
        "{BOUNDARY}\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"speech.wav\"\r\nContent-Type: audio/wav\r\n\r\n"
    )
    .into_bytes();
    body.reserve(AUDIO_BYTES + 64);
    for _ in 0..AUDIO_BYTES / 8 {
        body.extend_from_slice(&chance.bits().to_le_bytes());
    }
    body.extend_from_slice(format!("\r\n{BOUNDARY}--\r\n").as_bytes());
    body
}

/// So many bytes of words and numbers, without anything that JSON escapes.
fn words(chance: &mut Chance, bytes: usize) -> String {
    const WORDS: [&str; 16] = [
        "the ",
        "answer ",
        "of ",
        "a ",
        "model ",
        "is ",
        "measured ",
        "by ",
        "what ",
        "it ",
        "costs, ",
        "and ",
        "not ",
        "by words. ",
        "Then ",
        "again ",
    ];
    let mut text = String::with_capacity(bytes + 32);
    while text.len() < bytes {
        text += WORDS[chance.below(WORDS.len())];
        if chance.below(8) == 0 {
            text += &format!("{} ", chance.below(100_000));
        }
    }
    text.truncate(bytes);
    text
}

/// About so many bytes of source code, as JSON has it inside quotes and as Python writes it: only ASCII.
fn code(chance: &mut Chance, bytes: usize) -> String {
    const LINES: [&str; 16] = [
        r#"    if name not in found and not name.startswith("_"):"#,
        r#"        raise ValueError(f"unknown key \"{name}\" in {path!r}")"#,
        r#"    pattern = re.compile("^\\s*(\\w+)\\s*=\\s*\"([^\"]*)\"$")"#,
        "\treturn {\"id\": number, \"text\": text.strip(), \"next\": None}",
        r#"    # größer als das Maß: nicht zulässig"#,
        r#"print("\n".join(f"{key}\t{value}" for key, value in sorted(all.items())))"#,
        "",
        r#"    for line in open(os.path.join("C:\\temp", name), encoding="utf-8"):"#,
        r#"        for index, part in enumerate(self.parts[first:last], start=first + 1):"#,
        r#"            total += part.weight * self.scale - math.sqrt(part.variance)"#,
        r#"        return self.cache.get(key) or self.compute(key, depth + 1)"#,
        r#"    async with self.lock:"#,
        r#"    # what is known by now need not be asked for again, so the answer is kept"#,
        r#"class Measured(Generic[T], metaclass=abc.ABCMeta):"#,
        r#"def read(path: str, *, strict: bool = False) -> dict[str, str]:"#,
        r#"    """Liest, was dort steht – „so wie es ist“."""  # naïve"#,
    ];
    let mut text = String::with_capacity(bytes + 128);
    while text.len() < bytes {
        escape(LINES[chance.below(LINES.len())], &mut text);
        text += r"\n";
    }
    text
}

/// Writes text as JSON has it inside quotes, all but ASCII by `\u`.
fn escape(text: &str, into: &mut String) {
    for unit in text.encode_utf16() {
        match char::from_u32(u32::from(unit)) {
            Some('"') => into.push_str(r#"\""#),
            Some('\\') => into.push_str(r"\\"),
            Some('\n') => into.push_str(r"\n"),
            Some('\t') => into.push_str(r"\t"),
            Some(plain @ ' '..='~') => into.push(plain),
            _ => into.push_str(&format!(r"\u{unit:04x}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Asked {
        Asked { models: vec!["m".to_owned()], seed: 1, events: 20, gap_ms: 10 }
    }

    fn json(body: &[u8]) -> serde_json::Value {
        serde_json::from_slice(body).unwrap()
    }

    #[test]
    fn escaped_text_has_every_kind_of_escape_and_many_of_them() {
        let body = escaped(&asked(), "m", 32 << 10);
        let text = String::from_utf8(body.clone()).unwrap();
        assert!([r"\n", r#"\""#, r"\\", r"\t", r"\u00f6"].iter().all(|escape| text.contains(escape)));
        let bytes_per_escape = body.len() / text.matches('\\').count();
        assert!((10..20).contains(&bytes_per_escape), "{bytes_per_escape}");
        assert!(json(&body)["messages"][0]["content"].as_str().unwrap().contains("größer"));
    }

    #[test]
    fn a_turn_begins_with_all_that_was_said_before_and_a_long_chat_begins_anew() {
        let mut chats = Chats::new(&asked());
        let turns: Vec<Vec<Vec<u8>>> =
            (0..28).map(|_| (0..Chats::AT_A_TIME).map(|_| chats.next_body()).collect()).collect();
        let (mut began, chats) = (0, [0, 1, 63]);
        for at in chats {
            for turn in 1..turns.len() {
                let (before, now) = (json(&turns[turn - 1][at]), json(&turns[turn][at]));
                let (before, now) =
                    (before["messages"].as_array().unwrap(), now["messages"].as_array().unwrap());
                if now.len() > before.len() {
                    assert_eq!(now[..before.len()], before[..]);
                } else {
                    began += 1;
                }
            }
        }
        assert!(began >= chats.len(), "{began}");
        let longest = turns.iter().flatten().map(Vec::len).max().unwrap();
        assert!((45_000..55_000).contains(&longest), "{longest}");
        let system = |at: usize| json(&turns[0][at])["messages"][0]["content"].as_str().unwrap().to_owned();
        let shared = (0..Chats::AT_A_TIME).step_by(2).map(system).collect::<std::collections::BTreeSet<_>>();
        assert!(shared.len() <= Chats::SYSTEMS);
    }
}
