"""The run: targets that share workers are started together and measured in turns."""
import contextlib, dataclasses, os, sys, time

from . import figures, passes
from .passes import Running
from .processes import Failed, built, cpu_ns, free_port, memory_kb
from .targets import Place


@dataclasses.dataclass(frozen=True)
class Manner:
    """How all of a run is measured."""
    rounds: int = 3
    seconds: int = 4
    warmup_seconds: int = 1
    one_core: bool = True         # load and workers on the target's core, too
    latencies: bool = True        # also at fixed rates
    system_calls: bool = True

    def cores(self, workload):
        """(of the target, of load and workers)"""
        allowed = sorted(os.sched_getaffinity(0))
        target = set(allowed[:workload.shards])
        if workload.all_cores:
            return target, set(allowed)
        return target, target if self.one_core else set(allowed) - target or target

    def planned_seconds(self, workload, targets):
        """About how long a workload takes; start-up apart."""
        if workload.kind == "idle":
            return 15 * len(targets)
        each = self.rounds * (self.seconds + (self.seconds + 0.5) * len(self.rates(workload))) + self.warmup_seconds * self.rounds
        return (each + (2 if self.system_calls else 0)) * len(targets)

    def rates(self, workload):
        return workload.rates if self.latencies else ()


class Progress:
    """Lines on stderr: what was measured, and how long the rest will take."""

    def __init__(self, planned_seconds):
        self.planned, self.done, self.began = planned_seconds, 0.0, time.monotonic()

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def step(self, text, seconds):
        self.done = min(self.done + seconds, self.planned)
        # the start-up of the first targets says little of the rest
        pace = (time.monotonic() - self.began) / self.done if self.done > self.planned / 20 else 1
        left = max(self.planned - self.done, 0) * pace
        self.say(f"[{100 * self.done / max(self.planned, 1):3.0f} %, {left // 60:.0f}:{left % 60:02.0f} left] {text}")


def able(targets, workload):
    """Those that can do it. The direct way goes to one worker, and there is nothing of it to see where memory is counted."""
    return [target for target in targets if target.name == "direct" and workload.kind == "load" and not workload.needs
            or target.name != "direct" and workload.needs <= target.abilities]


def plan(targets, workloads, manner):
    return sum(manner.planned_seconds(workload, able(targets, workload)) for workload in workloads)


def groups(workloads):
    """Workloads that share workers and targets, in the order in which the first of each is named."""
    found = {}
    for workload in workloads:
        found.setdefault(workload.setup, []).append(workload)
    return found.values()


def run(processes, targets, workloads, manner, progress, results):
    """Measures everything; what is known so far stands in `results`, also when this is interrupted."""
    for group in groups(workloads):
        with contextlib.ExitStack() as stack:
            running = {}
            workers = start_workers(processes, group[0], manner, stack)
            for target in able(targets, group[0]):
                try:
                    running[target.name] = start(processes, target, group[0], workers, manner, stack)
                except Failed as problem:
                    progress.say(f"{target.name}: {problem}")
                    for workload in group:
                        of(results, workload, target.name)["problem"] = str(problem)
            settle(running.values())
            for workload in group:
                measure(processes, running, workload, manner, progress, results)


def start_workers(processes, workload, manner, stack):
    """Mock workers, of the workload's models in turn."""
    workers, (_, others) = [], manner.cores(workload)
    for at in range(workload.workers):
        port = free_port()
        child = processes.start(f"mock-{at}", built("examples", "mock"), f"127.0.0.1:{port}", "--models", workload.models[at % len(workload.models)], cores=others)
        stack.callback(processes.end, child)
        processes.wait_for(child, f"mock-{at}", port)
        workers.append(f"127.0.0.1:{port}")
    return workers


def start(processes, target, workload, workers, manner, stack):
    if target.name == "direct":
        return Running(target.name, workers[0])
    place = Place(processes, workers, free_port(), free_port(), workload.large_bodies, workload.shards, aliases=workload.aliases)
    child = processes.start(target.name, *target.command(place), cores=manner.cores(workload)[0])
    stack.callback(processes.end, child)
    processes.wait_for(child, target.name, place.port, target.ready)
    return Running(target.name, f"127.0.0.1:{place.port}", child.pid, memory_kb(child.pid))


