//! The load generator of the measurements: for what `wrk` and `oha` cannot do. Delays of events, clients that leave,
//! chats that grow, requests at a fixed rate whose latencies count from when they were due, idle connections, churn.
//!
//! `load --address 127.0.0.1:8000 --workload sse --gap-ms 10 --connections 64 --seconds 10` prints one JSON object;
//! `--list` tells the workloads, `--print-body` what they send.
//!
//! One thread, one event loop: on one core it makes about as many requests per second as `wrk` does. It speaks to one
//! address, without TLS, and reads answers with code of its own, not with the proxy's.
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "a tool for the terminal")]

mod answer;
mod bodies;
mod chance;
mod chunked;
mod clock;
mod connection;
mod events;
mod histogram;
mod idle;
mod run;
mod schedule;
mod tally;
mod timer;
mod workload;

use std::{
    ffi::OsString,
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    rc::Rc,
    time::Duration,
};

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use serde_json::json;
use tokio::task::LocalSet;

use crate::{
    bodies::Asked,
    chance::Chance,
    clock::now_ns,
    run::Run,
    schedule::{Arrivals, Schedule},
    tally::{Load, Tally},
    workload::{Manner, WORKLOADS, Workload},
};

/// How long answers are awaited after the end, beside the time that a stream takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// The length of a run of which only the number of requests is given, at most.
const LONGEST_SECONDS: f64 = 600.0;

/// Makes load, and measures what comes back.
#[derive(Debug, Parser)]
#[command(name = "load")]
struct Args {
    /// Where it goes
    #[arg(long, required_unless_present_any = ["list", "print_body"])]
    address: Option<SocketAddr>,

    /// What is sent
    #[arg(long, value_name = "NAME", value_parser = named, required_unless_present_any = ["list", "print_body"])]
    workload: Option<&'static Workload>,

    /// Connections; with --rate the most that there may be
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,

    /// Requests per second, however fast they are answered: an open loop. Latencies count from when a request was due
    /// [default: each connection sends as fast as it is answered]
    #[arg(long)]
    rate: Option<f64>,

    /// With --rate: the same pause between all requests, not pauses by chance (Poisson)
    #[arg(long)]
    even: bool,

    /// Measured requests, at most
    #[arg(long)]
    requests: Option<u64>,

    /// Seconds in which measured requests are sent [default: 10, or 600 at most with --requests]
    #[arg(long)]
    seconds: Option<f64>,

    /// Seconds before, in which requests are sent and not measured
    #[arg(long, default_value_t = 0.0)]
    warmup_seconds: f64,

    /// Seed of chance
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Milliseconds between events of a stream [default: 0, but 10 for `abort`]
    #[arg(long, value_parser = clap::value_parser!(u32).range(..=60_000))]
    gap_ms: Option<u32>,

    /// Events of a stream
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=99_999))]
    events: u32,

    /// Models that are asked for; only `two-models` asks for others than the first
    #[arg(long, value_delimiter = ',', default_value = "m")]
    models: Vec<String>,

    /// No line per second on stderr
    #[arg(long)]
    quiet: bool,

    /// Print the first body of a workload, and end
    #[arg(long, value_name = "NAME", value_parser = named)]
    print_body: Option<&'static Workload>,

    /// Print a line per workload (name, method, path, content type, what it is; tabs between them), and end
    #[arg(long)]
    list: bool,
}

fn named(name: &str) -> Result<&'static Workload, String> {
    Workload::named(name).ok_or_else(|| "no such workload".to_owned())
}

impl Args {
    fn read(words: impl Iterator<Item = OsString>) -> Result<Self, clap::Error> {
        let rows: Vec<String> =
            WORKLOADS.iter().map(|workload| format!("  {:14} {}", workload.name, workload.help)).collect();
        let command = Self::command().after_help(format!("Workloads:\n{}", rows.join("\n")));
        let args = Self::from_arg_matches(&command.try_get_matches_from(words)?)?;
        args.check()
            .map_err(|problem| Self::command().error(clap::error::ErrorKind::ValueValidation, problem))?;
        Ok(args)
    }

    fn check(&self) -> Result<(), &'static str> {
        let within = |value: f64, most: f64| value > 0.0 && value <= most;
        if !self.rate.is_none_or(|rate| within(rate, 1e6)) {
            return Err("--rate must be above 0, and 1000000 at most");
        }
        if !within(self.seconds.unwrap_or(1.0), 1e6) || !within(self.warmup_seconds + 1.0, 1e6) {
            return Err("seconds must be above 0, and 1000000 at most");
        }
        if self.workload.is_some_and(|workload| self.models.len() < workload.models) {
            return Err("--models must name two");
        }
        Ok(())
    }

    fn asked(&self, workload: &Workload) -> Asked {
        let gap_ms = self.gap_ms.unwrap_or(workload.gap_ms);
        Asked { models: self.models.clone(), seed: self.seed, events: self.events, gap_ms }
    }
}

