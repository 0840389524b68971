//! The table of workloads, and the requests that they are made of.

use std::{net::SocketAddr, rc::Rc};

use crate::chance::Chance;

/// The content type of most.
const JSON: &str = "application/json";
/// What the parts of a form are divided by.
const FORM: &str = "multipart/form-data; boundary=----measured7f3a";
const BOUNDARY: &str = "------measured7f3a";
/// Bytes of the file that is transcribed.
const AUDIO_BYTES: usize = 10 << 20;
/// Inputs of a request for embeddings, and the bytes of each.
const INPUTS: usize = 64;
const INPUT_BYTES: usize = 200;

/// What a connection does with its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One after the other over the same connection.
    Keep,
    /// A connection for each.
    Fresh,
    /// A connection for each, that is left after a few events.
    Leave,
    /// One request, then nothing.
    Hold,
}

/// Where bodies come from.
#[derive(Clone, Copy)]
enum Bodies {
    /// All are the same but for the model.
    Same(fn(&Asked, &str) -> Vec<u8>),
    /// Each is the next turn of a chat.
    Chats,
}

/// A row of the table.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    /// All are POST.
    pub(crate) path: &'static str,
    pub(crate) content_type: &'static str,
    /// Whether the answer is a stream.
    pub(crate) streams: bool,
    pub(crate) manner: Manner,
    /// Milliseconds between events if nothing else is asked for.
    pub(crate) gap_ms: u32,
    /// How many models it must be given, at least.
    pub(crate) models: usize,
    bodies: Bodies,
}

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

/// What most rows have.
const CHAT: Workload = Workload {
    name: "small-json",
    help: "a chat of 1 KB",
    path: "/v1/chat/completions",
    content_type: JSON,
    streams: false,
    manner: Manner::Keep,
    gap_ms: 0,
    models: 1,
    bodies: Bodies::Same(|_, model| chat(model, &"x".repeat(930), "")),
};

/// All workloads.
pub(crate) const WORKLOADS: &[Workload] = &[
    CHAT,
    Workload {
        name: "prompt-32k",
        help: "a chat of 32 KB of words",
        bodies: Bodies::Same(|asked, model| chat(model, &words(&mut Chance::new(asked.seed), 32 << 10), "")),
        ..CHAT
    },
    Workload {
        name: "prompt-1m",
        help: "a chat of 1 MB of words",
        bodies: Bodies::Same(|asked, model| chat(model, &words(&mut Chance::new(asked.seed), 1 << 20), "")),
        ..CHAT
    },
    Workload {
        name: "escaped-32k",
        help: "a chat of 32 KB of source code: many escapes",
        bodies: Bodies::Same(|asked, model| chat(model, &code(&mut Chance::new(asked.seed), 32 << 10), "")),
        ..CHAT
    },
    Workload {
        name: "escaped-1m",
        help: "a chat of 1 MB of source code: many escapes",
        bodies: Bodies::Same(|asked, model| chat(model, &code(&mut Chance::new(asked.seed), 1 << 20), "")),
        ..CHAT
    },
    Workload {
        name: "sse",
        help: "a chat of 1 KB, answered by a stream of --events, --gap-ms apart",
        streams: true,
        bodies: Bodies::Same(stream),
        ..CHAT
    },
    Workload {
        name: "embeddings-64",
        help: "64 inputs of 200 bytes",
        path: "/v1/embeddings",
        bodies: Bodies::Same(embeddings),
        ..CHAT
    },
    Workload {
        name: "audio-10m",
        help: "a form with a file of 10 MB",
        path: "/v1/audio/transcriptions",
        content_type: FORM,
        bodies: Bodies::Same(audio),
        ..CHAT
    },
    Workload {
        name: "idle",
        help: "one small-json on each connection, which is then held: a line says when all are there; ends when stdin is closed",
        manner: Manner::Hold,
        ..CHAT
    },
    Workload { name: "churn", help: "small-json, a connection for each", manner: Manner::Fresh, ..CHAT },
    Workload { name: "two-models", help: "small-json for each of --models in turn", models: 2, ..CHAT },
    Workload {
        name: "chats",
        help: "64 chats of 1 to 50 KB that grow by 2 KB a turn, half of them with system prompts in common",
        bodies: Bodies::Chats,
        ..CHAT
    },
    Workload {
        name: "abort",
        help: "sse on a connection of its own, which is left after 1 to 8 events",
        streams: true,
        manner: Manner::Leave,
        gap_ms: 10,
        bodies: Bodies::Same(stream),
        ..CHAT
    },
];

impl Workload {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        WORKLOADS.iter().find(|workload| workload.name == name)
    }

    /// The first body that is sent.
    pub(crate) fn body(&self, asked: &Asked) -> Vec<u8> {
        match self.bodies {
            Bodies::Same(make) => make(asked, &asked.models[0]),
            Bodies::Chats => Chats::new(asked).next_body(),
        }
    }

    /// A request with this body, as it is sent.
    fn request(&self, address: SocketAddr, body: &[u8]) -> Rc<[u8]> {
        let (path, content_type, length) = (self.path, self.content_type, body.len());
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
        );
        [head.as_bytes(), body].concat().into()
    }

    /// What is sent to this address.
    pub(crate) fn requests(&'static self, address: SocketAddr, asked: &Asked) -> Requests {
        let from = match self.bodies {
            Bodies::Same(make) => {
                let models = if self.models > 1 { &asked.models[..] } else { &asked.models[..1] };
                From::Cycle(models.iter().map(|model| self.request(address, &make(asked, model))).collect())
            }
            Bodies::Chats => From::Chats(Chats::new(asked)),
        };
        Requests { workload: self, address, from, sent: 0 }
    }
}

