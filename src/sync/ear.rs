//! A thread that waits in Redis for what all proxies add, on a connection of its own.
//!
//! The sync thread cannot wait there itself: Redis looks at the clock ten times a second only while it has nothing
//! else to do (measured with 7.0), so that a read which is to wait 20 ms waits 100, and batches would be as late.

use std::{io, thread, time::Duration};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::sync::link::{Entry, Id, Link, PAGE, Trouble};

/// Pages that wait for the sync thread at most, while which no more are read.
const MOST_PAGES: usize = 2;

/// Entries that came together.
#[derive(Debug)]
pub(super) struct Page {
    /// None every now and then, so that the thread notices when nobody listens any more.
    pub(super) entries: Vec<Entry>,
    /// There were no more when it was read.
    pub(super) complete: bool,
}

/// What the thread has read. Dropping it ends the thread, after a quarter of a second at most if Redis answers.
#[derive(Debug)]
pub(super) struct Ear {
    pages: Receiver<Result<Page, Trouble>>,
}

impl Ear {
    /// Begins to read over `link` what is behind the entry `after`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn open(link: Link, after: Id) -> io::Result<Self> {
        let (sender, pages) = bounded(MOST_PAGES);
        thread::Builder::new().name("sync-read".to_owned()).spawn(move || listen(link, after, &sender))?;
        Ok(Self { pages })
    }

    /// The next page; `None`: there was none for so long.
    ///
    /// # Errors
    /// It cannot be read any more.
    pub(super) fn next(&self, wait: Duration) -> Result<Option<Page>, Trouble> {
        match self.pages.recv_timeout(wait) {
            Ok(page) => page.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Trouble("a fault in this proxy".to_owned())),
        }
    }
}

fn listen(mut link: Link, mut last: Id, pages: &Sender<Result<Page, Trouble>>) {
    loop {
        let page = link.read(last).map(|entries| {
            last = entries.last().map_or(last, |entry| entry.id);
            Page { complete: entries.len() < PAGE, entries }
        });
        let failed = page.is_err();
        if pages.send(page).is_err() || failed {
            return;
        }
    }
}
