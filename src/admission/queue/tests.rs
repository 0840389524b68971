use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn first<T: Clone>(queue: &mut Queue<T>) -> Option<T> {
    let mut found = None;
    queue.serve(|item| {
        if found.is_some() {
            return Verdict::Enough;
        }
        found = Some(item.clone());
        Verdict::Served
    });
    found
}

fn order(joined: &[(i64, u64)]) -> Vec<usize> {
    let mut queue = Queue::new(joined.len());
    for (at, &(priority, key)) in joined.iter().enumerate() {
        queue.join(priority, key, at).unwrap();
    }
    std::iter::from_fn(|| first(&mut queue)).collect()
}

#[test]
fn a_lower_priority_goes_first_and_equals_in_the_order_of_arrival() {
    assert_eq!(order(&[(0, 0), (5, 0), (-1, 0), (0, 0), (5, 0), (i64::MIN, 0)]), [5, 2, 0, 3, 1, 4]);
}

#[test]
fn a_key_with_many_waiting_does_not_hold_up_one_with_few() {
    assert_eq!(order(&[(0, 1), (0, 1), (0, 1), (0, 1), (0, 2), (0, 2), (0, 3)]), [0, 4, 6, 1, 5, 2, 3]);
}

#[test]
fn a_key_that_comes_back_at_once_does_not_overtake() {
    let mut queue = Queue::new(10);
    for item in 0..3 {
        queue.join(0, 1, ("many", item)).unwrap();
    }
    let mut served = Vec::new();
    for item in 0..3 {
        queue.join(0, 2, ("one", item)).unwrap();
        served.extend([first(&mut queue).unwrap().0, first(&mut queue).unwrap().0]);
    }
    assert_eq!(served, ["many", "one", "many", "one", "many", "one"]);
}

#[test]
fn turns_that_were_not_used_are_not_held_against_a_key() {
    let mut queue = Queue::new(100);
    queue.join(0, 1, "other").unwrap();
    let tickets: Vec<_> = (0..50).map(|_| queue.join(0, 2, "gone").unwrap().ticket).collect();
    for ticket in tickets {
        assert_eq!(queue.leave(ticket), Some("gone"));
    }
    for _ in 0..3 {
        queue.join(0, 1, "other").unwrap();
    }
    queue.join(0, 2, "back").unwrap();
    let served: Vec<_> = std::iter::from_fn(|| first(&mut queue)).collect();
    assert_eq!(served, ["other", "other", "back", "other", "other"]);
}

#[test]
fn who_is_passed_keeps_the_place() {
    let mut queue = Queue::new(10);
    for item in 0..4 {
        queue.join(0, 0, item).unwrap();
    }
    queue.serve(|&item| if item % 2 == 1 { Verdict::Served } else { Verdict::Passed });
    assert_eq!(queue.len(), 2);
    assert_eq!((first(&mut queue), first(&mut queue), first(&mut queue)), (Some(0), Some(2), None));
}

#[test]
fn a_full_queue_takes_nobody_and_a_served_one_cannot_leave() {
    let mut queue = Queue::new(1);
    let ticket = queue.join(0, 0, 'a').unwrap().ticket;
    assert_eq!(queue.join(0, 0, 'b'), Err('b'));
    assert_eq!(queue.join(9, 0, 'b'), Err('b'));
    assert_eq!(first(&mut queue), Some('a'));
    assert_eq!(queue.leave(ticket), None);
    assert_eq!(Queue::new(0).join(0, 0, 'a'), Err('a'));
}

#[test]
fn a_key_that_fills_the_queue_does_not_keep_others_out() {
    let mut queue = Queue::new(4);
    for item in ["a1", "a2", "a3", "a4"] {
        queue.join(0, 1, item).unwrap();
    }
    assert_eq!(queue.join(0, 1, "a5"), Err("a5"));
    assert_eq!(queue.join(0, 2, "b1").unwrap().displaced, Some("a4"));
    assert_eq!(queue.join(0, 2, "b2").unwrap().displaced, Some("a3"));
    assert_eq!(queue.join(0, 2, "b3"), Err("b3"), "each has its half");
    assert_eq!(queue.join(-1, 1, "urgent").unwrap().displaced, Some("b2"));
    let served: Vec<_> = std::iter::from_fn(|| first(&mut queue)).collect();
    assert_eq!(served, ["urgent", "a1", "b1", "a2"]);
    assert!(queue.classes.is_empty());
}

