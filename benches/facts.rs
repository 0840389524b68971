//! What it costs to find in a body what the way of a request depends on.
//!
//! Of a body that is mostly text a vector search should see every byte once (0.05 ns each); text that is mostly
//! escapes, as code in JSON is, has a quote or a backslash every few bytes.

mod cpu_time;

use std::hint::black_box;

use cpu_time::CpuTime;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vllm_proxy::vllm::{Key, scan_json};

/// Text without anything to escape.
const PLAIN: &str = "The quick brown fox jumps over the lazy dog, and nobody minds that it does so again. ";

/// Code, as it stands in a JSON string: an escape in every seventh byte.
const ESCAPED: &str = r#"if (x == \"a\\nb\") {\n\tprint(\"%s\\n\", x[\"key\"]);\n}\n\n"#;

/// About so many bytes of `text`, never cut within an escape.
fn text(text: &str, bytes: usize) -> String {
    text.repeat(bytes / text.len() + 1)
}

/// A chat as openai-python writes it, the model behind its messages: a system prompt and turns of 2 KB at most.
fn chat(piece: &str, bytes: usize) -> String {
    let turn = bytes.min(2000);
    let message = format!(r#"{{"role":"user","content":"{}"}}"#, text(piece, turn));
    let messages = vec![message; bytes / turn].join(",");
    format!(r#"{{"messages":[{messages}],"model":"my-model","max_tokens":16,"stream":true}}"#)
}

fn completion(piece: &str, bytes: usize) -> String {
    format!(r#"{{"model":"my-model","prompt":"{}","max_tokens":16}}"#, text(piece, bytes))
}

/// A prompt of token ids, of which each has five digits.
fn token_ids(bytes: usize) -> String {
    let ids: Vec<String> = (0..bytes / 6).map(|at| (10_000 + at * 7919 % 90_000).to_string()).collect();
    format!(r#"{{"model":"my-model","prompt":[{}],"max_tokens":16}}"#, ids.join(","))
}

/// 64 texts.
fn embeddings(bytes: usize) -> String {
    let input = format!(r#""{}""#, text(PLAIN, bytes / 64));
    format!(r#"{{"input":[{}],"model":"my-model","encoding_format":"base64"}}"#, vec![input; 64].join(","))
}

/// What does it take to find model, stream flag and prompt, by size and kind of the body?
fn scanning(c: &mut Criterion<CpuTime>) {
    for (size, bytes) in [("1KB", 1 << 10), ("32KB", 32 << 10), ("1MB", 1 << 20)] {
        let bodies = [
            ("chat_plain", Key::Messages, chat(PLAIN, bytes)),
            ("chat_escaped", Key::Messages, chat(ESCAPED, bytes)),
            ("completion_plain", Key::Prompt, completion(PLAIN, bytes)),
            ("completion_escaped", Key::Prompt, completion(ESCAPED, bytes)),
            ("token_ids", Key::Prompt, token_ids(bytes)),
            ("embeddings", Key::Input, embeddings(bytes)),
        ];
        for (kind, prompt, body) in bodies {
            let body = body.into_bytes();
            let mut group = c.benchmark_group("facts");
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_function(format!("{kind}/{size}"), |b| b.iter(|| scan_json(black_box(&body))));
            let facts = scan_json(&body);
            let found = facts.prompt.get(prompt).map_or(0, |place| place.len());
            assert!(facts.complete && found * 10 > body.len() * 8, "{kind}/{size}: {found} bytes of prompt");
            assert_eq!(facts.model.name(&body).as_deref(), Some("my-model"), "{kind}/{size}");
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = scanning
}
criterion_main!(benches);
