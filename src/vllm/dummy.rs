//! Small requests of the proxy's own, one for each type of model: what shows that a server computes and does not
//! only answer `/health`.
//!
//! Each asks for as little as the endpoint allows. The names are those that production-stack has in
//! `--static-model-types`.

use std::{fmt, str::FromStr};

use crate::vllm::facts::json_string;

/// One type of model.
#[derive(Debug)]
pub struct Dummy {
    /// The type as operators name it.
    pub name: &'static str,
    /// Where the request goes, by POST.
    pub path: &'static str,
    /// Of the body.
    pub content_type: &'static str,
    body: Body,
}

/// What the request's body is.
#[derive(Debug, Clone, Copy)]
enum Body {
    /// An object; `model` is put before these fields.
    Json(&'static str),
    /// A form with the model and a moment of silence.
    Audio,
}

/// Separates the parts of a form; it is in none of them.
const BOUNDARY: &str = "vllm-proxy-9f4c1d";

const JSON: &str = "application/json";

/// A transparent pixel.
const PIXEL: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";

const fn json(name: &'static str, path: &'static str, fields: &'static str) -> Dummy {
    Dummy { name, path, content_type: JSON, body: Body::Json(fields) }
}

/// Every type of model.
#[rustfmt::skip]
pub static DUMMIES: &[Dummy] = &[
    json("chat", "/v1/chat/completions", r#""messages":[{"role":"user","content":"Hi"}],"max_tokens":1"#),
    json("completion", "/v1/completions", r#""prompt":"Hi","max_tokens":1"#),
    json("embeddings", "/v1/embeddings", r#""input":"Hi""#),
    json("rerank", "/v1/rerank", r#""query":"Hi","documents":["Hi"]"#),
    json("score", "/v1/score", r#""text_1":"Hi","text_2":"Hi","encoding_format":"float""#),
    Dummy { name: "transcription", path: "/v1/audio/transcriptions", content_type: "multipart/form-data; boundary=vllm-proxy-9f4c1d", body: Body::Audio },
    json("vision", "/v1/chat/completions", r#""messages":[{"role":"user","content":[{"type":"text","text":"Hi"},{"type":"image_url","image_url":{"url":"@pixel"}}]}],"max_tokens":1"#),
    json("messages", "/v1/messages", r#""messages":[{"role":"user","content":"Hi"}],"max_tokens":1"#),
];

impl Dummy {
    /// The body of a request to `model`.
    pub fn body(&self, model: &str) -> Vec<u8> {
        match self.body {
            Body::Json(fields) => {
                let mut body = b"{\"model\":".to_vec();
                json_string(&mut body, model);
                body.push(b',');
                body.extend_from_slice(fields.replace("@pixel", PIXEL).as_bytes());
                body.push(b'}');
                body
            }
            Body::Audio => {
                let field =
                    |name: &str| format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"");
                let mut body = format!("{}\r\n\r\n{model}\r\n", field("model")).into_bytes();
                let file =
                    format!("{}; filename=\"a.wav\"\r\ncontent-type: audio/wav\r\n\r\n", field("file"));
                body.extend_from_slice(file.as_bytes());
                body.extend_from_slice(&silence());
                body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
                body
            }
        }
    }
}

/// A tenth of a second of silence: WAV, 16 kHz, one channel of 16 bits.
fn silence() -> Vec<u8> {
    const RATE: u32 = 16_000;
    const DATA_BYTES: u32 = RATE / 10 * 2;
    let mut wav = b"RIFF".to_vec();
    wav.extend_from_slice(&(DATA_BYTES + 36).to_le_bytes());
    wav.extend_from_slice(b"WAVEfmt ");
    wav.extend_from_slice(&16_u32.to_le_bytes());
    // PCM, one channel
    wav.extend_from_slice(&[1, 0, 1, 0]);
    wav.extend_from_slice(&RATE.to_le_bytes());
    wav.extend_from_slice(&(RATE * 2).to_le_bytes());
    // bytes of a frame, bits of a sample
    wav.extend_from_slice(&[2, 0, 16, 0]);
    wav.extend_from_slice(b"data");
    wav.extend_from_slice(&DATA_BYTES.to_le_bytes());
    wav.resize(wav.len() + DATA_BYTES as usize, 0);
    wav
}

/// A type of model by its name in [`DUMMIES`].
#[derive(Debug, Clone, Copy)]
pub struct ModelType(pub &'static Dummy);

impl Default for ModelType {
    /// The first.
    fn default() -> Self {
        Self(&DUMMIES[0])
    }
}

impl fmt::Display for ModelType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

impl FromStr for ModelType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.trim();
        let named = DUMMIES.iter().find(|dummy| dummy.name.eq_ignore_ascii_case(name));
        named.map(Self).ok_or_else(|| "there is no such type of model".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vllm::{ModelSource, Treatment, boundary, lookup};

    #[test]
    fn every_dummy_is_a_request_that_a_worker_would_be_sent() {
        for dummy in DUMMIES {
            let Treatment::Route(source) = lookup("POST", dummy.path).treatment else {
                panic!("{} goes to no worker", dummy.name);
            };
            let body = dummy.body("a \"model\"");
            if source == ModelSource::Json {
                let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(value["model"], "a \"model\"", "{}", dummy.name);
                assert!(value.as_object().unwrap().len() > 1);
            } else {
                assert_eq!(boundary(dummy.content_type.as_bytes()).unwrap(), BOUNDARY.as_bytes());
                assert!(body.starts_with(b"--vllm-proxy") && body.ends_with(b"--\r\n"));
            }
        }
    }

    #[test]
    fn silence_is_as_long_as_its_head_says() {
        let wav = silence();
        assert_eq!(wav.len(), 44 + 3_200);
        assert_eq!(u32::from_le_bytes(wav[40..44].try_into().unwrap()), 3_200);
        assert_eq!(u32::from_le_bytes(wav[4..8].try_into().unwrap()) as usize, wav.len() - 8);
    }

    #[test]
    fn types_are_named_as_in_production_stack() {
        let names = "chat completion embeddings rerank score transcription vision messages";
        assert_eq!(DUMMIES.iter().map(|dummy| dummy.name).collect::<Vec<_>>().join(" "), names);
        assert_eq!(" Vision ".parse::<ModelType>().unwrap().to_string(), "vision");
        assert!("image".parse::<ModelType>().is_err());
    }
}
