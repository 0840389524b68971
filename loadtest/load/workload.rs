//! The table of workloads, and the requests that they make.

use std::{net::SocketAddr, rc::Rc};

use crate::bodies::{Asked, Chats, FORM, audio, chat, embeddings, escaped, plain, stream};

/// The content type of most.
const JSON: &str = "application/json";

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
    bodies: Bodies::Same(|_, model| chat(model, &"x".repeat(930))),
};

/// All workloads.
pub(crate) const WORKLOADS: &[Workload] = &[
    CHAT,
    Workload {
        name: "prompt-32k",
        help: "a chat of 32 KB of words",
        bodies: Bodies::Same(|asked, model| plain(asked, model, 32 << 10)),
        ..CHAT
    },
    Workload {
        name: "prompt-1m",
        help: "a chat of 1 MB of words",
        bodies: Bodies::Same(|asked, model| plain(asked, model, 1 << 20)),
        ..CHAT
    },
    Workload {
        name: "escaped-32k",
        help: "a chat of 32 KB of source code: many escapes",
        bodies: Bodies::Same(|asked, model| escaped(asked, model, 32 << 10)),
        ..CHAT
    },
    Workload {
        name: "escaped-1m",
        help: "a chat of 1 MB of source code: many escapes",
        bodies: Bodies::Same(|asked, model| escaped(asked, model, 1 << 20)),
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
                let boundary = workload.content_type.split("boundary=").nth(1).unwrap();
                assert!(body.starts_with(format!("--{boundary}\r\n").as_bytes()));
                assert!(body.ends_with(format!("\r\n--{boundary}--\r\n").as_bytes()));
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
}
