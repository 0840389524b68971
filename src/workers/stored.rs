//! Who has stored which response.
//!
//! A table of fixed size in which old entries give way to new ones. What it says is a hint: who asks a worker for a
//! response by it has to ask the others if that worker does not have it.

use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use xxhash_rust::xxh3::xxh3_64;

use crate::workers::Worker;

/// Entries of a bucket: a cache line of them, in the order in which they came, the newest first.
const WAYS: usize = 8;

/// Buckets, a power of two: with [`WAYS`] 64 Ki entries in 512 KiB. An entry gives way to eight newer ones of its
/// bucket: of the newest 16 Ki responses 0.1 % are forgotten, of the newest 32 Ki 5 % (Poisson).
const BUCKETS: usize = 1 << 13;

/// Bits of an entry that hold a worker's id, plus one; the rest are the upper bits of the response's hash. An id that was
/// never stored is taken for one of the eight in its bucket once in 2 · 10¹² times, and costs a question then.
const WORKER_BITS: u32 = 20;

const WORKER: u64 = (1 << WORKER_BITS) - 1;

type Bucket = [AtomicU64; WAYS];

/// Hears of every response that was made here: who has stored it, and the hash of its id.
type Teller = Box<dyn Fn(&Worker, u64) + Send + Sync>;

/// Which worker has stored which response, by the hash of the response's id; of bounded size, so that old ones are
/// forgotten. Shared by all threads.
#[derive(Default)]
pub struct StoredResponses {
    /// By the lowest bits of the hash. Made when the first response is stored, which in most fleets is never.
    buckets: OnceLock<Box<[Bucket]>>,
    teller: OnceLock<Teller>,
}

impl fmt::Debug for StoredResponses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredResponses").finish_non_exhaustive()
    }
}

impl StoredResponses {
    /// What a response is known by: the hash of its id, the same in every process.
    pub fn hash(id: &str) -> u64 {
        xxh3_64(id.as_bytes())
    }

    /// From now on `teller` hears what [`StoredResponses::made`] is told. The first one stays.
    pub fn tell(&self, teller: impl Fn(&Worker, u64) + Send + Sync + 'static) {
        // a second one is dropped
        self.teller.set(Box::new(teller)).unwrap_or_default();
    }

    /// `worker` has answered a request of ours with the response of this hash, and has stored it if it stores any.
    pub fn made(&self, response: u64, worker: &Worker) {
        self.put(response, worker.id());
        if let Some(tell) = self.teller.get() {
            tell(worker, response);
        }
    }

    /// The worker with this [`Worker::id`] has stored the response with this hash.
    pub fn put(&self, response: u64, worker: usize) {
        let Some(worker) = u64::try_from(worker).ok().and_then(|id| id.checked_add(1)) else { return };
        if worker > WORKER {
            return;
        }
        let buckets = self.buckets.get_or_init(|| (0..BUCKETS).map(|_| Bucket::default()).collect());
        let Some(bucket) = buckets.get(place(response)) else { return };
        // Each makes room for the one before it, up to a free place or an older entry of the same response. Where two
        // threads do so at once, an entry may stand twice or fall out; none is ever torn.
        let mut moved = tag(response) | worker;
        for slot in bucket {
            let before = slot.swap(moved, Ordering::Relaxed);
            if before == 0 || before & !WORKER == tag(response) {
                return;
            }
            moved = before;
        }
    }

    /// The id of the worker that has stored it, as far as is known.
    pub fn get(&self, response: u64) -> Option<usize> {
        let bucket = self.buckets.get()?.get(place(response))?;
        let mut entries = bucket.iter().map(|slot| slot.load(Ordering::Relaxed));
        let found = entries.find(|entry| *entry != 0 && entry & !WORKER == tag(response))?;
        usize::try_from((found & WORKER) - 1).ok()
    }
}

/// The bucket of a response.
fn place(response: u64) -> usize {
    (response % BUCKETS as u64) as usize
}

