//! What each fault leads to, end to end. A test's name begins with the row of the contract that it holds.

mod retries;
