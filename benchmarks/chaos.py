"""What callers see of faults: how many requests fail, and when all are answered again.

    python benchmarks/chaos.py [--rounds N] [--only NAME …]

A real `trirank serve` of the demo's shop, 50 requests a second through the client without retries and with a deadline
of one second, whether or not those before have been answered; then something is killed, stopped or filled up. Failed:
not answered, of what was sent or under way from the fault on. Recovered: when the last one that failed was sent; all
that came after it were answered. (When it ended depends on its deadline: a stage's process that has died is told of
after a second.) What also has to hold (words in the log, nothing lost, the right answers afterwards) is in tests/chaos.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from results import ROOT, WORK, Figure, write

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]
from faults import Clock, MemoryLimit, Seen, Served, served, watch  # noqa: E402
from stores import free_port, start_redis  # noqa: E402
from trirank import FeedbackEvent, RankClient, RankError  # noqa: E402
from trirank_backend.stores.events import Event  # noqa: E402
from trirank_backend.stores.store import open_store  # noqa: E402
from trirank_build.online.users import erase_from_files  # noqa: E402
from trirank_build.repository.release import recorded_requests  # noqa: E402
from trirank_build.repository.store import promote  # noqa: E402
from trirank_loadtest.hostile import hostile_calls  # noqa: E402

HOSTILE = 10_000
PIPELINES = ("ensemble", "single")


@cache
def releases() -> dict[str, Path]:
    """The demo's release, in both pipelines."""
    from serving import releases as made

    found = made()
    return {"ensemble": found["ensemble"], "single": found["single"]}


def figures_of(name: str, seen: list[Seen], note: str) -> list[Figure]:
    """Two of a fault: medians and spread over its rounds."""
    errors = sorted({error for each in seen for error in each.errors})
    told = f"{note}; {sum(each.answered for each in seen)} answered meanwhile"
    told += f"; told {', '.join(errors)}" if errors else ""
    found = []
    for what, unit, values in (
        ("failed_requests", "requests", [float(each.failed) for each in seen]),
        ("recovered_s", "s", [each.recovered_s for each in seen]),
    ):
        found.append(Figure(f"{name}_{what}", statistics.median(values), min(values), max(values), unit, told))
    print(f"{name}: {[(each.failed, round(each.recovered_s, 2)) for each in seen]} {errors}", flush=True)
    return found


def stub_kill(rounds: int) -> list[Figure]:
    """Each stage's process in turn, in both pipelines; a server of its own each time, so that none has a pause before
    it."""
    found, every = [], []
    for pipeline, release in releases().items():
        stages = ("preprocess", "ranker", "rerank") if pipeline == "ensemble" else ("rank",)
        of_pipeline = []
        for stage in stages * rounds:
            with served(release, scratch(), "--users", "none") as running:
                of_pipeline.append(watch(running, running.stub(stage).kill))
        every += of_pipeline
        found += figures_of(f"stub_kill_{pipeline}", of_pipeline, f"SIGKILL, {', '.join(stages)} in turn")
    return found + figures_of("stub_kill", every, "SIGKILL, all stages of both pipelines, the first of its server")


def stub_hang(rounds: int) -> list[Figure]:
    """A process that is stopped."""
    return of_one(
        "stub_hang", rounds, lambda running: running.stub("ranker").suspend(), "SIGSTOP of the ranker's process"
    )


def server_kill(rounds: int) -> list[Figure]:
    """All of Triton."""
    return of_one("server_kill", rounds, lambda running: running.server().kill(), "SIGKILL of tritonserver")


def of_one(name: str, rounds: int, fault: Callable[[Served], object], note: str) -> list[Figure]:
    seen = []
    for _ in range(rounds):
        with served(releases()["ensemble"], scratch(), "--users", "none") as running:
            seen.append(watch(running, lambda: fault(running)))  # it is done within the round
    return figures_of(name, seen, note)


