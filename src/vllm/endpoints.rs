//! The table of vLLM's API paths and what the proxy does with each.
//!
//! One row per path; to let the proxy know a new path of vLLM is to add its row. Paths are unique, so a lookup is
//! one hash of the path and one comparison. What is in no row still goes to a worker, which answers in its own
//! words (a 404, 405 or 307), so nothing breaks when vLLM grows a path before this table does.

use crate::vllm::aggregate::{Aggregate, Combine};

/// What the proxy does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// One worker that has the model; where the model's name stands.
    Route(ModelSource),
    /// Answered by the shard from the fleet.
    Local(Local),
    /// Answered by the control thread: workers have to be asked.
    Admin,
    /// The control thread sends it to every worker and makes one answer of theirs.
    Broadcast(Aggregate),
    /// About a stored response, which only the worker that made it holds.
    Sticky,
}

/// Where a request names its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelSource {
    /// The key `model` of the JSON object that is the body.
    Json,
    /// The field `model` of a `multipart/form-data` body.
    Multipart,
    /// The parameter `model` of the query (the body of a WebSocket comes too late).
    Query,
    /// Nowhere: any worker will do.
    None,
}

/// What a shard answers from the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// 200 or 503 with an empty body.
    Health,
    /// SageMaker's name of [`Local::Health`].
    Ping,
    /// 200 as long as the process lives.
    Live,
    /// 200 while it can serve and takes new requests, else 503 that says why.
    Ready,
    /// The merged list of models.
    Models,
    /// The lowest version among the workers.
    Version,
}

/// How vLLM words the errors of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorShape {
    /// `{"error":{"message","type","param","code"}}`.
    OpenAi,
    /// As `OpenAi`, but an unknown model is told without param and without the served names.
    Pooling,
    /// `{"type":"error","error":{"type","message"}}`.
    Anthropic,
    /// `{"message"}`.
    Cohere,
}

/// One path of vLLM's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// `{id}` stands for one segment that is not empty, a final `{path}` for the rest.
    pub path: &'static str,
    /// The methods that vLLM has a handler for; empty: every method.
    pub methods: &'static [&'static str],
    /// What is done with it.
    pub treatment: Treatment,
    /// How its errors are worded.
    pub error_shape: ErrorShape,
    /// Whether a worker that has done it has nothing in its prefix cache any more.
    pub empties_cache: bool,
    /// Whether a request may be sent again after a worker has seen it: it changes nothing but the worker's load.
    pub repeatable: bool,
    /// Whether its body may ask for the answer to be kept, by `store` or `background`: then it is not repeatable.
    pub may_store: bool,
    /// One line for the reference in README.
    pub summary: &'static str,
    /// Value of the label `endpoint` of metrics.
    pub label: &'static str,
    /// Whether a worker computes the prompt that its body holds, and keeps it in its prefix cache.
    pub prefills: bool,
    index: usize,
}

impl Endpoint {
    /// Position in [`TABLE`], for arrays with a place for each endpoint; `TABLE.len()` for everything else.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether vLLM is known to have it. Of an unknown one, a missing or unknown model means any worker: it is
    /// the worker's to say that there is no such path.
    pub fn is_known(&self) -> bool {
        self.index < TABLE.len()
    }

    /// Whether a worker generates text for it: such an answer tells why it ended.
    pub fn generates(&self) -> bool {
        self.prefills && self.error_shape != ErrorShape::Pooling
    }

    /// What stands in `path`, which must be one of this endpoint, in place of `{id}`.
    pub fn id<'a>(&self, path: &'a str) -> Option<&'a str> {
        let (before, after) = self.path.split_once("{id}")?;
        path.strip_prefix(before)?.strip_suffix(after).filter(|id| !id.is_empty() && !id.contains('/'))
    }

    fn matches(&self, path: &str) -> bool {
        match self.path.split_once("{path}") {
            Some((before, _)) => path.starts_with(before),
            None => self.id(path).is_some(),
        }
    }
}

/// Every path of vLLM's API.
pub static TABLE: &[Endpoint] = ROWS;

