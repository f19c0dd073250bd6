"""The examples do what they say, on a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trirank_build.repository.release import recorded_requests

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"


def test_the_script(server, world):
    items = [str(item) for item in recorded_requests(world.release)[0].item_ids[:4]]
    command = [sys.executable, EXAMPLES / "rank.py", server.grpc, *items]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[1] for line in lines} <= set(items)
    assert [line[0] for line in lines] == [str(at) for at in range(1, len(lines) + 1)]
    wrong = subprocess.run([*command, "-1"], capture_output=True, text=True, check=False, timeout=60)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: item_ids holds -1")


def test_the_service(server, world, monkeypatch):
    testing = pytest.importorskip("fastapi.testclient")
    monkeypatch.setenv("TRIRANK_SERVERS", server.grpc)
    monkeypatch.syspath_prepend(EXAMPLES)
    import service

    request = recorded_requests(world.release)[0]
    candidates = ",".join(str(item) for item in request.item_ids)
    with testing.TestClient(service.app) as client:
        assert client.get("/ready").json() == {"ready": True}
        found = client.get("/search", params={"query": "lamp", "candidates": candidates, "user": 3}).json()
        assert {item["item_id"] for item in found["items"]} <= set(request.item_ids)
        assert client.get("/search", params={"query": "", "candidates": "-1"}).status_code == 422
