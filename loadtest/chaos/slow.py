#!/usr/bin/env python3
"""Slow clients by the thousand (slowloris, slow body, slow read), and what a well-mannered client notices of them.

    apt-get install slowhttptest
    cargo build --release --bin vllm-proxy
    loadtest/chaos/slow.py [--connections 5000] [--seconds 30]

The proxy stands before mock workers. A client asks at a fixed rate, alone first, then beside each of slowhttptest's three attacks; shown are
its p50 and p99, the proxy's memory and descriptors. Exit code 1 if one of its requests failed, or if something was left behind. The limit of
open files must be four times the connections. Standard library only, and slowhttptest.
"""
import argparse, asyncio, random, resource, shutil, signal, statistics, sys, tempfile, time

import client, run

ATTACKS = {"slowloris": ["-H", "-i", "3"], "slow body": ["-B", "-i", "3", "-s", "65536", "-f", "application/json"],
           "slow read": ["-X", "-w", "64", "-y", "256", "-n", "2", "-z", "16", "-k", "1"]}
TARGETS = {"slowloris": "/v1/chat/completions", "slow body": "/v1/chat/completions", "slow read": "/large"}
MOST_SECONDS = 60


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", default=f"{run.TARGET}/release/vllm-proxy", help="the binary [default: the release build]")
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--seconds", type=int, default=30, help=f"of each attack, at most {MOST_SECONDS}")
    parser.add_argument("--rate", type=float, default=100, help="requests per second of the well-mannered client")
    parser.add_argument("--flag", action="append", default=[], help="one more flag of the proxy, as --flag=--io=epoll (repeat)")
    given = parser.parse_args()
    given.seconds = min(given.seconds, MOST_SECONDS)
    if not shutil.which("slowhttptest"):
        parser.error("slowhttptest is not installed")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 3 * given.connections:
        parser.error(f"the hard limit of open files is {hard}; {given.connections} connections need {4 * given.connections}")
    return given


async def measure(address, rate, seconds):
    """Latencies in milliseconds, and the number of requests that failed; a request that cannot be sent in time is late all the same."""
    latencies, failed = [], 0
    request = b"GET /nothing HTTP/1.1\r\nHost: chaos\r\n\r\n"
    free = asyncio.Queue()
    for _ in range(8):
        free.put_nowait(await client.Connection(address).open())

    async def one(due):
        nonlocal failed
        connection = await free.get()
        await connection.send(request)
        got = await connection.answer()
        latencies.append((time.monotonic() - due) * 1000)
        if got.end != "whole" or got.status != 404:
            failed += 1
            connection.close()
            connection = await client.Connection(address).open()
        free.put_nowait(connection)

    began, tasks = time.monotonic(), []
    while (now := time.monotonic()) - began < seconds:
        due = began + len(tasks) / rate
        if now < due:
            await asyncio.sleep(due - now)
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    while not free.empty():
        free.get_nowait().close()
    return latencies, failed


def told(name, latencies, failed, proxy, most):
    cut = statistics.quantiles(latencies, n=1000)
    print(f"{name:10} {len(latencies):8} {failed:7} {cut[499]:8.2f} {cut[989]:8.2f} {max(latencies):8.2f} {most[0]:9} {most[1]:7}", flush=True)


async def all(given):
    workers = [run.Worker(number, 64, 1, lambda *_: None) for number in range(4)]
    await asyncio.gather(*(who.start() for who in workers))
    log = tempfile.NamedTemporaryFile(prefix="slow-", suffix=".log", delete=False).name
    proxy = run.Proxy(given, [f"http://{who.address}:{who.port}" for who in workers], log)
    await proxy.start()
    failures = []
    try:
        await asyncio.sleep(1)
        await measure(proxy.address, given.rate, 3)
        before, _, _ = await proxy.at_rest()
        print(f"the proxy's log: {log}\n{'beside':10} {'requests':>8} {'failed':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'RSS KiB':>9} {'files':>7}")
        latencies, failed = await measure(proxy.address, given.rate, 10)
        told("nothing", latencies, failed, proxy, (proxy.rss_kib(), proxy.descriptors()))
        for name, flags in ATTACKS.items():
            url = f"http://{proxy.address[0]}:{proxy.address[1]}{TARGETS[name]}"
            command = ["slowhttptest", *flags, "-c", str(given.connections), "-r", str(given.connections // 5), "-l", str(given.seconds), "-u", url, "-p", "30", "-v", "0"]
            attack = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
            most = [0, 0]

            async def look():
                while True:
                    most[:] = max(most[0], proxy.rss_kib()), max(most[1], proxy.descriptors())
                    await asyncio.sleep(0.5)

            looking = asyncio.create_task(look())
            latencies, failed = await measure(proxy.address, given.rate, given.seconds)
            looking.cancel()
            if attack.returncode is None:
                attack.send_signal(signal.SIGINT)
            await asyncio.wait_for(attack.wait(), 30)
            told(name, latencies, failed, proxy, most)
            if failed:
                failures.append(f"{failed} failed beside {name}")
        after, left, metrics = await proxy.at_rest()
        for name in ("panics", "shed_connections", "accept_errors"):
            print({series: value for series, value in metrics.items() if series.startswith(f"vllm_proxy_{name}") and value} or f"no {name}")
        print(f"at rest before {before} after {after}, gauges left {left}")
        if left or after["descriptors"] > before["descriptors"] + 5:
            failures.append("something was left behind")
    finally:
        proxy.process.kill()
        await proxy.process.wait()
        for who in workers:
            await who.end()
    print("\n".join(f"BAD: {failure}" for failure in failures) or "good")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(all(arguments())))
