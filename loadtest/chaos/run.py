#!/usr/bin/env python3
"""The chaos run: the real proxy between real mock workers that are killed, stopped and made to lie, and clients that come and go.

    cargo build --release --bin vllm-proxy
    loadtest/chaos/run.py            # ten minutes
    loadtest/chaos/run.py --quick    # twenty seconds

Clients keep half of the workers' slots busy. A schedule made of --seed strikes at most half of the workers at a time: kill -9 and restart,
SIGTERM, SIGSTOP and SIGCONT, and every fault of worker.py. Every request is accounted for. Exit code 1 if one was lost or wrong, if the
proxy ended, panicked, leaked memory or descriptors, or if a gauge did not come back to 0. Standard library only.
"""
import argparse, asyncio, collections, json, os, random, re, signal, sys, tempfile, time, urllib.request

import client, worker

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
PROCESS_FAULTS = ["kill", "kill", "kill", "stop", "stop", "term"]
# how long an exchange may take in all: longer than any fault lasts
LIMIT_SECONDS = 45
LONGEST_FAULT_SECONDS = 8
WARM_UP_SECONDS = 60
# memory that comes and goes with the allocator, whatever the size of the process; and what buffers are kept, which a short warm-up does not fill
SLACK_KIB, SHORT_SLACK_KIB = 1024, 16 * 1024


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", default=os.path.join(TARGET, "release", "vllm-proxy"), help="the binary [default: the release build]")
    parser.add_argument("--seconds", type=float, default=600, help="of the run, its warm-up not counted [default: 600]")
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=12, help="requests that a worker computes at a time")
    parser.add_argument("--load", type=float, default=0.5, help="share of all slots that clients keep busy")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm", action="store_true", help="no faults: every request must be answered")
    parser.add_argument("--only", action="append", metavar="FAULT", help=f"only these faults: kill, stop, term, {', '.join(worker.FAULTS)}")
    parser.add_argument("--flag", action="append", default=[], help="one more flag of the proxy, as --flag=--io=epoll (repeat)")
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    parser.add_argument("--log", metavar="FILE", help="the proxy's log [default: a temporary file]")
    parser.add_argument("--show", type=int, default=3, help="examples shown of each unexplained failure")
    given = parser.parse_args()
    if given.quick:
        given.seconds = 20
    if not os.access(given.proxy, os.X_OK):
        parser.error(f"{given.proxy} is not there; cargo build --release --bin vllm-proxy, or --proxy")
    return given


