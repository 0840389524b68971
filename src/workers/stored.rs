//! Who has stored which response.

/// Which worker has stored which response, by the hash of the response's id; of bounded size, so that old ones are
/// forgotten. Shared by all threads.
#[derive(Debug, Default)]
pub struct StoredResponses {}

impl StoredResponses {
    /// The worker with this [`crate::workers::Worker::id`] has stored the response with this hash.
    pub fn put(&self, _response: u64, _worker: usize) {}

    /// The id of the worker that has stored it, as far as is known.
    pub fn get(&self, _response: u64) -> Option<usize> {
        None
    }
}
