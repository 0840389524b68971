"""The load generators: wrk for closed loops of one body, oha for fixed rates, our own `load` for the rest.

Each function returns a dict of the same names: `requests` (whole ones), `rate` (per second), `seconds`, `failed`, `latency_us` (percentiles), and what
only `load` knows: `first_event_us`, `event_delay_us`, `events`, `offered_rate`. `how` goes to `Processes.run`: on which cores, under which command.
"""
import json, os, subprocess
from dataclasses import dataclass

from .processes import Failed, built, tool
from .targets import oha

PATIENCE = 60  # seconds above those asked for until a generator counts as stuck


@dataclass(frozen=True)
class Body:
    """What is sent again and again; `file` holds its bytes."""
    method: str
    path: str
    content_type: str
    file: str


WRK = """
wrk.method, wrk.path = "{method}", "{path}"
wrk.headers["Content-Type"] = "{content_type}"
local file = io.open("{file}", "rb")
wrk.body = file:read("*a")
file:close()
done = function(summary, latency)
  local e = summary.errors
  print(string.format("RESULT %d %d %d %d %d %d %d %d", summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency:percentile(99.9), latency.max))
end
"""


def wrk(processes, address, body, connections, seconds, **how):
    """As many requests as are answered on that many connections. Its latencies say nothing of a fixed rate."""
    script = processes.write("wrk.lua", WRK.format(**vars(body)))
    return read_wrk(processes.run("wrk", tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", script, f"http://{address}/",
                                  seconds=seconds + PATIENCE, **how))


def read_wrk(printed):
    line = next((line for line in printed.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise Failed(f"wrk has printed no result: {printed[-200:]!r}")
    requests, micros, failed, *latency = map(int, line.split()[1:])
    return {"requests": requests, "rate": requests / max(micros, 1) * 1e6, "seconds": micros / 1e6, "failed": failed, "latency_us": dict(zip(("p50", "p90", "p99", "p999", "max"), map(float, latency)))}


def oha_at(processes, address, body, connections, seconds, rate, **how):
    """So many requests per second, whether or not earlier ones are answered; a request that waits for a connection waits since it was due.
    One that is still waiting when time is over is never sent: `unsent` says which share of all, so that nobody takes the rest for the whole."""
    return read_oha(processes.run(
        "oha", oha(), "--no-tui", "--output-format", "json", "-z", f"{seconds}s", "-w", "-q", rate, "--latency-correction", "-c", connections, "-m", body.method,
        "-T", body.content_type, "-D", body.file, f"http://{address}{body.path}", seconds=seconds + PATIENCE, **how), rate, seconds)


def read_oha(printed, rate, seconds):
    said = json.loads(printed)
    codes = said["statusCodeDistribution"]
    good = sum(count for code, count in codes.items() if code.startswith("2"))
    failed = sum(codes.values()) - good + sum(said["errorDistribution"].values())
    latency = {name: said["latencyPercentiles"][key] for name, key in (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9"))}
    return {"requests": good, "rate": said["summary"]["requestsPerSec"], "seconds": said["summary"]["total"], "offered_rate": rate, "failed": failed,
            "unsent": max(1 - (good + failed) / (rate * seconds), 0.0), "latency_us": {name: value * 1e6 for name, value in latency.items() if value is not None}}


def load_command(address, workload, connections, seconds=None, rate=None):
    """Command line of our own generator for a workload."""
    words = [built("examples", "load"), "--address", address, "--workload", workload.load, "--connections", connections, "--quiet"]
    if seconds:
        words += ["--seconds", seconds, "--warmup-seconds", 0]
    if rate:
        words += ["--rate", rate]
    return [*words, *workload.flags]


def load(processes, address, workload, connections, seconds, rate=None, **how):
    said = json.loads(processes.run("load", *load_command(address, workload, connections, seconds, rate), seconds=seconds + PATIENCE, **how))
    if said["failed"]:
        said["first_failure"] = str(said.get("first_failure"))
    return said


def bodies():
    """What `load` knows to send: name → (method, path, content type); empty where it is not built."""
    if not os.path.exists(built("examples", "load")):
        return {}
    listed = subprocess.run([built("examples", "load"), "--list"], capture_output=True, text=True, check=True).stdout
    return {name: (method, path, kind) for name, method, path, kind, *_ in (line.split("\t") for line in listed.splitlines() if line)}


def body_of(processes, name):
    """The very bytes that `load` sends for this workload, in a file."""
    method, path, kind = bodies()[name]
    file = processes.path(f"body-{name}")
    if not os.path.exists(file):
        with open(file, "wb") as out:
            processes.end(waited(processes.start(f"body-{name}", built("examples", "load"), "--print-body", name, stdout=out)))
    return Body(method, path, kind, file)


def waited(child):
    child.wait(PATIENCE)
    return child


def versions():
    """Of wrk and of oha, as they say it."""
    said = {}
    for name, path, flag in (("wrk", tool("wrk"), "-v"), ("oha", oha(), "--version")):
        if path:
            printed = subprocess.run([path, flag], capture_output=True, text=True, timeout=20)
            said[name] = (printed.stdout + printed.stderr).strip().split("\n")[0].split(" Copyright")[0]
    return said
