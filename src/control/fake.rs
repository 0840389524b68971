//! A worker for the tests of this thread: axum on a runtime of its own, on a port of the kernel's.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use tokio::sync::oneshot;

/// What it answers to.
type Script = Arc<dyn Fn(&Asked) -> Option<Response> + Send + Sync>;

/// One request that it got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Method and target, as `GET /health`.
    pub(crate) line: String,
    /// Value of `authorization`.
    pub(crate) key: Option<String>,
    /// Value of `x-data-parallel-rank`.
    pub(crate) rank: Option<String>,
    /// Its body.
    pub(crate) body: Bytes,
}

/// What a test may change while it runs.
pub(crate) struct Settings {
    /// Status of `/health`; 0: it never answers.
    pub(crate) health: AtomicU16,
    /// Body of `/v1/models`, and its status.
    pub(crate) models: Mutex<(u16, String)>,
    /// Body of `/metrics`, and its status.
    pub(crate) metrics: Mutex<(u16, String)>,
    /// Answers that never come and whose clients are still there.
    pub(crate) hanging: AtomicUsize,
    asked: Mutex<Vec<Asked>>,
    script: Option<Script>,
}

/// The worker; dropping it closes its listener and its connections.
pub(crate) struct Fake {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// What it does.
    pub(crate) settings: Arc<Settings>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// The body of a list of models.
pub(crate) fn list(names: &[&str]) -> String {
    let cards: Vec<String> = names
        .iter()
        .map(|name| match name.strip_prefix("lora") {
            Some(_) => format!(r#"{{"id":"{name}","object":"model","parent":"m","max_model_len":null}}"#),
            None => format!(r#"{{"id":"{name}","object":"model","parent":null,"max_model_len":2048}}"#),
        })
        .collect();
    format!(r#"{{"object":"list","data":[{}]}}"#, cards.join(","))
}

/// Counts an answer that never comes, until its client is gone.
struct Hanging(Arc<Settings>);

impl Drop for Hanging {
    fn drop(&mut self) {
        self.0.hanging.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fake {
    /// A healthy worker with the model `m`.
    pub(crate) fn start() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), None)
    }

    /// A worker that answers by `script` what it answers, and the rest as usual.
    pub(crate) fn scripted(script: impl Fn(&Asked) -> Option<Response> + Send + Sync + 'static) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), Some(Arc::new(script)))
    }

    /// A worker at this address.
    pub(crate) fn at(address: SocketAddr, script: Option<Script>) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let settings = Arc::new(Settings {
            health: AtomicU16::new(200),
            models: Mutex::new((200, list(&["m"]))),
            metrics: Mutex::new((404, r#"{"detail":"Not Found"}"#.to_owned())),
            hanging: AtomicUsize::new(0),
            asked: Mutex::default(),
            script,
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let router = Router::new().fallback(answer).with_state(settings.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    served = axum::serve(listener, router) => served.unwrap(),
                    _ = stopped => (),
                }
            });
        });
        Self { address, settings, stop: Some(stop), thread: Some(thread) }
    }

    /// Its URL.
    pub(crate) fn url(&self) -> crate::workers::WorkerUrl {
        format!("http://{}", self.address).parse().unwrap()
    }

    /// What it was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.settings.asked.lock().unwrap().clone()
    }

    /// How often it was asked this.
    pub(crate) fn count(&self, line: &str) -> usize {
        self.asked().iter().filter(|asked| asked.line == line).count()
    }

    pub(crate) fn set_health(&self, status: u16) {
        self.settings.health.store(status, Ordering::SeqCst);
    }

    pub(crate) fn set_models(&self, status: u16, body: String) {
        *self.settings.models.lock().unwrap() = (status, body);
    }
}

impl Fake {
    /// Status 0: it never answers.
    pub(crate) fn set_metrics(&self, status: u16, body: &str) {
        *self.settings.metrics.lock().unwrap() = (status, body.to_owned());
    }

    /// It as so many data-parallel ranks.
    pub(crate) fn ranks(&self, count: u32) -> Vec<crate::workers::WorkerSpec> {
        crate::workers::WorkerSpec::from(self.url()).ranks(count).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(panic)) = self.thread.take().map(thread::JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

async fn answer(State(settings): State<Arc<Settings>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let target = head.uri.path_and_query().unwrap().as_str();
    let field = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let (key, rank) = (field("authorization"), field("x-data-parallel-rank"));
    let Ok(body) = axum::body::to_bytes(body, 1 << 20).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let asked = Asked { line: format!("{} {target}", head.method), key, rank, body };
    settings.asked.lock().unwrap().push(asked.clone());
    if let Some(response) = settings.script.as_ref().and_then(|script| script(&asked)) {
        // 418 stands for an answer that never comes.
        if response.status() == StatusCode::IM_A_TEAPOT {
            hang(settings).await;
        }
        return response;
    }
    match head.uri.path() {
        "/health" => match settings.health.load(Ordering::SeqCst) {
            0 => hang(settings).await,
            status => StatusCode::from_u16(status).unwrap().into_response(),
        },
        "/v1/models" => {
            let (status, body) = settings.models.lock().unwrap().clone();
            json(status, body)
        }
        "/metrics" => {
            let (status, body) = settings.metrics.lock().unwrap().clone();
            match status {
                0 => hang(settings).await,
                _ => json(status, body),
            }
        }
        "/version" => json(200, r#"{"version":"0.32.0"}"#),
        _ => json(404, r#"{"detail":"Not Found"}"#),
    }
}

async fn hang(settings: Arc<Settings>) -> Response {
    settings.hanging.fetch_add(1, Ordering::SeqCst);
    let _counted = Hanging(settings);
    std::future::pending().await
}

/// A JSON answer.
pub(crate) fn json(status: u16, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert(header::CONTENT_TYPE, "application/json".parse().unwrap());
    response
}

/// Waits until `holds`, or fails the test after ten seconds.
#[expect(clippy::disallowed_methods, reason = "a test waits for other threads, with a deadline")]
#[track_caller]
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
