//! Time limits, each with its end.
