"""The doctor visits real servers: sound ones, and one of every live defect."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psutil
import pytest
from support import bare_server
from trirank import RankClient, RankRequest, ServerError
from trirank_build.doctor.examine import examine_server
from trirank_build.doctor.repository import Surroundings
from trirank_build.engines.machine import Machine
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.server import TritonServer
from tritonclient.grpc import service_pb2, service_pb2_grpc

AROUND = Surroundings(cores=4, machine=Machine((), None, None), shared_memory=1 << 30)
CONFIG = (
    'backend: "python" max_batch_size: 8 input {{ name: "X" data_type: TYPE_FP32 dims: -1 }}'
    'output {{ name: "Y" data_type: TYPE_FP32 dims: -1 }} instance_group {{ kind: KIND_CPU }}'
    "dynamic_batching {{ default_queue_policy {{ default_timeout_microseconds: 9000000 }} }} {more}"
)
MODEL = """
import time
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def {initialize}
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            {work}
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x)]))
        return answers
"""
MODELS = {
    "ok": ("initialize(self, args): pass", "pass"),
    "broken": ("initialize(self, args): raise RuntimeError('no weights')", "pass"),
    "varied": ("initialize(self, args): pass", "time.sleep(0.003)"),
    "flaky": ("initialize(self, args): pass", "assert x.flat[0] < 1"),
}


def found(address, requests=(), probe=True):
    return {finding.rule.id: finding for finding in examine_server(address, list(requests), AROUND, probe)}


def infer(stub, model, values):
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="X", datatype="FP32", shape=[1, len(values)])
    request.raw_input_contents.append(np.asarray(values, np.float32).tobytes())
    try:
        stub.ModelInfer(request, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return None


@pytest.mark.parametrize("swappable", [False, True])
def test_nothing_is_wrong_with_ours(world, swappable):
    with TritonServer(world.release, swappable=swappable) as server:
        server.wait_ready()
        own = found(server.grpc, recorded_requests(world.release))
        assert set(own) == {"LIVE08"}  # of Triton's version
        assert "CVE-2025-23310" in own["LIVE08"].reason
        assert "through http among others" in own["LIVE08"].reason
        assert set(found(server.grpc)) == {"LIVE08"}


def test_a_stub_that_died_while_health_says_ready(world, server):
    """It is an error and no hang, the doctor finds it, and a client with another server goes round it. All in one, for
    Triton takes ten seconds to notice."""
    with TritonServer(world.release) as broken:
        broken.wait_ready()
        stubs = psutil.Process(broken.pid).children(recursive=True)
        (rerank,) = [stub for stub in stubs if any("rerank" in part for part in stub.cmdline())]
        rerank.kill()
        with RankClient(broken.grpc, deadline_s=30) as client:
            with pytest.raises(ServerError, match="Stub process") as caught:
                client.rank(RankRequest(item_ids=[1]))
            assert client.ready()
        assert caught.value.elapsed_s < 15
        findings = found(broken.grpc)
        assert set(findings) == {"LIVE03", "LIVE08"}
        assert "health says ready, an inference INTERNAL" in findings["LIVE03"].reason
        with RankClient([broken.grpc, server.grpc], deadline_s=10, balancing="round_robin") as client:
            assert all(len(client.rank(RankRequest(item_ids=[1, 2, 3]))) > 0 for _ in range(4))


WITHOUT_CODES = """

import triton_python_backend_utils as pb_utils


def plain(answer):
    if not answer.has_error():
        return answer
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(answer.error().message()))
"""


def test_a_bad_request_with_the_wrong_code(world, tmp_path):
    release = shutil.copytree(world.release, tmp_path / "release")
    model = release / "models" / "preprocess" / "1" / "model.py"
    own = "return self.stage.execute(requests)"
    assert own in model.read_text()
    code = model.read_text().replace(own, "return [plain(answer) for answer in self.stage.execute(requests)]")
    model.write_text(code + WITHOUT_CODES)
    with TritonServer(release) as server:
        server.wait_ready()
        findings = found(server.grpc)
        assert set(findings) == {"LIVE04", "LIVE08"}
        assert "a scenario that there is not was answered with INTERNAL" in findings["LIVE04"].reason


def test_defects_of_somebody_elses_server(tmp_path):
    for name, (initialize, work) in MODELS.items():
        version = tmp_path / "models" / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL.format(initialize=initialize, work=work))
        (version.parent / "config.pbtxt").write_text(CONFIG.format(more=""))
    with bare_server(tmp_path / "models", tmp_path, "--model-control-mode=explicit", "--load-model=*") as address:
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with ThreadPoolExecutor(16) as pool:
                codes = list(pool.map(lambda size: infer(stub, "varied", [0] * size), range(1, 321)))
            assert set(codes) == {None}
            assert len({infer(stub, "flaky", [at % 2]) for at in range(120)}) == 2
        findings = found(address)
        assert {rule for rule in findings if rule.startswith("LIVE")} == {
            "LIVE01",
            "LIVE02",
            "LIVE05",
            "LIVE06",
            "LIVE07",
            "LIVE08",
        }
        assert "through http, model-repository, shared-memory among" in findings["LIVE08"].reason
        assert findings["LIVE02"].where == "broken"
        assert findings["LIVE06"].where == "varied"
        assert findings["LIVE07"].where == "flaky"
        assert findings["BATCH02"].reason == "X may have any length, without allow_ragged_batch"
        assert "LIVE03" not in found(address, probe=False)
