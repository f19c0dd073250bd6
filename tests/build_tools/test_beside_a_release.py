"""Beside what is served: catalogue deltas, users, datasets of feedback, skew."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from trirank.contract import EventKind, stable_id
from trirank_backend.pipeline import Pipeline
from trirank_backend.request_log import FIELDS
from trirank_backend.requests import NamedTensors
from trirank_backend.stores.events import Event
from trirank_backend.stores.overlay import STATE, read_overlay
from trirank_backend.stores.store import open_store
from trirank_backend.surroundings import REQUESTS_VARIABLE, USERS_VARIABLE
from trirank_build.data.dataset import POSITIONS, Dataset
from trirank_build.errors import BadData
from trirank_build.evaluation.scoring import log_propensities, propensity_weights
from trirank_build.online.catalogue import apply_delta
from trirank_build.online.datasets import with_feedback
from trirank_build.online.events import all_events
from trirank_build.online.requests import logged_requests
from trirank_build.online.skew import measure_skew
from trirank_build.online.users import export_user, export_users, histories, import_users
from trirank_build.recipe import TrainingRecipe
from trirank_build.repository.release import graph_place
from trirank_build.training.ranking import RankingStep


class TestDelta:
    @pytest.fixture
    def apply(self, world, tmp_path):
        def run(text, **how):
            (tmp_path / "delta.csv").write_text(text)
            return apply_delta(tmp_path / "delta.csv", tmp_path / "catalogue.npy", world.release, **how)

        return run

    @pytest.fixture
    def rows(self, tmp_path):
        return lambda: [tuple(row)[:4] for row in read_overlay(tmp_path / "catalogue.npy", STATE).tolist()]

    def test_what_a_cell_does_not_say_stays(self, apply, rows):
        assert apply("item_id,price,stock\n3,9.5,\n1,,4\n").items == 2
        found = rows()
        assert found[0][0] == 1
        assert np.isnan(found[0][1])
        assert found[0][2:] == (4, 0)
        assert found[1] == (3, 9.5, -1, 0)
        apply("item_id;blocked;stock\n3;yes;0\n")
        assert rows()[1] == (3, 9.5, 0, 1)
        apply("item_id,blocked\n3,no\n")
        assert rows()[1] == (3, 9.5, 0, 0)

    def test_the_last_row_of_an_item_counts(self, apply, rows):
        apply("item_id,stock,price\n1,4,\n1,2,\n1,,3.5\n")
        assert rows() == [(1, 3.5, 2, 0)]

    def test_json_lines(self, apply, rows):
        apply('{"item_id": 2, "price": 1.5}\n{"item_id": 3, "stock": 7}\n')
        assert [row[0] for row in rows()] == [2, 3]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("price,stock\n1,2\n", "has the columns price, stock; a delta needs item_id and at least one of price"),
            ("item_id,title\n1,lamp\n", "has the columns item_id, title; a delta needs"),
            ("item_id,price,title\n1,2,x\n", "has the column title, which a delta cannot change"),
            ("", "has the columns none"),
            ("item_id,price\n1,cheap\n", "line 2: price is 'cheap'; it is a number of 0 or more"),
            ("item_id,price\n1,-3\n", "line 2: price is '-3'"),
            ("item_id,price\n1,nan\n", "line 2: price is 'nan'"),
            ("item_id,stock\n1,2.5\n", "line 2: stock is '2.5'; it is a whole number of pieces"),
            ("item_id,stock\n1,99999999999\n", "line 2: stock is '99999999999'"),
            ("item_id,blocked\n1,perhaps\n", "line 2: blocked is 'perhaps'; it is one of 1, true, yes"),
            ("item_id,stock\n,4\n", "line 2: item_id is empty"),
            ("item_id,stock\nlamp,4\n", "line 2: item_id is 'lamp'; ids of this catalogue are numbers"),
            ("item_id,stock\n1,4\n987654,4\n", "line 3: item 987654 is not in the catalogue of .*; leave it out, say"),
            ("item_id,stock\n1,4,5\n", "line 2: it has more cells than the header has names"),
            ('{"item_id": 1, "stock"', "cannot be read"),
        ],
    )
    def test_a_bad_delta_replaces_nothing(self, apply, rows, text, words):
        apply("item_id,stock\n1,4\n")
        before = rows()[0][2]
        with pytest.raises(BadData, match=words):
            apply(text)
        assert rows()[0][2] == before
        assert len(rows()) == 1

    def test_unknown_items_can_be_left_out(self, apply, rows):
        done = apply("item_id,stock\n987654,4\n1,3\n", skip_unknown=True)
        assert (done.rows, done.unknown, done.items) == (2, 1, 1)

    def test_a_file_that_is_none_is_not_replaced(self, apply, tmp_path):
        (tmp_path / "catalogue.npy").write_bytes(b"nonsense")
        with pytest.raises(Exception, match="cannot be read .*; write it again, or remove it"):
            apply("item_id,stock\n1,4\n")
        assert (tmp_path / "catalogue.npy").read_bytes() == b"nonsense"


class TestUsers:
    def test_a_dataset_s_histories_are_those_that_training_sees(self, world):
        dataset, store = Dataset.load(world.data), open_store(world.users)
        for user, events in histories(dataset.events):
            kept = store.get([user])[user].events
            for column in ("item_ids", "behaviours", "timestamps"):
                assert getattr(kept, column).tolist() == getattr(events, column).tolist()
        store.close()

    def test_export_and_erase(self, world, tmp_path):
        store = open_store(f"sqlite:{tmp_path / 'users.sqlite'}")
        count = import_users(Dataset.load(world.data).events, store)
        assert count == len(list(store.users())) > 50
        store.add([Event("e1", 7, 1, EventKind.DISLIKE.value, 1_770_000_000, "r1", 3)])
        assert export_users(store, tmp_path / "users.jsonl") >= count
        lines = [json.loads(line) for line in (tmp_path / "users.jsonl").read_text().splitlines()]
        assert {line["user_id"] for line in lines} == set(store.users())
        found = export_user(store, [7])
        assert found["disliked"] == [1]
        assert found["events"][0]["request_id"] == "r1"
        assert found["events"][0]["kind"] == "dislike"
        store.erase(7)
        store.close()
        assert b"r1" not in b"".join(path.read_bytes() for path in tmp_path.glob("users.sqlite*"))


def event(number, item, kind=EventKind.IMPRESSION, user=7, request="", position=0, timestamp=1_780_000_000):
    return Event(f"e{number}", user, item, int(kind), timestamp, request, position)


def line(request, items, moment=1_780_000_000, scores=None, user=7):
    return {
        "request_id": request, "moment": moment, "user_id": user, "query": "red lamp", "scenario": "search",
        "top_k": 3, "item_ids": items, "retrieval_scores": scores, "release": "x",
    }  # fmt: skip


class TestDatasets:
    @pytest.fixture
    def base(self, world):
        return Dataset.load(world.data)

    def test_what_was_shown_becomes_a_task(self, base):
        events = [
            event(1, 3, request="r1", position=1), event(2, 5, request="r1", position=2),
            event(3, 5, EventKind.CLICK, request="r1", position=2, timestamp=1_780_000_010),
            event(4, 5, EventKind.PURCHASE, request="r1", timestamp=1_780_000_020),
            event(5, 8, EventKind.CLICK, timestamp=1_780_000_030),
            event(6, 8, EventKind.DISLIKE, request="r1"),
            event(7, 10**12, request="r1", position=4),
        ]  # fmt: skip
        made = with_feedback(base, events, [line("r1", [8, 5, 3, -1], scores=[3.0, 2.0, 1.0, 0.0]), line("r2", [3])])
        (task,) = made.requests.filter(pl.col("timestamp") == 1_780_000_000).collect().to_dicts()
        assert task["item_ids"] == [5, 3]
        assert task["retrieval_scores"] == [2.0, 1.0]
        assert task["labels"] == [3.0, 0.0]
        assert task[POSITIONS] == [2, 1]
        assert task["query"] == "red lamp"
        new = made.events.filter(pl.col("timestamp") >= 1_780_000_000).sort("timestamp")
        assert new["behaviour"].to_list() == [2, 5, 2]
        assert made.events.height == base.events.unique().height + 3
        old = made.requests.filter(pl.col("timestamp") < 1_780_000_000).collect()
        assert old.height == base.requests.collect().height
        assert old[POSITIONS].list.sum().sum() == 0
        assert made.description.cleaning == [("events of items that are not in the item table", 7, 6)]

    def test_it_can_be_saved_and_trained_on(self, base, tmp_path):
        made = with_feedback(base, [event(1, 3, request="r1", position=1)], [line("r1", [3])])
        again = Dataset.load(made.save(tmp_path / "data"))
        assert POSITIONS in again.requests.collect_schema().names()
        assert again.sizes("train").requests > 0

    def test_what_a_dataset_of_feedback_has_already_is_added_once(self, base):
        events = [event(1, 3, request="r1", position=1), event(2, 3, EventKind.CLICK, request="r1")]
        once = with_feedback(base, events, [line("r1", [3])])
        more = [*events, event(3, 5, request="r2", position=1, timestamp=1_780_000_100)]
        twice = with_feedback(once, more, [line("r1", [3]), line("r2", [5], moment=1_780_000_100)])
        assert twice.requests.collect().height == once.requests.collect().height + 1
        assert twice.events.height == once.events.height == once.description.counts["events"]

    @pytest.mark.parametrize("again", [True, False])
    def test_what_is_done_after_a_dataset_was_made_is_added_to_its_tasks(self, base, again):
        """Also where neither the requests nor the first events are there any more."""
        first = [event(1, 3, request="r1", position=1), event(2, 5, request="r1", position=2)]
        lines = [line("r1", [5, 3, 8], scores=[3.0, 2.0, 1.0])]
        night = with_feedback(base, first, lines)
        late = [
            event(3, 5, EventKind.PURCHASE, request="r1", timestamp=1_780_000_300),
            event(4, 8, request="r1", position=3, timestamp=1_780_000_301),
        ]
        more = with_feedback(night, [*first, *late] if again else late, lines if again else [])
        assert more.requests.collect().height == night.requests.collect().height
        (task,) = more.requests.filter(pl.col("timestamp") == 1_780_000_000).collect().to_dicts()
        shown = dict(zip(task["item_ids"], zip(task["labels"], task[POSITIONS], strict=True), strict=True))
        assert shown[5] == (3.0, 2)
        assert shown[3] == (0.0, 1)
        if again:
            assert task["item_ids"] == [5, 3, 8]
        assert more.description.source == night.description.source

    def test_requests_that_nothing_is_told_of(self, base, capsys):
        with pytest.raises(
            BadData, match=r"none of the 1 logged requests \(1 with a request_id\) is named by an event"
        ):
            with_feedback(base, [event(1, 3, request="other", position=1)], [line("r1", [3])])
        with pytest.raises(BadData, match="give the requests too, with --requests"):
            with_feedback(base, [event(1, 3, request="r1", position=1)], [])
        with_feedback(base, [event(2, 3, EventKind.CLICK)], [line("", [3])])
        assert "(0 with a request_id) is named by an event" in " ".join(capsys.readouterr().err.split())

    def test_what_came_of_a_request_came_after_it(self, base):
        """Whatever the clock of who tells it says: an answer must not be in the history that it is to be told from."""
        early = event(2, 3, EventKind.CLICK, request="r1", timestamp=1_779_999_000)
        made = with_feedback(base, [event(1, 3, request="r1", position=1), early], [line("r1", [3])])
        assert made.events["timestamp"].max() == 1_780_000_000

    def test_a_repeated_request_counts_once(self, base):
        events = [event(1, 3, request="r1", position=1)]
        once = with_feedback(base, events, [line("r1", [3])])
        twice = with_feedback(base, events, [line("r1", [3]), line("r1", [3], moment=1_780_000_001)])
        assert once.requests.collect().height == twice.requests.collect().height

    def test_nothing_new(self, base):
        with pytest.raises(BadData, match=r"no event of an item of this dataset \(1 of others\); is it the same"):
            with_feedback(base, [event(1, 10**12)], [])

    def test_a_dataset_without_times(self, base):
        other = replace(base, description=replace(base.description, timed=False))
        with pytest.raises(BadData, match="has no timestamps, and feedback does"):
            with_feedback(other, [event(1, 3)], [])

    def test_the_log_of_a_store_is_read_in_its_order(self, tmp_path):
        store = open_store(f"sqlite:{tmp_path / 'users.sqlite'}")
        store.add([event(at, 3) for at in range(30)])
        assert [each.event_id for each in all_events(store)] == [f"e{at}" for at in range(30)]
        store.close()


class TestPositionBias:
    def test_weights_are_inverse_propensities_and_bounded(self):
        found = propensity_weights(np.array([[0, 1, 4, 1000]], np.int32), 0.5)
        assert found[0].tolist() == pytest.approx([1, 1, 2, 10])

    def test_an_unknown_position_is_taken_as_looked_at(self):
        assert log_propensities(np.array([[0, 1, 4]], np.int32), 0.5)[0].tolist() == pytest.approx([0, 0, -np.log(2)])

    @pytest.mark.parametrize(
        ("objective", "correction"),
        list(itertools.product(["listwise", "lambda"], ["offset", "weights"])),
    )
    def test_the_bias_goes_out_of_clicks(self, objective, correction):
        """Two items are equally good; one always stands first, one fifth. Clicked in proportion to how often people
        look, the first one seems better; corrected, they are alike."""
        rng = np.random.default_rng(0)
        positions = np.tile(np.array([1, 5], np.int32), (20_000, 1))
        clicks = (rng.random(positions.shape) < 0.1 / positions).astype(np.float32)
        labels, valid = torch.from_numpy(clicks), torch.ones(positions.shape, dtype=torch.bool)
        learned = {}
        for bias in (0.0, 1.0):
            worth = torch.zeros(2, requires_grad=True)
            given = {}
            if bias and correction == "offset":
                given["offsets"] = torch.from_numpy(log_propensities(positions, bias))
            elif bias:
                given["label_weights"] = torch.from_numpy(propensity_weights(positions, bias))
            judge = RankingStep(nn.Identity(), TrainingRecipe(objective=objective), {"click": 1.0}).judge
            optimiser = torch.optim.Adam([worth], lr=0.1)
            for _ in range(150):
                optimiser.zero_grad()
                scores = worth.expand(len(positions), 2)[..., None]
                judge(scores, labels, valid, **given).backward()
                optimiser.step()
            learned[bias] = float(worth[0] - worth[1])
        assert learned[0.0] > 1.2  # log 5 = 1.6
        assert abs(learned[1.0]) < 0.2


class TestSkew:
    @pytest.fixture(scope="class")
    def served(self, world, tmp_path_factory):
        """A folder with requests of every kind, as they were served in process."""
        folder = tmp_path_factory.mktemp("log")
        dataset = Dataset.load(world.data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(USERS_VARIABLE, world.users)
            patch.setenv(REQUESTS_VARIABLE, f"{folder}?tensors=1")
            pipeline = Pipeline.load(world.release, world.release / graph_place("ensemble"), "onnxruntime")
        requests = [tensors(row, at) for at, row in enumerate(dataset.split("test").head(60).iter_rows(named=True))]
        requests[0]["ITEM_IDS"][0, 1] = requests[0]["ITEM_IDS"][0, 0]  # a repeat
        requests[1]["ITEM_IDS"][0, 2] = 10**12  # an unknown one
        for request in requests[2:4]:
            del request["RETRIEVAL_SCORES"]
        assert all(isinstance(answer, dict) for answer in pipeline(requests))
        pipeline.close()
        return folder

    def test_serving_and_training_are_the_same_to_the_bit(self, world, served):
        found = measure_skew(world.release, served)
        assert found.compared == 60
        assert not found.differs, found
        assert len(list(logged_requests(served))) == 60
        assert {field for line in logged_requests(served) for field in line} <= set(FIELDS)  # docs/privacy.md has those
        assert {field for line in logged_requests(served) for field in line} >= set(FIELDS) - {"tensors"}

    def test_a_difference_is_found(self, world, served, tmp_path):
        lines = list(logged_requests(served))
        lines[5]["history"]["item_ids"][-1:] = [1 if lines[5]["history"]["item_ids"][-1:] != [1] else 2]
        lines[6]["query"] = lines[6]["query"] + " lamp"
        known = next(at for at, each in enumerate(lines) if at > 6 and each["history"]["item_ids"])
        lines[known]["history"]["timestamps"][-1] -= 10_000_000
        (tmp_path / "requests-1.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        found = measure_skew(world.release, tmp_path)
        assert found.differs
        assert found.differing["history"] >= 1
        assert found.first["history"].startswith("request-")

    def test_histories_of_a_dataset_with_another_past_differ(self, world, served):
        dataset = Dataset.load(world.data)
        assert not measure_skew(world.release, served, dataset).differs
        cut = replace(dataset, events=dataset.events.filter(pl.col("split") == "train"))
        assert measure_skew(world.release, served, cut).differing["history"] > 0

    def test_nothing_to_compare(self, world, tmp_path):
        with pytest.raises(BadData, match="holds no requests-"):
            measure_skew(world.release, tmp_path)
        (tmp_path / "requests-1.jsonl").write_text(json.dumps(line("r1", [1])) + "\n")
        with pytest.raises(BadData, match="1 of other releases, 0 without tensors"):
            measure_skew(world.release, tmp_path)

    def test_a_log_that_was_cut_off(self, tmp_path):
        whole = json.dumps(line("r1", [1]))
        (tmp_path / "requests-1.jsonl").write_text(whole + "\n" + whole[:20])
        (tmp_path / "requests-2.jsonl").write_text(whole + "\n" + whole + "\n")
        assert len(list(logged_requests(tmp_path))) == 3
        (tmp_path / "requests-1.jsonl").write_text(whole[:20] + "\n" + whole)
        with pytest.raises(BadData, match="line 1 is no JSON"):
            list(logged_requests(tmp_path))


def tensors(row, number):
    found = NamedTensors(
        USER_ID=np.array([[row["user_id"]]]), ITEM_IDS=np.array([row["item_ids"]]), TOP_K=np.array([[5]], np.int32),
        SCENARIO=np.array([[row["scenario"].encode()]], object), QUERY=np.array([[row["query"].encode()]], object),
        RETRIEVAL_SCORES=np.array([row["retrieval_scores"]], np.float32), TIMESTAMP=np.array([[row["timestamp"]]]),
    )  # fmt: skip
    found.request_id = f"request-{number}"
    return found


def test_text_ids_of_a_delta_are_hashed(world, tmp_path):
    """As those of a catalogue of text ids are."""
    import shutil

    release = shutil.copytree(world.release, tmp_path / "release")
    manifest = json.loads((release / "manifest.json").read_text())
    (release / "manifest.json").write_text(json.dumps(manifest | {"ids": {"item": "strings", "user": "numbers"}}))
    ids = release / "features" / "catalogue" / "ids.npy"
    count = len(np.load(ids))
    np.save(ids, np.sort([stable_id(f"sku-{at}") for at in range(count)]))
    (tmp_path / "delta.csv").write_text("item_id,stock\nsku-3,0\n")
    apply_delta(tmp_path / "delta.csv", tmp_path / "catalogue.npy", release)
    assert read_overlay(tmp_path / "catalogue.npy", STATE)["id"].tolist() == [stable_id("sku-3")]
