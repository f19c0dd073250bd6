"""The servers of ``peers/``: how each is started, in which environment, and what is sent to it.

    python benchmarks/peer_servers.py install [NAME …]

makes the environments, each below work/peers.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import load
import psutil
from results import ROOT
from trirank import RankRequest
from trirank._codec import packed_request
from tritonclient.grpc import service_pb2

FOLDER, ENVIRONMENTS = ROOT / "benchmarks" / "peers", ROOT / "work" / "peers"
START_S = 90.0
_HTTP = ("content-type: application/octet-stream",)


@dataclass(frozen=True)
class Peer:
    """A server that is not ours.

    Attributes:
        environment: folder below work/peers; empty: this one.
        settings: environment variables to choose among, by measurement.
        wire: how a request comes: ``grpc``, ``http``, ``json`` or ``kserve``.
    """

    title: str
    environment: str
    script: str
    settings: tuple[dict[str, str], ...]
    wire: str = "http"

    def python(self) -> Path:
        """The interpreter that runs it."""
        return ENVIRONMENTS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def there(self) -> bool:
        """Whether its environment has been made."""
        return self.python().is_file()

    def target(self, address: str, requests: list[RankRequest]) -> load.Target:
        """What is sent to it."""
        packed = [packed_request(request)[0] for request in requests]
        if self.wire == "grpc":
            return load.Target(address, [load.frame(body) for body in packed], "/trirank.Ranker/Rank")
        if self.wire == "kserve":
            return load.Target(address, [load.frame(_one_tensor(body)) for body in packed])
        if self.wire == "json":
            texts = [base64.b64encode(body).decode() for body in packed]
            as_list = self.environment == "bentoml"
            bodies = [json.dumps({"packed": [text] if as_list else text}).encode() for text in texts]
            return load.Target(address, bodies, "/rank", ("content-type: application/json",), http1=True)
        return load.Target(address, packed, "/rank", _HTTP, http1=True)


def answer_of(target: load.Target, wire: str) -> bytes:
    """The packed answer to the first body, for the check that all servers answer the same."""
    if target.http1:
        headers = dict(header.split(": ") for header in target.headers)
        asked = urllib.request.Request(target.url, target.bodies[0], headers)
        with urllib.request.urlopen(asked, timeout=30) as reply:
            said = reply.read()
        return base64.b64decode(json.loads(said)[0]) if said[:1] == b"[" else said
    with grpc.insecure_channel(target.address) as channel:
        call = channel.unary_unary(target.path, request_serializer=None, response_deserializer=None)
        said = call(target.bodies[0][5:], timeout=30)
    if wire == "grpc":
        return said
    (content,) = service_pb2.ModelInferResponse.FromString(said).raw_output_contents
    return content[4:] if wire == "kserve" else content


def _one_tensor(body: bytes) -> bytes:
    message = service_pb2.ModelInferRequest(model_name="rank")
    message.inputs.add(name="REQUEST", datatype="BYTES", shape=(1, 1))
    message.raw_input_contents.append(len(body).to_bytes(4, "little") + body)
    return bytes(message.SerializeToString())


def _grid(workers: tuple[int, ...], batches: tuple[int, ...], **more: str) -> tuple[dict[str, str], ...]:
    return tuple(
        {"PEER_WORKERS": str(count), "PEER_MAX_BATCH": str(batch), **more} for count in workers for batch in batches
    )


CORES = os.cpu_count() or 1
_COUNTS = tuple(dict.fromkeys((1, CORES)))
_OWN_BATCHES = (
    *_grid(_COUNTS, (0, 32)),
    *_grid(_COUNTS[-1:], (32,), PEER_SWITCH="0.0002"),
    *_grid(_COUNTS[-1:], (32,), PEER_PIN="1"),  # as our instances are
)
PEERS = {
    "grpc_aio": Peer("bare grpc.aio", "", "grpc_aio.py", _OWN_BATCHES, "grpc"),
    "fastapi": Peer("FastAPI, uvicorn", "fastapi", "fastapi_uvicorn.py", _OWN_BATCHES),
    "pytriton": Peer("PyTriton", "pytriton", "pytriton_server.py", _grid(_COUNTS, (32,)), "kserve"),
    "litserve": Peer(
        "LitServe", "litserve", "litserve_server.py",
        (*_grid(_COUNTS, (1,)), *_grid(_COUNTS, (32,), PEER_BATCH_TIMEOUT="0.0005"),
         *_grid(_COUNTS[-1:], (32,), PEER_BATCH_TIMEOUT="0.005"), *_grid(_COUNTS[-1:], (1,), PEER_API_SERVERS="2")),
        "json",
    ),
    "bentoml": Peer("BentoML, adaptive batching", "bentoml", "bentoml_server.py", _grid(_COUNTS, (1, 32)), "json"),
    "bentoml_asgi": Peer(
        "BentoML, mounted ASGI", "bentoml", "bentoml_server.py", _grid(_COUNTS, (0, 32), PEER_WAY="asgi")
    ),
    "ray": Peer("Ray Serve", "ray", "ray_serve.py", _grid(_COUNTS, (32,))),
}  # fmt: skip
"""In the order of the tables."""
EVERYWHERE = (
    "numpy==1.26.4", "numba==0.68.1", "onnxruntime==1.32.0", "openvino==2026.4.1", "tokenizers==0.23.3",
    "grpcio==1.85.3",
)  # fmt: skip
REQUIREMENTS = {
    "fastapi": ("fastapi==0.165.0", "uvicorn[standard]==0.54.0", "uvloop==0.23.0", "httptools==0.9.0"),
    "pytriton": ("nvidia-pytriton==0.7.0",),
    "litserve": ("litserve==0.2.19", "uvloop==0.23.0", "httptools==0.9.0"),
    "bentoml": ("bentoml==1.4.40", "uvloop==0.23.0", "httptools==0.9.0"),
    "ray": ("ray[serve]==2.60.0",),
}
"""What each peer's environment holds beside trirank's own runtime, which is the same in all of them."""
INTERPRETERS = {"pytriton": "/usr/bin/python3"}
"""PyTriton's stub brings the core of an early CPython 3.11 along, which the library of 3.11.7 does not fit
(multiprocessing asks a lock for its _recursion_count); Debian 12's 3.11.2 does."""