#[test]
fn keys_that_come_once_are_forgotten_while_others_wait() {
    let mut queue = Queue::new(10);
    queue.join(0, u64::MAX, u64::MAX).unwrap();
    for key in 0..10_000 {
        queue.join(0, key, key).unwrap();
        // the first is passed, so that the class lives on
        queue.serve(|&item| if item == key { Verdict::Served } else { Verdict::Passed });
    }
    let flows = queue.classes[&0].flows.len();
    assert!(flows <= 2 + REMEMBERED_KEYS, "{flows}");
    assert_eq!(first(&mut queue), Some(u64::MAX));
    assert!(queue.classes.is_empty(), "nothing is kept of an empty queue");
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Join(i64, u64),
    Serve(usize),
    Leave(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (-1i64..2, 0u64..4).prop_map(|(priority, key)| Step::Join(priority, key)),
        2 => (0usize..4).prop_map(Step::Serve),
        1 => any::<prop::sample::Index>().prop_map(Step::Leave),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn nobody_is_lost_doubled_or_overtaken_by_its_own_kind(steps in steps(), most in 0usize..12) {
        let mut queue = Queue::new(most);
        // by number: priority, key, ticket
        let mut waiting: Vec<(usize, i64, u64, Ticket)> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Join(priority, key) => match queue.join(priority, key, number) {
                    Ok(Joined { ticket, displaced }) => {
                        if let Some(other) = displaced {
                            prop_assert_eq!(waiting.len(), most);
                            let at = waiting.iter().position(|(number, ..)| *number == other);
                            let (_, lower, whose, _) = waiting.remove(at.expect("it waited"));
                            prop_assert!(priority < lower || priority == lower && key != whose);
                        }
                        waiting.push((number, priority, key, ticket));
                    }
                    Err(item) => {
                        prop_assert_eq!(item, number);
                        prop_assert_eq!(waiting.len(), most);
                        prop_assert!(waiting.iter().all(|(_, other, ..)| *other <= priority));
                    }
                },
                Step::Serve(count) => {
                    for _ in 0..count {
                        let served = first(&mut queue);
                        prop_assert_eq!(served.is_none(), waiting.is_empty());
                        let Some(served) = served else { break };
                        let at = waiting.iter().position(|(number, ..)| *number == served);
                        let (_, priority, key, _) = waiting.remove(at.expect("it waited"));
                        prop_assert!(waiting.iter().all(|(_, other, ..)| *other >= priority));
                        let own = |(_, p, k, _): &&(usize, i64, u64, Ticket)| (*p, *k) == (priority, key);
                        prop_assert!(waiting.iter().filter(own).all(|(number, ..)| *number > served));
                    }
                }
                Step::Leave(which) => if !waiting.is_empty() {
                    let (number, .., ticket) = waiting.remove(which.index(waiting.len()));
                    prop_assert_eq!(queue.leave(ticket), Some(number));
                },
            }
            prop_assert_eq!(queue.len(), waiting.len());
            prop_assert!(queue.len() <= most);
        }
        let rest: HashSet<usize> = std::iter::from_fn(|| first(&mut queue)).collect();
        prop_assert_eq!(rest, waiting.iter().map(|(number, ..)| *number).collect::<HashSet<_>>());
        prop_assert!(queue.classes.is_empty());
    }

    /// Keys that always have somebody waiting get the same number of turns, one more or less, in any stretch.
    #[test]
    fn who_always_waits_is_served_as_often_as_the_others(
        keys in 2u64..6,
        backlog in prop::collection::vec(1usize..6, 6),
        rounds in 1usize..60,
    ) {
        let mut queue = Queue::new(1000);
        for key in 0..keys {
            for _ in 0..backlog[key as usize] {
                queue.join(0, key, key).unwrap();
            }
        }
        let mut turns = vec![0usize; keys as usize];
        for _ in 0..rounds {
            let key = first(&mut queue).expect("they always wait");
            turns[key as usize] += 1;
            queue.join(0, key, key).unwrap();
        }
        let (least, most) = (turns.iter().min().unwrap(), turns.iter().max().unwrap());
        prop_assert!(most - least <= 1, "{:?}", turns);
    }
}