/// A path that vLLM does not have, as far as is known.
pub static OTHER: Endpoint = Endpoint {
    index: ROWS.len(),
    label: "other",
    methods: &[],
    prefills: false,
    repeatable: false,
    ..row("", POST, JSON, ErrorShape::OpenAi, "anything else")
};

/// A known path with a method that vLLM has no handler for: any worker answers its own 405.
pub static OTHER_METHOD: Endpoint = Endpoint { treatment: ANY, ..OTHER };

/// The endpoint of a request. `path` is without the query, as the client wrote it.
pub fn lookup(method: &str, path: &str) -> &'static Endpoint {
    let exact = exact_row(path);
    if let Some(endpoint) = exact.filter(|endpoint| endpoint.methods.contains(&method)) {
        return endpoint;
    }
    // as FastAPI, which goes on to the patterns when only the method differs
    let mut patterns = pattern_rows(path).peekable();
    let known = exact.is_some() || patterns.peek().is_some();
    match patterns.find(|endpoint| endpoint.methods.contains(&method)) {
        Some(endpoint) => endpoint,
        None if known => &OTHER_METHOD,
        None => &OTHER,
    }
}

fn exact_row(path: &str) -> Option<&'static Endpoint> {
    let mut slot = slot_of(path.as_bytes());
    loop {
        let endpoint = TABLE.get(usize::from(SLOTS[slot].checked_sub(1)?))?;
        if endpoint.path == path {
            return Some(endpoint);
        }
        slot = (slot + 1) % SLOTS.len();
    }
}

fn pattern_rows(path: &str) -> impl Iterator<Item = &'static Endpoint> {
    let alike = PATTERNS.iter().filter(|(before, _)| path.starts_with(before));
    let rows = alike.filter_map(|&(_, row)| TABLE.get(usize::from(row)));
    rows.filter(move |endpoint| endpoint.matches(path))
}

const GET: &[&str] = &["GET"];
const POST: &[&str] = &["POST"];

const JSON: Treatment = Treatment::Route(ModelSource::Json);
const FORM: Treatment = Treatment::Route(ModelSource::Multipart);
const ANY: Treatment = Treatment::Route(ModelSource::None);
/// Everybody must do it, and all say the same.
const SAME: Treatment = Treatment::Broadcast(Aggregate::Fields(&[]));
const FIRST: Treatment = Treatment::Broadcast(Aggregate::First);
const TEXT: Treatment = Treatment::Broadcast(Aggregate::Text);

const fn fields(rules: &'static [(&'static str, Combine)]) -> Treatment {
    Treatment::Broadcast(Aggregate::Fields(rules))
}

const fn row(
    path: &'static str,
    methods: &'static [&'static str],
    treatment: Treatment,
    error_shape: ErrorShape,
    summary: &'static str,
) -> Endpoint {
    let prefills = matches!(treatment, Treatment::Route(ModelSource::Json));
    let repeatable = matches!(treatment, Treatment::Route(_));
    Endpoint {
        path,
        methods,
        treatment,
        error_shape,
        empties_cache: false,
        repeatable,
        may_store: false,
        summary,
        label: path,
        prefills,
        index: 0,
    }
}

/// What is turned into tokens or back, but not computed.
const fn tokens(path: &'static str, error_shape: ErrorShape, summary: &'static str) -> Endpoint {
    Endpoint { prefills: false, ..row(path, POST, JSON, error_shape, summary) }
}

const fn openai(
    path: &'static str,
    methods: &'static [&'static str],
    treatment: Treatment,
    summary: &'static str,
) -> Endpoint {
    row(path, methods, treatment, ErrorShape::OpenAi, summary)
}

/// A row that empties the workers' prefix caches.
const fn emptying(row: Endpoint) -> Endpoint {
    Endpoint { empties_cache: true, ..row }
}

/// A row whose answers may be asked to be kept.
const fn storing(row: Endpoint) -> Endpoint {
    Endpoint { may_store: true, ..row }
}

const fn pooling(path: &'static str, summary: &'static str) -> Endpoint {
    row(path, POST, JSON, ErrorShape::Pooling, summary)
}

