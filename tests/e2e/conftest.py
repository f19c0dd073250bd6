"""A real Triton server on the small world's release, one for all tests of this folder."""

from __future__ import annotations

import pytest
from trirank import RankClient


@pytest.fixture(scope="session")
def server(world):
    from trirank_build.serving.server import TritonServer

    with TritonServer(world.release) as server:
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
