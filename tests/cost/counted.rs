//! The binary below a program that counts what it does.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    scene::{QUIET, Scene, Thread},
    support::{Ended, Io, binary_with_log},
};

/// A folder that is gone when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vllm-proxy-cost-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap_or_default();
    }
}

/// Starts `command`, which ends in the binary's name.
///
/// # Panics
/// If its program is missing, or may not look at what it starts.
fn start(command: Command, io: Io, scene: &Scene) -> (Ended, SocketAddr) {
    let there = Command::new(command.get_program()).arg("--version").stdout(Stdio::null()).status();
    assert!(there.is_ok(), "{:?} is missing; `tests/run --only-install` installs it", command.get_program());
    let (io, url) = (if io == Io::Uring { "uring" } else { "epoll" }, scene.worker().url());
    let mut arguments = vec!["--io", io, "--no-pin", "--worker-urls", &url];
    QUIET.iter().for_each(|(name, value)| arguments.extend([name, value]));
    let (child, addr, log) = binary_with_log(command, &arguments, |command| {
        // there it says why, if it may not
        command.stderr(Stdio::inherit());
    });
    drop(log);
    (child, addr)
}

/// The binary, each of whose threads has its system calls written into a file of its own.
pub(crate) struct Strace {
    folder: Folder,
    pub(crate) addr: SocketAddr,
    pub(crate) shard: Thread,
    binary: Pid,
    strace: Ended,
}

impl Strace {
    /// # Panics
    /// If there is no strace, or the kernel does not let it look at its own child.
    pub(crate) fn start(io: Io, scene: &Scene) -> Self {
        let folder = Folder::new();
        let mut command = Command::new("strace");
        command.args(["-qq", "-ff", "-o"]).arg(folder.0.join("of")).arg(env!("CARGO_BIN_EXE_vllm-proxy"));
        let (strace, addr) = start(command, io, scene);
        let threads = fs::read_dir(&folder.0).unwrap();
        let threads = threads.map(|file| file.unwrap().path().extension().unwrap().to_str().unwrap().parse());
        let shard = Thread::shard_of(threads.map(Result::unwrap));
        let status = fs::read_to_string(format!("/proc/{}/status", shard.0)).unwrap();
        let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")).unwrap().trim().parse();
        Self { folder, addr, shard, binary: Pid::from_raw(process.unwrap()).unwrap(), strace }
    }

    /// System calls of the shard that have ended, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        let file = self.folder.0.join(format!("of.{}", self.shard.0));
        let text = String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned();
        // what has not ended has no line end
        let ended = text.rsplit_once('\n').map_or("", |(ended, _)| ended);
        ended.lines().map(str::to_owned).collect()
    }
}

/// What a system call told an io_uring to do; `None`: it is another one.
pub(crate) fn submitted(call: &str) -> Option<u64> {
    call.strip_prefix("io_uring_enter(")?.split(", ").nth(1)?.parse().ok()
}

impl Drop for Strace {
    fn drop(&mut self) {
        // strace would let it live on; an error means that it has ended already
        kill_process(self.binary, Signal::KILL).ok();
        self.strace.0.wait().ok();
    }
}

/// The binary, whose instructions in user space are counted from its first to its last, thread by thread.
pub(crate) struct Callgrind {
    /// Each thread's has its number behind it.
    profile: PathBuf,
    pub(crate) addr: SocketAddr,
    pub(crate) shard: Thread,
    valgrind: Ended,
}

impl Callgrind {
    /// # Panics
    /// If there is no valgrind.
    pub(crate) fn start(io: Io, scene: &Scene, name: &str) -> Self {
        let mut command = Command::new("valgrind");
        let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let out = format!("--callgrind-out-file={}", profile.display());
        command.args(["-q", "--tool=callgrind", "--separate-threads=yes", &out]);
        command.arg(env!("CARGO_BIN_EXE_vllm-proxy"));
        let (valgrind, addr) = start(command, io, scene);
        let shard = Thread::shard_of_process(valgrind.0.id());
        Self { profile, addr, shard, valgrind }
    }

    /// Ends it.
    pub(crate) fn end(mut self) -> Vec<Profile> {
        let process = Pid::from_child(&self.valgrind.0);
        kill_process(process, Signal::TERM).unwrap();
        assert!(self.valgrind.0.wait().unwrap().success(), "it ended badly");
        let of_thread = |thread| PathBuf::from(format!("{}-{thread:02}", self.profile.display()));
        (1..).map(of_thread).map_while(Profile::read).collect()
    }
}

/// What a thread has done.
pub(crate) struct Profile {
    pub(crate) path: PathBuf,
    pub(crate) instructions: u64,
}

impl Profile {
    fn read(path: PathBuf) -> Option<Self> {
        let text = fs::read_to_string(&path).ok()?;
        let totals = text.lines().find_map(|line| line.strip_prefix("totals: "));
        Some(Self { path, instructions: totals.map_or(0, |totals| totals.trim().parse().unwrap()) })
    }
}
