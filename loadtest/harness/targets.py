"""What can be compared. A row of TARGETS says how one is found, installed and started; nothing else names them."""
import os, re, shutil, subprocess, sys
from dataclasses import dataclass, field
from typing import Callable

from .processes import Failed, built, open_files, tool

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "vllm-proxy-loadtest")


@dataclass(frozen=True)
class Place:
    """Where a target is to run, and before whom."""
    processes: object            # `Processes`: for its files
    workers: list                # HOST:PORT of each
    port: int                    # to listen on
    spare_port: int              # for metrics, where a target wants a port for them
    large_bodies: bool = False   # some 10 KB and more
    shards: int = 1              # threads that serve, for those who can say so
    policy: str = "cache_aware"  # for those that have one
    aliases: tuple = ()          # (alias, model), for those that have them

    def urls(self):
        return [f"http://{worker}" for worker in self.workers]


@dataclass(frozen=True)
class Target:
    name: str
    summary: str
    program: Callable             # → path, or None where it is missing
    hint: str                     # how to get it
    command: Callable             # Place → list of words
    version: tuple = ("--version",)
    ready: str | None = None      # path that answers 200 once it serves; None: the port accepts
    requirement: str | None = None  # what pip installs
    abilities: frozenset = field(default_factory=frozenset)  # of "shards", "aliases", "models", "policy"

    def found(self):
        path = self.program()
        return path if path and os.path.exists(path) else None

    def says(self):
        """Its version, as it says it; "" if it does not say."""
        if self.requirement:
            return self.requirement
        said = subprocess.run([self.found(), *self.version], capture_output=True, text=True, timeout=20)
        return (said.stdout + said.stderr).strip().split("\n")[0]


def nginx(place, bodies="proxy_request_buffering off; client_body_buffer_size 128k;"):
    """As an operator would have it before an LLM: connections to workers are kept, answers are not held back, and a body is passed on
    as it arrives, in pieces of 128 KB. Of what nginx offers for bodies this is its best or near it at any size. Pieces of 16 KB take
    almost three times as long for 1 MB; its default, a temporary file for what is above 16 KB, six times as long, and refuses what
    is above 1 MB (`client_max_body_size`)."""
    folder = place.processes.path(f"nginx-{place.port}")
    os.makedirs(folder)
    servers = " ".join(f"server {worker};" for worker in place.workers)
    return [tool("nginx"), "-e", f"{folder}/error.log", "-c", place.processes.write(f"{folder}/nginx.conf", f"""
daemon off;
{"user root;" if os.geteuid() == 0 else ""}
worker_processes {place.shards};
pid {folder}/pid;
error_log {folder}/error.log;
worker_rlimit_nofile {open_files()};
events {{ worker_connections {open_files()}; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000; keepalive_timeout 3600s;
  client_max_body_size 0;
  upstream workers {{ {servers} keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{place.port} reuseport backlog=16384;
    location / {{
      proxy_pass http://workers;
      proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; {bodies}
      proxy_read_timeout 3600s;
    }}
  }}
}}
""")]


def haproxy(place):
    """Connections to workers are kept and shared, events are sent at once (`http-no-delay`). Buffers are of 16 KB, its default, which
    is its best for small bodies; of 64 KB where bodies are large, which takes half the time for 1 MB."""
    servers = "\n".join(f"  server w{at} {worker} pool-max-conn 1024" for at, worker in enumerate(place.workers))
    return [tool("haproxy"), "-db", "-f", place.processes.write(f"haproxy-{place.port}.cfg", f"""
global
  nbthread {place.shards}
  # it counts two descriptors for each connection, and idle ones have but one
  no strict-limits
  maxconn {open_files() - 1000}
  tune.bufsize {65_536 if place.large_bodies else 16_384}
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend front
  bind 127.0.0.1:{place.port} backlog 16384
  default_backend workers
backend workers
  balance leastconn
{servers}
""")]


