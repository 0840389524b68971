//! A panic that costs its task only.
//!
//! monoio lets a panic of a task unwind through its run loop, which would end the shard and every connection
//! on it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

/// The task panicked; the panic hook has told where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panicked;

/// Runs `task` to its end or to its panic. A task that panicked must not be polled again.
///
/// # Errors
/// [`Panicked`] if it panicked.
///
/// # Cancellation
/// As `task`.
pub fn contain<F: Future>(task: F) -> Contained<F> {
    Contained { task }
}

pin_project! {
    /// A task whose panic is a value. Written by hand because an `async fn` would hold the task twice.
    #[derive(Debug)]
    pub struct Contained<F> {
        #[pin]
        task: F,
    }
}

impl<F: Future> Future for Contained<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let task = self.project().task;
        match catch_unwind(AssertUnwindSafe(|| task.poll(context))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{pin::pin, task::Waker};

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
