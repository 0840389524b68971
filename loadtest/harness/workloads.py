"""What is sent. A row of WORKLOADS says what `load` calls it, how much of it at once, before how many workers, and what is measured of it."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    name: str
    summary: str
    load: str                    # name of the load generator's workload
    connections: int = 32        # closed loop; of streams: how many at a time
    tool: str = "wrk"            # of the closed loop: wrk where one body says it all, else load
    events: int = 0              # of a stream; its figures are per event, too
    flags: tuple = ()            # further ones of `load`
    rates: tuple = ()            # per second, at which added latency is measured
    workers: int = 1
    needs: frozenset = frozenset()  # abilities without which a target cannot do it
    aliases: tuple = ()          # (alias, model)
    models: tuple = ("m",)       # of the workers, in turn
    shards: int = 1
    large_bodies: bool = False
    kind: str = "load"           # or "idle"
    all_cores: bool = False      # load and workers on every core, the target on as many as it has shards

    @property
    def setup(self):
        """Workloads of which this is equal share workers and targets."""
        return (self.workers, self.models, self.aliases, self.shards, self.large_bodies, self.all_cores, self.kind)


def paced(gap_ms, events=200):
    return ("--events", events, "--gap-ms", gap_ms)


WORKLOADS = [
    Workload("small-json", "chat of 1 KB, answer of 300 bytes", "small-json", rates=(500, 2000, 5000)),
    Workload("prompt-32k", "prompt of 32 KB, plain words", "prompt-32k", rates=(500, 2000), large_bodies=True),
    Workload("escaped-32k", "prompt of 32 KB, source code", "escaped-32k", large_bodies=True),
    Workload("prompt-1m", "prompt of 1 MB, plain words", "prompt-1m", connections=8, rates=(50, 200), large_bodies=True),
    Workload("escaped-1m", "prompt of 1 MB, source code", "escaped-1m", connections=8, large_bodies=True),
    Workload("embeddings-64", "64 inputs of 200 bytes", "embeddings-64"),
    Workload("audio-10m", "multipart form with a file of 10 MB", "audio-10m", connections=4, large_bodies=True),
    Workload("sse", "stream of 200 events at full speed", "sse", tool="load", events=200, flags=paced(0), rates=(100,)),
    Workload("sse-10ms-64", "64 streams, an event every 10 ms", "sse", tool="load", connections=64, events=200, flags=paced(10)),
    Workload("sse-10ms-1000", "1,000 streams, an event every 10 ms", "sse", tool="load", connections=1000, events=200, flags=paced(10)),
    Workload("abort", "streams, an event every ms, whose client leaves after a few", "abort", tool="load", flags=paced(1)),
    Workload("churn", "a connection per request", "churn", tool="load"),
    Workload("two-models", "two models on two workers, and an alias of each", "two-models", tool="load", workers=2, models=("a", "b"),
             aliases=(("first", "a"), ("second", "b")), flags=("--models", "a,b,first,second"), needs=frozenset({"aliases"})),
    Workload("chats", "64 chats of up to 50 KB that grow turn by turn, four workers", "chats", tool="load", workers=4, large_bodies=True, rates=(500,)),
    Workload("one-shard", "small-json on all cores", "small-json", connections=64, needs=frozenset({"shards"}), all_cores=True),
    Workload("two-shards", "small-json on all cores, two shards (workers of nginx, threads of HAProxy)", "small-json", connections=64,
             needs=frozenset({"shards"}), shards=2, all_cores=True),
    Workload("idle", "10,000 connections that have asked once", "idle", kind="idle", connections=10_000),
]
BY_NAME = {workload.name: workload for workload in WORKLOADS}
QUICK = ("small-json", "prompt-32k", "sse")
