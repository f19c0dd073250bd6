"""Callers that know nothing but KServe v2: raw gRPC messages, and JSON over HTTP by curl."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from trirank import RankClient, RankError, RankRequest
from trirank_loadtest.hostile import hostile_calls
from tritonclient.grpc import service_pb2, service_pb2_grpc

DTYPES = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(dtype, values):
    if dtype == "BYTES":
        raw = b"".join(len(v).to_bytes(4, "little") + v for v in values)
        return dtype, (1, len(values)), raw
    array = np.array(values, DTYPES[dtype])
    return dtype, (1, *array.shape), array.tobytes()


def ask(stub, leave_out=(), model="rank", **changes):
    tensors = {
        "USER_ID": tensor("INT64", [-1]),
        "ITEM_IDS": tensor("INT64", [1, 2, 3]),
        "TOP_K": tensor("INT32", [2]),
        "SCENARIO": tensor("BYTES", [b"home"]),
    } | changes
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, (dtype, shape, raw) in tensors.items():
        if name not in leave_out:
            message.inputs.add(name=name, datatype=dtype, shape=shape)
            message.raw_input_contents.append(raw)
    return stub.ModelInfer(message, timeout=10)


def ranked(reply):
    at = [output.name for output in reply.outputs].index("RANKED_IDS")
    return np.frombuffer(reply.raw_output_contents[at], np.int64).tolist()


def test_unpadded_requests_are_fine(stub):
    assert len(ranked(ask(stub))) == 2


INVALID = {
    "no candidates": {"ITEM_IDS": tensor("INT64", [])},
    "only padding": {"ITEM_IDS": tensor("INT64", [-1, -1])},
    "too many": {"ITEM_IDS": tensor("INT64", list(range(1025)))},
    "top_k 0": {"TOP_K": tensor("INT32", [0])},
    "top_k negative": {"TOP_K": tensor("INT32", [-1])},
    "top_k 2^31-1": {"TOP_K": tensor("INT32", [2**31 - 1])},
    "query not UTF-8": {"QUERY": tensor("BYTES", [b"\xff\xfe"])},
    "query of 3 KB": {"QUERY": tensor("BYTES", [b"x" * 3000])},
    "score NaN": {"RETRIEVAL_SCORES": tensor("FP32", [1, float("nan"), 0])},
    "score infinite": {"RETRIEVAL_SCORES": tensor("FP32", [1, float("inf"), 0])},
    "scores short": {"RETRIEVAL_SCORES": tensor("FP32", [1])},
    "scenario unknown": {"SCENARIO": tensor("BYTES", [b"nowhere"])},
    "scenario not UTF-8": {"SCENARIO": tensor("BYTES", [b"\xff"])},
    "timestamp negative": {"TIMESTAMP": tensor("INT64", [-7])},
    "behaviours without items": {"HISTORY_BEHAVIOURS": tensor("INT32", [1])},
    "behaviour unknown": {"HISTORY_IDS": tensor("INT64", [1]), "HISTORY_BEHAVIOURS": tensor("INT32", [9])},
    "history too long": {"HISTORY_IDS": tensor("INT64", list(range(1025)))},
    "an input left out": {"leave_out": ("ITEM_IDS",)},
    "a wrong type": {"ITEM_IDS": tensor("INT32", [1, 2])},
    "a wrong rank": {"ITEM_IDS": ("INT64", (1, 1, 3), np.zeros(3, np.int64).tobytes())},
    "a short buffer": {"ITEM_IDS": ("INT64", (1, 8), np.zeros(3, np.int64).tobytes())},
    "an unknown input": {"COLOUR": tensor("INT32", [1])},
    "two top_k": {"TOP_K": tensor("INT32", [1, 2])},
    "bytes cut off": {"QUERY": ("BYTES", (1, 1), b"\x10\x00\x00\x00ab")},
    "a batch of different sizes": {"TOP_K": ("INT32", (2, 1), np.ones(2, np.int32).tobytes())},
}


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID.keys())
def test_what_is_wrong_is_an_invalid_argument_and_the_next_request_is_answered(stub, changes):
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, **changes)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert caught.value.details()
    assert len(ranked(ask(stub))) == 2


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        (INVALID["too many"], "1 to 1024"),
        (INVALID["top_k 0"], "1 to 1024"),
        (INVALID["query of 3 KB"], "the limit is 2048"),
        (INVALID["history too long"], "the limit is 1024"),
        (INVALID["score NaN"], r"RETRIEVAL_SCORES[0, 1] is nan"),
    ],
)
def test_the_message_names_the_limit(stub, changes, limit):
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, **changes)
    assert limit in caught.value.details()


def test_an_unknown_model(stub):
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, model="rnak")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_batch_in_one_request(stub):
    reply = ask(
        stub,
        USER_ID=("INT64", (2, 1), np.array([-1, 1], np.int64).tobytes()),
        ITEM_IDS=("INT64", (2, 3), np.array([1, 2, 3, 4, 5, 6], np.int64).tobytes()),
        TOP_K=("INT32", (2, 1), np.array([1, 2], np.int32).tobytes()),
        SCENARIO=("BYTES", (2, 1), 2 * (b"\x04\x00\x00\x00home")),
    )
    shapes = {output.name: list(output.shape) for output in reply.outputs}
    assert shapes["RANKED_IDS"] == [2, 2]
    assert ranked(reply)[1] == -1


def test_a_thousand_hostile_requests_do_no_harm(stub):
    rng = np.random.default_rng(0)
    codes = set()
    for _ in range(1000):
        changes = {}
        for name, dtype in (
            ("ITEM_IDS", "INT64"),
            ("TOP_K", "INT32"),
            ("USER_ID", "INT64"),
            ("TIMESTAMP", "INT64"),
        ):
            if rng.random() < 0.5:
                info = np.iinfo(DTYPES[dtype])
                size = 1 if name != "ITEM_IDS" else int(rng.integers(0, 40))
                changes[name] = tensor(dtype, rng.choice([info.min, -1, 0, 1, 7, info.max], size))
        for name in ("QUERY", "SCENARIO"):
            if rng.random() < 0.4:
                changes[name] = tensor("BYTES", [bytes(rng.integers(0, 256, int(rng.integers(0, 50))).tolist())])
        if rng.random() < 0.3:
            raw = rng.bytes(4 * int(rng.integers(0, 8)))
            changes["RETRIEVAL_SCORES"] = ("FP32", (1, len(raw) // 4), raw)
        try:
            ask(stub, **changes)
            codes.add("OK")
        except grpc.RpcError as error:
            codes.add(error.code().name)
    assert codes == {"OK", "INVALID_ARGUMENT"}
    assert len(ranked(ask(stub))) == 2


def test_hostile_calls_of_any_model_harm_nobody_else(server):
    """A client that called a stage directly used to fail half of the others' requests: they share its batches."""
    requests = [RankRequest(item_ids=list(range(1, count))) for count in (3, 60, 200)]
    stop, harmed, sane = threading.Event(), [], [0]
    with RankClient(server.grpc, deadline_s=10, retry=None) as client:
        expected = [client.rank(request).item_ids.tolist() for request in requests]

        def go_on():
            while not stop.is_set():
                for request, ids in zip(requests, expected, strict=True):
                    try:
                        if client.rank(request).item_ids.tolist() != ids:
                            harmed.append("another answer")
                    except RankError as error:
                        harmed.append(str(error))
                    sane[0] += 1

        threads = [threading.Thread(target=go_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        found = {
            (model, http): hostile_calls(server.grpc, model, 150, over_http=http)
            for model in {"rank", "feedback", *server.served.stages}
            for http in (None, server.http)
        }
        stop.set()
        for thread in threads:
            thread.join()
    assert harmed == []
    assert sane[0] > 50
    for (model, http), (codes, broken) in found.items():
        assert codes["OK"] or model == "feedback", (model, http)  # some get through to where the work is done
        assert codes["INVALID_ARGUMENT"], (model, http)
        assert broken == []


def test_json_over_http_by_curl(server):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    body = {
        "inputs": [
            {"name": "USER_ID", "shape": [1, 1], "datatype": "INT64", "data": [-1]},
            {"name": "ITEM_IDS", "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 3]},
            {"name": "TOP_K", "shape": [1, 1], "datatype": "INT32", "data": [2]},
            {"name": "SCENARIO", "shape": [1, 1], "datatype": "BYTES", "data": ["search"]},
            {"name": "QUERY", "shape": [1, 1], "datatype": "BYTES", "data": ["red lamp"]},
        ]
    }
    url = f"http://{server.http}/v2/models/rank/infer"

    def post(body):
        command = ["curl", "-s", "-w", "\n%{http_code}", "--max-time", "10", "-d", json.dumps(body), url]
        answer, code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rsplit("\n", 1)
        return json.loads(answer), code

    answer, code = post(body)
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert code == "200"
    assert outputs["RANKED_IDS"]["shape"] == [1, 2]
    body["inputs"][2]["data"] = [0]
    answer, code = post(body)
    assert code == "400"
    assert "TOP_K is 0; it goes from 1 to 1024" in answer["error"]


def test_a_service_in_another_language(server):
    if shutil.which("node") is None:
        pytest.skip("no Node.js on this machine")
    example = Path(__file__).parent.parent.parent / "client" / "examples" / "rank.mjs"

    def run(*arguments):
        return subprocess.run(["node", example, server.http, *arguments], capture_output=True, text=True, timeout=60)

    done = run("red lamp", "1", "30", "60", "999999999")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[1] for line in lines} <= {"1", "30", "60"}
    assert [line[0] for line in lines] == [str(at + 1) for at in range(len(lines))]
    refused = run("x" * 3000, "1")
    # Triton writes the ensemble's name before a stage's message; where `rank` is one model there is none to write.
    assert re.search(r"400: (in ensemble 'rank', )?QUERY has 3000 bytes; the limit is 2048", refused.stderr)
