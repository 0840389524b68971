#!/usr/bin/env python3
"""What it costs that several proxies share what they know: in Redis, on the wire, and on the shards.

    cargo build --release --bin vllm-proxy --example mock
    loadtest/peers.py [--proxies 2] [--rate 1000 --rate 5000] [--seconds 10] [--prompt-bytes 48000] [--new-share 0.1]
    loadtest/peers.py --shards [--rounds 6] [--seconds 3]

The first form sends prompts at fixed rates through that many proxies on one redis-server of its own, spread over them: each
request is the next turn of one of many chats, the same one at any proxy; --new-share of them begin one, with a prompt of
full length. It prints bytes per request as they were published, the stream's entries and memory, Redis' own CPU, the sync
threads' CPU per 1,000 requests, lag and what was dropped.

The second measures what a shard pays: CPU time (schedstat of the shard's thread) per small request with Redis, without it
(--redis none) and with a Redis that is not there, in turns, on one core.

Needs Debian's `wrk` and `redis-server`. Standard library only.
"""
import argparse, json, os, socket, statistics, subprocess, sys, time, urllib.request

from harness.processes import Failed, Processes, built, cpu_ns, free_port, tool

ARGS = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ARGS.add_argument("--proxies", type=int, default=2)
ARGS.add_argument("--workers", type=int, default=8, help="mock workers")
ARGS.add_argument("--rate", type=int, action="append", help="requests per second of all proxies together [default: 1000 and 5000]")
ARGS.add_argument("--seconds", type=int, default=10)
ARGS.add_argument("--prompt-bytes", type=int, default=48_000, help="about four bytes are a token")
ARGS.add_argument("--turn-bytes", type=int, default=2_000, help="what a turn adds to a chat")
ARGS.add_argument("--new-share", type=float, default=0.1, help="share of the requests that begin a chat")
ARGS.add_argument("--chats", type=int, default=64, help="chats at a time, per proxy")
ARGS.add_argument("--shards", action="store_true", help="measure the shards instead")
ARGS.add_argument("--rounds", type=int, default=6)
ARGS.add_argument("--io", default="auto")
ARGS.add_argument("--flag", action="append", default=[], help="one more flag of the proxies (--flag=--sync-interval-ms=100)")
ARGS.add_argument("--json", action="store_true")
ARGS = ARGS.parse_args()

CORES = sorted(os.sched_getaffinity(0))

# Chats that grow turn by turn; what they say is made of their number, so that every proxy is told the same ones.
CHATS = """
local share, full, turn, chats = %(new_share)f, %(full)d, %(turn)d, %(chats)d
local head = '{"model":"m","max_tokens":16,"messages":[{"role":"user","content":"'
local text, number, delay_ms, seed = {}, 0, %(delay)f, 0
function init(args) seed = tonumber(args[1]) math.randomseed(seed) end
local function words(n, bytes) local word = string.format("%%d %%d ", seed, n) return string.rep(word, math.ceil(bytes / #word)):sub(1, bytes) end
function request()
  number = number + 1
  local at = math.random(chats)
  if text[at] == nil or math.random() < share then text[at] = words(number, full)
  else
    text[at] = text[at] .. words(number, turn)
    if #text[at] > 2 * full then text[at] = words(number, full) end
  end
  return wrk.format("POST", "/v1/chat/completions", {["Content-Type"] = "application/json"}, head .. text[at] .. '"}]}')
end
function delay() return delay_ms * 2 * math.random() end
"""
SMALL = """
wrk.method = "POST"; wrk.path = "/v1/chat/completions"; wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"model":"m","messages":[{"role":"user","content":"' .. string.rep("x", 930) .. '"}],"max_tokens":16}'
"""


def start(processes, name, port, *command, core=None):
    child = processes.start(name, *command, cores=core)
    processes.wait_for(child, name, port)
    return child


def redis_server(processes, core=None):
    port = free_port()
    return start(processes, "redis", port, tool("redis-server"), "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", core=core), port


