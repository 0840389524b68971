//! Who may serve a request.

use crate::{
    proxy::{
        inspect::Name,
        respond::{self, Answer},
    },
    vllm::{Endpoint, ModelSource, Treatment},
    workers::{Fleet, Resolved},
};

/// Who may serve a request.
pub(super) enum Serving<'a> {
    /// The control thread.
    Admin,
    /// These workers, which know the model by this name.
    Workers {
        positions: &'a [usize],
        /// The one model that is meant, if one is.
        model: Option<&'a str>,
        rename: Option<&'a str>,
        /// Whether the fleet's others may have the path if these do not: the request names no model.
        others: bool,
    },
}

impl<'a> Serving<'a> {
    /// The workers' positions in the fleet; none: the control thread.
    pub(super) fn positions(&self) -> &'a [usize] {
        match self {
            Self::Admin => &[],
            Self::Workers { positions, .. } => positions,
        }
    }

    pub(super) fn has_other_kinds(&self) -> bool {
        matches!(self, Self::Workers { others: true, .. })
    }
}

/// Who may serve a request for what it names; vLLM's own 404 where nobody does.
pub(super) fn who<'a>(
    endpoint: &Endpoint,
    fleet: &'a Fleet,
    name: &Name,
    continues: bool,
) -> Result<Serving<'a>, Answer> {
    let to_admin =
        matches!(endpoint.treatment, Treatment::Admin | Treatment::Broadcast(_) | Treatment::Sticky);
    if to_admin || continues && fleet.has_several_servers() {
        return Ok(Serving::Admin);
    }
    let by_query = endpoint.treatment == Treatment::Route(ModelSource::Query);
    let others = !matches!(name, Name::Given(_)) && fleet.has_usable_others();
    let resolved = match name {
        Name::Irrelevant => fleet.any(),
        Name::Missing => fleet.resolve(None),
        Name::Given(name) => fleet.resolve(Some(name)),
    };
    // Workers may know names that they do not list, such as adapters that they load when asked to; a WebSocket may
    // tell its model later; and a path may not exist: a worker says so.
    let ours_to_refuse =
        fleet.model_matters() && endpoint.is_known() && !(by_query && *name == Name::Missing);
    match (resolved, fleet.any()) {
        (Resolved::Workers { workers, model, rename }, _) => {
            Ok(Serving::Workers { positions: workers, model, rename, others })
        }
        (Resolved::Unknown, Resolved::Workers { workers, .. }) if !ours_to_refuse => {
            Ok(Serving::Workers { positions: workers, model: None, rename: None, others })
        }
        (Resolved::Unknown, _) => {
            let name = name.given().unwrap_or(fleet.default_name());
            Err(respond::unknown_model(endpoint.error_shape, name, fleet))
        }
    }
}
