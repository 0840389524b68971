//! Fake vLLM servers, so that the proxy can be tried on one machine without a GPU, a model or vLLM.
//!
//! They speak enough of vLLM's API for clients that chat and complete, stream a token every 20 ms, and say in
//! every answer which of them it is. They are a toy: no limits, no faults, no other endpoints. The workers of the
//! tests are `tests/support`.

mod worker;

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use tokio::{runtime, sync::oneshot, task::JoinSet};

use crate::workers::WorkerUrl;

pub use worker::{MODEL, TOKEN_PAUSE};

/// What the demo's own request may take between two events.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The running workers. Dropping it closes their listeners and connections and waits for their thread.
#[derive(Debug)]
pub struct Workers {
    urls: Vec<WorkerUrl>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Workers {
    /// Where they are; a worker's number in its answers is its position here plus one.
    pub fn urls(&self) -> &[WorkerUrl] {
        &self.urls
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was printed when it happened.
            thread.join().unwrap_or_default();
        }
    }
}

/// Starts `count` workers on ports of the kernel's choice, all on one thread with a runtime of its own.
///
/// # Errors
/// If the kernel grants no socket or no thread.
pub fn start_workers(count: usize) -> io::Result<Workers> {
    let listeners = (0..count).map(|_| listen()).collect::<io::Result<Vec<TcpListener>>>()?;
    let urls = listeners.iter().map(url).collect::<io::Result<Vec<WorkerUrl>>>()?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let thread = thread::Builder::new().name("demo".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                () = serve(listeners) => (),
                _ = stopped => (),
            }
        });
    })?;
    Ok(Workers { urls, stop: Some(stop), thread: Some(thread) })
}

fn listen() -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn url(listener: &TcpListener) -> io::Result<WorkerUrl> {
    format!("http://{}", listener.local_addr()?).parse().map_err(io::Error::other)
}

async fn serve(listeners: Vec<TcpListener>) {
    let count = listeners.len();
    let mut servers = JoinSet::new();
    for (at, listener) in listeners.into_iter().enumerate() {
        servers.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            axum::serve(listener, worker::router(at + 1, count)).await
        });
    }
    while let Some(ended) = servers.join_next().await {
        tracing::error!(?ended, "a demo worker ended");
    }
}

/// What is printed when all runs: where the proxy and its workers are, and a line that streams. `address` is the
/// proxy's own.
pub fn text(address: SocketAddr, workers: &Workers) -> String {
    let address = reachable(address);
    let list: String = (1..).zip(workers.urls()).map(|(n, url)| format!("  worker {n}  {url}\n")).collect();
    let count = workers.urls().len();
    format!(
        "\
vllm-proxy with {count} fake workers, as one vLLM at http://{address}

{list}
Try it: stream an answer, a few times; it says which worker it comes from:

  curl -N http://{address}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{\"model\":\"{MODEL}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Who are you?\"}}]}}'

Further: /v1/models, /health, /metrics. Ctrl-C ends it.
"
    )
}

/// Asks the proxy at `address` for a streamed answer and writes its text to `out` as it comes.
///
/// # Errors
/// The proxy cannot be reached, or `out` is closed.
pub fn show(address: SocketAddr, out: &mut impl Write) -> io::Result<()> {
    let body = format!(
        r#"{{"model":"{MODEL}","stream":true,"messages":[{{"role":"user","content":"Who are you?"}}]}}"#
    );
    let mut stream = TcpStream::connect(reachable(address))?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let length = body.len();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: demo\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let Some(event) = line.strip_prefix("data: ").filter(|event| *event != "[DONE]") else { continue };
        let event: serde_json::Value = serde_json::from_str(event).unwrap_or_default();
        if let Some(token) = event["choices"][0]["delta"]["content"].as_str() {
            out.write_all(token.as_bytes())?;
            out.flush()?;
        }
    }
    out.write_all(b"\n")
}

