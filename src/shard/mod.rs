//! One pinned thread: its runtime, its listener, and the connections that it accepted.
//!
//! A shard never waits for another thread. What it must be told (to drain) is a flag that it looks at with
//! every tick.

mod settings;

use std::{
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    net::{Bell, Driver, Listener, Runtime, TICK_MS, accept_from, pause, spawn},
    proxy::{Context, Parts, serve},
};

pub use settings::Settings;

/// Most shards that are started without being asked for: one does 50,000 to 100,000 requests a second, and
/// `SO_REUSEPORT` spreads few connections badly over many.
pub const DEFAULT_MOST: usize = 4;

/// A failed accept (no descriptors, mostly) is followed by a pause of this length, so that it does not spin.
const ACCEPT_PAUSE_MS: u64 = 50;

/// How often a draining shard looks whether its last connection has ended.
const DRAIN_LOOK_MS: u64 = 10;

/// What all shards are told.
#[derive(Debug, Default)]
pub struct Orders {
    drain: AtomicBool,
    /// Running exchanges are not waited for any longer.
    give_up: AtomicBool,
}

impl Orders {
    /// Take no new connection, finish the running exchanges, end.
    pub fn drain(&self) {
        self.drain.store(true, Ordering::Relaxed);
    }

    /// Wait for nothing any more.
    pub fn give_up(&self) {
        self.give_up.store(true, Ordering::Relaxed);
    }
}

/// Runs a shard on the calling thread until it has drained. `on_tick` is for tests that need a fault.
///
/// # Errors
/// The listener cannot be watched by the driver.
pub fn run(
    mut runtime: Runtime,
    driver: Driver,
    listener: std::net::TcpListener,
    parts: Parts,
    bell: Option<Bell>,
    orders: Arc<Orders>,
    on_tick: Option<fn()>,
) -> io::Result<()> {
    let cx = Rc::new(Context::new(parts));
    runtime.block_on(async move {
        let listener = Rc::new(accept_from(listener, driver)?);
        spawn(accept(listener.clone(), cx.clone(), orders.clone()));
        if let Some(bell) = bell {
            spawn(hear(bell, driver, cx.clone()));
        }
        while !orders.drain.load(Ordering::Relaxed) {
            if let Some(fault) = on_tick {
                fault();
            }
            cx.tick();
            pause(TICK_MS).await;
        }
        listener.stop();
        cx.drain();
        while cx.connections() > 0 {
            if orders.give_up.load(Ordering::Relaxed) {
                cx.cut();
            }
            cx.tick();
            pause(DRAIN_LOOK_MS).await;
        }
        Ok(())
    })
}

async fn accept(listener: Rc<Listener>, cx: Rc<Context>, orders: Arc<Orders>) {
    loop {
        match listener.accept().await {
            Ok((reader, writer)) => spawn(serve(cx.clone(), reader, writer)),
            Err(_) if orders.drain.load(Ordering::Relaxed) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                pause(ACCEPT_PAUSE_MS).await;
            }
        }
    }
}

/// Looks who of those that wait has been let in, whenever another shard says so.
async fn hear(bell: Bell, driver: Driver, cx: Rc<Context>) {
    if let Err(error) = bell.listen(driver, || cx.look()).await {
        // every tick looks too
        tracing::error!(%error, "the bell of a shard is broken: requests that wait are let in late");
    }
}

/// Builds the calling thread's runtime over `driver`, on core `core` if that is given.
///
/// # Errors
/// As [`Runtime::build`].
pub fn prepare(driver: Driver, core: Option<core_affinity::CoreId>) -> io::Result<Runtime> {
    if let Some(core) = core {
        // a core that we may not have only costs speed
        core_affinity::set_for_current(core);
    }
    Runtime::build(driver)
}
