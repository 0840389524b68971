#!/usr/bin/env python3
"""CPU per request of vllm-proxy, nginx and HAProxy, side by side in one run.

    cargo build --release --bin vllm-proxy --example mock
    loadtest/compare.py [--seconds 4] [--rounds 3] [--connections 32] [--case json|sse|all] [--only NAME]

Each proxy runs alone on one core (of two, if there are two) between wrk and the same mock worker; the order
rotates from round to round. The figure is the proxy's own CPU time (schedstat before and after, all its
threads) divided by the requests that wrk counted: it is what a shared machine spoils least. Compare ratios.
Needs Debian's `wrk`, `nginx` (or nginx-light) and `haproxy`; a missing one is left out.
"""
import argparse, glob, json, os, shutil, signal, socket, statistics, subprocess, sys, tempfile, time

ARGS = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ARGS.add_argument("--seconds", type=int, default=4)
ARGS.add_argument("--rounds", type=int, default=3)
ARGS.add_argument("--connections", type=int, default=32)
ARGS.add_argument("--case", default="all", choices=["json", "sse", "all"])
ARGS.add_argument("--only", action="append", help="measure this one only (may be repeated)")
ARGS.add_argument("--one-core", action="store_true", help="put wrk and the worker on the proxy's core too")
ARGS = ARGS.parse_args()

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TARGET = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release")
CORES = sorted(os.sched_getaffinity(0))
PROXY_CORE, OTHER_CORE = CORES[0], CORES[0] if ARGS.one_core else CORES[-1]
STARTED, TMP = [], tempfile.mkdtemp(prefix="compare-")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(core, *command, quiet=True):
    out = open(os.path.join(TMP, os.path.basename(command[0]) + ".log"), "ab")
    child = subprocess.Popen(["taskset", "-c", str(core), *command], stdout=out, stderr=out)
    STARTED.append(child)
    return child


def wait_for(port):
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"nothing listens on port {port}; see {TMP}")


def family(pid):
    pids = [pid]
    for child in subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split():
        pids += family(int(child))
    return pids


def cpu_ns(pid):
    total = 0
    for one in family(pid):
        for task in glob.glob(f"/proc/{one}/task/*/schedstat"):
            total += int(open(task).read().split()[0])
    return total


def rss_kb(pid):
    return max(int(line.split()[1]) for one in family(pid) for line in open(f"/proc/{one}/status") if line.startswith("VmHWM"))


def nginx(worker, port):
    conf = os.path.join(TMP, "nginx.conf")
    open(conf, "w").write(f"""
daemon off; worker_processes 1; pid {TMP}/nginx.pid; error_log {TMP}/nginx-error.log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {TMP}/b; proxy_temp_path {TMP}/p;
 fastcgi_temp_path {TMP}/f; uwsgi_temp_path {TMP}/u; scgi_temp_path {TMP}/s;
 upstream w {{ server 127.0.0.1:{worker}; keepalive 1024; keepalive_requests 1000000000; }}
 server {{ listen 127.0.0.1:{port} reuseport; location / {{ proxy_pass http://w; proxy_http_version 1.1;
  proxy_set_header Connection ""; proxy_buffering off; }} }} }}""")
    return [shutil.which("nginx") or "/usr/sbin/nginx", "-c", conf, "-e", os.path.join(TMP, "nginx-error.log")]


def haproxy(worker, port):
    conf = os.path.join(TMP, "haproxy.cfg")
    open(conf, "w").write(f"""
global
 nbthread 1
 maxconn 4096
defaults
 mode http
 timeout connect 5s
 timeout client 60s
 timeout server 60s
 http-reuse always
frontend f
 bind 127.0.0.1:{port}
 default_backend b
backend b
 server w 127.0.0.1:{worker} pool-max-conn 1024
""")
    return [shutil.which("haproxy") or "/usr/sbin/haproxy", "-f", conf]


def ours(io):
    def command(worker, port):
        return [os.path.join(TARGET, "vllm-proxy"), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--no-pin", "--redis", "none",
                "--io", io, "--worker-urls", f"http://127.0.0.1:{worker}", "-q"]
    return command


PROXIES = {"nginx": nginx, "haproxy": haproxy, "vllm-proxy": ours("uring"), "vllm-proxy-epoll": ours("epoll")}
PROXIES = {n: c for n, c in PROXIES.items() if (not ARGS.only or n in ARGS.only) and os.path.exists(c(1, 1)[0])}
BODIES = {
    "json": json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 930}], "max_tokens": 16}, separators=(",", ":")),
    "sse": json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 930}], "stream": True}, separators=(",", ":")),
}


def wrk(port, case, seconds):
    lua = os.path.join(TMP, f"{case}.lua")
    open(lua, "w").write(f"""wrk.method = "POST"; wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"; wrk.headers["Authorization"] = "Bearer none"
wrk.body = [==[{BODIES[case]}]==]
done = function(s, l, r)
 local e = s.errors
 print(string.format("RESULT %d %d %d", s.requests, s.duration, e.connect + e.read + e.write + e.status + e.timeout)) end""")
    out = subprocess.run(["taskset", "-c", str(OTHER_CORE), "wrk", "-t1", f"-c{ARGS.connections}", f"-d{seconds}s", "-s", lua,
                          f"http://127.0.0.1:{port}/"], capture_output=True, text=True, timeout=seconds + 60).stdout
    requests, micros, errors = map(int, next(l for l in out.splitlines() if l.startswith("RESULT")).split()[1:])
    return requests, requests / micros * 1e6, errors


def main():
    if not shutil.which("wrk"):
        sys.exit("wrk is missing: apt-get install wrk")
    worker = free_port()
    start(OTHER_CORE, os.path.join(TARGET, "examples", "mock"), f"127.0.0.1:{worker}")
    wait_for(worker)
    running = {}
    for name, command in PROXIES.items():
        port = free_port()
        running[name] = (start(PROXY_CORE, *command(worker, port)), port)
        wait_for(port)
    time.sleep(0.5)
    table = {}
    for case in ["json", "sse"] if ARGS.case == "all" else [ARGS.case]:
        figures = {name: [] for name in running}
        for turn in range(ARGS.rounds):
            names = list(running)
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                child, port = running[name]
                wrk(port, case, 1)
                before = cpu_ns(child.pid)
                requests, rate, errors = wrk(port, case, ARGS.seconds)
                used = (cpu_ns(child.pid) - before) / 1000 / max(requests, 1)
                figures[name].append((used, rate, errors))
                print(f"  {case} round {turn + 1}: {name:18} {used:8.2f} µs CPU/request {rate:9.0f} requests/s {errors} errors", file=sys.stderr)
        table[case] = figures
    base = "nginx" if "nginx" in running else next(iter(running))
    for case, figures in table.items():
        reference = statistics.median(used for used, _, _ in figures[base])
        print(f"\n{case}: {ARGS.connections} connections, median of {ARGS.rounds}\n| proxy | CPU µs/request | ÷ {base} | requests/s | errors | peak RSS MB |\n|---|--:|--:|--:|--:|--:|")
        for name, rows in figures.items():
            used = statistics.median(row[0] for row in rows)
            rate = statistics.median(row[1] for row in rows)
            print(f"| {name} | {used:.2f} | {used / reference:.2f} | {rate:.0f} | {sum(row[2] for row in rows)} | {rss_kb(running[name][0].pid) / 1024:.1f} |")


try:
    main()
finally:
    for child in STARTED:
        child.send_signal(signal.SIGTERM)
    for child in STARTED:
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
    shutil.rmtree(TMP, ignore_errors=True)
