//! What must be known of a request before a worker can be chosen, and how much of its body that takes.

use std::ops::Range;

use crate::{
    http::RequestFraming,
    net::Buffer,
    proxy::{
        body::{self, Body},
        client::Client,
        retry::Failure,
    },
    vllm::{self, Endpoint, Facts, ModelFact, ModelField, ModelSource, MultipartFact, Treatment},
    workers::Fleet,
};

/// The endpoint whose requests may continue a stored response.
const RESPONSES: &str = "/v1/responses";

/// The model that a request names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// It does not matter, or cannot be read: any worker will do, and says itself what is wrong.
    Irrelevant,
    /// None: missing, `null` or empty.
    Missing,
    /// This one.
    Given(String),
}

impl Name {
    /// The name, if one is given.
    pub(super) fn given(&self) -> Option<&str> {
        if let Self::Given(name) = self { Some(name) } else { None }
    }
}

/// What was learned of a request.
#[derive(Debug)]
pub(super) struct Inspected {
    pub(super) name: Name,
    /// It continues a stored response, which one worker holds.
    pub(super) continues: bool,
    /// Its answer is a response that may be asked for later, of the worker that has it.
    pub(super) storable: bool,
    place: Place,
}

/// Where the model's name stands in the body.
#[derive(Debug)]
enum Place {
    Nowhere,
    Json(Box<Facts>),
    Form(Range<usize>),
}

/// What has to be read.
enum Need {
    /// Nothing of the body matters.
    Nothing,
    /// The body as JSON: the whole of it, or up to so many bytes.
    Json { most: Option<usize> },
    /// A form, until its field `model`.
    Form(ModelField),
}

impl Need {
    fn of(endpoint: &Endpoint, fleet: &Fleet, client: &Client<'_>) -> Self {
        let matters = fleet.model_matters();
        let stateful = endpoint.path == RESPONSES && fleet.has_several_servers();
        let needs = client.cx.needs;
        match endpoint.treatment {
            Treatment::Route(ModelSource::Json) if matters || stateful => Self::Json { most: None },
            // who may have to wait does so by the priority that stands in it
            Treatment::Route(ModelSource::Json)
                if needs.session || needs.prompt && endpoint.prefills || client.cx.entrance.is_some() =>
            {
                let most = client.cx.settings.prompt_peek_bytes;
                match client.request.framing() {
                    RequestFraming::Length(length) if length > most => Self::Nothing,
                    _ => Self::Json { most: Some(usize::try_from(most).unwrap_or(usize::MAX)) },
                }
            }
            Treatment::Route(ModelSource::Multipart) if matters => {
                let boundary = client.request.content_type().and_then(vllm::boundary);
                boundary.map_or(Self::Nothing, |boundary| Self::Form(ModelField::new(&boundary)))
            }
            _ => Self::Nothing,
        }
    }
}

/// Reads as much of the body as the way of the request depends on, and says what was learned from it.
///
/// # Errors
/// As [`body::read`].
///
/// # Cancellation
/// The connection must be closed.
pub(super) async fn inspect(
    client: &mut Client<'_>,
    rest: Buffer,
    endpoint: &Endpoint,
    fleet: &Fleet,
) -> Result<(Body, Inspected), Failure> {
    let nothing = |name| Inspected { name, continues: false, storable: false, place: Place::Nowhere };
    match Need::of(endpoint, fleet, client) {
        Need::Nothing => {
            let peek = client.peek_bytes();
            let body = body::read(client, rest, false, |so_far| so_far.len() >= peek).await?;
            let by_query = endpoint.treatment == Treatment::Route(ModelSource::Query);
            let named = if by_query { client.request.query().and_then(vllm::query_model) } else { None };
            let name = match named {
                Some(name) => Name::Given(name.into_owned()),
                None if by_query => Name::Missing,
                None => Name::Irrelevant,
            };
            Ok((body, nothing(name)))
        }
        Need::Json { most } => {
            let enough = |so_far: &[u8]| most.is_some_and(|most| so_far.len() > most);
            let mut body = body::read(client, rest, true, enough).await?;
            if matches!(body, Body::Streaming(_)) {
                return Ok((body, nothing(Name::Irrelevant)));
            }
            let bytes = body.arrived().filled();
            let facts = vllm::scan_json(bytes);
            let name = match &facts.model {
                ModelFact::Missing => Name::Missing,
                // a name that is no text is the worker's to refuse
                named => named.name(bytes).map_or(Name::Irrelevant, |name| Name::Given(name.into_owned())),
            };
            // other endpoints ignore such a field, as vLLM does
            let continues = facts.previous_response_id && endpoint.path == RESPONSES;
            // of a single server nobody has to remember what it holds
            let storable = facts.storable && endpoint.path == RESPONSES && fleet.has_several_servers();
            Ok((body, Inspected { name, continues, storable, place: Place::Json(Box::new(facts)) }))
        }
        Need::Form(mut field) => {
            let mut found = MultipartFact::NeedMore;
            let mut body = body::read(client, rest, true, |so_far| {
                found = field.scan(so_far, false);
                found != MultipartFact::NeedMore
            })
            .await?;
            let bytes = body.arrived().filled();
            if found == MultipartFact::NeedMore {
                found = field.scan(bytes, true);
            }
            let MultipartFact::Model { value } = found else { return Ok((body, nothing(Name::Missing))) };
            let text = bytes.get(value.clone()).map(vllm::multipart::field_text).unwrap_or_default();
            let name = if text.is_empty() { Name::Missing } else { Name::Given(text.into_owned()) };
            Ok((body, Inspected { name, continues: false, storable: false, place: Place::Form(value) }))
        }
    }
}

impl Inspected {
    /// The facts of a JSON body that was read whole.
    pub(super) fn facts(&self) -> Option<&Facts> {
        match &self.place {
            Place::Json(facts) => Some(facts),
            Place::Nowhere | Place::Form(_) => None,
        }
    }

    /// Makes `name` the model that the body asks for, and changes no other byte of it.
    pub(super) fn rename(&self, body: &mut Body, name: &str) {
        match &self.place {
            Place::Nowhere => {}
            Place::Json(facts) => {
                if let Some((place, bytes)) = facts.rename(name) {
                    body.arrived().splice(place, &bytes);
                }
            }
            Place::Form(place) => body.arrived().splice(place.clone(), name.as_bytes()),
        }
    }
}
