//! The index against a model of what it mirrors, and prompts against the bodies that they are read of.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use proptest::prelude::*;

use super::{seat::GRAIN, *};
use crate::vllm::scan_json;

const MEBIBYTE: usize = 1 << 20;

/// Numbers that look like hashes, always the same ones.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn chunks(&mut self, count: usize) -> Vec<u64> {
        (0..count).map(|_| self.next().max(1)).collect()
    }
}

fn chunks(seed: u64, count: usize) -> Vec<u64> {
    Random(seed << 32).chunks(count)
}

fn matched(index: &PrefixIndex, chunks: &[u64], seats: &[usize]) -> Vec<u32> {
    let mut depths = vec![99];
    index.matched(chunks, seats, &mut depths);
    depths
}

fn depth(index: &PrefixIndex, chunks: &[u64], seat: usize) -> usize {
    matched(index, chunks, &[seat])[0] as usize
}

mod of_the_index {
    use super::*;

    #[test]
    fn each_worker_is_told_by_its_own_depth() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 64), chunks(1, 40));
        for seat in 0..40 {
            index.touch(seat, &prompt[..seat], 1000, 0);
        }
        let seats: Vec<usize> = (0..64).collect();
        let expected: Vec<u32> = (0..64).map(|seat| if seat < 40 { seat } else { 0 }).collect();
        assert_eq!(matched(&index, &prompt, &seats), expected);
        assert_eq!(matched(&index, &prompt, &[39, 2, 2, 17, 50, 3]), [39, 2, 2, 17, 0, 3], "in any order");
        assert_eq!(matched(&index, &[], &[1, 2]), [0, 0]);
        assert_eq!(matched(&index, &prompt, &[]), [0; 0]);
    }

    #[test]
    fn a_chunk_that_is_missing_makes_no_match_shorter() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 40));
        index.touch(3, &prompt, 1000, 0);
        for missing in 0..38 {
            index.remove(3, &prompt[..=missing], missing);
            assert_eq!(depth(&index, &prompt, 3), 40, "{missing}");
            index.touch(3, &prompt, 1000, 0);
        }
        index.remove(3, &prompt[..20], 4);
        assert_eq!(index.held(3), 24);
    }

    #[test]
    fn any_depth_is_found_in_prompts_of_any_length() {
        let index = PrefixIndex::new(MEBIBYTE, 8);
        for length in 1..70 {
            let prompt = chunks(length as u64, length);
            for deep in 0..=length {
                index.clear(2);
                index.touch(2, &prompt[..deep], 1000, 0);
                assert_eq!(matched(&index, &prompt, &[1, 2, 3]), [0, deep as u32, 0]);
            }
        }
    }

    #[test]
    fn a_seat_beyond_the_last_neither_matches_nor_is_stored() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 12), chunks(1, 10));
        for seat in [12, 13, 1024, 1024 + 3, usize::MAX] {
            index.touch(seat, &prompt, 1000, 0);
            index.add_pressure(seat, 5, 1000);
            index.follow(seat, 1);
            index.remove(seat, &prompt, 0);
            index.clear(seat);
            assert_eq!((depth(&index, &prompt, seat), index.held(seat)), (0, 0));
        }
        assert_eq!(matched(&index, &prompt, &(0..16).collect::<Vec<_>>()), [0; 16]);
        index.touch(11, &prompt, 1000, 0);
        assert_eq!(matched(&index, &prompt, &[10, 11, 12, 15]), [0, 10, 0, 0]);
    }

    #[test]
    fn an_index_without_memory_never_matches() {
        for bytes in [0, 1, 127] {
            let (index, prompt) = (PrefixIndex::new(bytes, 8), chunks(1, 10));
            index.touch(0, &prompt, 1000, 0);
            index.add_pressure(0, 5, 1000);
            index.clear(0);
            index.follow(0, 3);
            index.remove(0, &prompt, 0);
            assert_eq!((depth(&index, &prompt, 0), index.bytes()), (0, 0));
        }
    }

    #[test]
    fn a_cache_that_holds_nothing_matches_nothing() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 10));
        index.touch(0, &prompt, 0, 0);
        assert_eq!(depth(&index, &prompt, 0), 0);
        index.touch(0, &prompt, 4, 0);
        assert_eq!(
            (depth(&index, &prompt, 0), index.held(0)),
            (4, 4),
            "a prompt that is longer than the cache"
        );
    }

    #[test]
    fn what_has_not_come_is_undone() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 30));
        index.touch(0, &prompt[..10], 1000, 0);
        index.touch(0, &prompt, 1000, 0);
        index.remove(0, &prompt, 10);
        assert_eq!((depth(&index, &prompt, 0), index.held(0)), (10, 10));
        index.remove(0, &prompt, 99);
        assert_eq!((depth(&index, &prompt, 0), index.held(0)), (10, 10));
    }

    #[test]
    fn a_clear_forgets_one_worker_only() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 16), chunks(1, 30));
        (0..16).for_each(|seat| index.touch(seat, &prompt, 1000, 0));
        index.clear(5);
        let held = matched(&index, &prompt, &(0..16).collect::<Vec<_>>());
        assert!(held.iter().enumerate().all(|(seat, &depth)| depth == if seat == 5 { 0 } else { 30 }));
        assert_eq!(index.held(5), 0);
        index.touch(5, &prompt[..20], 1000, 0);
        assert_eq!((depth(&index, &prompt, 5), index.held(5)), (20, 20));
    }

    #[test]
    fn a_clear_costs_the_same_in_a_table_of_any_size() {
        // by the words that it changes: none of the table's
        let index = PrefixIndex::new(64 * MEBIBYTE, 8);
        let mut random = Random(1);
        for _ in 0..100 {
            index.touch(0, &random.chunks(1000), 1 << 20, 0);
        }
        let entries = || index.entries().collect::<Vec<u64>>();
        let before = entries();
        assert_eq!(before.iter().filter(|&&entry| entry != 0).count(), 100_000);
        index.clear(0);
        assert!(entries() == before && index.held(0) == 0);
    }

    #[test]
    fn the_first_generation_is_remembered_and_a_later_one_clears() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 30));
        index.touch(0, &prompt, 1000, 0);
        index.follow(0, 7);
        index.follow(0, 7);
        assert_eq!(depth(&index, &prompt, 0), 30);
        index.follow(0, 8);
        assert_eq!(depth(&index, &prompt, 0), 0);
        index.touch(0, &prompt, 1000, 0);
        index.follow(0, 7);
        assert_eq!(depth(&index, &prompt, 0), 30, "a shard that is late to see the change");
        index.follow(0, 8);
        assert_eq!(depth(&index, &prompt, 0), 30);
        for generation in [u32::MAX / 2, u32::MAX - 1, 2] {
            index.follow(0, generation);
            assert_eq!(depth(&index, &prompt, 0), 0, "{generation}");
            index.touch(0, &prompt, 1000, 0);
        }
    }

    #[test]
    fn suffixes_go_before_prefixes() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 600));
        let mut random = Random(9);
        index.touch(0, &prompt, 1000, 0);
        let mut before = 600;
        for step in 1..=100 {
            index.touch(0, &random.chunks(10), 1000, 0);
            let now = depth(&index, &prompt, 0);
            // nothing is lost but for room, and what is lost is lost from the end
            let left = (1000_usize - step * 10).min(600);
            assert!(now <= before && now <= left && now + 2 * 1000 / GRAIN as usize >= left, "{step}: {now}");
            before = now;
        }
        assert_eq!(before, 0);
    }

    #[test]
    fn what_is_used_again_outlives_what_is_not() {
        let (index, hot) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 50));
        let mut random = Random(9);
        let cold = random.chunks(50);
        index.touch(0, &cold, 1000, 0);
        for _ in 0..100 {
            index.touch(0, &hot, 1000, 0);
            index.touch(0, &random.chunks(100), 1000, 0);
            assert_eq!(depth(&index, &hot, 0), 50);
            assert!(index.held(0) <= 1000);
        }
        assert_eq!(depth(&index, &cold, 0), 0);
    }

    #[test]
    fn a_long_time_of_hits_only_does_not_make_everything_go_at_once() {
        for (hits, at_once) in [(200, 30), (2_000, 60), (10_000, 250)] {
            let index = PrefixIndex::new(MEBIBYTE, 8);
            let mut random = Random(9);
            let prompts: Vec<_> = (0..100).map(|_| random.chunks(10)).collect();
            let held = |some: &[Vec<u64>]| some.iter().map(|prompt| depth(&index, prompt, 0)).sum::<usize>();
            prompts.iter().for_each(|prompt| index.touch(0, prompt, 1000, 0));
            for _ in 0..hits {
                // half of them, in any order
                index.touch(0, &prompts[random.below(50)], 1000, 0);
            }
            assert_eq!((held(&prompts), index.held(0)), (1000, 1000));
            let mut before = 500;
            for turn in 1..=100 {
                index.touch(0, &random.chunks(10), 1000, 0);
                let hot = held(&prompts[..50]);
                let left = (1000_usize - 10 * turn).min(500);
                // the other half goes first; before the last hits not all of the fifty may have had one
                assert!(turn > 45 || hot == 500 || hits == 200 && hot >= 490, "{hits} hits, {turn}: {hot}");
                assert!(hot <= left && hot + at_once >= before, "{hits} hits, {turn}: {before}, {hot}");
                before = hot;
            }
        }
    }

    #[test]
    fn output_presses_out_what_is_oldest() {
        let (index, prompt) = (PrefixIndex::new(MEBIBYTE, 8), chunks(1, 600));
        index.touch(0, &prompt, 1000, 0);
        index.add_pressure(0, 400, 1000);
        assert_eq!((depth(&index, &prompt, 0), index.held(0)), (600, 1000));
        index.add_pressure(0, 300, 1000);
        let left = depth(&index, &prompt, 0);
        assert!((290..=300).contains(&left) && index.held(0) <= 1000, "{left}");
        index.add_pressure(0, u64::MAX, u64::MAX);
        assert_eq!(depth(&index, &prompt, 0), left, "there is room");
        index.add_pressure(0, u64::MAX, 1000);
        assert_eq!(depth(&index, &prompt, 0), 0);
        assert!(index.held(0) <= 1000);
    }

    #[test]
    fn a_smaller_cache_holds_less_at_once_and_a_larger_one_more() {
        let index = PrefixIndex::new(MEBIBYTE, 8);
        let mut random = Random(3);
        for _ in 0..30 {
            index.touch(0, &random.chunks(100), 2000, 0);
        }
        assert!((1990..=2000).contains(&index.held(0)));
        index.touch(0, &random.chunks(1), 500, 0);
        assert!((480..=500).contains(&index.held(0)), "{}", index.held(0));
        let prompts: Vec<_> = (0..30).map(|_| random.chunks(100)).collect();
        prompts.iter().for_each(|prompt| index.touch(0, prompt, 4000, 0));
        assert_eq!(prompts.iter().map(|prompt| depth(&index, prompt, 0)).sum::<usize>(), 3000);
    }

    #[test]
    fn a_table_that_is_too_small_stays_as_it_is_and_keeps_what_is_hot() {
        let index = PrefixIndex::new(8 * 1024, 8);
        let (size, hot) = (index.bytes(), chunks(1, 100));
        let mut random = Random(5);
        for _ in 0..2000 {
            index.touch(0, &hot, 4000, 0);
            index.touch(1, &random.chunks(50), 4000, 0);
            assert_eq!(index.bytes(), size);
        }
        assert_eq!(index.entries().filter(|&entry| entry != 0).count(), 1024, "it is full");
        assert!(index.held(0) + index.held(1) <= 1024, "what was replaced is not counted");
        assert_eq!(depth(&index, &hot, 0), 100);
    }

    #[test]
    fn what_is_gone_is_replaced_before_what_is_held() {
        let index = PrefixIndex::new(8 * 1024, 8);
        let mut random = Random(5);
        (0..100).for_each(|_| index.touch(1, &random.chunks(50), 1 << 20, 0));
        index.clear(1);
        let fresh = random.chunks(400);
        index.touch(0, &fresh, 1 << 20, 0);
        assert_eq!(depth(&index, &fresh, 0), 400);
    }

    #[test]
    fn false_matches_are_as_rare_as_the_tag_is_wide() {
        let index = PrefixIndex::new(MEBIBYTE / 8, 8);
        let mut random = Random(5);
        (0..200).for_each(|_| index.touch(random.below(8), &random.chunks(100), 1 << 20, 0));
        assert!(index.entries().filter(|&entry| entry != 0).count() > 14_000, "it is nearly full");
        let seats: Vec<usize> = (0..8).collect();
        let hits = |random: &mut Random| matched(&index, &random.chunks(1), &seats).iter().sum::<u32>();
        let found: u32 = (0..1_000_000).map(|_| hits(&mut random)).sum();
        // 16 entries of 22 bits: 3.8 are expected in a million; a match of eight seats counts eight times
        assert!(found <= 15, "{found}");
    }

    #[test]
    fn what_is_in_use_outlives_what_ended_later() {
        let index = PrefixIndex::new(MEBIBYTE, 1);
        let (running, ended) = (chunks(1, 60), chunks(2, 60));
        index.touch(0, &running, 1000, 1000);
        index.touch(0, &ended, 1000, 1000);
        index.touch(0, &ended, 1000, 0);
        for other in 3..=20 {
            index.touch(0, &chunks(other, 60), 1000, 0);
        }
        assert_eq!((depth(&index, &running, 0), depth(&index, &ended, 0)), (60, 0));
        // when it ends it is like any other
        index.touch(0, &running, 1000, 0);
        for other in 20..=37 {
            index.touch(0, &chunks(other, 60), 1000, 0);
        }
        assert_eq!(depth(&index, &running, 0), 0);
    }

    #[test]
    fn more_in_use_than_fits_leaves_room_for_what_comes() {
        let index = PrefixIndex::new(MEBIBYTE, 1);
        (0..40).for_each(|n| index.touch(0, &chunks(n, 60), 1000, 1000));
        assert!(index.held(0) <= 1000, "{}", index.held(0));
        let next = chunks(99, 60);
        index.touch(0, &next, 1000, 1000);
        assert_eq!(depth(&index, &next, 0), 60);
        index.clear(0);
        assert_eq!(
            (index.held(0), depth(&index, &next, 0)),
            (0, 0),
            "nor does what is in use outlive the cache"
        );
    }

    #[test]
    fn four_threads_at_once_lose_a_touch_at_most() {
        let index = PrefixIndex::new(MEBIBYTE, 16);
        let prompts: Vec<_> = (0..64).map(|n| chunks(n, 60)).collect();
        let seats: Vec<usize> = (0..16).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let hammer = |seed: u64| {
                let (index, prompts, seats, done) = (&index, &prompts, &seats, &done);
                move || {
                    let (mut random, mut depths) = (Random(seed), Vec::new());
                    for _ in 0..5_000 {
                        let (seat, prompt) = (random.below(4), &prompts[random.below(64)]);
                        match random.below(64) {
                            0 => index.clear(seat),
                            1 => index.add_pressure(seat, 20, 1000),
                            2 => index.remove(seat, prompt, random.below(60)),
                            3 => index.follow(seat, random.below(100) as u32),
                            _ => index.touch(seat, prompt, 1000, 0),
                        }
                        index.matched(prompt, seats, &mut depths);
                        assert!(depths.iter().all(|&depth| depth <= 60));
                        assert_eq!(depths[4..], [0; 12], "who was never touched never matches");
                    }
                    done.store(true, Relaxed);
                }
            };
            (0..4).for_each(|seed| drop(scope.spawn(hammer(seed))));
        });
        assert!(done.load(Relaxed));
        for seat in 0..4 {
            // some counts may be late; what matters is that the books are as good as new after a while
            index.clear(seat);
            assert!(index.held(seat) <= 60, "{}", index.held(seat));
            for prompt in &prompts {
                index.touch(seat, prompt, 1000, 0);
                assert_eq!(depth(&index, prompt, seat), 60);
            }
            let truly: usize = prompts.iter().map(|prompt| depth(&index, prompt, seat)).sum();
            assert!((700..=1100).contains(&truly), "{truly}");
            assert!(index.held(seat) <= 1000);
        }
    }

    /// An exact cache: the chunks in the order of their last use, the next to go first.
    #[derive(Default)]
    struct Lru(Vec<u64>);

    impl Lru {
        fn touch(&mut self, chunks: &[u64], capacity: usize) {
            let chunks = &chunks[..chunks.len().min(capacity)];
            self.0.retain(|chunk| !chunks.contains(chunk));
            self.0.extend(chunks.iter().rev());
            self.0.drain(..self.0.len().saturating_sub(capacity));
        }

        /// Without a gap.
        fn depth(&self, chunks: &[u64]) -> usize {
            chunks.iter().take_while(|chunk| self.0.contains(chunk)).count()
        }

        /// With gaps: where something is removed that is in the middle of what another prompt put there.
        fn deepest(&self, chunks: &[u64]) -> usize {
            chunks.iter().rposition(|chunk| self.0.contains(chunk)).map_or(0, |last| last + 1)
        }
    }

    /// Prompts that share a beginning in twos and threes, as conversations do.
    fn family(seed: u64) -> Vec<Vec<u64>> {
        let mut random = Random(seed << 20);
        let mut prompts: Vec<Vec<u64>> = Vec::new();
        for _ in 0..30 {
            let from = random.below(prompts.len() + 1);
            let mut prompt =
                prompts.get(from).map_or(vec![], |other| other[..random.below(other.len())].to_vec());
            let more = 1 + random.below(30);
            prompt.extend(random.chunks(more));
            prompts.push(prompt);
        }
        prompts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// The bound: what an exact cache of a part less holds is held, and what one of a part more does not hold is not. A
        /// part is what was recent and not written again, what goes at once, and the tick that is being filled.
        #[test]
        fn it_agrees_with_an_exact_cache(seed in any::<u64>(), capacity in 20_usize..600) {
            let part = 2 + capacity * 5 / GRAIN as usize;
            let (index, mut random) = (PrefixIndex::new(MEBIBYTE, 16), Random(seed));
            let mut caches: Vec<[Lru; 2]> = (0..3).map(|_| Default::default()).collect();
            let prompts = family(seed);
            for _ in 0..400 {
                let (worker, prompt) = (random.below(3), &prompts[random.below(prompts.len())]);
                let seat = worker * 5;
                match random.below(60) {
                    0 => {
                        index.clear(seat);
                        caches[worker] = Default::default();
                    }
                    1 => {
                        let from = random.below(prompt.len());
                        index.remove(seat, prompt, from);
                        for cache in &mut caches[worker] {
                            cache.0.retain(|chunk| !prompt[from..].contains(chunk));
                        }
                    }
                    _ => {
                        index.touch(seat, prompt, capacity as u64, 0);
                        caches[worker][0].touch(prompt, capacity.saturating_sub(part));
                        caches[worker][1].touch(prompt, capacity + part);
                    }
                }
                let prompt = &prompts[random.below(prompts.len())];
                let depths = matched(&index, prompt, &[0, 5, 10]);
                for ([smaller, larger], depth) in caches.iter().zip(depths) {
                    prop_assert!(smaller.depth(prompt) <= depth as usize, "{} > {depth}", smaller.depth(prompt));
                    prop_assert!(larger.deepest(prompt) >= depth as usize, "{} < {depth}", larger.deepest(prompt));
                }
                prop_assert!(index.held(seat) <= capacity as u64);
            }
        }
    }
}