fn main() -> ExitCode {
    let args = match Args::read(std::env::args_os()) {
        Ok(args) => args,
        Err(error) if error.use_stderr() => {
            eprintln!("{}", error.to_string().lines().next().unwrap_or_default());
            return ExitCode::from(2);
        }
        Err(help) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
    };
    match act(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(args: &Args) -> io::Result<()> {
    if args.list {
        for Workload { name, path, content_type, help, .. } in WORKLOADS {
            println!("{name}\tPOST\t{path}\t{content_type}\t{help}");
        }
        return Ok(());
    }
    if let Some(workload) = args.print_body {
        return io::stdout().write_all(&workload.body(&args.asked(workload)));
    }
    let (Some(address), Some(workload)) = (args.address, args.workload) else { return Ok(()) };
    vllm_proxy::base::raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        if workload.manner == Manner::Hold {
            hold(args, address, workload).await;
            return Ok(());
        }
        send(args, address, workload).await
    })
}

/// Runs a workload and prints what it came to.
async fn send(args: &Args, address: SocketAddr, workload: &'static Workload) -> io::Result<()> {
    let asked = args.asked(workload);
    let requests = workload.requests(address, &asked);
    let seconds = args.seconds.unwrap_or(if args.requests.is_some() { LONGEST_SECONDS } else { 10.0 });
    let start_ns = now_ns();
    let begin_ns = start_ns + (args.warmup_seconds * 1e9) as u64;
    let end_ns = begin_ns + (seconds * 1e9) as u64;
    let arrivals = args.rate.map(|rate| {
        let chance = (!args.even).then(|| Chance::new(args.seed));
        Arrivals::new(start_ns, rate, chance)
    });
    let schedule = Schedule::new(arrivals, begin_ns, end_ns, args.requests.unwrap_or(u64::MAX));
    let what = (address, workload.streams, workload.manner);
    let run = Run::new(what, args.connections as usize, requests, schedule, Chance::new(!args.seed));
    if !args.quiet {
        tokio::task::spawn_local(tell(run.clone()));
    }
    let stream = Duration::from_millis(u64::from(asked.gap_ms) * u64::from(asked.events));
    let deadline = Duration::from_nanos(end_ns - start_ns) + stream + PATIENCE;
    run.drive(deadline).await?;
    print(args, workload, &run.tally.borrow(), begin_ns, 0);
    Ok(())
}

/// Holds connections until stdin is closed, and prints what it came to.
async fn hold(args: &Args, address: SocketAddr, workload: &'static Workload) {
    let begin_ns = now_ns();
    let mut tally = Tally::new();
    let request = workload.requests(address, &args.asked(workload)).next();
    let open = idle::open(address, args.connections as usize, request, &mut tally).await;
    println!("{}", json!({ "idle": open.len() }));
    idle::stdin_closed().await;
    let idle = open.iter().filter(|connection| connection.is_open()).count();
    print(args, workload, &tally, begin_ns, idle);
}

fn print(args: &Args, workload: &Workload, tally: &Tally, begin_ns: u64, idle: usize) {
    let connections = args.connections as usize;
    let load = Load { workload: workload.name, connections, rate: args.rate, begin_ns, idle };
    println!("{}", tally.report(&load));
}

/// Says once a second how far it is.
async fn tell(run: Rc<Run>) {
    let mut each = tokio::time::interval(Duration::from_secs(1));
    each.tick().await;
    let (mut before, mut second) = (0, 0);
    loop {
        each.tick().await;
        second += 1;
        let tally = run.tally.borrow();
        let (now, failed) = (tally.ended(), tally.failed);
        let p99_ms = tally.latency.percentile_ns(0.99) as f64 / 1e6;
        eprintln!("{second:4} s  {:8} requests/s  p99 {p99_ms:.2} ms  {failed} failed", now - before);
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Args, String> {
        let words = ["load"].into_iter().chain(line.split_whitespace()).map(OsString::from);
        Args::read(words).map_err(|error| error.to_string().lines().next().unwrap_or_default().to_owned())
    }

    #[test]
    fn the_command_line_is_what_the_harness_writes() {
        let args = read(
            "--address 127.0.0.1:1 --workload sse --connections 64 --rate 2.5 --requests 7 --seconds 0.5 --warmup-seconds 0 --seed 3 --gap-ms 10 --events 20 --models a,b --quiet",
        );
        let args = args.unwrap();
        let asked = args.asked(args.workload.unwrap());
        assert_eq!((asked.events, asked.gap_ms, asked.seed, asked.models.len()), (20, 10, 3, 2));
        assert_eq!((args.rate, args.seconds, args.requests), (Some(2.5), Some(0.5), Some(7)));
        assert!(read("--list").is_ok() && read("--print-body chats").is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_line() {
        let wanted = "--address 127.0.0.1:1 --workload small-json";
        assert!(read(wanted).is_ok());
        for wrong in
            ["--rate 0", "--rate nan", "--seconds -1", "--connections 0", "--events 0", "--warmup-seconds -2"]
        {
            let problem = read(&format!("{wanted} {wrong}")).unwrap_err();
            assert!(problem.starts_with("error: "), "{wrong}: {problem}");
        }
        for wrong in [
            "",
            "--workload sse",
            "--address x --workload sse",
            "--address 127.0.0.1:1 --workload two-models",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
