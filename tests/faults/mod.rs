//! The rows of the fault table: what each fault leads to. A test's name begins with the row's id.

mod admission;
mod breaker;
mod health;
mod limits;
mod resources;
mod retries;
mod streams;
