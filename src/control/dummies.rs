//! Real requests to a worker, where that is asked for: what its `/health` does not know they find out.
//!
//! A request is part of a probe whose `/health` was good, once in its own interval, and with every such probe as
//! long as the last one failed. Only what the server does wrong counts: a 4xx is a request that does not fit the
//! model, which is told once, and 503 is load.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, Method, Request, StatusCode, Uri, header},
};

use crate::base::Millis;
use crate::control::{
    Control, Settings,
    attempt::{self, AttemptError},
    duration,
    health::Verdict,
};
use crate::telemetry::Resource;
use crate::vllm::ModelType;
use crate::workers::Worker;

/// What is read of an answer.
const BODY_BYTES: usize = 4 * 1024 * 1024;

/// What all servers' requests have in common.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    interval_ms: u64,
    limit: Duration,
    /// One for all, or by server, in order of configuration.
    types: Vec<ModelType>,
}

impl Plan {
    /// `None`: nobody is sent any.
    pub(super) fn new(settings: &Settings) -> Option<Self> {
        settings.static_backend_health_checks.then(|| Self {
            interval_ms: u64::try_from(duration(settings.static_backend_health_check_interval).as_millis())
                .unwrap_or(u64::MAX),
            limit: duration(settings.static_backend_health_check_timeout_seconds),
            types: settings.static_model_types.clone(),
        })
    }

    fn of_server(&self, server: usize) -> ModelType {
        self.types.get(server).or(self.types.first()).copied().unwrap_or_default()
    }
}

/// The requests to one server.
#[derive(Debug)]
pub(super) struct Dummies {
    plan: Plan,
    of: ModelType,
    next: Millis,
    /// A request that does not fit the model was told of.
    told: bool,
}

impl Dummies {
    /// Of the server with this number, in order of configuration.
    pub(super) fn new(plan: &Plan, server: usize) -> Self {
        Self { plan: plan.clone(), of: plan.of_server(server), next: 0, told: false }
    }

    /// Sends one to the worker at `position`, if it is time for it and a model is known; `None` where not.
    pub(super) async fn send(
        &mut self,
        control: &Control,
        position: usize,
        worker: &Worker,
    ) -> Option<(Verdict, String)> {
        let now = control.clock.millis();
        if now < self.next || worker.rests() {
            return None;
        }
        let model = control.book.first_model(position)?;
        let found = self.ask(control, worker, &model).await?;
        if found.0 == Verdict::Good {
            self.next = now + self.plan.interval_ms;
        }
        Some(found)
    }

    /// `None`: this host was short of what it takes to ask.
    async fn ask(&mut self, control: &Control, worker: &Worker, model: &str) -> Option<(Verdict, String)> {
        let dummy = self.of.0;
        let mut request = Request::new(Body::from(dummy.body(model)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static(dummy.path);
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(dummy.content_type));
        if let Some(key) = &control.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.clone());
        }
        Some(match attempt::fetch(worker, request, self.plan.limit, BODY_BYTES).await {
            Ok(answer) => self.judge(worker, answer.status()),
            Err(AttemptError::Late) => (Verdict::Late, format!("{} did not answer in time", dummy.path)),
            Err(AttemptError::TooLarge(_)) => (Verdict::Good, String::new()),
            Err(AttemptError::Connect(error)) if Resource::of(&error).is_some() => return None,
            Err(error) => (Verdict::Bad, format!("{}: {error}", dummy.path)),
        })
    }

    fn judge(&mut self, worker: &Worker, status: StatusCode) -> (Verdict, String) {
        let path = self.of.0.path;
        if status.is_client_error() && !std::mem::replace(&mut self.told, true) {
            let (worker, model_type, status) = (worker.url(), self.of, status.as_u16());
            tracing::warn!(%worker, %model_type, path, status, "a request of ours does not fit the model");
        }
        let bad = status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE;
        let verdict = if bad { Verdict::Bad } else { Verdict::Good };
        (verdict, format!("{path} answered {}", status.as_u16()))
    }
}
