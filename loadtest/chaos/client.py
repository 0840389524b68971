"""Clients of the chaos run: raw sockets, every kind of good and bad manners, and a verdict on every request.

Each request carries a nonce and the number of tokens it wants; the mock answers with exactly those. So every answer is one of: whole and
right, a failure that says so (a status, an error event, `finish_reason: "abort"`, a connection closed too early), aborted by ourselves, or
one of the two that must never be: lost (no end within the limit, or short without saying so) and wrong (somebody else's).
"""
import asyncio, json, re, socket, struct

import worker

# Kinds of clients, and how often each comes.
MANNERS = {"plain": 30, "stream": 30, "once": 8, "chunked": 4, "large": 3, "dribble": 3, "slow_reader": 3, "pipeline": 5, "http10": 4,
           "half_close": 3, "abort_connect": 2, "abort_head": 2, "abort_body": 3, "abort_sent": 5, "abort_answer": 5, "abort_stream": 5}


class Sent:
    """A request and what became of it."""

    def __init__(self, nonce, count, stream, manner, now):
        self.nonce, self.count, self.stream, self.manner, self.began = nonce, count, stream, manner, now
        self.outcome, self.reason, self.ended = None, "", None
        # what came before it on its connection, if that was pipelined
        self.behind = None

    def bytes(self, version="1.1", chunked=False, filler=0):
        text = f"nonce={self.nonce};n={self.count} " + "x" * filler
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], "stream": self.stream}).encode()
        head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: chaos\r\nContent-Type: application/json\r\n"
        if chunked:
            half = len(body) // 2
            body = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])
            head += "Transfer-Encoding: chunked\r\n\r\n"
        else:
            head += f"Content-Length: {len(body)}\r\n\r\n"
        return head.encode(), body


class Answer:
    """What came, and how it ended: `whole`, `short`, or `none`."""

    def __init__(self):
        self.status, self.fields, self.body, self.end, self.trouble = 0, {}, bytearray(), "none", ""


class Connection:
    def __init__(self, address):
        self.address = address

    async def open(self, receive_buffer=None):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self.address)
            # the head is within the limit, a slow reader reads no further ahead than that
            self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=4096 if receive_buffer else 1 << 18)
        except BaseException:
            sock.close()
            raise
        self.sock = sock
        return self

    async def send(self, data):
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            pass  # what the proxy has said before it closed is still to be read

    def close(self, reset=False):
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        else:
            self.writer.close()

    async def answer(self, pause=0.0, stop_after=None):
        """Reads one answer; `stop_after`: no further than so many bytes of body."""
        got = Answer()
        try:
            while True:
                head = await self.reader.readuntil(b"\r\n\r\n")
                line, *fields = head[:-4].decode("latin-1").split("\r\n")
                if not re.fullmatch(r"HTTP/1\.[01] \d{3} .*", line):
                    got.trouble = f"not an answer: {line[:60]!r}"
                    return got
                got.status = int(line.split(" ")[1])
                if got.status >= 200:
                    break
            got.fields = {name.lower(): value.strip() for name, value in (field.split(":", 1) for field in fields)}
            got.end = "short"
            if "chunked" in got.fields.get("transfer-encoding", ""):
                while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
                    got.body += await self.reader.readexactly(size)
                    if await self.reader.readexactly(2) != b"\r\n":
                        raise ValueError("a chunk without its end")
                    if stop_after is not None and len(got.body) >= stop_after:
                        return got
                    if pause:
                        await asyncio.sleep(pause)
                await self.reader.readexactly(2)
            elif "content-length" in got.fields:
                left = int(got.fields["content-length"])
                while left:
                    part = await self.reader.read(min(left, 4096))
                    if not part:
                        return got
                    got.body += part
                    left -= len(part)
                    if stop_after is not None and len(got.body) >= stop_after:
                        return got
            else:
                while part := await self.reader.read(4096):
                    got.body += part
            got.end = "whole"
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except (ValueError, asyncio.LimitOverrunError) as error:
            got.trouble = f"broken framing: {error!r}"
        return got


