"""What a run says in the end: tables in Markdown, everything in JSON, and on which machine."""
import json, os, platform, shlex, subprocess, sys, time

from . import plot
from .figures import PERCENTILES, ratio, short
from .processes import ROOT

BASE = "nginx"  # what ratios are to, where it was measured
UNSENT = 0.02   # share of a fixed rate's requests that may be missing at the end of a run


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine():
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1])
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "allowed_cores": len(os.sched_getaffinity(0)), "memory_mb": memory // 1024,
            "kernel": platform.release(), "virtual": output("systemd-detect-virt") or ("hypervisor" if "hypervisor" in open("/proc/cpuinfo").read() else "none"),
            "load_before": [round(load, 2) for load in os.getloadavg()]}


def header(settings):
    """What every results.json begins with."""
    commit = output("git", "rev-parse", "HEAD")
    dirty = bool(output("git", "status", "--porcelain", "--untracked-files=no"))
    return {"command": shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]), "commit": commit + ("+" if dirty else ""), "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(), "settings": settings, "versions": {"python": platform.python_version()}, "workloads": {}}


def base_of(targets):
    """The target whose ratio is 1."""
    return next((name for name in (BASE, *targets) if name in targets and name != "direct"), "direct")


def with_spread(figures, name, digits=3):
    value, off = figures.get(name), figures.get("spread", {}).get(name)
    return short(value, digits) + (f" ±{50 * off:.0f} %" if value is not None and off else "")


def markdown(results):
    """All of a run: how it was made, all CPU figures at a glance, then a section per workload."""
    lines = [*made_by(results), *overview(results)]
    for name, workload in results["workloads"].items():
        lines += section(name, workload)
    return "\n".join(lines)


def made_by(results):
    """The command, the machine, and what was measured."""
    machine, settings, versions = results["machine"], results["settings"], results["versions"]
    where = "all on one core" if settings["one_core"] else "load and workers on other cores than the target"
    if "load_cores" in settings:
        where = f"load on cores {', '.join(map(str, settings['load_cores']))}"
    return [f"`{results['command']}`", "", f"{machine['cpu']}, {machine['allowed_cores']} cores, Linux {machine['kernel']}, load {machine['load_before'][0]} before; commit {results['commit'][:12]}, {results['when'][:10]}; "
            f"{settings['rounds']} rounds of {settings['seconds']} s, {where}. " + "; ".join(said if name in said.lower() else f"{name} {said}" for name, said in versions.items())]


def overview(results):
    """CPU time per request of every target (per stream, where streams are asked for), in µs, and its ratio."""
    measured = {name: {target: figures["closed"]["cpu_us"] for target, figures in workload["targets"].items() if figures.get("closed", {}).get("cpu_us")}
                for name, workload in results["workloads"].items()}
    targets = list(dict.fromkeys(target for cpu in measured.values() for target in cpu))
    if len(targets) < 2:
        return []
    lines = ["", f"CPU µs per request (÷ {base_of(targets)})", "", row(["workload", *targets]), "|---|" + "--:|" * len(targets)]
    for name, cpu in measured.items():
        reference = cpu.get(base_of(targets))
        cells = [short(cpu.get(target)) + (f" ({short(cpu[target] / reference, 2)})" if reference and target in cpu and target != base_of(targets) else "") for target in targets]
        lines += [row([name, *cells])] if cpu else []
    return lines


def section(name, workload):
    targets = {target: figures for target, figures in workload["targets"].items() if figures.get("closed") or figures.get("idle") or figures.get("problem")}
    lines = ["", f"### {name}: {workload['summary']}", ""]
    if any("idle" in figures for figures in targets.values()):
        lines += ["| target | connections | bytes per connection | RSS at start, MB | peak RSS, MB |", "|---|--:|--:|--:|--:|"]
        for target, figures in targets.items():
            idle = figures.get("idle", {})
            lines.append(f"| {target} | {short(idle.get('idle'))} | {short(idle.get('bytes_per_connection'))} | {mb(idle.get('start_rss_kb'))} | {mb(idle.get('peak_rss_kb'))} |")
        return lines + problems(targets)
    base = base_of(targets)
    reference = targets.get(base, {}).get("closed", {}).get("cpu_us")
    has = lambda name: any(name in figures.get("closed", {}) for figures in targets.values())
    per_event, streams, compared = has("cpu_us_per_event"), has("event_delay_us"), len(targets) > 1
    columns = [
        ("CPU µs/request", True, lambda closed, _: with_spread(closed, "cpu_us")),
        ("CPU µs/event", per_event, lambda closed, _: short(closed.get("cpu_us_per_event"))),
        (f"÷ {base}", compared, lambda closed, _: short(ratio(closed.get("cpu_us"), reference))),
        ("requests/s", True, lambda closed, _: short(closed.get("rate"))),
        ("system calls/event" if per_event else "system calls/request", True, lambda _, figures: short(figures.get("system_calls"))),
        ("peak RSS, MB", True, lambda closed, _: mb(closed.get("peak_rss_kb"))),
        ("failed", True, lambda closed, _: short(closed.get("failed"))),
        ("events/s", streams, lambda closed, _: short(closed.get("events_per_second"))),
        ("first event p50 / p99, µs", streams, lambda closed, _: pair(closed.get("first_event_us"))),
        ("event delay p50 / p99, µs", streams, lambda closed, _: pair(closed.get("event_delay_us"))),
    ]
    columns = [(head, cell) for head, shown, cell in columns if shown]
    lines += [row(["target", *(head for head, _ in columns)]), "|---|" + "--:|" * len(columns)]
    for target, figures in targets.items():
        lines.append(row([target, *(cell(figures.get("closed", {}), figures) for _, cell in columns)]))
    return lines + problems(targets) + rates(workload["targets"])


