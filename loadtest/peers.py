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
import argparse, json, os, shutil, signal, socket, statistics, subprocess, sys, tempfile, time, urllib.request

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

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TARGET = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release")
CORES = sorted(os.sched_getaffinity(0))
STARTED, TMP = [], tempfile.mkdtemp(prefix="peers-")

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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(name, *command, core=None):
    out = open(os.path.join(TMP, name + ".log"), "ab")
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    child = subprocess.Popen([*pinned, *command], stdout=out, stderr=out)
    STARTED.append(child)
    return child


def wait_for(port):
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"nothing listens on port {port}; see {TMP}")


def end(child):
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
    STARTED.remove(child)


def cpu_ns(pid, thread=None):
    """CPU time of a process, or of its threads whose name begins so."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            name = open(f"/proc/{pid}/task/{task}/comm").read().strip()
            if thread is None or name.startswith(thread):
                total += int(open(f"/proc/{pid}/task/{task}/schedstat").read().split()[0])
        except FileNotFoundError:
            pass
    return total


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


def proxy(name, urls, *flags, core=None):
    port = free_port()
    child = start(name, os.path.join(TARGET, "vllm-proxy"), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--no-pin", "--io", ARGS.io,
                  "--worker-urls", ",".join(urls), "-q", *flags, *ARGS.flag, core=core)
    wait_for(port)
    return child, port


def mocks(count, core=None):
    ports = [free_port() for _ in range(count)]
    for at, port in enumerate(ports):
        start(f"mock-{at}", os.path.join(TARGET, "examples", "mock"), f"127.0.0.1:{port}", core=core)
    for port in ports:
        wait_for(port)
    return [f"http://127.0.0.1:{port}" for port in ports]


def wrk(port, script, seconds, connections, seed, core=None):
    path = os.path.join(TMP, f"load-{port}.lua")
    open(path, "w").write(script)
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    return subprocess.Popen([*pinned, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", path, f"http://127.0.0.1:{port}/", "--", str(seed)],
                            stdout=subprocess.PIPE, text=True)


def requests_of(load):
    text = load.communicate()[0]
    if "Non-2xx" in text or "Socket errors" in text:
        print(text, file=sys.stderr)
    return next(int(line.split()[0]) for line in text.splitlines() if "requests in" in line)


def share():
    rates, urls, results = ARGS.rate or [1000, 5000], mocks(ARGS.workers), []
    for rate in rates:
        redis_port = free_port()
        server = start("redis", "redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        wait_for(redis_port)
        empty = dict(line.split(":", 1) for line in redis(redis_port, "INFO", "memory").decode().split("\r\n") if ":" in line)
        proxies = [proxy(f"proxy-{at}", urls, "--redis", f"redis://127.0.0.1:{redis_port}") for at in range(ARGS.proxies)]
        connections = max(8, min(256, rate // ARGS.proxies // 20))
        fill = dict(new_share=ARGS.new_share, full=ARGS.prompt_bytes, turn=ARGS.turn_bytes, chats=ARGS.chats,
                    delay=1000.0 * connections * ARGS.proxies / rate)
        before = [metrics(port) for _, port in proxies]
        sync0, shard0 = ([cpu_ns(child.pid, name) for child, _ in proxies] for name in ("sync", "shard-"))
        redis0, began = cpu_ns(server.pid), time.monotonic()
        # the same chats at every proxy: what one has begun another goes on with
        loads = [wrk(port, CHATS % fill, ARGS.seconds, connections, 7) for _, port in proxies]
        requests, took = sum(requests_of(load) for load in loads), time.monotonic() - began
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
            end(child)
        end(server)
    return results


def zip_sum(after, before):
    names = {}
    for a, b in zip(after, before):
        for name, value in a.items():
            names[name] = names.get(name, 0) + value - b.get(name, 0)
    return names


def shards():
    core, urls, redis_port = CORES[0], mocks(1, CORES[0]), free_port()
    start("redis", "redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", core=CORES[-1])
    wait_for(redis_port)
    kinds = {"none": "none", "redis": f"redis://127.0.0.1:{redis_port}", "unreachable": f"redis://127.0.0.1:{free_port()}"}
    running = {kind: proxy(kind, urls, "--redis", url, core=core) for kind, url in kinds.items()}
    figures = {kind: [] for kind in kinds}
    for turn in range(ARGS.rounds):
        order = list(kinds)[turn % 3:] + list(kinds)[:turn % 3]
        for kind in order:
            child, port = running[kind]
            requests_of(wrk(port, SMALL, 1, 32, 1, core))
            before, all_before = cpu_ns(child.pid, "shard-"), cpu_ns(child.pid)
            count = requests_of(wrk(port, SMALL, ARGS.seconds, 32, 1, core))
            figures[kind].append(((cpu_ns(child.pid, "shard-") - before) / 1e3 / count, (cpu_ns(child.pid) - all_before) / 1e3 / count))
        print(f"round {turn + 1}: " + ", ".join(f"{kind} {figures[kind][-1][0]:.2f}" for kind in kinds) + " us per request (shard)", flush=True)
    for kind in kinds:
        shard, whole = zip(*figures[kind])
        print(f"{kind:12} shard {statistics.median(shard):.2f} us per request (median of {len(shard)}), whole process {statistics.median(whole):.2f}")
    print("dropped:", {kind: metrics(port).get("vllm_proxy_redis_dropped_events_total") for kind, (_, port) in running.items()})


try:
    for tool in ("wrk", "redis-server"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing: apt-get install {tool}")
    shards() if ARGS.shards else share()
finally:
    for child in list(STARTED):
        end(child)
    shutil.rmtree(TMP, ignore_errors=True)