def verdict(sent, got):
    """Outcome and reason of a request by its answer; see the module's text for the outcomes."""
    if got.trouble:
        return "wrong", got.trouble
    if got.end == "none":
        return "closed", "closed before an answer"
    if got.status != 200:
        return refusal(got)
    return streamed(sent, got) if sent.stream and "event-stream" in got.fields.get("content-type", "") else single(sent, got)


def refusal(got):
    if got.end != "whole":
        return "closed", f"{got.status} cut"
    try:
        error = json.loads(got.body)["error"]
        # without what differs from case to case
        return "failed", f"{got.status} {re.sub(r'[0-9:./]{6,}', '…', error['message'])[:90]}"
    except (ValueError, KeyError, TypeError):
        text = bytes(got.body)[:40]
        return ("failed", f"{got.status} {text.decode()}") if text.isascii() else ("wrong", f"{got.status} with {text!r}")


def single(sent, got):
    if got.end != "whole":
        return "closed", "200 cut"
    try:
        choice = json.loads(got.body)["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, KeyError, TypeError):
        return "lost", f"200 whole, but not an answer: {bytes(got.body)[:40]!r}"
    return compare(sent, text, finish, "")


def streamed(sent, got):
    text, finish, done, failed, torn = "", None, False, None, None
    for part in bytes(got.body).split(b"\n\n"):
        if not part.startswith(b"data: "):
            continue
        if part == b"data: [DONE]":
            done = True
            continue
        try:
            event = json.loads(part[6:])
        except ValueError:
            torn = part
            continue
        if "error" in event:
            torn = None  # a stream that was cut within an event: the error event comes next
            failed = f"{event['error'].get('code')} {event['error'].get('message', '')[:60]}"
            continue
        choice = event["choices"][0]
        text += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
    if torn is not None and got.end == "whole":
        return "wrong", f"an event that is no JSON in a whole stream: {torn[:40]!r}"
    outcome, reason = compare(sent, text, finish if done else None, failed)
    if outcome == "lost" and got.end == "short":
        return "closed", "200 stream cut"
    return outcome, reason


def compare(sent, text, finish, failed):
    expected = "".join(worker.tokens(sent.nonce, sent.count))
    if not expected.startswith(text):
        return "wrong", f"asked for {sent.nonce}, got {text[:60]!r}"
    if failed:
        return "failed", f"error event {failed}"
    if finish == "abort":
        return "failed", "finish_reason abort"
    if text == expected and finish == "stop":
        return "answered", ""
    return "lost", f"200 and a clean end, but {'no text' if not text else 'not all of it'}, finish_reason {finish}"


class Clients:
    """Runs clients; `finished` is told of every request."""

    def __init__(self, address, rng, limit, finished, clock):
        self.address, self.rng, self.limit, self.finished, self.clock = address, rng, limit, finished, clock
        self.count = 0

    async def one(self):
        """One client, from its coming to its going."""
        manner = self.rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        connection = Connection(self.address)
        open_ones = []
        try:
            await asyncio.wait_for(connection.open(8192 if manner == "slow_reader" else None), self.limit)
        except (OSError, asyncio.TimeoutError) as error:
            self.end(self.request(manner), "refused", type(error).__name__)
            return await asyncio.sleep(0.2)
        try:
            await getattr(self, manner.partition("_")[0] if manner.startswith("abort") else manner)(connection, manner, open_ones)
        finally:
            connection.close()
            for sent in open_ones:
                if sent.outcome is None:
                    self.end(sent, "closed", "closed before its turn")

    def request(self, manner, stream=None, count=None):
        self.count += 1
        stream = self.rng.random() < 0.5 if stream is None else stream
        return Sent(f"{self.count:x}z{self.rng.getrandbits(32):x}", count or self.rng.randint(3, 20), stream, manner, self.clock())

    def end(self, sent, outcome, reason):
        sent.outcome, sent.reason, sent.ended = outcome, reason, self.clock()
        self.finished(sent)

    async def talk(self, connection, sent, pause=0.0, **shape):
        """Sends a request, reads its answer and judges it; whether the connection may be used on."""
        head, body = sent.bytes(**shape)
        await connection.send(head + body)
        return await self.judge(connection, sent, pause)

    async def judge(self, connection, sent, pause=0.0, aborted=None):
        try:
            got = await asyncio.wait_for(connection.answer(pause), self.limit)
        except asyncio.TimeoutError:
            self.end(sent, "lost", f"no end within {self.limit} s")
            return False
        outcome, reason = verdict(sent, got)
        if aborted and outcome in ("closed", "failed"):
            outcome, reason = "aborted", aborted
        self.end(sent, outcome, reason)
        return got.end == "whole" and got.fields.get("connection", "").lower() != "close"

    async def several(self, connection, manner, stream):
        for _ in range(self.rng.randint(1, 12)):
            if not await self.talk(connection, self.request(manner, stream)):
                break
            # sometimes longer than a worker keeps a connection
            await asyncio.sleep(self.rng.choice([0, 0, 0, 0.05, 0.5]))

    async def plain(self, connection, manner, _):
        await self.several(connection, manner, False)

    async def stream(self, connection, manner, _):
        await self.several(connection, manner, True)

    async def once(self, connection, manner, _):
        await self.talk(connection, self.request(manner))

    async def chunked(self, connection, manner, _):
        await self.talk(connection, self.request(manner), chunked=True)

    async def large(self, connection, manner, _):
        await self.talk(connection, self.request(manner), filler=self.rng.randint(50_000, 2_000_000))

    async def http10(self, connection, manner, _):
        await self.talk(connection, self.request(manner), version="1.0")

    async def slow_reader(self, connection, manner, _):
        await self.talk(connection, self.request(manner, True, 1500), pause=0.001)

    async def dribble(self, connection, manner, _):
        sent = self.request(manner)
        head, body = sent.bytes()
        for at in range(0, len(head + body), 40):
            await connection.send((head + body)[at : at + 40])
            await asyncio.sleep(0.01)
        await self.judge(connection, sent)

    async def pipeline(self, connection, manner, open_ones):
        for _ in range(self.rng.randint(2, 4)):
            sent = self.request(manner)
            sent.behind = open_ones[-1] if open_ones else None
            open_ones.append(sent)
        await connection.send(b"".join(b"".join(sent.bytes()) for sent in open_ones))
        for sent in open_ones:
            if not await self.judge(connection, sent):
                break

    async def half_close(self, connection, manner, _):
        sent = self.request(manner)
        head, body = sent.bytes()
        await connection.send(head + body)
        if connection.writer.can_write_eof() and not connection.writer.transport.is_closing():
            connection.writer.write_eof()
        # taken as gone, as vLLM does; an answer is as good
        await self.judge(connection, sent, aborted="half-close")

    async def abort(self, connection, manner, _):
        phase = manner.partition("_")[2]
        sent = self.request(manner, True if phase == "stream" else None, 60 if phase == "stream" else None)
        head, body = sent.bytes(filler=20_000 if phase == "body" else 0)
        cut = {"connect": 0, "head": self.rng.randrange(len(head)), "body": len(head) + self.rng.randrange(len(body))}
        await connection.send((head + body)[: cut.get(phase)])
        if phase in ("answer", "stream"):
            try:
                await asyncio.wait_for(connection.answer(stop_after=1 if phase == "answer" else self.rng.randint(200, 3000)), self.limit)
            except asyncio.TimeoutError:
                return self.end(sent, "lost", f"no answer within {self.limit} s")
        elif phase in ("sent", "body", "head"):
            await asyncio.sleep(self.rng.choice([0, 0.005, 0.03]))
        connection.close(reset=self.rng.random() < 0.5)
        self.end(sent, "aborted", phase)
