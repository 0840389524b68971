use super::*;

fn request(text: &str) -> Result<RequestHead, RequestError> {
    let mut head = RequestHead::default();
    let end = head.parse(text.as_bytes())?.expect("the head is complete");
    assert_eq!(text.get(end - 4..end), Some("\r\n\r\n"), "a head ends in an empty line");
    Ok(head)
}

fn response(text: &str, to_head: bool) -> Result<ResponseHead, ResponseError> {
    let mut head = ResponseHead::default();
    head.parse(text.as_bytes(), to_head)?.expect("the head is complete");
    Ok(head)
}

fn upstream(head: &RequestHead, framing: OutFraming, extra: &[(&str, &str)]) -> String {
    let mut out = Vec::new();
    head.write_upstream(&mut out, &UpstreamHead { prefix: "", framing, extra });
    String::from_utf8(out).unwrap()
}

fn downstream(head: &ResponseHead, framing: OutFraming, version: Version, keep_alive: bool) -> String {
    let mut out = Vec::new();
    head.write_downstream(&mut out, &DownstreamHead { version, framing, keep_alive, extra: &[] });
    String::from_utf8(out).unwrap()
}

/// The verdict on a request with these field lines after a Host.
fn with_fields(lines: &str) -> Result<RequestHead, RequestError> {
    request(&format!("POST /v1 HTTP/1.1\r\nHost: x\r\n{lines}\r\n"))
}

#[test]
fn a_request_is_read_and_written_in_its_order_and_case() {
    let text = "POST /v1/chat?x=1&y HTTP/1.1\r\nhOsT: a:80\r\nX-B:  1 \t\r\nx-b: 2\r\nX-Empty:\r\n\
                Content-Type: application/json\r\nconTENT-length: 005\r\n\r\n";
    let head = request(text).unwrap();
    assert_eq!((head.method(), head.target()), ("POST", "/v1/chat?x=1&y"));
    assert_eq!((head.path(), head.query()), ("/v1/chat", Some("x=1&y")));
    assert_eq!(head.framing(), RequestFraming::Length(5));
    assert_eq!(head.field("X-b"), Some(b"1".as_slice()));
    assert_eq!(head.field("x-empty"), Some(b"".as_slice()));
    assert_eq!(head.field("absent"), None);
    assert_eq!(head.content_type(), Some(b"application/json".as_slice()));
    assert!(head.keep_alive() && !head.is_head() && !head.expects_continue());
    assert_eq!(
        upstream(&head, OutFraming::AsReceived, &[("x-forwarded-for", "::1")]),
        "POST /v1/chat?x=1&y HTTP/1.1\r\nhOsT: a:80\r\nX-B: 1\r\nx-b: 2\r\nX-Empty: \r\n\
         Content-Type: application/json\r\nconTENT-length: 005\r\nx-forwarded-for: ::1\r\n\r\n"
    );
}

#[test]
fn a_field_of_ours_replaces_the_clients_of_that_name() {
    let head = with_fields("X-Data-Parallel-Rank: 7\r\nA: 1\r\nx-data-parallel-rank: 8\r\n").unwrap();
    let passed = upstream(&head, OutFraming::AsReceived, &[]);
    assert!(
        passed.contains("\r\nX-Data-Parallel-Rank: 7\r\nA: 1\r\nx-data-parallel-rank: 8\r\n"),
        "{passed}"
    );
    assert_eq!(
        upstream(&head, OutFraming::AsReceived, &[("X-data-parallel-rank", "0")]),
        "POST /v1 HTTP/1.1\r\nHost: x\r\nA: 1\r\nX-data-parallel-rank: 0\r\n\r\n"
    );
}

