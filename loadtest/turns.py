#!/usr/bin/env python3
"""What cache_aware believes of the workers' prefix caches, held against what real vLLMs report.

    cargo build --release --bin vllm-proxy
    loadtest/turns.py --worker http://127.0.0.1:8001 --worker http://127.0.0.1:8002 [--policy cache_aware ...] [--mode chat ...]

Sessions of several turns are replayed through a proxy of its own for each policy, interleaved: each session begins with one
of a few system prompts (Zipf), and each turn repeats all before it, the worker's own answers too. `usage` says how many
prompt tokens were found cached, the proxy's /metrics what it had predicted of it. Before each run the caches are reset.
The workers need `--enable-prompt-tokens-details` and VLLM_SERVER_DEV_MODE=1, and nobody else's traffic.
With --url a proxy that runs already is asked instead. Standard library only.
"""
import argparse, bisect, http.client, json, queue, random, sys, threading, time, urllib.parse

from harness.processes import Failed, Processes, built, free_port

MODES = ["chat", "stream", "text", "ids"]
ARGS = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ARGS.add_argument("--worker", action="append", default=[], help="URL of a vLLM (repeat)")
ARGS.add_argument("--url", help="a proxy that runs already, instead of --worker and --policy")
ARGS.add_argument("--policy", action="append", help="default: cache_aware, round_robin, consistent_hash (may be repeated)")
ARGS.add_argument("--mode", action="append", choices=MODES, help="chat, streamed chat, completions of text, of token ids; default: all")
ARGS.add_argument("--flag", action="append", default=[], help="one more flag of the proxy (--flag=--io=epoll; may be repeated)")
ARGS.add_argument("--model", help="default: the first of /v1/models")
ARGS.add_argument("--sessions", type=int, default=80)
ARGS.add_argument("--systems", type=int, default=30, help="different system prompts")
ARGS.add_argument("--zipf", type=float, default=1.0)
ARGS.add_argument("--turns", type=int, default=4, help="of a session, at most; at least half of it")
ARGS.add_argument("--system-words", type=int, default=180, help="of a system prompt, in the mean (between half and one and a half of it)")
ARGS.add_argument("--turn-words", type=int, default=30, help="of what the user says, in the mean (between 1 and twice of it)")
ARGS.add_argument("--max-tokens", type=int, default=8)
ARGS.add_argument("--concurrency", type=int, default=3, help="requests at once")
ARGS.add_argument("--open-sessions", type=int, default=8, help="sessions that take turns with each other")
ARGS.add_argument("--rate", type=float, default=0, help="requests per second at most; 0: as fast as they are answered")
ARGS.add_argument("--seed", type=int, default=1)
ARGS.add_argument("--warm", action="store_true", help="let the proxy learn the model's bytes per token before the first run")
ARGS.add_argument("--json", action="store_true", help="print an object per run")
ARGS = ARGS.parse_args()
for name, least, most in [("sessions", 1, 10_000), ("systems", 1, 1000), ("turns", 1, 100), ("concurrency", 1, 64),
                          ("open_sessions", 1, 10_000), ("max_tokens", 1, 4096), ("system_words", 1, 100_000), ("turn_words", 1, 100_000)]:
    if not least <= getattr(ARGS, name) <= most:
        sys.exit(f"--{name.replace('_', '-')} is between {least} and {most}")

WORDS = """the of and to in is that it was for on are with as be this have from or had by not but some what we can out other were all
there when use your how said each she which their time if will way about many then them would write like these her long make thing see
him two has look more day could go come did my sound no most number who over know water than call first people may down side been now
find any new work part take get place made live where after back little only round man year came show every good me give our under
name very through just form much great think say help low line before turn cause same mean differ move right boy old too does tell
sentence set three want air well also play small end put home read hand port large spell add even land here must big high such follow
act why ask men change went light kind off need house picture try us again animal point mother world near build self earth father""".split()


def said(rng, least, most):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most))).capitalize() + "."


def call(connection, method, path, body=None):
    connection.request(method, path, None if body is None else json.dumps(body, ensure_ascii=False).encode(), {"content-type": "application/json"})
    answer = connection.getresponse()
    raw = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{method} {path}: {answer.status} {raw[:300]!r}")
    return raw


def connect(base):
    return http.client.HTTPConnection(urllib.parse.urlsplit(base).netloc, timeout=120)


