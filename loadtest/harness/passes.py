"""One measurement of one target that runs."""
import contextlib, functools, json, os, select, signal, subprocess, time
from dataclasses import dataclass

from . import tools
from .figures import ratio
from .processes import Failed, cpu_ns, family, forget_peak, memory_kb, open_files, tool


@dataclass(frozen=True)
class Running:
    """A target that serves, or something else at an address."""
    name: str
    address: str                 # HOST:PORT
    pid: int | None = None       # None: nothing is known of the process (the direct way)
    start_rss_kb: int | None = None


def loop(processes, running, workload, seconds, rate=None, **how):
    """What the workload's generator reports: of a closed loop, or of a fixed rate."""
    if rate is None and workload.tool == "wrk":
        return tools.wrk(processes, running.address, tools.body_of(processes, workload.load), workload.connections, seconds, **how)
    if rate is not None and workload.tool == "wrk" and tools.oha():
        return tools.oha_at(processes, running.address, tools.body_of(processes, workload.load), max(workload.connections, 64), seconds, rate, **how)
    return tools.load(processes, running.address, workload, workload.connections, seconds, rate, **how)


def counts(said, workload):
    """(exchanges, events) of what a generator reports: one that the client left in the middle is an exchange, too."""
    exchanges = said["requests"] + said.get("aborted", 0)
    return exchanges, said.get("events") or exchanges * workload.events


def closed(processes, running, workload, seconds, **how):
    """As much as is answered: CPU time of the target per request and per event, its peak memory, and what the generator saw."""
    if running.pid is not None:
        forget_peak(running.pid)
    before = cpu_ns(running.pid) if running.pid is not None else 0
    said = loop(processes, running, workload, seconds, **how)
    used_us = (cpu_ns(running.pid) - before) / 1000 if running.pid is not None else None
    exchanges, events = counts(said, workload)
    figures = {name: said.get(name) for name in ("requests", "rate", "failed", "first_failure", "aborted", "latency_us", "first_event_us", "event_delay_us")}
    figures |= {"events_per_second": ratio(events, said["seconds"]) if events else None, "cpu_us": ratio(used_us, exchanges), "cpu_us_per_event": ratio(used_us, events),
                "peak_rss_kb": memory_kb(running.pid, "VmHWM") if running.pid is not None else None}
    return {name: value for name, value in figures.items() if value is not None}


def at_rate(processes, running, workload, seconds, rate, **how):
    """Latencies at a fixed rate, from when a request was due; and how late the generator itself has sent, where it tells."""
    said = loop(processes, running, workload, seconds, rate, **how)
    return {name: said[name] for name in ("requests", "rate", "offered_rate", "failed", "first_failure", "unsent", "latency_us", "first_event_us", "event_delay_us", "sent_late_us")
            if said.get(name) is not None}


@functools.cache
def perf_counts():
    """Whether perf may count system calls, which costs the target next to nothing."""
    if not tool("perf"):
        return False
    tried = subprocess.run(["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "true"], capture_output=True, text=True)
    return tried.returncode == 0 and read_perf(tried.stderr) is not None


def system_calls(processes, running, workload, seconds, **how):
    """System calls of the target per request (per event of a stream), in a run of its own; None without perf and strace."""
    pids, counted = family(running.pid), processes.path("system-calls")
    if perf_counts():
        counter = ["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "-o", counted, "-p", ",".join(map(str, pids)), "--"]
        said, read = loop(processes, running, workload, seconds, before=counter, **how), read_perf
    elif tool("strace"):
        with stracing(processes, pids, counted):
            said, read = loop(processes, running, workload, seconds, **how), read_strace
    else:
        return None
    with open(counted) as file:
        calls = read(file.read())
    exchanges, events = counts(said, workload)
    return ratio(calls, events or exchanges)


@contextlib.contextmanager
def stracing(processes, pids, counted):
    """strace -c of these processes; it is attached when this begins and has written when this ends."""
    tracer = processes.start("strace", "strace", "-f", "-c", "-o", counted, *(word for pid in pids for word in ("-p", pid)))
    deadline = time.monotonic() + 10
    while not all(traced(pid) for pid in pids):
        if time.monotonic() > deadline or tracer.poll() is not None:
            raise Failed(f"strace does not attach: {processes.said('strace')}")
        time.sleep(0.02)
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tools.waited(tracer)
        processes.end(tracer)


def traced(pid):
    with open(f"/proc/{pid}/status") as status:
        return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status)


def read_perf(said):
    """The count in what `perf stat -x,` writes; None where it could not count."""
    for line in said.splitlines():
        words = line.split(",")
        if len(words) > 2 and words[2].startswith("raw_syscalls") and words[0].isdigit():
            return int(words[0])
    return None


def read_strace(said):
    """The sum in what `strace -c` writes; None without one."""
    for line in said.splitlines():
        words = line.split()
        if len(words) >= 5 and words[-1] == "total":
            return int(words[3])
    return None


def idle(processes, running, workload, **how):
    """Memory of connections that do nothing: what the target has more with them than without, per connection.
    There are fewer of them than asked for where a process may not have that many open."""
    forget_peak(running.pid)
    before = memory_kb(running.pid)
    connections = min(workload.connections, open_files() - 1000)
    child = processes.start("idle", *tools.load_command(running.address, workload, connections), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)
    try:
        said = json.loads(line_of(child.stdout, tools.PATIENCE))
        with_them = memory_kb(running.pid)
        child.stdin.close()
    finally:
        processes.end(child)
    return {"idle": said["idle"], "start_rss_kb": running.start_rss_kb, "peak_rss_kb": memory_kb(running.pid, "VmHWM"),
            "bytes_per_connection": (with_them - before) * 1024 / max(said["idle"], 1)}


def line_of(pipe, seconds):
    """The first line of a pipe."""
    read, deadline = b"", time.monotonic() + seconds
    while b"\n" not in read and select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
        more = os.read(pipe.fileno(), 4096)
        if not more:
            break
        read += more
    if b"\n" not in read:
        raise Failed(f"the connections are not there after {seconds} s")
    return read.split(b"\n")[0]
