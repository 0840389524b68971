"""A mock vLLM for the chaos run: one process, told over stdin how to misbehave, that reports every request on stdout.

    worker.py ADDRESS PORT SLOTS SEED

It computes up to SLOTS requests at a time, lets as many wait and answers the rest with vLLM's busy 503. What it answers is made of
the request's nonce, so that a client can tell an answer that is not its own, and one that is not whole.
Lines on stdin: `MODE SHARE` (that share of requests misbehaves so). Lines on stdout: `P port`, `R nonce fault`, `M what` (a request
that is not legal HTTP). It ends with its parent. SIGTERM ends what runs as vLLM does, with `finish_reason: "abort"`.
"""
import asyncio, ctypes, json, os, random, re, signal, socket, struct, sys

# What one request can be made to suffer; the schedule picks from these.
FAULTS = ["reset_early", "reset_head", "reset_body", "cut_body", "slow", "error_500", "busy_503", "garbage", "two_lengths", "sse_error",
          "abort", "sleep", "empty", "extra_bytes", "engine_dead", "dribble", "interim_flood", "close_idle"]
NONCE = re.compile(rb"nonce=([0-9a-z]+);n=(\d+)")
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def tokens(nonce, count):
    """The answer to a nonce, piece by piece; the clients compute the same."""
    return [f"{nonce}/{number} " for number in range(count)]


class Gone(Exception):
    """The client (the proxy) has closed its connection."""