#[rustfmt::skip]
const ROWS: &[Endpoint] = &numbered([
    // generation
    openai("/v1/chat/completions", POST, JSON, "chat"),
    openai("/v1/chat/completions/batch", POST, JSON, "several chats in one request"),
    openai("/v1/completions", POST, JSON, "completion of text or tokens"),
    storing(openai("/v1/responses", POST, JSON, "responses; one that continues another goes to the worker that holds it")),
    openai("/v1/responses/{id}", GET, Treatment::Sticky, "a stored response"),
    openai("/v1/responses/{id}/cancel", POST, Treatment::Sticky, "cancels a background response"),
    row("/v1/messages", POST, JSON, ErrorShape::Anthropic, "Anthropic's messages"),
    tokens("/v1/messages/count_tokens", ErrorShape::Anthropic, "tokens of Anthropic's messages"),
    row("/cohere/v2/chat", POST, JSON, ErrorShape::Cohere, "Cohere's chat"),
    openai("/generative_scoring", POST, JSON, "scores by generation"),
    openai("/v1/systemone", POST, JSON, "structured decisions"),
    openai("/v1/decisions", POST, JSON, "structured decisions (vLLM 0.33)"),
    openai("/invocations", POST, JSON, "SageMaker's name of whatever the body is"),
    openai("/inference/v1/generate", POST, JSON, "tokens in, tokens out"),
    // pooling
    pooling("/v1/embeddings", "embeddings"),
    pooling("/v2/embed", "Cohere's embeddings"),
    pooling("/pooling", "pooled hidden states"),
    pooling("/classify", "classes"),
    pooling("/score", "similarity of pairs"),
    pooling("/v1/score", "similarity of pairs"),
    pooling("/rerank", "documents by relevance"),
    pooling("/v1/rerank", "documents by relevance"),
    pooling("/v2/rerank", "documents by relevance"),
    // audio
    openai("/v1/audio/transcriptions", POST, FORM, "speech to text"),
    openai("/v1/audio/translations", POST, FORM, "speech to English text"),
    openai("/v1/realtime", GET, Treatment::Route(ModelSource::Query), "WebSocket for speech"),
    // tokens and templates
    tokens("/tokenize", ErrorShape::OpenAi, "text to tokens"),
    tokens("/detokenize", ErrorShape::OpenAi, "tokens to text"),
    openai("/tokenizer_info", GET, ANY, "the tokenizer's settings"),
    tokens("/v1/chat/completions/render", ErrorShape::OpenAi, "chat to tokens"),
    tokens("/v1/chat/completions/derender", ErrorShape::OpenAi, "tokens to a chat answer"),
    tokens("/v1/completions/render", ErrorShape::OpenAi, "prompt to tokens"),
    tokens("/v1/completions/derender", ErrorShape::OpenAi, "tokens to a completion"),
    tokens("/v1/messages/render", ErrorShape::OpenAi, "Anthropic's messages to tokens"),
    tokens("/v1/messages/derender", ErrorShape::OpenAi, "tokens to Anthropic's answer"),
    tokens("/v1/responses/render", ErrorShape::OpenAi, "a response's input to tokens"),
    tokens("/v1/responses/derender", ErrorShape::OpenAi, "tokens to a response"),
    tokens("/cohere/v2/chat/render", ErrorShape::Cohere, "Cohere's chat to tokens"),
    // about the server
    openai("/health", GET, Treatment::Local(Local::Health), "200 while a worker can serve, else 503"),
    openai("/ping", &["GET", "POST"], Treatment::Local(Local::Ping), "SageMaker's name of /health"),
    openai("/livez", GET, Treatment::Local(Local::Live), "200 while the proxy lives"),
    openai("/liveness", GET, Treatment::Local(Local::Live), "vllm-router's name of /livez"),
    openai("/readyz", GET, Treatment::Local(Local::Ready), "200 while a worker can serve and the proxy does not drain, else 503 and why"),
    openai("/readiness", GET, Treatment::Local(Local::Ready), "vllm-router's name of /readyz"),
    openai("/version", GET, Treatment::Local(Local::Version), "the lowest version among the workers"),
    openai("/v1/models", GET, Treatment::Local(Local::Models), "the models of all workers"),
    openai("/metrics", GET, Treatment::Admin, "metrics of the proxy and the workers"),
    openai("/metrics/{path}", &["GET", "HEAD"], Treatment::Admin, "the same"),
    openai("/load", GET, fields(&[("server_load", Combine::Sum)]), "requests in the workers"),
    openai("/kv_event_sources", GET, Treatment::Broadcast(Aggregate::Ranks), "where KV events are published"),
    openai("/docs", GET, ANY, "a worker's API pages"),
    openai("/redoc", GET, ANY, "a worker's API pages"),
    openai("/openapi.json", GET, ANY, "a worker's API description"),
    // adapters
    openai("/v1/load_lora_adapter", POST, TEXT, "loads an adapter into every worker"),
    openai("/v1/unload_lora_adapter", POST, TEXT, "unloads an adapter from every worker"),
    openai("/adapters", POST, TEXT, "SageMaker's name of /v1/load_lora_adapter"),
    openai("/adapters/{id}", &["DELETE"], TEXT, "SageMaker's name of /v1/unload_lora_adapter"),
    // requests and profiles
    openai("/abort_requests", POST, fields(&[("aborted", Combine::Sum)]), "aborts requests on every worker"),
    openai("/inference/v1/abort_requests", POST, SAME, "aborts requests on every worker"),
    openai("/start_profile", POST, SAME, "starts every worker's profiler"),
    openai("/stop_profile", POST, SAME, "stops every worker's profiler"),
    // elasticity and faults
    openai("/scale_elastic_ep", POST, SAME, "scales every worker's expert parallelism"),
    openai("/is_scaling_elastic_ep", POST, fields(&[("is_scaling_elastic_ep", Combine::Or)]), "whether any worker scales"),
    openai("/fault_tolerance/apply", POST, SAME, "a recovery instruction to every worker"),
    openai("/fault_tolerance/status", GET, fields(&[("total_engines", Combine::Sum), ("engines", Combine::Concat)]), "the engines of every worker"),
    // development mode
    emptying(openai("/reset_prefix_cache", POST, fields(&[("success", Combine::And)]), "empties every worker's prefix cache")),
    openai("/reset_mm_cache", POST, SAME, "empties every worker's multi-modal cache"),
    openai("/reset_encoder_cache", POST, SAME, "empties every worker's encoder cache"),
    openai("/collective_rpc", POST, fields(&[("results", Combine::Concat)]), "a call in every worker's processes"),
    emptying(openai("/sleep", POST, SAME, "puts every worker to sleep")),
    emptying(openai("/wake_up", POST, fields(&[("status", Combine::Prefer("sleeping"))]), "wakes every worker")),
    openai("/is_sleeping", GET, fields(&[("is_sleeping", Combine::Or)]), "whether any worker sleeps"),
    emptying(openai("/release_kv_cache_memory", POST, SAME, "frees every worker's KV cache")),
    // unless asked not to, pausing clears the caches too
    emptying(openai("/pause", POST, SAME, "pauses every worker")),
    openai("/resume", POST, SAME, "resumes every worker"),
    openai("/is_paused", GET, fields(&[("is_paused", Combine::Or)]), "whether any worker is paused"),
    openai("/server_info", GET, FIRST, "a worker's settings"),
    openai("/get_world_size", GET, fields(&[("world_size", Combine::Sum)]), "processes of all workers"),
    openai("/init_weight_transfer_engine", POST, SAME, "prepares every worker for new weights"),
    openai("/shutdown_weight_transfer_engine", POST, SAME, "ends the transfer of weights"),
    openai("/start_weight_update", POST, SAME, "begins an update of weights"),
    openai("/start_draft_weight_update", POST, SAME, "begins an update of the draft model's weights"),
    emptying(openai("/update_weights", POST, SAME, "updates every worker's weights")),
    emptying(openai("/finish_weight_update", POST, SAME, "ends an update of weights")),
    openai("/update_weight_version", POST, fields(&[("success", Combine::And)]), "names every worker's weights"),
    openai("/weight_info", GET, FIRST, "the version of a worker's weights"),
    openai("/weight_checker", POST, fields(&[("match", Combine::And), ("mismatches", Combine::Union)]), "compares every worker's weights"),
]);

