"""An open loop that costs little: requests go out when a Poisson process says so, whatever became of those before.

    python benchmarks/open_loop.py PLAN.json RESULT.npy

What there is ready-made does not fit: h2load's timing script counts each request's moment from when the one before
was sent, and so drifts by half a millisecond a request; clients in Python take a good part of what the servers here
take. This is one thread on uvloop, which writes bytes that were made beforehand: HTTP/1.1 requests over a pool of
connections, of which one that is free is taken, or streams of HTTP/2. Of the answers it looks at no more than where
they end and whether they are answers. A latency counts from the moment at which its request was to be sent, also
where this program was late itself.
"""

from __future__ import annotations

import asyncio
import json
import resource
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np
import uvloop
from trirank import _codec

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_LARGEST_FRAME = 16_384
_OK, _REFUSED, _UNANSWERED = 1, 0, -1


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header that no table is to keep (RFC 7541, 6.2.2), so that the same bytes mean the same in every stream."""
    raw_name, raw_value = name.encode(), value.encode()
    assert max(len(raw_name), len(raw_value)) < 127
    return b"\0" + bytes([len(raw_name)]) + raw_name + bytes([len(raw_value)]) + raw_value


class Http2(asyncio.Protocol):
    """One connection, many streams: gRPC."""

    def __init__(self, plan: dict, done) -> None:
        self._done = done
        fields = {":method": "POST", ":scheme": "http", ":path": plan["path"], ":authority": plan["address"]}
        fields |= dict(header.split(": ") for header in plan["headers"])
        self._head = b"".join(_literal(name, value) for name, value in fields.items())
        self._next, self._window, self._read, self._deadline_s = 1, 65_535, b"", 0.0
        self._numbers: dict[int, int] = {}
        self._answered: set[int] = set()
        self._waiting: deque[tuple[int, bytes]] = deque()

    def connection_made(self, transport) -> None:
        """No window of ours shall ever close."""
        self._transport = transport
        largest = 2**31 - 1
        settings = struct.pack(">HI", 4, largest) + struct.pack(">HI", 1, 0)
        transport.write(
            _PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, struct.pack(">I", largest - 65_535))
        )

    def give_time(self, deadline_s: float) -> None:
        """What our client sends along: gRPC's deadline, and the moment itself for the stages."""
        self._head += _literal("grpc-timeout", f"{deadline_s * 1e3:.0f}m")
        self._deadline_s = deadline_s

    def send(self, number: int, body: bytes) -> None:
        """Or keep it until the server's window opens."""
        if self._deadline_s:
            sent = time.time()
            message = _codec.with_deadline(body[5:], int((sent + self._deadline_s) * 1e6), int(sent * 1e6))
            body = b"\0" + len(message).to_bytes(4, "big") + message
        self._send(number, body)

    def _send(self, number: int, body: bytes) -> None:
        if self._waiting or len(body) > self._window:
            self._waiting.append((number, body))
            return
        stream, self._next = self._next, self._next + 2
        self._numbers[stream] = number
        self._window -= len(body)
        parts = [_frame(_HEADERS, _END_HEADERS, stream, self._head)]
        cuts = range(0, len(body), _LARGEST_FRAME)
        parts += [_frame(_DATA, _END_STREAM * (at == cuts[-1]), stream, body[at : at + _LARGEST_FRAME]) for at in cuts]
        self._transport.write(b"".join(parts))

    def data_received(self, data: bytes) -> None:
        data = self._read + data if self._read else data
        at, size = 0, len(data)
        while size - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if size - at - 9 < length:
                break
            self._frame(
                data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : at + 9 + length]
            )
            at += 9 + length
        self._read = data[at:]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            if len(payload) > 5:
                self._answered.add(stream)
        elif kind in (_HEADERS, _RESET):
            if flags & _END_STREAM or kind == _RESET:
                good = stream in self._answered and kind == _HEADERS
                self._answered.discard(stream)
                number = self._numbers.pop(stream, None)
                if number is not None:  # a stream that ended early is reset besides
                    self._done(number, _OK if good else _REFUSED)
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and not stream:
            self._window += int.from_bytes(payload, "big")
            while self._waiting and len(self._waiting[0][1]) <= self._window:
                number, body = self._waiting.popleft()
                waiting, self._waiting = self._waiting, deque()
                self._send(number, body)
                self._waiting = waiting
        elif kind == _AWAY:
            self._transport.close()


