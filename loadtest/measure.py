#!/usr/bin/env python3
"""Measures one thing that runs already, whatever it is.

    cargo build --release --example load
    loadtest/measure.py 127.0.0.1:8000 --workload small-json --workload sse
    loadtest/measure.py 127.0.0.1:8000 --pid $(pidof vllm-proxy) --rate 500 --rate 2000

With --pid (on the same machine) also its CPU time per request, system calls per request and memory, all its processes taken together.
Latencies are whole ones, from the client's side: what a proxy adds needs the direct way beside it, which compare.py does. Event
delays need our mock as worker, on the same machine. Prints Markdown; progress goes to stderr. Standard library only.
"""
import argparse, dataclasses, os, sys

from harness import report, rounds, tools, workloads
from harness.passes import Running
from harness.processes import Failed, Processes, built, memory_kb, open_files, raise_open_files, tool

ALONE = [name for name, workload in workloads.BY_NAME.items() if workload.workers == 1 and not workload.needs]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT; an IPv4 address, without TLS")
    parser.add_argument("--pid", type=int, help="process of which CPU time and memory are read")
    parser.add_argument("--workload", action="append", metavar="NAME", choices=ALONE, help=f"may be repeated; default: small-json. One of {', '.join(ALONE)}")
    parser.add_argument("--connections", type=int, help="instead of the workload's own number")
    parser.add_argument("--rate", type=int, action="append", default=[], help="requests per second at which latency is measured, too (may be repeated)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of one measurement")
    parser.add_argument("--cores", help="of the load, as 0,1 [default: all]")
    parser.add_argument("--out", metavar="DIR", help="write results.json there")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Anywhere(rounds.Manner):
    """The target is where it is; the load goes where it was asked to."""
    load_cores: frozenset = frozenset()

    def cores(self, workload):
        return None, set(self.load_cores)


def main():
    asked = arguments()
    if asked.pid is not None and not os.path.exists(f"/proc/{asked.pid}"):
        raise Failed(f"--pid {asked.pid}: there is no such process")
    if not os.path.exists(built("examples", "load")) or not tool("wrk"):
        raise Failed("needs `cargo build --release --example load` and `apt-get install wrk`")
    raise_open_files()
    cores = frozenset(map(int, asked.cores.split(","))) if asked.cores else frozenset(os.sched_getaffinity(0))
    manner = Anywhere(asked.rounds, asked.seconds, system_calls=asked.pid is not None, load_cores=cores)
    own = {"rates": tuple(asked.rate), **({"connections": asked.connections} if asked.connections else {})}
    wanted = [dataclasses.replace(workloads.BY_NAME[name], **own) for name in dict.fromkeys(asked.workload or ["small-json"])]
    results = report.header({**dataclasses.asdict(manner), "load_cores": sorted(cores), "open_files": open_files()})
    running = {asked.address: Running(asked.address, asked.address, asked.pid, memory_kb(asked.pid) if asked.pid else None)}
    progress = rounds.Progress(sum(manner.planned_seconds(workload, [asked.address]) for workload in wanted))
    try:
        with Processes("measure") as processes:
            for workload in wanted:
                rounds.measure(processes, running, workload, manner, progress, results)
    finally:
        print(report.markdown(results))
        if asked.out:
            report.write(results, asked.out)


if __name__ == "__main__":
    try:
        main()
    except Failed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(130)