#[test]
fn a_reused_head_remembers_nothing() {
    let mut head = RequestHead::default();
    let first = b"PUT http://h/a?b HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 9\r\nX: 1\r\n\r\n";
    assert_eq!(head.parse(first), Ok(Some(first.len())));
    assert_eq!(head.parse(b"\x16\x03\x01"), Err(RequestError::Malformed));
    let second = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET ";
    assert_eq!(head.parse(second), Ok(Some(second.len() - 4)));
    assert_eq!((head.target(), head.query(), head.version()), ("/", None, Version::Http11));
    assert_eq!((head.framing(), head.field("x")), (RequestFraming::Length(0), None));
    assert_eq!(upstream(&head, OutFraming::AsReceived, &[]), "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
}

#[test]
fn framing_is_written_as_asked_and_in_its_place() {
    let sized = with_fields("CONTENT-Length: 5\r\nA: b\r\nTrailer: t\r\n").unwrap();
    let chunked = with_fields("TRANSFER-Encoding: ChunkeD\r\nA: b\r\nTrailer: t\r\n").unwrap();
    let bare = with_fields("A: b\r\n").unwrap();
    let fields = |head: &RequestHead, framing| {
        let text = upstream(head, framing, &[]);
        text.strip_prefix("POST /v1 HTTP/1.1\r\nHost: x\r\n").unwrap().to_owned()
    };
    assert_eq!(fields(&sized, OutFraming::AsReceived), "CONTENT-Length: 5\r\nA: b\r\n\r\n");
    assert_eq!(
        fields(&sized, OutFraming::Length(u64::MAX)),
        "CONTENT-Length: 18446744073709551615\r\nA: b\r\n\r\n"
    );
    assert_eq!(
        fields(&sized, OutFraming::Chunked),
        "A: b\r\nTrailer: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    assert_eq!(
        fields(&chunked, OutFraming::AsReceived),
        "TRANSFER-Encoding: chunked\r\nA: b\r\nTrailer: t\r\n\r\n"
    );
    assert_eq!(fields(&chunked, OutFraming::Length(0)), "A: b\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(fields(&bare, OutFraming::AsReceived), "A: b\r\n\r\n");
    assert_eq!(fields(&bare, OutFraming::Length(10)), "A: b\r\nContent-Length: 10\r\n\r\n");
}

#[test]
fn framing_that_two_parsers_could_read_in_two_ways_is_refused() {
    for lines in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: \r\n",
        "Content-Length: -0\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: 5_0\r\n",
        "Content-Length: 5 0\r\n",
        "Content-Length: 9223372036854775809\r\n",
        "Content-Length: 99999999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked,\r\n",
        "Transfer-Encoding: ,chunked\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: \"chunked\"\r\n",
        "Transfer-Encoding: chunked;q=1\r\n",
        "Transfer-Encoding: \r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
    ] {
        assert_eq!(with_fields(lines).map(|_| ()), Err(RequestError::Malformed), "{lines:?}");
    }
    let old = "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(request(old).map(|_| ()), Err(RequestError::Malformed));
    let largest = with_fields("Content-Length: 9223372036854775808\r\n").unwrap();
    assert_eq!(largest.framing(), RequestFraming::Length(1 << 63));
}

#[test]
fn a_damaged_framing_field_is_never_cleaned() {
    let damage: Vec<u8> = (0..=255).filter(|byte| !matches!(byte, b'\t' | b'\n' | b' ')).collect();
    let mut head = RequestHead::default();
    for field in ["Transfer-Encoding: chunked", "Content-Length: 5"] {
        let colon = field.find(':').unwrap();
        for at in [0, 3, colon, colon + 1, colon + 2, field.len() - 1, field.len()] {
            for &byte in &damage {
                // A byte that belongs into or ends a name makes another, harmless name of it.
                let renames =
                    at <= colon && bytes::is_token_byte(byte) || (1..colon).contains(&at) && byte == b':';
                // A digit makes another, legal length of it.
                let legal = at > colon && field.starts_with('C') && byte.is_ascii_digit();
                if renames || legal {
                    continue;
                }
                let mut bytes = b"POST / HTTP/1.1\r\nHost: x\r\n".to_vec();
                bytes.extend_from_slice(&field.as_bytes()[..at]);
                bytes.push(byte);
                bytes.extend_from_slice(&field.as_bytes()[at..]);
                bytes.extend_from_slice(b"\r\n\r\n");
                assert_eq!(head.parse(&bytes), Err(RequestError::Malformed), "{byte:#x} at {at} of {field}");
            }
        }
    }
}

#[test]
fn a_field_line_has_one_legal_form() {
    for lines in [
        "A : b\r\n",
        "A\t: b\r\n",
        ": b\r\n",
        "A\r\n",
        " A: b\r\n",
        "A: b\r\n c\r\n",
        "A: b\r\n\tc\r\n",
        "A: b\nC: d\r\n",
        "A: b\rC: d\r\n",
        "A: b\r\r\n",
        "A: b\0c\r\n",
        "A: b\x07c\r\n",
        "A: \x7f\r\n",
        "A(: b\r\n",
        "A\u{e9}: b\r\n",
        "A: b\r\n\rZ",
        "A: b\n\r\n",
    ] {
        assert_eq!(with_fields(lines).map(|_| ()), Err(RequestError::Malformed), "{lines:?}");
    }
    let head = with_fields("A!#$%&'*+-.^_`|~9: \tb\u{e9}\tc \r\n").unwrap();
    assert_eq!(head.field("a!#$%&'*+-.^_`|~9"), Some("b\u{e9}\tc".as_bytes()));
}

#[test]
fn a_request_line_has_one_legal_form() {
    for (line, error) in [
        ("GET  / HTTP/1.1", RequestError::Malformed),
        ("GET /  HTTP/1.1", RequestError::Malformed),
        ("GET / HTTP/1.1 ", RequestError::Malformed),
        ("GET\t/ HTTP/1.1", RequestError::Malformed),
        (" / HTTP/1.1", RequestError::Malformed),
        ("G@T / HTTP/1.1", RequestError::Malformed),
        ("GET /a b HTTP/1.1", RequestError::Malformed),
        ("GET /\u{e9} HTTP/1.1", RequestError::Malformed),
        ("GET /", RequestError::Malformed),
        ("GET / http/1.1", RequestError::Malformed),
        ("GET / HTTP/1.10", RequestError::Malformed),
        ("GET / HTTP/x.y", RequestError::Malformed),
        ("GET * HTTP/1.1", RequestError::Malformed),
        ("GET v1 HTTP/1.1", RequestError::Malformed),
        ("GET http://u@h/ HTTP/1.1", RequestError::Malformed),
        ("GET / HTTP/1.2", RequestError::Version),
        ("GET / HTTP/0.9", RequestError::Version),
        ("PRI * HTTP/2.0", RequestError::Version),
        ("CONNECT h:443 HTTP/1.1", RequestError::Method),
        ("TRACE / HTTP/1.1", RequestError::Method),
    ] {
        assert_eq!(request(&format!("{line}\r\nHost: x\r\n\r\n")).map(|_| ()), Err(error), "{line:?}");
    }
}

#[test]
fn a_request_is_for_exactly_one_host() {
    for lines in
        ["", "Host: a\r\nHost: a\r\n", "Host: u@a\r\n", "Host: a b\r\n", "Host: a:b\r\n", "Host: a/b\r\n"]
    {
        let text = format!("GET / HTTP/1.1\r\n{lines}\r\n");
        assert_eq!(request(&text).map(|_| ()), Err(RequestError::Malformed), "{lines:?}");
    }
    let old = request("GET / HTTP/1.0\r\nA: b\r\n\r\n").unwrap();
    assert_eq!(upstream(&old, OutFraming::AsReceived, &[]), "GET / HTTP/1.1\r\nA: b\r\nHost: \r\n\r\n");
    assert_eq!(
        upstream(&old, OutFraming::AsReceived, &[("host", "w:1")]),
        "GET / HTTP/1.1\r\nA: b\r\nhost: w:1\r\n\r\n"
    );
}

#[test]
fn an_absolute_target_becomes_an_origin_target_and_the_host() {
    for (target, expected) in [
        ("http://b:8/p?q", "GET /p?q HTTP/1.1\r\nHost: b:8\r\n\r\n"),
        ("HTTPS://b", "GET / HTTP/1.1\r\nHost: b\r\n\r\n"),
        ("http://b?q=/", "GET /?q=/ HTTP/1.1\r\nHost: b\r\n\r\n"),
    ] {
        let head = request(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
        assert_eq!(upstream(&head, OutFraming::AsReceived, &[]), expected);
        assert!(head.field("HOST").unwrap().starts_with(b"b"));
    }
    let server = request("OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut out = Vec::new();
    let framing = OutFraming::AsReceived;
    server.write_upstream(&mut out, &UpstreamHead { prefix: "/team", framing, extra: &[] });
    assert_eq!(out, b"OPTIONS * HTTP/1.1\r\nHost: b\r\n\r\n");
    out.clear();
    with_fields("").unwrap().write_upstream(&mut out, &UpstreamHead { prefix: "/team", framing, extra: &[] });
    assert_eq!(out, b"POST /team/v1 HTTP/1.1\r\nHost: x\r\n\r\n");
}

#[test]
fn hop_by_hop_fields_end_here() {
    let head = with_fields(
        "Keep-Alive: 5\r\nPROXY-Authorization: p\r\nproxy-foo: q\r\nTE: trailers\r\nExpect: 100-continue\r\n\
         HTTP2-Settings: s\r\nConnection: close, X-Hop\r\nx-HOP: 1\r\nX-Hop2: 2\r\nConnection: , x-other ,\r\n\
         X-Other: 3\r\nProxying: 4\r\n",
    )
    .unwrap();
    assert!(!head.keep_alive() && head.expects_continue());
    assert_eq!(head.field("x-hop"), None);
    assert_eq!(
        upstream(&head, OutFraming::AsReceived, &[]),
        "POST /v1 HTTP/1.1\r\nHost: x\r\nX-Hop2: 2\r\nProxying: 4\r\n\r\n"
    );
}

#[test]
fn connection_cannot_remove_what_frames_addresses_or_identifies() {
    let kept = "Content-Length: 5\r\nAuthorization: Bearer k\r\nX-Request-Id: r\r\nContent-Type: t\r\n";
    let head = with_fields(&format!(
        "Connection: content-length, host, transfer-encoding, AUTHORIZATION, x-request-id, content-type\r\n{kept}"
    ))
    .unwrap();
    assert_eq!(
        upstream(&head, OutFraming::AsReceived, &[]),
        format!("POST /v1 HTTP/1.1\r\nHost: x\r\n{kept}\r\n")
    );
}

#[test]
fn a_connection_field_cannot_name_more_fields_than_a_head_holds() {
    let names = |count: usize| format!("Connection: {}\r\n", vec!["x"; count].join(","));
    assert!(with_fields(&names(MAX_FIELDS)).is_ok());
    assert_eq!(with_fields(&names(MAX_FIELDS + 1)).map(|_| ()), Err(RequestError::Malformed));
}

#[test]
fn keep_alive_follows_version_and_connection() {
    for (version, connection, expected) in [
        ("1.1", "", true),
        ("1.1", "Connection: CLOSE\r\n", false),
        ("1.1", "Connection: keep-alive, close\r\n", false),
        ("1.0", "", false),
        ("1.0", "Connection: Keep-Alive\r\n", true),
    ] {
        let head = request(&format!("GET / HTTP/{version}\r\nHost: x\r\n{connection}\r\n")).unwrap();
        assert_eq!(head.keep_alive(), expected, "{version} {connection}");
    }
}

#[test]
fn an_upgrade_is_kept_only_where_it_can_be_tunnelled() {
    let head = with_fields("CONNECTION: keep-alive, upgrade\r\nUPGRADE: WebSocket\r\n").unwrap();
    assert_eq!(head.upgrade(), Some("WebSocket"));
    assert_eq!(
        upstream(&head, OutFraming::AsReceived, &[]),
        "POST /v1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUPGRADE: WebSocket\r\n\r\n"
    );
    for lines in [
        "Upgrade: websocket\r\n",
        "Connection: upgrade\r\n",
        "Connection: upgrade\r\nUpgrade: \r\n",
        "Connection: upgrade\r\nUpgrade: h2c\r\n",
        "Connection: upgrade\r\nUpgrade: websocket, H2C\r\n",
        "Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n",
        "Connection: upgrade\r\nUpgrade: TLS/1.0\r\n",
        "Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
    ] {
        let head = with_fields(lines).unwrap();
        assert_eq!(head.upgrade(), None, "{lines:?}");
        assert_eq!(upstream(&head, OutFraming::AsReceived, &[]), "POST /v1 HTTP/1.1\r\nHost: x\r\n\r\n");
    }
    let with_body =
        with_fields("Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n").unwrap();
    assert_eq!(with_body.upgrade(), None);
    let old = "GET / HTTP/1.0\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    assert_eq!(request(old).unwrap().upgrade(), None);
}

#[test]
fn two_empty_lines_before_a_request_are_forgiven_and_a_third_is_not() {
    let mut head = RequestHead::default();
    let text = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    for (before, expected) in [
        ("\r\n", Ok(Some(text.len() + 2))),
        ("\r\n\r\n", Ok(Some(text.len() + 4))),
        ("\r\n\r\n\r\n", Err(RequestError::Malformed)),
        ("\n", Err(RequestError::Malformed)),
        ("\r", Err(RequestError::Malformed)),
    ] {
        assert_eq!(head.parse(format!("{before}{text}").as_bytes()), expected, "{before:?}");
    }
}

#[test]
fn other_protocols_are_refused_by_their_first_bytes() {
    let mut head = RequestHead::default();
    for start in [b"\x16\x03\x01".as_slice(), b"\0", b"GET /\x80", b"\x05\x01"] {
        assert_eq!(head.parse(start), Err(RequestError::Malformed), "{start:?}");
    }
}

#[test]
fn every_bound_of_a_request_head_holds_to_the_byte() {
    let mut head = RequestHead::default();
    let fields = |count: usize| {
        let lines: String = (1..count).map(|at| format!("x{at}: 1\r\n")).collect();
        format!("GET / HTTP/1.1\r\nHost: x\r\n{lines}\r\n")
    };
    assert!(matches!(head.parse(fields(MAX_FIELDS).as_bytes()), Ok(Some(_))));
    assert_eq!(head.parse(fields(MAX_FIELDS + 1).as_bytes()), Err(RequestError::TooManyFields));

    let target = |bytes: usize| format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(bytes - 1));
    assert!(matches!(head.parse(target(MAX_TARGET_BYTES).as_bytes()), Ok(Some(_))));
    assert_eq!(head.parse(target(MAX_TARGET_BYTES + 1).as_bytes()), Err(RequestError::TargetTooLong));
    let endless = vec![b'a'; MAX_TARGET_BYTES + 100];
    assert_eq!(head.parse(&endless), Err(RequestError::TargetTooLong));

    let start = "GET / HTTP/1.1\r\nHost: x\r\nX: ";
    let sized = |bytes: usize| format!("{start}{}\r\n\r\n", "a".repeat(bytes - start.len() - 4));
    assert_eq!(head.parse(sized(MAX_HEAD_BYTES).as_bytes()), Ok(Some(MAX_HEAD_BYTES)));
    assert_eq!(head.parse(sized(MAX_HEAD_BYTES + 1).as_bytes()), Err(RequestError::HeadTooLarge));
    let unfinished = sized(MAX_HEAD_BYTES + 1);
    assert_eq!(head.parse(&unfinished.as_bytes()[..MAX_HEAD_BYTES - 1]), Ok(None));
    assert_eq!(head.parse(&unfinished.as_bytes()[..MAX_HEAD_BYTES]), Err(RequestError::HeadTooLarge));
}

#[test]
fn a_response_is_read_and_written_in_its_order_and_case() {
    let text = "HTTP/1.1 200 OK\r\ndate: d\r\nServer: uvicorn\r\ncontent-length: 3\r\nX-T: caf\u{e9}\r\n\
                Connection: close, x-hop\r\nX-Hop: 1\r\nkeep-alive: 5\r\nContent-Type: a/b\r\n\r\n";
    let head = response(text, false).unwrap();
    assert_eq!((head.status(), head.framing()), (200, ResponseFraming::Length(3)));
    assert!(!head.keep_alive() && !head.is_event_stream());
    let rest = "HTTP/1.1 200 OK\r\ndate: d\r\nServer: uvicorn\r\n";
    assert_eq!(
        downstream(&head, OutFraming::AsReceived, Version::Http11, true),
        format!("{rest}content-length: 3\r\nX-T: caf\u{e9}\r\nContent-Type: a/b\r\n\r\n")
    );
    assert_eq!(
        downstream(&head, OutFraming::Length(12), Version::Http10, true),
        format!(
            "{rest}content-length: 12\r\nX-T: caf\u{e9}\r\nContent-Type: a/b\r\nconnection: keep-alive\r\n\r\n"
        )
    );
    assert_eq!(
        downstream(&head, OutFraming::Chunked, Version::Http11, false),
        format!(
            "{rest}X-T: caf\u{e9}\r\nContent-Type: a/b\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )
    );
    assert_eq!(
        downstream(&head, OutFraming::UntilClose, Version::Http10, false),
        format!("{rest}X-T: caf\u{e9}\r\nContent-Type: a/b\r\nconnection: close\r\n\r\n")
    );
}

#[test]
fn the_framing_of_a_response_follows_status_request_and_fields() {
    let sized = "Content-Length: 5\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    for (status, to_head, lines, expected) in [
        (200, false, sized, ResponseFraming::Length(5)),
        (200, false, chunked, ResponseFraming::Chunked),
        (200, false, "", ResponseFraming::UntilClose),
        (200, true, sized, ResponseFraming::None),
        (200, true, "", ResponseFraming::None),
        (100, false, "", ResponseFraming::None),
        (103, false, "", ResponseFraming::None),
        (204, false, "", ResponseFraming::None),
        (204, false, sized, ResponseFraming::None),
        (304, false, chunked, ResponseFraming::None),
        (404, false, "", ResponseFraming::UntilClose),
    ] {
        let head = response(&format!("HTTP/1.1 {status} X\r\n{lines}\r\n"), to_head).unwrap();
        assert_eq!(head.framing(), expected, "{status} {to_head} {lines}");
        assert_eq!(head.keep_alive(), expected != ResponseFraming::UntilClose);
    }
}

#[test]
fn fields_about_a_body_that_is_not_there_pass_only_where_they_mean_something() {
    let sized = |status: u16, to_head| {
        let head = response(&format!("HTTP/1.1 {status} X\r\nContent-Length: 5\r\n\r\n"), to_head).unwrap();
        downstream(&head, OutFraming::AsReceived, Version::Http11, true)
    };
    assert_eq!(sized(200, true), "HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(sized(304, false), "HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(sized(204, false), "HTTP/1.1 204 X\r\n\r\n");
    let to_head = response("HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", true).unwrap();
    assert_eq!(
        downstream(&to_head, OutFraming::AsReceived, Version::Http10, false),
        "HTTP/1.1 200 X\r\nconnection: close\r\n\r\n"
    );
}

#[test]
fn an_http_1_0_answer_is_kept_open_only_if_it_says_so() {
    let old = |lines: &str| response(&format!("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n{lines}\r\n"), false);
    assert!(!old("").unwrap().keep_alive());
    assert!(old("Connection: Keep-Alive\r\n").unwrap().keep_alive());
    let chunked = response("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", false);
    assert_eq!(chunked.map(|_| ()), Err(ResponseError::Framing));
}

#[test]
fn a_switch_of_protocols_is_passed_along() {
    let text =
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nA: b\r\n\r\n";
    let head = response(text, false).unwrap();
    assert_eq!((head.upgrade(), head.keep_alive()), (Some("websocket"), false));
    assert_eq!(
        downstream(&head, OutFraming::AsReceived, Version::Http11, false),
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nUpgrade: websocket\r\nA: b\r\n\r\n"
    );
    let refused = response("HTTP/1.1 426 X\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", true).unwrap();
    assert_eq!(refused.upgrade(), None);
    assert_eq!(downstream(&refused, OutFraming::AsReceived, Version::Http11, true), "HTTP/1.1 426 X\r\n\r\n");
}

#[test]
fn a_worker_that_speaks_in_two_ways_is_refused() {
    for (text, error) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            ResponseError::Framing,
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", ResponseError::Framing),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, deflate\r\n\r\n", ResponseError::Framing),
        ("HTTP/1.1 200 OK\nA: b\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 200 OK\r\nA : b\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 200 OK\r\nA: \x01\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 200 O\x01K\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1  200 OK\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 20 OK\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 2000 OK\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.1 099 OK\r\n\r\n", ResponseError::Malformed),
        ("HTTP/1.2 200 OK\r\n\r\n", ResponseError::Malformed),
        ("\r\nHTTP/1.1 200 OK\r\n\r\n", ResponseError::Malformed),
        ("ICY 200 OK", ResponseError::Malformed),
    ] {
        assert_eq!(response(text, false).map(|_| ()), Err(error), "{text:?}");
    }
    assert_eq!(response("HTTP/1.1 301\r\n\r\n", true).unwrap().status(), 301);
}

#[test]
fn every_bound_of_a_response_head_holds_to_the_byte() {
    let mut head = ResponseHead::default();
    let fields = |count: usize| format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(count));
    assert!(matches!(head.parse(fields(MAX_RESPONSE_FIELDS).as_bytes(), false), Ok(Some(_))));
    assert_eq!(
        head.parse(fields(MAX_RESPONSE_FIELDS + 1).as_bytes(), false),
        Err(ResponseError::TooManyFields)
    );
    let start = "HTTP/1.1 200 OK\r\nX: ";
    let sized = |bytes: usize| format!("{start}{}\r\n\r\n", "a".repeat(bytes - start.len() - 4));
    let most = MAX_RESPONSE_HEAD_BYTES;
    assert_eq!(head.parse(sized(most).as_bytes(), false), Ok(Some(most)));
    assert_eq!(head.parse(sized(most + 1).as_bytes(), false), Err(ResponseError::HeadTooLarge));
}

