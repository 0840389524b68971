//! The real binary as a process.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
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
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-proxy"));
    command.args(["--host", "127.0.0.1", "--port", "0", "-L", "json"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    prepare(&mut command);
    let mut child = Ended(command.spawn().expect("cannot start the binary"));
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find(|line| line.contains("\"listening\"")).expect("it ended before it listened");
    let record: serde_json::Value = serde_json::from_str(&line).unwrap();
    let addr = record["address"].as_str().unwrap().parse().unwrap();
    // somebody must read on, or its log would be full
    thread::spawn(move || lines.for_each(drop));
    (child, addr)
}
