//! One connection to Redis, and the few commands that are sent over it.
//!
//! Redis is used by XADD, XREAD and XRANGE on one key, PEXPIRE, TIME and CLIENT SETNAME; nothing is read or changed beside that
//! key. Every answer is awaited for a bounded time, and whatever goes wrong ends the connection: what Redis did with
//! the last command is not known then, and nothing depends on it.

use std::{fmt, time::Duration};

use redis::{Client, Connection, ErrorKind, Pipeline, RedisError, Value, pipe};

use crate::{
    base::{Clock, Millis},
    sync::settings::Address,
};

/// The stream of all proxies on a Redis; its name has the version of what is in it.
pub(super) const KEY: &str = "vllm-proxy:1:news";

/// The field of an entry that has the batch.
const FIELD: &str = "b";

/// What connecting may take for each of the server's addresses, and as much again for introducing oneself.
const CONNECT: Duration = Duration::from_secs(1);

/// What Redis may take to accept a command.
const WRITE: Duration = Duration::from_secs(1);

/// The longest that a read waits for news: nobody waits longer for the end of who reads.
const MOST_BLOCK_MS: u64 = 250;

/// What an answer may take, beyond a wait for news.
const READ: Duration = Duration::from_millis(1000 + MOST_BLOCK_MS);

/// What the last words may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// Entries that are read at a time; less than so many means that there are no more.
pub(super) const PAGE: usize = 128;

/// The stream goes when nobody has added to it for so long, in milliseconds.
const LIFE_MS: u64 = 3_600_000;

/// Characters of what Redis says that are repeated.
const MOST_SAID: usize = 200;

/// The id of an entry: milliseconds by the clock of Redis, and a number within them. In the order of the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id {
    pub(super) ms: u64,
    sequence: u64,
}

impl Id {
    fn parse(text: &[u8]) -> Option<Self> {
        let (ms, sequence) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(Self { ms: ms.parse().ok()?, sequence: sequence.parse().ok()? })
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.sequence)
    }
}

/// An entry of the stream.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: Id,
    /// Empty where somebody else has added something else.
    pub(super) batch: Vec<u8>,
}

/// Why Redis cannot be used, in words; without secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble(pub(super) String);

impl From<RedisError> for Trouble {
    fn from(error: RedisError) -> Self {
        let text = match error.kind() {
            _ if error.is_timeout() => "no answer in time".to_owned(),
            // the client hides what the server said of it
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => return Self::nonsense(),
            ErrorKind::AuthenticationFailed => "user or password is refused".to_owned(),
            _ => match error.code() {
                Some(code @ "WRONGTYPE") => format!("{code} the key {KEY} is something else"),
                Some(code) => format!("{code} {}", error.detail().unwrap_or_default()),
                None => error.to_string(),
            },
        };
        Self(text.chars().take(MOST_SAID).collect())
    }
}

impl Trouble {
    fn nonsense() -> Self {
        Self("it answers what a Redis would not".to_owned())
    }
}

/// What time it is where ids come from. Clocks run apart, by seconds a day, and that of Redis may be set back: then ids
/// stand still until it has caught up. So this one is set anew by every id that is known to be of this moment.
#[derive(Debug, Clone, Copy)]
struct RedisClock {
    /// What it said at `here`, in milliseconds.
    there: u64,
    here: Millis,
}

impl RedisClock {
    /// How long ago something was given this id, in milliseconds; 0 for what seems to come from the future.
    fn age_ms(self, now: Millis, id: Id) -> u64 {
        self.there.saturating_add(now.saturating_sub(self.here)).saturating_sub(id.ms)
    }
}

/// A connection to a Redis that has answered.
pub(super) struct Link {
    connection: Connection,
    clock: Clock,
    redis_clock: RedisClock,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("redis_clock", &self.redis_clock).finish_non_exhaustive()
    }
}

