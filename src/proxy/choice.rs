//! The choice of a worker for one attempt, and what it depends on.

use std::{cell::RefCell, sync::Arc};

use crate::{
    admission::{Admission, Room},
    base::Millis,
    proxy::{
        account::Account, body::Body, client::Client, context::Context, inspect::Inspected, serving::Serving,
    },
    routing::{Candidates, Outcome, Prompt, RouteInput, Router, Selection, Terms, Tried},
    vllm::Endpoint,
    workers::{Demand, Fleet, InFlight, Trial, Worker},
};

/// Choices of one attempt at most, besides one for each worker. Each further one is made only because another shard was
/// faster with the last place on a worker, or with the trial of a half-open breaker, which are then no candidates
/// any more.
const MORE_CHOICES: usize = 8;

/// What the choice of a worker may depend on.
pub(super) struct Asked<'a> {
    model: Option<&'a str>,
    session: Option<u64>,
    /// Empty where the policy does not look at it.
    prompt: Prompt,
    /// Whether what the answer says of its tokens is of use.
    pub(super) listens: bool,
}

impl<'a> Asked<'a> {
    /// Reads what the policy needs, and nothing where it needs nothing.
    pub(super) fn of(
        client: &Client<'_>,
        endpoint: &Endpoint,
        serving: &Serving<'a>,
        inspected: &'a Inspected,
        body: &mut Body,
    ) -> Self {
        let cx = client.cx;
        let mut asked = Self { model: None, session: None, prompt: Prompt::default(), listens: false };
        let Serving::Workers { model, .. } = serving else { return asked };
        asked.model = model.or_else(|| inspected.name.given());
        let router = cx.router.borrow();
        let length = body.len();
        let body = inspected.facts().map(|facts| (body.arrived().filled(), facts));
        if cx.needs.session {
            let header = |name: &str| client.request.field(name);
            asked.session = router.session(header, body.map(|(bytes, facts)| (bytes, &facts.prompt)));
        }
        if cx.needs.prompt && endpoint.prefills {
            asked.prompt = match body {
                Some((bytes, facts)) => router.prompt(bytes, facts, asked.model),
                None => router.prompt_of_length(length.unwrap_or(0), asked.model),
            };
            asked.listens = body.is_some();
        }
        asked
    }
}

/// The choice of one attempt. However the attempt ends, the router is told when this is dropped; it does not know of
/// the control thread.
pub(super) struct Chosen<'a> {
    cx: &'a Context,
    asked: &'a Asked<'a>,
    account: &'a Account<'a>,
    /// In the fleet; 0 for the control thread, which is never tried twice.
    pub(super) position: usize,
    pub(super) worker: &'a Arc<Worker>,
    /// What the request is expected to ask of it.
    pub(super) demand: Demand,
    /// The worker has not seen the request.
    pub(super) unsent: bool,
    /// The breaker's leave, which is given back with the choice at the latest.
    pub(super) trial: Trial,
    /// Its place among the worker's requests in flight.
    pub(super) room: Room<'a>,
}

/// What came of choosing.
pub(super) enum Choice<'a> {
    /// A worker, and a place on it.
    Of(Chosen<'a>),
    /// Everybody who could be chosen has as many requests as it may.
    Busy,
    /// There is nobody left.
    Nobody,
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        let usage = (!self.unsent).then(|| self.account.usage().unwrap_or_default());
        let Self { worker, demand, asked, .. } = *self;
        if Arc::ptr_eq(worker, &self.cx.admin) {
            return;
        }
        let outcome = Outcome { worker, prompt: &asked.prompt, demand, usage };
        // only a panic within the router leaves it borrowed
        if let Ok(mut router) = self.cx.router.try_borrow_mut() {
            router.ended(asked.model, &outcome);
        }
    }
}