#[test]
fn an_event_stream_is_known_by_its_essence() {
    for (value, expected) in [
        ("text/event-stream", true),
        ("Text/Event-Stream; charset=utf-8", true),
        ("text/event-streams", false),
        ("text/event", false),
        ("application/json", false),
    ] {
        let head = response(&format!("HTTP/1.1 200 OK\r\ncontent-type: {value}\r\n\r\n"), false).unwrap();
        assert_eq!(head.is_event_stream(), expected, "{value}");
    }
}

#[test]
fn chunks_are_walked_and_decoded_up_to_the_end_of_the_body() {
    let text = b"5;a=b; c=\"d;\\\"\"\r\nhello\r\n006\r\n world\r\n0\r\nVary: *\r\nX:\r\n\r\nGET ";
    let mut tracker = ChunkTracker::new();
    assert_eq!(tracker.track(text), Ok(Tracked { consumed: text.len() - 4, data: 11, done: true }));
    assert_eq!(tracker.track(b"GET "), Ok(Tracked { consumed: 0, data: 0, done: true }));
    let mut bytes = text.to_vec();
    let decoded = ChunkTracker::new().decode(&mut bytes).unwrap();
    assert_eq!(decoded, Decoded { data: 11, consumed: text.len() - 4, done: true });
    assert_eq!(&bytes[..11], b"hello world");
    assert_eq!(&bytes[text.len() - 4..], b"GET ");
}