impl Link {
    /// Connects, says who we are and asks what time it is there.
    ///
    /// # Errors
    /// The name has no address, nobody listens, or Redis refuses us.
    pub(super) fn open(address: &Address, clock: Clock) -> Result<Self, Trouble> {
        let connection = Client::open(address.info.clone())?.get_connection_with_timeout(CONNECT)?;
        connection.set_read_timeout(Some(CONNECT))?;
        connection.set_write_timeout(Some(WRITE))?;
        let redis_clock = RedisClock { there: 0, here: 0 };
        let mut link = Self { connection, clock, redis_clock };
        let mut introduction = pipe();
        introduction.cmd("CLIENT").arg("SETNAME").arg("vllm-proxy").cmd("TIME");
        let [_named, time] = link.answers(&introduction)?;
        let Value::Array(time) = accepted(time)? else { return Err(Trouble::nonsense()) };
        let number = |at: usize| match time.get(at) {
            Some(Value::BulkString(text)) => std::str::from_utf8(text).ok()?.parse::<u64>().ok(),
            _ => None,
        };
        let (Some(seconds), Some(micros)) = (number(0), number(1)) else { return Err(Trouble::nonsense()) };
        let there = seconds.saturating_mul(1000).saturating_add(micros / 1000);
        link.redis_clock = RedisClock { there, here: clock.millis() };
        link.connection.set_read_timeout(Some(READ))?;
        Ok(link)
    }

    /// How long ago an entry was added, in milliseconds, by the clock of Redis alone; 0 for what seems to come from
    /// the future.
    pub(super) fn age_ms(&self, now: Millis, id: Id) -> u64 {
        self.redis_clock.age_ms(now, id)
    }

    /// Adds batches to the stream, which is cut to about so many entries, and `create`d if it is not there. Returns the
    /// last one's id; `None`: there is no stream, and nothing was added.
    pub(super) fn add(
        &mut self,
        batches: &[Vec<u8>],
        entries: u64,
        create: bool,
    ) -> Result<Option<Id>, Trouble> {
        let mut last = None;
        for batch in batches {
            let mut command = pipe();
            let command = command.cmd("XADD").arg(KEY);
            if !create {
                command.arg("NOMKSTREAM");
            }
            command.arg("MAXLEN").arg("~").arg(entries).arg("*").arg(FIELD).arg(&batch[..]);
            self.connection.send_packed_command(&command.get_packed_pipeline())?;
        }
        for _ in batches {
            last = match accepted(self.connection.recv_response()?)? {
                Value::Nil => None,
                Value::BulkString(id) => Some(Id::parse(&id).ok_or_else(Trouble::nonsense)?),
                _ => return Err(Trouble::nonsense()),
            };
        }
        if let Some(id) = last {
            self.redis_clock = RedisClock { there: id.ms, here: self.clock.millis() };
        }
        Ok(last)
    }

    /// Whether the stream has this entry.
    pub(super) fn has(&mut self, id: Id) -> Result<bool, Trouble> {
        let (mut command, id) = (pipe(), id.to_string());
        command.cmd("XRANGE").arg(KEY).arg(&id).arg(&id).arg("COUNT").arg(1);
        let [found] = self.answers(&command)?;
        array(accepted(found)?).map(|found| !found.is_empty()).ok_or_else(Trouble::nonsense)
    }

    /// Lets the stream live on.
    pub(super) fn keep(&mut self) -> Result<(), Trouble> {
        let mut command = pipe();
        command.cmd("PEXPIRE").arg(KEY).arg(LIFE_MS);
        let [kept] = self.answers(&command)?;
        accepted(kept).map(drop)
    }

    /// The entries behind `after`, at most [`PAGE`]; waits [`MOST_BLOCK_MS`] for one to come.
    pub(super) fn read(&mut self, after: Id) -> Result<Vec<Entry>, Trouble> {
        let mut command = pipe();
        command.cmd("XREAD").arg("COUNT").arg(PAGE).arg("BLOCK").arg(MOST_BLOCK_MS);
        command.arg("STREAMS").arg(KEY).arg(after.to_string());
        let [read] = self.answers(&command)?;
        entries(accepted(read)?).ok_or_else(Trouble::nonsense)
    }

    /// Adds the last batches of all, and waits only shortly for an answer.
    pub(super) fn farewell(mut self, batches: &[Vec<u8>], entries: u64) -> Result<(), Trouble> {
        self.connection.set_write_timeout(Some(FAREWELL / 2))?;
        self.connection.set_read_timeout(Some(FAREWELL / 2))?;
        self.add(batches, entries, false).map(drop)
    }

    /// Sends commands and takes their answers; the first that does not come is the last that is waited for.
    fn answers<const N: usize>(&mut self, commands: &Pipeline) -> Result<[Value; N], Trouble> {
        self.connection.send_packed_command(&commands.get_packed_pipeline())?;
        let mut answers = [const { Value::Nil }; N];
        for answer in &mut answers {
            *answer = self.connection.recv_response()?;
        }
        Ok(answers)
    }
}

/// An answer that is no refusal.
fn accepted(answer: Value) -> Result<Value, Trouble> {
    match answer {
        Value::ServerError(error) => Err(RedisError::from(error).into()),
        answer => Ok(answer),
    }
}