@contextmanager
def with_redis(release: Path) -> Iterator[tuple[Served, list[subprocess.Popen[bytes]], int]]:
    """A server with users in a Redis of its own."""
    folder, port = scratch(), free_port()
    processes = [start_redis(folder, port)]
    try:
        with served(release, folder / "served", "--users", f"redis://127.0.0.1:{port}/0") as running:
            yield running, processes, port
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def store_down(rounds: int) -> list[Figure]:
    """Redis killed, stopped (it takes connections and answers nothing), and refusing to write."""
    import redis

    killed, slow, readonly, refused = [], [], [], 0
    for _ in range(rounds):
        with with_redis(releases()["ensemble"]) as (running, processes, port):
            slow.append(watch(running, partial(processes[0].send_signal, signal.SIGSTOP)))
            processes[0].send_signal(signal.SIGCONT)
            follow = partial(redis.Redis(port=port).execute_command, "REPLICAOF", "127.0.0.1", "1")
            readonly.append(watch(running, follow))
            with RankClient(running.told("grpc"), deadline_s=5, retry=None) as client:
                try:
                    client.feedback([FeedbackEvent(user_id=1, item_id=1, kind="click")])
                except RankError:
                    refused += 1
            killed.append(watch(running, processes[0].kill))
    found = figures_of("store_kill", killed, "Redis killed")
    found += figures_of("store_slow", slow, "Redis stopped: it takes connections and answers nothing")
    found += figures_of("store_readonly", readonly, f"Redis takes no writes; feedback refused in {refused} of {rounds}")
    failed = [float(each.failed) for each in (*killed, *slow, *readonly)]
    note = "ranking requests, over all three; their users were taken for new ones"
    return [*found, Figure("store_down_failed", sum(failed), sum(failed), sum(failed), "requests", note)]


def crowd(rounds: int) -> list[Figure]:
    """A thousand connections: half of them open only half, or asking and reading nothing."""
    import socket

    def come(running: Served, stack: ExitStack) -> None:
        places = [running.told(name).split(":") for name in ("grpc", "http")]
        for number in range(1000):
            host, port = places[number % 2]
            own = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
            if number % 4 == 0:
                own.sendall(b"PRI * HTTP/2.0\r\n")
            elif number % 4 == 1:
                own.sendall(b"GET /v2/models/rank/config HTTP/1.1\r\n\r\n" * 20)
            elif number % 4 == 3:
                own.sendall(b"POST /v2/models/rank/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")

    seen = []
    for _ in range(rounds):
        with served(releases()["ensemble"], scratch(), "--users", "none") as running, ExitStack() as stack:
            seen.append(watch(running, lambda: come(running, stack)))
    return figures_of("thousand_connections", seen, "half-open ones and slow readers among them, gRPC and HTTP")


def full_memory(rounds: int) -> list[Figure]:
    """A /dev/shm of 256 MiB, as a container may have, without room."""
    seen = []
    for _ in range(rounds):
        with served(releases()["ensemble"], scratch(), "--users", "none", shm_mib=256) as running:
            seen.append(watch(running, running.fill_shm))
    return figures_of("full_shm", seen, "/dev/shm of 256 MiB filled up")


def memory_limit(rounds: int) -> list[Figure]:
    """A control group whose limit is reached, as a container's: the kernel kills its largest process."""
    seen, kills = [], 0
    for _ in range(rounds):
        with (
            MemoryLimit() as limit,
            served(releases()["ensemble"], scratch(), "--users", "none", prefix=limit.prefix) as running,
        ):
            seen.append(watch(running, partial(limit.reach, running)))
            kills += limit.kills()
    return figures_of("memory_limit", seen, f"32 MiB more than it used, taken by a neighbour; {kills} processes killed")


def clock(rounds: int) -> list[Figure]:
    """The wall clock of all of the server's processes set an hour on, and a day back."""
    seen = []
    for _ in range(rounds):
        wall = Clock(scratch())
        with served(releases()["ensemble"], scratch(), "--users", "none", environment=wall.environment) as running:
            seen += [watch(running, partial(wall.set, seconds)) for seconds in (3_600, -86_400)]
    return figures_of("clock", seen, "an hour on, a day back")


