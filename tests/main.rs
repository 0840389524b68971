//! Everything that is tested from outside.

// The vectors of llhttp, gunicorn and our own.
mod corpora;
// Any split of the bytes parses alike.
mod properties;
// HTTP/1.1 a second time, naively.
mod reference;