/// What XREAD of one stream answers: nothing, or an array of streams, each a name and an array of entries, each an id
/// and an array of fields and values.
fn entries(answer: Value) -> Option<Vec<Entry>> {
    let streams = match answer {
        Value::Nil => return Some(Vec::new()),
        answer => array(answer)?,
    };
    let [_name, entries] = <[Value; 2]>::try_from(array(streams.into_iter().next()?)?).ok()?;
    array(entries)?.into_iter().map(entry).collect()
}

fn entry(value: Value) -> Option<Entry> {
    let [id, fields] = <[Value; 2]>::try_from(array(value)?).ok()?;
    let id = Id::parse(&bytes(id)?)?;
    // an entry that was deleted while it was read has no fields
    let fields = array(fields).unwrap_or_default();
    let mut batch = Vec::new();
    let mut fields = fields.into_iter();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        if bytes(name)? == FIELD.as_bytes() {
            batch = bytes(value)?;
        }
    }
    Some(Entry { id, batch })
}

fn array(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(values) => Some(values),
        _ => None,
    }
}

fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    fn list(values: impl IntoIterator<Item = Value>) -> Value {
        Value::Array(values.into_iter().collect())
    }

    fn stream(entries: impl IntoIterator<Item = Value>) -> Value {
        list([list([text(KEY), list(entries)])])
    }

    #[test]
    fn entries_are_read_with_or_without_a_batch() {
        let ours = list([text("17-2"), list([text("x"), text("1"), text("b"), text("batch")])]);
        let foreign = list([text("18-0"), list([text("x"), text("1")])]);
        let deleted = list([text("18-1"), Value::Nil]);
        let found = entries(stream([ours, foreign, deleted])).unwrap();
        let shown: Vec<_> = found.iter().map(|entry| (entry.id.to_string(), &entry.batch[..])).collect();
        assert_eq!(shown, [("17-2".into(), &b"batch"[..]), ("18-0".into(), b""), ("18-1".into(), b"")]);
        assert!(entries(Value::Nil).unwrap().is_empty());
    }

    #[test]
    fn what_no_redis_answers_is_no_entry() {
        for answer in [
            Value::Int(1),
            list([]),
            list([list([text(KEY)])]),
            list([list([text(KEY), Value::Int(1)])]),
            stream([Value::Nil]),
            stream([list([text("17"), list([])])]),
            stream([list([text("17-x"), list([])])]),
            stream([list([Value::Int(1), list([])])]),
            stream([list([text("17-1"), list([Value::Int(1), text("b")])])]),
        ] {
            let shown = format!("{answer:?}");
            assert!(entries(answer).is_none(), "{shown}");
        }
    }

    #[test]
    fn ids_have_the_order_of_the_stream() {
        let id = |text: &str| Id::parse(text.as_bytes()).unwrap();
        assert!(id("9-9") < id("10-0") && id("10-9") < id("10-10") && Id::default() < id("0-1"));
        assert_eq!(id("1700000000000-3").to_string(), "1700000000000-3");
    }

    #[test]
    fn an_entry_is_as_old_as_the_clock_of_redis_says() {
        let id = |ms| Id { ms, sequence: 0 };
        let mut clock = RedisClock { there: 1_000_000, here: 50 };
        assert_eq!([clock.age_ms(50, id(999_000)), clock.age_ms(250, id(999_000))], [1000, 1200]);
        assert_eq!([clock.age_ms(60, id(1_000_020)), clock.age_ms(60, id(u64::MAX))], [0, 0]);
        assert_eq!(clock.age_ms(u64::MAX, id(0)), u64::MAX);
        // a day later that clock is four seconds behind ours, or was set back by an hour and its ids stand still
        let day = 86_400_000;
        for there in [1_000_000 + day - 4000, 1_000_000] {
            assert!(clock.age_ms(50 + day, id(there)) >= 4000);
            clock = RedisClock { there, here: 50 + day };
            assert_eq!(clock.age_ms(60 + day, id(there)), 10);
            clock = RedisClock { there: 1_000_000, here: 50 };
        }
    }

    #[test]
    fn what_redis_says_is_repeated_in_bounds() {
        let error = RedisError::from((ErrorKind::Client, "says", "x".repeat(9999)));
        assert_eq!(Trouble::from(error).0.len(), MOST_SAID);
        let late = RedisError::from(std::io::Error::from(std::io::ErrorKind::WouldBlock));
        assert_eq!(Trouble::from(late).0, "no answer in time");
    }
}
