//! The answers of many workers to one broadcast, made into one that a client of a single vLLM understands.

use serde_json::{Map, Number, Value};

use crate::vllm::errors;

/// How the answers to a broadcast become one. Except for [`Aggregate::First`] it succeeds only where every worker
/// did; else the client learns who failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aggregate {
    /// The first worker's object, with these fields combined. Without any, the first worker's body as it is.
    Fields(&'static [(&'static str, Combine)]),
    /// Objects whose keys number the data-parallel ranks of each worker: numbered anew through all workers.
    Ranks,
    /// The first success; nobody else has to succeed.
    First,
    /// Text without a content type (LoRA): that of the first worker.
    Text,
}

/// How a field of several answers becomes one. A value of another kind than the rule is for leaves that of the
/// first worker that has the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combine {
    /// True where every worker says so.
    And,
    /// True where any worker says so.
    Or,
    /// The sum of numbers.
    Sum,
    /// Arrays, one behind the other.
    Concat,
    /// Arrays, one behind the other, what stands in several only once.
    Union,
    /// This text where any worker says it.
    Prefer(&'static str),
}

/// A worker's answer: the worker's name, status, body. One that could not be asked is given as a 502 or 504 with a
/// body of [`errors::openai`].
pub type Answer = (String, u16, Vec<u8>);

/// Status, body and content type of the one answer.
pub type Aggregated = (u16, Vec<u8>, Option<&'static str>);

const JSON: &str = "application/json";
const PLAIN: &str = "text/plain; charset=utf-8";
/// More workers than this are counted, not named.
const NAMED_WORKERS: usize = 16;

/// Makes one answer of those of all workers, in the order of configuration. A worker that does not have the path
/// (one that embeds knows no LoRA) has no part in it, unless nobody has.
pub fn aggregate(rule: Aggregate, answers: &[Answer]) -> Aggregated {
    let no_such_path = errors::detail("Not Found");
    let has_path = |(_, status, body): &&Answer| !(*status == 404 && *body == no_such_path);
    let concerned: Vec<Answer> = answers.iter().filter(has_path).cloned().collect();
    of_concerned(rule, if concerned.is_empty() { answers } else { &concerned })
}

fn of_concerned(rule: Aggregate, answers: &[Answer]) -> Aggregated {
    let mut good = answers.iter().filter(|answer| succeeded(answer));
    let Some((_, first_status, first_body)) = good.next() else { return failure(answers) };
    if rule != Aggregate::First && answers.iter().any(|answer| !succeeded(answer)) {
        return failure(answers);
    }
    let bodies = || answers.iter().map(|(_, _, body)| body.as_slice());
    let combined = match rule {
        Aggregate::Fields([]) | Aggregate::First | Aggregate::Text => None,
        Aggregate::Fields(rules) => fields(rules, bodies()),
        Aggregate::Ranks => ranks(bodies()),
    };
    let body = combined.unwrap_or_else(|| first_body.clone());
    let kind = (rule != Aggregate::Text).then(|| content_type(&body)).flatten();
    (*first_status, body, kind)
}

fn succeeded((_, status, _): &Answer) -> bool {
    (200..300).contains(status)
}

/// What vLLM says of a body of its own.
fn content_type(body: &[u8]) -> Option<&'static str> {
    match body {
        [] => None,
        body if serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok() => Some(JSON),
        _ => Some(PLAIN),
    }
}

/// `None`: nobody answered with an object, as where vLLM answers 200 with an empty body.
fn fields<'a>(rules: &[(&str, Combine)], bodies: impl Iterator<Item = &'a [u8]>) -> Option<Vec<u8>> {
    let mut objects = bodies.filter_map(|body| serde_json::from_slice::<Map<String, Value>>(body).ok());
    let mut whole = objects.next()?;
    for object in objects {
        for (key, value) in object {
            match (whole.get_mut(&key), rules.iter().find(|(name, _)| *name == key)) {
                (Some(place), Some((_, rule))) => combine(*rule, place, value),
                (Some(_), None) => {}
                (None, _) => {
                    whole.insert(key, value);
                }
            }
        }
    }
    serde_json::to_vec(&whole).ok()
}

fn combine(rule: Combine, place: &mut Value, value: Value) {
    match (rule, place, value) {
        (Combine::And, Value::Bool(all), Value::Bool(this)) => *all &= this,
        (Combine::Or, Value::Bool(any), Value::Bool(this)) => *any |= this,
        (Combine::Sum, Value::Number(sum), Value::Number(this)) => {
            if let Some(added) = added(sum, &this) {
                *sum = added;
            }
        }
        (Combine::Concat, Value::Array(whole), Value::Array(this)) => whole.extend(this),
        (Combine::Union, Value::Array(whole), Value::Array(this)) => {
            for item in this {
                if !whole.contains(&item) {
                    whole.push(item);
                }
            }
        }
        (Combine::Prefer(text), Value::String(place), Value::String(this)) if this == text => *place = this,
        _ => {}
    }
}