const fn numbered<const N: usize>(mut rows: [Endpoint; N]) -> [Endpoint; N] {
    let mut at = 0;
    while at < N {
        rows[at].index = at;
        at += 1;
    }
    rows
}

/// Open addressing: a row's position plus one, zero where nothing is; a power of two that keeps it two thirds
/// empty.
static SLOTS: [u8; 256] = slots();

const fn slots() -> [u8; 256] {
    let mut slots = [0_u8; 256];
    let mut row = 0;
    while row < ROWS.len() {
        let mut slot = slot_of(ROWS[row].path.as_bytes());
        while slots[slot] != 0 {
            slot = (slot + 1) % slots.len();
        }
        row += 1;
        // fails to compile beyond 255 rows
        slots[slot] = [row as u8][(row > 255) as usize];
    }
    slots
}

/// Where the search for `path` begins: a hash of its length and its last eight bytes, in which the rows differ.
const fn slot_of(path: &[u8]) -> usize {
    let mut word = path.len() as u64;
    let mut at = path.len().saturating_sub(8);
    while at < path.len() {
        word = word.rotate_left(8) ^ path[at] as u64;
        at += 1;
    }
    (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize
}

const PATTERN_COUNT: usize = patterns::<0>().1;
/// The rows with a placeholder, and what stands before it.
static PATTERNS: [(&str, u8); PATTERN_COUNT] = patterns().0;

const fn patterns<const N: usize>() -> ([(&'static str, u8); N], usize) {
    let mut found = [("", 0); N];
    let (mut row, mut count) = (0, 0);
    while row < ROWS.len() {
        let path = ROWS[row].path;
        let mut at = 0;
        while at < path.len() && path.as_bytes()[at] != b'{' {
            at += 1;
        }
        if at < path.len() {
            if count < N {
                found[count] = (path.split_at(at).0, row as u8);
            }
            count += 1;
        }
        row += 1;
    }
    (found, count)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::vllm::golden;

    fn naive(method: &str, path: &str) -> &'static Endpoint {
        let fits = |endpoint: &&Endpoint| {
            let (pattern, given) = (endpoint.path.split('/'), path.split('/'));
            if let Some(prefix) = endpoint.path.strip_suffix("{path}") {
                return path.starts_with(prefix);
            }
            pattern.clone().count() == given.clone().count()
                && pattern.zip(given).all(|(p, g)| p == g || p == "{id}" && !g.is_empty())
        };
        let allowed = |endpoint: &&Endpoint| endpoint.methods.contains(&method);
        let nothing = if TABLE.iter().any(|endpoint| fits(&endpoint)) { &OTHER_METHOD } else { &OTHER };
        TABLE.iter().filter(fits).find(allowed).unwrap_or(nothing)
    }

    #[test]
    fn lookup_agrees_with_a_naive_search() {
        let mut paths: Vec<String> =
            ["", "/", "//", "*", "/v", "/v1", "/v1/", "/nope", "/metrics/a/b", "/metricsx"]
                .map(str::to_owned)
                .to_vec();
        for endpoint in TABLE {
            let path = endpoint.path;
            for id in ["resp_1", "a/b", "", "{id}", "cancel"] {
                paths.push(path.replace("{id}", id).replace("{path}", id));
            }
            paths.extend([format!("{path}/"), format!("/{path}"), format!("{path}x"), path.to_uppercase()]);
            paths.extend((0..path.len()).map(|end| path[..end].to_owned()));
        }
        assert!(paths.len() > 1000);
        for path in &paths {
            for method in ["GET", "POST", "DELETE", "HEAD", "PUT", "get", ""] {
                let (found, wanted) = (lookup(method, path), naive(method, path));
                assert_eq!(found, wanted, "{method} {path}");
            }
        }
    }

    #[test]
    fn rows_are_unique_and_numbered_in_order() {
        let paths: HashSet<&str> = TABLE.iter().map(|endpoint| endpoint.path).collect();
        let labels: HashSet<&str> = TABLE.iter().map(|endpoint| endpoint.label).collect();
        assert_eq!((paths.len(), labels.len()), (TABLE.len(), TABLE.len()));
        for (position, endpoint) in TABLE.iter().enumerate() {
            assert_eq!(endpoint.index(), position);
            assert!(endpoint.is_known() && endpoint.path.starts_with('/') && !endpoint.summary.is_empty());
            assert!(!endpoint.methods.is_empty());
        }
        assert_eq!((OTHER.index(), OTHER.label), (TABLE.len(), "other"));
        assert!(!OTHER.is_known() && !OTHER_METHOD.is_known());
    }

    #[test]
    fn what_changes_a_worker_is_not_repeatable_and_what_is_computed_is() {
        for endpoint in TABLE.iter().chain([&OTHER, &OTHER_METHOD]) {
            let routed = endpoint.is_known() && matches!(endpoint.treatment, Treatment::Route(_));
            assert_eq!(endpoint.repeatable, routed, "{}", endpoint.path);
        }
        assert!(lookup("POST", "/v1/chat/completions").repeatable && lookup("POST", "/tokenize").repeatable);
        for path in ["/v1/files", "/v1/batches", "/sleep", "/v1/load_lora_adapter", "/v1/responses/r/cancel"]
        {
            assert!(!lookup("POST", path).repeatable, "{path}");
        }
    }

    #[test]
    fn a_search_is_short() {
        for endpoint in TABLE {
            let begin = slot_of(endpoint.path.as_bytes());
            let steps = (0..SLOTS.len())
                .find(|step| usize::from(SLOTS[(begin + step) % SLOTS.len()]) == endpoint.index() + 1)
                .unwrap();
            assert!(steps <= 4, "{} is found after {steps} steps", endpoint.path);
        }
    }

    /// vLLM's own description of itself, and the paths that its description leaves out.
    #[test]
    fn every_path_of_the_golden_server_has_its_row() {
        let case = golden::case("py-0.32-extras/get_openapi.json");
        let described: serde_json::Value = serde_json::from_slice(case.answer_body()).unwrap();
        let described = described["paths"].as_object().unwrap();
        assert!(described.len() > 50);
        for (path, methods) in described {
            for method in methods.as_object().unwrap().keys() {
                let path = path.replace("{response_id}", "resp_1");
                let found = lookup(&method.to_uppercase(), &path);
                assert!(found.is_known(), "{method} {path}");
            }
        }
    }

    #[test]
    fn golden_requests_that_succeed_are_known_and_those_of_no_path_are_not() {
        let mut known = 0;
        for case in golden::all() {
            let Some((method, path)) = case.line() else { continue };
            let found = lookup(&method, &path);
            match case.status() {
                200..300 => {
                    assert!(found.is_known(), "{}", case.name);
                    known += 1;
                }
                405 | 307 => assert!(!found.is_known(), "{}", case.name),
                _ => {}
            }
        }
        assert!(known > 100);
    }

    #[test]
    fn an_id_is_one_segment() {
        let stored = lookup("GET", "/v1/responses/resp_1");
        assert_eq!(
            (stored.treatment, stored.id("/v1/responses/resp_1")),
            (Treatment::Sticky, Some("resp_1"))
        );
        let cancel = lookup("POST", "/v1/responses/resp_1/cancel");
        assert_eq!(cancel.id("/v1/responses/resp_1/cancel"), Some("resp_1"));
        assert_eq!(lookup("POST", "/v1/responses").treatment, JSON);
        assert_eq!(lookup("DELETE", "/v1/responses/resp_1"), &OTHER_METHOD);
        assert_eq!(lookup("GET", "/v1/models/m"), &OTHER);
        assert_eq!(lookup("GET", "/v1/responses/render").treatment, Treatment::Sticky, "as FastAPI has it");
    }
}
