"""Is feedback lost or doubled when servers are killed, how much of it goes through, and what does it cost rankings?

    python benchmarks/feedback.py [--kills N] [--store sqlite|redis]

With the demo's release, on SQLite and on Redis with ``appendfsync always``. 1,000 events a second are told in batches
of 20 while Triton and all its processes are killed outright at random moments (with Redis every second time the
store, too) and started again; a batch whose answer does not come is told again, with the same ids, until it is
acknowledged. At the end the store is read: what was acknowledged and is not there is lost, what is there twice is
doubled, in the log and in what is remembered of users. Rankings come at a fixed rate, in rounds with and without
feedback beside them, latency counted from the moment that they were due; who tells feedback is a process of its own
there, and gives way to who asks, since in life neither is on the server's machine.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from results import ROOT, Figure, write
from trirank import FeedbackEvent, RankClient, RankError, RankRequest
from trirank.contract import MAX_HISTORY
from trirank_backend.stores.store import open_store
from trirank_build.demo import build
from trirank_build.online.events import all_events
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.server import Ports, TritonServer
from trirank_build.serving.stores import Stores

sys.path.append(str(ROOT / "tests"))
from stores import free_port, start_redis

BATCH, RATE = 20, 1_000
RANK_RATE, ROUND_S, ROUNDS = 100, 8.0, 7
SUSTAINED_S, TELLERS, LARGE = 6.0, 8, 100
KINDS = ("impression", "impression", "impression", "view", "click", "cart", "purchase")


class Redis:
    """A Redis that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.address = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        """Until it answers; it reads its log of commands first."""
        self._process = start_redis(self._folder, self._port)

    def kill(self) -> None:
        """Outright."""
        self._process.kill()
        self._process.wait(10)


@contextmanager
def store_of(kind: str, folder: Path) -> Iterator[tuple[str, Redis | None]]:
    """Its address, and the process of a store that is one."""
    if kind == "sqlite":
        yield f"sqlite:{folder / 'users.sqlite'}", None
        return
    redis = Redis(folder)
    try:
        yield redis.address, redis
    finally:
        redis.kill()