fn added(one: &Number, other: &Number) -> Option<Number> {
    match (one.as_i64(), other.as_i64()) {
        (Some(one), Some(other)) => one.checked_add(other).map(Number::from),
        _ => Number::from_f64(one.as_f64()? + other.as_f64()?),
    }
}

/// The ranks of every worker, numbered through.
fn ranks<'a>(bodies: impl Iterator<Item = &'a [u8]>) -> Option<Vec<u8>> {
    let objects = bodies.filter_map(|body| serde_json::from_slice::<Map<String, Value>>(body).ok());
    let values = objects.flat_map(|object| object.into_iter().map(|(_, value)| value));
    let whole: Map<String, Value> =
        values.enumerate().map(|(rank, value)| (rank.to_string(), value)).collect();
    serde_json::to_vec(&whole).ok()
}

/// The worst answer. Where the others do not say the very same, its message also tells who failed and who did not.
fn failure(answers: &[Answer]) -> Aggregated {
    let failed = || answers.iter().filter(|answer| !succeeded(answer));
    let Some(worst) = failed().map(|(_, status, _)| *status).max() else {
        let body = errors::openai("There is no worker to ask.", errors::status_phrase(503), None, 503);
        return (503, body, Some(JSON));
    };
    let mut of_worst = failed().filter(|(_, status, _)| *status == worst);
    let body = of_worst.next().map(|(_, _, body)| body.as_slice()).unwrap_or_default();
    if answers.iter().all(|(_, status, other)| *status == worst && other == body) {
        return (worst, body.to_vec(), content_type(body));
    }
    let report = report(answers);
    (worst, extended(body, worst, &report), Some(JSON))
}

/// ` (failed: b with 500; succeeded: a)`
fn report(answers: &[Answer]) -> String {
    let part = |title: &str, names: Vec<String>| {
        let more = names.len().saturating_sub(NAMED_WORKERS);
        let names: Vec<String> = names.into_iter().take(NAMED_WORKERS).collect();
        match (names.is_empty(), more) {
            (true, _) => None,
            (false, 0) => Some(format!("{title}: {}", names.join(", "))),
            (false, more) => Some(format!("{title}: {} and {more} more", names.join(", "))),
        }
    };
    let failed = answers.iter().filter(|answer| !succeeded(answer));
    let failed = failed.map(|(name, status, _)| format!("{name} with {status}")).collect();
    let good = answers.iter().filter(|answer| succeeded(answer)).map(|(name, _, _)| name.clone()).collect();
    let parts: Vec<String> =
        [part("failed", failed), part("succeeded", good)].into_iter().flatten().collect();
    format!(" ({})", parts.join("; "))
}

