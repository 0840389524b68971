//! What a request is for: the forms of a target (RFC 9112 §3.2) and the syntax of an authority.

use super::bytes::registered_len;

/// A request target, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target<'a> {
    /// `/path?query`, as it was sent.
    Origin(&'a str),
    /// `*`: the server itself, for OPTIONS only.
    Asterisk,
    /// `http://authority/path?query`; `rest` begins at the path and may lack its first slash.
    Absolute {
        /// Host and port, without userinfo.
        authority: &'a str,
        /// What follows the authority; may be empty.
        rest: &'a str,
    },
}

/// Takes `target` apart; `None` if it has none of the forms a proxy for one service answers. Authority-form
/// belongs to CONNECT, which is refused earlier.
pub(super) fn take_apart<'a>(method: &str, target: &'a str) -> Option<Target<'a>> {
    if target.starts_with('/') {
        return Some(Target::Origin(target));
    }
    if target == "*" {
        return (method == "OPTIONS").then_some(Target::Asterisk);
    }
    let (scheme, hierarchy) = target.split_once("://")?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return None;
    }
    let end = hierarchy.find(['/', '?', '#']).unwrap_or(hierarchy.len());
    let (authority, rest) = hierarchy.split_at_checked(end)?;
    // RFC 9110 §4.2.1: an http URI with an empty host is invalid.
    if authority.is_empty() || authority.starts_with(':') || !is_authority(authority.as_bytes()) {
        return None;
    }
    Some(Target::Absolute { authority, rest })
}

/// Whether `text` is `uri-host [ ":" port ]` (RFC 9110 §7.2, RFC 3986 §3.2.2). Userinfo is not part of it.
/// An empty text is: a client sends it when its URI has no authority.
pub(super) fn is_authority(text: &[u8]) -> bool {
    let after = match text.strip_prefix(b"[") {
        Some(literal) => {
            let end = literal.iter().position(|&byte| byte == b']').unwrap_or(literal.len());
            let (address, after) = literal.split_at_checked(end).unwrap_or_default();
            after.strip_prefix(b"]").filter(|_| is_ip_literal(address))
        }
        None => after_registered_name(text),
    };
    match after.map(<[u8]>::split_first) {
        Some(None) => true,
        Some(Some((b':', port))) => port.len() <= 5 && port.iter().all(u8::is_ascii_digit),
        Some(Some(_)) | None => false,
    }
}

/// An IPv6 address or an address of a later version; loosely, since only its characters matter here.
fn is_ip_literal(address: &[u8]) -> bool {
    let plain = |byte: &u8| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.');
    let future = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:".contains(byte);
    match address.split_first() {
        None => false,
        Some((b'v' | b'V', version)) => version.iter().all(future),
        Some(_) => address.iter().all(plain),
    }
}

/// What follows a registered name, which may be empty; `None` if its percent-encoding is damaged.
fn after_registered_name(text: &[u8]) -> Option<&[u8]> {
    let mut rest = text;
    loop {
        rest = rest.get(registered_len(rest)..)?;
        rest = match rest {
            [b'%', high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => after,
            [b'%', ..] => return None,
            _ => return Some(rest),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_are_told_apart() {
        assert_eq!(take_apart("GET", "/a?b"), Some(Target::Origin("/a?b")));
        assert_eq!(take_apart("OPTIONS", "*"), Some(Target::Asterisk));
        assert_eq!(
            take_apart("GET", "HTTP://[::1]:80/a?b"),
            Some(Target::Absolute { authority: "[::1]:80", rest: "/a?b" })
        );
        assert_eq!(
            take_apart("GET", "http://h?x=/"),
            Some(Target::Absolute { authority: "h", rest: "?x=/" })
        );
    }

    #[test]
    fn what_has_no_form_of_ours_is_no_target() {
        for target in
            ["*", "v1/models", "h:443", "ftp://h/", "http://", "http:///a", "http://u:p@h/", "s://]ufd/:"]
        {
            assert_eq!(take_apart("GET", target), None, "{target}");
        }
    }

    #[test]
    fn an_authority_is_a_host_and_maybe_a_port() {
        for good in
            ["", "x", "x:", "x:80", "a.b-c_d~", "0.0.0.0=5000", "a%2Fb", "[::1]", "[::1]:8080", "[v1.a:b]"]
        {
            assert!(is_authority(good.as_bytes()), "{good}");
        }
        for bad in [
            "a@b", "a b", "a/b", "a:b", "a:1:2", "x:123456", "[::1", "[]", "[::1]x", "a%2", "a%zz", "a?b",
            "\u{e9}", "::1",
        ] {
            assert!(!is_authority(bad.as_bytes()), "{bad}");
        }
    }
}
