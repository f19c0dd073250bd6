"""What a load is made of, what a run showed, and what follows from it; no server is needed."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank import RankRequest
from trirank_loadtest.capacity import find_capacity, gave_way
from trirank_loadtest.compare import compare
from trirank_loadtest.errors import BadLoad
from trirank_loadtest.measured import Measured, Stage, quantile, summarised
from trirank_loadtest.mix import Mix, load_requests, requests_of
from trirank_loadtest.report import write_report
from trirank_loadtest.results import read_result, result_of, with_differences
from trirank_loadtest.run import KINDS, Load
from trirank_loadtest.shapes import SHAPES, arrivals
from trirank_loadtest.slo import Slo, read_all
from trirank_loadtest.stages import between

RECORDED = [
    RankRequest(item_ids=list(range(1, 40)), user_id=7, query="", top_k=5),
    RankRequest(item_ids=list(range(20, 80)), user_id=8, query="red shoe", top_k=5, retrieval_scores=[1.0] * 60),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_come_as_the_shape_says_and_when_it_says(shape):
    rng = np.random.default_rng(1)
    due = np.array(list(arrivals(2000, 10, shape, rng)))
    assert (np.diff(due) >= 0).all()
    assert due.min() >= 0
    assert due.max() < 10
    for start in range(10):
        wanted = 2000 * np.mean([SHAPES[shape]((start + part / 100) / 10) for part in range(100)])
        came = ((due >= start) & (due < start + 1)).sum()
        assert abs(came - wanted) < 6 * math.sqrt(wanted)


def test_arrivals_are_a_poisson_process():
    """Gaps are exponential: their mean is their deviation, and a third of them is below 0.4 means."""
    gaps = np.diff(list(arrivals(1000, 20, "constant", np.random.default_rng(2))))
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps < 0.4e-3).mean() == pytest.approx(1 - math.exp(-0.4), abs=0.02)


@pytest.mark.parametrize(
    ("rate", "seconds", "shape", "words"),
    [
        (0, 1, "constant", "rate is 0; it is requests a second, above 0"),
        (-3, 1, "constant", "rate is -3"),
        (math.nan, 1, "constant", "rate is nan"),
        (math.inf, 1, "constant", "rate is inf"),
        (1, 0, "constant", "seconds is 0"),
        (1, 1, "square", "shape 'square' is none of constant, step, spike, diurnal"),
    ],
)
def test_what_is_no_load(rate, seconds, shape, words):
    with pytest.raises(BadLoad, match=re.escape(words)):
        list(arrivals(rate, seconds, shape, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("text", "name", "limit"),
    [
        ("p99=50ms", "p99", 50), (" p99.9 = 1.5 s", "p99.9", 1500), ("p50=700us", "p50", 0.7),
        ("mean=10ms", "mean", 10),
        ("error_rate=0.1%", "error_rate", 0.001), ("error_rate=0.25", "error_rate", 0.25),
    ],
)  # fmt: skip
def test_promises_are_read(text, name, limit):
    found = Slo.read(text)
    assert found.name == name
    assert found.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["p99", "p99=", "p99=50", "p99=fast", "p0=5ms", "p100=5ms", "pp=5ms", "p99=-5ms", "p99=0ms", "p99=1.2.3ms",
     "error_rate=5", "error_rate=100%", "error_rate=x", "goodput=5", "=", "p99=50msec"],
)  # fmt: skip
def test_a_promise_that_nobody_can_read(text):
    with pytest.raises(BadLoad, match="SLO"):
        Slo.read(text)


def test_several_promises_in_one():
    assert [slo.name for slo in read_all(["p99=50ms,error_rate=1%", "mean=3ms"])] == ["p99", "error_rate", "mean"]


@pytest.mark.parametrize(
    "text", ["", "recorded:zipf=1", "drawn:zipf", "drawn:zipf=x", "drawn:colour=1", "drawn:zipf=-1", "drawn:users=0",
             "drawn:search=2", "drawn:users=1e12"],
)  # fmt: skip
def test_a_mix_that_is_none(text):
    with pytest.raises(BadLoad, match="mix"):
        Mix.read(text)


def test_drawn_requests_are_in_the_image_of_recorded_ones():
    rng = np.random.default_rng(3)
    stream = requests_of(Mix.read("drawn:zipf=1.1,users=50,search=0.25"), RECORDED, rng)
    drawn = [next(stream) for _ in range(4000)]
    assert {one.query for one in drawn} == {"", "red shoe"}
    assert np.mean([bool(one.query) for one in drawn]) == pytest.approx(0.25, abs=0.07)
    assert {len(one.item_ids) for one in drawn} == {39, 60}
    assert all(len(set(one.item_ids.tolist())) == len(one.item_ids) for one in drawn[:200])
    users = [one.user_id for one in drawn]
    often = [users.count(user) for user in (7, 8, 20)]
    assert often[0] > often[1] > often[2] > 0  # Zipf
    assert len(set(users)) <= 50


def test_recorded_requests_go_round():
    stream = requests_of(Mix(), RECORDED, np.random.default_rng(0))
    assert {id(next(stream)) for _ in range(10)} == {id(one) for one in RECORDED}


def test_logged_requests_are_recorded_ones(tmp_path):
    line = {"request_id": "a", "moment": 5, "user_id": 3, "query": "x", "scenario": "search", "top_k": 4,
            "sent_history": False, "item_ids": [1, 2], "retrieval_scores": None,
            "history": {"item_ids": [], "behaviours": [], "timestamps": []}}  # fmt: skip
    (tmp_path / "requests-1.jsonl").write_text(json.dumps(line) + "\n")
    (request,) = load_requests(tmp_path)
    assert (request.user_id, request.query, request.top_k, list(request.item_ids)) == (3, "x", 4, [1, 2])


@pytest.mark.parametrize("content", ["[]", "{", '[{"no": "ids"}]', "[1]"])
def test_a_recording_that_is_none(tmp_path, content):
    path = tmp_path / "requests.json"
    path.write_text(content)
    with pytest.raises(BadLoad, match=re.escape(str(path))):
        load_requests(path)
    with pytest.raises(BadLoad, match="holds no recorded requests"):
        load_requests(tmp_path / "nothing.json")
    (tmp_path / "requests-1.jsonl").write_text("c2VhbGVk\n")
    (tmp_path / "requests-1.jsonl.key").write_text("{}")
    with pytest.raises(BadLoad, match=r"requests-1\.jsonl is sealed \(TRIRANK_KEYS\); name a release's requests.json"):
        load_requests(tmp_path)


def samples(latencies_s, failed=(), kind=0):
    count = len(latencies_s)
    rows = np.zeros((count, 4))
    rows[:, 0], rows[:, 2], rows[:, 3] = np.linspace(0, 10, count, endpoint=False), latencies_s, kind
    outcomes = np.full(count, "", dtype="U20")
    outcomes[list(failed)] = "Overloaded"
    return rows, outcomes


def measured(latencies_s, failed=(), rate=100.0, stages=(), **more):
    found = summarised(*samples(latencies_s, failed), KINDS, rate, 10.0, (97.5,), list(stages), more.get("cpu", {}))
    return found if "lag" not in more else Measured(**{**vars(found), "lag_p99_ms": more["lag"]})


def test_failures_are_infinitely_slow():
    found = measured([0.01] * 1000, failed=range(100, 1000, 50))  # one in fifty
    assert found.error_rate == pytest.approx(0.02)
    assert found.errors == {"Overloaded": 18}
    assert found.percentile(95.0) == pytest.approx(10)
    assert found.percentile(99.0) == math.inf
    assert found.percentile(97.5) == pytest.approx(10)
    assert found.mean_ms == math.inf
    assert not Slo("p99", 1e9).kept(found)
    assert Slo("error_rate", 0.02).kept(found)
    assert Measured.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_the_first_tenth_is_not_counted():
    found = measured([9.0] * 100 + [0.01] * 900)
    assert found.percentile(99.9) == pytest.approx(10)
    assert found.timeline[0]["p50_ms"] == pytest.approx(9000)


def test_feedback_is_told_apart():
    ranks, told = samples([0.01] * 100), samples([5.0] * 50, kind=2)
    rows, outcomes = (np.concatenate(pair) for pair in zip(ranks, told, strict=True))
    found = summarised(rows, outcomes, KINDS, 10.0, 10.0, (), [], {})
    assert found.percentile(99.0) == pytest.approx(10)
    assert found.kinds["feedback"]["p99_ms"] == pytest.approx(5000)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50), st.floats(0.1, 99.9))
def test_a_percentile_is_a_value_that_was_seen(values, share):
    found = quantile(np.array(values), share)
    assert found in values
    assert np.mean(np.array(values) <= found) >= share / 100 - 1e-9


def queue(capacity, seed_noise=0.0):
    """A server in a formula: latency rises as 1 / (1 - load)."""

    def measure(rate, seed):
        noise = 1 + seed_noise * np.random.default_rng(seed).normal()
        load = rate / (capacity * noise)
        ms = 5 / (1 - load) if load < 1 else 1e4
        stages = [Stage("ranker_1", 10, ms - 5, 5.0, 1 + load), Stage("rerank_1", 10, 0.1, 1.0, 1.0)]
        return measured([ms / 1e3] * 200, rate=rate, stages=stages, cpu={"machine": 0.99})

    return measure


@pytest.mark.parametrize("start", [10, 400, 5000])
def test_the_capacity_is_found_from_either_side(start):
    found = find_capacity(queue(1000), read_all(["p99=50ms"]), start, repeats=3)
    assert 900 / 1.06 <= found.rate <= 900  # 5 / (1 - 0.9) = 50
    assert "requests wait for ranker_1" in found.gave_way
    assert "all cores of this machine were 99% busy" in found.gave_way
    assert [point.rate for point in found.points] == sorted(point.rate for point in found.points)


def test_repeats_outvote_one_that_was_unlucky():
    found = find_capacity(queue(1000, 0.02), read_all(["p99=50ms"]), 400, repeats=5)
    assert 800 < found.rate < 950
    assert max(len(point.runs) for point in found.points) > 3 or len(found.points) < 5


def test_nothing_holds():
    found = find_capacity(queue(1000), read_all(["p99=1ms"]), 100, repeats=1)
    assert found.rate == 0
    assert "p99" in found.gave_way


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lag": 40.0, "cpu": {"load": 0.4}}, "the load generator itself gave way"),
        ({"stages": [Stage("ranker_1", 10, 0.1, 80.0, 8.0)]}, "ranker_1 takes longer for a batch"),
        ({"stages": []}, "the network or this machine did"),
    ],
)
def test_what_gives_way_is_named(change, words):
    slos = read_all(["p99=50ms"])
    from trirank_loadtest.capacity import Point

    before = Point(100, [measured([0.01] * 200, stages=[Stage("ranker_1", 10, 0.1, 5.0, 1.0)])], True)
    after = Point(150, [measured([0.09] * 200, **change)], False)
    assert words in gave_way([before, after], slos)


def test_what_did_not_keep_up_does_not_hold():
    """The promise is kept yet, since the run is short, but the queue grows: the last are answered after it."""

    def measure(rate, seed):
        waited = np.maximum(0, rate / 500 - 1) * np.linspace(0, 10, 400)
        return measured(0.01 + waited, rate=rate)

    assert measure(450, 0).answered == pytest.approx(measure(450, 0).offered, rel=0.01)
    assert measure(650, 0).answered < 0.9 * measure(650, 0).offered
    assert find_capacity(measure, read_all(["p99=5s"]), 100, 1).rate < 560


def test_a_load_generator_that_is_late_beyond_all_deadlines_is_named():
    from trirank_loadtest.capacity import Point

    before = Point(100, [measured([0.01] * 200)], True)
    after = Point(150, [measured([0.01] * 200, failed=range(20, 200, 2), lag=900.0)], False)
    assert "the load generator itself gave way" in gave_way([before, after], read_all(["p99=50ms"]))


def test_nothing_that_holds_is_an_answer_too():
    asked = []

    def measure(rate, seed):
        asked.append(rate)
        return measured([1.0] * 200, rate=rate)

    assert find_capacity(measure, read_all(["p99=1ms"]), 100, 1, least=2.0).rate == 0
    assert min(asked) >= 2


LOAD = Load(["127.0.0.1:1"], None, 100.0, 10.0)


def result(latencies_s, **load):
    return result_of(Load(**{**vars(LOAD), **load}), read_all(["p99=50ms"]), [measured(latencies_s)], None)


def test_worse_beyond_noise():
    rng = np.random.default_rng(5)
    before, again = (rng.gamma(4, 0.002, 5000) for _ in range(2))
    verdicts = {one.name: one.verdict for one in compare(result(before), result(again))}
    assert set(verdicts.values()) == {"no difference beyond noise"}
    worse = with_differences(result(again), compare(result(before), result(1.3 * again)))
    assert not worse["passed"]
    assert "Worse than before: p50_ms, p99_ms." in worse["verdict"]
    assert {one.verdict for one in compare(result(1.3 * before), result(again)) if one.name != "error_rate"} == {
        "better"
    }


def test_capacities_that_differ_by_a_step_of_the_search_are_alike():
    def found(capacity, start=400):
        return result_of(
            LOAD, read_all(["p99=50ms"]), [], find_capacity(queue(capacity), read_all(["p99=50ms"]), start, 1)
        )

    (same,) = compare(found(1000), found(970))
    assert same.verdict == "no difference beyond noise"
    (worse,) = compare(found(1000), found(800))
    assert worse.verdict == "worse"
    (better,) = compare(found(800), found(1000))
    assert better.verdict == "better"


def test_only_like_is_compared():
    with pytest.raises(BadLoad, match="is of shape spike, this one of constant; compare runs of the same load"):
        compare(result([0.01] * 100, shape="spike"), result([0.01] * 100))


def test_a_result_is_read_again(tmp_path):
    path = tmp_path / "loadtest.json"
    path.write_text(json.dumps(result([0.01] * 100), allow_nan=False))
    assert read_result(path)["passed"]
    for text in ("{}", "[", '{"version": 99}'):
        path.write_text(text)
        with pytest.raises(BadLoad, match=re.escape(str(path))):
            read_result(path)


def test_the_page_says_what_was_found(tmp_path):
    slos = read_all(["p99=50ms", "error_rate=1%"])
    capacity = find_capacity(queue(1000), slos, 400, repeats=1)
    write_report(result_of(LOAD, slos, [], capacity), tmp_path / "loadtest.html")
    page = (tmp_path / "loadtest.html").read_text()
    for words in ("requests/s hold", "How slow does it get", "Do batches form?", "What happened over time", "ranker_1",
                  "requests wait for ranker_1", "<svg"):  # fmt: skip
        assert words in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing from outside


def test_statistics_between_two_readings():
    before = {"rank": (10, 10, 10, 0, 100), "ranker_1": (10, 10, 10, 1_000_000, 5_000_000)}
    after = {"rank": (30, 30, 30, 0, 300), "ranker_1": (30, 30, 15, 21_000_000, 45_000_000), "idle": (0, 0, 0, 0, 0)}
    (stage,) = between(before, after)
    assert stage == Stage("ranker_1", 20, 1.0, 2.0, 4.0)
    assert [stage.model for stage in between({}, {"rank": (5, 5, 5, 1, 1)})] == ["rank"]  # of a single pipeline
    assert between({"rank": (50, 1, 1, 1, 1)}, {"rank": (5, 5, 5, 1, 1)})[0].requests == 5  # it was loaded anew
