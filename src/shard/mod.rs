//! One pinned thread: its runtime, its listener, and the connections that it accepted.
//!
//! A shard never waits for another thread. What it must be told (to drain) is a flag that it looks at with
//! every tick.

mod ending;
mod settings;
mod watchdog;

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crate::{
    net::{
        Bell, Driver, Listener, ReadHalf, Reserve, Runtime, TICK_MS, WriteHalf, accept_from, pause, spawn,
    },
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

/// The kernel is given this long to close a connection before its descriptor is taken for the reserve again: under
/// io_uring it does so beside us.
const CLOSE_PAUSE_MS: u64 = 5;

/// How often a draining shard looks whether its last connection has ended.
const DRAIN_LOOK_MS: u64 = 10;

/// What all shards are told.
#[derive(Debug, Default)]
pub struct Orders {
    drain: AtomicBool,
    /// Running exchanges are not waited for any longer.
    give_up: AtomicBool,
    /// Shards whose listener has no descriptor in reserve: there is none.
    without_reserve: AtomicUsize,
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
        let door = Rc::new(Door::new(orders.clone()));
        spawn(accept(listener.clone(), cx.clone(), door.clone()));
        if let Some(bell) = bell {
            spawn(hear(bell, driver, cx.clone()));
        }
        while !orders.drain.load(Ordering::Relaxed) {
            if let Some(fault) = on_tick {
                fault();
            }
            cx.tick();
            // descriptors that were short may not be any more, whether a client comes or not
            door.hold();
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

/// What a shard lets clients in with when there is no descriptor left.
struct Door {
    reserve: RefCell<Reserve>,
    orders: Arc<Orders>,
}

impl Door {
    fn new(orders: Arc<Orders>) -> Self {
        let mut reserve = Reserve::default();
        // counted only if it has none: whoever is let in while another shard begins must not be taken for too many
        if !reserve.hold() {
            orders.without_reserve.fetch_add(1, Ordering::Relaxed);
        }
        Self { reserve: RefCell::new(reserve), orders }
    }

    /// Takes a descriptor in reserve, if it has none and there is one; whether every shard has its own. What one
    /// lets in while another has none, the other could not take back.
    fn hold(&self) -> bool {
        let mut reserve = self.reserve.borrow_mut();
        if !reserve.is_held() && reserve.hold() {
            self.orders.without_reserve.fetch_sub(1, Ordering::Relaxed);
        }
        self.orders.without_reserve.load(Ordering::Relaxed) == 0
    }

    /// Lets go of the reserve.
    fn release(&self) {
        if self.is_held() {
            self.reserve.borrow_mut().release();
            self.orders.without_reserve.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_held(&self) -> bool {
        self.reserve.borrow().is_held()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // a shard that has ended needs none
        if !self.is_held() {
            self.orders.without_reserve.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Lets clients in. Where descriptors are short it turns them away one by one with the descriptor that it holds in
/// reserve (`faults.md` P3); where there are as many as the limit of open files allows, too, unless some of them rest:
/// those make room.
async fn accept(listener: Rc<Listener>, cx: Rc<Context>, door: Rc<Door>) {
    let farewells = Rc::new(Cell::new(0));
    loop {
        match listener.accept().await {
            Ok((reader, writer)) if !door.hold() => {
                // it came in on a reserve, which is needed for the next one
                shed(&cx, reader, writer, Shed::Descriptors).await;
                pause(CLOSE_PAUSE_MS).await;
                door.hold();
            }
            Ok((reader, writer)) if cx.is_full() && !cx.makes_room() => {
                if farewells.get() < MOST_FAREWELLS {
                    spawn(farewell(cx.clone(), reader, writer, farewells.clone()));
                } else {
                    shed(&cx, reader, writer, Shed::Limit).await;
                }
            }
            Ok((reader, writer)) => spawn(serve(cx.clone(), reader, writer)),
            Err(_) if door.orders.drain.load(Ordering::Relaxed) => return,
            Err(error) => {
                // an accept fails for want of a descriptor even while nobody waits, and the reserve is for who does
                if cx.accept_failed(&error) && door.is_held() && listener.somebody_waits().await.is_ok() {
                    door.release();
                } else {
                    pause(ACCEPT_PAUSE_MS).await;
                    door.hold();
                }
            }
        }
    }
}

async fn farewell(cx: Rc<Context>, reader: ReadHalf, writer: WriteHalf, running: Rc<Cell<usize>>) {
    running.set(running.get() + 1);
    shed(&cx, reader, writer, Shed::Limit).await;
    running.set(running.get() - 1);
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
