//! How a batch is written, and read with suspicion.
//!
//! ```text
//! batch:  version (1 byte)   flags (1)   instance (8)   sequence (varint)   records …
//! record: kind (1 byte) and, by kind:
//!   worker   its key (8); it is known by its number among the workers of the batch from here on
//!   load     worker   requests   queued tokens   decode tokens   state (1)   losses
//!   sent     worker   density (1)   count   chunks (6 each)                  a prompt that is told from its beginning
//!   more     worker   density (1)   parent (6)   count   chunks (6 each)     one whose beginning was told before
//!   ended    worker   density (1)   last chunk (6)   generated chunks
//!   stored   worker   hash of the response's id (8)
//!   slots    held   wanted
//! ```
//!
//! Numbers of which nothing else is said are varints (LEB128), what has a fixed size is little-endian. Whatever
//! is read is made small enough to be harmless; where a record cannot be read the rest of its batch cannot either.

use crate::{
    routing::{CHUNK_BITS, Density, MAX_CHUNKS, STRIDE},
    sync::Claim,
    workers::{BreakerState, Health, Load, Rest, Worker},
};

/// Version of the encoding; others are not read.
pub(super) const VERSION: u8 = 1;

/// Bytes of a batch at most: the largest prompt fits ([`MOST_CHUNKS`]), beside [`LOADS_BYTES`] of other records.
pub(super) const MOST_BYTES: usize = 64 * 1024;

/// Bytes of a batch that loads may take.
pub(super) const LOADS_BYTES: usize = 12 * 1024;

/// Chunks of a prompt that are told at most.
pub(super) const MOST_CHUNKS: usize = MAX_CHUNKS.div_ceil(STRIDE);

/// Requests that a proxy can have in flight on a worker. Who tells of more has miscounted (below zero, most likely), and
/// is taken to have none: to believe in so many would keep everybody away from the worker.
const MOST_REQUESTS: u64 = 1 << 20;

/// Tokens of them, of which the same holds.
const MOST_TOKENS: u64 = 1 << 40;

const CHUNK: usize = CHUNK_BITS as usize / 8;

const _: () =
    assert!(CHUNK == 6 && STRIDE <= 4 && Density::MOST_QUARTERS < 64, "the encoding has room for so much");

/// Bytes of a varint at most.
const VARINT: usize = 10;

/// Bytes of a record at most, without a prompt's chunks and with the record that names its worker.
const RECORD: usize = 1 + 8 + 1 + 2 * VARINT + 2 * VARINT + 2;

const BEGINS_ANEW: u8 = 1;
const FAREWELL: u8 = 2;

const WORKER: u8 = 1;
const LOAD: u8 = 2;
const SENT: u8 = 3;
const MORE: u8 = 4;
const ENDED: u8 = 5;
const STORED: u8 = 6;
const SLOTS: u8 = 7;

/// What a batch begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// What was told before is not in the stream any more: no prompt that was told before it is known.
    pub(super) begins_anew: bool,
    /// It is the last batch of this instance.
    pub(super) farewell: bool,
    /// Who tells.
    pub(super) instance: u64,
    /// Grows by one with every batch of the instance.
    pub(super) sequence: u64,
}

/// What a proxy thinks of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    pub(super) health: Health,
    pub(super) rest: Option<Rest>,
    pub(super) breaker: BreakerState,
}

impl State {
    pub(super) fn of(worker: &Worker) -> Self {
        Self { health: worker.health(), rest: worker.rest(), breaker: worker.breaker().state() }
    }

    fn to_byte(self) -> u8 {
        self.health as u8 | self.rest.map_or(0, |rest| rest as u8) << 2 | (self.breaker as u8) << 4
    }