class Session:
    """One conversation; `body` is its next request, `heard` takes in the answer."""

    def __init__(self, mode, number, systems, weights):
        rng = self.rng = random.Random(f"{ARGS.seed} session {number}")
        self.mode, self.left = mode, rng.randint((ARGS.turns + 1) // 2, ARGS.turns)
        self.system = bisect.bisect(weights, rng.random() * weights[-1])
        system = systems[min(self.system, len(systems) - 1)]
        self.past = [{"role": "system", "content": system}] if mode in ("chat", "stream") else self.ids(system) if mode == "ids" else system
        self.say()

    @staticmethod
    def ids(text):
        # one to two bytes per token, as a small vocabulary has it: the same text gives the same ids
        return [100 + (ord(a) * 7 + ord(b)) % 300 for a, b in zip(text[::2], text[1::2])]

    def say(self):
        words = said(self.rng, 1, 2 * ARGS.turn_words - 1)
        if self.mode in ("chat", "stream"):
            self.past.append({"role": "user", "content": words})
        else:
            self.past = self.past + (self.ids(words) if self.mode == "ids" else f"\nUser: {words}\nAnswer:")

    def body(self, model):
        common = {"model": model, "max_tokens": ARGS.max_tokens, "temperature": 0, "ignore_eos": True}
        if self.mode == "chat":
            return "/v1/chat/completions", {**common, "messages": self.past}
        if self.mode == "stream":
            return "/v1/chat/completions", {**common, "messages": self.past, "stream": True, "stream_options": {"include_usage": True}}
        return "/v1/completions", {**common, "prompt": self.past, **({"return_token_ids": True} if self.mode == "ids" else {})}

    def heard(self, raw):
        if self.mode == "stream":
            events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
            usage = events[-1]["usage"]
            answer = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        else:
            event = json.loads(raw)
            usage, choice = event["usage"], event["choices"][0]
            answer = choice["message"]["content"] or "" if self.mode == "chat" else choice["text"] if self.mode == "text" else choice["token_ids"]
        self.past = self.past + ([{"role": "assistant", "content": answer}] if self.mode in ("chat", "stream") else answer)
        self.left -= 1
        if self.left:
            self.say()
        details = usage.get("prompt_tokens_details") or {}
        return usage["prompt_tokens"], details.get("cached_tokens") or 0


def run(base, mode, model):
    """Replays all sessions; the sums of what `usage` said, and how many failed."""
    rng = random.Random(f"{ARGS.seed} systems")
    systems = [said(rng, (ARGS.system_words + 1) // 2, ARGS.system_words + ARGS.system_words // 2) for _ in range(ARGS.systems)]
    weights, total = [], 0.0
    for rank in range(ARGS.systems):
        total += 1 / (rank + 1) ** ARGS.zipf
        weights.append(total)
    waiting = [Session(mode, number, systems, weights) for number in range(ARGS.sessions)][::-1]
    ready, lock = queue.SimpleQueue(), threading.Lock()
    sums, slot = {"requests": 0, "prompt": 0, "cached": 0, "failed": 0}, [time.monotonic()]
    open_now = [0]

    def admit():
        while waiting and open_now[0] < ARGS.open_sessions:
            open_now[0] += 1
            ready.put(waiting.pop())

    def work():
        connection = connect(base)
        while True:
            session = ready.get()
            if session is None:
                return
            if ARGS.rate > 0:
                with lock:
                    slot[0] = max(slot[0], time.monotonic()) + 1 / ARGS.rate
                    pause = slot[0] - time.monotonic()
                time.sleep(max(pause, 0))
            try:
                prompt, cached = session.heard(call(connection, "POST", *session.body(model)))
                over = session.left == 0
            except Exception as problem:
                print(f"  {problem}", file=sys.stderr)
                connection, prompt, cached, over = connect(base), 0, 0, True
                sums["failed"] += 1
            with lock:
                sums["requests"] += 1
                sums["prompt"] += prompt
                sums["cached"] += cached
                if over:
                    open_now[0] -= 1
                    admit()
                    if open_now[0] == 0:
                        for _ in range(ARGS.concurrency):
                            ready.put(None)
                else:
                    ready.put(session)

    admit()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(ARGS.concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3600)
    return sums


FIGURES = ["prompt_tokens", "predicted_cached_tokens", "reported_prompt_tokens", "reported_cached_tokens", "selections"]


def figures(base):
    """The proxy's counts: name to worker to number."""
    found = {name: {} for name in FIGURES}
    for line in call(connect(base), "GET", "/metrics").decode().splitlines():
        for name in FIGURES:
            if line.startswith(f"vllm_proxy_worker_{name}_total{{"):
                labels, value = line.rsplit(" ", 1)
                worker = labels.split('worker="', 1)[1].split('"', 1)[0]
                found[name][worker] = found[name].get(worker, 0) + float(value)
    return found


def measure(base, policy, mode, model):
    call(connect(base), "POST", "/reset_prefix_cache")
    before, began = figures(base), time.monotonic()
    sums = run(base, mode, model)
    seconds, after = time.monotonic() - began, figures(base)
    gone = {name: {w: after[name][w] - before[name].get(w, 0) for w in after[name]} for name in FIGURES}
    of = {name: sum(gone[name].values()) for name in FIGURES}
    prompt = max(sums["prompt"], 1)
    return {
        "policy": policy, "mode": mode, **sums, "seconds": round(seconds, 1),
        "estimated_prompt": of["prompt_tokens"], "predicted": of["predicted_cached_tokens"], "reported": of["reported_cached_tokens"],
        "reported_prompt": of["reported_prompt_tokens"], "off_percent": 100 * (of["predicted_cached_tokens"] - sums["cached"]) / prompt,
        "estimate_off_percent": 100 * (of["prompt_tokens"] - sums["prompt"]) / prompt, "hit_percent": 100 * sums["cached"] / prompt,
        "per_worker": [int(v) for _, v in sorted(gone["selections"].items())],
    }


def print_row(row):
    if ARGS.json:
        print(json.dumps(row), flush=True)
        return
    # only cache_aware looks at prompts
    estimate, off = (f"{row[name]:+.2f} %" if row["estimated_prompt"] and not row["failed"] else "" for name in ("estimate_off_percent", "off_percent"))
    print(f"| {row['policy']} | {row['mode']} | {row['requests']} | {row['failed']} | {row['prompt']} | {estimate} "
          f"| {row['cached']} | {row['predicted']:.0f} | {off} | {row['hit_percent']:.1f} % | {row['per_worker']} | {row['seconds']} |", flush=True)
    if row["failed"]:
        print("  the proxy's prediction counts the failed requests too: this row says nothing of how right it is", file=sys.stderr)
    if row["reported"] not in (row["cached"], 0):
        print(f"  the proxy heard of {row['reported']:.0f} cached tokens, the client of {row['cached']}", file=sys.stderr)


def serves(base):
    """Whether all workers are known: each has told its models."""
    try:
        return json.loads(call(connect(base), "GET", "/v1/models"))["data"] and len(figures(base)["selections"]) >= len(ARGS.worker)
    except (OSError, RuntimeError, http.client.HTTPException):
        return False


def proxied(processes, policy):
    """A proxy of its own; returns its process and URL when it serves."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    child = processes.start(f"proxy-{policy}", built("vllm-proxy"), "--host", "127.0.0.1", "--port", port, "--threads", "1", "--no-pin", "--redis", "none",
                            "--policy", policy, "--worker-urls", *ARGS.worker, *ARGS.flag)
    processes.wait_until(child, f"proxy-{policy}", lambda: serves(base))
    return child, base


def main(processes):
    modes = ARGS.mode or MODES
    if not ARGS.json:
        print("| policy | mode | requests | failed | prompt tokens | estimate off | reported cached | predicted | off, of prompt | hit rate | requests per worker | s |")
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|")
    for policy in ["?"] if ARGS.url else ARGS.policy or ["cache_aware", "round_robin", "consistent_hash"]:
        child, base = (None, ARGS.url) if ARGS.url else proxied(processes, policy)
        try:
            model = ARGS.model or json.loads(call(connect(base), "GET", "/v1/models"))["data"][0]["id"]
            if ARGS.warm:
                run(base, modes[0], model)
            rows = []
            for mode in modes:
                rows.append(measure(base, policy, mode, model))
                print_row(rows[-1])
            if len(rows) > 1 and not ARGS.json:
                prompt, cached, predicted = (sum(row[name] for row in rows) for name in ("prompt", "cached", "predicted"))
                print(f"| {policy} | all | {sum(row['requests'] for row in rows)} | | {prompt} | | {cached} | {predicted:.0f} "
                      f"| {f'{100 * (predicted - cached) / max(prompt, 1):+.2f} %' if rows[0]['estimated_prompt'] and not any(row['failed'] for row in rows) else ''} | {100 * cached / max(prompt, 1):.1f} % | | |", flush=True)
        finally:
            if child:
                processes.end(child, patience=10)


try:
    with Processes("turns") as running:
        main(running)
except Failed as problem:
    sys.exit(str(problem))
