//! The limit of open files: each client's connection and each worker's takes one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one; what it was before, if it was another.
pub fn raise_open_files() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return None;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // some sandboxes refuse every change; then the soft limit goes on
    setrlimit(Resource::Nofile, raised).ok()?;
    limit.current
}
