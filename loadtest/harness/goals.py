"""What is to be reached: figures of ours against those of another target in the same run, or against a number."""
from dataclasses import dataclass

from .figures import short

CPU, PER_EVENT, PEAK = ("closed", "cpu_us"), ("closed", "cpu_us_per_event"), ("start_rss_kb",)


@dataclass(frozen=True)
class Goal:
    case: str
    workload: str
    figure: tuple                 # where it stands below a target in the results
    most: float                   # what the figure, or its ratio to the other one, may be
    against: tuple | None = None  # (target, workload); None: `most` is the figure itself
    target: str = "vllm-proxy"
    per: float = 1                # the figure is divided by it

    def reached(self, results):
        """(the figure or ratio, whether that is enough); None where the run has not measured it."""
        value = at(results, self.workload, self.target, self.figure)
        if value is None:
            return None
        if self.against:
            other = at(results, self.against[1], self.against[0], self.figure)
            if not other:
                return None
            value /= other
        return value / self.per, value / self.per <= self.most


def versus(case, workload, most, other="nginx", figure=CPU, target="vllm-proxy"):
    return Goal(f"{case}, × {other}", workload, figure, most, (other, workload), target)


GOALS = [
    versus("small JSON, CPU per request", "small-json", 0.50),
    versus("small JSON, CPU per request", "small-json", 0.50, "haproxy"),
    versus("small JSON, CPU per request", "small-json", 0.11, "vllm-router"),
    versus("32 KB prompt, CPU per request", "prompt-32k", 0.95),
    versus("1 MB body, CPU per request", "prompt-1m", 0.70),
    versus("SSE at full speed, CPU per stream", "sse", 0.80),
    versus("SSE at full speed, first event p50", "sse", 1.00, figure=("rates", "100", "first_event_us", "p50")),
    versus("SSE every 10 ms, 64 streams, CPU per event", "sse-10ms-64", 0.75, figure=PER_EVENT),
    versus("SSE every 10 ms, 64 streams, event delay p99", "sse-10ms-64", 1.00, figure=("closed", "event_delay_us", "p99")),
    versus("small JSON on epoll, CPU per request", "small-json", 0.70, target="vllm-proxy-epoll"),
    Goal("RSS at start, MiB (index: 64)", "idle", PEAK, 15 + 64, per=1024),
    Goal("RSS of an idle connection, KiB", "idle", ("idle", "bytes_per_connection"), 8, per=1024),
    # 1.8 times the requests per second of CPU of two shards is 2 / 1.8 of the CPU per request
    Goal("2 shards on 2 cores, CPU per request, × 1 shard", "two-shards", CPU, 2 / 1.8, ("vllm-proxy", "one-shard")),
]


def at(results, workload, target, path):
    """A figure of a run; None where it has none."""
    found = results["workloads"].get(workload, {}).get("targets", {}).get(target)
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def table(results):
    """Lines of Markdown: each goal, what the run reached, and whether that is enough."""
    lines = ["| goal | at most | reached | |", "|---|--:|--:|---|"]
    for goal in GOALS:
        reached = goal.reached(results)
        value, met = (short(reached[0]), "met" if reached[1] else "**not met**") if reached else ("–", "not measured")
        lines.append(f"| {goal.case} | {short(goal.most)} | {value} | {met} |")
    return lines
