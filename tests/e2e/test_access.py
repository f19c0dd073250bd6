"""Who may ask a server what: certificates, tokens, and Triton's own interfaces."""

from __future__ import annotations

import datetime
import json
import os
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import trustme
from trirank import FeedbackEvent, NotAllowed, RankClient, RankRequest, Tls, Unavailable
from trirank_build.doctor.live import Caller, ask
from trirank_build.errors import ServeError
from trirank_build.serving.access import Access, Certificates, add_token, remove_token
from trirank_build.serving.server import TritonServer
from tritonclient.grpc import InferInput, model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

REQUEST = RankRequest(item_ids=[1, 2, 3], user_id=3)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def pem(authority, tmp_path_factory):
    """Files of a server and of a caller, and of whom they trust."""
    folder = tmp_path_factory.mktemp("pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, subject in (("server", "rank.shop.example"), ("caller", "search@shop.example")):
        made = authority.issue_cert(subject)
        made.private_key_pem.write_to_path(folder / f"{name}.key")
        for number, part in enumerate(made.cert_chain_pems):
            part.write_to_path(folder / f"{name}.pem", append=number > 0)
    return folder


@pytest.fixture(scope="module")
def guarded(world, pem, tmp_path_factory):
    """A server with everything closed, and a caller's token."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    token = add_token(tokens, "search")
    access = Access(Certificates(pem / "server.pem", pem / "server.key", pem / "ca.pem"), tokens)
    with TritonServer(world.release, stores=world.stores, access=access, swappable=True) as server:
        server.wait_ready()
        yield server, tokens, token


def caller(server, pem, *, shown=True, **more):
    own = (pem / "caller.pem", pem / "caller.key") if shown else (None, None)
    tls = Tls(pem / "ca.pem", *own, server_name="rank.shop.example")
    return RankClient(server.grpc, deadline_s=5, retry=None, tls=tls, **more)


def test_a_caller_with_all_that_is_wanted(guarded, pem):
    server, _, token = guarded
    assert server.probe() == ""
    with caller(server, pem, token=token) as client:
        assert len(client.rank(REQUEST)) > 0
        event = FeedbackEvent(user_id=3, item_id=1, kind="click", timestamp=int(time.time()))
        assert client.feedback([event]).stored == 1


@pytest.mark.parametrize("token", [None, "wrong", "Bearer", " "])
@pytest.mark.parametrize("model", ["rank", "preprocess", "ranker", "rerank", "feedback"])
def test_every_model_wants_the_token(guarded, pem, token, model):
    server, _, _ = guarded
    name = f"{model}_{server.served.name}" if model in ("preprocess", "ranker", "rerank") else model
    credentials = grpc.ssl_channel_credentials(
        *((pem / name).read_bytes() for name in ("ca.pem", "caller.key", "caller.pem"))
    )
    options = [("grpc.ssl_target_name_override", "rank.shop.example")]
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.secure_channel(server.grpc, credentials, options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=name), timeout=5).config
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(empty_request(config), timeout=5, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not allowed" in caught.value.details()


def empty_request(config):
    """Of the shapes that the model wants, with nothing in it."""
    request = service_pb2.ModelInferRequest(model_name=config.name)
    for tensor in config.input:
        if tensor.optional and tensor.name != "PACKED_REQUEST":
            continue
        kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        array = np.zeros([1, *(max(size, 1) for size in tensor.dims)], triton_to_np_dtype(kind))
        own = InferInput(tensor.name, array.shape, kind)
        own.set_data_from_numpy(array)
        request.inputs.append(own._get_tensor())
        request.raw_input_contents.append(own._get_content())
    return request


def test_the_doctor_asks_as_a_caller(guarded, pem):
    """Without certificate and token it could say nothing of such a server."""
    server, _, token = guarded
    tls = Tls(pem / "ca.pem", pem / "caller.pem", pem / "caller.key", server_name="rank.shop.example")
    found = ask(server.grpc, [REQUEST], caller=Caller(tls, token))
    assert found.ready
    assert found.probes["rank"] is None
    assert {"shared-memory", "trace", "logging", "statistics"} <= found.closed
    refused = ask(server.grpc, [REQUEST], caller=Caller(tls))
    assert "not allowed" in refused.probes["rank"][1]
    with pytest.raises(ServeError, match=r"no Triton answers at .* and --tls-ca if it speaks TLS"):
        ask(server.grpc, [REQUEST])


def test_a_token_is_replaced_without_a_stop(guarded, pem):
    server, tokens, token = guarded
    other = add_token(tokens, "search")
    assert other != token
    assert oct(tokens.stat().st_mode & 0o777) == "0o600"
    assert token not in tokens.read_text()
    with caller(server, pem, token=other) as new, caller(server, pem, token=token) as old:
        time.sleep(1.1)
        assert len(new.rank(REQUEST)) > 0
        assert len(old.rank(REQUEST)) > 0
        kept = tokens.read_text()
        tokens.write_text("rubbish")  # half written by whoever edits it: what was known stays
        time.sleep(1.1)
        assert len(old.rank(REQUEST)) > 0
        tokens.write_text(kept)
        remove_token(tokens, "search-2")
        time.sleep(1.1)
        with pytest.raises(NotAllowed, match="none of this server's"):
            new.rank(REQUEST)
        assert len(old.rank(REQUEST)) > 0


def test_without_a_certificate_nobody_is_heard(guarded, pem):
    server, _, token = guarded
    with caller(server, pem, shown=False, token=token) as client, pytest.raises(Unavailable):
        client.rank(REQUEST)
    with RankClient(server.grpc, deadline_s=2, retry=None) as client, pytest.raises(Unavailable):
        client.rank(REQUEST)
    with pytest.raises(urllib.error.URLError):  # HTTP cannot be encrypted, so it is off
        urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=2)


@pytest.fixture(scope="module")
def closed(world):
    with TritonServer(world.release, access=Access()) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("ModelStatistics", "v2/models/stats"),
        ("TraceSetting", "v2/trace/setting"),
        ("LogSettings", "v2/logging"),
        ("SystemSharedMemoryStatus", "v2/systemsharedmemory/status"),
        ("CudaSharedMemoryStatus", "v2/cudasharedmemory/status"),
    ],
)
def test_interfaces_are_closed(closed, method, path):
    request = getattr(service_pb2, f"{method}Request")()
    with grpc.insecure_channel(closed.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, method)(request, timeout=5)
        assert "restricted" in caught.value.details()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{closed.http}/{path}", timeout=5)
    assert refused.value.code == 403
    assert closed.statistics()["rank"]["name"] == "rank"  # who started it may ask


def test_tokens_by_http(world, tmp_path):
    token = add_token(tmp_path / "tokens", "web")
    with TritonServer(world.release, access=Access(tokens=tmp_path / "tokens")) as server:
        server.wait_ready()
        tensors = {"USER_ID": ("INT64", [-1]), "ITEM_IDS": ("INT64", [1, 2, 3]), "TOP_K": ("INT32", [2]),
                   "SCENARIO": ("BYTES", ["search"]), "QUERY": ("BYTES", [""])}  # fmt: skip
        body = {"inputs": [{"name": name, "datatype": kind, "shape": [1, len(data)], "data": data}
                           for name, (kind, data) in tensors.items()]}  # fmt: skip

        def ask(**headers):
            request = urllib.request.Request(
                f"http://{server.http}/v2/models/rank/infer", json.dumps(body).encode(), headers
            )
            return json.loads(urllib.request.urlopen(request, timeout=5).read())

        assert ask(Authorization=f"Bearer {token}")["model_name"] == "rank"
        for headers in ({}, {"Authorization": "Bearer none"}, {"Authorization": token}):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(**headers)
            assert caught.value.code == 400
            assert "not allowed" in caught.value.read().decode()


def expired(authority, folder):
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    made = authority.issue_cert("rank.shop.example", not_after=past)
    made.private_key_pem.write_to_path(folder / "key")
    made.cert_chain_pems[0].write_to_path(folder / "cert")
    return Certificates(folder / "cert", folder / "key")


def another_key(authority, folder):
    authority.issue_cert("rank.shop.example").private_key_pem.write_to_path(folder / "key")
    authority.issue_cert("rank.shop.example").cert_chain_pems[0].write_to_path(folder / "cert")
    return Certificates(folder / "cert", folder / "key")


def swapped(authority, folder):
    wrong = another_key(authority, folder)
    return Certificates(wrong.key, wrong.cert)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (expired, r"--tls-cert .* is valid from .* renew it"),
        (another_key, "--tls-key .* does not belong to --tls-cert"),
        (swapped, "--tls-cert .* is no PEM of a certificate"),
        (lambda _, folder: Certificates(folder / "none", folder / "none"), "--tls-cert .*none is no PEM"),
    ],
)
def test_certificates_that_cannot_be_used(authority, world, tmp_path, harm, words):
    with pytest.raises(ServeError, match=words):
        TritonServer(world.release, access=Access(harm(authority, tmp_path)))


@pytest.mark.parametrize("text", ["rubbish", "name = 3", 'name = "plain-token"'])
def test_tokens_that_are_none(world, tmp_path, text):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ServeError, match="--tokens: "):
        TritonServer(world.release, access=Access(tokens=file))
    with pytest.raises(ServeError, match="--tokens: "):
        add_token(file, "search")
    assert file.read_text() == text


def test_names_that_are_none(tmp_path):
    file = tmp_path / "tokens"
    with pytest.raises(ServeError, match="is no name of a caller"):
        add_token(file, "a b")
    assert not file.exists()
    add_token(file, "search")
    with pytest.raises(ServeError, match="has no caller 'home'; it has search"):
        remove_token(file, "home")
    with pytest.raises(ServeError, match="--open everything is no interface"):
        Access(opened=frozenset({"everything"})).check()
    assert os.stat(file).st_mode & 0o077 == 0