def full_disk(rounds: int) -> list[Figure]:
    """The user store's file system without room; one of 4 MiB is mounted for it."""
    seen, refused = [], 0
    for _ in range(rounds):
        small = scratch()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=True)
        try:
            with served(releases()["ensemble"], scratch(), "--users", f"sqlite:{small}/users.sqlite") as running:

                def fill(small: Path = small) -> None:
                    with (small / "filler").open("wb") as stream:
                        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(small).free)

                seen.append(watch(running, fill))
                with RankClient(running.told("grpc"), deadline_s=5, retry=None) as client:
                    try:
                        for _ in range(50):
                            client.feedback([FeedbackEvent(user_id=1, item_id=1, kind="click") for _ in range(100)])
                    except RankError:
                        refused += 1
        finally:
            subprocess.run(["umount", "-l", str(small)], check=True)
    return figures_of("full_disk", seen, f"of the user store; feedback refused in {refused} of {rounds}")


def damaged_release(rounds: int) -> list[Figure]:
    """Files of the release are deleted while it is served."""
    seen = []
    for _ in range(rounds):
        folder = scratch()
        release = releases()["ensemble"]
        own = shutil.copytree(release, folder / release.name)
        with served(promote(own), folder / "served", "--users", "none") as running:
            running.release = release

            def damage(own: Path = own) -> None:
                for file in own.rglob("*.npy"):
                    file.unlink()

            seen.append(watch(running, damage))
    return figures_of("damaged_release", seen, "all arrays of the served release deleted")


def sigterm(rounds: int) -> list[Figure]:
    """The end under load: who asked before it and was not answered, and how long it took."""
    from faults import load

    lost, took = [], []
    for _ in range(rounds):
        with served(releases()["ensemble"], scratch(), "--users", "none") as running, load(running, 100.0) as calls:
            time.sleep(2)
            asked = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(40)
            took.append(time.monotonic() - asked)
            time.sleep(0.5)
            lost.append(float(sum(bool(call.error) for call in calls if call.began < asked)))
    print(f"sigterm: lost {lost}, took {took}", flush=True)
    return [
        Figure("sigterm_failed_requests", statistics.median(lost), min(lost), max(lost), "requests",
               "sent before SIGTERM, at 100 a second"),
        Figure("sigterm_ended_s", statistics.median(took), min(took), max(took), "s", "until the command had ended"),
    ]  # fmt: skip


def hostile(rounds: int) -> list[Figure]:
    """10,000 hostile requests: every model, both protocols, both pipelines, and good requests beside them."""
    found = [figure for pipeline, release in releases().items() for figure in _hostile(pipeline, release)]
    worst = max(figure.value for figure in found if figure.name.startswith("hostile_internal"))
    return [
        *found,
        Figure(
            "hostile_internal",
            *[worst] * 3,
            "requests",
            "neither OK nor INVALID_ARGUMENT; the greater of both pipelines",
        ),
    ]


