//! What is said of Redis, and when: one line for every change, and nothing while all stays as it is.

use crate::base::Millis;

/// Reasons that are told of one absence, so that a server that fails in turns does not fill the log.
const MOST_REASONS: usize = 8;

/// Whether Redis is in use, and what was said of it.
#[derive(Debug)]
pub(super) struct Standing {
    /// Somebody says that it is there.
    expected: bool,
    /// It was in use once.
    known: bool,
    /// Other proxies were heard when it was lost.
    company: bool,
    now: Now,
}

#[derive(Debug)]
enum Now {
    /// It is in use.
    Up,
    /// It is not, since then.
    Down {
        since: Millis,
        /// Why not, as far as it was said.
        said: Vec<String>,
    },
}

/// What is to be logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It is in use for the first time.
    Found,
    /// It is in use again.
    Back {
        /// For how long it was not.
        away_ms: u64,
    },
    /// It cannot be used any more.
    Lost,
    /// It cannot be used, as before, but for another reason; or it is expected, and could not be used yet.
    Missing,
    /// It is not there, and nobody said that it would be.
    Nobody,
}

impl Standing {
    pub(super) fn new(expected: bool, now: Millis) -> Self {
        Self { expected, known: false, company: false, now: Now::Down { since: now, said: Vec::new() } }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.now, Now::Up)
    }

    /// Whether there may be other proxies of which nothing is heard: there were, or it could never be used although
    /// somebody says that it is there.
    pub(super) fn is_alone(&self) -> bool {
        !self.is_up() && (self.company || self.expected && !self.known)
    }

    /// So many other proxies were heard of late.
    pub(super) fn hears(&mut self, peers: u64) {
        self.company |= peers > 0;
    }

    /// It has taken what was to be told, and has answered.
    pub(super) fn works(&mut self, now: Millis) -> Option<News> {
        let Now::Down { since, .. } = self.now else { return None };
        let first = !std::mem::replace(&mut self.known, true);
        self.now = Now::Up;
        Some(if first { News::Found } else { News::Back { away_ms: now.saturating_sub(since) } })
    }

    /// It cannot be used, for this reason.
    pub(super) fn fails(&mut self, now: Millis, reason: &str) -> Option<News> {
        let Now::Down { said, .. } = &mut self.now else {
            self.now = Now::Down { since: now, said: vec![reason.to_owned()] };
            return Some(News::Lost);
        };
        if said.len() >= MOST_REASONS || said.iter().any(|known| known == reason) {
            return None;
        }
        let first = said.is_empty();
        said.push(reason.to_owned());
        match (self.expected || self.known, first) {
            (true, _) => Some(News::Missing),
            (false, true) => Some(News::Nobody),
            (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_told_once() {
        let mut redis = Standing::new(true, 0);
        assert_eq!(redis.works(5), Some(News::Found));
        assert_eq!(redis.works(10), None);
        assert_eq!(redis.fails(20, "reset"), Some(News::Lost));
        assert_eq!(redis.fails(30, "reset"), None);
        assert_eq!(redis.works(120), Some(News::Back { away_ms: 100 }));
        assert_eq!(redis.fails(130, "reset"), Some(News::Lost), "a new loss is told anew");
    }

    #[test]
    fn another_reason_is_told_once_in_an_absence() {
        let mut redis = Standing::new(true, 0);
        assert_eq!(redis.fails(1, "refused"), Some(News::Missing));
        assert_eq!(redis.fails(2, "loading"), Some(News::Missing));
        assert_eq!([redis.fails(3, "refused"), redis.fails(4, "loading")], [None, None], "in turns");
        let told = (0..100).filter(|n| redis.fails(5, &n.to_string()).is_some()).count();
        assert_eq!(told, MOST_REASONS - 2);
    }

    #[test]
    fn who_finds_nobody_where_nobody_was_said_to_be_is_not_alone() {
        let mut redis = Standing::new(false, 0);
        assert_eq!(redis.fails(1, "refused"), Some(News::Nobody));
        assert_eq!(redis.fails(2, "timeout"), None);
        assert!(!redis.is_alone());
        assert_eq!(redis.works(3), Some(News::Found));
        assert_eq!(redis.fails(4, "refused"), Some(News::Lost));
        assert!(!redis.is_alone(), "nobody else was there");
        redis.works(5);
        redis.hears(1);
        redis.hears(0);
        assert!(!redis.is_alone());
        redis.fails(6, "refused");
        assert!(redis.is_alone(), "there were others, so there may be");
    }

    #[test]
    fn who_was_told_of_a_redis_is_alone_without_it() {
        let mut redis = Standing::new(true, 0);
        assert!(redis.is_alone() && !redis.is_up());
        assert_eq!(redis.works(3), Some(News::Found));
        assert!(!redis.is_alone() && redis.is_up());
        redis.fails(4, "reset");
        assert!(!redis.is_alone(), "there it was by itself");
    }
}