/// An address to connect to, for one to listen on.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use serde_json::Value;

    use super::*;

    /// A request to a worker, and its answer to the end of the connection.
    fn ask(workers: &Workers, at: usize, line: &str, body: &str) -> String {
        let url = &workers.urls()[at];
        let mut stream = TcpStream::connect((url.host(), url.port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let head =
            format!("{line} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n");
        stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn body(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").unwrap().1
    }

    /// The objects of a stream's events.
    fn events(answer: &str) -> Vec<Value> {
        let data = answer.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    #[test]
    fn a_stream_of_chat_adds_up_to_the_answer_without_one() {
        let workers = start_workers(2).unwrap();
        let request = r#"{"model":"demo","messages":[{"role":"user","content":"hi"}]"#;
        let whole = ask(&workers, 1, "POST /v1/chat/completions", &format!("{request}}}"));
        let whole: Value = serde_json::from_str(body(&whole)).unwrap();
        let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(text.contains("worker 2 of 2"), "{text}");

        let stream = ask(
            &workers,
            1,
            "POST /v1/chat/completions",
            &format!("{request},\"stream\":true,\"stream_options\":{{\"include_usage\":true}}}}"),
        );
        assert!(stream.contains("content-type: text/event-stream; charset=utf-8"), "{stream}");
        assert!(stream.contains("data: [DONE]\n\n"));
        let events = events(&stream);
        let content = |event: &Value| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        assert_eq!(events.iter().filter_map(content).collect::<String>(), text);
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "stop");
        assert_eq!(events[events.len() - 1]["usage"], whole["usage"]);
    }

    #[test]
    fn completions_end_at_max_tokens() {
        let workers = start_workers(1).unwrap();
        let request = r#"{"prompt":"a b c","max_tokens":3"#;
        let whole = ask(&workers, 0, "POST /v1/completions", &format!("{request}}}"));
        let whole: Value = serde_json::from_str(body(&whole)).unwrap();
        assert_eq!(whole["usage"]["completion_tokens"], 3);
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        let stream = ask(&workers, 0, "POST /v1/completions", &format!("{request},\"stream\":true}}"));
        let text = |event: &Value| event["choices"][0]["text"].as_str().unwrap().to_owned();
        assert_eq!(
            events(&stream).iter().map(text).collect::<String>(),
            whole["choices"][0]["text"].as_str().unwrap()
        );
    }

    #[test]
    fn another_model_is_unknown_in_vllms_words() {
        let workers = start_workers(1).unwrap();
        let answer = ask(&workers, 0, "POST /v1/chat/completions", r#"{"model":"nope"}"#);
        assert!(answer.starts_with("HTTP/1.1 404 "));
        assert_eq!(
            body(&answer),
            r#"{"error":{"message":"The model `nope` does not exist. Valid aliases: demo.","type":"NotFoundError","param":"model","code":404}}"#
        );
        for body in [r#"{"model":null}"#, r#"{"model":""}"#, "{}"] {
            assert!(
                ask(&workers, 0, "POST /v1/chat/completions", body).starts_with("HTTP/1.1 200 "),
                "{body}"
            );
        }
        assert!(ask(&workers, 0, "POST /v1/chat/completions", "{").starts_with("HTTP/1.1 400 "));
    }

    #[test]
    fn what_the_proxy_asks_its_workers_is_answered() {
        let workers = start_workers(1).unwrap();
        let health = ask(&workers, 0, "GET /health", "");
        assert!(health.starts_with("HTTP/1.1 200 ") && body(&health).is_empty());
        let models = ask(&workers, 0, "GET /v1/models", "");
        let cards = crate::vllm::parse_models(body(&models).as_bytes()).unwrap();
        assert_eq!(cards.iter().map(|card| &card.id[..]).collect::<Vec<_>>(), [MODEL]);
        assert_eq!(body(&ask(&workers, 0, "GET /load", "")), r#"{"server_load":0}"#);
        assert!(body(&ask(&workers, 0, "GET /version", "")).starts_with(r#"{"version":""#));
        assert!(ask(&workers, 0, "GET /metrics", "").contains("vllm:num_requests_running{"));
        assert_eq!(body(&ask(&workers, 0, "GET /nope", "")), r#"{"detail":"Not Found"}"#);
    }

    #[test]
    fn the_text_names_an_address_that_can_be_reached() {
        let workers = start_workers(3).unwrap();
        let text = text("0.0.0.0:8000".parse().unwrap(), &workers);
        assert!(text.contains("curl -N http://127.0.0.1:8000/v1/chat/completions"), "{text}");
        for url in workers.urls() {
            assert!(text.contains(url.as_str()));
        }
    }
}