mod of_prompts {
    use super::*;

    fn read_as(body: &str, model: &str, rate: f64) -> Prompt {
        let mut prompt = Prompt::default();
        prompt.read(body.as_bytes(), &scan_json(body.as_bytes()), model, rate);
        prompt
    }

    fn read(body: &str) -> Prompt {
        read_as(body, "m", 4.0)
    }

    fn text(seed: u64, bytes: usize) -> String {
        let mut random = Random(seed);
        (0..bytes).map(|_| char::from(b"abcdefgh ijklmno"[random.below(16)])).collect()
    }

    fn common(one: &Prompt, other: &Prompt) -> usize {
        one.chunks().iter().zip(other.chunks()).take_while(|(one, other)| one == other).count()
    }

    fn message(seed: u64, bytes: usize) -> String {
        format!(r#"{{"role":"user","content":"{}"}}"#, text(seed, bytes))
    }

    #[test]
    fn a_conversation_that_grows_keeps_its_chunks() {
        let mut messages = vec![message(0, 3000)];
        let body = |messages: &[String]| {
            format!(r#"{{"model":"m","messages":[{}],"tools":[{}]}}"#, messages.join(","), message(99, 1300))
        };
        let mut before = read(&body(&messages));
        for turn in 1..20 {
            messages.push(message(turn, 100 * turn as usize));
            let now = read(&body(&messages));
            assert_eq!(common(&before, &now), before.chunks().len());
            assert!(now.chunks().len() > before.chunks().len() || turn < 5);
            before = now;
        }
    }

    #[test]
    fn every_kind_of_prompt_keeps_its_chunks_as_it_grows() {
        for key in ["prompt", "input", "query", "text_1", "instructions"] {
            let (one, more) = (text(1, 512 * 4 - 1), text(2, 900));
            let short = read(&format!(r#"{{"{key}":"{one}"}}"#));
            let long = read(&format!(r#"{{"{key}":"{one}{more}"}}"#));
            assert_eq!((common(&short, &long), short.chunks().len()), (4, 4), "{key}");
        }
        for key in ["messages", "input", "contents", "token_ids", "prompt", "items", "texts", "inputs"] {
            let list = |count| (0..count).map(|n| format!("{}", n * 1001)).collect::<Vec<_>>().join(",");
            let (short, long) = (
                read(&format!(r#"{{"{key}":[{}]}}"#, list(900))),
                read(&format!(r#"{{"{key}":[{}]}}"#, list(990))),
            );
            assert_eq!(common(&short, &long), short.chunks().len(), "{key}");
            assert!(short.chunks().len() > 8);
        }
    }

    #[test]
    fn other_tools_model_or_salt_share_nothing() {
        let body = |tools: &str, salt: &str| {
            format!(r#"{{"messages":[{}],"tools":[{tools}]{salt}}}"#, message(1, 5000))
        };
        let plain = read(&body("1", ""));
        assert_eq!(common(&plain, &read(&body("1", ""))), plain.chunks().len());
        assert!(plain.chunks().len() == 9, "{}", plain.chunks().len());
        let others = [
            read(&body("2", "")),
            read(&body("", "")),
            read(&body("1", r#","cache_salt":"a""#)),
            read(&body("1", r#","cache_salt":"b""#)),
            read(&body("1", r#","documents":[]"#)),
            read(&body("1", r#","system":"s""#)),
            read_as(&body("1", ""), "n", 4.0),
            read_as(&body("1", ""), "", 4.0),
        ];
        for (at, one) in others.iter().enumerate() {
            assert_eq!(common(&plain, one), 0, "{at}");
            assert!(others[..at].iter().all(|other| common(one, other) == 0), "{at}");
        }
    }

    #[test]
    fn the_same_bytes_under_other_keys_share_nothing() {
        let text = text(1, 4000);
        let prompts: Vec<_> = ["prompt", "input", "query", "system", "instructions", "text_1"]
            .map(|key| read(&format!(r#"{{"{key}":"{text}"}}"#)))
            .into();
        for (at, one) in prompts.iter().enumerate() {
            assert_eq!(one.chunks().len(), 7);
            assert!(prompts[..at].iter().all(|other| common(one, other) == 0), "{at}");
        }
    }

    #[test]
    fn tools_and_system_are_shared_by_conversations_that_begin_otherwise() {
        let body = |seed| {
            format!(
                r#"{{"messages":[{}],"system":"{}","tools":[{}]}}"#,
                message(seed, 3000),
                text(7, 2000),
                message(8, 1000)
            )
        };
        // 1,032 bytes, then 2,002: two and three whole chunks
        assert_eq!(common(&read(&body(1)), &read(&body(2))), 5);
    }

    #[test]
    fn documents_come_before_a_chat_and_behind_a_query() {
        let documents = |seed| format!(r#""documents":["{}"]"#, text(seed, 3000));
        let chat = |seed, docs| format!(r#"{{"messages":[{}],{}}}"#, message(seed, 3000), documents(docs));
        assert_eq!(common(&read(&chat(1, 5)), &read(&chat(2, 5))), 5);
        assert_eq!(common(&read(&chat(1, 5)), &read(&chat(1, 6))), 0);
        let rank = |seed, docs| format!(r#"{{{},"query":"{}"}}"#, documents(docs), text(seed, 3000));
        assert_eq!(common(&read(&rank(1, 5)), &read(&rank(1, 6))), 5);
        assert_eq!(common(&read(&rank(1, 5)), &read(&rank(2, 5))), 0);
    }

    #[test]
    fn null_is_as_if_it_was_not_there() {
        let messages = message(1, 3000);
        let plain = read(&format!(r#"{{"messages":[{messages}]}}"#));
        let nulls = format!(
            r#"{{"messages":[{messages}],"tools":null,"system":null,"cache_salt":null,"prompt":null}}"#
        );
        assert_eq!(read(&nulls), plain);
        assert_eq!(read(r#"{"messages":null,"prompt":null}"#), Prompt::default());
    }

    #[test]
    fn bodies_without_a_prompt_have_none() {
        for body in ["", "{}", "[1]", "null", r#"{"model":"m"}"#, r#"{"messages":"#, "\u{0}"] {
            let prompt = read(body);
            assert_eq!((prompt.chunks(), prompt.tokens(), prompt.bytes()), (&[][..], 0, 0), "{body}");
            assert_eq!((prompt.tokens_of(3), prompt.rated_bytes()), (0, None));
            assert_eq!(prompt.chunks_per(4096), 32);
        }
    }

    #[test]
    fn tokens_are_the_bytes_by_the_rate_of_the_model() {
        let body = format!(r#"{{"prompt":"{}"}}"#, text(1, 3998));
        for (rate, tokens) in
            [(4.0, 1000), (2.0, 2000), (3.0, 1334), (f64::NAN, 1000), (0.0, 1000), (-1.0, 1000)]
        {
            let prompt = read_as(&body, "m", rate);
            assert_eq!((prompt.tokens(), prompt.bytes(), prompt.rated_bytes()), (tokens, 4000, Some(4000)));
        }
        assert_eq!(read_as(&body, "m", f64::INFINITY).tokens(), 0);
        assert_eq!(read_as(&body, "m", f64::MIN_POSITIVE).tokens(), u64::MAX);
        assert_eq!(read(&body).tokens_of(3), 384);
        assert_eq!(read(&body).chunks_per(461_376), 3604);
    }

    #[test]
    fn tokens_that_are_given_are_counted() {
        let cases = [
            (r#"{"prompt":[1,2,3]}"#, 3),
            (r#"{"prompt":[[1, 2 ,3],[4],[5,6]]}"#, 6),
            (r#"{"input":[ [ 7 ] ]}"#, 1),
            (r#"{"token_ids":[10,11,12,13]}"#, 4),
            (r#"{"prompt":["a,b","c"]}"#, 3),
            (r#"{"prompt":[]}"#, 1),
            (r#"{"prompt":17}"#, 1),
            (r#"{"token_ids":[10,11,12,13],"instructions":"1234567890"}"#, 7),
        ];
        for (body, tokens) in cases {
            assert_eq!(read(body).tokens(), tokens, "{body}");
        }
        let prompt = read(r#"{"token_ids":[10,11,12,13]}"#);
        assert_eq!(prompt.rated_bytes(), None, "they teach nothing of text");
    }

    #[test]
    fn what_lies_between_chunks_is_in_the_tokens_of_the_next() {
        let body = format!(
            r#"{{"tools":["{}"],"system":"{}","prompt":"{}"}}"#,
            text(1, 508), // exactly a chunk with its brackets
            text(2, 998), // 1,000: a chunk and 488 bytes
            text(3, 2046)
        );
        let prompt = read(&body);
        assert_eq!((prompt.chunks().len(), prompt.bytes(), prompt.tokens()), (5, 512 + 1000 + 2048, 890));
        let tokens: Vec<u64> = (0..7).map(|depth| prompt.tokens_of(depth)).collect();
        assert_eq!(tokens, [0, 128, 256, 506, 634, 762, 762]);
    }

    #[test]
    fn an_image_counts_as_what_a_model_makes_of_it() {
        let image = |seed: u64, bytes: usize| -> String {
            let mut random = Random(seed);
            (0..bytes).map(|_| char::from(b"ABCDwxyz0189+/gh"[random.below(16)])).collect()
        };
        let body = |images: [u64; 2], bytes, last| {
            let url =
                |seed| format!(r#"{{"image_url":{{"url":"data:image/png;base64,{}"}}}}"#, image(seed, bytes));
            let (one, two, text) = (url(images[0]), url(images[1]), text(9, 5000));
            format!(r#"{{"messages":[{{"content":[{one},{{"text":"{text}"}},{two}]}}{last}]}}"#)
        };
        let prompt = read(&body([1, 2], 400_000, ""));
        assert!((3300..3400).contains(&prompt.tokens()), "{}", prompt.tokens());
        assert_eq!(prompt.tokens(), read(&body([1, 2], 3_000_000, "")).tokens());
        assert_eq!(prompt.rated_bytes(), None);
        // an image is eight chunks, and between two of them nine are text
        assert_eq!(prompt.chunks().len(), 8 + 9 + 8);
        assert_eq!(common(&prompt, &read(&body([1, 3], 400_000, ""))), 8 + 9);
        assert_eq!(common(&prompt, &read(&body([3, 2], 400_000, ""))), 0);
        let grown = read(&body([1, 2], 400_000, &format!(",{}", message(4, 3000))));
        assert_eq!((common(&prompt, &grown), grown.chunks().len()), (25, 25 + 5));
        assert!((prompt.tokens_of(8)..prompt.tokens_of(8) + 20).contains(&1036), "{}", prompt.tokens_of(8));
    }

    #[test]
    fn what_is_beyond_the_bound_is_counted_only() {
        let body = format!(r#"{{"prompt":"{}"}}"#, "x y ".repeat((MAX_CHUNKS + 100) * CHUNK_BYTES / 4));
        let prompt = read(&body);
        assert_eq!(prompt.chunks().len(), MAX_CHUNKS);
        assert_eq!(prompt.bytes() as usize, (MAX_CHUNKS + 100) * CHUNK_BYTES + 2);
        assert_eq!(prompt.tokens_of(usize::MAX), (MAX_CHUNKS * CHUNK_BYTES / 4) as u64);
    }

    #[test]
    fn a_prompt_that_is_read_again_is_read_anew() {
        let bodies = [
            format!(r#"{{"tools":["{}"],"prompt":[{}1]}}"#, text(1, 3000), "12345,".repeat(2000)),
            format!(r#"{{"system":"{}","messages":[{}]}}"#, text(2, 300), message(3, 4000)),
            "{}".to_owned(),
        ];
        let mut prompt = Prompt::default();
        for body in bodies.iter().chain(&bodies) {
            prompt.read(body.as_bytes(), &scan_json(body.as_bytes()), "m", 4.0);
            assert_eq!(prompt, read(body));
        }
    }

    #[test]
    fn a_prompt_of_a_simulator_is_as_dense_as_it_says() {
        let prompt = Prompt::new(vec![1, 2, 3], 1600, 320);
        assert_eq!([0, 1, 2, 3, 4].map(|depth| prompt.tokens_of(depth)), [0, 102, 204, 307, 307]);
        assert_eq!(prompt.chunks_per(1024), 10);
    }

    proptest! {
        /// Where a value stands in the body, and what else is there, changes nothing.
        #[test]
        fn the_same_values_make_the_same_chunks(
            tools in "[a-z ]{0,1500}", system in "[a-z ]{0,1500}", prompt in "[a-z ]{0,3000}",
            order in Just(vec![0, 1, 2, 3]).prop_shuffle(), space in " {0,3}",
        ) {
            let members = [
                format!(r#""tools":{space}["{tools}"]"#),
                format!(r#""system":"{system}""#),
                format!(r#""prompt"{space}:"{prompt}""#),
                r#""temperature":1,"user":"u""#.to_owned(),
            ];
            let body = |order: &[usize]| {
                let members: Vec<&str> = order.iter().map(|&at| &*members[at]).collect();
                format!("{{{}}}", members.join(&format!(",{space}")))
            };
            prop_assert_eq!(read(&body(&order)), read(&body(&[0, 1, 2])));
        }

        /// Two values that are cut at another place are another prompt, from the first chunk behind the cut on.
        #[test]
        fn bytes_that_belong_elsewhere_share_nothing_behind(text in "[a-z]{1100,4000}", cut in 0_usize..500, by in 1_usize..500) {
            let body = |cut: usize| format!(r#"{{"system":"{}","prompt":"{}"}}"#, &text[..cut], &text[cut..]);
            let (one, other) = (read(&body(cut)), read(&body(cut + by)));
            prop_assert!(!one.chunks().is_empty() && !other.chunks().is_empty());
            prop_assert_eq!(common(&one, &other), 0);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(body in "\\PC*|[\\[\\]{}\",:0-9a\\\\ ]*", depth in any::<usize>(), rate in any::<f64>()) {
            let body = format!(r#"{{"prompt":{body}}}"#);
            let prompt = read_as(&body, "m", rate);
            prop_assert!(prompt.tokens_of(depth) <= prompt.tokens());
            prop_assert!(prompt.chunks().iter().all(|&chunk| chunk != 0));
        }
    }
}