def ours(io):
    def command(place):
        aliases = [word for alias, model in place.aliases for word in ("--static-aliases", f"{alias}:{model}")]
        return [built("vllm-proxy"), "--host", "127.0.0.1", "--port", place.port, "--threads", place.shards, "--no-pin", "--redis", "none", "--io", io,
                "--policy", place.policy, "--worker-urls", ",".join(place.urls()), "-q", *aliases]
    return command


def venv(requirement, *words):
    return os.path.join(CACHE, requirement, *words)


def router(requirement, script, *start, flags=()):
    """A router from PyPI; all take the flags of sglang-router."""
    def command(place):
        return [venv(requirement, "bin", script), *start, "--worker-urls", *place.urls(), "--policy", place.policy, "--host", "127.0.0.1", "--port", place.port,
                "--prometheus-host", "127.0.0.1", "--prometheus-port", place.spare_port, "--log-level", "error", *flags]
    return dict(program=lambda: venv(requirement, "bin", script), hint="--install", command=command, requirement=requirement)


ALL = frozenset({"shards", "aliases", "models", "policy"})
BUILD = "cargo build --release --bin vllm-proxy"
TARGETS = [
    Target("direct", "no proxy: the load goes to the worker", lambda: sys.executable, "", lambda place: []),
    Target("vllm-proxy", "ours, on io_uring", lambda: built("vllm-proxy"), BUILD, ours("uring"), ready="/readyz", abilities=ALL),
    Target("vllm-proxy-epoll", "ours, on epoll", lambda: built("vllm-proxy"), BUILD, ours("epoll"), ready="/readyz", abilities=ALL),
    Target("nginx", "Debian's", lambda: tool("nginx"), "apt-get install nginx-light", nginx, ("-v",), abilities=frozenset({"shards"})),
    Target("nginx-files", "Debian's, with bodies above 16 KB by way of a file (its default)", lambda: tool("nginx"), "apt-get install nginx-light",
           lambda place: nginx(place, ""), ("-v",), abilities=frozenset({"shards"})),
    Target("haproxy", "Debian's", lambda: tool("haproxy"), "apt-get install haproxy", haproxy, ("-v",), abilities=frozenset({"shards"})),
    Target("vllm-router", "vLLM's router", **router("vllm-router==0.1.17", "vllm-router"), ready="/readiness", abilities=frozenset({"policy"})),
    Target("smg", "Shepherd Model Gateway", **router("smg==1.13.0", "smg", "launch", "--backend", "vllm", flags=("--max-concurrent-requests", 0, "--disable-tokenizer-autoload")),
           ready="/readiness", abilities=frozenset({"policy", "models"})),
    Target("sglang-router", "SGLang's router", **router("sglang-router==0.3.2", "sglang-router", "launch"), ready="/readiness", abilities=frozenset({"policy"})),
]
BY_NAME = {target.name: target for target in TARGETS}


def install(say):
    """What `--install` gets: a venv for each router, and oha. What is there already stays as it is."""
    os.makedirs(CACHE, exist_ok=True)
    for target in TARGETS:
        if target.requirement and not target.found():
            say(f"installing {target.requirement}")
            folder = venv(target.requirement)
            done = (subprocess.run([sys.executable, "-m", "venv", folder]).returncode == 0
                    and subprocess.run([f"{folder}/bin/pip", "install", "-q", "--disable-pip-version-check", target.requirement]).returncode == 0)
            if not done or not target.found():
                say(f"{target.requirement} cannot be installed")
                shutil.rmtree(folder, ignore_errors=True)
    if not oha() and tool("cargo"):
        say("installing oha")
        subprocess.run(["cargo", "install", "--quiet", "--locked", "--root", CACHE, "oha"])


def oha():
    path = os.path.join(CACHE, "bin", "oha")
    return path if os.path.exists(path) else tool("oha")


def chosen(names, say):
    """Targets of these names (all, if none is named) that are here; says which are not."""
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise Failed(f"no target is named {unknown[0]}: there are {', '.join(BY_NAME)}")
    here = []
    for target in TARGETS:
        if names and target.name not in names:
            continue
        if target.found():
            here.append(target)
        else:
            say(f"{target.name} is left out: it is not here ({target.hint})")
    return here
