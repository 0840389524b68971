//! Small cases, worked out by hand. The model of these tests: a step costs 1 s, a prompt token 0.01 s, a request in
//! decode 0.1 s, context nothing, and attention nothing.

use super::*;

const FREE: f64 = 1e18;

fn model() -> Model {
    Model {
        step_s: 1.0,
        prefill_rate: 100.0,
        attention_tokens: FREE,
        sequence_s: 0.1,
        context_s: 0.0,
        budget: 1000,
        sequences: 4,
        cache_tokens: 4000,
        slowness: 1.0,
    }
}

/// Requests of (prompt, output, blocks of 100 tokens); without blocks, those of nobody else.
fn workload(requests: &[(u32, u32, &[u32])]) -> Workload {
    let request = |(at, &(prompt, output, blocks)): (usize, &(u32, u32, &[u32]))| Request {
        arrival_s: 0.0,
        prompt,
        output,
        session: 0,
        blocks: match blocks {
            [] => (0..prompt.div_ceil(100)).map(|block| 1000 * (at as u32 + 1) + block).collect(),
            _ => blocks.to_vec(),
        },
        index: vllm_proxy::routing::Prompt::default(),
    };
    Workload { block_tokens: 100, requests: requests.iter().enumerate().map(request).collect() }
}

/// Lets a worker work to the end; the times of all events, rounded to a millisecond.
fn finish(engine: &mut Engine<'_>) -> Vec<(f64, Event)> {
    let (mut all, mut events) = (Vec::new(), Vec::new());
    while engine.next_event().is_finite() {
        let now = engine.next_event();
        engine.advance(&mut events);
        all.extend(events.drain(..).map(|event| ((now * 1000.0).round() / 1000.0, event)));
    }
    all
}

use Event::{Ended, FirstToken};

#[test]
fn one_request_takes_a_step_for_its_prompt_and_one_for_each_further_token() {
    let workload = workload(&[(200, 3, &[1, 2])]);
    let mut engine = Engine::new(model(), &workload, false);
    engine.arrive(5.0, 0);
    // 1 + 200·0.01 = 3; then two steps of 1.1
    assert_eq!(finish(&mut engine), [(8.0, FirstToken(0)), (10.2, Ended(0))]);
    assert_eq!(engine.work(), (0, 200));
}

#[test]
fn a_prompt_longer_than_the_budget_takes_several_steps() {
    let workload = workload(&[(2500, 1, &[])]);
    let mut engine = Engine::new(model(), &workload, false);
    engine.arrive(0.0, 0);
    assert_eq!(finish(&mut engine), [(28.0, FirstToken(0)), (28.0, Ended(0))], "3 steps and 25 s");
}

#[test]
fn two_that_come_together_share_a_step() {
    let workload = workload(&[(100, 1, &[1]), (100, 1, &[2]), (100, 2, &[3])]);
    let mut engine = Engine::new(model(), &workload, false);
    engine.arrive(0.0, 0);
    engine.arrive(0.5, 1);
    engine.arrive(0.6, 2);
    let expected = [
        (2.0, FirstToken(0)),
        (2.0, Ended(0)),
        (5.0, FirstToken(1)),
        (5.0, Ended(1)),
        (5.0, FirstToken(2)),
        (6.1, Ended(2)),
    ];
    assert_eq!(finish(&mut engine), expected, "the first is alone in its step, the others wait for its end");
}

#[test]
fn who_comes_while_others_decode_waits_for_the_end_of_their_step() {
    let workload = workload(&[(100, 11, &[1]), (100, 1, &[2])]);
    let mut engine = Engine::new(model(), &workload, false);
    engine.arrive(0.0, 0);
    engine.advance(&mut Vec::new());
    assert_eq!(engine.next_event(), 2.0 + 11.0, "all ten steps are one event");
    engine.arrive(4.5, 1);
    assert!((engine.next_event() - 5.3).abs() < 1e-9, "the third step is running");
    // one step with a prompt: 1 + 0.1 + 1
    let expected = [(7.4, FirstToken(1)), (7.4, Ended(1)), (14.0, Ended(0))];
    assert_eq!(finish(&mut engine), expected);
}

#[test]
fn context_makes_each_step_longer_than_the_one_before() {
    let workload = workload(&[(100, 4, &[1])]);
    let mut engine = Engine::new(Model { context_s: 0.001, ..model() }, &workload, false);
    engine.arrive(0.0, 0);
    // steps of 1.1 + 0.101, 0.102, 0.103
    assert_eq!(finish(&mut engine), [(2.0, FirstToken(0)), (5.606, Ended(0))]);
}

