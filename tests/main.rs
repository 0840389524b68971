//! Everything that is tested from outside.

/// Who may name whom in the sources.
mod architecture;
/// Flags and environment, on the real binary.
mod config;
/// The vectors of llhttp, gunicorn and our own.
mod corpora;
/// Logs that cannot be written, on the real binary.
mod logging;
/// Any split of the bytes parses alike.
mod properties;
/// README and `--help` say what the code says.
mod readme;
/// HTTP/1.1 a second time, naively.
mod reference;