#[test]
fn a_tracker_knows_where_in_a_chunk_it_stands() {
    let mut tracker = ChunkTracker::new();
    assert!(tracker.is_between_chunks());
    tracker.track(b"a\r\n01234").unwrap();
    assert_eq!((tracker.remaining(), tracker.is_between_chunks()), (5, false));
    tracker.track(b"56789\r").unwrap();
    assert_eq!((tracker.remaining(), tracker.is_between_chunks()), (0, false));
    tracker.track(b"\n").unwrap();
    assert!(tracker.is_between_chunks() && !tracker.is_done());
    tracker.track(b"0\r\n\r\n").unwrap();
    assert!(tracker.is_done() && !tracker.is_between_chunks());
}

#[test]
fn chunked_coding_has_one_legal_form() {
    for (text, error) in [
        ("-1\r\n", ChunkError::Size),
        ("0x5\r\n", ChunkError::Size),
        ("5_0\r\n", ChunkError::Size),
        ("\r\n", ChunkError::Size),
        (" 5\r\n", ChunkError::Size),
        ("5 \r\n", ChunkError::Size),
        ("5 ;a\r\n", ChunkError::Size),
        ("5\n", ChunkError::Size),
        ("5\r;", ChunkError::Size),
        ("00000000000000005\r\n", ChunkError::Size),
        ("8000000000000001\r\n", ChunkError::Size),
        ("5;\r\n", ChunkError::Extension),
        ("5;a\n", ChunkError::Extension),
        ("5;a=\r\n", ChunkError::Extension),
        ("5;a \r\n", ChunkError::Extension),
        ("5;a b\r\n", ChunkError::Extension),
        ("5;a=\"b\r\n", ChunkError::Extension),
        ("5;a=\"b\"c\r\n", ChunkError::Extension),
        ("5;a\x01\r\n", ChunkError::Extension),
        ("1\r\nab", ChunkError::DataEnd),
        ("1\r\na\n", ChunkError::DataEnd),
        ("1\r\na\rb", ChunkError::DataEnd),
        ("0\r\n\n", ChunkError::Trailer),
        ("0\r\nA : b\r\n", ChunkError::Trailer),
        ("0\r\n: b\r\n", ChunkError::Trailer),
        ("0\r\nA\r\n", ChunkError::Trailer),
        ("0\r\nA: b\n", ChunkError::Trailer),
        ("0\r\nA: b\r\n c\r\n", ChunkError::Trailer),
        ("0\r\nA: \0\r\n", ChunkError::Trailer),
        ("0\r\nhOST: a\r\n", ChunkError::Trailer),
        ("0\r\nContent-Length: 1\r\n", ChunkError::Trailer),
        ("0\r\nTransfer-ENCODING: chunked\r\n", ChunkError::Trailer),
    ] {
        assert_eq!(ChunkTracker::new().track(text.as_bytes()), Err(error), "{text:?}");
        assert_eq!(ChunkTracker::new().decode(&mut text.as_bytes().to_vec()), Err(error), "{text:?}");
    }
    for text in ["0\r\nTransfer-Encodings: x\r\nHos: t\r\n\r\n", "0;a = \"b\" ;c\r\n\r\n", "000\r\n\r\n"] {
        let tracked = ChunkTracker::new().track(text.as_bytes()).unwrap();
        assert!(tracked.done && tracked.consumed == text.len(), "{text:?}");
    }
}