/// Chooses a worker for the next attempt. `room` is a place that was taken for it already: its worker is a candidate
/// like the others that have room, and where another is chosen the place is given back.
pub(super) fn choose<'a>(
    cx: &'a Context,
    account: &'a Account<'a>,
    fleet: &'a Fleet,
    serving: &Serving<'_>,
    asked: &'a Asked<'a>,
    tried: &Tried,
    room: Option<Room<'a>>,
) -> Choice<'a> {
    let chosen = |worker, position, demand, room, trial| {
        Choice::Of(Chosen { cx, asked, account, position, worker, demand, unsent: false, trial, room })
    };
    let positions = match serving {
        Serving::Workers { positions, .. } => *positions,
        Serving::Admin if tried.count() == 0 => {
            let in_flight = InFlight::begin(cx.admin.clone(), Demand::default());
            let room = Room::new(in_flight, None);
            return chosen(&cx.admin, 0, Demand::default(), room, Trial::unneeded());
        }
        Serving::Admin => return Choice::Nobody,
    };
    let means =
        Means { router: &cx.router, scratch: &cx.positions, terms: cx.terms, admission: cx.admission() };
    let wanted = Wanted { model: asked.model, session: asked.session, prompt: &asked.prompt, tried };
    match pick(&means, || (cx.clock.now(), cx.random()), fleet, positions, &wanted, room) {
        Picked::Of(Pick { position, demand, room, trial, stand_in }) => {
            if stand_in && tried.count() == 0 {
                cx.metrics().chose_in_panic();
            }
            chosen(&fleet.workers[position], position, demand, room, trial)
        }
        Picked::Busy => Choice::Busy,
        Picked::Nobody => Choice::Nobody,
    }
}

/// What a worker is picked with.
pub(crate) struct Means<'a, 'r> {
    pub(crate) router: &'r RefCell<Router>,
    /// Where candidates are kept for the length of a choice.
    pub(crate) scratch: &'r RefCell<Vec<usize>>,
    /// What candidates depend on, but for time and chance.
    pub(crate) terms: Terms,
    /// Who hears of a place that becomes free.
    pub(crate) admission: Option<&'a Admission>,
}

/// What a worker is picked for.
pub(crate) struct Wanted<'r> {
    pub(crate) model: Option<&'r str>,
    pub(crate) session: Option<u64>,
    pub(crate) prompt: &'r Prompt,
    pub(crate) tried: &'r Tried,
}

/// A worker, and a place on it.
pub(crate) struct Pick<'a> {
    /// In the fleet.
    pub(crate) position: usize,
    pub(crate) demand: Demand,
    pub(crate) room: Room<'a>,
    pub(crate) trial: Trial,
    /// It only stands in for others that cannot be used; its breaker was not asked.
    pub(crate) stand_in: bool,
}

/// What came of picking, as in [`Choice`].
pub(crate) enum Picked<'a> {
    Of(Pick<'a>),
    Busy,
    Nobody,
}

/// Picks one of the workers at `positions`, takes a place on it, and its breaker's leave. `draw` gives the time and
/// chance, anew for each time that another shard was quicker.
pub(crate) fn pick<'a>(
    means: &Means<'a, '_>,
    draw: impl Fn() -> (Millis, u64),
    fleet: &Fleet,
    positions: &[usize],
    wanted: &Wanted<'_>,
    mut room: Option<Room<'a>>,
) -> Picked<'a> {
    let Wanted { model, session, prompt, tried } = *wanted;
    let position_of = |room: &Room<'_>| {
        let its = room.in_flight.worker();
        fleet.workers.iter().position(|worker| Arc::ptr_eq(worker, its))
    };
    for _ in 0..positions.len() + MORE_CHOICES {
        let place = room.as_ref().and_then(position_of);
        let (now, random) = draw();
        let mut scratch = means.scratch.borrow_mut();
        let terms = Terms { now, random, place, ..means.terms };
        let candidates = Candidates::of(fleet, positions, tried, &terms, &mut scratch);
        let input = RouteInput { random, now, session, prompt };
        let (busy, stand_in) = (candidates.are_busy(), candidates.stand_in());
        let Some(selection) = means.router.borrow_mut().choose(model, &input, &candidates) else {
            return if busy { Picked::Busy } else { Picked::Nobody };
        };
        let Selection { position, demand } = selection;
        let worker = &fleet.workers[position];
        let begun = match room.take_if(|_| place == Some(position)) {
            Some(mut room) => {
                room.in_flight.asks(demand);
                Some(room)
            }
            None => InFlight::try_begin(worker, demand).map(|begun| Room::new(begun, means.admission)),
        };
        // who only stands in is not asked
        let trial = if stand_in { Some(Trial::unneeded()) } else { worker.breaker().begin(now) };
        if let (Some(room), Some(trial)) = (begun, trial) {
            return Picked::Of(Pick { position, demand, room, trial, stand_in });
        }
        // another shard was quicker: the choice comes to nothing, and this worker is no candidate now
        let outcome = Outcome { worker, prompt, demand, usage: None };
        means.router.borrow_mut().ended(model, &outcome);
    }
    Picked::Busy
}
