"""Processes of a run: each is started pinned, is read through /proc, and ends with the script whatever ends it."""
import contextlib, ctypes, glob, os, resource, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request

ROOT = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


def built(*names):
    """Path of what `cargo build --release` has made: a binary, or an example as ("examples", name)."""
    return os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release", *names)


def tool(name):
    """Path of a program, or None: nginx and HAProxy are in a folder that not every user searches."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def open_files():
    """How many files a process of the run may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files():
    """As many open files as this user may have, for all that is started."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for most in (max(hard, 65_536), hard):  # only root may go above the hard limit
        with contextlib.suppress(ValueError, OSError):
            return resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Processes:
    """Context that ends everything it has started, by pid; output goes to files in `folder`, which is left only where something failed."""

    def __init__(self, prefix):
        self.folder, self.running = tempfile.mkdtemp(prefix=f"{prefix}-"), []

    def __enter__(self):
        # a signal that ends Python at once would skip __exit__
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        return self

    def __exit__(self, kind, problem, _):
        for child in self.running:
            child.send_signal(signal.SIGTERM)
        for child in list(self.running):
            self.end(child)
        if kind is None or not issubclass(kind, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            print(f"what was started has written to {self.folder}", file=sys.stderr)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        with open(self.path(name), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return self.path(name)

    def start(self, name, *command, cores=None, **options):
        """Starts a command on these cores; what it prints goes to NAME.log unless `stdout` says otherwise."""
        parent = os.getpid()

        def child():
            # ends with us, even if we are killed; its own session keeps the terminal's Ctrl-C to us, who end it in order
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
            if cores is not None:
                os.sched_setaffinity(0, cores)

        with open(self.path(f"{name}.log"), "ab") as log:
            started = subprocess.Popen([str(word) for word in command], preexec_fn=child, start_new_session=True,
                                       **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **options})
        self.running.append(started)
        return started

    def end(self, child, patience=5):
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
        # what it has started itself is in its session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        self.running.remove(child)

    def run(self, name, *command, cores=None, seconds=60, before=()):
        """Runs a command to its end, under another one if `before` names it, and returns what it wrote to stdout."""
        child = self.start(name, *before, *command, cores=cores, stdout=subprocess.PIPE, text=True)
        try:
            printed, _ = child.communicate(timeout=seconds)
        finally:
            self.end(child)
        if child.returncode:
            raise Failed(f"{name} ended with {child.returncode}: {self.said(name)}")
        return printed

    def said(self, name):
        """The last lines of its log."""
        with open(self.path(f"{name}.log"), errors="replace") as file:
            return " / ".join(file.read().split("\n")[-4:]).strip(" /") or "it has said nothing"

    def wait_for(self, child, name, port, path=None):
        """Until the port accepts connections and, if a path is given, answers it with 200."""
        self.wait_until(child, name, lambda: answers(port, path))

    def wait_until(self, child, name, ready, patience=30):
        deadline = time.monotonic() + patience
        while not ready():
            if child.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"{name} is not ready: {self.said(name)}")
            time.sleep(0.05)


class Failed(Exception):
    """Something of the run does not work; the text says what."""


def answers(port, path=None):
    try:
        if path is None:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return True
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def family(pid):
    """The pid and all below it."""
    pids = [pid]
    for file in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(file) as children:
            for child in children.read().split():
                pids += family(int(child))
    return pids


def cpu_ns(pid, thread=None):
    """CPU time of a process and all below it, in ns; of the threads whose name begins so, if that is given."""
    total = 0
    for one in family(pid):
        for task in glob.glob(f"/proc/{one}/task/*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                with open(f"{task}/comm") as name:
                    if thread is not None and not name.read().startswith(thread):
                        continue
                with open(f"{task}/schedstat") as times:
                    total += int(times.read().split()[0])
    return total


def memory_kb(pid, line="VmRSS"):
    """Resident memory of a process and all below it; `VmHWM` is its peak."""
    total = 0
    for one in family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{one}/status") as status:
            total += sum(int(text.split()[1]) for text in status if text.startswith(f"{line}:"))
    return total


def forget_peak(pid):
    """The peak counts from here on, where the kernel lets us."""
    for one in family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{one}/clear_refs", "w") as file:
            file.write("5")
