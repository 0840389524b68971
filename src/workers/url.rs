//! Where a worker is: `http://host[:port][/prefix]`.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// Why a worker's URL cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UrlError {
    /// It is no URL at all.
    #[error("`{0}` is not a URL of the form http://host[:port][/prefix]")]
    Malformed(String),
    /// Only plain HTTP is spoken to workers.
    #[error("`{0}` has the scheme `{1}`; workers are reached by http:// only")]
    Scheme(String, String),
    /// A query, a fragment or credentials mean nothing here.
    #[error("`{0}` must not carry credentials, a query or a fragment")]
    Extra(String),
    /// What stands behind `#` is not understood.
    #[error("`{attribute}` behind the `#` of a worker: {problem}")]
    Attribute {
        /// As it is written: key and value.
        attribute: String,
        /// What is wrong with it, and what is allowed.
        problem: &'static str,
    },
}

/// A worker's place: host and port to connect to, and a path prefix that is put before every target.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkerUrl {
    host: String,
    port: u16,
    prefix: String,
    text: String,
}

impl WorkerUrl {
    /// The name or address to resolve, an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port; 80 where the URL names none.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The path prefix, without a trailing slash; empty in the common case.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The URL as it is shown and used as the worker's name: `http://host:port[/prefix]`.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for WorkerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for WorkerUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let malformed = || UrlError::Malformed(text.to_owned());
        if !text.contains("://") {
            return Err(malformed());
        }
        let url = ::url::Url::parse(text).map_err(|_| malformed())?;
        if url.scheme() != "http" {
            return Err(UrlError::Scheme(text.to_owned(), url.scheme().to_owned()));
        }
        if !url.username().is_empty()
            || url.password().is_some()
            || url.query().is_some()
            || url.fragment().is_some()
        {
            return Err(UrlError::Extra(text.to_owned()));
        }
        let host = url.host_str().ok_or_else(malformed)?;
        let port = url.port().unwrap_or(80);
        let prefix = url.path().trim_end_matches('/').to_owned();
        let shown = format!("http://{host}:{port}{prefix}");
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { host, port, prefix, text: shown })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<WorkerUrl, UrlError> {
        text.parse()
    }

    #[test]
    fn a_name_without_dots_and_a_port_is_enough() {
        let url = parse("http://vllm-a:8000").unwrap();
        assert_eq!((url.host(), url.port(), url.prefix()), ("vllm-a", 8000, ""));
        assert_eq!(url.as_str(), "http://vllm-a:8000");
    }

    #[test]
    fn ipv6_loses_its_brackets_only_for_the_resolver() {
        let url = parse("http://[::1]:8000/").unwrap();
        assert_eq!(url.host(), "::1");
        assert_eq!(url.as_str(), "http://[::1]:8000");
    }

    #[test]
    fn a_prefix_is_kept_without_its_last_slash() {
        assert_eq!(parse("http://a/team/x/").unwrap().prefix(), "/team/x");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        assert!(matches!(parse("a:8000"), Err(UrlError::Malformed(_))));
        assert!(matches!(parse("http://"), Err(UrlError::Malformed(_))));
        assert!(matches!(parse("https://a"), Err(UrlError::Scheme(..))));
        assert!(matches!(parse("http://u:p@a"), Err(UrlError::Extra(_))));
        assert!(matches!(parse("http://a?x=1"), Err(UrlError::Extra(_))));
    }
}
