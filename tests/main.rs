//! Everything that is tested from outside.

/// Who may name whom in the sources.
mod architecture;
/// Flags and environment, on the real binary.
mod config;
/// Logs that cannot be written, on the real binary.
mod logging;
/// README and `--help` say what the code says.
mod readme;