#[test]
fn extensions_and_trailers_are_bounded_over_the_whole_message() {
    let mut tracker = ChunkTracker::new();
    // `;` and a name of 1,023 bytes, four times, is the last byte that is allowed.
    let chunk = format!("1;{}\r\nx\r\n", "a".repeat(1023));
    for _ in 0..4 {
        tracker.track(chunk.as_bytes()).unwrap();
    }
    assert_eq!(tracker.track(b"1;"), Err(ChunkError::ExtensionsTooLong));

    let mut tracker = ChunkTracker::new();
    tracker.track(b"0\r\n").unwrap();
    let line = format!("X: {}\r\n", "a".repeat(1024 - 5));
    for _ in 0..16 {
        tracker.track(line.as_bytes()).unwrap();
    }
    assert_eq!(tracker.track(b"X"), Err(ChunkError::TrailersTooLong));
    assert!(ChunkTracker::new().track(format!("0\r\n{}\r\n", line.repeat(16)).as_bytes()).unwrap().done);
}

#[test]
fn a_chunk_size_is_read_alike_at_once_and_byte_by_byte() {
    for digits in 1..=18 {
        for size in ["0", "1", "a", "F", "30", "g", ""] {
            let zeros = "0".repeat(digits);
            for line in [format!("{size:0>digits$}"), format!("{size}{zeros}"), format!("{zeros}{size}x")] {
                for end in ["\r\n", "\r", "\n", "", ";a\r\n"] {
                    let text = format!("1\r\nd\r\n{line}{end}ddd");
                    let whole = ChunkTracker::new().track(text.as_bytes());
                    let mut tracker = ChunkTracker::new();
                    let parts = text.as_bytes().chunks(1).map(|byte| tracker.track(byte));
                    let sum = |sum: Tracked, part: Result<Tracked, ChunkError>| {
                        let part = part?;
                        let (consumed, data) = (sum.consumed + part.consumed, sum.data + part.data);
                        Ok(Tracked { consumed, data, done: part.done })
                    };
                    let none = Tracked { consumed: 0, data: 0, done: false };
                    assert_eq!(whole, parts.into_iter().try_fold(none, sum), "{text:?}");
                }
            }
        }
    }
}