def settle(running, patience=10):
    """Until what was started has come to rest: uses less than a twentieth of a core."""
    for _ in range(int(patience / 0.2)):
        before = sum(cpu_ns(target.pid) for target in running if target.pid)
        time.sleep(0.2)
        if sum(cpu_ns(target.pid) for target in running if target.pid) - before < 0.05 * 0.2e9:
            return


def of(results, workload, target):
    """Where the results of a workload and a target stand."""
    whole = results["workloads"].setdefault(workload.name, {"summary": workload.summary, "connections": workload.connections, "workers": workload.workers, "targets": {}})
    return whole["targets"].setdefault(target, {})


def turned(names, at):
    """The names, begun with another one each time."""
    names = list(names)
    return names[at % len(names):] + names[:at % len(names)] if names else []


def measure(processes, running, workload, manner, progress, results):
    """All rounds of a workload, and the passes that need no rounds."""
    how = {"cores": manner.cores(workload)[1]}
    rounds = {name: [] for name in running}
    at_rates = {name: {rate: [] for rate in manner.rates(workload)} for name in running}
    for name, target in running.items():
        of(results, workload, name).update({"start_rss_kb": target.start_rss_kb} if target.pid else {})

    def attempt(name, step, seconds, said):
        """Whatever fails is said, and the others go on."""
        try:
            progress.step(f"{workload.name}: {name}: {said(step())}", seconds)
        except (Failed, OSError, ValueError, KeyError) as problem:
            progress.step(f"{workload.name}: {name}: {problem}", seconds)
            of(results, workload, name)["problem"] = str(problem)

    if workload.kind == "idle":
        for name, target in running.items():
            def idle(name=name, target=target):
                of(results, workload, name)["idle"] = passes.idle(processes, target, workload, **how)
                return of(results, workload, name)["idle"]
            attempt(name, idle, 15, lambda said: f"{said['bytes_per_connection']:.0f} bytes per connection")
        return
    for at in range(manner.rounds):
        for name in turned(running, at):
            target = running[name]

            def closed():
                if manner.warmup_seconds:
                    passes.loop(processes, target, workload, manner.warmup_seconds, **how)
                rounds[name].append(passes.closed(processes, target, workload, manner.seconds, **how))
                of(results, workload, name).update(rounds=rounds[name], closed=figures.summary(rounds[name]))
                return rounds[name][-1]

            attempt(name, closed, manner.seconds + manner.warmup_seconds, lambda said: f"round {at + 1} of {manner.rounds}: {brief(said)}")
        for rate in manner.rates(workload):
            for name in turned(running, at):
                def fixed():
                    at_rates[name][rate].append(passes.at_rate(processes, running[name], workload, manner.seconds, rate, **how))
                    return at_rates[name][rate][-1]

                attempt(name, fixed, manner.seconds + 0.5, lambda said: f"round {at + 1} of {manner.rounds} at {rate}/s: p99 {figures.short(said.get('latency_us', {}).get('p99'))} µs")
    for name, by_rate in at_rates.items():
        of(results, workload, name)["rates"] = {str(rate): figures.summary(seen) for rate, seen in by_rate.items() if seen}
    for name, target in running.items():
        for rate, seen in of(results, workload, name)["rates"].items():
            seen["added_us"] = figures.added(seen.get("latency_us"), at_direct(results, workload, rate)) if name != "direct" else None
        if manner.system_calls and target.pid is not None:
            def calls():
                of(results, workload, name)["system_calls"] = passes.system_calls(processes, target, workload, 1, **how)
                return of(results, workload, name)["system_calls"]
            attempt(name, calls, 2, lambda said: f"{figures.short(said)} system calls")


def at_direct(results, workload, rate):
    return of(results, workload, "direct").get("rates", {}).get(rate, {}).get("latency_us") if "direct" in results["workloads"][workload.name]["targets"] else None


def brief(said):
    parts = [f"{figures.short(said['cpu_us'])} µs CPU per request"] if said.get("cpu_us") else []
    parts += [f"{figures.short(said['cpu_us_per_event'])} per event"] if said.get("cpu_us_per_event") else []
    parts += [f"{said['rate']:.0f} requests/s"] + ([f"{said['failed']} FAILED"] if said.get("failed") else [])
    return ", ".join(parts)
