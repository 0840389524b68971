//! A worker for measurements: answers at full speed and does nothing else, a thread for each connection.
//!
//! `mock ADDRESS [EVENTS]`: a request whose body names `"stream":true` is answered with that many events, each
//! in a chunk and a write of its own; any other with 300 bytes of JSON.
#![expect(clippy::print_stderr, reason = "a tool for the terminal")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let events = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(200);
    let listener = TcpListener::bind(address)?;
    eprintln!("listening on {}", listener.local_addr()?);
    for stream in listener.incoming() {
        let stream = stream?;
        // a client that goes away ends its thread
        thread::spawn(move || serve(stream, events).ok());
    }
    Ok(())
}

fn serve(stream: TcpStream, events: usize) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(64 * 1024, stream);
    let filler = "x".repeat(230);
    let json =
        format!(r#"{{"id":"chatcmpl-1","object":"chat.completion","choices":[{{"text":"{filler}"}}]}}"#);
    let mut line = String::new();
    let mut body = Vec::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut length = 0;
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            if line.trim_end().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':') {
                if name.eq_ignore_ascii_case("content-length") {
                    length = value.trim().parse().unwrap_or(0);
                }
            }
        }
        body.resize(length, 0);
        reader.read_exact(&mut body)?;
        match path.as_str() {
            "/health" => answer(&mut writer, "")?,
            "/v1/models" => {
                answer(
                    &mut writer,
                    r#"{"object":"list","data":[{"id":"m","object":"model","parent":null}]}"#,
                )?;
            }
            "/version" => answer(&mut writer, r#"{"version":"0.32.0"}"#)?,
            _ if body.windows(13).any(|part| part == b"\"stream\":true") => {
                writer.write_all(b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")?;
                for number in 0..events {
                    let event = format!(
                        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"token {number}\"}}}}]}}\n\n"
                    );
                    writer.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes())?;
                }
                writer.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")?;
            }
            _ => answer(&mut writer, &json)?,
        }
    }
}

fn answer(writer: &mut TcpStream, body: &str) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\ncontent-length: {}\r\ncontent-type: application/json\r\n\r\n",
        body.len()
    );
    writer.write_all(format!("{head}{body}").as_bytes())
}