def redis(port, *words):
    with socket.create_connection(("127.0.0.1", port), 5) as s:
        s.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in (str(w).encode() for w in words)))
        file = s.makefile("rb")
        def read():
            line = file.readline().rstrip()
            kind, rest = line[:1], line[1:]
            if kind == b"$":
                return None if rest == b"-1" else file.read(int(rest) + 2)[:-2]
            if kind == b"*":
                return [read() for _ in range(int(rest))]
            return int(rest) if kind == b":" else rest
        return read()


def metrics(port):
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line and not line.startswith("#")}


def proxy(processes, name, urls, *flags, core=None):
    port = free_port()
    return start(processes, name, port, built("vllm-proxy"), "--host", "127.0.0.1", "--port", port, "--threads", "1", "--no-pin", "--io", ARGS.io,
                 "--worker-urls", ",".join(urls), "-q", *flags, *ARGS.flag, core=core), port


def mocks(processes, count, core=None):
    ports = [free_port() for _ in range(count)]
    for port in ports:
        start(processes, f"mock-{port}", port, built("examples", "mock"), f"127.0.0.1:{port}", core=core)
    return [f"http://127.0.0.1:{port}" for port in ports]


def wrk(processes, port, script, seconds, connections, seed, core=None):
    path = processes.write(f"load-{port}.lua", script)
    return processes.start("wrk", tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", path, f"http://127.0.0.1:{port}/", "--", seed,
                           cores=core, stdout=subprocess.PIPE, text=True)


def requests_of(processes, load):
    text = load.communicate()[0]
    processes.end(load)
    if "Non-2xx" in text or "Socket errors" in text:
        print(text, file=sys.stderr)
    return next(int(line.split()[0]) for line in text.splitlines() if "requests in" in line)


