//! The real binary, where the kernel refuses io_uring as containers' seccomp profiles do.

#![expect(unsafe_code, reason = "a seccomp filter is set between fork and exec")]

use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use crate::support::Ended;

/// What container runtimes, old kernels, sandboxes and a tight RLIMIT_MEMLOCK answer (`faults.md` P8).
const REFUSALS: [i32; 4] = [libc::EPERM, libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOMEM];

/// The binary with a filter that answers `errno` to the three system calls of io_uring.
fn without_io_uring(errno: i32, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-proxy"));
    command.args(["--host", "127.0.0.1", "--port", "0", "--worker-urls", "http://127.0.0.1:9", "-L", "json"]);
    command.args(["--redis", "none"]);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only system calls are made, on memory that was made before.
    unsafe { command.pre_exec(move || refuse_io_uring(errno)) };
    command
}

fn refuse_io_uring(errno: i32) -> std::io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = |k: u32, jt: u8| libc::sock_filter {
        jt,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k)
    };
    let filter = [
        // the number of the system call: the first field of seccomp_data
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        jump(425, 3),
        jump(426, 2),
        jump(427, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: plain numbers.
    let bound = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program outlives the call.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if bound == 0 && set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn a_refused_ring_falls_back_to_epoll_and_says_so_in_one_line() {
    for errno in REFUSALS {
        let mut child = Ended(without_io_uring(errno, &[]).spawn().expect("it starts"));
        let lines = BufReader::new(child.0.stdout.take().expect("a pipe")).lines();
        let mut said = 0;
        for line in lines {
            let line = line.expect("text");
            said += usize::from(line.contains("io_uring is refused"));
            if line.contains("\"listening\"") {
                assert!(line.contains("\"io\":\"epoll\""), "{line}");
                break;
            }
        }
        assert_eq!(said, 1, "errno {errno}");
    }
}

#[test]
fn who_insists_on_io_uring_gets_a_reason_instead_of_a_start() {
    let output = without_io_uring(libc::EPERM, &["--io", "uring"]).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("--io uring") && said.contains("not permitted"), "{said}");
}

#[test]
fn epoll_is_used_where_it_is_asked_for() {
    let config = vllm_proxy::config::Config::from_flags([
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--io",
        "epoll",
        "--redis",
        "none",
        "--worker-urls",
        "http://127.0.0.1:9",
    ]);
    let running = vllm_proxy::app::start(config.expect("flags")).expect("it starts");
    assert_eq!(running.driver(), vllm_proxy::net::Driver::Epoll);
    running.drain();
    running.wait().expect("a clean end");
}