/// The requests of a workload, one after the other.
#[derive(Debug)]
pub(crate) struct Requests {
    workload: &'static Workload,
    address: SocketAddr,
    from: From,
    sent: usize,
}

#[derive(Debug)]
enum From {
    Cycle(Vec<Rc<[u8]>>),
    Chats(Chats),
}

impl Requests {
    /// The next one, head and body.
    pub(crate) fn next(&mut self) -> Rc<[u8]> {
        self.sent += 1;
        match &mut self.from {
            From::Cycle(all) => all[(self.sent - 1) % all.len()].clone(),
            From::Chats(chats) => self.workload.request(self.address, &chats.next_body()),
        }
    }
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Chats that grow: each turn is sent with all that was said before.
#[derive(Debug)]
struct Chats {
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

    fn new(asked: &Asked) -> Self {
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
    fn next_body(&mut self) -> Vec<u8> {
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

/// A chat of one message, which is JSON already; `more` is put behind the fields that all have.
fn chat(model: &str, content: &str, more: &str) -> Vec<u8> {
    format!(
        r#"{{"model":"{model}","messages":[{{"role":"user","content":"{content}"}}],"max_tokens":16{more}}}"#
    )
    .into_bytes()
}

/// The number of events is what every worker understands; the gap is the mock worker's own.
fn stream(asked: &Asked, model: &str) -> Vec<u8> {
    let (events, gap_ms, text) = (asked.events, asked.gap_ms, "x".repeat(930));
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"{text}"}}],"max_tokens":{events},"mock_gap_ms":{gap_ms},"stream":true}}"#)
        .into_bytes()
}

fn embeddings(asked: &Asked, model: &str) -> Vec<u8> {
    let mut chance = Chance::new(asked.seed);
    let inputs: Vec<String> =
        (0..INPUTS).map(|_| format!(r#""{}""#, words(&mut chance, INPUT_BYTES))).collect();
    format!(r#"{{"model":"{model}","input":[{}]}}"#, inputs.join(",")).into_bytes()
}

fn audio(asked: &Asked, model: &str) -> Vec<u8> {
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
        Asked { models: vec!["m".to_owned(), "n".to_owned()], seed: 1, events: 20, gap_ms: 10 }
    }

    fn json(body: &[u8]) -> serde_json::Value {
        serde_json::from_slice(body).unwrap()
    }

    #[test]
    fn names_differ_and_bodies_are_what_their_content_type_says() {
        for (at, workload) in WORKLOADS.iter().enumerate() {
            assert!(WORKLOADS[..at].iter().all(|other| other.name != workload.name), "{}", workload.name);
            let body = workload.body(&asked());
            if workload.content_type == JSON {
                let body = json(&body);
                assert_eq!(body["model"], "m", "{}", workload.name);
                assert_eq!(body["stream"] == true, workload.streams, "{}", workload.name);
            } else {
                assert!(body.starts_with(BOUNDARY.as_bytes()) && body.len() > AUDIO_BYTES);
                assert!(workload.content_type.ends_with(&BOUNDARY[2..]));
            }
        }
    }

    #[test]
    fn bodies_have_the_size_that_their_name_says_and_repeat_with_the_seed() {
        for (name, bytes) in [
            ("small-json", 1 << 10),
            ("prompt-32k", 32 << 10),
            ("prompt-1m", 1 << 20),
            ("escaped-32k", 32 << 10),
            ("escaped-1m", 1 << 20),
            ("audio-10m", 10 << 20),
        ] {
            let body = Workload::named(name).unwrap().body(&asked());
            assert!(body.len().abs_diff(bytes) < 250, "{name}: {}", body.len());
            assert_eq!(body, Workload::named(name).unwrap().body(&asked()));
        }
    }

    #[test]
    fn escaped_text_has_every_kind_of_escape_and_many_of_them() {
        let body = Workload::named("escaped-32k").unwrap().body(&asked());
        let text = String::from_utf8(body.clone()).unwrap();
        assert!([r"\n", r#"\""#, r"\\", r"\t", r"\u00f6"].iter().all(|escape| text.contains(escape)));
        let bytes_per_escape = body.len() / text.matches('\\').count();
        assert!((10..20).contains(&bytes_per_escape), "{bytes_per_escape}");
        assert!(json(&body)["messages"][0]["content"].as_str().unwrap().contains("größer"));
    }

    #[test]
    fn a_request_says_how_long_its_body_is() {
        let address = "127.0.0.1:80".parse().unwrap();
        let mut requests = Workload::named("sse").unwrap().requests(address, &asked());
        let request = requests.next();
        let text = std::str::from_utf8(&request).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
        assert_eq!((json(body.as_bytes())["max_tokens"].as_u64(), &request), (Some(20), &requests.next()));
    }

    #[test]
    fn models_are_asked_for_in_turn_only_where_that_is_measured() {
        let models = |name: &str| {
            let mut requests =
                Workload::named(name).unwrap().requests("127.0.0.1:80".parse().unwrap(), &asked());
            [(); 3].map(|()| requests.next().windows(11).any(|part| part == br#""model":"n""#))
        };
        assert_eq!(models("two-models"), [false, true, false]);
        assert_eq!(models("small-json"), [false; 3]);
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
