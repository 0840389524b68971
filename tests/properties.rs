//! Any split of the bytes parses alike, what is written reads back as the same thing, and both agree with the
//! naive `reference`.

use proptest::collection::vec;
use proptest::prelude::*;

use vllm_proxy::http::ChunkTracker;

use crate::reference::{check_chunked, check_request, check_response};

/// One of `usual` nearly always, else one of `odd`.
fn mostly(usual: &'static [&'static str], odd: &'static [&'static str]) -> BoxedStrategy<String> {
    let usual = prop::sample::select(usual);
    let odd = prop::sample::select(odd);
    prop_oneof![40 => usual, 1 => odd].prop_map(str::to_owned).boxed()
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    vec(1_usize..40, 0..12)
}

fn fields() -> impl Strategy<Value = String> {
    let name = mostly(
        &[
            "Content-Length",
            "content-length",
            "Transfer-Encoding",
            "Connection",
            "connection",
            "Upgrade",
            "Expect",
            "TE",
            "Trailer",
            "Keep-Alive",
            "Proxy-Foo",
            "Content-Type",
            "Authorization",
            "X-A",
            "x-a",
            "X-B",
        ],
        &["", " X", "X ", "X\0", "X\u{e9}", "Host", "X(", "\rX", "\nX"],
    );
    let value = mostly(
        &[
            "0",
            "5",
            "007",
            "chunked",
            "CHUNKED",
            "close",
            "keep-alive",
            "upgrade",
            "x-a, close",
            "websocket",
            "h2c",
            "100-continue",
            "text/event-stream; charset=utf-8",
            "",
            " padded\t",
            "caf\u{e9}",
        ],
        &[
            "5, 5",
            "-1",
            "18446744073709551616",
            "9223372036854775809",
            "gzip, chunked",
            "a\rb",
            "a\0",
            "\u{7f}",
            "a\r\n b",
        ],
    );
    let colon = mostly(&[": ", ":", ":\t "], &[" :", "", "::"]);
    let end = mostly(&["\r\n"], &["\n", "\r", "\r\r\n", "\r\n "]);
    vec((name, colon, value, end).prop_map(|(name, colon, value, end)| name + &colon + &value + &end), 0..5)
        .prop_map(|lines| lines.concat())
}

fn request() -> impl Strategy<Value = String> {
    let before = mostly(&["", "\r\n", "\r\n\r\n"], &["\n", "\r", "\r\n\r\n\r\n", "\0"]);
    let method = mostly(&["GET", "POST", "OPTIONS", "M-SEARCH"], &["", "G@T", "CONNECT", "TRACE", "GET "]);
    let target = mostly(
        &["/", "/v1/chat/completions?a=b#c", "http://h:1/p?q", "https://[::1]", "*", "HTTP://a%20b?x"],
        &["", "v1", "/a b", "/\u{e9}", "http://", "http://u@h/", "h:1", "/\u{1}"],
    );
    let version = mostly(&["HTTP/1.1", "HTTP/1.0"], &["HTTP/2.0", "http/1.1", "HTTP/1.1 ", "", "HTTP/1.\r"]);
    let host = mostly(
        &["Host: x\r\n", "hOST: [::1]:80\r\n", "Host:\r\n"],
        &["", "Host: a\r\nHost: a\r\n", "Host: u@h\r\n", "Host: a b\r\n"],
    );
    let end = mostly(&["\r\n", "\r\nGET / HTTP/1.1\r\n\r\n"], &["", "\r", "\n", "\r\r\n", "\r\n\r"]);
    (before, method, target, version, host, fields(), end).prop_map(
        |(before, method, target, version, host, fields, end)| {
            format!("{before}{method} {target} {version}\r\n{host}{fields}{end}")
        },
    )
}

fn response() -> impl Strategy<Value = String> {
    let start = mostly(
        &[
            "HTTP/1.1 200 OK",
            "HTTP/1.1 204",
            "HTTP/1.0 200 OK",
            "HTTP/1.1 304 ",
            "HTTP/1.1 101 S",
            "HTTP/1.1 100 C",
        ],
        &[
            "HTTP/1.2 200 OK",
            "HTTP/1.1 20",
            "HTTP/1.1  200 OK",
            "HTTP/1.1 200 O\u{1}",
            "",
            "\r\nHTTP/1.1 200 OK",
        ],
    );
    let end = mostly(&["\r\n", "\r\nbody"], &["", "\r", "\n", "\r\n\r"]);
    (start, fields(), end).prop_map(|(start, fields, end)| format!("{start}\r\n{fields}{end}"))
}

