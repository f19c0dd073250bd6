"""Is feedback lost or doubled when servers are killed, how much of it goes through, and what does it cost rankings?

    python benchmarks/feedback.py [--kills N] [--store sqlite|redis] [--only rates|kills]

With the demo's release, on SQLite and on Redis with ``appendfsync always``. 1,000 events a second are told in batches
of 20 while Triton and all its processes are killed outright, at random moments and at those in which something has
just been stored and is not yet answered for (with Redis every second time the store, too), and started again; a batch
whose answer does not come is told again, with the same ids, until it is acknowledged. At the end the store is read:
what was acknowledged and is not there is lost, what is there twice is doubled, in the log and in what is remembered
of users. A kill leaves what the system has taken for written; that it is on the disk is SQLite's and Redis' own word.
Rankings come at a fixed rate, in rounds with and without feedback beside them, latency counted from the moment that
they were due; who tells feedback is a process of its own there, and gives way to who asks, since in life neither is
on the server's machine.
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
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from results import ROOT, Figure, write
from trirank import FeedbackEvent, RankClient, RankError, RankRequest
from trirank.contract import MAX_HISTORY
from trirank_backend.stores.events import Event
from trirank_backend.stores.redis import PREFIX, SEEN_S
from trirank_backend.stores.store import open_store
from trirank_build.demo import build
from trirank_build.online.events import all_events
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.ports import Ports
from trirank_build.serving.server import TritonServer
from trirank_build.serving.stores import Stores

sys.path.append(str(ROOT / "tests"))
from stores import free_port, start_redis

BATCH, RATE = 20, 1_000
RANK_RATE, ROUND_S, ROUNDS = 100, 3.0, 20
STALL_MS = 50.0
SUSTAINED_S, TELLERS, LARGE = 6.0, 8, 100
CODES = (0, 0, 0, 1, 2)
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
                if number % 4 >= 2:
                    wait_for_more(address)
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


def wait_for_more(address: str) -> None:
    """Until something is stored."""
    store = open_store(address)
    try:
        last = ""
        while part := store.log(last):
            last = part[-1].place
        while not store.log(last, limit=1):
            pass
    finally:
        store.close()


def sustained(kind: str, release: Path, items: list[int]) -> list[Figure]:
    """As fast as it goes, and rankings with and without feedback beside them."""
    requests = recorded_requests(release)
    with tempfile.TemporaryDirectory() as folder, store_of(kind, Path(folder)) as (address, _), ExitStack() as stack:
        server = stack.enter_context(TritonServer(release, stores=Stores(address)))
        server.wait_ready()
        rates = [flat_out(server.grpc, items) for _ in range(3)]
        rank_took(server.grpc, requests)  # not counted: caches fill
        without, beside = [], []
        with telling(server.grpc, items) as (go, rest):
            for number in range(ROUNDS):
                arms = [(without, rest), (beside, go)]
                for rounds, turn in arms if number % 2 else arms[::-1]:
                    turn()
                    rounds.append(rank_took(server.grpc, requests))
    p99 = [np.array([np.percentile(took, 99) for took in rounds]) for rounds in (without, beside)]
    stalls = [sum(float(took.max()) > STALL_MS for took in rounds) for rounds in (without, beside)]
    drawn = np.random.default_rng(0).integers(ROUNDS, size=(2_000, ROUNDS))
    ratio = np.median(p99[1][drawn], 1) / np.median(p99[0][drawn], 1)
    note = f"{RANK_RATE} rankings/s, {RATE} events/s in batches of {BATCH} beside them or not, in turns"
    between = (
        f"medians of {ROUNDS} rounds of {ROUND_S:g} s each, 95 % interval of rounds drawn anew; something took longer "
        f"than {STALL_MS:g} ms in {stalls[0]} rounds without and {stalls[1]} with feedback"
    )
    value = float(np.median(p99[1]) / np.median(p99[0]))
    return [
        figure(f"events_per_s_{kind}", rates, "events/s", f"{TELLERS} callers, batches of {LARGE}, as fast as they go"),
        figure(f"rank_p99_ms_{kind}", p99[0].tolist(), "ms", f"without feedback; {RANK_RATE} rankings/s"),
        figure(f"rank_p99_beside_ms_{kind}", p99[1].tolist(), "ms", note),
        Figure(f"rank_p99_ratio_{kind}", value, *np.percentile(ratio, [2.5, 97.5]).tolist(), "times", between),
    ]


@contextmanager
def telling(address: str, items: list[int]) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Feedback at RATE from another process: calls that let it go on, and rest."""
    spawn = multiprocessing.get_context("spawn")
    wanted, busy, ended = spawn.Event(), spawn.Event(), spawn.Event()
    process = spawn.Process(target=tell, args=(address, items, wanted, busy, ended))
    process.start()

    def go() -> None:
        wanted.set()
        assert busy.wait(60)

    def rest() -> None:
        wanted.clear()
        while busy.is_set():
            time.sleep(0.01)

    try:
        yield go, rest
    finally:
        ended.set()
        wanted.set()
        process.join()