    /// Any byte says something: bits that are not known here are none.
    fn of_byte(byte: u8) -> Self {
        let health = match byte & 3 {
            1 => Health::Up,
            2 => Health::Down,
            3 => Health::Ejected,
            _ => Health::Unknown,
        };
        let rest = match byte >> 2 & 3 {
            1 => Some(Rest::Asleep),
            2 => Some(Rest::Paused),
            _ => None,
        };
        let breaker = match byte >> 4 & 3 {
            1 => BreakerState::Open,
            2 => BreakerState::HalfOpen,
            _ => BreakerState::Closed,
        };
        Self { health, rest, breaker }
    }
}

/// One thing that is told. A worker is known by its number among those of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// [`Worker::key`] of the next worker of the batch.
    Worker(u64),
    /// What the instance has running on it and thinks of it, and how often it has seen its cache lost, modulo 2³².
    Load { worker: usize, load: Load, state: State, losses: u32 },
    /// A prompt was sent to it. `parent`: the last chunk of what was told before; `None`: it is told whole.
    Sent { worker: usize, density: Density, parent: Option<u64>, chunks: Chunks<'a> },
    /// The request of a prompt has ended.
    Ended { worker: usize, density: Density, last: u64, generated: u32 },
    /// It has stored a response.
    Stored { worker: usize, response: u64 },
    /// What the instance claims of the common limit.
    Slots(Claim),
}

/// Chunks as they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunks<'a>(&'a [[u8; CHUNK]]);

impl Chunks<'_> {
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = u64> {
        self.0.iter().map(|chunk| chunk_of(*chunk))
    }
}

fn chunk_of(bytes: [u8; CHUNK]) -> u64 {
    let mut wide = [0; 8];
    for (to, from) in wide.iter_mut().zip(bytes) {
        *to = from;
    }
    // 0 stands for none elsewhere, and no chunk is
    u64::from_le_bytes(wide).max(1)
}

fn density_byte(density: Density) -> u8 {
    let quarters = density.quarter_bytes.clamp(1, Density::MOST_QUARTERS);
    (quarters << 2) | (density.tail.clamp(1, STRIDE as u8) - 1)
}

fn density_of(byte: u8) -> Density {
    Density { quarter_bytes: (byte >> 2).max(1), tail: (byte & 3) + 1 }
}

/// A batch that is being written. What would make it longer than [`MOST_BYTES`] is not taken.
#[derive(Debug)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    /// Length of the header.
    begun: usize,
    /// By the worker's position in the fleet: its number in the batch, plus one; 0: it has none.
    numbers: Vec<u32>,
    named: u32,
}

impl Writer {
    /// One that tells of workers at positions below `workers`.
    pub(super) fn new(header: Header, workers: usize) -> Self {
        let begins_anew = if header.begins_anew { BEGINS_ANEW } else { 0 };
        let farewell = if header.farewell { FAREWELL } else { 0 };
        let mut bytes = vec![VERSION, begins_anew | farewell];
        bytes.extend(header.instance.to_le_bytes());
        let mut writer = Self { bytes, begun: 0, numbers: vec![0; workers], named: 0 };
        writer.number(header.sequence);
        writer.begun = writer.bytes.len();
        writer
    }

    /// Whether it tells nothing but that the instance is there.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.len() == self.begun
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// Takes in a load unless loads take too much room already.
    pub(super) fn load(&mut self, at: (usize, u64), load: Load, state: State, losses: u32) -> bool {
        if self.bytes.len() + RECORD > LOADS_BYTES || !self.begin(LOAD, at, 0) {
            return false;
        }
        self.number(load.in_flight.into());
        self.number(load.queued_tokens);
        self.number(load.decode_tokens);
        self.bytes.push(state.to_byte());
        self.number(losses.into());
        true
    }

    /// Takes in a prompt unless it does not fit. Of one that is too long to fit anywhere, its beginning.
    pub(super) fn sent(
        &mut self,
        at: (usize, u64),
        density: Density,
        parent: Option<u64>,
        chunks: &[u64],
    ) -> bool {
        let told = chunks.get(..MOST_CHUNKS).unwrap_or(chunks);
        if !self.begin(if parent.is_some() { MORE } else { SENT }, at, told.len() * CHUNK) {
            return false;
        }
        let tail = if told.len() < chunks.len() { STRIDE as u8 } else { density.tail };
        self.bytes.push(density_byte(Density { tail, ..density }));
        if let Some(parent) = parent {
            self.chunk(parent);
        }
        self.number(told.len() as u64);
        told.iter().for_each(|&chunk| self.chunk(chunk));
        true
    }

