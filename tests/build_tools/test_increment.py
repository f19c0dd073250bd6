"""A day after the other: an earlier dataset and a newer log are what both logs together would be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from trirank_build.artefacts import file_digest
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.increment import prepare_onto
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.preparation.sources import behaviour_log

DAY = 86_400
START = 1_600_000_000 - 1_600_000_000 % DAY


def raw(rows=5_000, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(1, 60, rows),
            "item_id": rng.integers(1, 90, rows),
            "behavior": rng.choice(["pv", "cart", "buy"], rows),
            "timestamp": START + np.sort(rng.choice(10 * DAY, rows, replace=False)),
        }
    )


def day_of(frame, last):
    """Before the last day, and the last day."""
    return [frame.filter(sign) for sign in (pl.col("timestamp") < START + last * DAY,
                                            pl.col("timestamp") >= START + last * DAY)]  # fmt: skip


@pytest.fixture
def logs(tmp_path):
    before, day = day_of(raw(), 9)
    new = pl.DataFrame({"user_id": [1, 2, 3], "item_id": [500, 501, 500], "behavior": ["buy"] * 3,
                        "timestamp": [START + 9 * DAY + at for at in (500, 600, 700)]})  # fmt: skip
    paths = []
    for name, frame in (("before", before), ("day", pl.concat([day, new])), ("all", pl.concat([before, day, new]))):
        paths.append(tmp_path / f"{name}.csv")
        frame.sort("timestamp").write_csv(paths[-1])
    return paths


@pytest.fixture
def base(logs, tmp_path):
    return Dataset.load(prepare(str(logs[0]), PrepareOptions()).save(tmp_path / "base"))


@pytest.fixture
def grown(base, logs, tmp_path):
    return Dataset.load(prepare_onto(base, str(logs[1]), PrepareOptions()).save(tmp_path / "grown"))


def test_it_has_the_events_and_items_of_both_logs(grown, logs):
    whole = prepare(str(logs[2]), PrepareOptions())
    columns = ["user_id", "item_id", "behaviour", "timestamp", "split"]
    order = ["timestamp", "user_id", "item_id"]
    assert grown.events.select(columns).sort(order).equals(whole.events.select(columns).sort(order))
    assert grown.items.equals(whole.items)


def test_every_choice_is_a_task_once(grown, base, logs):
    tasks, before = grown.requests.collect(), base.requests.collect()
    assert tasks.height > before.height
    whole = prepare(str(logs[2]), PrepareOptions()).requests.collect()
    key = ["user_id", "timestamp"]
    assert tasks.select(key).sort(key).equals(whole.select(key).sort(key))
    same = tasks.select([*key, "item_ids", "labels"]).join(before.select([*key, "item_ids"]), on=key, suffix="_before")
    assert same.height == before.height
    assert (same["item_ids"] == same["item_ids_before"]).all()
    assert set(tasks["split"]) == {"train", "valid", "test"}
    times = {split: tasks.filter(pl.col("split") == split)["timestamp"] for split in ("train", "valid", "test")}
    assert times["train"].max() < times["valid"].min()
    assert times["valid"].max() < times["test"].min()


def test_it_says_from_what_it_was_made(grown, base, logs, tmp_path):
    first, second = grown.description.notes["from"]
    assert first == {"source": "before.csv", "digest": base.description.digest}
    assert second == {
        "source": "day.csv",
        "digest": file_digest(logs[1]),
        "events": grown.events.height - base.events.height,
    }
    rows = {rule: (before, after) for rule, before, after in grown.description.cleaning}
    assert rows["in the dataset already"] == (second["events"],) * 2
    later = raw(300, seed=5).with_columns(pl.col("timestamp") + 10 * DAY)
    later.write_csv(tmp_path / "later.csv")
    again = prepare_onto(grown, str(tmp_path / "later.csv"), PrepareOptions())
    assert [line["source"] for line in again.description.notes["from"]] == ["before.csv", "day.csv", "later.csv"]
    assert again.description.source == "before.csv and later.csv"


def test_what_becomes_training_has_its_choice(base, logs, tmp_path):
    """Day after day: what retrieval missed while it was a test is among the candidates once it is learned from."""
    data, rng = base, np.random.default_rng(1)
    for day in range(10, 16):
        rows = 500
        frame = pl.DataFrame(
            {
                "user_id": rng.integers(1, 60, rows), "item_id": rng.integers(1, 90, rows) + 100 * (day - 9),
                "behavior": rng.choice(["pv", "cart", "buy"], rows),
                "timestamp": START + day * DAY + np.sort(rng.choice(DAY, rows, replace=False)),
            }
        )  # fmt: skip
        frame.write_csv(tmp_path / f"{day}.csv")
        data = prepare_onto(data, str(tmp_path / f"{day}.csv"), PrepareOptions())
    train = data.split("train")
    late = train.filter(pl.col("timestamp") >= START + 10 * DAY)
    assert late.height > 200
    assert (train["labels"].list.max() > 0).all()
    assert (train["missed"].list.len() == 0).all()
    forced = late.filter(pl.col("retrieval_scores").list.last().is_nan())
    assert forced.height > 20
    events = {(u, t): item for u, t, item in data.events.select("user_id", "timestamp", "item_id").iter_rows()}
    for row in forced.head(50).iter_rows(named=True):
        assert row["item_ids"][-1] == events[row["user_id"], row["timestamp"]]
    assert (data.split("test")["missed"].list.len() > 0).any()


def test_an_older_log_is_not_put_before_what_was_trained_on(base, logs, tmp_path):
    raw(4_000, seed=3).with_columns(pl.col("timestamp") - 20 * DAY).write_csv(tmp_path / "older.csv")
    with pytest.raises(BadData, match="older.csv is older than what before.csv is judged by: valid would begin"):
        prepare_onto(base, str(tmp_path / "older.csv"), PrepareOptions())


def test_views_count_as_they_did(tmp_path):
    shop = raw().with_columns(
        behavior=pl.when(pl.col("behavior") == "buy").then(pl.lit("buy")).otherwise(pl.lit("view"))
    )
    views = raw().with_columns(behavior=pl.lit("view"))
    day = raw(300, seed=9).with_columns(pl.col("timestamp") + 10 * DAY, behavior=pl.lit("view"))
    day.write_csv(tmp_path / "day.csv")
    for name, frame, kind in (("shop", shop, 1), ("views", views, 2)):
        frame.write_csv(tmp_path / f"{name}.csv")
        first = prepare(str(tmp_path / f"{name}.csv"), PrepareOptions())
        grown = prepare_onto(first, str(tmp_path / "day.csv"), PrepareOptions())
        new = grown.events.filter(pl.col("timestamp") >= START + 10 * DAY)
        assert set(new["behaviour"]) == {kind}, name


def test_prices_that_a_newer_file_lacks_stay(logs, tmp_path):
    pl.DataFrame({"item_id": [1, 3], "price": [5.0, 2.0]}).write_csv(tmp_path / "first.csv")
    base = prepare(str(logs[0]), PrepareOptions(items=tmp_path / "first.csv"))
    pl.DataFrame({"item_id": [1, 3], "price": ["", "4.0"]}).write_csv(tmp_path / "newer.csv")
    found = prepare_onto(base, str(logs[1]), PrepareOptions(items=tmp_path / "newer.csv"))
    assert dict(found.items.filter(pl.col("item_id").is_in([1, 3])).select("item_id", "price").iter_rows()) == {
        1: 5.0,
        3: 4.0,
    }


def test_a_base_with_feedback(base, logs):
    """Tasks of feedback say where items stood; those of a log stood nowhere."""
    nowhere = pl.col("item_ids").list.eval(pl.lit(2, pl.Int32)).alias("positions")
    told = replace(base, requests=base.requests.with_columns(nowhere, request_id=pl.lit("r")))
    found = prepare_onto(told, str(logs[1]), PrepareOptions()).requests.collect()
    assert found["positions"].null_count() == found["request_id"].null_count() == 0
    assert (found["positions"].list.len() == found["item_ids"].list.len()).all()
    assert set(found["request_id"]) == {"r", ""}


def test_old_logs_are_not_read_again(base, logs, monkeypatch):
    logs[0].unlink()
    read = []
    plain = behaviour_log.read_tables
    monkeypatch.setattr(behaviour_log, "read_tables", lambda path, *rest: read.append(path.name) or plain(path, *rest))
    prepare_onto(base, str(logs[1]), PrepareOptions())
    assert read == ["day.csv"]


def test_the_same_day_twice(grown, base, logs, tmp_path):
    with pytest.raises(BadData, match=r"events that are in the dataset already: \d+ of \d+, .* added before\? Give"):
        prepare_onto(grown, str(logs[1]), PrepareOptions())
    few = pl.concat([pl.read_csv(logs[1]), pl.read_csv(logs[0]).tail(20)])  # an hour that both logs have
    few.write_csv(tmp_path / "few.csv")
    found = prepare_onto(base, str(tmp_path / "few.csv"), PrepareOptions())
    assert found.events.height == base.events.height + pl.read_csv(logs[1]).height
    (line,) = [line for line in found.description.notes["read"] if line.startswith("events that are in the dataset")]
    assert "20 of" in line


def test_an_item_file_says_what_is_new_of_items(base, logs, tmp_path):
    pl.DataFrame({"item_id": [500, 3], "title": ["red chair", "blue table"], "price": [3.0, 4.0]}).write_csv(
        tmp_path / "items.csv"
    )
    found = prepare_onto(base, str(logs[1]), PrepareOptions(items=tmp_path / "items.csv"))
    titles = dict(found.items.select("item_id", "title").iter_rows())
    assert (titles[500], titles[3], titles[4]) == ("red chair", "blue table", "")
    assert found.items.filter(pl.col("item_id") == 3)["price"][0] == 4.0
    assert found.items.height == base.items.height + 2


@pytest.mark.parametrize(("change", "told"), [
    ({"min_count": 2}, "--min-count 2 does not go with --onto"),
])  # fmt: skip
def test_what_does_not_go_together(base, logs, change, told):
    with pytest.raises(BadData, match=told):
        prepare_onto(base, str(logs[1]), PrepareOptions(**change))


def test_logs_of_other_kinds(base, logs, tmp_path):
    pl.read_csv(logs[1]).drop("timestamp").write_csv(tmp_path / "untimed.csv")
    with pytest.raises(BadData, match=r"untimed.csv has no timestamps, and before.csv has"):
        prepare_onto(base, str(tmp_path / "untimed.csv"), PrepareOptions())
    named = pl.read_csv(logs[1]).with_columns(pl.format("sku-{}", "item_id").alias("item_id"))
    named.write_csv(tmp_path / "named.csv")
    with pytest.raises(BadData, match="rows without user or item"):
        prepare_onto(base, str(tmp_path / "named.csv"), PrepareOptions())
    lines = "\n".join("1 2 3 4 5 6 7 8" for _ in range(20))
    (tmp_path / "sequences.txt").write_text(lines)
    with pytest.raises(BadData, match="has no timestamps, so nothing says what is new"):
        prepare_onto(prepare(str(tmp_path / "sequences.txt"), PrepareOptions()), str(logs[1]), PrepareOptions())
