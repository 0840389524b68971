//! `vllm-proxy healthcheck`: asks a running proxy for its `/health`, for images without a shell.
//!
//! A process of its own with one blocking connection; nothing of the proxy runs in it.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use thiserror::Error;

use crate::workers::WorkerUrl;

/// Bytes of an answer that tell its status: `HTTP/1.1 200`.
const STATUS_BYTES: usize = 12;

/// Whom to ask. The address defaults to the one that the proxy listens on with the same environment.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Settings {
    /// What to ask for, in place of /health at --host and --port
    #[arg(long, value_name = "URL")]
    pub url: Option<WorkerUrl>,

    /// Address that the proxy listens on
    #[arg(long, env = "VLLM_PROXY_HOST", default_value = "0.0.0.0", value_name = "ADDRESS")]
    pub host: IpAddr,

    /// Port that the proxy listens on
    #[arg(long, env = "VLLM_PROXY_PORT", default_value_t = 8000)]
    pub port: u16,
}

/// Why the proxy is not well.
#[derive(Debug, Error)]
pub enum HealthError {
    /// Its name could not be resolved, or it did not answer in time.
    #[error("{0} does not answer")]
    Silent(String, #[source] io::Error),
    /// It answered anything but 200.
    #[error("{0} answers `{1}`")]
    Unwell(String, String),
}

/// Time for connecting, and again for each part of the answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks once.
///
/// # Errors
/// Fails if there is no answer within 3 s, or if its status is not 200.
pub fn run(settings: &Settings) -> Result<(), HealthError> {
    let (addresses, host, target) = match &settings.url {
        Some(url) => {
            let addresses = resolve(url).map_err(|error| HealthError::Silent(url.to_string(), error))?;
            let target = if url.prefix().is_empty() { "/" } else { url.prefix() };
            (addresses, url.host().to_owned(), target)
        }
        None => {
            let address = SocketAddr::new(reachable(settings.host), settings.port);
            (vec![address], address.to_string(), "/health")
        }
    };
    let name = settings.url.as_ref().map_or_else(|| format!("http://{host}{target}"), ToString::to_string);
    let status = ask(&addresses, &host, target).map_err(|error| HealthError::Silent(name.clone(), error))?;
    match status.as_str() {
        "HTTP/1.1 200" => Ok(()),
        _ => Err(HealthError::Unwell(name, status)),
    }
}

#[expect(clippy::disallowed_methods, reason = "a process of its own that does nothing else")]
fn resolve(url: &WorkerUrl) -> io::Result<Vec<SocketAddr>> {
    use std::net::ToSocketAddrs;
    Ok((url.host(), url.port()).to_socket_addrs()?.collect())
}

/// Where a listener on `host` is reached from its own machine.
fn reachable(host: IpAddr) -> IpAddr {
    match host {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}

/// The first bytes of the answer, up to its status.
fn ask(addresses: &[SocketAddr], host: &str, target: &str) -> io::Result<String> {
    let mut connected = Err(io::ErrorKind::NotFound.into());
    for address in addresses {
        connected = TcpStream::connect_timeout(address, PATIENCE);
        if connected.is_ok() {
            break;
        }
    }
    let mut stream = connected?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut status = [0; STATUS_BYTES];
    stream.read_exact(&mut status)?;
    Ok(String::from_utf8_lossy(&status).into_owned())
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// What is said of a server that answers once with `answer`, and what it was asked.
    fn asked(answer: &'static str, path: &str) -> (Result<(), HealthError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(request).unwrap()
        });
        let url = (!path.is_empty()).then(|| format!("http://127.0.0.1:{port}{path}").parse().unwrap());
        let result = run(&Settings { url, host: Ipv4Addr::UNSPECIFIED.into(), port });
        (result, server.join().unwrap())
    }

    #[test]
    fn a_proxy_that_says_200_is_well() {
        let (result, request) = asked("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "");
        assert!(result.is_ok(), "{result:?}");
        assert!(request.starts_with("GET /health HTTP/1.1\r\nHost: 127.0.0.1:"), "{request}");
    }

    #[test]
    fn a_url_names_the_target() {
        let (result, request) = asked("HTTP/1.1 200 OK\r\n\r\n", "/x/ping");
        assert!(result.is_ok() && request.starts_with("GET /x/ping HTTP/1.1\r\n"), "{request}");
    }

    #[test]
    fn anything_but_200_and_silence_are_told_apart() {
        let (result, _) = asked("HTTP/1.1 503 Service Unavailable\r\n\r\n", "");
        assert!(result.unwrap_err().to_string().ends_with("/health answers `HTTP/1.1 503`"));
        let (result, _) = asked("", "");
        assert!(matches!(result, Err(HealthError::Silent(..))), "{result:?}");
    }
}
