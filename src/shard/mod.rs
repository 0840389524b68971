//! One pinned thread: its runtime, its listener, and the connections that it accepted.
//!
//! A shard never waits for another thread. What it must be told (to drain) is a flag that it looks at with
//! every tick.

mod ending;
mod settings;
mod watchdog;

use std::{
    cell::Cell,
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    net::{Driver, Listener, ReadHalf, Reserve, Runtime, TICK_MS, WriteHalf, accept_from, pause, spawn},
    proxy::{Context, Parts, serve, shed},
    telemetry::metrics::Shed,
};

pub use ending::{Ending, Meaning};
pub use settings::Settings;
pub use watchdog::{Found, Watchdog};

/// Most shards that are started without being asked for: one does 50,000 to 100,000 requests a second, and
/// `SO_REUSEPORT` spreads few connections badly over many.
pub const DEFAULT_MOST: usize = 4;

/// Clients that are turned away at a time, beside those that are served; the next ones wait for them.
const MOST_FAREWELLS: usize = 64;

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
    orders: Arc<Orders>,
    on_tick: Option<fn()>,
) -> io::Result<()> {
    let cx = Rc::new(Context::new(parts));
    runtime.block_on(async move {
        let listener = Rc::new(accept_from(listener, driver)?);
        spawn(accept(listener.clone(), cx.clone(), orders.clone()));
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

/// Lets clients in. Where descriptors are short it turns them away one by one with the descriptor that it holds in
/// reserve (`faults.md` P3); where there are as many as the limit of open files allows, too.
async fn accept(listener: Rc<Listener>, cx: Rc<Context>, orders: Arc<Orders>) {
    let mut reserve = Reserve::default();
    reserve.hold();
    let farewells = Rc::new(Cell::new(0));
    loop {
        match listener.accept().await {
            Ok((reader, writer)) if !reserve.hold() => {
                // it came in on the reserve, which is needed for the next one
                shed(&cx, reader, writer, Shed::Descriptors).await;
            }
            Ok((reader, writer)) if cx.is_full() => {
                if farewells.get() < MOST_FAREWELLS {
                    spawn(farewell(cx.clone(), reader, writer, farewells.clone()));
                } else {
                    shed(&cx, reader, writer, Shed::Limit).await;
                }
            }
            Ok((reader, writer)) => spawn(serve(cx.clone(), reader, writer)),
            Err(_) if orders.drain.load(Ordering::Relaxed) => return,
            // without a pause only where the next accept has a descriptor that this one had not
            Err(error) if cx.accept_failed(&error) && reserve.release() => {}
            Err(_) => pause(ACCEPT_PAUSE_MS).await,
        }
    }
}

async fn farewell(cx: Rc<Context>, reader: ReadHalf, writer: WriteHalf, running: Rc<Cell<usize>>) {
    running.set(running.get() + 1);
    shed(&cx, reader, writer, Shed::Limit).await;
    running.set(running.get() - 1);
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
