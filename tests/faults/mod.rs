//! The table of faults, row by row: a test's name begins with its row.

/// Descriptors, ports, masses of clients (P3, P4, P6, C10, C23).
mod resources;
