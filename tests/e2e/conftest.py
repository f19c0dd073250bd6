"""A real Triton server on the small world's release, one a pipeline for all tests of this folder."""

from __future__ import annotations

import pytest
from trirank import RankClient

PIPELINES = ("ensemble", "single")
ON_BOTH = {"test_ranking", "test_protocol", "test_online"}
"""Modules whose tests hold for every pipeline; the others do with one."""


def pytest_generate_tests(metafunc):
    if "server" in metafunc.fixturenames:
        pipelines = PIPELINES if metafunc.module.__name__ in ON_BOTH else PIPELINES[:1]
        metafunc.parametrize("server", pipelines, indirect=True, scope="session")


@pytest.fixture(scope="session")
def server(request, world, single):
    from trirank_build.serving.server import TritonServer

    with TritonServer(single if request.param == "single" else world.release, stores=world.stores) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server):
    with RankClient(server.grpc, deadline_s=10) as client:
        yield client


def pytest_collection_modifyitems(items):
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
