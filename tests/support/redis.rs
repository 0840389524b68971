//! A real redis-server of a test's own.

use std::{
    cell::Cell,
    fs,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use redis::{Connection, FromRedisValue, RedisResult};

use crate::support::eventually;

/// The stream of the proxies.
pub(crate) const NEWS: &str = "vllm-proxy:1:news";

/// A redis-server that ends when the test does, on a port of its own that stays its own over a restart.
pub(crate) struct Redis {
    folder: PathBuf,
    arguments: Vec<String>,
    port: u16,
    /// Somebody may know the port already.
    told: Cell<bool>,
    child: Option<Child>,
}

/// Starts a redis-server that keeps nothing on disk.
pub(crate) fn redis() -> Redis {
    redis_with(&[])
}

/// As [`redis`], with further arguments.
pub(crate) fn redis_with(arguments: &[&str]) -> Redis {
    let mut server = absent_redis(arguments);
    server.start();
    server
}

/// One that is not started yet.
pub(crate) fn absent_redis(arguments: &[&str]) -> Redis {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("vllm-proxy-redis-{}-{count}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
    Redis { folder, arguments, port: free_port(), told: Cell::new(false), child: None }
}

/// A port below those that the kernel deals out, so that nobody gets it while the server restarts.
fn free_port() -> u16 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let port = || {
        10_000 + (std::process::id().wrapping_add(97 * COUNT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16
    };
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    std::iter::repeat_with(port).take(1000).find(free).expect("a free port")
}

impl Redis {
    /// Starts it (again), at the same address; returns when it answers.
    pub(crate) fn start(&mut self) {
        self.spawn();
        eventually("the redis-server answers", || {
            let ended = self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some());
            if ended {
                // somebody else has the port
                assert!(!self.told.get(), "{}", fs::read_to_string(self.folder.join("log")).unwrap());
                self.port = free_port();
                self.spawn();
            }
            self.answers()
        });
    }

    fn spawn(&mut self) {
        let socket = self.socket();
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string()])
            .args(["--unixsocket", socket.to_str().unwrap(), "--dir", self.folder.to_str().unwrap()])
            .args(["--save", "", "--appendonly", "no"])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(fs::File::create(self.folder.join("log")).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server can be started; tests/run installs it");
        self.child = Some(child);
    }

    /// Whether it is there; a password may be wanted: any answer is enough.
    fn answers(&self) -> bool {
        let url = format!("unix://{}", self.socket().display());
        match redis::Client::open(url).unwrap().get_connection() {
            Ok(mut connection) => {
                !redis::cmd("PING").query::<String>(&mut connection).is_err_and(|error| error.is_io_error())
            }
            Err(error) => !error.is_io_error(),
        }
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // an error means that it has ended already
            child.kill().ok();
            child.wait().unwrap();
        }
    }

    /// Lets it do nothing at all until [`Redis::cont`].
    pub(crate) fn stop(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on.
    pub(crate) fn cont(&self) {
        self.signal(libc::SIGCONT);
    }

    #[expect(unsafe_code, reason = "kill(2) has no safe name in std")]
    fn signal(&self, signal: libc::c_int) {
        let pid = self.child.as_ref().expect("it runs").id() as libc::pid_t;
        // SAFETY: a plain system call, on a child that was not waited for.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    }

    /// Its URL.
    pub(crate) fn url(&self) -> String {
        self.told.set(true);
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> (Ipv4Addr, u16) {
        self.told.set(true);
        (Ipv4Addr::LOCALHOST, self.port)
    }

    /// Its URL, of this user (`user:password`) and database.
    pub(crate) fn url_of(&self, user: &str, database: u32) -> String {
        self.told.set(true);
        format!("redis://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// The path of its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("redis.sock")
    }

    /// A connection to it, as `user:password`; nothing: as everybody.
    pub(crate) fn client_of(&self, user: &str) -> Connection {
        let url = if user.is_empty() { self.url() } else { self.url_of(user, 0) };
        redis::Client::open(url).unwrap().get_connection().unwrap()
    }

    /// What it answers to a command.
    #[track_caller]
    pub(crate) fn ask<T: FromRedisValue>(&self, command: &[&str]) -> T {
        self.try_ask(command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// What it answers to a command, or why not.
    pub(crate) fn try_ask<T: FromRedisValue>(&self, command: &[&str]) -> RedisResult<T> {
        let mut asked = redis::cmd(command[0]);
        asked.arg(&command[1..]);
        asked.query(&mut self.client_of(""))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
        // best effort: it is in the folder for what may go
        fs::remove_dir_all(&self.folder).ok();
    }
}