def _hostile(pipeline: str, release: Path) -> list[Figure]:
    requests, harmed, sane, stop = recorded_requests(release), [0], [0], threading.Event()
    own = f"sqlite:{scratch()}/users.sqlite"
    with (
        served(release, scratch(), "--users", own) as running,
        RankClient(running.told("grpc"), deadline_s=10, retry=None) as client,
    ):
        expected = [client.rank(request).item_ids.tolist() for request in requests]

        def go_on() -> None:
            while not stop.is_set():
                at = sane[0] % len(requests)
                try:
                    harmed[0] += client.rank(requests[at]).item_ids.tolist() != expected[at]
                except RankError:
                    harmed[0] += 1
                sane[0] += 1

        models = list(dict.fromkeys(["rank", *sorted(set(running.stubs().values()))]))
        ways = [(model, http) for model in models for http in (None, running.told("http"))]
        each, statuses, broken = -(-HOSTILE // len(ways)), Counter(), 0
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            for number, (model, http) in enumerate(ways):
                answers = hostile_calls(running.told("grpc"), model, each, number, over_http=http)
                broken += len(answers.broken)
                statuses += answers.statuses
        finally:
            stop.set()
            thread.join()
        assert "started anew" not in running.log.read_text()
    note = f"{pipeline}: {each * len(ways)} of {', '.join(models)} by gRPC and HTTP ({dict(sorted(statuses.items()))})"
    print(f"hostile {note}: {broken} broken, {harmed[0]} of {sane[0]} good ones harmed", flush=True)
    beside = f"{pipeline}: of {sane[0]} good requests beside them, failed or answered otherwise"
    return [
        Figure(f"hostile_internal_{pipeline}", *[float(broken)] * 3, "requests", note),
        Figure(f"hostile_harmed_{pipeline}", *[float(harmed[0])] * 3, "requests", beside),
    ]


def erase(rounds: int) -> list[Figure]:
    """Bytes of an erased user that are left on the disk: in SQLite, in Redis' own files, in logs."""
    left = []
    for _ in range(rounds):
        for kind in ("sqlite", "redis"):
            folder, port = scratch(), free_port()
            process = start_redis(folder, port, "--save", "60", "1") if kind == "redis" else None
            store = open_store(f"redis://127.0.0.1:{port}/0" if process else f"sqlite:{folder}/users.sqlite")
            rng = np.random.default_rng(0)
            user, items = 7_654_321_987_654_321, rng.integers(2**44, 2**46, 300)
            store.add([Event(f"person-{at}", user, int(item), 1, 1_772_000_000 + at) for at, item in enumerate(items)])
            store.add([Event(f"other-{at}", at, at, 1, 1_772_000_000 + at) for at in range(3_000)])
            (folder / "logs").mkdir()
            (folder / "logs" / "requests-1-1.jsonl").write_text(f'{{"user_id": {user}, "query": "person words"}}\n')
            numbers = [user, *map(int, items)]
            needles = [b"person", *(str(number).encode() for number in numbers)]
            needles += [each.to_bytes(size, order) for each in numbers for size, order in WRITTEN if each < 256**size]
            assert bytes_of(folder, needles) > 300  # or they are not what is written
            store.erase(user)
            erase_from_files(folder / "logs", {user})
            left.append(float(bytes_of(folder, needles)))
            store.close()
            if process is not None:
                process.terminate()
                process.wait()
    print(f"erase: {left}", flush=True)
    note = "of the id, of 300 items and of all words of a user, found in files of SQLite, Redis (AOF and RDB) and logs"
    return [Figure("erase_left_bytes", max(left), min(left), max(left), "bytes", note)]


WRITTEN = ((8, "little"), (8, "big"), (7, "big"), (6, "big"))
"""How a number may lie in a file: in records, and as SQLite has it, as short as it goes."""


def bytes_of(folder: Path, needles: list[bytes]) -> int:
    """Bytes of these words in all files below a folder."""
    disk = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return sum(disk.count(needle) * len(needle) for needle in set(needles))


def overload(rounds: int) -> list[Figure]:
    """Three times what can be answered: what against_peers.py measures, again."""
    from against_peers import overload as measured

    seconds = 10.0  # a tenth of a second in which the queue is found to stand is little of it
    found = {figure.name: figure for figure in measured(rounds, seconds)}
    (goodput,) = [figure for name, figure in found.items() if name.startswith("goodput_at_3x")]
    return [
        goodput._replace(name="overload_goodput_3x"),
        *(figure for name, figure in found.items() if name.endswith(("_cpu_ms", "_cores"))),
    ]


def scratch() -> Path:
    """An empty folder for one server."""
    folder = WORK / "chaos"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))


PARTS = {
    part.__name__: part
    for part in (
        stub_kill, stub_hang, server_kill, store_down, crowd, full_memory, memory_limit, clock, full_disk,
        damaged_release, sigterm, hostile,
        erase, overload,
    )
}  # fmt: skip


def main() -> None:
    """Measure and write ``results/chaos.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    given = parser.parse_args()
    try:
        for name in given.only or PARTS:
            write("chaos", PARTS[name](given.rounds), keep=True)
    finally:
        shutil.rmtree(WORK / "chaos", ignore_errors=True)


if __name__ == "__main__":
    main()