    pub(super) fn ended(&mut self, at: (usize, u64), density: Density, last: u64, generated: u32) -> bool {
        if !self.begin(ENDED, at, 0) {
            return false;
        }
        self.bytes.push(density_byte(density));
        self.chunk(last);
        self.number(generated.into());
        true
    }

    pub(super) fn stored(&mut self, at: (usize, u64), response: u64) -> bool {
        if !self.begin(STORED, at, 0) {
            return false;
        }
        self.bytes.extend(response.to_le_bytes());
        true
    }

    /// The first record, so that it always fits.
    pub(super) fn slots(&mut self, claim: Claim) {
        debug_assert!(self.is_empty(), "there may be no room any more");
        self.bytes.push(SLOTS);
        self.number(claim.held.into());
        self.number(claim.wanted.into());
    }

    /// Begins a record of the worker at a position, with a key; false if there is no room.
    fn begin(&mut self, kind: u8, (position, key): (usize, u64), chunk_bytes: usize) -> bool {
        let Some(number) = self.numbers.get_mut(position) else { return false };
        if self.bytes.len() + RECORD + chunk_bytes > MOST_BYTES {
            return false;
        }
        if *number == 0 {
            self.named += 1;
            *number = self.named;
            self.bytes.push(WORKER);
            self.bytes.extend(key.to_le_bytes());
        }
        let number = u64::from(*number - 1);
        self.bytes.push(kind);
        self.number(number);
        true
    }

    fn chunk(&mut self, chunk: u64) {
        let [a, b, c, d, e, f, ..] = chunk.to_le_bytes();
        self.bytes.extend([a, b, c, d, e, f]);
    }

    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }
}

/// Why something cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// It is of another version.
    Version,
    /// It is no batch, or broken from here on.
    Malformed,
}