def tell(address: str, items: list[int], wanted: Any, busy: Any, ended: Any) -> None:
    """The other process."""
    os.nice(10)
    while wanted.wait() and not ended.is_set():
        teller = Teller(address, items, RATE)
        teller.start()
        while not teller.acknowledged:
            time.sleep(0.01)
        busy.set()
        while wanted.is_set() and not ended.is_set():
            time.sleep(0.01)
        teller.stop()
        busy.clear()


def footprint() -> list[Figure]:
    """Bytes of Redis' memory that an event takes, and for how long."""
    count = 100_000
    with tempfile.TemporaryDirectory() as folder, store_of("redis", Path(folder)) as (address, _):
        store, client = open_store(address), redis.Redis.from_url(address)
        chance = random.Random(0)

        def used() -> int:
            return int(client.info("memory")["used_memory"])

        sizes = [used()]
        for start in range(0, count, 1_000):
            store.add([
                Event(uuid.uuid4().hex, chance.randrange(20_000), chance.randrange(5_000), chance.choice(CODES),
                      1_770_000_000 + start, uuid.uuid4().hex[:12], 1)
                for _ in range(1_000)
            ])  # fmt: skip
        sizes.append(used())
        client.delete(f"{PREFIX}events")
        sizes.append(used())
        for key in client.scan_iter(f"{PREFIX}seen:*", count=10_000):
            client.delete(key)
        sizes.append(used())
        store.close()
        client.close()
    log, seen = ((one - two) / count for one, two in itertools.pairwise(sizes[1:]))
    return [
        figure("redis_bytes_log", [log], "bytes an event", "until the log is trimmed"),
        figure("redis_bytes_seen", [seen], "bytes an event", f"for {SEEN_S / 86_400:g} days: its id"),
    ]


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


def rank_took(address: str, requests: list[RankRequest]) -> NDArray[np.float64]:
    """Milliseconds from the moment that each ranking was due, the first tenth left out."""
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
    return np.array(took[len(took) // 10 :])


def figure(name: str, values: list[float], unit: str, note: str) -> Figure:
    """Median and spread."""
    return Figure(name, float(np.median(values)), float(min(values)), float(max(values)), unit, note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--store", choices=["sqlite", "redis"])
    parser.add_argument("--only", choices=["rates", "kills"])
    arguments = parser.parse_args()
    made = build(ROOT / "work" / "demo")
    ids = np.load(made / "features" / "catalogue" / "ids.npy").tolist()
    for one in [arguments.store] if arguments.store else ["sqlite", "redis"]:
        found = []
        if arguments.only != "kills":
            found += sustained(one, made, ids)
        if arguments.only != "rates":
            found += killed(one, made, ids, arguments.kills)
            found += footprint() if one == "redis" else []
        for each in found:
            print(
                f"{each.name:28} {each.value:10.2f} [{each.low:.2f}, {each.high:.2f}] {each.unit}  {each.note}",
                flush=True,
            )
        write("feedback", found, keep=True)