def rates(targets):
    """Latency at each fixed rate: what a target adds to the direct way, or the whole of it where there was no direct way."""
    measured = [(int(rate), target, figures) for target, whole in targets.items() for rate, figures in whole.get("rates", {}).items() if target != "direct"]
    if not measured:
        return []
    what, of = ("added", "added_us") if any(figures.get("added_us") for _, _, figures in measured) else ("latency", "latency_us")
    events = any("first_event_us" in figures for _, _, figures in measured)
    heads = ["offered/s", "target", "answered/s", f"{what} p50 / p99 / p99.9, µs", *(["first event p50 / p99, µs"] if events else [])]
    lines = ["", row(heads), "|--:|---|" + "--:|" * (len(heads) - 2)]
    for rate, target, figures in sorted(measured, key=lambda one: one[0]):
        # of requests that were never sent nobody knows how long they would have waited, but it is longer than those that were
        least = "≥ " if (figures.get("unsent") or 0) > UNSENT else ""
        cells = [rate, target, short(figures.get("rate")), least + " / ".join(short((figures.get(of) or {}).get(name)) for name in PERCENTILES)]
        lines.append(row(cells + ([pair(figures.get("first_event_us"))] if events else [])))
    return lines


def problems(targets):
    """Lines on what went wrong: a row with failures is not to be compared."""
    said = []
    for target, figures in targets.items():
        closed = figures.get("closed", {})
        if closed.get("failed"):
            said += ["", f"{target}: {closed['failed']} failed ({closed.get('first_failure', 'not told why')}), so its figures say nothing"]
        if figures.get("problem"):
            said += ["", f"{target}: {figures['problem']}"]
    return said


def row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def mb(kb):
    return "–" if kb is None else f"{kb / 1024:.1f}"


def pair(latency):
    return f"{short(latency.get('p50'))} / {short(latency.get('p99'))}" if latency else "–"


def write(results, folder):
    """results.json and the plots; returns the paths."""
    os.makedirs(folder, exist_ok=True)
    files = {"results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n", **plots(results)}
    for name, content in files.items():
        with open(os.path.join(folder, name), "w") as file:
            file.write(content)
    return [os.path.join(folder, name) for name in files]


def plots(results):
    """SVG files by name: CPU per request of all workloads; added latency over rate of each that has rates."""
    made, groups = {}, {}
    names = [target for workload in results["workloads"].values() for target in workload["targets"] if target != "direct"]
    for name, workload in results["workloads"].items():
        cpu = {target: figures["closed"]["cpu_us"] for target, figures in workload["targets"].items() if figures.get("closed", {}).get("cpu_us")}
        if len(cpu) > 1:
            reference = cpu[base_of(cpu)]
            groups[name] = {target: value / reference for target, value in cpu.items()}
        lines = {percentile: {target: [(int(rate), figures["added_us"][percentile]) for rate, figures in whole.get("rates", {}).items() if percentile in (figures.get("added_us") or {})]
                              for target, whole in workload["targets"].items() if target != "direct"} for percentile in PERCENTILES}
        lines = {percentile: {target: points for target, points in of.items() if points} for percentile, of in lines.items()}
        if any(lines.values()):
            made[f"latency-{name}.svg"] = plot.lines(f"{name}: latency added to the direct way, µs", "requests per second", names, lines)
    if groups:
        made["cpu.svg"] = plot.bars(f"CPU time per request, {BASE} = 1", names, groups, limit=2.5)
    return made