#[test]
fn a_chunk_head_is_the_shortest_lower_case_size() {
    for (len, expected) in [
        (0, "0\r\n"),
        (9, "9\r\n"),
        (15, "f\r\n"),
        (16, "10\r\n"),
        (0xabc, "abc\r\n"),
        (usize::MAX, "ffffffffffffffff\r\n"),
    ] {
        let (bytes, end) = chunk_head(len);
        assert_eq!(std::str::from_utf8(&bytes[..end]), Ok(expected));
    }
}

/// A stream of events as vLLM sends it, with everything that chunked coding allows around it.
fn chunked_events() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (line, data) in [
        ("12", "data: {\"a\":\"\u{1f999}\"}"),
        ("2;x=y", "\n\n"),
        ("0d;q=\"z\" ;w", "data: {\"b\"}\n\n"),
        ("000A", "data: xyz\n"),
        ("1", "\n"),
    ] {
        bytes.extend_from_slice(format!("{line}\r\n{data}\r\n").as_bytes());
    }
    bytes
}

#[test]
fn a_stream_cut_at_any_byte_is_concluded_legally_with_the_event_as_its_last() {
    const EVENT: &str = "data: {\"error\": 1}\n\ndata: [DONE]\n\n";
    let stream = chunked_events();
    let mut torn = 0;
    for cut in 0..=stream.len() {
        let part = &stream[..cut];
        let (mut tracker, mut tail) = (ChunkTracker::new(), EventTail::default());
        tracker.track_data(part, |data| tail.push(data)).unwrap();
        let text = if tail.is_between_events() { EVENT.to_owned() } else { format!("\n\n{EVENT}") };
        let Some(end) = tracker.conclude(text.as_bytes(), b'\n', 64) else {
            let line = part.rsplit(|byte| *byte == b'\n').next().unwrap();
            assert!(line.contains(&b';'), "{cut}: only an extension cannot be concluded");
            torn += 1;
            continue;
        };
        let mut whole = [part, &end].concat();
        let decoded = ChunkTracker::new().decode(&mut whole).unwrap_or_else(|error| panic!("{cut}: {error}"));
        assert!(decoded.done && decoded.consumed == whole.len(), "{cut}: {}", end.escape_ascii());
        let data = String::from_utf8_lossy(&whole[..decoded.data]).into_owned();
        let (before, event) = data.trim_end_matches('\n').split_at(data.find(EVENT.trim_end()).unwrap());
        assert_eq!(event, EVENT.trim_end(), "{cut}");
        assert!(before.is_empty() || before.ends_with("\n\n"), "{cut}: {before:?}");
        assert!(data.ends_with("\n\n"), "{cut}");
    }
    assert!(torn <= 8, "{torn} of {} cuts cannot be concluded", stream.len());
}

