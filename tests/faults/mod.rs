//! Each fault of the table of faults, and what it must lead to; a test's name begins with the row.

mod limits;
mod streams;