/// The error `body` with `report` behind its message, in the shape that it has: any of vLLM's, or else its
/// OpenAI shape.
fn extended(body: &[u8], status: u16, report: &str) -> Vec<u8> {
    let mut error: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let message = match error.as_object_mut().and_then(|object| match object.get("error") {
        Some(Value::Object(_)) => object.get_mut("error")?.get_mut("message"),
        Some(_) => object.get_mut("error"),
        None if object.contains_key("message") => object.get_mut("message"),
        None => object.get_mut("detail"),
    }) {
        Some(Value::String(message)) => message,
        _ => {
            let text = String::from_utf8_lossy(body);
            let text = if text.trim().is_empty() { errors::status_phrase(status) } else { text.trim() };
            return errors::openai(&format!("{text}{report}"), errors::status_phrase(status), None, status);
        }
    };
    message.push_str(report);
    error.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_have_the_path_has_no_part_in_the_answer() {
        let answer = |name: &str, status, body: &str| (name.to_owned(), status, body.as_bytes().to_vec());
        let (chat, embed) = (answer("a", 200, "Success: x"), answer("b", 404, r#"{"detail":"Not Found"}"#));
        let both = aggregate(Aggregate::Text, &[chat, embed.clone()]);
        assert_eq!(both, (200, b"Success: x".to_vec(), None));
        assert_eq!(aggregate(Aggregate::Text, &[embed]).0, 404, "nobody has it");
    }
    use crate::vllm::{Treatment, golden, lookup};

    fn answers(of: &[(u16, &str)]) -> Vec<Answer> {
        let name = |at: usize| format!("http://{}", char::from(b'a' + u8::try_from(at).unwrap()));
        of.iter()
            .enumerate()
            .map(|(at, (status, body))| (name(at), *status, body.as_bytes().to_vec()))
            .collect()
    }

    /// Asks all workers at an endpoint as the table says.
    fn asked(method: &str, path: &str, of: &[(u16, &str)]) -> (u16, String, Option<&'static str>) {
        let Treatment::Broadcast(rule) = lookup(method, path).treatment else {
            panic!("{path} is no broadcast");
        };
        let (status, body, kind) = aggregate(rule, &answers(of));
        (status, String::from_utf8(body).unwrap(), kind)
    }

    fn body(method: &str, path: &str, of: &[&str]) -> String {
        let of: Vec<(u16, &str)> = of.iter().map(|body| (200, *body)).collect();
        asked(method, path, &of).1
    }

    #[test]
    fn flags_sums_and_lists_are_those_of_one_server() {
        let (yes, no) = (r#"{"success":true}"#, r#"{"success":false}"#);
        assert_eq!(body("POST", "/reset_prefix_cache", &[yes, yes]), yes);
        assert_eq!(body("POST", "/reset_prefix_cache", &[yes, no]), no);
        let (up, down) = (r#"{"is_sleeping":false}"#, r#"{"is_sleeping":true}"#);
        assert_eq!(body("GET", "/is_sleeping", &[up, up]), up);
        assert_eq!(body("GET", "/is_sleeping", &[up, down]), down);
        assert_eq!(
            body("GET", "/is_paused", &[r#"{"is_paused":false}"#, r#"{"is_paused":true}"#]),
            r#"{"is_paused":true}"#
        );
        assert_eq!(
            body("GET", "/load", &[r#"{"server_load":1}"#, r#"{"server_load":2}"#]),
            r#"{"server_load":3}"#
        );
        assert_eq!(body("GET", "/get_world_size", &[r#"{"world_size":4}"#; 3]), r#"{"world_size":12}"#);
        assert_eq!(
            body(
                "POST",
                "/abort_requests",
                &[r#"{"status":"aborted","aborted":1}"#, r#"{"status":"aborted","aborted":2}"#]
            ),
            r#"{"status":"aborted","aborted":3}"#
        );
        assert_eq!(
            body("POST", "/collective_rpc", &[r#"{"results":[[1]]}"#, r#"{"results":["2",null]}"#]),
            r#"{"results":[[1],"2",null]}"#
        );
        assert_eq!(
            body(
                "POST",
                "/weight_checker",
                &[
                    r#"{"match":true,"mismatches":[]}"#,
                    r#"{"match":false,"mismatches":["w"]}"#,
                    r#"{"match":false,"mismatches":["w","x"]}"#
                ]
            ),
            r#"{"match":false,"mismatches":["w","x"]}"#
        );
        assert_eq!(
            body(
                "POST",
                "/wake_up",
                &[r#"{"status":"awake","tags":["kv"]}"#, r#"{"status":"sleeping","tags":["kv"]}"#]
            ),
            r#"{"status":"sleeping","tags":["kv"]}"#
        );
        assert_eq!(
            body(
                "GET",
                "/fault_tolerance/status",
                &[r#"{"schema_version":1,"total_engines":1,"engines":[{"id":0}]}"#; 2]
            ),
            r#"{"schema_version":1,"total_engines":2,"engines":[{"id":0},{"id":0}]}"#
        );
    }

    #[test]
    fn ranks_are_numbered_through_all_workers() {
        assert_eq!(
            body("GET", "/kv_event_sources", &[r#"{"0":{"a":1},"1":{"a":2}}"#, "{}", r#"{"0":{"a":3}}"#]),
            r#"{"0":{"a":1},"1":{"a":2},"2":{"a":3}}"#
        );
        assert_eq!(body("GET", "/kv_event_sources", &["{}", "{}"]), "{}");
    }

    /// Two workers that answer as the recorded server did are answered for as one of it, wherever nothing is
    /// counted.
    #[test]
    fn equal_golden_answers_stay_as_they_are() {
        let (mut same, mut kinds) = (0, std::collections::HashSet::new());
        for case in golden::all() {
            let Some((method, path)) = case.line() else { continue };
            let Treatment::Broadcast(rule) = lookup(&method, &path).treatment else { continue };
            let both: Vec<Answer> =
                ["a", "b"].map(|name| (name.to_owned(), case.status(), case.answer_body().to_vec())).to_vec();
            let (status, body, kind) = aggregate(rule, &both);
            assert_eq!(status, case.status(), "{}", case.name);
            let one = aggregate(rule, &both[..1]);
            assert_eq!(one.1, case.answer_body(), "{}", case.name);
            assert_eq!(one.2, case.answer_header("content-type").as_deref(), "{}", case.name);
            kinds.insert(kind);
            let counts = ["/load", "/get_world_size", "/collective_rpc", "/kv_event_sources"];
            if !counts.contains(&path.as_str()) {
                assert_eq!(body, case.answer_body(), "{}", case.name);
                same += 1;
            }
        }
        assert!(same > 30 && kinds.len() == 2, "{same} {kinds:?}");
    }

    #[test]
    fn adapters_are_told_in_text_without_a_type() {
        let text = "Success: LoRA adapter 'x' added successfully.";
        let told = asked("POST", "/v1/load_lora_adapter", &[(200, text), (200, text)]);
        assert_eq!(told, (200, text.to_owned(), None));
    }

    #[test]
    fn one_failure_is_a_failure_that_names_who_did_what() {
        let failed =
            r#"{"error":{"message":"No adapter found.","type":"NotFoundError","param":null,"code":404}}"#;
        let (status, body, kind) =
            asked("POST", "/v1/load_lora_adapter", &[(200, "Success"), (404, failed), (200, "Success")]);
        assert_eq!((status, kind), (404, Some(JSON)));
        assert_eq!(
            body,
            r#"{"error":{"message":"No adapter found. (failed: http://b with 404; succeeded: http://a, http://c)","type":"NotFoundError","param":null,"code":404}}"#
        );
    }

    #[test]
    fn the_worst_of_several_failures_is_told() {
        let of = [(404, r#"{"detail":"Gone"}"#), (500, r#"{"error":"Failed: x"}"#), (502, "")];
        assert_eq!(
            asked("POST", "/pause", &of),
            (
                502,
                r#"{"error":{"message":"Bad Gateway (failed: http://a with 404, http://b with 500, http://c with 502)","type":"Bad Gateway","param":null,"code":502}}"#.to_owned(),
                Some(JSON)
            )
        );
        assert_eq!(
            asked("POST", "/pause", &of[..2]).1,
            r#"{"error":"Failed: x (failed: http://a with 404, http://b with 500)"}"#
        );
        let some = [(200, "{}"), (404, r#"{"detail":"Gone"}"#)];
        assert_eq!(
            asked("POST", "/pause", &some).1,
            r#"{"detail":"Gone (failed: http://b with 404; succeeded: http://a)"}"#
        );
        let plain = [(200, "{}"), (500, "Internal Server Error")];
        assert_eq!(
            asked("POST", "/pause", &plain).1,
            r#"{"error":{"message":"Internal Server Error (failed: http://b with 500; succeeded: http://a)","type":"Internal Server Error","param":null,"code":500}}"#
        );
    }

    #[test]
    fn a_route_that_no_worker_has_is_a_plain_404() {
        let none = r#"{"detail":"Not Found"}"#;
        assert_eq!(asked("POST", "/sleep", &[(404, none), (404, none)]), (404, none.to_owned(), Some(JSON)));
        assert_eq!(asked("POST", "/sleep", &[(500, "x"), (500, "x")]), (500, "x".to_owned(), Some(PLAIN)));
    }

    #[test]
    fn the_first_success_is_enough_where_nothing_changes() {
        let info = r#"{"weight_version":"default"}"#;
        assert_eq!(
            asked("GET", "/weight_info", &[(502, ""), (200, info)]),
            (200, info.to_owned(), Some(JSON))
        );
        assert_eq!(asked("GET", "/weight_info", &[(502, ""), (404, "")]).0, 502);
    }

    #[test]
    fn odd_answers_do_no_harm() {
        let huge = format!(r#"{{"server_load":{}}}"#, "9".repeat(400));
        let nested = "[".repeat(100_000);
        for odd in
            ["", "null", "[]", "7", "{", r#"{"server_load":"x"}"#, r#"{"server_load":1.5}"#, &huge, &nested]
        {
            for other in [odd, r#"{"server_load":1}"#, ""] {
                assert_eq!(asked("GET", "/load", &[(200, odd), (200, other)]).0, 200);
            }
        }
        assert_eq!(body("GET", "/load", &["", r#"{"server_load":2}"#]), r#"{"server_load":2}"#);
        assert_eq!(
            body("GET", "/load", &[r#"{"server_load":9223372036854775807}"#; 2]),
            r#"{"server_load":9223372036854775807}"#
        );
        assert_eq!(asked("GET", "/load", &[]).0, 503);
    }

    #[test]
    fn a_long_list_of_workers_is_cut() {
        let of = vec![(500, "x"); 20].into_iter().chain([(200, "{}")]).collect::<Vec<_>>();
        let (_, body, _) = asked("POST", "/pause", &of);
        assert!(body.contains("http://p with 500 and 4 more; succeeded: http://u)"), "{body}");
    }
}