@contextmanager
def served(peer: Peer, release: Path, settings: dict[str, str], request: RankRequest) -> Iterator[tuple[str, int]]:
    """Address and process id of a peer that answers.

    Raises:
        RuntimeError: it does not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = peer.python()
    command = [str(python), peer.script, str(port)]
    if peer.environment == "bentoml":
        command = [str(python.with_name("bentoml")), "serve", "bentoml_server:Ranker", "--host", "127.0.0.1"]
        command += ["--port", str(port)]
    environment = {
        **os.environ, **settings, "PEER_RELEASE": str(release), "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(FOLDER), "BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    slots = tempfile.mkdtemp(prefix="trirank-peer-")
    environment["PEER_SLOTS"] = slots
    log = ENVIRONMENTS / f"{peer.environment or 'own'}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as words:
        process = subprocess.Popen(
            command, cwd=FOLDER, env=environment, stdout=words, stderr=words, start_new_session=True
        )
    family: list[psutil.Process] = []
    try:
        _wait(process, peer, peer.target(f"127.0.0.1:{port}", [request]), log)
        family = psutil.Process(process.pid).children(recursive=True)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        later = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs({*family, *later}, timeout=10)
        for child in alive:  # some of them have sessions of their own
            child.kill()
        shutil.rmtree(slots, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], peer: Peer, target: load.Target, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            answer_of(target, peer.wire)  # h2load would take an error of gRPC's for an answer
            load.closed_loop(target, 1, 0.3, [])
            # Some load their stages at their first call, each worker by itself.
            if load.closed_loop(target, 8, 1.0, []).latencies_ms.max() < 500:
                return
            if time.monotonic() > deadline:
                raise RuntimeError("it is slow to the end")
        except (RuntimeError, OSError, grpc.RpcError) as error:  # noqa: PERF203  # not ready yet
            if process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{target.url} does not answer ({error}): {words}") from error
            time.sleep(0.5)


def install(names: list[str]) -> None:
    """Make environments anew."""
    for name in names or list(REQUIREMENTS):
        folder = ENVIRONMENTS / name
        subprocess.run([INTERPRETERS.get(name, sys.executable), "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *EVERYWHERE, *REQUIREMENTS[name], "-e", f"{ROOT}[runtime,openvino]"], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] != ["install"]:
        sys.exit(__doc__)
    install(sys.argv[2:])