class Worker:
    """A mock's process, which comes and goes; its address stays."""

    def __init__(self, number, slots, seed, heard):
        # an address of its own, so that nobody else takes its port while it is down
        pid = os.getpid()
        self.address, self.port = f"127.{100 + number % 100}.{pid >> 8 & 255}.{pid & 255 or 1}", 0
        self.number, self.slots, self.seed, self.heard = number, slots, seed, heard
        self.process, self.busy, self.listening = None, False, asyncio.Event()

    async def start(self):
        self.listening.clear()
        arguments = [sys.executable, os.path.join(HERE, "worker.py"), self.address, str(self.port), str(self.slots), f"{self.seed}.{self.number}"]
        self.process = await asyncio.create_subprocess_exec(*arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
        self.reading = asyncio.create_task(self.read(self.process.stdout))
        await asyncio.wait_for(self.listening.wait(), 20)

    async def read(self, lines):
        while line := await lines.readline():
            kind, *rest = line.decode().rstrip("\n").split(" ", 2)
            if kind == "P":
                self.port = int(rest[0])
                self.listening.set()
            else:
                self.heard(self, kind, rest)

    def order(self, mode, share):
        if self.process.returncode is None:
            self.process.stdin.write(f"{mode} {share}\n".encode())

    def send(self, number):
        if self.process.returncode is None:
            self.process.send_signal(number)

    async def end(self, number=signal.SIGKILL):
        self.send(number)
        await self.process.wait()
        await self.reading


class Proxy:
    def __init__(self, given, urls, log):
        flags = ["--host", "127.0.0.1", "--port", "0", "--redis", "none", "-L", "json", "--threads", "2", "--no-pin", "--health-check-interval-secs", "1",
                 "--health-check-timeout-secs", "2", "--model-refresh-secs", "2", "--shutdown-grace-secs", "10", "--prefix-index-bytes", "1048576"]
        extra = [part for flag in given.flag for part in flag.split("=", 1)]
        self.command, self.log = [given.proxy, *flags, *extra, "--worker-urls", *urls], log

    async def start(self):
        with open(self.log, "wb") as log:
            self.process = await asyncio.create_subprocess_exec(*self.command, stdout=log, stderr=asyncio.subprocess.STDOUT)
        for _ in range(200):
            await asyncio.sleep(0.05)
            if found := re.search(r'"listening".*?"address":"([^"]+):(\d+)"', open(self.log).read()):
                self.address = (found[1], int(found[2]))
                return
        raise SystemExit(f"the proxy does not start: {open(self.log).read()}")

    def rss_kib(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def metrics(self):
        ask = lambda: urllib.request.urlopen(f"http://{self.address[0]}:{self.address[1]}/metrics", timeout=10).read().decode()
        text = await asyncio.get_running_loop().run_in_executor(None, ask)
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}

    async def at_rest(self):
        """Waits until nothing is left of the load, and returns what it holds then, and which gauges did not come back."""
        # kept connections to workers end after four seconds
        deadline, least = time.monotonic() + 20, 1 << 30
        while True:
            metrics = await self.metrics()
            # the scrape is a request and a connection itself
            most = lambda name: 1 if name.startswith(("vllm_proxy_requests_in_flight", "vllm_proxy_connections_open")) else 0
            gauge = re.compile(r"vllm_proxy_(requests_in_flight|connections_open|\w*queue\w*|worker_in_flight|worker_decode_tokens|\w*buffered\w*)(\{|$)")
            left = {name: value for name, value in metrics.items() if gauge.match(name) and "_total" not in name and value > most(name)}
            if not left and time.monotonic() > deadline - 13 or time.monotonic() > deadline:
                for _ in range(10):
                    await asyncio.sleep(0.1)
                    least = min(least, self.descriptors())
                return {"rss_kib": self.rss_kib(), "descriptors": least}, left, metrics
            await asyncio.sleep(0.3)


class Run:
    def __init__(self, given):
        self.given, self.rng = given, random.Random(given.seed)
        self.clock, self.requests, self.attempts = time.monotonic, [], collections.defaultdict(list)
        self.struck, self.malformed, self.injected = [], [], collections.Counter()
        self.workers = [Worker(number, given.slots, given.seed, self.heard) for number in range(given.workers)]
        self.calm = True
        self.latest = collections.Counter()

    def heard(self, who, kind, rest):
        if kind == "R":
            self.attempts[rest[0]].append((who.number, rest[1]))
            if rest[1] != "-":
                self.injected[rest[1]] += 1
        else:
            self.malformed.append(" ".join(rest))

    def finished(self, sent):
        self.requests.append(sent)
        self.latest[sent.outcome] += 1

    async def strike(self, who, fault, length):
        """One fault on one worker, from its beginning to its end."""
        who.busy, began = True, self.clock()
        # what strikes a process is counted by the blow, everything else by the request that it hit
        self.injected[fault] += fault in ("kill", "stop", "term")
        if fault == "stop":
            who.send(signal.SIGSTOP)
            await asyncio.sleep(length)
            who.send(signal.SIGCONT)
        elif fault in ("kill", "term"):
            await who.end(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
            await asyncio.sleep(length / 2)
            await who.start()
        else:
            who.order(fault, self.rng.choice([0.2, 0.5, 1.0]))
            await asyncio.sleep(length)
            who.order("ok", 0)
        self.struck.append((who.number, fault, began, self.clock()))
        who.busy = False

    async def schedule(self):
        faults = self.given.only or PROCESS_FAULTS + worker.FAULTS
        strikes = set()
        try:
            while not self.given.calm:
                # drawn in any case, so that the schedule depends on the seed alone
                pause, who, fault = self.rng.uniform(0.1, 1.2), self.rng.choice(self.workers), self.rng.choice(faults)
                length = min(self.rng.expovariate(0.5) + 0.3, LONGEST_FAULT_SECONDS)
                await asyncio.sleep(pause)
                if not who.busy and sum(other.busy for other in self.workers) < len(self.workers) // 2:
                    strikes.add(asyncio.create_task(self.strike(who, fault, length)))
                for done in [task for task in strikes if task.done()]:
                    strikes.remove(done)
                    done.result()
        finally:
            # a fault that has begun is ended, whatever happens
            await asyncio.gather(*strikes)

    async def load(self, address, seconds, seed):
        """Clients for so long; each that goes is followed by another."""
        clients = client.Clients(address, random.Random(seed), LIMIT_SECONDS, self.finished, self.clock)
        clients.count = len(self.requests) + 1
        until = self.clock() + seconds

        async def seat():
            while self.clock() < until:
                await clients.one()

        seats = max(1, int(self.given.load * self.given.slots * self.given.workers))
        await asyncio.gather(*(seat() for _ in range(seats)))

    async def progress(self, proxy, seconds):
        began = self.clock()
        try:
            while True:
                await asyncio.sleep(1 if sys.stderr.isatty() else 10)
                told = ", ".join(f"{name} {count}" for name, count in sorted(self.latest.items()))
                line = f"{self.clock() - began:4.0f}/{seconds:.0f} s  {told}; rss {proxy.rss_kib()} KiB, {proxy.descriptors()} fds"
                print(("\r" if sys.stderr.isatty() else "") + line, end="\x1b[K" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        except OSError:
            print("the proxy has ended", file=sys.stderr)

    async def phase(self, proxy, seconds, seed):
        showing = asyncio.create_task(self.progress(proxy, seconds))
        striking = asyncio.create_task(self.schedule())
        try:
            await self.load(proxy.address, seconds, seed)
        finally:
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
            showing.cancel()
        if striking.done() and not striking.cancelled() and striking.exception():
            raise striking.exception()

    def cause(self, sent):
        """What the workers did to a request, as far as they could say."""
        attempts = self.attempts.get(sent.nonce, [])
        faults = [fault for _, fault in attempts if fault != "-"]
        if faults:
            return faults[-1]
        # it may have waited for a worker that was killed or stopped, and never came that far
        tried = {number for number, _ in attempts}
        for number, fault, began, ended in self.struck:
            if fault in ("kill", "term", "stop", "engine_dead") and began - 0.1 <= sent.ended and sent.began <= ended + 3 and (number in tried or not tried):
                return fault
        if sent.behind and not attempts:
            return self.cause(sent.behind)
        return "busy (all slots)" if sent.reason.startswith("503 The server is busy") else "nothing"

    async def all(self):
        given = self.given
        await asyncio.gather(*(who.start() for who in self.workers))
        log = given.log or tempfile.NamedTemporaryFile(prefix="chaos-", suffix=".log", delete=False).name
        proxy = Proxy(given, [f"http://{who.address}:{who.port}" for who in self.workers], log)
        await proxy.start()
        try:
            await asyncio.sleep(1)
            warm_up = min(WARM_UP_SECONDS, max(5, given.seconds / 5))
            print(f"warm-up {warm_up:.0f} s, then {given.seconds:.0f} s; the proxy's log: {log}", file=sys.stderr)
            await self.phase(proxy, warm_up, given.seed)
            before, _, _ = await proxy.at_rest()
            await self.phase(proxy, given.seconds, given.seed + 1)
            after, left, metrics = await proxy.at_rest()
            proxy.process.send_signal(signal.SIGTERM)
            code = await asyncio.wait_for(proxy.process.wait(), 30)
        except (OSError, asyncio.TimeoutError) as error:
            print(f"the proxy failed: {error!r}; see {log}", file=sys.stderr)
            before, after, left, metrics, code = {}, {}, {}, {}, proxy.process.returncode
        finally:
            if proxy.process.returncode is None:
                proxy.process.kill()
                await proxy.process.wait()
            await asyncio.gather(*(who.end() for who in self.workers))
        return self.report(before, after, left, metrics, code, log)

    def report(self, before, after, left, metrics, code, log):
        outcomes = collections.Counter(sent.outcome for sent in self.requests)
        reasons = collections.Counter((sent.outcome, sent.reason) for sent in self.requests if sent.outcome != "answered")
        ours = ("answered", "aborted")
        causes = collections.defaultdict(collections.Counter)
        for sent in self.requests:
            if sent.outcome not in ours:
                causes[self.cause(sent)][sent.outcome] += 1
        unexplained = [sent for sent in self.requests if sent.outcome not in ours and self.cause(sent) == "nothing"]
        spared = {fault: sum(1 for sent in self.requests if sent.outcome == "answered" and any(hit == fault for _, hit in self.attempts.get(sent.nonce, [])))
                  for fault in self.injected}
        most_attempts = max((len(tried) for tried in self.attempts.values()), default=0)
        grown = {name: after[name] - before[name] for name in after} if before and after else {}
        slack = SLACK_KIB if self.given.seconds >= 5 * WARM_UP_SECONDS else SHORT_SLACK_KIB
        wrongs = []
        if outcomes["lost"] or outcomes["wrong"]:
            wrongs.append(f"{outcomes['lost']} lost, {outcomes['wrong']} wrong")
        if outcomes["refused"]:
            wrongs.append(f"{outcomes['refused']} connections refused")
        if self.malformed:
            wrongs.append(f"workers got {len(self.malformed)} malformed requests, as {self.malformed[0]}")
        if code != 0:
            wrongs.append(f"the proxy ended with {code}")
        if grown.get("rss_kib", 0) > max(0.05 * before.get("rss_kib", 0), slack):
            wrongs.append(f"memory grew by {grown['rss_kib']} KiB")
        if grown.get("descriptors", 0) > max(0.05 * before.get("descriptors", 0), 2):
            wrongs.append(f"{grown['descriptors']} descriptors leaked")
        if left:
            wrongs.append(f"gauges that did not come back: {left}")
        if metrics.get("vllm_proxy_panics_total", 0):
            wrongs.append(f"{metrics['vllm_proxy_panics_total']:.0f} panics")
        if self.given.calm and unexplained:
            wrongs.append(f"{len(unexplained)} failed though nothing was done to them")
        report = {"seed": self.given.seed, "seconds": self.given.seconds, "sent": len(self.requests), "outcomes": outcomes,
                  "reasons": [{"outcome": o, "reason": r, "count": n} for (o, r), n in reasons.most_common()],
                  "failures_by_fault": causes, "injected": self.injected, "answered_all_the_same": spared, "unexplained": len(unexplained),
                  "most_attempts": most_attempts, "before": before, "after": after, "gauges_left": left, "exit_code": code, "wrongs": wrongs,
                  "retries": {name: value for name, value in metrics.items() if name.startswith("vllm_proxy_retries_total") and value}}
        print(f"\n{len(self.requests)} requests, seed {self.given.seed}")
        for outcome in ("answered", "aborted", "failed", "closed", "refused", "lost", "wrong"):
            print(f"  {outcome:9} {outcomes[outcome]:8}")
        print("\nby reason")
        for (outcome, reason), count in reasons.most_common(40):
            print(f"  {count:7}  {outcome:8} {reason}")
        print("\nby fault            hit  answered  failed  closed    lost   wrong")
        for fault in sorted({fault for fault, hits in self.injected.items() if hits} | set(causes)):
            row = causes[fault]
            numbers = (self.injected[fault], spared.get(fault, 0), row["failed"], row["closed"], row["lost"], row["wrong"])
            print(f"  {fault:16} {numbers[0]:5} {numbers[1]:9} {numbers[2]:7} {numbers[3]:7} {numbers[4]:7} {numbers[5]:7}")
        shown = collections.Counter()
        for sent in unexplained + [sent for sent in self.requests if sent.outcome in ("lost", "wrong")]:
            shown[sent.outcome, sent.reason] += 1
            if shown[sent.outcome, sent.reason] <= self.given.show:
                print(f"  e.g. {sent.manner} {sent.nonce} {'stream' if sent.stream else 'whole'}: {sent.outcome}, {sent.reason}; attempts {self.attempts.get(sent.nonce, [])}")
        print(f"\nattempts of one request at most {most_attempts}; retries {report['retries']}")
        print(f"proxy before {before} after {after}")
        print("\n".join(f"BAD: {wrong}" for wrong in wrongs) or "good: nothing lost, nothing wrong, nothing leaked")
        if self.given.json:
            with open(self.given.json, "w") as out:
                json.dump(report, out, indent=1)
        return 1 if wrongs else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(Run(arguments()).all()))