/// A batch that is being read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Begins to read.
    ///
    /// # Errors
    ///
    /// If it is no batch of this version.
    pub(super) fn open(batch: &'a [u8]) -> Result<(Header, Self), Unreadable> {
        let (&version, rest) = batch.split_first().ok_or(Unreadable::Malformed)?;
        if version != VERSION {
            return Err(Unreadable::Version);
        }
        if batch.len() > MOST_BYTES {
            return Err(Unreadable::Malformed);
        }
        let mut reader = Self { rest };
        let flags = reader.byte()?;
        let header = Header {
            begins_anew: flags & BEGINS_ANEW != 0,
            farewell: flags & FAREWELL != 0,
            instance: u64::from_le_bytes(reader.array()?),
            sequence: reader.number()?,
        };
        Ok((header, reader))
    }

    /// The next record; `None` at the end.
    ///
    /// # Errors
    ///
    /// If it cannot be read; then nothing behind it can.
    pub(super) fn next(&mut self) -> Result<Option<Record<'a>>, Unreadable> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let record = match self.byte()? {
            WORKER => Record::Worker(u64::from_le_bytes(self.array()?)),
            LOAD => Record::Load {
                worker: self.worker()?,
                load: Load {
                    in_flight: self.number_to(MOST_REQUESTS)? as u32,
                    queued_tokens: self.number_to(MOST_TOKENS)?,
                    decode_tokens: self.number_to(MOST_TOKENS)?,
                },
                state: State::of_byte(self.byte()?),
                losses: self.small()?,
            },
            kind @ (SENT | MORE) => Record::Sent {
                worker: self.worker()?,
                density: density_of(self.byte()?),
                parent: if kind == MORE { Some(chunk_of(self.array()?)) } else { None },
                chunks: self.chunks()?,
            },
            ENDED => Record::Ended {
                worker: self.worker()?,
                density: density_of(self.byte()?),
                last: chunk_of(self.array()?),
                generated: self.small()?,
            },
            STORED => Record::Stored { worker: self.worker()?, response: u64::from_le_bytes(self.array()?) },
            SLOTS => Record::Slots(Claim { held: self.small()?, wanted: self.small()? }),
            _ => return Err(Unreadable::Malformed),
        };
        Ok(Some(record))
    }

    fn worker(&mut self) -> Result<usize, Unreadable> {
        usize::try_from(self.number()?).map_err(|_| Unreadable::Malformed)
    }

    fn chunks(&mut self) -> Result<Chunks<'a>, Unreadable> {
        let count = usize::try_from(self.number()?).ok().filter(|count| *count <= MOST_CHUNKS);
        let bytes = count.ok_or(Unreadable::Malformed)? * CHUNK;
        let (chunks, rest) = self.rest.split_at_checked(bytes).ok_or(Unreadable::Malformed)?;
        self.rest = rest;
        Ok(Chunks(chunks.as_chunks().0))
    }

    /// A number that is at most so large, else 0.
    fn number_to(&mut self, most: u64) -> Result<u64, Unreadable> {
        self.number().map(|number| if number <= most { number } else { 0 })
    }

    /// A number that is cut where it does not fit.
    fn small(&mut self) -> Result<u32, Unreadable> {
        self.number().map(|number| u32::try_from(number).unwrap_or(u32::MAX))
    }

    fn number(&mut self) -> Result<u64, Unreadable> {
        let mut number = 0;
        for at in 0..VARINT as u32 {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            // the tenth has one bit
            if at == VARINT as u32 - 1 && bits > 1 {
                return Err(Unreadable::Malformed);
            }
            number |= bits << (7 * at);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Unreadable::Malformed)
    }

    fn byte(&mut self) -> Result<u8, Unreadable> {
        let (&byte, rest) = self.rest.split_first().ok_or(Unreadable::Malformed)?;
        self.rest = rest;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(Unreadable::Malformed)?;
        self.rest = rest;
        Ok(*array)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// A record that owns what it says; of the worker at a position, whose key is that as well.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Said {
        Load(usize, Load, u8, u32),
        Sent(usize, Density, Option<u64>, Vec<u64>),
        Ended(usize, Density, u64, u32),
        Stored(usize, u64),
    }

    fn said() -> impl Strategy<Value = Said> {
        let chunk = || 1..1_u64 << CHUNK_BITS;
        let worker = || 0..200_usize;
        let density = || (1..=Density::MOST_QUARTERS, 1..=STRIDE as u8);
        let density = move || density().prop_map(|(quarter_bytes, tail)| Density { quarter_bytes, tail });
        let load = (0..=MOST_REQUESTS as u32, 0..=MOST_TOKENS, 0..=MOST_TOKENS).prop_map(
            |(in_flight, queued_tokens, decode_tokens)| Load { in_flight, queued_tokens, decode_tokens },
        );
        prop_oneof![
            (worker(), load, 0..64_u8, any::<u32>()).prop_map(|(at, load, state, losses)| {
                Said::Load(at, load, State::of_byte(state).to_byte(), losses)
            }),
            (worker(), density(), proptest::option::of(chunk()), vec(chunk(), 0..40))
                .prop_map(|(at, density, parent, chunks)| Said::Sent(at, density, parent, chunks)),
            (worker(), density(), chunk(), any::<u32>())
                .prop_map(|(at, density, last, generated)| Said::Ended(at, density, last, generated)),
            (worker(), any::<u64>()).prop_map(|(at, response)| Said::Stored(at, response)),
        ]
    }

    fn header() -> impl Strategy<Value = Header> {
        any::<(bool, bool, u64, u64)>().prop_map(|(begins_anew, farewell, instance, sequence)| Header {
            begins_anew,
            farewell,
            instance,
            sequence,
        })
    }

    fn write(batch: &mut Writer, said: &Said) -> bool {
        let at = |position: &usize| (*position, *position as u64);
        match said {
            Said::Load(worker, load, state, losses) => {
                batch.load(at(worker), *load, State::of_byte(*state), *losses)
            }
            Said::Sent(worker, density, parent, chunks) => batch.sent(at(worker), *density, *parent, chunks),
            Said::Ended(worker, density, last, generated) => {
                batch.ended(at(worker), *density, *last, *generated)
            }
            Said::Stored(worker, response) => batch.stored(at(worker), *response),
        }
    }

    /// Everything in a batch until its end or what cannot be read, and which it was.
    fn read(mut reader: Reader<'_>) -> (Option<Claim>, Vec<Said>, Result<(), Unreadable>) {
        let (mut workers, mut slots, mut all) = (Vec::new(), None, Vec::new());
        let at =
            |workers: &Vec<u64>, number: usize| workers.get(number).map_or(usize::MAX, |&key| key as usize);
        loop {
            match reader.next() {
                Ok(None) => return (slots, all, Ok(())),
                Err(unreadable) => return (slots, all, Err(unreadable)),
                Ok(Some(Record::Worker(key))) => workers.push(key),
                Ok(Some(Record::Slots(claim))) => slots = Some(claim),
                Ok(Some(Record::Load { worker, load, state, losses })) => {
                    all.push(Said::Load(at(&workers, worker), load, state.to_byte(), losses));
                }
                Ok(Some(Record::Sent { worker, density, parent, chunks })) => {
                    all.push(Said::Sent(at(&workers, worker), density, parent, chunks.iter().collect()));
                }
                Ok(Some(Record::Ended { worker, density, last, generated })) => {
                    all.push(Said::Ended(at(&workers, worker), density, last, generated));
                }
                Ok(Some(Record::Stored { worker, response })) => {
                    all.push(Said::Stored(at(&workers, worker), response));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_as_the_same(
            header in header(),
            claim in proptest::option::of(any::<(u32, u32)>()),
            records in vec(said(), 0..60),
        ) {
            let mut batch = Writer::new(header, 200);
            prop_assert!(batch.is_empty());
            let claim = claim.map(|(held, wanted)| Claim { held, wanted });
            claim.into_iter().for_each(|claim| batch.slots(claim));
            records.iter().for_each(|said| assert!(write(&mut batch, said)));
            prop_assert_eq!(batch.is_empty(), records.is_empty() && claim.is_none());
            let bytes = batch.finish();
            let (found, reader) = Reader::open(&bytes).unwrap();
            prop_assert_eq!(found, header);
            prop_assert_eq!(read(reader), (claim, records.clone(), Ok(())));
            // what is cut off somewhere says what it said up to there
            let cut = Reader::open(&bytes[..bytes.len() / 2]);
            if let Ok((found, reader)) = cut {
                prop_assert_eq!(found, header);
                prop_assert_eq!(&read(reader).1[..], &records[..read(reader).1.len()]);
            }
        }

        #[test]
        fn any_bytes_are_read_to_an_end_and_say_nothing_absurd(bytes in vec(any::<u8>(), 0..300)) {
            let bytes = [&[VERSION, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9][..], &bytes].concat();
            let (_, all, _) = read(Reader::open(&bytes).unwrap().1);
            for said in all {
                let harmless = match said {
                    Said::Load(_, load, state, _) => {
                        u64::from(load.in_flight) <= MOST_REQUESTS
                            && load.queued_tokens.max(load.decode_tokens) <= MOST_TOKENS
                            && state < 64
                    }
                    Said::Sent(_, density, parent, chunks) => {
                        density.quarter_bytes >= 1
                            && parent != Some(0)
                            && chunks.len() <= bytes.len() / CHUNK
                            && chunks.iter().all(|&chunk| chunk > 0 && chunk >> CHUNK_BITS == 0)
                    }
                    Said::Ended(_, density, last, _) => density.tail <= STRIDE as u8 && last > 0,
                    Said::Stored(..) => true,
                };
                prop_assert!(harmless);
            }
        }
    }

    const HEADER: Header = Header { begins_anew: false, farewell: false, instance: 7, sequence: 300 };

    #[test]
    fn the_encoding_is_what_others_read() {
        let mut batch = Writer::new(Header { farewell: true, begins_anew: true, ..HEADER }, 9);
        batch.slots(Claim { held: 5, wanted: 130 });
        let state = State { health: Health::Down, rest: Some(Rest::Paused), breaker: BreakerState::Open };
        let density = Density { quarter_bytes: 16, tail: 2 };
        let load = Load { in_flight: 2, queued_tokens: 128, decode_tokens: 3 };
        assert!(batch.load((8, 0x0102), load, state, 6));
        assert!(batch.sent((8, 0x0102), density, None, &[0xa1b2]));
        assert!(batch.sent((8, 0x0102), density, Some(1), &[]));
        assert!(batch.ended((8, 0x0102), density, 2, 3) && batch.stored((8, 0x0102), 4));
        let expected = [
            &[1, 3, 7, 0, 0, 0, 0, 0, 0, 0, 0xac, 2][..],
            &[7, 5, 0x82, 1],
            &[1, 2, 1, 0, 0, 0, 0, 0, 0],
            &[2, 0, 2, 0x80, 1, 3, 2 | 2 << 2 | 1 << 4, 6],
            &[3, 0, 16 << 2 | 1, 1, 0xb2, 0xa1, 0, 0, 0, 0],
            &[4, 0, 16 << 2 | 1, 1, 0, 0, 0, 0, 0, 0],
            &[5, 0, 16 << 2 | 1, 2, 0, 0, 0, 0, 0, 3],
            &[6, 0, 4, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(batch.finish(), expected.concat());
    }

    #[test]
    fn a_batch_has_an_end_and_the_longest_prompt_fits_beside_loads() {
        let density = Density { quarter_bytes: 16, tail: 2 };
        let worst = Load { in_flight: u32::MAX, queued_tokens: u64::MAX, decode_tokens: u64::MAX };
        let mut batch = Writer::new(Header { instance: u64::MAX, sequence: u64::MAX, ..HEADER }, 1_000_000);
        batch.slots(Claim { held: u32::MAX, wanted: u32::MAX });
        let state = State::of_byte(0);
        let loads = (0..).take_while(|&at| batch.load((at, u64::MAX), worst, state, u32::MAX)).count();
        assert!((200..400).contains(&loads), "{loads}");
        let longest = vec![u64::MAX; MOST_CHUNKS + 5];
        assert!(batch.sent((999_999, 1), density, Some(u64::MAX), &longest));
        let ended = (0..).take_while(|&at| batch.ended((at, 1), density, u64::MAX, u32::MAX)).count();
        assert!((50..400).contains(&ended), "{ended}");
        let bytes = batch.finish();
        assert!(bytes.len() <= MOST_BYTES);
        let (_, all, end) = read(Reader::open(&bytes).unwrap().1);
        assert_eq!((all.len(), end), (loads + 1 + ended, Ok(())));
        let Said::Sent(_, density, _, chunks) = &all[loads] else { panic!("{:?}", all[loads]) };
        assert_eq!((density.tail, chunks.len()), (STRIDE as u8, MOST_CHUNKS), "its beginning, whole");
    }

    #[test]
    fn numbers_that_are_too_long_are_none() {
        let read = |bytes: &[u8]| Reader { rest: bytes }.number();
        assert_eq!(read(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]), Ok(u64::MAX));
        for odd in [
            &[0xff; 10][..],
            &[0x80; 11],
            &[0xff; 3],
            &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 2],
        ] {
            assert_eq!(read(odd), Err(Unreadable::Malformed), "{odd:?}");
        }
    }
}
