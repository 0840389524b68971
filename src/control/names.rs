//! Resolves the host name of a worker, now and again.
//!
//! Names go through the system's resolver (`/etc/hosts`, search domains, names without dots), whose calls block
//! a thread of tokio's pool and cannot be cancelled; so they have no time limit here, but a worker has at most
//! one of them. An error or an empty answer keeps the addresses that were good before (`faults.md` U24).

use std::{net::IpAddr, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::lookup_host,
    sync::oneshot,
    time::{sleep, timeout},
};

use crate::control::{Control, chance};
use crate::workers::Worker;

/// Least pause between two lookups of one name, also while its worker is down.
const LEAST_PAUSE: Duration = Duration::from_secs(1);

/// Keeps the addresses of the worker at `position` fresh; `resolved` is told of the first lookup's end.
pub(super) async fn run(control: Arc<Control>, position: usize, resolved: oneshot::Sender<()>) {
    let (Some(worker), Some(asked)) = (control.workers.get(position), control.lookups.get(position)) else {
        return;
    };
    if let Ok(ip) = worker.url().host().parse::<IpAddr>() {
        worker.resolved(vec![SocketAddr::new(ip, worker.url().port())]);
        // An error means that nobody waits.
        resolved.send(()).unwrap_or_default();
        return;
    }
    let mut failing = false;
    look_up(worker, &mut failing).await;
    resolved.send(()).unwrap_or_default();
    loop {
        sleep(LEAST_PAUSE).await;
        let pause = control.pace.names_interval.mul_f64(0.9 + 0.2 * chance());
        // Whichever comes first: the interval's end, or somebody who could not reach the worker.
        let _: Result<(), _> = timeout(pause.saturating_sub(LEAST_PAUSE), asked.notified()).await;
        look_up(worker, &mut failing).await;
    }
}

async fn look_up(worker: &Worker, failing: &mut bool) {
    let url = worker.url();
    let error = match lookup_host((url.host(), url.port())).await {
        Ok(found) => {
            let list: Vec<SocketAddr> = found.collect();
            let empty = list.is_empty();
            if worker.resolved(list) {
                let addresses = &worker.addresses().list;
                tracing::info!(worker = %url, ?addresses, "addresses of worker changed");
            }
            if !empty {
                *failing = false;
                return;
            }
            "the resolver knows no address".to_owned()
        }
        Err(error) => error.to_string(),
    };
    if !*failing {
        tracing::warn!(worker = %url, error, "name of worker cannot be resolved");
    }
    *failing = true;
}