#[test]
fn attention_makes_the_end_of_a_prompt_dearer() {
    let model = Model { attention_tokens: 1000.0, ..model() };
    assert!((model.prefill_s(0, 1000) - 15.0).abs() < 1e-9);
    assert!((model.prefill_s(1000, 1000) - 25.0).abs() < 1e-9);
    let whole = model.prefill_s(0, 2000);
    assert!((whole - model.prefill_s(0, 1000) - model.prefill_s(1000, 1000)).abs() < 1e-9, "cut anywhere");
}

#[test]
fn a_known_prompt_still_computes_one_token() {
    let workload = workload(&[(300, 1, &[1, 2, 3]), (300, 1, &[1, 2, 3]), (300, 1, &[1, 2, 9])]);
    let mut engine = Engine::new(model(), &workload, false);
    engine.arrive(0.0, 0);
    engine.arrive(0.0, 1);
    engine.arrive(0.0, 2);
    let events = finish(&mut engine);
    assert_eq!(events[2], (4.0 + 1.0 + 0.01 + 1.0, FirstToken(1)));
    assert_eq!((engine.take_found(1), engine.take_found(2), engine.take_found(0)), (299, 200, 0));
    assert_eq!(engine.work(), (499, 401));
}

#[test]
fn those_admitted_in_one_step_share_what_it_computes() {
    let workload = workload(&[(100, 1, &[9]), (300, 1, &[1, 2, 3]), (300, 1, &[1, 2, 3])]);
    let mut engine = Engine::new(model(), &workload, false);
    for request in 0..3 {
        engine.arrive(0.0, request);
    }
    finish(&mut engine);
    assert_eq!((engine.take_found(1), engine.take_found(2)), (0, 299));
}

#[test]
fn who_does_not_fit_into_memory_waits_and_so_do_all_behind_it() {
    let workload = workload(&[(900, 11, &[]), (3500, 1, &[]), (100, 1, &[])]);
    let mut engine = Engine::new(model(), &workload, false);
    for request in 0..3 {
        engine.arrive(0.0, request);
    }
    let ends: Vec<_> =
        finish(&mut engine).into_iter().filter(|(_, event)| matches!(event, Ended(_))).collect();
    // 10 + 10·1.1, then 36 s in steps of 1000 tokens, the last of which has room for the third
    assert_eq!(ends, [(21.0, Ended(0)), (61.0, Ended(1)), (61.0, Ended(2))]);
}

#[test]
fn no_more_run_than_may() {
    let workload = workload(&[(10, 5, &[]), (10, 5, &[]), (10, 5, &[])]);
    let mut engine = Engine::new(Model { sequences: 2, ..model() }, &workload, false);
    for request in 0..3 {
        engine.arrive(0.0, request);
    }
    engine.advance(&mut Vec::new());
    assert_eq!((engine.running(), engine.waiting()), (2, 1));
    assert_eq!(finish(&mut engine).len(), 5, "and all end");
}

#[test]
fn a_quote_is_what_then_happens() {
    let workload = workload(&[(300, 1, &[1, 2, 3]), (300, 1, &[1, 2, 4]), (300, 1, &[1, 2, 4])]);
    let mut engine = Engine::new(model(), &workload, true);
    engine.arrive(0.0, 0);
    engine.arrive(0.5, 1);
    let quote = engine.quote(1.0, 2);
    // 3 s of the running step are left, 100 tokens wait, one step takes both, and all but one token come with them
    assert!((quote.wait_s - (3.0 + 1.0 + 1.0)).abs() < 1e-9, "{quote:?}");
    assert!((quote.own_s - 0.01).abs() < 1e-9, "{quote:?}");
    engine.arrive(1.0, 2);
    let events = finish(&mut engine);
    assert!(events.contains(&(6.01, FirstToken(2))), "{events:?}");
    assert_eq!(engine.queued.tokens, 0.0);
    assert!(engine.coming.as_ref().unwrap().is_empty());
}

#[test]
fn a_slow_worker_takes_longer_for_everything() {
    let workload = workload(&[(200, 3, &[1, 2])]);
    let mut engine = Engine::new(Model { slowness: 2.0, ..model() }, &workload, false);
    engine.arrive(0.0, 0);
    assert_eq!(finish(&mut engine), [(6.0, FirstToken(0)), (10.4, Ended(0))]);
}
