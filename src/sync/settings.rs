//! What an operator may set of the exchange with other proxies.

use std::{fmt, str::FromStr};

use redis::{
    ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, io::tcp::TcpSettings,
    parse_redis_url,
};

/// Where `local` is.
const LOCAL: &str = "redis://127.0.0.1:6379";

/// Redis, through which proxies tell each other what they do.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// Redis through which proxies share what they know, so that they choose as one: a URL as
    /// `redis://[[user]:password@]host[:port][/database]`, `rediss://` with TLS, or `unix:///path[?db=N]`; `local` is
    /// port 6379 of this host, if there is one; `none`: this proxy is by itself
    #[arg(short = 'R', long, env = "VLLM_PXY_REDIS", default_value = "local", value_name = "URL")]
    pub redis: Server,

    /// Milliseconds between two batches of news for the other proxies; half of it is what they learn of a choice late,
    /// on average
    #[arg(long, env = "VLLM_PROXY_SYNC_INTERVAL_MS", default_value_t = 50, value_name = "MILLISECONDS")]
    pub sync_interval_ms: u64,

    /// Bytes that the news of all proxies may take in Redis, about; those that no new proxy has to know are the first
    /// to go
    #[arg(long, env = "VLLM_PROXY_REDIS_STREAM_BYTES", default_value_t = 16 << 20, value_name = "BYTES")]
    pub redis_stream_bytes: u64,
}

/// Which Redis is used.
#[derive(Debug, Clone)]
pub enum Server {
    /// None.
    None,
    /// The one on this host, if there is one.
    Local,
    /// The one at this address, which is expected to be there.
    At(Box<Address>),
}

impl Server {
    /// Where it is; `None`: nowhere.
    pub(super) fn address(&self) -> Option<Address> {
        match self {
            Self::None => None,
            Self::Local => LOCAL.parse().ok(),
            Self::At(address) => Some((**address).clone()),
        }
    }

    /// Whether somebody says that it is there.
    pub(super) fn is_expected(&self) -> bool {
        matches!(self, Self::At(_))
    }
}

impl FromStr for Server {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            none if none.eq_ignore_ascii_case("none") => Ok(Self::None),
            local if local.eq_ignore_ascii_case("local") => Ok(Self::Local),
            url => Ok(Self::At(Box::new(url.parse()?))),
        }
    }
}

/// The address of a Redis, and who we are there. What is shown of it has no secrets.
#[derive(Clone)]
pub struct Address {
    pub(super) info: ConnectionInfo,
}

impl FromStr for Address {
    type Err = &'static str;

    /// The errors repeat nothing of the text: there may be a password in it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const NO_URL: &str = "not the URL of a Redis";
        const DATABASE: &str = "a database is a number from 0";
        let url = parse_redis_url(text).ok_or(NO_URL)?;
        let unix = url.scheme().ends_with("unix");
        let known = |key: &str| unix && ["db", "user", "pass"].contains(&key);
        if url.query_pairs().any(|(key, _)| !known(&key)) {
            return Err("a parameter that is not known here");
        }
        if url.fragment().is_some() {
            return Err("nothing may follow a #");
        }
        let path = url.path().trim_matches('/');
        if !unix && !path.is_empty() && path.parse::<u32>().is_err() {
            return Err(DATABASE);
        }
        let info = url.into_connection_info().map_err(|_| NO_URL)?;
        let redis = info.redis_settings().clone();
        if u32::try_from(redis.db()).is_err() {
            return Err(DATABASE);
        }
        if redis.username().is_some() && redis.password().is_none() {
            return Err("a user without a password; a password alone has a colon before it");
        }
        // the libraries' names would be a command more that old servers do not know
        let redis = redis.set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        let tcp = TcpSettings::default().set_nodelay(true);
        Ok(Self { info: info.set_redis_settings(redis).set_tcp_settings(tcp) })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |host: &str| if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let database = self.info.redis_settings().db();
        match self.info.addr() {
            ConnectionAddr::Tcp(name, port) => write!(f, "redis://{}:{port}/{database}", host(name)),
            ConnectionAddr::TcpTls { host: name, port, .. } => {
                write!(f, "rediss://{}:{port}/{database}", host(name))
            }
            ConnectionAddr::Unix(path) => write!(f, "unix://{}?db={database}", path.display()),
            _ => f.write_str("redis"),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Result<String, &'static str> {
        text.parse::<Server>().map(|server| server.address().map_or_else(String::new, |at| at.to_string()))
    }

    #[test]
    fn a_redis_is_named_as_everywhere() {
        for (text, meant) in [
            ("redis://host", "redis://host:6379/0"),
            (" redis://username:password@host:42/2 ", "redis://host:42/2"),
            ("redis://:password@host/", "redis://host:6379/0"),
            ("rediss://[::1]:7/3", "rediss://[::1]:7/3"),
            ("valkey://host", "redis://host:6379/0"),
            ("unix:///run/redis.sock", "unix:///run/redis.sock?db=0"),
            ("redis+unix:///run/redis.sock?db=5&user=u&pass=p", "unix:///run/redis.sock?db=5"),
            ("local", "redis://127.0.0.1:6379/0"),
            ("LOCAL", "redis://127.0.0.1:6379/0"),
            ("none", ""),
        ] {
            assert_eq!(address(text).as_deref(), Ok(meant), "{text}");
        }
    }

    #[test]
    fn who_we_are_is_decoded_and_shown_nowhere() {
        let server: Server = "redis://me:p%40ss%2Fword@host".parse().unwrap();
        let redis = server.address().unwrap().info.redis_settings().clone();
        assert_eq!((redis.username(), redis.password()), (Some("me"), Some("p@ss/word")));
        assert!(server.is_expected() && !format!("{server:?}").contains("ss"), "{server:?}");
    }

    #[test]
    fn what_names_no_redis_is_refused() {
        for text in [
            "",
            "host",
            "host:6379",
            "http://host",
            "redis://",
            "redis://0.0.0.0",
            "redis://host:99999",
            "redis://host/x",
            "redis://host/-1",
            "redis://host/1/2",
            "redis://host/99999999999",
            "redis://host?db=1",
            "redis://host?protocol=resp3",
            "redis://password@host",
            "rediss://host/#insecure",
            "unix://path",
            "unix:///path?db=-1",
            "unix:///path?timeout=1",
        ] {
            assert!(address(text).is_err(), "{text}: {:?}", address(text));
        }
    }
}
