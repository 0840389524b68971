//! The bodies of the answers that the proxy makes itself, byte for byte as vLLM's Python front end writes them.
//!
//! Starlette's `JSONResponse` is compact, keeps the order of keys and does not escape what is not ASCII.

use crate::vllm::{Endpoint, ErrorShape, facts::json_string};

/// Body, with `text/plain; charset=utf-8`, of the 400 for bytes that are no HTTP (uvicorn).
pub const INVALID_REQUEST_TEXT: &str = "Invalid HTTP request received.";

/// `{"error":{"message":…,"type":…,"param":…,"code":…}}`: `ErrorResponse` of vLLM's
/// `entrypoints/serve/engine/protocol.py`.
pub fn openai(message: &str, kind: &str, param: Option<&str>, code: u16) -> Vec<u8> {
    let mut out = b"{\"error\":{\"message\":".to_vec();
    json_string(&mut out, message);
    out.extend_from_slice(b",\"type\":");
    json_string(&mut out, kind);
    out.extend_from_slice(b",\"param\":");
    match param {
        Some(param) => json_string(&mut out, param),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(format!(",\"code\":{code}}}}}").as_bytes());
    out
}

/// `{"type":"error","error":{"type":…,"message":…}}`: `AnthropicErrorResponse`.
pub fn anthropic(message: &str, kind: &str) -> Vec<u8> {
    let mut out = b"{\"type\":\"error\",\"error\":{\"type\":".to_vec();
    json_string(&mut out, kind);
    out.extend_from_slice(b",\"message\":");
    json_string(&mut out, message);
    out.extend_from_slice(b"}}");
    out
}

/// An error of our own in the words of an endpoint. `kind` is what vLLM calls its type.
pub fn shaped(shape: ErrorShape, message: &str, kind: &str, param: Option<&str>, code: u16) -> Vec<u8> {
    match shape {
        ErrorShape::OpenAi | ErrorShape::Pooling => openai(message, kind, param, code),
        ErrorShape::Anthropic => anthropic(message, kind),
        ErrorShape::Cohere => {
            let mut out = b"{\"message\":".to_vec();
            json_string(&mut out, message);
            out.push(b'}');
            out
        }
    }
}

/// Body of the 404 for a model that nobody serves. `valid` are the served names, without adapters (`_check_model`
/// of `entrypoints/serve/engine/serving.py`; pooling endpoints come to `_maybe_get_adapters` there).
pub fn unknown_model<'a>(shape: ErrorShape, name: &str, valid: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let mut message = format!("The model `{name}` does not exist.");
    let mut param = None;
    if shape != ErrorShape::Pooling {
        let valid: Vec<&str> = valid.collect();
        message.push_str(&format!(" Valid aliases: {}.", valid.join(", ")));
        param = Some("model");
    }
    shaped(shape, &sanitized(&message), "NotFoundError", param, 404)
}

/// `{"detail":…}`: what FastAPI itself answers, such as `Not Found` and `Method Not Allowed`.
pub fn detail(text: &str) -> Vec<u8> {
    let mut out = b"{\"detail\":".to_vec();
    json_string(&mut out, text);
    out.push(b'}');
    out
}

/// The events with which a stream ends that has failed, as vLLM ends its own: an error and `[DONE]`, written by
/// Python's `json.dumps` with blanks after its colons and commas (`create_streaming_error_response` of
/// `entrypoints/generate/base/serving.py`). Anthropic's messages and OpenAI's responses have an event named `error`
/// and no `[DONE]`; the latter is numbered 0, since where a stream broke off its numbers are not known.
pub fn stream(endpoint: &Endpoint, message: &str, code: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    if endpoint.error_shape == ErrorShape::Anthropic {
        out.extend_from_slice(b"event: error\ndata: ");
        out.extend_from_slice(&anthropic(message, "internal_error"));
        out.extend_from_slice(b"\n\n");
    } else if endpoint.path.starts_with("/v1/responses") {
        out.extend_from_slice(format!("event: error\ndata: {{\"code\":\"{code}\",\"message\":").as_bytes());
        json_string(&mut out, message);
        out.extend_from_slice(b",\"param\":null,\"sequence_number\":0,\"type\":\"error\"}\n\n");
    } else {
        out.extend_from_slice(b"data: {\"error\": {\"message\": ");
        json_string(&mut out, message);
        let rest = format!(", \"type\": \"InternalServerError\", \"param\": null, \"code\": {code}}}}}\n\n");
        out.extend_from_slice(rest.as_bytes());
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
    out
}

/// What Python 3.12's `http.HTTPStatus` calls a status: uvicorn writes it into the status line, and vLLM takes it
/// for the type of plain HTTP errors. Empty for a status that Python does not know.
pub fn status_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Request Entity Too Large",
        414 => "Request-URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Requested Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Entity",
        424 => "Failed Dependency",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        511 => "Network Authentication Required",
        _ => "",
    }
}

