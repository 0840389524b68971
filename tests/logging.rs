use std::{
    fs::{self, File, OpenOptions},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use vllm_proxy::base::Clock;

/// A debug build on a busy machine starts within this.
const PATIENCE_MS: u64 = 30_000;

/// A proxy that logs everything there is to log to `stdout`, and goes on logging: its worker never answers.
fn proxy(stdout: impl Into<Stdio>) -> Child {
    Command::new(env!("CARGO_BIN_EXE_vllm-proxy"))
        .env_clear()
        .args(["--worker-urls", "http://127.0.0.1:1", "--host", "127.0.0.1", "--port", "0", "-vvv"])
        .args(["--redis", "none"])
        .args(["--health-check-interval-secs", "0.05"])
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs")
}

/// Waits until the process handles SIGTERM, and so runs.
fn started(child: &mut Child) {
    let (clock, path) = (Clock::start(), format!("/proc/{}/status", child.id()));
    let handles_sigterm = || {
        let status = fs::read_to_string(&path).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
        Some(caught >> (Signal::TERM.as_raw() - 1) & 1 == 1)
    };
    while handles_sigterm() != Some(true) {
        assert_eq!(child.try_wait().expect("it can be asked"), None, "it ended before it ran");
        assert!(clock.millis() < PATIENCE_MS, "it does not run");
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// Asks the process to end; it must do so in the ordinary way.
fn ends_well(mut child: Child) {
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).expect("it can be signalled");
    let clock = Clock::start();
    let status = loop {
        match child.try_wait().expect("it can be asked") {
            Some(status) => break status,
            None if clock.millis() < PATIENCE_MS => thread::park_timeout(Duration::from_millis(5)),
            None => {
                child.kill().expect("it can be killed");
                panic!("it does not end");
            }
        }
    };
    assert!(status.success(), "{status}");
}

fn dev_full() -> File {
    OpenOptions::new().write(true).open("/dev/full").expect("Linux has it")
}

#[test]
fn a_full_disk_does_not_end_the_proxy() {
    let mut child = proxy(dev_full());
    started(&mut child);
    ends_well(child);
}

#[test]
fn a_closed_stdout_does_not_end_the_proxy() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut child = proxy(writer);
    started(&mut child);
    ends_well(child);
}

#[test]
fn a_stdout_that_nobody_reads_does_not_hold_the_proxy() {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    // The pipe is full, so that the very first record sticks.
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe has this");
    while std::io::Write::write(&mut writer, &[b' '; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("a pipe has this");
    let mut child = proxy(writer);
    started(&mut child);
    ends_well(child);
    drop(reader);
}
