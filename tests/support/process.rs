//! The real binary as a process.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

/// A process that ends when the test does, however it does.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // an error means that it has ended already
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Starts the binary with `arguments` on a port of the kernel's choice; returns when it listens, with where.
///
/// # Panics
///
/// If it ends before it listens.
pub(crate) fn binary(arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> (Ended, SocketAddr) {
    let (child, addr, log) =
        binary_with_log(Command::new(env!("CARGO_BIN_EXE_vllm-proxy")), arguments, prepare);
    drop(log);
    (child, addr)
}

/// As [`binary`], by a command that ends in the program's name, with all that it logs.
pub(crate) fn binary_with_log(
    mut command: Command,
    arguments: &[&str],
    prepare: impl FnOnce(&mut Command),
) -> (Ended, SocketAddr, Log) {
    command.args(["--host", "127.0.0.1", "--port", "0", "-L", "json"]).args(arguments);
    if !arguments.contains(&"--redis") {
        // by itself, whoever is on this host
        command.args(["--redis", "none"]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    prepare(&mut command);
    let mut child = Ended(command.spawn().expect("cannot start the binary"));
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut early = Vec::new();
    let line = loop {
        let line = lines.next().expect("it ended before it listened");
        early.push(line.clone());
        if line.contains("\"listening\"") {
            break line;
        }
    };
    let record: serde_json::Value = serde_json::from_str(&line).unwrap();
    let addr = record["address"].as_str().unwrap().parse().unwrap();
    let log = Log(Arc::new(Mutex::new(early)));
    let all = log.0.clone();
    // somebody must read on, or its log would be full
    thread::spawn(move || lines.for_each(|line| all.lock().unwrap().push(line)));
    (child, addr, log)
}

/// The lines that a process has logged so far.
#[derive(Debug, Clone)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    /// Those that contain `text`.
    pub(crate) fn lines_with(&self, text: &str) -> Vec<String> {
        self.0.lock().unwrap().iter().filter(|line| line.contains(text)).cloned().collect()
    }
}
