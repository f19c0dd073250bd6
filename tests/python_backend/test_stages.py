"""The three steps in process: answers, and errors that say what and which limit."""

from __future__ import annotations

import json
import shutil
import sys
import time

import numpy as np
import pytest
from trirank import contract
from trirank.contract import Status
from trirank_backend.errors import InvalidInput, InvalidRelease, StageFailed, TooLate
from trirank_backend.pipeline import Pipeline
from trirank_backend.preprocess import Preprocess
from trirank_backend.rerank import Rerank
from trirank_backend.scoring import GuardedRanker
from trirank_backend.surroundings import USERS_VARIABLE
from trirank_backend.triton import each


@pytest.fixture(scope="module")
def graph(world):
    return world.release / "models" / "ranker" / "1" / "model.onnx"


@pytest.fixture(scope="module", autouse=True)
def users(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(USERS_VARIABLE, world.users)
        yield


@pytest.fixture(scope="module")
def pipeline(world, graph, users):
    pipeline = Pipeline.load(world.release, graph, "onnxruntime")
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module", params=["ensemble", "single"])
def line(request, world, graph, pipeline, users):
    """Requests → answers through all three steps; a request that fails gives its error.

    ``ensemble``: as models hand tensors to each other; ``single``: in one process."""
    if request.param == "single":
        yield lambda *requests: pipeline(list(requests))
        return
    preprocess, rerank = Preprocess.load(world.release), each(Rerank.load(world.release).tensors)
    ranker = GuardedRanker.load(world.release, graph, "onnxruntime")

    def run(*requests):
        answers = preprocess.tensors(list(requests), [])
        for at, answer in enumerate(answers):
            if isinstance(answer, dict):
                scores = ranker([{name: tensor for name, tensor in answer.items() if name != "handover"}], [])[0]
                answers[at] = rerank([scores | {"handover": answer["handover"]}], [])[0]
        return answers

    yield run
    preprocess.close()


def ask(ids=(1, 2, 3), top_k=3, scenario="home", user=-1, **more):
    request = {
        "USER_ID": np.array([[user]]),
        "ITEM_IDS": np.array([ids], np.int64),
        "TOP_K": np.array([[top_k]], np.int32),
        "SCENARIO": np.array([[scenario.encode()]], object),
    }
    return request | {name: np.array(value) for name, value in more.items()}


def test_an_answer(line, trained, shop):
    answer = line(ask())[0]
    assert set(answer) == {spec.name for spec in contract.RESPONSE if not spec.optional}
    found = answer["RANKED_IDS"][0]
    products = trained.features.catalogue.products[trained.features.catalogue.rows(found[found >= 0])]
    assert set(found.tolist()) <= {1, 2, 3, -1}
    assert len(products) == len(set(products.tolist())) == len(set(shop.items["product_id"].head(3)))
    assert (np.diff(answer["SCORES"][0][answer["RANKED_IDS"][0] >= 0]) <= 0).all()


def test_outputs_have_the_declared_types(line):
    numpy = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
    for spec in (spec for spec in contract.RESPONSE if not spec.optional):
        assert line(ask())[0][spec.name].dtype == numpy[spec.dtype], spec.name


def test_unknown_items_are_dropped_and_counted(line):
    answer = line(ask(ids=(1, 10**12, 10**13)))[0]
    assert answer["RANKED_IDS"][0].tolist() == [1, -1, -1]
    assert answer["STATUS"][0].tolist()[1:] == [2, 0, 0]
    assert Status(int(answer["STATUS"][0, 0])) == Status.UNKNOWN_ITEMS_DROPPED | Status.FEWER_THAN_TOP_K


def test_unknown_items_are_kept_where_the_policy_says_so(world, graph, tmp_path):
    """Behind all others, as retrieval had them, once each; a scenario that does not say so drops them as ever."""
    release = shutil.copytree(world.release, tmp_path / "release")
    home = release / "features" / "policies" / "home.toml"
    home.write_text("keep_unknown = true\n" + home.read_text())
    line = Pipeline.load(release, graph, "onnxruntime")
    ids = (10**13, 1, 10**12, 10**12, -1)
    plain = ask(ids=ids, top_k=5)
    scored = ask(ids=ids, top_k=5, RETRIEVAL_SCORES=np.array([[0.1, 0.2, 0.3, 0.3, 0]], np.float32))
    search = ask(ids=ids, top_k=5, scenario="search")
    answers = line([plain, scored, search])
    assert [answer["RANKED_IDS"][0].tolist() for answer in answers] == [
        [1, 10**13, 10**12, -1, -1],
        [1, 10**12, 10**13, -1, -1],
        [1, -1, -1, -1, -1],
    ]
    dropped = [Status.UNKNOWN_ITEMS_DROPPED in Status(int(answer["STATUS"][0, 0])) for answer in answers]
    assert dropped == [False, False, True]
    assert [int(answer["STATUS"][0, 1]) for answer in answers] == [2, 2, 2]
    line.close()


def test_duplicates_are_dropped_and_counted(line):
    answer = line(ask(ids=(1, 1, 1), top_k=2))[0]
    assert answer["RANKED_IDS"][0].tolist() == [1, -1]
    assert answer["STATUS"][0, 2] == 2
    assert Status.DUPLICATES_DROPPED in Status(int(answer["STATUS"][0, 0]))


def test_top_k_above_n_is_padded(line):
    answer = line(ask(ids=(1, 50), top_k=10))[0]
    assert answer["RANKED_IDS"].shape == (1, 10)
    assert (answer["RANKED_IDS"][0] >= 0).sum() == 2


def test_padding_changes_nothing(line):
    plain = line(ask(ids=(1, 30, 60)))[0]
    padded = line(ask(ids=(1, 30, 60, *[-1] * 61)))[0]
    for name in plain:
        np.testing.assert_allclose(padded[name], plain[name], atol=1e-5)


def test_a_user_without_history_is_cold(line):
    assert Status.COLD_USER in Status(int(line(ask(user=10**9))[0]["STATUS"][0, 0]))
    assert Status.COLD_USER not in Status(int(line(ask(user=-1))[0]["STATUS"][0, 0]))


def test_a_sent_history_replaces_the_stored_one(line, shop):
    user = shop.events["user_id"][0]
    cold = line(ask(user=user, HISTORY_IDS=[[-1]]))[0]
    assert Status.COLD_USER in Status(int(cold["STATUS"][0, 0]))
    warm = line(ask(user=user))[0]
    assert Status.COLD_USER not in Status(int(warm["STATUS"][0, 0]))


def test_a_sent_history_counts_as_the_stored_one_would(line, shop):
    user = int(shop.events["user_id"][0])
    past = shop.events.filter(shop.events["user_id"] == user).sort("timestamp", maintain_order=True)
    stored = line(ask(user=user, TIMESTAMP=[[2_000_000_000]]))[0]
    sent = line(
        ask(
            user=user,
            TIMESTAMP=[[2_000_000_000]],
            HISTORY_IDS=past["item_id"].to_numpy()[None],
            HISTORY_BEHAVIOURS=past["behaviour"].to_numpy().astype(np.int32)[None],
            HISTORY_TIMESTAMPS=past["timestamp"].to_numpy()[None],
        )
    )[0]
    np.testing.assert_array_equal(sent["RANKED_IDS"], stored["RANKED_IDS"])


def test_events_after_the_timestamp_are_not_known(line, shop):
    user = int(shop.events["user_id"][0])
    answer = line(ask(user=user, TIMESTAMP=[[1_000]]))[0]
    assert Status.COLD_USER in Status(int(answer["STATUS"][0, 0]))


def test_a_request_may_hold_several_rows(line):
    one, two = line(ask(ids=(1, 2), top_k=1))[0], line(ask(ids=(30, 40), top_k=2))[0]
    both = {
        name: np.concatenate([a, b])
        for (name, a), b in zip(ask((1, 2), 1).items(), ask((30, 40), 2).values(), strict=True)
    }
    answer = line(both)[0]
    assert answer["RANKED_IDS"].shape == (2, 2)
    assert answer["RANKED_IDS"][0].tolist() == [*one["RANKED_IDS"][0].tolist(), -1]
    assert answer["RANKED_IDS"][1].tolist() == two["RANKED_IDS"][0].tolist()


def test_different_buckets_share_a_batch(line):
    small, large = ask(ids=(1, 2, 3)), ask(ids=tuple(range(1, 101)), top_k=5)
    alone = [line(small)[0], line(large)[0]]
    together = line(small, large)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(other["RANKED_IDS"], one["RANKED_IDS"])
        np.testing.assert_allclose(other["SCORES"], one["SCORES"], atol=1e-5)


BAD = {
    "too many rows": (
        {name: np.repeat(tensor, 33, 0) for name, tensor in ask().items()},
        "the request has 33 rows; it has 1 to 32",
    ),
    "no rows": ({name: tensor[:0] for name, tensor in ask().items()}, "the request has 0 rows; it has 1 to 32"),
    "rows differ": (ask(TOP_K=np.array([[1], [2]], np.int32)), "TOP_K has 2 rows, ITEM_IDS 1"),
    "no candidates": (ask(ids=()), "0 candidates; a request has 1 to 1024"),
    "only padding": (ask(ids=(-1, -1)), "0 candidates"),
    "too many candidates": (ask(ids=tuple(range(1025))), "1025 candidates; a request has 1 to 1024"),
    "top_k 0": (ask(top_k=0), "TOP_K is 0; it goes from 1 to 1024"),
    "top_k negative": (ask(top_k=-3), "TOP_K is -3"),
    "top_k huge": (ask(top_k=2**31 - 1), "TOP_K is 2147483647; it goes from 1 to 1024"),
    "unknown scenario": (
        ask(scenario="hoem"),
        "SCENARIO is 'hoem'; this release has cross_category, home, new_items, search",
    ),
    "query not UTF-8": (ask(QUERY=np.array([[b"caf\xe9"]], object)), "QUERY is not UTF-8: byte 0xe9 at 3"),
    "query too long": (
        ask(QUERY=np.array([[b"x" * 2049]], object)),
        "QUERY has 2049 bytes; the limit is 2048",
    ),
    "score NaN": (ask(RETRIEVAL_SCORES=[[1.0, np.nan, 0]]), r"RETRIEVAL_SCORES\[0, 1\] is nan"),
    "score infinite": (ask(RETRIEVAL_SCORES=[[np.inf, 0, 0]]), "is inf"),
    "scores short": (
        ask(RETRIEVAL_SCORES=[[1.0]]),
        r"RETRIEVAL_SCORES has shape \[1, 1\], ITEM_IDS \[1, 3\]",
    ),
    "timestamp negative": (ask(TIMESTAMP=[[-1]]), "TIMESTAMP is -1"),
    "behaviours alone": (ask(HISTORY_BEHAVIOURS=[[1]]), "need HISTORY_IDS"),
    "behaviours short": (ask(HISTORY_IDS=[[1, 2]], HISTORY_BEHAVIOURS=[[1]]), "HISTORY_BEHAVIOURS has shape"),
    "behaviour unknown": (ask(HISTORY_IDS=[[1]], HISTORY_BEHAVIOURS=[[77]]), "HISTORY_BEHAVIOURS holds 77"),
    "history long": (ask(HISTORY_IDS=[list(range(1025))]), "1025 events; the limit is 1024"),
    "history before 1970": (ask(HISTORY_IDS=[[1]], HISTORY_TIMESTAMPS=[[-9]]), "HISTORY_TIMESTAMPS holds -9"),
}


@pytest.mark.parametrize(("request_", "words"), BAD.values(), ids=BAD.keys())
def test_bad_requests_are_told_why_and_harm_nobody_else(line, request_, words):
    import re

    before, bad, after = line(ask(), request_, ask())
    assert isinstance(bad, InvalidInput)
    assert re.search(words, str(bad)), str(bad)
    assert isinstance(before, dict)
    assert isinstance(after, dict)


def test_a_failing_ranker_costs_the_one_request(world, graph):
    pipeline = Pipeline.load(world.release, graph, "onnxruntime")
    ranker, calls = pipeline._ranker, []

    def fails_once(tensors):
        calls.append(tensors)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return ranker(tensors)

    pipeline._ranker = fails_once
    answers = pipeline([ask(), ask(), ask()])
    assert [type(answer) for answer in answers] == [dict, StageFailed, dict]
    assert "out of memory" in str(answers[1])
    pipeline.close()


def test_in_one_process_too_nothing_is_done_for_those_who_have_gone(pipeline):
    past, future = time.time() * 1e6 - 1e6, time.time() * 1e6 + 60e6
    one, late, other = pipeline([ask(), ask(), ask()], [future, past, future])
    assert isinstance(late, TooLate)
    assert contract.TOO_LATE in str(late)
    assert isinstance(one, dict)
    assert isinstance(other, dict)


def test_the_pipeline_counts_its_stages_seconds(pipeline):
    before = dict(pipeline.seconds)
    pipeline([ask()])
    assert set(before) == set(contract.STAGES)
    assert all(pipeline.seconds[stage] > before[stage] for stage in contract.STAGES)


@pytest.mark.parametrize("name", ["candidates", "history", "query"])
@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_the_ranker_refuses_ids_that_it_has_no_row_for(world, graph, name, wrong):
    preprocess = Preprocess.load(world.release)
    good = preprocess([ask()])[0].ranker
    preprocess.close()
    bad = good | {name: good[name].copy()}
    bad[name].flat[-1] = wrong
    answers = GuardedRanker.load(world.release, graph, "onnxruntime")([good, bad, good], [])
    assert [type(answer) for answer in answers] == [dict, InvalidInput, dict]
    assert str(wrong) in str(answers[1])


def test_padding_that_somebody_types_is_no_token(pipeline, trained):
    """The tokeniser knows [PAD] as its number 0, which stands for "no token" in titles too."""
    text, length = trained.features.text, trained.features.spec.query_length
    plain, typed = text.encode(["red lamp"], length), text.encode(["[PAD] red [PAD] lamp"], length)
    np.testing.assert_array_equal(plain, typed)
    assert not text.encode(["[PAD]"], length).any()


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_is_compiled_while_requests_are_served(line, rows):
    """Not for one row or several, and not for arrays that cannot be written to, as some servers hand them over."""
    ours = [module for name, module in sys.modules.items() if name.startswith("trirank_backend")]

    def compiled():
        return [
            len(each.signatures) for module in ours for each in vars(module).values() if hasattr(each, "signatures")
        ]

    before = compiled()
    request = {name: np.repeat(tensor, rows, 0) for name, tensor in ask(ids=tuple(range(1, 65)), user=1).items()}
    request["QUERY"] = np.array([[b"red lamp"]] * rows, object)
    request["RETRIEVAL_SCORES"] = np.ones((rows, 64), np.float32)
    frozen = {name: tensor.copy() for name, tensor in request.items()}
    for tensor in frozen.values():
        tensor.flags.writeable = False
    assert all(isinstance(answer, dict) for answer in line(request, frozen))
    assert isinstance(line(frozen)[0], dict)
    assert compiled() == before


def test_a_release_of_another_contract_is_refused(world, tmp_path):
    copy = tmp_path / "release"
    shutil.copytree(world.release, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"contract": 99}))
    for stage in (Preprocess, Rerank):
        with pytest.raises(InvalidRelease, match=f"of contract 99, this backend speaks {contract.CONTRACT_VERSION}"):
            stage.load(copy)


def test_training_and_serving_pack_the_same(world, trained):
    """A logged request, replayed through serving's path, gives the tensors that training saw."""
    from trirank_build.data.dataset import Dataset
    from trirank_build.features.examples import Examples

    dataset = Dataset.load(world.data)
    examples = Examples.read(dataset, "test", trained.features)
    preprocess = Preprocess.load(world.release)
    for at, row in enumerate(dataset.split("test").head(40).iter_rows(named=True)):
        request = ask(
            ids=row["item_ids"],
            scenario=row["scenario"],
            user=row["user_id"],
            QUERY=np.array([[row["query"].encode()]], object),
            RETRIEVAL_SCORES=np.array([row["retrieval_scores"]], np.float32),
            TIMESTAMP=[[row["timestamp"]]],
        )
        served = preprocess([request])[0].ranker
        trained_on = examples.whole(np.array([at])).packed.tensors()
        n = len(row["item_ids"])
        for name, tensor in trained_on.items():
            got = served[name][:, :n] if name in ("candidates", "dense") else served[name]
            want = tensor[:, :n] if name in ("candidates", "dense") else tensor
            np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)
    preprocess.close()
