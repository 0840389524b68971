//! The real binary as a process.

use std::process::Child;

/// A process that ends when the test does, however it does.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // an error means that it has ended already
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
