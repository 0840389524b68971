//! Looking again until it holds.

use std::{
    fmt::Debug,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// How long anything may take before a test gives up: 15 s, times `VLLM_PROXY_TEST_PATIENCE`.
pub(crate) fn patience() -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| {
        std::env::var("VLLM_PROXY_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
    });
    Duration::from_secs(15) * *factor
}

/// The pause between two looks at something that another thread changes.
pub(crate) fn tick() {
    thread::sleep(Duration::from_millis(2));
}

/// Looks until `look` gives something, and returns it.
///
/// # Panics
///
/// When `what` has not happened within [`patience`].
#[track_caller]
pub(crate) fn eventually<T: Found>(what: &str, mut look: impl FnMut() -> T) -> T::Value {
    let deadline = Instant::now() + patience();
    loop {
        match look().found() {
            Ok(value) => return value,
            Err(seen) if Instant::now() > deadline => {
                panic!("within {:?} it did not come true that {what}; last seen: {seen}", patience())
            }
            Err(_) => tick(),
        }
    }
}

/// What a look may return: `bool`, `Option`, or `Result` whose error says what was seen instead.
pub(crate) trait Found {
    /// What is there once it is found.
    type Value;
    /// The value, or what was seen instead.
    fn found(self) -> Result<Self::Value, String>;
}

impl Found for bool {
    type Value = ();
    fn found(self) -> Result<(), String> {
        self.then_some(()).ok_or_else(|| "false".to_owned())
    }
}

impl<T> Found for Option<T> {
    type Value = T;
    fn found(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".to_owned())
    }
}

impl<T, E: Debug> Found for Result<T, E> {
    type Value = T;
    fn found(self) -> Result<T, String> {
        self.map_err(|seen| format!("{seen:?}"))
    }
}