#[test]
fn a_body_whose_end_was_announced_is_only_ended() {
    for end in ["0\r", "0\r\n", "0\r\n\r", "0;a\r", "0;a=b", "0\r\nX: y", "0\r\nX: y\r", "0\r\nX: y\r\n"] {
        let mut tracker = ChunkTracker::new();
        tracker.track(end.as_bytes()).unwrap();
        let rest = tracker.conclude(b"text", b'\n', 64).unwrap();
        let mut whole = [end.as_bytes(), &rest].concat();
        let decoded = ChunkTracker::new().decode(&mut whole).unwrap();
        assert!(decoded.done && decoded.data == 0 && decoded.consumed == whole.len(), "{end:?}");
    }
    for torn in ["0\r\nX", "0;", "0;a=\"", "0\r\n\r\n", "ff\r\n"] {
        let mut tracker = ChunkTracker::new();
        tracker.track(torn.as_bytes()).unwrap();
        assert_eq!(tracker.conclude(b"text", b'\n', 64), None, "{torn:?}");
    }
    // what says no more than 0 may still become a chunk
    let mut tracker = ChunkTracker::new();
    tracker.track(b"0").unwrap();
    assert_eq!(tracker.conclude(b"text", b'\n', 64).unwrap(), b"4\r\ntext\r\n0\r\n\r\n");
    assert_eq!(tracker.conclude(b"", b'\n', 64).unwrap(), b"\r\n\r\n");
}
