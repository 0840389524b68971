//! One fake worker: what it answers.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{HeaderValue, StatusCode, header},
    response::Response,
    routing::{get, post},
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::vllm::{ErrorShape, errors};

/// The only model.
pub const MODEL: &str = "demo";

/// Time between two tokens: slow enough to see an answer grow.
pub const TOKEN_PAUSE: Duration = Duration::from_millis(20);

/// What it says it is.
const VERSION: &str = "0.32.0";

/// Largest request body.
const BODY_BYTES: usize = 64 * 1024 * 1024;

/// One worker.
#[derive(Debug)]
struct Worker {
    /// From 1.
    number: usize,
    /// How many there are.
    count: usize,
    running: AtomicU64,
    requests: AtomicU64,
}

/// Its routes.
pub(super) fn router(number: usize, count: usize) -> Router {
    let worker = Worker { number, count, running: AtomicU64::new(0), requests: AtomicU64::new(0) };
    Router::new()
        .route("/health", get(async || ()))
        .route("/v1/models", get(models))
        .route("/version", get(async || answer(200, json!({"version": VERSION}))))
        .route("/load", get(load))
        .route("/metrics", get(metrics))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .fallback(async || answer(404, json!({"detail": "Not Found"})))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(Arc::new(worker))
}

async fn models() -> Response {
    let card = json!({
        "id": MODEL, "object": "model", "created": created(), "owned_by": "vllm", "root": MODEL, "parent": null,
        "max_model_len": 32768, "permission": [],
    });
    answer(200, json!({"object": "list", "data": [card]}))
}

async fn load(State(worker): State<Arc<Worker>>) -> Response {
    answer(200, json!({"server_load": worker.running.load(Ordering::Relaxed)}))
}

async fn metrics(State(worker): State<Arc<Worker>>) -> Response {
    let running = worker.running.load(Ordering::Relaxed);
    let requests = worker.requests.load(Ordering::Relaxed);
    let labels = format!("engine=\"0\",model_name=\"{MODEL}\"");
    let text = format!(
        "\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{labels}}} {running}.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{{labels}}} 0.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{{{labels},finished_reason=\"stop\"}} {requests}.0
"
    );
    respond(200, "text/plain; version=1.0.0; charset=utf-8", text)
}

async fn chat(State(worker): State<Arc<Worker>>, body: Bytes) -> Response {
    complete(worker, &body, Form::Chat).await
}

async fn completions(State(worker): State<Arc<Worker>>, body: Bytes) -> Response {
    complete(worker, &body, Form::Text).await
}

/// Which API an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Chat,
    Text,
}

/// One answer in the making.
#[derive(Debug)]
struct Answer {
    form: Form,
    id: String,
    created: u64,
    fingerprint: String,
    tokens: Vec<String>,
    /// `stop` or `length`.
    finish: &'static str,
    prompt_tokens: usize,
    /// Whether a stream ends with an event that tells the usage.
    usage: bool,
    _running: Running,
}

/// Counts a request in the worker's load until its answer is complete or its client gone.
#[derive(Debug)]
struct Running(Arc<Worker>);

impl Running {
    fn begin(worker: Arc<Worker>) -> Self {
        worker.running.fetch_add(1, Ordering::Relaxed);
        Self(worker)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
        self.0.requests.fetch_add(1, Ordering::Relaxed);
    }
}

async fn complete(worker: Arc<Worker>, body: &[u8], form: Form) -> Response {
    let Ok(request @ Value::Object(_)) = serde_json::from_slice::<Value>(body) else {
        let body = errors::openai("The body is no JSON object.", "Bad Request", None, 400);
        return respond(400, "application/json", body);
    };
    let model = request.get("model").and_then(Value::as_str).unwrap_or_default();
    if !model.is_empty() && model != MODEL {
        let body = errors::unknown_model(ErrorShape::OpenAi, model, [MODEL].into_iter());
        return respond(404, "application/json", body);
    }
    let answer = Answer::new(worker, &request, form);
    if request.get("stream").and_then(Value::as_bool) == Some(true) {
        let stream = stream::unfold((answer, 0), async |(answer, at)| {
            let event = answer.event(at)?;
            if at > 0 {
                sleep(TOKEN_PAUSE).await;
            }
            Some((Ok::<_, Infallible>(event), (answer, at + 1)))
        });
        return respond(200, "text/event-stream; charset=utf-8", Body::from_stream(stream));
    }
    for _ in &answer.tokens {
        sleep(TOKEN_PAUSE).await;
    }
    respond(200, "application/json", answer.whole().to_string())
}

