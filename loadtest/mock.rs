//! A worker for measurements: one event loop, as a vLLM front end has, that answers at full speed and does
//! nothing else.
//!
//! `mock ADDRESS [EVENTS]`: a request whose body names `"stream":true` is answered with that many events, each
//! in a chunk and a write of its own; any other with 300 bytes of JSON.
#![expect(clippy::print_stderr, reason = "a tool for the terminal")]

use std::{io, rc::Rc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

/// What is answered, made once.
struct Answers {
    json: Vec<u8>,
    models: Vec<u8>,
    version: Vec<u8>,
    empty: Vec<u8>,
    events: Vec<Vec<u8>>,
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let events = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(200);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async move {
        let listener = TcpListener::bind(address).await?;
        eprintln!("listening on {}", listener.local_addr()?);
        let answers = Rc::new(answers(events));
        loop {
            let (stream, _) = listener.accept().await?;
            let answers = answers.clone();
            // a client that goes away ends its task
            tokio::task::spawn_local(async move { serve(stream, &answers).await.ok() });
        }
    })
}

fn answers(events: usize) -> Answers {
    let filler = "x".repeat(230);
    let json =
        format!(r#"{{"id":"chatcmpl-1","object":"chat.completion","choices":[{{"text":"{filler}"}}]}}"#);
    let mut parts = vec![
        b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n".to_vec(),
    ];
    for number in 0..events {
        let event = format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"token {number}\"}}}}]}}\n\n"
        );
        parts.push(format!("{:x}\r\n{event}\r\n", event.len()).into_bytes());
    }
    parts.push(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n".to_vec());
    Answers {
        json: answer(&json),
        models: answer(r#"{"object":"list","data":[{"id":"m","object":"model","parent":null}]}"#),
        version: answer(r#"{"version":"0.32.0"}"#),
        empty: answer(""),
        events: parts,
    }
}

fn answer(body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\ncontent-length: {length}\r\ncontent-type: application/json\r\n\r\n{body}"
    )
    .into_bytes()
}

async fn serve(mut stream: TcpStream, answers: &Answers) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut received = Vec::with_capacity(64 * 1024);
    loop {
        let (head, length) = loop {
            if let Some(found) = request(&received) {
                break found;
            }
            if stream.read_buf(&mut received).await? == 0 {
                return Ok(());
            }
        };
        while received.len() < head + length {
            if stream.read_buf(&mut received).await? == 0 {
                return Ok(());
            }
        }
        let path = received.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        let streamed = received[head..head + length].windows(13).any(|part| part == b"\"stream\":true");
        match path {
            b"/health" => stream.write_all(&answers.empty).await?,
            b"/v1/models" => stream.write_all(&answers.models).await?,
            b"/version" => stream.write_all(&answers.version).await?,
            _ if streamed => {
                for part in &answers.events {
                    stream.write_all(part).await?;
                }
            }
            _ => stream.write_all(&answers.json).await?,
        }
        received.drain(..head + length);
    }
}

/// Lengths of the head and of the body of the request that begins here, once its head is complete.
fn request(received: &[u8]) -> Option<(usize, usize)> {
    let end = received.windows(4).position(|part| part == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&received[..end]).to_ascii_lowercase();
    let length = head.split("\r\ncontent-length:").nth(1).and_then(|rest| rest.split("\r\n").next());
    Some((end, length.and_then(|value| value.trim().parse().ok()).unwrap_or(0)))
}
