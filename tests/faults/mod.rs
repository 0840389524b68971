//! What goes wrong and what it must lead to, a test per row of the fault table; names begin with the row.

/// Limits, the queue before them, and what is refused.
mod admission;