impl Answer {
    fn new(worker: Arc<Worker>, request: &Value, form: Form) -> Self {
        let text = format!(
            "Hello! This is worker {} of {}, and no real vLLM: it says the same to everybody, token by token, \
             as a model would. The proxy chose it because it had the least to compute.",
            worker.number, worker.count
        );
        let mut tokens: Vec<String> = text.split_inclusive(' ').map(str::to_owned).collect();
        let limit = ["max_completion_tokens", "max_tokens"].iter().find_map(|key| request.get(key)?.as_u64());
        let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        let finish = if tokens.len() > limit { "length" } else { "stop" };
        tokens.truncate(limit);
        let prompt = request.get(if form == Form::Chat { "messages" } else { "prompt" });
        let prompt_tokens = prompt.map_or(0, |prompt| prompt.to_string().split_whitespace().count());
        let usage = request.pointer("/stream_options/include_usage").and_then(Value::as_bool);
        let number = worker.requests.load(Ordering::Relaxed) + worker.running.load(Ordering::Relaxed);
        let prefix = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            form,
            id: format!("{prefix}-demo-{}-{number}", worker.number),
            created: created(),
            fingerprint: format!("vllm-{VERSION}-demo-worker-{}", worker.number),
            tokens,
            finish,
            prompt_tokens,
            usage: usage == Some(true),
            _running: Running::begin(worker),
        }
    }

    fn usage(&self) -> Value {
        let completion_tokens = self.tokens.len();
        json!({
            "prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        })
    }

    fn whole(&self) -> Value {
        let text = self.tokens.concat();
        let (object, choice) = match self.form {
            Form::Chat => ("chat.completion", json!({"message": {"role": "assistant", "content": text}})),
            Form::Text => ("text_completion", json!({"text": text})),
        };
        let mut whole = self.object(object, choice, Some(self.finish));
        whole["usage"] = self.usage();
        whole
    }

    /// The bytes of event `at` of a stream: the role (of a chat), the tokens, the end, the usage, `[DONE]`.
    fn event(&self, at: usize) -> Option<String> {
        let role = usize::from(self.form == Form::Chat);
        let data = match at.checked_sub(role) {
            None => self.delta(json!({"role": "assistant", "content": ""}), "", None),
            Some(token) if token < self.tokens.len() => {
                let text = self.tokens.get(token)?;
                self.delta(json!({"content": text}), text, None)
            }
            Some(rest) => match (rest - self.tokens.len(), self.usage) {
                (0, _) => self.delta(json!({}), "", Some(self.finish)),
                (1, true) => {
                    let mut last = self.delta(json!({}), "", None);
                    last["choices"] = json!([]);
                    last["usage"] = self.usage();
                    last
                }
                (1, false) | (2, true) => return Some("data: [DONE]\n\n".to_owned()),
                _ => return None,
            },
        };
        Some(format!("data: {data}\n\n"))
    }

    /// An event of a stream, in the shape of its API.
    fn delta(&self, delta: Value, text: &str, finish: Option<&str>) -> Value {
        match self.form {
            Form::Chat => self.object("chat.completion.chunk", json!({"delta": delta}), finish),
            Form::Text => self.object("text_completion", json!({"text": text}), finish),
        }
    }

    fn object(&self, object: &str, mut choice: Value, finish: Option<&str>) -> Value {
        choice["index"] = json!(0);
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(finish);
        json!({
            "id": self.id, "object": object, "created": self.created, "model": MODEL, "choices": [choice],
            "system_fingerprint": self.fingerprint,
        })
    }
}

/// Seconds since 1970.
fn created() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

fn answer(status: u16, body: Value) -> Response {
    respond(status, "application/json", body.to_string())
}

fn respond(status: u16, content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