class Http1(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._read = b""

    def connection_made(self, transport) -> None:
        self._transport = transport

    def send(self, number: int, message: bytes) -> None:
        """The next request; the one before has been answered."""
        self._number = number
        self._transport.write(message)

    def data_received(self, data: bytes) -> None:
        data = self._read + data if self._read else data
        end = data.find(b"\r\n\r\n")
        at = data.lower().find(b"content-length:", 0, end)
        assert end < 0 or at > 0, data[:200]
        if end < 0 or len(data) < end + 4 + int(data[at + 15 : data.find(b"\r", at)]):
            self._read = data
            return
        self._read = b""
        self._pool.free(self, self._number, _OK if data[9:12] == b"200" else _REFUSED)


class Pool:
    """Connections of HTTP/1.1; who comes while all are busy waits for the first that is free."""

    def __init__(self, plan: dict, done) -> None:
        self._done, self._idle, self._waiting = done, deque(), deque()
        lines = [f"POST {plan['path']} HTTP/1.1", f"host: {plan['address']}", *plan["headers"]]
        self._head = "\r\n".join(lines).encode() + b"\r\ncontent-length: "

    def send(self, number: int, body: bytes) -> None:
        """Over a connection that is free, or as soon as there is one."""
        message = self._head + str(len(body)).encode() + b"\r\n\r\n" + body
        if self._idle:
            # The one that has rested longest, or workers that share a port would not share the work.
            self._idle.popleft().send(number, message)
        else:
            self._waiting.append((number, message))

    def free(self, connection: Http1, number: int, outcome: int) -> None:
        """A connection has its answer."""
        self._done(number, outcome)
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def add(self, connection: Http1) -> None:
        """One that stands."""
        self._idle.append(connection)


async def drive(plan: dict) -> np.ndarray:
    """[requests, 3]: seconds at which each was due, at which it was answered (NaN: not at all), and the outcome."""
    rng = np.random.default_rng(plan["seed"])
    count = int(plan["rate"] * plan["seconds"] * 1.5) + 100
    due = np.cumsum(rng.exponential(1 / plan["rate"], count))
    due = due[due < plan["seconds"]]
    bodies = [Path(path).read_bytes() for path in plan["bodies"]]
    picked = rng.integers(len(bodies), size=len(due))
    answered, outcomes = np.full(len(due), np.nan), np.full(len(due), _UNANSWERED, np.float64)
    open_ones, finished = len(due), asyncio.Event()
    clock, loop = time.perf_counter, asyncio.get_running_loop()

    def done(number: int, outcome: int) -> None:
        nonlocal open_ones
        answered[number], outcomes[number] = clock() - begin, outcome
        open_ones -= 1
        if not open_ones:
            finished.set()

    host, port = plan["address"].rsplit(":", 1)
    senders = []
    if plan["http1"]:
        pool = Pool(plan, done)
        for _ in range(plan["connections"]):
            _, connection = await loop.create_connection(lambda: Http1(pool), host, int(port))
            pool.add(connection)
        senders = [pool]
    else:
        for _ in range(plan["channels"]):
            _, connection = await loop.create_connection(lambda: Http2(plan, done), host, int(port))
            senders.append(connection)
    await asyncio.sleep(0.3)
    at, begin = 0, clock() + 0.05
    moments = due.tolist()
    if deadline_s := plan["deadline_s"]:
        for sender in senders:
            sender.give_time(deadline_s)
    while at < len(moments):
        now = clock() - begin
        while at < len(moments) and moments[at] <= now:
            senders[at % len(senders)].send(at, bodies[picked[at]])
            at += 1
        if at < len(moments):
            await asyncio.sleep(max(0.0, moments[at] - (clock() - begin)))
    with suppress(asyncio.TimeoutError):  # who is not answered by then has no answer in the result
        await asyncio.wait_for(finished.wait(), plan["patience_s"])
    return np.stack([due, answered, outcomes], 1)


def main() -> None:
    """Run a plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    found = uvloop.run(drive(plan))
    np.save(sys.argv[2], found)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu_s": spent.ru_utime + spent.ru_stime}))


if __name__ == "__main__":
    main()
