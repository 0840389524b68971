//! temporary
#![allow(dead_code, clippy::all)]
mod cache;
mod chance;
mod chooser;
mod engine;
mod run;
mod workload;
use chance::Chance;
use chooser::*;
use engine::Model;
use run::*;
fn main() {
    let path = std::path::PathBuf::from("/work/shared/traces/mooncake_conversation_trace.jsonl");
    let t0 = std::time::Instant::now();
    let mut ws = vec![("conv", workload::read_trace(&path, 1).unwrap(), 461_376u64)];
    ws.push(("conv2m", workload::read_trace(&path, 1).unwrap(), 2_000_000));
    ws.push(("mix", workload::generate(&workload::MIX, 1), 461_376));
    ws.push(("agent", workload::generate(&workload::AGENT, 1), 461_376));
    ws.push(("hot", workload::generate(&workload::HOT, 1), 461_376));
    for (name, w, kv) in &ws {
        let models = vec![Model { cache_tokens: *kv, ..Model::default() }; 8];
        eprintln!(
            "{name} {:?} requests {} mean prompt {} out {} reusable {}",
            t0.elapsed(),
            w.requests.len(),
            w.prompt_tokens() / w.requests.len() as u64,
            w.requests.iter().map(|r| r.output as u64).sum::<u64>() / w.requests.len() as u64,
            w.reusable()
        );
        let terms = |speed, foresight, only_drain| Terms {
            workload: w,
            speed,
            models: &models,
            fault: Fault::None,
            foresight,
            only_drain,
        };
        let full = highest_speed(1.5, |s| {
            run(&terms(s, true, true), &mut Oracle { weight: 2.0, chance: Chance::new(1) }).drained
        });
        println!("{name}: full speed {full} = {} req/s {:?}", full * w.rate(), t0.elapsed());
        for load in [0.75, 0.9] {
            for p in ["random", "rr", "etp", "o1", "o1.5", "o3"] {
                let mut c: Box<dyn Chooser> = match p {
                    "random" => Box::new(Random(Chance::new(1))),
                    "rr" => Box::new(InTurn::default()),
                    "etp" => Box::new(Reference::new(w, 8, *kv, 5.0, Chance::new(1))),
                    o => Box::new(Oracle { weight: o[1..].parse().unwrap(), chance: Chance::new(1) }),
                };
                let t = std::time::Instant::now();
                let m = run(&terms(full * load, p.starts_with('o'), false), &mut *c);
                println!(
                    "{name} {load} {p}: {:.1} / {:.2} / {:.1}  imb {:.2} p50 {:.2} ({:?})",
                    m.hit * 100.0,
                    m.mean_s,
                    m.p99_s,
                    m.imbalance,
                    m.p50_s,
                    t.elapsed()
                );
            }
        }
    }
}
