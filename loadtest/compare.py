#!/usr/bin/env python3
"""Measures proxies side by side, in one run, before the same mock workers.

    cargo build --release --bin vllm-proxy --example mock --example load
    loadtest/compare.py --quick                       # a minute: ours, nginx, HAProxy and whatever else is there
    loadtest/compare.py --install --goals --out DIR   # everything, with the routers of PyPI and oha (an hour)
    loadtest/compare.py vllm-proxy nginx --workload small-json --also before=OTHER/vllm-proxy

Each target runs alone on one core; load and workers are on the same core, or with --two-cores on the others. The order rotates from
round to round; figures are medians of the rounds, ± is how far these lie apart. CPU is the target's own (schedstat of all its
processes before and after), so it is what a shared machine spoils least: compare the ratios. Prints Markdown; progress goes to stderr.
Needs Debian's `wrk`; targets that are missing are left out. Standard library only.
"""
import argparse, dataclasses, os, sys, time

from harness import goals, report, rounds, targets, tools, workloads
from harness.processes import Failed, Processes, built, open_files, raise_open_files, tool


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", help=f"default: all of {', '.join(targets.BY_NAME)}")
    parser.add_argument("--workload", action="append", default=[], metavar="NAME", help=f"may be repeated; default: all of {', '.join(workloads.BY_NAME)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of one measurement")
    parser.add_argument("--quick", action="store_true", help=f"one round of a second, of {', '.join(workloads.QUICK)}, without fixed rates")
    parser.add_argument("--two-cores", action="store_true", help="load and workers on other cores than the target")
    parser.add_argument("--no-latencies", action="store_true", help="leave out the fixed rates")
    parser.add_argument("--no-system-calls", action="store_true")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PATH", help="another build of vllm-proxy, as one more target (may be repeated)")
    parser.add_argument("--install", action="store_true", help=f"get the routers of PyPI and oha into {targets.CACHE}")
    parser.add_argument("--out", metavar="DIR", help="write results.json and plots there")
    parser.add_argument("--goals", action="store_true", help="hold the figures against the goals")
    parser.add_argument("--list", action="store_true", help="say what targets and workloads there are, and end")
    asked = parser.parse_args()
    for name, least, most in (("rounds", 1, 100), ("seconds", 1, 600)):
        if not least <= getattr(asked, name) <= most:
            parser.error(f"--{name} is between {least} and {most}")
    for name in asked.workload:
        if name not in workloads.BY_NAME:
            parser.error(f"no workload is named {name}: there are {', '.join(workloads.BY_NAME)}")
    return asked


def say(text):
    print(text, file=sys.stderr, flush=True)


def listing():
    for target in targets.TARGETS:
        print(f"{target.name:18} {target.summary}{'' if target.found() else f' (missing: {target.hint})'}")
    print()
    for workload in workloads.WORKLOADS:
        print(f"{workload.name:18} {workload.summary}")


def also(asked):
    """Rows of further builds of ours."""
    for name, path in (word.partition("=")[::2] for word in asked.also):
        if not os.path.exists(path):
            raise Failed(f"--also {name}: there is no {path}")
        ours = targets.BY_NAME["vllm-proxy"]
        command = lambda place, path=path: [path, *ours.command(place)[1:]]
        yield dataclasses.replace(ours, name=name, summary=f"another build: {path}", program=lambda path=path: path, command=command)


def main():
    asked = arguments()
    if asked.install:
        targets.install(say)
    if asked.list:
        return listing()
    for name, found, hint in (("wrk", tool("wrk"), "apt-get install wrk"), *((name, os.path.exists(built("examples", name)), f"cargo build --release --example {name}") for name in ("mock", "load"))):
        if not found:
            raise Failed(f"{name} is missing: {hint}")
    if not tools.oha():
        say("oha is missing: fixed rates are made by `load` instead (--install gets it)")
    chosen = [*targets.chosen(asked.target, say), *also(asked)]
    wanted = [workload for workload in workloads.WORKLOADS if workload.name in (asked.workload or (workloads.QUICK if asked.quick else workloads.BY_NAME))]
    manner = rounds.Manner(1 if asked.quick else asked.rounds, 1 if asked.quick else asked.seconds, one_core=not asked.two_cores,
                           latencies=not (asked.no_latencies or asked.quick), system_calls=not asked.no_system_calls)
    raise_open_files()
    results = report.header({**dataclasses.asdict(manner), "open_files": open_files()})
    results["versions"] |= {**tools.versions(), **{target.name: target.says() for target in chosen if target.name != "direct"}}
    progress = rounds.Progress(rounds.plan(chosen, wanted, manner))
    say(f"{len(wanted)} workloads, {len(chosen)} targets: about {progress.planned / 60:.0f} minutes")
    began = time.monotonic()
    try:
        with Processes("compare") as processes:
            rounds.run(processes, chosen, wanted, manner, progress, results)
    finally:
        # what was measured before an interruption is worth having
        results["took_seconds"] = round(time.monotonic() - began)
        print(report.markdown(results))
        if asked.goals:
            print("\n### Goals\n", *goals.table(results), sep="\n")
        if asked.out:
            say("written: " + ", ".join(report.write(results, asked.out)))


if __name__ == "__main__":
    try:
        main()
    except Failed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(130)
