"""`trirank loadtest` drives a real server in an open loop, and holds it to what is promised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
from trirank import contract, packing
from trirank_loadtest.run import Load, run
from tritonclient.grpc import service_pb2, service_pb2_grpc


def started(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, env={**os.environ, **environment}, check=False
    )


def loadtest(*arguments):
    return started("-m", "trirank_build.cli", "loadtest", *map(str, arguments))


def test_one_command(world, tmp_path):
    """The release is served, loaded, and left: a table, a JSON, a page."""
    done = loadtest(
        world.release, "--seconds", 3, "--rate", 40, "--slo", "p99=4s,error_rate=5%", "--out", tmp_path / "out",
        "--workers", 2, "--mix", "drawn:search=0.5", "--deadline-s", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything that is promised was kept." in done.stdout
    found = json.loads((tmp_path / "out" / "loadtest.json").read_text())
    (measured,) = found["runs"]
    assert measured["requests"] > 60  # both workers' requests
    assert {"rank (home)", "rank (search)"} <= set(measured["kinds"])
    # Two Poisson processes of half the rate, not the same one twice.
    assert {stage["model"].partition("_")[0] for stage in measured["stages"]} == {"preprocess", "ranker", "rerank"}
    assert "Where is the time spent?" in (tmp_path / "out" / "loadtest.html").read_text()


def test_a_server_that_is_there(server, world, tmp_path):
    """Through grpcio, with feedback beside; a broken promise ends with 1, and so does what is worse than before."""
    asked = ["--server", server.grpc, "--requests", world.release / "requests.json", "--seconds", 3, "--rate", 40]
    asked += ["--through", "grpc", "--feedback", 0.5]
    done = loadtest(*asked, "--slo", "p50=0.001ms", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["passed"]
    assert "What is promised was not kept." in found["verdict"]
    assert found["runs"][0]["kinds"]["feedback"]["failed"] == 0
    assert found["runs"][0]["kinds"]["feedback"]["requests"] > 10
    for row in found["runs"][0]["timeline"]:  # a run of a server a hundred times as fast
        row["p50_ms"], row["p99_ms"] = 0.01, 0.02
    (tmp_path / "before.json").write_text(json.dumps(found))
    done = loadtest(*asked, "--slo", "p50=0.001ms", "--compare", tmp_path / "before.json", "--out", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "Worse than before: p50_ms, p99_ms." in done.stdout
    assert "Is it worse than before?" in (tmp_path / "out" / "loadtest.html").read_text()
    done = loadtest(*asked, "--slo", "p50=7ms", "--compare", tmp_path / "before.json")
    assert "compare runs of the same load" in done.stderr  # and no load was made


def test_the_highest_rate_that_holds(server, world):
    """What breaks a promise is found, and named."""
    done = loadtest(
        "--server", server.grpc, "--requests", world.release / "requests.json", "--seconds", 1, "--rate", 500,
        "--find-capacity", "--slo", "p95=25ms", "--repeats", 1, "--through", "grpc", "--json",
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    text = done.stdout[done.stdout.index("{") :]
    found = json.loads(text)["capacity"]
    held = [point["rate"] for point in found["points"] if point["kept"]]
    assert found["rate"] == max(held, default=0)
    assert re.search("gave way|wait for|takes longer|did not grow", found["gave_way"])


class Stalling(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers at once, but for one second in which nobody is answered."""

    def __init__(self):
        places = packing.places(contract.RESPONSE)
        contents = {"RANKED_IDS": np.array([7]), "SCORES": np.ones(1, np.float32), "REASONS": np.zeros(1, np.int32),
                    "STATUS": np.zeros(4, np.int32)}  # fmt: skip
        raw = packing.pack({places[name]: array.tobytes() for name, array in contents.items()})
        self.reply = service_pb2.ModelInferResponse()
        self.reply.outputs.add(name="PACKED_RESPONSE", datatype="UINT8", shape=[1, len(raw)])
        self.reply.raw_output_contents.append(raw)
        self.lock, self.first, self.stalled = threading.Lock(), None, False

    def ModelInfer(self, request, context):
        with self.lock:  # one at a time
            self.first = self.first or time.monotonic()
            if not self.stalled and time.monotonic() > self.first + 2:
                self.stalled = True
                time.sleep(1)
        return self.reply

    def ModelStatistics(self, request, context):
        return service_pb2.ModelStatisticsResponse()


def test_a_server_that_stalls_is_asked_all_the_same(world):
    """Coordinated omission: in a closed loop each stream would see one slow answer of a hundred, and p99 nothing; but
    of five seconds one was lost, and who was due in it waited."""
    server = grpc.server(futures.ThreadPoolExecutor(64))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Stalling(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    started_at = time.monotonic()
    try:
        found = run(
            Load([f"127.0.0.1:{port}"], world.release / "requests.json", 100, 5, through="grpc", deadline_s=5.0)
        )
    finally:
        server.stop(0)
    assert time.monotonic() - started_at < 5 + 2 * 5.0  # ends with its load, though requests had five seconds to end
    assert found.errors == {}
    assert found.offered == pytest.approx(100, rel=0.25)
    assert found.percentile(90.0) > 300  # a fifth of the requests waited up to a second, half of that on average
    assert found.percentile(99.0) > 700
    assert found.percentile(50.0) < found.percentile(99.0) / 3  # and the others did not
    stalled = max(found.timeline, key=lambda row: row["p50_ms"])
    assert stalled["due"] > 60


def test_locust_file_headless(world, server):
    done = started(
        "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--host", server.grpc, "--users", "2",
        "--spawn-rate", "2", "--run-time", "3s", "--only-summary",
        TRIRANK_REQUESTS=str(world.release / "requests.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank (home)" in done.stderr + done.stdout


def test_failures_fail_the_run(world):
    """Nobody listens: every call is a failure, counted by its kind."""
    done = started(
        "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--host", "127.0.0.1:9", "--users", "1",
        "--run-time", "3s", "--only-summary", TRIRANK_REQUESTS=str(world.release / "requests.json"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Unavailable" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], "rate is 0; it is requests a second, above 0"),
        (["--slo", "p99=soon"], "SLO 'p99=soon': 'soon' is no time above 0 with a unit"),
        (["--find-capacity"], "--find-capacity needs to know what shall hold"),
        (["--find-capacity", "--slo", "p99=5ms", "--shape", "spike"], "--shape spike has many"),
        (["--mix", "stirred"], "mix 'stirred' is none"),
        (["--server", "nowhere"], "server 'nowhere' is no HOST:PORT"),
        (["--server", "127.0.0.1:9"], "127.0.0.1:9 does not answer"),
        (["--workers", "0"], "workers is 0"),
        (["--slo", "p99=2s"], "give requests more time than you promise"),
        (["--compare", "nothing.json"], "nothing.json is no result of `trirank loadtest`"),
    ],
)
def test_bad_loads_are_one_line(world, arguments, words):
    done = loadtest(world.release, "--seconds", 1, *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_empty_recording(world, tmp_path):
    (tmp_path / "requests.json").write_text("[]")
    done = loadtest(world.release, "--requests", tmp_path / "requests.json")
    assert done.returncode == 2
    assert "requests.json is empty; record requests with `trirank serve --log-requests FOLDER`" in done.stderr


def test_no_release(tmp_path):
    done = loadtest(tmp_path)
    assert done.returncode == 2
    assert "holds no recorded requests" in done.stderr
