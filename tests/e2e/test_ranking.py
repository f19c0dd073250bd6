"""Ranked answers of a real Triton server."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import METRICS
from trirank import Behaviour, History, InvalidRequest, RankClient, RankRequest, Status
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation import metrics
from trirank_build.evaluation.evaluate import score
from trirank_build.features.examples import Examples
from trirank_build.repository.release import load_manifest, recorded_requests


def test_recorded_requests_come_back_in_full(client, world):
    for request in recorded_requests(world.release):
        response = client.rank(request)
        assert len(response) == len(set(response.item_ids.tolist())) > 0
        assert set(response.item_ids.tolist()) <= set(request.item_ids)
        assert (np.diff(response.scores) <= 0).all()


def test_the_server_says_who_it_is(client):
    assert client.ready()
    assert client.server_info()["name"] == "triton"


def test_the_live_ensemble_ranks_as_the_trained_module_does(client, world, trained):
    dataset = Dataset.load(world.data)
    examples = Examples.read(dataset, "test", trained.features)
    offline = score(trained.model(), examples)
    products = trained.features.catalogue.products
    for at, row in enumerate(dataset.split("test").head(50).iter_rows(named=True)):
        order = np.argsort(-offline[at], kind="stable")
        expected, seen = [], set()
        for place in order:
            product = products[examples.rows[at, place]]
            if product not in seen:
                seen.add(product)
                expected.append(row["item_ids"][place])
        response = client.rank(
            RankRequest.from_dict(
                {key: row[key] for key in ("item_ids", "user_id", "query", "timestamp", "retrieval_scores")}
                | {"scenario": "search", "top_k": 1024}
            )
        )
        scores = dict(zip(row["item_ids"], offline[at], strict=False))
        np.testing.assert_allclose(response.scores, [scores[i] for i in response.item_ids.tolist()], atol=1e-4)
        assert response.item_ids.tolist() == expected


def test_the_live_ensemble_beats_retrieval(client, world):
    gains = []
    for row in Dataset.load(world.data).split("test").head(150).iter_rows(named=True):
        label = dict(zip(row["item_ids"], row["labels"], strict=True))
        ideal = metrics.ideal_gains(np.array([row["labels"]], np.float32), [[]])
        keys = ("item_ids", "user_id", "query", "timestamp", "retrieval_scores", "scenario")
        response = client.rank(RankRequest.from_dict({key: row[key] for key in keys}))
        ranked = np.array([[label[i] for i in response.item_ids.tolist()]], np.float32)
        gains.append((metrics.ndcg(ranked, ideal)[0], metrics.ndcg(np.array([row["labels"]], np.float32), ideal)[0]))
    ranker, retrieval = np.nanmean(gains, axis=0)
    assert ranker > retrieval


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200, 312])
def test_any_number_of_candidates(client, trained, count):
    catalogue = trained.features.catalogue
    response = client.rank(RankRequest(item_ids=list(range(1, count + 1)), top_k=5))
    products = set(catalogue.products[catalogue.rows(np.arange(1, count + 1))].tolist())
    assert len(response) == min(5, len(products))


def test_the_largest_bucket(client):
    response = client.rank(RankRequest(item_ids=list(range(1, 1025)), top_k=1024))
    assert Status.UNKNOWN_ITEMS_DROPPED in response.status
    assert response.unknown > 0


def test_an_answer_does_not_depend_on_its_company(server, client):
    """The same requests one by one, and all at once so that Triton batches them."""
    rng = np.random.default_rng(0)
    requests = [
        RankRequest(
            item_ids=rng.choice(np.arange(1, 300), int(rng.integers(1, 200)), replace=False),
            user_id=int(rng.integers(1, 150)),
            query=str(rng.choice(["", "red lamp", "alder backpack"])),
            scenario=str(rng.choice(["home", "search", "new_items"])),
            timestamp=1_772_000_000,
        )
        for _ in range(150)
    ]
    alone = [client.rank(request) for request in requests]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(client.rank, requests))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)
        assert other.status == one.status


def test_batching_happens(server, client):
    """From the server's own statistics: under load a model runs fewer times than it answers. Of as many candidates as
    there may be, or one Python process could not ask faster than two instances answer."""
    request = RankRequest(item_ids=list(range(1, 1025)), user_id=3)
    stage = "ranker" if "ranker" in server.statistics() else "single"
    before = server.statistics()[stage]
    for _ in range(40):  # an answer of the test before this one may be counted yet
        time.sleep(0.25)
        earlier, before = before, server.statistics()[stage]
        if earlier == before:
            break
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client.rank, [request] * 600))
    deadline = time.monotonic() + 20
    answers = runs = 0
    while answers < 600 and time.monotonic() < deadline:  # Triton answers first and counts then
        time.sleep(0.05)
        after = server.statistics()[stage]
        answers, runs = (int(after[name]) - int(before[name]) for name in ("inference_count", "execution_count"))
    assert answers == 600
    assert answers / runs > 1.2


def test_the_policy_of_a_scenario(client, shop):
    new = shop.items.sort("created_at").tail(3)["item_id"].to_list()
    old = shop.items.sort("created_at").head(20)["item_id"].to_list()
    moment = int(shop.items["created_at"].max()) + 60
    ask = {"item_ids": old + new, "timestamp": moment, "top_k": 3}
    assert set(client.rank(RankRequest(scenario="new_items", **ask)).item_ids.tolist()) & set(new)


def test_a_history_of_the_caller(client):
    ids = list(range(1, 60))
    history = History(item_ids=[5, 6, 7], behaviours=Behaviour.PURCHASE)
    cold = client.rank(RankRequest(item_ids=ids, user_id=10**9, top_k=50))
    warm = client.rank(RankRequest(item_ids=ids, user_id=10**9, top_k=50, history=history))
    assert Status.COLD_USER in cold.status
    assert Status.COLD_USER not in warm.status
    assert warm.filtered == 3  # home leaves out what was bought
    assert not {5, 6, 7} & set(warm.item_ids.tolist())


def test_an_unknown_scenario_is_named(client):
    with pytest.raises(
        InvalidRequest, match="SCENARIO is 'hoem'; this release has cross_category, home, new_items, search"
    ):
        client.rank(RankRequest(item_ids=[1], scenario="hoem"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 400), min_size=1, max_size=300),
    user=st.none() | st.integers(0, 2**63 - 1) | st.integers(0, 150),
    query=st.text(st.characters(codec="utf-8"), max_size=60),
    top_k=st.integers(1, 1024),
    timestamp=st.none() | st.integers(0, 2**62),
    data=st.data(),
)
def test_what_the_client_accepts_the_server_answers(client, ids, user, query, top_k, timestamp, data):
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    scores = data.draw(st.none() | st.lists(finite, min_size=len(ids), max_size=len(ids)))
    request = RankRequest(
        item_ids=ids, user_id=user, query=query, top_k=top_k, timestamp=timestamp, retrieval_scores=scores
    )
    response = client.rank(request)
    assert len(response) <= min(top_k, len(set(ids)))
    assert np.isfinite(response.scores).all()
    assert set(response.item_ids.tolist()) <= set(ids)
    assert response.duplicates == len(ids) - len(set(ids))


def test_two_services_in_two_processes(server):
    code = (
        "import sys; from trirank import RankClient, RankRequest\n"
        "with RankClient(sys.argv[1], deadline_s=10) as c: print(len(c.rank(RankRequest(item_ids=range(1, 40)))))"
    )
    code = code.replace("range(1, 40)", "list(range(1, 40))")
    runs = [
        subprocess.Popen([sys.executable, "-c", code, server.grpc], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["10", "10"]


def test_a_deadline_in_the_past_of_the_work(server):
    with RankClient(server.grpc) as client:
        from trirank import DeadlineExceeded

        with pytest.raises(DeadlineExceeded):
            client.rank(RankRequest(item_ids=list(range(1, 1000))), deadline_s=1e-4)
        assert client.rank(RankRequest(item_ids=[1]), deadline_s=10)


def test_metrics_that_the_dashboards_ask_for(server):
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    there = set(re.findall(r"^([a-z0-9_]+)\{?", text, re.MULTILINE))
    assert there >= METRICS
    (quality,) = re.findall(r"^trirank_release_ndcg10\{(.*)\} ([0-9.]+)$", text, re.MULTILINE)
    assert f'release="{server.release.name}"' in quality[0]
    assert 'measured="valid"' in quality[0]
    assert float(quality[1]) == pytest.approx(load_manifest(server.release)["metrics"]["valid_ndcg10"], abs=1e-4)


def test_the_metrics_say_what_each_stage_costs(server, client):
    """Triton knows stages that are models; of those in one process they are told by the model itself, once a second."""
    if server.served.pipeline != "single":
        assert {"preprocess", "ranker", "rerank"} <= set(server.statistics())
        return

    def seconds():
        text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
        found = re.findall(r'^trirank_stage_seconds_total\{.*?stage="(\w+)".*\} ([0-9.e-]+)$', text, re.MULTILINE)
        return {stage: float(value) for stage, value in found}

    request = RankRequest(item_ids=list(range(1, 201)), user_id=3)
    client.rank(request)
    before = seconds()
    assert set(before) == {"preprocess", "ranker", "rerank"}
    deadline = time.monotonic() + 20
    while not all(seconds()[stage] > before[stage] for stage in before):
        assert time.monotonic() < deadline
        client.rank(request)
        time.sleep(0.3)


def test_a_request_does_not_sleep_in_a_queue(server, client):
    """One after the other, each sent the moment the one before is answered: with a queue policy every tenth of them
    waited for half a second (docs/performance.md)."""
    request, took = RankRequest(item_ids=[1, 2, 3]), []
    for _ in range(300):
        started = time.perf_counter()
        client.rank(request)
        took.append(time.perf_counter() - started)
    assert sum(seconds > 0.45 for seconds in took) <= 1  # a shared machine may well stand still for once
