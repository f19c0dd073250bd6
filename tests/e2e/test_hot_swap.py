"""A running server goes from one release to the next: nothing fails, nothing mixes, and a bad one changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.client import HTTPConnection

import grpc
import numpy as np
import pytest
from trirank import RankClient, RankError
from trirank_build.data.dataset import Dataset
from trirank_build.errors import ServeError
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import MANIFEST, load_manifest, recorded_requests
from trirank_build.repository.reports import export_run
from trirank_build.repository.store import promote
from trirank_build.serving.server import TritonServer
from trirank_build.training.trainer import train
from tritonclient.grpc import service_pb2, service_pb2_grpc

STAGES = ("rank", "preprocess", "ranker", "rerank")


@pytest.fixture(scope="module")
def others(world, recipe, tmp_path_factory):
    """A release of the same shapes, whose vocabulary and weights are others: features of the one mean nothing to the
    ranker of the other, and nothing but the scores would show it. One of each pipeline."""
    folder = tmp_path_factory.mktemp("other")
    dataset = Dataset.load(world.data)
    features = recipe.features.model_copy(update={"vocabulary": 250})
    training = recipe.training.model_copy(update={"epochs": 1})
    changes = {"features": features, "training": training, "seed": 99}
    run = train(recipe.model_copy(update=changes), dataset, folder / "run")
    export_run(run, folder / "r.onnx")
    return {
        pipeline: assemble(
            run, dataset, folder / "r.onnx", folder / "releases", engine="onnxruntime", pipeline=pipeline
        )
        for pipeline in ("ensemble", "single")
    }


@pytest.fixture(scope="module")
def other(others):
    return others["ensemble"]


def answers(address, release):
    """Item → score of each recorded request, without company."""
    with RankClient(address, deadline_s=10) as client:
        return [
            dict(zip(a.item_ids.tolist(), a.scores.tolist(), strict=True))
            for a in map(client.rank, requests_of(release))
        ]


def requests_of(release):
    return recorded_requests(release)[:8]


def same(answer, expected):
    found = dict(zip(answer.item_ids.tolist(), answer.scores.tolist(), strict=True))
    return found.keys() == expected.keys() and all(abs(found[key] - expected[key]) < 1e-4 for key in found)


def test_swaps_under_load(world, single, others):
    """Between all kinds of pipelines: each release is of other weights than the one before it."""
    requests = requests_of(world.release)
    failed, mixed, seen, stop = [], [], [], threading.Event()
    with TritonServer(world.release, swappable=True) as server:
        server.wait_ready()
        expected = {"world": answers(server.grpc, world.release)}
        server.swap(others["ensemble"])
        assert server.release == others["ensemble"].resolve()
        expected["other"] = answers(server.grpc, world.release)
        for one, two in zip(*expected.values(), strict=True):
            assert max(abs(one[key] - two[key]) for key in one.keys() & two.keys()) > 0.01

        def load():
            with RankClient(server.grpc, deadline_s=10) as client:
                for at in range(10**9):
                    if stop.is_set():
                        return
                    number = at % len(requests)
                    try:
                        answer = client.rank(requests[number])
                    except RankError as error:
                        failed.append(error)
                        continue
                    of = [name for name in expected if same(answer, expected[name][number])]
                    (seen if len(of) == 1 else mixed).append(of[0] if of else answer)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for name, release, models in (
                ("world", single, ()), ("other", others["single"], ()), ("world", world.release, STAGES),
                ("other", others["ensemble"], STAGES),
            ):  # fmt: skip
                server.swap(release)
                seen.clear()
                end = time.monotonic() + 10
                while len(seen) < 20:
                    assert time.monotonic() < end
                    time.sleep(0.01)
                assert set(seen[-4:]) == {name}
                index = stub(server).RepositoryIndex(*controlled(server)).models
                loaded = {model.name for model in index if model.state == "READY"}
                assert loaded == {"rank", *(f"{model}_{release.name}" for model in models)}
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failed == []
        assert mixed == []


def test_a_single_release_that_cannot_be_served_changes_nothing(world, single, others, tmp_path):
    with TritonServer(single, swappable=True) as server:
        server.wait_ready()
        before = answers(server.grpc, world.release)
        for name, harm, words in (
            ("a" * 12, lambda r: (r / "models" / "rank" / "1" / "model.onnx").write_bytes(b"rubbish"),
             "cannot be loaded"),
            ("b" * 12, lambda r: (r / "requests.json").write_text('[{"item_ids": [1], "scenario": "none"}]'),
             "a recorded request"),
        ):  # fmt: skip
            bad = shutil.copytree(others["single"], tmp_path / name)
            (bad / MANIFEST).write_text(json.dumps(load_manifest(bad) | {"release": name}))
            harm(bad)
            with pytest.raises(ServeError, match=words):
                server.swap(bad)
            assert answers(server.grpc, world.release) == before
            assert health(server) == 200
        server.swap(others["single"])
        assert answers(server.grpc, world.release) != before
        # Triton has one counter for equal labels, and takes it away with whichever model goes first.
        time.sleep(1.1)
        answers(server.grpc, world.release)
        with closing(HTTPConnection(server.metrics, timeout=10)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        told = [line for line in text.splitlines() if line.startswith("trirank_stage_seconds_total{")]
        own = [line for line in told if f'release="{others["single"].name}"' in line]
        assert len(own) >= 3  # each stage
        assert all(float(line.rsplit(" ", 1)[1]) > 0 for line in own)


def health(server):
    """What a load balancer gets to know."""
    with closing(HTTPConnection(server.http, timeout=10)) as connection:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status


def stub(server):
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.grpc))


def controlled(server):
    return service_pb2.RepositoryIndexRequest(), 10, server._control._metadata


@pytest.fixture(scope="module")
def swappable(world):
    with TritonServer(world.release, swappable=True) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: (r / "features" / "catalogue" / "fields.npy").write_bytes(b"rubbish"), "fields.npy cannot be read"),
        (lambda r: (r / "models" / "ranker" / "1" / "model.onnx").write_bytes(b"rubbish"), "cannot be loaded"),
        (lambda r: (r / MANIFEST).write_text(json.dumps(load_manifest(r) | {"contract": 99})), "of contract 99"),
        (lambda r: (r / "requests.json").write_text('[{"item_ids": [1], "scenario": "none"}]'), "a recorded request"),
    ],
)  # fmt: skip
def test_a_release_that_cannot_be_served_changes_nothing(world, swappable, tmp_path, harm, words):
    bad = shutil.copytree(world.release, tmp_path / "bad")
    (bad / MANIFEST).write_text(json.dumps(load_manifest(bad) | {"release": "b" * 12}))
    harm(bad)
    before = answers(swappable.grpc, world.release)
    with pytest.raises(ServeError, match=words):
        swappable.swap(bad)
    assert swappable.release == world.release.resolve()
    assert answers(swappable.grpc, world.release) == before
    index = stub(swappable).RepositoryIndex(*controlled(swappable)).models
    assert {model.name for model in index if model.state == "READY" and "b" * 12 in model.name} == set()
    assert health(swappable) == 200  # or a load balancer drops every replica that follows the link


def test_nobody_else_may_load_models(swappable):
    calls = stub(swappable)
    with pytest.raises(grpc.RpcError) as caught:
        calls.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="rank"), timeout=10)
    assert "triton-grpc-protocol-trirank-control" in caught.value.details()
    with RankClient(swappable.grpc, deadline_s=10) as client:
        assert client.ready()


def test_a_server_for_one_release(server, other):
    with pytest.raises(ServeError, match="swappable=True"):
        server.swap(other)
    with pytest.raises(grpc.RpcError, match="not allowed"):
        stub(server).RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="rank"), timeout=10)


def test_the_command_follows_the_link(world, other, tmp_path):
    folder, addresses = tmp_path / "releases", tmp_path / "addresses.json"
    first, second = (shutil.copytree(release, folder / release.name) for release in (world.release, other))
    link = promote(first)
    command = [sys.executable, "-m", "trirank_build.cli", "serve", str(link), "--addresses", str(addresses)]
    said = tmp_path / "said"
    with said.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            wait_for(lambda: addresses.is_file(), process)
            address = json.loads(addresses.read_text())["grpc"]
            before = answers(address, first)
            promote(second)
            wait_for(lambda: f"serving {second.name} now" in said.read_text(), process)
            assert answers(address, first) != before
            link.unlink()
            link.symlink_to("nowhere")  # what cannot be served is told, and changes nothing
            wait_for(lambda: "nowhere is no release" in said.read_text(), process)
            assert answers(address, first) != before
            harmed = shutil.copytree(first, folder / "harmed")
            (harmed / "requests.json").unlink()
            link.unlink()
            link.symlink_to("harmed")  # nor does one that has lost a file end the command
            wait_for(lambda: "requests.json is missing" in said.read_text(), process)
            assert answers(address, first) != before
            link.unlink()
            promote(first)
            wait_for(lambda: np.allclose(flat(answers(address, first)), flat(before), atol=1e-4), process)
            wait_for(lambda: f"serving {first.name} now" in said.read_text(), process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert process.returncode == 0, said.read_text()


def flat(answered):
    return [score for each in answered for _, score in sorted(each.items())]


def wait_for(condition, process, timeout_s=100):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_a_fallback_scores_where_the_runtime_cannot(world, trained, policies, server, tmp_path, capfd):
    dataset = Dataset.load(world.data)
    made = assemble(trained, dataset, world.onnx, tmp_path, runtime="onnxruntime", policies=policies)
    with TritonServer(made, fallback="onnxruntime", stores=world.stores) as fallen_back:
        fallen_back.wait_ready()
        assert answers(fallen_back.grpc, world.release) == answers(server.grpc, world.release)
    assert "no backend onnxruntime" in capfd.readouterr().err
