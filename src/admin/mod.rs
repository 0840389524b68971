//! The endpoints that the control thread serves, for which workers have to be asked or all shards be read.
//!
//! Admin is an upstream (`design.md` §2): shards forward these requests to a private listener by plain HTTP, with
//! the code that serves vLLM's paths, so nothing here knows of clients, limits of heads or keep-alive. A file and
//! a row of [`ENDPOINTS`] make an endpoint.
//!
//! A request lives in its handler: nothing is spawned for it, so a client that goes away drops the handler, and
//! with it every connection to a worker that it waits for.

mod broadcast;
mod forward;
mod metrics;
mod respond;
mod responses;

use std::{io, net::TcpListener as StdTcpListener, sync::Arc, time::Duration};

use axum::{Router, http::Method, routing::MethodFilter};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};

use crate::control::{self, Control};
use crate::telemetry::metrics::Metrics;
use crate::workers::{Resolved, StoredResponses, Worker};

/// Connections that are served at a time; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16_384;

/// Time for the head of a request, the wait on an idle connection included. Shards close idle ones after 4 s.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// Pause when the kernel has no descriptor left for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One endpoint, or a family of them that is served alike.
#[derive(Debug)]
pub struct Definition {
    /// How it is called in documents.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Adds its routes.
    build: fn(Router<Arc<Admin>>) -> Router<Arc<Admin>>,
}

/// Every admin endpoint.
pub const ENDPOINTS: &[Definition] = &[metrics::DEFINITION, broadcast::DEFINITION, responses::DEFINITION];

/// Limits of what is forwarded to workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What connecting to a worker may take.
    pub connect: Duration,
    /// Largest request body, as on shards.
    pub body_bytes: usize,
}

/// What handlers know.
#[derive(Debug)]
struct Admin {
    control: Arc<Control>,
    metrics: Arc<Metrics>,
    limits: Limits,
    stored: Arc<StoredResponses>,
}

/// Serves the endpoints on `listener`, for [`control::Parts`].
pub fn service(
    listener: StdTcpListener,
    metrics: Arc<Metrics>,
    limits: Limits,
    stored: Arc<StoredResponses>,
) -> control::Service {
    Box::new(move |control| {
        Box::pin(async move {
            if let Err(error) = serve(listener, Admin { control, metrics, limits, stored }).await {
                tracing::error!(%error, "admin endpoints cannot be served");
            }
        })
    })
}

/// Accepts and serves until dropped; its connections are dropped with it.
async fn serve(listener: StdTcpListener, admin: Admin) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let router = router(admin);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, router.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "admin connection not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    tracing::error!("an admin request panicked; its connection is closed");
                }
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router) {
    // Only speed is lost where the kernel refuses it.
    stream.set_nodelay(true).unwrap_or_default();
    let served = http1::Builder::new()
        .preserve_header_case(true)
        .max_headers(control::MAX_FIELDS)
        .max_header_size(control::MAX_HEAD_BYTES)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "admin connection ended");
    }
}

fn router(admin: Admin) -> Router {
    let router = ENDPOINTS.iter().fold(Router::new(), |router, endpoint| (endpoint.build)(router));
    router
        .fallback(async || respond::not_found())
        .method_not_allowed_fallback(async || respond::method_not_allowed())
        .with_state(Arc::new(admin))
}

/// The filter for a row of vLLM's table; methods that axum has no filter for do not occur there.
fn methods(names: &[&str]) -> Option<MethodFilter> {
    let filters = names.iter().filter_map(|name| {
        Method::from_bytes(name.as_bytes()).ok().and_then(|method| MethodFilter::try_from(method).ok())
    });
    filters.reduce(MethodFilter::or)
}

impl Admin {
    /// The servers to ask, by the workers that lead them: those that answer, or all if none does; `of` says
    /// which model they must have.
    fn servers(&self, of: Option<&str>) -> Vec<Arc<Worker>> {
        let fleet = self.control.fleet().load();
        let positions = match of.map(|model| fleet.resolve(Some(model))) {
            Some(Resolved::Workers { workers, .. }) => workers.to_vec(),
            Some(Resolved::Unknown) | None => (0..fleet.workers.len()).collect(),
        };
        let all = positions.into_iter().filter_map(|at| fleet.workers.get(at).cloned());
        let all = all.filter(|worker| worker.leads());
        let (usable, others): (Vec<_>, Vec<_>) = all.partition(|worker| worker.answers());
        if usable.is_empty() { others } else { usable }
    }

    /// The least busy rank of the server that `lead` leads.
    fn least_busy(&self, lead: Arc<Worker>) -> Arc<Worker> {
        let fleet = self.control.fleet().load();
        let ranks = fleet.workers.iter().filter(|worker| worker.shares_server(&lead));
        ranks.min_by_key(|worker| worker.in_flight()).cloned().unwrap_or(lead)
    }
}

#[cfg(test)]
mod tests;
