"""Real processes are killed, stopped and starved; `make chaos`, some minutes. What takes seconds is in tests/e2e."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import redis
from faults import Clock, MemoryLimit, load, served, wait_until, watch
from stores import SERVER, free_port, start_redis
from trirank import FeedbackEvent, RankClient, RankError
from trirank_build.repository.release import recorded_requests
from trirank_build.repository.store import promote

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module", params=["ensemble", "single"])
def release(request, world, single):
    return single if request.param == "single" else world.release


@pytest.fixture(scope="module")
def running(release, tmp_path_factory):
    with served(release, tmp_path_factory.mktemp("served"), "--users", "none") as found:
        yield found


def answered(running):
    with RankClient(running.told("grpc"), deadline_s=10) as client:
        return [client.rank(request).item_ids.tolist() for request in recorded_requests(running.release)]


@pytest.mark.parametrize("stage", ["preprocess", "ranker", "rerank"])
def test_a_killed_stub(running, stage):
    before = answered(running)
    seen = watch(running, lambda: running.stub(stage).kill())
    assert 0 < seen.recovered_s < 10
    assert "had died; started anew in" in seen.log
    assert answered(running) == before


def test_a_stub_that_hangs(running):
    seen = watch(running, lambda: running.stub("ranker").suspend())
    assert "3 recorded requests in a row were not answered" in seen.log
    assert seen.recovered_s < 40
    assert answered(running)


def test_a_memory_limit_that_is_reached(release, tmp_path):
    """The kernel kills a process of the container, whichever is the largest."""
    with ExitStack() as stack:
        try:
            limit = stack.enter_context(MemoryLimit())
        except OSError as error:
            pytest.skip(f"no control group can be made here ({error})")
        with served(release, tmp_path, "--users", "none", prefix=limit.prefix) as running:
            before = answered(running)
            seen = watch(running, lambda: limit.reach(running))
            assert limit.kills()
            assert re.search("had died; started anew in|Triton was killed by signal 9", seen.log)
            assert seen.recovered_s < 20
            assert answered(running) == before


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_a_clock_that_jumps(release, tmp_path):
    """An hour on, a day back: nobody waits longer, nothing is taken for hung, and feedback is stored once."""
    clock, users = Clock(tmp_path), f"sqlite:{tmp_path / 'users.sqlite'}"
    with served(release, tmp_path / "served", "--users", users, environment=clock.environment) as running:
        before = answered(running)
        with RankClient(running.told("grpc"), deadline_s=10, retry=None) as caller:
            event = FeedbackEvent(user_id=3, item_id=1, kind="click", timestamp=1_772_000_000, event_id="once")
            assert caller.feedback([event]).stored == 1
            for seconds in (3_600, -86_400, 0):
                seen = watch(running, partial(clock.set, seconds))
                assert clock.now() == pytest.approx(time.time() + seconds, abs=5)
                assert seen.failed == 0
                assert seen.answered > 100
                assert running.told("state") == "ready"
                assert caller.feedback([event]).stored == 0
        # A stage that dies while the clock is set back comes back, too.
        clock.set(-86_400)
        assert watch(running, lambda: running.stub("rerank").kill()).recovered_s < 10
        assert {each.environ().get("LD_PRELOAD") for each in running.stubs()} == {clock.environment["LD_PRELOAD"]}
        assert answered(running) == before


def test_a_killed_server(running):
    seen = watch(running, lambda: running.server().kill())
    assert "Triton was killed by signal 9" in seen.log
    assert seen.recovered_s < 20


def test_a_server_that_hangs(running):
    """All of it, so that nobody answers what it counts either."""
    seen = watch(running, lambda: running.server().suspend())
    assert "3 recorded requests in a row were not answered" in seen.log
    assert 5 < seen.recovered_s < 60
    assert answered(running)


def test_a_stub_that_dies_again_and_again(running):
    """With pauses, so that the others are not starved by its starting; and the server lives."""
    pid = running.server().pid
    for _ in range(4):
        running.stub("rerank").kill()
        wait_until(lambda: running.told("state") == "recovering", running.process, running.log)
        wait_until(lambda: running.told("state") == "ready", running.process, running.log)
    assert running.server().pid == pid
    assert answered(running)


def test_shared_memory_that_is_full(release, tmp_path):
    """What stubs need they have from the start; a stub that dies then cannot come back until there is room."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no /dev/shm of its own can be mounted here")
    with served(release, tmp_path, "--users", "none", shm_mib=256) as running:
        fillers = []
        assert watch(running, lambda: fillers.append(running.fill_shm())).failed == 0
        running.stub("ranker").kill()
        time.sleep(10)
        assert running.told("state") == "recovering"
        fillers[0].unlink()
        wait_until(lambda: running.told("state") == "ready", running.process, running.log)
        assert answered(running)


