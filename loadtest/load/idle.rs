//! Connections that have had one request each and are then held.

use std::{net::SocketAddr, rc::Rc};

use tokio::{sync::oneshot, task::JoinSet};

use crate::{
    answer::Failure,
    clock::now_ns,
    connection::{Connection, Exchange},
    tally::Tally,
};

/// Opens the connections, one request on each. Those that are there are returned; the rest is counted.
pub(crate) async fn open(
    address: SocketAddr,
    connections: usize,
    request: Rc<[u8]>,
    tally: &mut Tally,
) -> Vec<Connection> {
    let mut opening = JoinSet::new();
    for _ in 0..connections {
        let request = request.clone();
        opening.spawn_local(async move { one(address, &request).await });
    }
    let mut open = Vec::with_capacity(connections);
    while let Some(opened) = opening.join_next().await {
        match opened {
            Ok(Ok((connection, received, latency_ns))) => {
                tally.whole += 1;
                tally.bytes_sent += request.len() as u64;
                tally.bytes_received += received;
                tally.latency.record(latency_ns);
                tally.last_ns = now_ns();
                open.push(connection);
            }
            Ok(Err(failure)) => tally.fail(1, || failure.to_string()),
            Err(error) => tally.fail(1, || error.to_string()),
        }
    }
    open
}

async fn one(address: SocketAddr, request: &[u8]) -> Result<(Connection, u64, u64), Failure> {
    let mut connection = Connection::open_in_turn(address).await?;
    let begin_ns = now_ns();
    let mut exchange = Exchange::new(request, false, u64::MAX);
    connection.exchange(&mut exchange, |_| ()).await?;
    Ok((connection, exchange.received(), now_ns() - begin_ns))
}

/// Waits until stdin is closed.
pub(crate) async fn stdin_closed() {
    let (closed, wait) = oneshot::channel();
    std::thread::spawn(move || {
        // an error ends it as well
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
        closed.send(()).ok()
    });
    wait.await.ok();
}