class Worker:
    def __init__(self, slots, seed):
        self.mode, self.share, self.rng = "ok", 0.0, random.Random(seed)
        self.slots, self.waiting, self.free = slots, 0, asyncio.Semaphore(slots)
        self.changed, self.dying = asyncio.Event(), False
        self.running = 0

    def become(self, mode, share):
        self.mode, self.share = mode, share
        self.changed.set()
        self.changed = asyncio.Event()

    async def connection(self, reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                idle = 0.02 if self.mode == "close_idle" else 5
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), idle)
                if not await self.exchange(head, reader, writer):
                    break
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, ConnectionError, Gone):
            pass
        except (asyncio.LimitOverrunError, ValueError) as error:
            say(f"M {error!r}")
        finally:
            writer.close()

    async def exchange(self, head, reader, writer):
        line, *fields = head[:-4].split(b"\r\n")
        method, target, version = line.split(b" ")
        fields = {name.strip().lower(): value.strip() for name, value in (field.split(b":", 1) for field in fields)}
        if version != b"HTTP/1.1" or b"host" not in fields:
            raise ValueError(line)
        body = await read_body(fields, reader)
        keep = fields.get(b"connection", b"").lower() != b"close" and not self.dying
        if target == b"/health":
            dead = self.mode == "engine_dead"
            writer.write(answer(503 if dead else 200, b"", "text/plain"))
        elif target == b"/v1/models":
            card = {"id": "m", "object": "model", "created": 1, "owned_by": "vllm", "root": "m", "parent": None, "max_model_len": 4096}
            writer.write(answer(200, json.dumps({"object": "list", "data": [card]}).encode()))
        elif target == b"/version":
            writer.write(answer(200, b'{"version":"0.32.0"}'))
        elif target == b"/large":
            writer.write(answer(200, b"x" * (128 << 10), "text/plain"))
        elif target == b"/is_sleeping":
            writer.write(answer(200, json.dumps({"is_sleeping": self.mode == "sleep"}).encode()))
        elif target == b"/metrics":
            name = '{model_name="m",engine="0"}'
            text = f"vllm:num_requests_running{name} {self.running}.0\nvllm:num_requests_waiting{name} {self.waiting}.0\n"
            writer.write(answer(200, text.encode(), "text/plain"))
        elif found := NONCE.search(body):
            return await self.generate(found[1].decode(), int(found[2]), b'"stream": true' in body, reader, writer) and keep
        else:
            writer.write(answer(404, b'{"detail":"Not Found"}'))
        await writer.drain()
        return keep

    async def generate(self, nonce, count, stream, reader, writer):
        fault = self.mode if self.rng.random() < self.share else "-"
        say(f"R {nonce} {fault}")
        if fault == "reset_early":
            return reset(writer)
        if fault == "busy_503" or (self.free.locked() and self.waiting >= self.slots):
            return await send(writer, error(503, "Service Unavailable", "The server is busy. Please try again later."))
        if fault == "error_500":
            return await send(writer, error(500, "InternalServerError", "list index out of range"))
        if fault == "engine_dead":
            return await send(writer, error(500, "InternalServerError", ENGINE_DEAD))
        if fault == "garbage":
            await send(writer, self.rng.choice([b"\x16\x03\x01 what?\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nbad field\r\n\r\n"]))
            return False
        if fault == "two_lengths":
            await send(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 5\r\n\r\n{}abc")
            return False
        if fault == "sleep":
            await self.held(reader)
        if fault == "interim_flood":
            await send(writer, b"HTTP/1.1 103 Early Hints\r\n\r\n" * 200)
        self.waiting += 1
        try:
            await self.free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            pause = self.rng.uniform(0.002, 0.012) * (20 if fault == "slow" else 1)
            talk = self.stream if stream else self.whole
            return await talk(fault, tokens(nonce, count), pause, reader, writer)
        finally:
            self.running -= 1
            self.free.release()

    async def held(self, reader):
        """As a sleeping vLLM: no answer, until it is woken or the client goes."""
        while self.mode == "sleep" and not reader.at_eof():
            try:
                await asyncio.wait_for(self.changed.wait(), 0.1)
            except asyncio.TimeoutError:
                pass

    async def whole(self, fault, pieces, pause, reader, writer):
        done = 0
        for _ in range(min(len(pieces), 10)):
            await asyncio.sleep(pause)
            done += 1
            if reader.at_eof():
                raise Gone
            if self.dying:
                break
        aborted = self.dying or fault in ("abort", "sse_error")
        text = "".join(pieces[: done - 1] if aborted else pieces)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "abort" if aborted else "stop"}
        body = json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice]}).encode()
        full = answer(200, body)
        start = len(full) - len(body)
        if fault == "empty":
            return await send(writer, answer(200, b""))
        if fault == "reset_head":
            await send(writer, full[: self.rng.randrange(1, start)])
            return reset(writer)
        if fault in ("reset_body", "cut_body"):
            await send(writer, full[: self.rng.randrange(start, len(full))])
            return fault == "reset_body" and reset(writer)
        if fault == "dribble":
            return await self.dribble(writer, full)
        if fault == "extra_bytes":
            full += b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nalien"
        return await send(writer, full)

    async def stream(self, fault, pieces, pause, reader, writer):
        head = (b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\n"
                b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
        if fault == "reset_head":
            await send(writer, head[: self.rng.randrange(1, len(head))])
            return reset(writer)
        if fault == "empty":
            return await send(writer, head + b"0\r\n\r\n")
        # a fault strikes before the first token as often as in the middle
        at = self.rng.choice([0, self.rng.randrange(len(pieces) + 1)])
        out = head + event(delta({"role": "assistant", "content": ""}))
        for number, piece in enumerate(pieces):
            if number == at and fault in ("reset_body", "cut_body", "sse_error", "abort"):
                out += self.struck(fault)
                await send(writer, out)
                return reset(writer) if fault == "reset_body" else fault in ("sse_error", "abort")
            if self.dying:
                return await send(writer, out + self.struck("abort"))
            out += event(delta({"content": piece}))
            # long answers come in bursts, or a slow reader would never have anything to be slow with
            if number % (1 + len(pieces) // 40) == 0:
                await (self.dribble if fault == "dribble" else send)(writer, out)
                out = b""
                await asyncio.sleep(pause)
                if reader.at_eof():
                    raise Gone
        out += event(delta({}, "stop")) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        if fault == "extra_bytes":
            out += b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nalien"
        return await send(writer, out)

    def struck(self, fault):
        if fault == "sse_error":
            broken = {"error": {"message": ENGINE_DEAD, "type": "InternalServerError", "param": None, "code": 500}}
            return event(broken) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        if fault == "abort":
            return event(delta({}, "abort")) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        return self.rng.choice([b"", b"4", b"40\r\ndata: {"])

    async def dribble(self, writer, data):
        """Few bytes at a time, split anywhere."""
        step = max(1, len(data) // 20)
        for at in range(0, len(data), step):
            await send(writer, data[at : at + step])
            await asyncio.sleep(0.001)
        return True


def say(line):
    os.write(1, line.encode() + b"\n")


async def send(writer, data):
    writer.write(data)
    await writer.drain()
    return True


def reset(writer):
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


def answer(status, body, kind="application/json"):
    head = f"HTTP/1.1 {status} X\r\ndate: Sat, 21 Nov 2026 09:10:03 GMT\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\ncontent-type: {kind}\r\n\r\n"
    return head.encode() + body


def error(status, kind, message):
    return answer(status, json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode())


def delta(content, finish=None):
    choice = {"index": 0, "delta": content, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def event(value):
    data = b"data: " + json.dumps(value).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


async def read_body(fields, reader):
    if b"transfer-encoding" in fields:
        if fields[b"transfer-encoding"].lower() != b"chunked" or b"content-length" in fields:
            raise ValueError(fields)
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append(await reader.readexactly(size))
            if await reader.readexactly(2) != b"\r\n":
                raise ValueError("chunk without an end")
        if await reader.readexactly(2) != b"\r\n":
            raise ValueError("trailers")
        return b"".join(parts)
    return await reader.readexactly(int(fields.get(b"content-length", b"0")))


async def main(address, port, slots, seed):
    # whatever becomes of the parent, this process does not outlive it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    worker = Worker(slots, seed)
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(worker.connection, address, port, limit=1 << 20, backlog=1024)
    say(f"P {server.sockets[0].getsockname()[1]}")

    async def die():
        worker.dying = True
        await asyncio.sleep(0.1)
        server.close()
        await asyncio.sleep(0.3)
        os._exit(0)

    loop.add_signal_handler(signal.SIGTERM, lambda: loop.create_task(die()))
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        mode, share = line.split()
        worker.become(mode.decode(), float(share))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