def test_a_thousand_connections_half_open_ones_and_slow_readers(running):
    host, port = running.told("grpc").split(":")
    _, http = running.told("http").split(":")

    def crowd(stack):
        for number in range(1000):
            to = port if number % 2 else http
            own = stack.enter_context(socket.create_connection((host, int(to)), timeout=5))
            if number % 4 == 0:  # half a request, and then nothing
                own.sendall(b"POST /v2/models/rank/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
            elif number % 4 == 1:  # half a greeting
                own.sendall(b"PRI * HTTP/2.0\r\n")
            elif number % 4 == 2:  # asks, and reads nothing
                own.sendall(b"GET /v2/models/rank/config HTTP/1.1\r\n\r\n" * 20)

    with ExitStack() as stack:
        seen = watch(running, lambda: crowd(stack))
        assert seen.failed == 0
    assert answered(running)


def test_the_end_under_load(release, tmp_path):
    """Who asked before SIGTERM is answered, but for one or two; it ends within the time that Kubernetes gives."""
    with served(release, tmp_path, "--users", "none") as running:
        with load(running, 100.0) as calls:
            time.sleep(2)
            asked = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(40)
            took = time.monotonic() - asked
        assert running.process.returncode == 0
        before = [call for call in calls if call.began < asked]
        assert len(before) > 100
        # One that is between two stages at that moment finds the next one closed (docs/serving.md has how many).
        assert sum(bool(call.error) for call in before) <= 2
        assert {call.error for call in calls} <= {"", "Unavailable"}
        assert took < 30


def test_a_release_that_is_damaged_while_it_is_served(world, tmp_path):
    folder = tmp_path / "releases"
    own = shutil.copytree(world.release, folder / world.release.name)
    link = promote(own)
    with served(link, tmp_path / "served", "--users", "none") as running:
        running.release = world.release
        before = answered(running)

        def damage():
            for file in own.rglob("*.npy"):
                file.unlink()

        assert watch(running, damage).failed == 0  # what is open stays as it was
        assert answered(running) == before


def test_a_promotion_in_the_middle_of_an_overload(world, single, tmp_path):
    folder = tmp_path / "releases"
    first, second = (shutil.copytree(each, folder / each.name) for each in (world.release, single))
    link = promote(first)
    with served(link, tmp_path / "served", "--users", "none") as running:
        running.release = first
        with load(running, 3_000.0) as calls:
            time.sleep(2)
            promote(second)
            wait_until(lambda: f"serving {second.name} now" in running.log.read_text(), running.process, running.log)
            time.sleep(1)
        assert {call.error for call in calls} <= {"", "Overloaded", "DeadlineExceeded"}
        assert sum(not call.error for call in calls) > 100
        assert answered(running)


@contextmanager
def with_redis(release, folder):
    folder.mkdir()
    port = free_port()
    processes = [start_redis(folder, port)]
    try:
        with served(release, folder / "served", "--users", f"redis://127.0.0.1:{port}/0") as running:
            yield running, processes, lambda: processes.append(start_redis(folder, port)), redis.Redis(port=port)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


@pytest.mark.skipif(SERVER is None, reason="no redis-server here")
def test_a_store_that_is_killed_slow_or_read_only(world, tmp_path):
    with with_redis(world.release, tmp_path / "redis") as (running, processes, again, client):
        with RankClient(running.told("grpc"), deadline_s=10, retry=None) as caller:

            def tell(number):
                event = FeedbackEvent(
                    user_id=3, item_id=1, kind="click", timestamp=1_772_000_000, event_id=f"e{number}"
                )
                return caller.feedback([event])

            assert tell(0).stored == 1
            assert watch(running, lambda: processes[-1].send_signal(signal.SIGSTOP)).failed == 0
            processes[-1].send_signal(signal.SIGCONT)
            assert watch(running, lambda: client.execute_command("REPLICAOF", "127.0.0.1", "1")).failed == 0
            with pytest.raises(RankError):
                tell(1)
            client.execute_command("REPLICAOF", "NO", "ONE")
            assert watch(running, lambda: (processes[-1].kill(), processes[-1].wait())).failed == 0
            again()
            wait_until(lambda: stored(tell, 2), running.process, running.log)
            kept = {fields[b"e"] for _, fields in client.xrange("trirank:events")}
            assert {b"e0", b"e2"} <= kept


def stored(tell, number):
    try:
        return tell(number).stored >= 0
    except RankError:
        return False


def test_a_disk_that_is_full(world, tmp_path):
    """Feedback is refused, ranking goes on, and feedback is taken again once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system of its own can be mounted here ({mounted.stderr.decode().strip()})")
    try:
        with served(world.release, tmp_path / "served", "--users", f"sqlite:{small}/users.sqlite") as running:
            filler = small / "filler"
            with RankClient(running.told("grpc"), deadline_s=10, retry=None) as caller:

                def tell(number):
                    events = [FeedbackEvent(user_id=3, item_id=1, kind="click", timestamp=1_772_000_000,
                                            event_id=f"{number}-{at}") for at in range(100)]  # fmt: skip
                    return caller.feedback(events)

                assert tell(0).stored == 100

                def fill():
                    with filler.open("wb") as stream:
                        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(small).free)

                assert watch(running, fill).failed == 0
                assert not all(stored(tell, number) for number in range(1, 50))
                filler.unlink()
                wait_until(lambda: stored(tell, 99), running.process, running.log)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