class Teller(threading.Thread):
    """Tells events at a fixed rate; several batches may be waiting for their answers."""

    def __init__(self, address: str, items: list[int], rate: float, users: int = 500) -> None:
        super().__init__(daemon=True)
        self._client = RankClient(address, deadline_s=60)
        self._items, self._rate, self._users = items, rate, users
        self._stopped = threading.Event()
        self._random = random.Random(0)
        self.acknowledged: list[FeedbackEvent] = []
        self.told = self.repeated = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Until stopped; then what waits is told to the end."""
        with ThreadPoolExecutor(TELLERS) as pool:
            due = time.monotonic()
            while not self._stopped.is_set():
                pool.submit(self._tell, self._batch())
                due += BATCH / self._rate
                time.sleep(max(0.0, due - time.monotonic()))

    def _batch(self) -> list[FeedbackEvent]:
        self.told += BATCH
        return [
            FeedbackEvent(
                user_id=self._random.randrange(1, self._users), item_id=self._random.choice(self._items),
                kind=self._random.choice(KINDS), request_id="benchmark", position=at + 1,
            )
            for at in range(BATCH)
        ]  # fmt: skip

    def _tell(self, batch: list[FeedbackEvent]) -> None:
        while True:
            try:
                result = self._client.feedback(batch, deadline_s=20)
                break
            except RankError:  # the server is gone; the same batch again
                time.sleep(0.1)
        with self._lock:
            self.acknowledged += batch
            self.repeated += result.repeated

    def stop(self) -> None:
        """Tell what waits, and end."""
        self._stopped.set()
        self.join()
        self._client.close()


def killed(kind: str, release: Path, items: list[int], kills: int) -> list[Figure]:
    """Kills at random moments under load."""
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, store_of(kind, Path(folder)) as (address, redis):
        ports = Ports(grpc=free_port())
        server = TritonServer(release, ports=ports, stores=Stores(address))
        server.wait_ready()
        teller = Teller(server.grpc, items, RATE)
        teller.start()
        try:
            for number in range(kills):
                time.sleep(chance.uniform(0.5, 2.5))
                os.killpg(server.pid, signal.SIGKILL)
                if redis is not None and number % 2:
                    redis.kill()
                    redis.start()
                server.stop()
                server = TritonServer(release, ports=ports, stores=Stores(address))
                server.wait_ready()
            time.sleep(1)
        finally:
            teller.stop()
            server.stop()
        store = open_store(address)
        logged = list(all_events(store))
        found = Counter(event.event_id for event in logged)
        lost = sum(event.event_id not in found for event in teller.acknowledged)
        doubled = sum(count - 1 for count in found.values())
        remembered = Counter(event.user_id for event in logged if event.kind > 0)
        pasts = store.get(list(remembered))
        wrong = sum(
            abs(min(count, MAX_HISTORY) - len(pasts[user].events.item_ids) if user in pasts else count)
            for user, count in remembered.items()
        )
        shown = sum(event.kind == 0 for event in logged)
        counted = int(store.counts()[1].sum())
        store.close()
    note = (
        f"{kind}: {kills} kills, {len(teller.acknowledged):,} events acknowledged, {len(logged):,} stored, "
        f"{teller.repeated:,} told again that were there"
    )
    return [
        figure(f"lost_events_{kind}", [lost], "events", note),
        figure(f"doubled_events_{kind}", [doubled], "events", note),
        figure(f"wrong_pasts_{kind}", [wrong], "events", "remembered of users, against the log"),
        figure(f"wrong_counts_{kind}", [abs(shown - counted)], "events", "of items, against the log"),
    ]


def sustained(kind: str, release: Path, items: list[int]) -> list[Figure]:
    """As fast as it goes, and rankings with and without feedback beside them."""
    requests = recorded_requests(release)
    with tempfile.TemporaryDirectory() as folder, store_of(kind, Path(folder)) as (address, _), ExitStack() as stack:
        server = stack.enter_context(TritonServer(release, stores=Stores(address)))
        server.wait_ready()
        rates = [flat_out(server.grpc, items) for _ in range(3)]
        rank_p99(server.grpc, requests)  # not counted: caches fill
        without, beside = [], []
        for _ in range(ROUNDS):
            without.append(rank_p99(server.grpc, requests))
            with telling(server.grpc, items):
                beside.append(rank_p99(server.grpc, requests))
    ratios = [with_it / alone for with_it, alone in zip(beside, without, strict=True)]
    note = f"{RANK_RATE} rankings/s, {RATE} events/s in batches of {BATCH} beside them or not, in turns"
    return [
        figure(f"events_per_s_{kind}", rates, "events/s", f"{TELLERS} callers, batches of {LARGE}, as fast as they go"),
        figure(f"rank_p99_ms_{kind}", without, "ms", f"without feedback; {RANK_RATE} rankings/s"),
        figure(f"rank_p99_beside_ms_{kind}", beside, "ms", note),
        figure(f"rank_p99_ratio_{kind}", ratios, "times", note),
    ]


@contextmanager
def telling(address: str, items: list[int]) -> Iterator[None]:
    """Feedback at RATE from another process."""
    spawn = multiprocessing.get_context("spawn")
    begun, stopped = spawn.Event(), spawn.Event()
    process = spawn.Process(target=tell, args=(address, items, begun, stopped))
    process.start()
    begun.wait()
    try:
        yield
    finally:
        stopped.set()
        process.join()


def tell(address: str, items: list[int], begun: Any, stopped: Any) -> None:
    """The other process."""
    os.nice(10)
    teller = Teller(address, items, RATE)
    teller.start()
    while not teller.acknowledged:
        time.sleep(0.01)
    begun.set()
    stopped.wait()
    teller.stop()


def flat_out(address: str, items: list[int]) -> float:
    """Acknowledged events a second of several callers who tell the next batch when the last one is stored."""
    ends, told = time.monotonic() + SUSTAINED_S, itertools.count()
    with RankClient(address, deadline_s=20) as client, ThreadPoolExecutor(TELLERS) as pool:

        def tell(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < ends:
                client.feedback([
                    FeedbackEvent(user_id=chance.randrange(1, 5_000), item_id=chance.choice(items), kind="click")
                    for _ in range(LARGE)
                ])  # fmt: skip
                next(told)

        started = time.monotonic()
        list(pool.map(tell, range(TELLERS)))
        return next(told) * LARGE / (time.monotonic() - started)


def rank_p99(address: str, requests: list[RankRequest]) -> float:
    """99th percentile of milliseconds from the moment a ranking was due."""
    took: list[float] = []
    with RankClient(address, deadline_s=5) as client, ThreadPoolExecutor(8) as pool:

        def ask(number: int, due: float) -> None:
            client.rank(requests[number % len(requests)])
            took.append((time.monotonic() - due) * 1e3)

        started = time.monotonic()
        waiting = []
        for number in range(int(RANK_RATE * ROUND_S)):
            due = started + number / RANK_RATE
            time.sleep(max(0.0, due - time.monotonic()))
            waiting.append(pool.submit(ask, number, due))
        for each in waiting:
            each.result()
    return float(np.percentile(took[len(took) // 10 :], 99))


def figure(name: str, values: list[float], unit: str, note: str) -> Figure:
    """Median and spread."""
    return Figure(name, float(np.median(values)), float(min(values)), float(max(values)), unit, note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--store", choices=["sqlite", "redis"])
    arguments = parser.parse_args()
    made = build(ROOT / "work" / "demo")
    ids = np.load(made / "features" / "catalogue" / "ids.npy").tolist()
    for one in [arguments.store] if arguments.store else ["sqlite", "redis"]:
        found = [*sustained(one, made, ids), *killed(one, made, ids, arguments.kills)]
        for each in found:
            print(
                f"{each.name:28} {each.value:10.2f} [{each.low:.2f}, {each.high:.2f}] {each.unit}  {each.note}",
                flush=True,
            )
        write("feedback", found, keep=True)