/// What tells a response from others in its bucket, where an entry has it.
fn tag(response: u64) -> u64 {
    response & !WORKER
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Hashes of one bucket, all different.
    fn of_one_bucket(count: u64) -> impl Iterator<Item = u64> {
        (0..count).map(|n| (n << WORKER_BITS) | 77)
    }

    #[test]
    fn the_newest_word_on_a_response_counts() {
        let table = StoredResponses::default();
        assert_eq!(table.get(0), None);
        for response in [0, 1, u64::MAX, StoredResponses::hash("resp_1")] {
            assert_eq!(table.get(response), None, "{response}");
            table.put(response, 0);
            assert_eq!(table.get(response), Some(0), "{response}");
            table.put(response, 41);
            assert_eq!(table.get(response), Some(41), "{response}");
        }
    }

    #[test]
    fn the_oldest_of_a_bucket_gives_way() {
        let table = StoredResponses::default();
        for (worker, response) in of_one_bucket(11).enumerate() {
            table.put(response, worker);
        }
        let known: Vec<_> = of_one_bucket(12).map(|response| table.get(response)).collect();
        assert_eq!(known[..3], [None; 3]);
        assert_eq!(known[3..11], [3, 4, 5, 6, 7, 8, 9, 10].map(Some));
        assert_eq!(known[11], None, "never stored");
        // what is told again becomes the newest, and takes nobody's place
        table.put(3 << WORKER_BITS | 77, 3);
        let known: Vec<_> = of_one_bucket(11).map(|response| table.get(response)).collect();
        assert_eq!(known[3..], [3, 4, 5, 6, 7, 8, 9, 10].map(Some));
    }

    #[test]
    fn nearly_all_of_the_newest_are_known_and_nobody_else() {
        let table = StoredResponses::default();
        let hash = |n: usize| StoredResponses::hash(&format!("resp_{n:016x}"));
        (0..100_000).for_each(|n| table.put(hash(n), n % 1000));
        let known = |numbers: std::ops::Range<usize>| {
            let count = numbers.len();
            let found =
                numbers.filter(|&n| table.get(hash(n)).inspect(|id| assert_eq!(*id, n % 1000)).is_some());
            found.count() as f64 / count as f64
        };
        let (near, far, strange) = (known(84_000..100_000), known(68_000..84_000), known(200_000..300_000));
        assert!(near > 0.998 && far > 0.8, "{near} {far}");
        assert!(strange == 0.0, "{strange}");
    }

    #[test]
    fn a_worker_whose_id_does_not_fit_is_not_remembered() {
        let table = StoredResponses::default();
        for worker in [WORKER as usize, usize::MAX] {
            table.put(1, worker);
            assert_eq!(table.get(1), None, "{worker}");
        }
        table.put(1, WORKER as usize - 1);
        assert_eq!(table.get(1), Some(WORKER as usize - 1));
    }

    #[test]
    fn only_what_is_made_here_is_told() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let table = StoredResponses::default();
        let worker = Worker::new(5, "http://a:1".parse().unwrap());
        table.made(1, &worker);
        let ears = told.clone();
        table.tell(move |worker, response| ears.lock().unwrap().push((worker.id(), response)));
        table.made(2, &worker);
        table.put(3, 5);
        assert_eq!(*told.lock().unwrap(), [(5, 2)]);
        assert_eq!([1, 2, 3].map(|response| table.get(response)), [Some(5); 3]);
    }

    #[test]
    fn threads_that_store_at_once_leave_nothing_torn() {
        let table = StoredResponses::default();
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let table = &table;
                scope.spawn(move || {
                    for response in (0..100).flat_map(|_| of_one_bucket(64)) {
                        table.put(response, worker);
                    }
                });
            }
        });
        let known = of_one_bucket(64).filter_map(|response| table.get(response)).collect::<Vec<_>>();
        assert!(
            !known.is_empty() && known.len() <= WAYS && known.iter().all(|worker| *worker < 4),
            "{known:?}"
        );
    }
}