/// What vLLM does to every message (`sanitize_message` of `entrypoints/serve/exception_handling/utils.py`): memory
/// addresses go, and paths become `<path>`. It also hits models that are served under their path, so it has to be
/// done here too. The rule for Python tracebacks is left out: they cannot stand in a message of ours unless a
/// client writes one as a model's name.
fn sanitized(message: &str) -> String {
    let message = replaced(message, "", address);
    let message = replaced(&message, "<path>", system_path);
    let message = replaced(&message, "<path>", file_path);
    message.trim().to_owned()
}

/// Replaces what `length` matches, from left to right; zero is no match.
fn replaced(text: &str, by: &str, length: fn(&str) -> usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(char) = rest.chars().next() {
        let matched = length(rest);
        if matched > 0 {
            out.push_str(by);
        } else {
            out.push(char);
        }
        rest = rest.get(if matched > 0 { matched } else { char.len_utf8() }..).unwrap_or_default();
    }
    out
}

/// ` at 0x[0-9a-fA-F]+>`, up to and without the last sign, which stays.
fn address(text: &str) -> usize {
    let Some(digits) = text.strip_prefix(" at 0x") else { return 0 };
    let count = digits.bytes().take_while(u8::is_ascii_hexdigit).count();
    let ends = digits.as_bytes().get(count) == Some(&b'>');
    if count > 0 && ends { " at 0x".len() + count } else { 0 }
}

/// `/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+`
fn system_path(text: &str) -> usize {
    let roots = ["home", "usr", "opt", "var", "tmp", "root", "lib", "mnt", "srv"];
    let Some(first) = text.strip_prefix('/') else { return 0 };
    let Some(root) =
        roots.iter().find(|root| first.strip_prefix(**root).is_some_and(|rest| rest.starts_with('/')))
    else {
        return 0;
    };
    let begin = 1 + root.len();
    let mut end = begin;
    while let Some(segment) = text.get(end..).and_then(|rest| rest.strip_prefix('/')) {
        match prefix(segment, |char| word(char) || matches!(char, '.' | '-')) {
            0 => break,
            length => end += 1 + length,
        }
    }
    if end > begin { end } else { 0 }
}

/// `(?:/[\w\-]+)+/[\w\-]+\.\w+`
fn file_path(text: &str) -> usize {
    let (mut end, mut segments, mut matched) = (0, 0, 0);
    while let Some(segment) = text.get(end..).and_then(|rest| rest.strip_prefix('/')) {
        let length = prefix(segment, |char| word(char) || char == '-');
        if length == 0 {
            break;
        }
        end += 1 + length;
        segments += 1;
        let suffix = text.get(end..).and_then(|rest| rest.strip_prefix('.'));
        let suffix = suffix.map_or(0, |suffix| prefix(suffix, word));
        if segments > 1 && suffix > 0 {
            matched = end + 1 + suffix;
        }
    }
    matched
}