def share(processes):
    rates, urls, results = ARGS.rate or [1000, 5000], mocks(processes, ARGS.workers), []
    for rate in rates:
        server, redis_port = redis_server(processes)
        empty = dict(line.split(":", 1) for line in redis(redis_port, "INFO", "memory").decode().split("\r\n") if ":" in line)
        proxies = [proxy(processes, f"proxy-{at}", urls, "--redis", f"redis://127.0.0.1:{redis_port}") for at in range(ARGS.proxies)]
        connections = max(8, min(256, rate // ARGS.proxies // 20))
        fill = dict(new_share=ARGS.new_share, full=ARGS.prompt_bytes, turn=ARGS.turn_bytes, chats=ARGS.chats,
                    delay=1000.0 * connections * ARGS.proxies / rate)
        before = [metrics(port) for _, port in proxies]
        sync0, shard0 = ([cpu_ns(child.pid, name) for child, _ in proxies] for name in ("sync", "shard-"))
        redis0, began = cpu_ns(server.pid), time.monotonic()
        # the same chats at every proxy: what one has begun another goes on with
        loads = [wrk(processes, port, CHATS % fill, ARGS.seconds, connections, 7) for _, port in proxies]
        requests, took = sum(requests_of(processes, load) for load in loads), time.monotonic() - began
        time.sleep(0.7)
        after = [metrics(port) for _, port in proxies]
        total = lambda name: sum(a.get(name, 0) - b.get(name, 0) for a, b in zip(after, before))
        info = dict(line.split(":", 1) for line in redis(redis_port, "INFO", "memory").decode().split("\r\n") if ":" in line)
        keys = [key.decode() for key in redis(redis_port, "KEYS", "*")]
        sync = sum(cpu_ns(child.pid, "sync") for child, _ in proxies) - sum(sync0)
        shards = sum(cpu_ns(child.pid, "shard-") for child, _ in proxies) - sum(shard0)
        result = {
            "proxies": ARGS.proxies, "asked_rate": rate, "rate": round(requests / took), "requests": requests,
            "published_bytes_per_request": round(total("vllm_proxy_redis_sent_bytes_total") / requests, 1),
            "published_bytes_per_second": round(total("vllm_proxy_redis_sent_bytes_total") / took),
            "events_sent": int(total("vllm_proxy_redis_sent_events_total")), "events_dropped": int(total("vllm_proxy_redis_dropped_events_total")),
            "predicted_cached_share": round(sum(v for k, v in zip_sum(after, before).items() if k.startswith("vllm_proxy_worker_predicted_cached_tokens"))
                                            / max(1, sum(v for k, v in zip_sum(after, before).items() if k.startswith("vllm_proxy_worker_prompt_tokens"))), 3),
            "lag_ms": [round(1000 * a["vllm_proxy_redis_lag_seconds"], 1) for a in after],
            "sync_cpu_ms_per_1000_requests": round(sync / 1e6 / requests * 1000, 2), "sync_cpu_percent_each": round(sync / 1e9 / took * 100 / ARGS.proxies, 2),
            "shard_cpu_us_per_request": round(shards / 1e3 / requests, 1),
            "redis_cpu_percent": round((cpu_ns(server.pid) - redis0) / 1e9 / took * 100, 2),
            "redis_used_memory": int(info["used_memory"]), "redis_used_memory_empty": int(empty["used_memory"]),
            "keys": {key: {"entries": redis(redis_port, "XLEN", key), "memory": redis(redis_port, "MEMORY", "USAGE", key, "SAMPLES", 0),
                                    "ttl_ms": redis(redis_port, "PTTL", key)} for key in keys},
        }
        results.append(result)
        print(json.dumps(result) if ARGS.json else "\n".join(f"{k:32} {v}" for k, v in result.items()) + "\n", flush=True)
        for child, _ in proxies:
            processes.end(child)
        processes.end(server)
    return results


def zip_sum(after, before):
    names = {}
    for a, b in zip(after, before):
        for name, value in a.items():
            names[name] = names.get(name, 0) + value - b.get(name, 0)
    return names


def shards(processes):
    core = {CORES[0]}
    urls, (_, redis_port) = mocks(processes, 1, core), redis_server(processes, {CORES[-1]})
    kinds = {"none": "none", "redis": f"redis://127.0.0.1:{redis_port}", "unreachable": f"redis://127.0.0.1:{free_port()}"}
    running = {kind: proxy(processes, kind, urls, "--redis", url, core=core) for kind, url in kinds.items()}
    figures = {kind: [] for kind in kinds}
    for turn in range(ARGS.rounds):
        order = list(kinds)[turn % 3:] + list(kinds)[:turn % 3]
        for kind in order:
            child, port = running[kind]
            requests_of(processes, wrk(processes, port, SMALL, 1, 32, 1, core))
            before, all_before = cpu_ns(child.pid, "shard-"), cpu_ns(child.pid)
            count = requests_of(processes, wrk(processes, port, SMALL, ARGS.seconds, 32, 1, core))
            figures[kind].append(((cpu_ns(child.pid, "shard-") - before) / 1e3 / count, (cpu_ns(child.pid) - all_before) / 1e3 / count))
        print(f"round {turn + 1}: " + ", ".join(f"{kind} {figures[kind][-1][0]:.2f}" for kind in kinds) + " us per request (shard)", flush=True)
    for kind in kinds:
        shard, whole = zip(*figures[kind])
        print(f"{kind:12} shard {statistics.median(shard):.2f} us per request (median of {len(shard)}), whole process {statistics.median(whole):.2f}")
    print("dropped:", {kind: metrics(port).get("vllm_proxy_redis_dropped_events_total") for kind, (_, port) in running.items()})


try:
    for name in ("wrk", "redis-server"):
        if not tool(name):
            raise Failed(f"{name} is missing: apt-get install {name}")
    with Processes("peers") as running:
        shards(running) if ARGS.shards else share(running)
except Failed as problem:
    sys.exit(str(problem))
