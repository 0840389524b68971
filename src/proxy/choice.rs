//! The choice of a worker for one attempt, and what it depends on.

use std::sync::Arc;

use crate::{
    proxy::{
        account::Account, body::Body, client::Client, context::Context, inspect::Inspected, serving::Serving,
    },
    routing::{Candidates, Outcome, Prompt, RouteInput, Selection, Terms, Tried},
    vllm::Endpoint,
    workers::{Demand, Fleet, Trial, Worker},
};

/// Choices of one attempt at most. Each further one is made only because another shard was faster with the trial of
/// a half-open breaker, which is then no candidate any more.
const MAX_CHOICES: usize = 8;

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
    pub(super) worker: Arc<Worker>,
    /// What the request is expected to ask of it.
    pub(super) demand: Demand,
    /// The worker has not seen the request.
    pub(super) unsent: bool,
    /// The breaker's leave, which is given back with the choice.
    _trial: Trial,
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        let usage = (!self.unsent).then(|| self.account.usage().unwrap_or_default());
        let Self { worker, demand, asked, .. } = self;
        if Arc::ptr_eq(worker, &self.cx.admin) {
            return;
        }
        let outcome = Outcome { worker, prompt: &asked.prompt, demand: *demand, usage };
        // only a panic within the router leaves it borrowed
        if let Ok(mut router) = self.cx.router.try_borrow_mut() {
            router.ended(asked.model, &outcome);
        }
    }
}

/// Chooses a worker for the next attempt; `None`: there is nobody left.
pub(super) fn choose<'a>(
    cx: &'a Context,
    account: &'a Account<'a>,
    fleet: &Fleet,
    serving: &Serving<'_>,
    asked: &'a Asked<'a>,
    tried: &Tried,
) -> Option<Chosen<'a>> {
    let (worker, Selection { position, demand }, trial) = match serving {
        Serving::Admin if tried.count() == 0 => (&cx.admin, Selection::of(0), Trial::unneeded()),
        Serving::Admin => return None,
        Serving::Workers { positions, .. } => {
            let (selection, trial) = (0..MAX_CHOICES)
                .find_map(|_| select(cx, fleet, positions, asked, tried).transpose())?
                .ok()?;
            (&fleet.workers[selection.position], selection, trial)
        }
    };
    let worker = worker.clone();
    Some(Chosen { cx, asked, account, position, worker, demand, unsent: false, _trial: trial })
}

/// One choice among these workers. `Err`: there is nobody; `Ok(None)`: the breaker of who was chosen has let
/// somebody else through in the meantime.
fn select(
    cx: &Context,
    fleet: &Fleet,
    positions: &[usize],
    asked: &Asked<'_>,
    tried: &Tried,
) -> Result<Option<(Selection, Trial)>, Nobody> {
    let (now, random) = (cx.clock.now(), cx.random());
    let mut scratch = cx.positions.borrow_mut();
    let terms = Terms { now, random, ..cx.terms };
    let candidates = Candidates::of(fleet, positions, tried, &terms, &mut scratch);
    let input = RouteInput { random, now, session: asked.session, prompt: &asked.prompt };
    let selection = cx.router.borrow_mut().choose(asked.model, &input, &candidates).ok_or(Nobody)?;
    if !candidates.stand_in() {
        return Ok(fleet.workers[selection.position].breaker().begin(now).map(|trial| (selection, trial)));
    }
    if tried.count() == 0 {
        cx.metrics().chose_in_panic();
    }
    Ok(Some((selection, Trial::unneeded())))
}

/// There is nobody to choose.
struct Nobody;