fn chunked() -> impl Strategy<Value = String> {
    let extension = mostly(
        &["", ";a", ";a=b", "; a = \"b;\\\"c\" ;d", ";a=\"\u{e9}\""],
        &[";", ";a=", " ;a", ";a b", ";a=\"", ";a=\"\\", ";a\u{1}", " "],
    );
    let end = mostly(&["\r\n"], &["\n", "\r", "", "\r\r\n"]);
    let chunk = (1_usize..40, 0_usize..3, extension.clone(), end.clone(), end.clone()).prop_map(
        |(len, zeros, extension, line_end, data_end)| {
            format!("{}{len:x}{extension}{line_end}{}{data_end}", "0".repeat(zeros), "d".repeat(len))
        },
    );
    let size = mostly(&["0", "000"], &["", "-0", "0x0", "00000000000000000", "FFFFFFFFFFFFFFFF", "g"]);
    let trailer = mostly(
        &["", "A: b\r\n", "Transfer-Encodings:\r\nB: c\r\n"],
        &[
            "Host: x\r\n",
            "content-LENGTH: 5\r\n",
            "Transfer-Encoding: chunked\r\n",
            "A : b\r\n",
            "A: b\r\n c\r\n",
            "A: b\n",
        ],
    );
    let rest = mostly(&["", "GET / HTTP/1.1\r\n"], &["\r\n"]);
    (vec(chunk, 0..6), size, extension, end, trailer, mostly(&["\r\n"], &["", "\r", "\n"]), rest).prop_map(
        |(chunks, size, extension, line_end, trailer, end, rest)| {
            format!("{}{size}{extension}{line_end}{trailer}{end}{rest}", chunks.concat())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, max_global_rejects: 40_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_of_a_request_head_parses_alike_and_reads_back(text in request(), cuts in cuts()) {
        check_request(text.as_bytes(), &cuts);
        check_request(text.as_bytes(), &[1]);
    }

    #[test]
    fn any_split_of_a_response_head_parses_alike_and_reads_back(
        text in response(), cuts in cuts(), to_head in any::<bool>(),
    ) {
        check_response(text.as_bytes(), &cuts, to_head);
        check_response(text.as_bytes(), &[1], to_head);
    }

    #[test]
    fn any_split_of_a_chunked_body_is_walked_and_decoded_as_the_reference_does(
        text in chunked(), cuts in cuts(),
    ) {
        check_chunked(text.as_bytes(), &cuts);
    }

    #[test]
    fn whatever_has_passed_of_a_chunked_body_can_be_concluded_legally(
        text in chunked(), at in any::<prop::sample::Index>(), words in "[a-z]{0,40}",
    ) {
        // as far as it is legal and not over; nothing is not
        let bytes = text.as_bytes();
        let goes_on = |len: &usize| ChunkTracker::new().track(&bytes[..*len]).is_ok_and(|tracked| !tracked.done);
        let passed = &bytes[..at.index((0..=bytes.len()).take_while(goes_on).count())];
        let mut tracker = ChunkTracker::new();
        tracker.track(passed).unwrap();
        if let Some(end) = tracker.conclude(words.as_bytes(), b'\n', 1 << 16) {
            let mut before = passed.to_vec();
            let before_len = ChunkTracker::new().decode(&mut before).unwrap().data;
            let mut whole = [passed, &end].concat();
            let decoded = ChunkTracker::new().decode(&mut whole).unwrap();
            prop_assert!(decoded.done && decoded.consumed == whole.len());
            let data = &whole[..decoded.data];
            prop_assert!(data.starts_with(&before[..before_len]));
            let said = &data[before_len..];
            let said = &said[..said.iter().rposition(|byte| *byte != b'\n').map_or(0, |at| at + 1)];
            // nothing can be said once the end was announced
            prop_assert!(said == words.as_bytes() || data.len() == before_len, "{}", end.escape_ascii());
        }
    }

    #[test]
    fn a_flipped_byte_changes_the_verdict_of_parser_and_reference_together(
        text in request(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut bytes = text.into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        check_request(&bytes, &[3]);
        check_response(&bytes, &[3], false);
    }
}

#[test]
fn the_generators_make_legal_and_illegal_bytes() {
    use crate::reference::{self, Chunked};
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut draws =
        |strategy: &dyn Fn(&mut TestRunner) -> bool| (0..500).filter(|_| strategy(&mut runner)).count();
    let requests = draws(&|runner| {
        reference::request(request().new_tree(runner).unwrap().current().as_bytes()).is_some()
    });
    let bodies = draws(&|runner| {
        matches!(
            reference::chunked(chunked().new_tree(runner).unwrap().current().as_bytes()),
            Chunked::Done(..)
        )
    });
    assert!((100..400).contains(&requests), "{requests} of 500 requests are legal");
    assert!((100..400).contains(&bodies), "{bodies} of 500 bodies are legal");
}
