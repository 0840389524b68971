//! A panic that costs its task only.
//!
//! monoio lets a panic of a task unwind through its run loop, which would end the shard and every connection
//! on it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::Poll,
};

/// The task panicked; the panic hook has told where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panicked;

/// Runs `task` to its end or to its panic. A task that panicked is dropped and never polled again.
///
/// # Errors
/// [`Panicked`] if it panicked.
///
/// # Cancellation
/// As `task`.
pub async fn contain<T>(task: impl Future<Output = T>) -> Result<T, Panicked> {
    let mut task = pin!(task);
    std::future::poll_fn(move |context| {
        let task: Pin<&mut _> = task.as_mut();
        match catch_unwind(AssertUnwindSafe(|| task.poll(context))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Waker};

    #[test]
    fn a_panic_becomes_a_value() {
        let mut task = pin!(contain(async { panic!("on purpose") }));
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(task.as_mut().poll(&mut context), Poll::Ready(Err::<(), _>(Panicked)));
    }

    #[test]
    fn a_value_passes() {
        let mut task = pin!(contain(async { 7 }));
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(task.as_mut().poll(&mut context), Poll::Ready(Ok(7)));
    }
}