fn word(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

fn prefix(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|char| !belongs(char)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vllm::{golden, lookup};

    #[test]
    fn unknown_models_are_told_as_the_golden_server_does() {
        let mut compared = 0;
        for case in golden::all() {
            let Some((method, path)) = case.line() else { continue };
            let known = memchr::memmem::find(case.answer_body(), b"The model `").is_some();
            if case.status() != 404 || !known {
                continue;
            }
            let name = if case.name.contains("lora_chat") { "lo9" } else { "nope" };
            let valid: &[&str] =
                if case.name.contains("extras") { &["tiny-chat", "tiny-alias"] } else { &["tiny-chat"] };
            let body = unknown_model(lookup(&method, &path).error_shape, name, valid.iter().copied());
            assert_eq!(
                body.escape_ascii().to_string(),
                case.answer_body().escape_ascii().to_string(),
                "{}",
                case.name
            );
            compared += 1;
        }
        assert!(compared >= 14, "{compared}");
    }

    #[test]
    fn other_golden_answers_are_made_alike() {
        let body = |name: &str| golden::case(name).answer_body().to_vec();
        assert_eq!(body("py-0.32-default/not_found"), detail("Not Found"));
        assert_eq!(body("py-0.32-default/chat_get_405"), detail("Method Not Allowed"));
        assert_eq!(body("py-0.32-default/te_and_cl"), INVALID_REQUEST_TEXT.as_bytes());
        let busy = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.";
        assert_eq!(body("py-0.32-overload/overload"), openai(busy, status_phrase(503), None, 503));
        assert_eq!(
            body("py-0.32-default/responses_get_unknown"),
            openai(
                "Response with id 'resp_0000' not found.",
                "invalid_request_error",
                Some("response_id"),
                404
            )
        );
    }

    #[test]
    fn phrases_are_those_of_the_golden_status_lines() {
        let mut seen = std::collections::HashSet::new();
        for case in golden::all().iter().filter(|case| case.status() > 0) {
            assert_eq!(status_phrase(case.status()), case.reason(), "{}", case.name);
            seen.insert(case.status());
        }
        assert!(seen.len() >= 9, "{seen:?}");
    }

    #[test]
    fn each_shape_has_its_own_words() {
        let body = |shape| String::from_utf8(unknown_model(shape, "é\"", ["a", "b"].into_iter())).unwrap();
        assert_eq!(
            body(ErrorShape::OpenAi),
            r#"{"error":{"message":"The model `é\"` does not exist. Valid aliases: a, b.","type":"NotFoundError","param":"model","code":404}}"#
        );
        assert_eq!(
            body(ErrorShape::Pooling),
            r#"{"error":{"message":"The model `é\"` does not exist.","type":"NotFoundError","param":null,"code":404}}"#
        );
        assert_eq!(
            body(ErrorShape::Anthropic),
            r#"{"type":"error","error":{"type":"NotFoundError","message":"The model `é\"` does not exist. Valid aliases: a, b."}}"#
        );
        assert_eq!(
            body(ErrorShape::Cohere),
            r#"{"message":"The model `é\"` does not exist. Valid aliases: a, b."}"#
        );
    }

    #[test]
    fn a_broken_stream_ends_as_the_golden_one_does() {
        let golden = golden::case("py-0.32-overload/stream_kill");
        let message = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
        let events = stream(lookup("POST", "/v1/chat/completions"), message, 500);
        let mut body = golden.answer_body().to_vec();
        let decoded = crate::http::ChunkTracker::new().decode(&mut body).unwrap();
        let end = &body[decoded.data - events.len()..decoded.data];
        assert_eq!(end.escape_ascii().to_string(), events.escape_ascii().to_string());
    }

    #[test]
    fn a_broken_stream_ends_in_the_words_of_its_api() {
        let text = |path| String::from_utf8(stream(lookup("POST", path), "a \"b\"", 502)).unwrap();
        let done = "data: {\"error\": {\"message\": \"a \\\"b\\\"\", \"type\": \"InternalServerError\", \"param\": null, \"code\": 502}}\n\ndata: [DONE]\n\n";
        assert_eq!(text("/v1/completions"), done);
        assert_eq!(text("/nobody/knows"), done);
        assert_eq!(
            text("/v1/messages"),
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"internal_error\",\"message\":\"a \\\"b\\\"\"}}\n\n"
        );
        let responses = text("/v1/responses");
        let data = responses.strip_prefix("event: error\ndata: ").unwrap().strip_suffix("\n\n").unwrap();
        let json: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"code": "502", "message": "a \"b\"", "param": null, "sequence_number": 0, "type": "error"})
        );
    }

    /// The right side was made by vLLM's own function.
    #[test]
    fn paths_and_addresses_are_hidden_as_vllm_does() {
        for (message, wanted) in SANITIZED {
            assert_eq!(sanitized(message), *wanted, "{message}");
        }
    }

    const SANITIZED: &[(&str, &str)] = &[
        ("`/mnt/models/llama-3.1` a", "`<path>` a"),
        ("`/srv/x` `/srv`, `/srv/`", "`<path>` `/srv`, `/srv/`"),
        ("/models/llama/v1.5-x", "<path>-x"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("a/b/c.d/e.f", "a<path>/e.f"),
        ("org/x/y.z.w", "org<path>.w"),
        ("/a/b.c/d/e.f", "<path><path>"),
        ("/data/models/Qwen2.5-7B", "<path>-7B"),
        ("<x at 0xFfg> <x at 0x1f> at 0x>", "<x at 0xFfg> <x> at 0x>"),
        ("/home//x /usr/./..", "/home//x <path>"),
        ("/varx/y /tmp/é_ü/日本.x", "/varx/y <path>"),
        (" /a-b/c_d.é! ", "<path>!"),
        ("x/usr/lib/y/", "x<path>/"),
        ("/a/b/c/", "/a/b/c/"),
        ("//opt//var/x", "//opt/<path>"),
        ("/a/b./c", "/a/b./c"),
        ("/a/b.c.d/e", "<path>.d/e"),
        ("/liba/lib/b", "/liba<path>"),
    ];
}
