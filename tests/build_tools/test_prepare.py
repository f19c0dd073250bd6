"""Every kind of source becomes a dataset; every kind of damage becomes one clear line."""

from __future__ import annotations

import gzip

import numpy as np
import polars as pl
import pytest
from trirank.contract import Behaviour, stable_id
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare

START = 1_600_000_000


def log(rows=1200, users=30, items=40, seed=0, **columns):
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(1, users + 1, rows),
            "item_id": rng.integers(1, items + 1, rows),
            "behavior": rng.choice(["pv", "cart", "buy"], rows),
            "timestamp": START + np.sort(rng.integers(0, 30 * 86_400, rows)),
        }
    )
    return frame.with_columns(**columns) if columns else frame


def prepared(frame, tmp_path, name="log.csv", **options):
    path = tmp_path / name
    if name.endswith(".parquet"):
        frame.write_parquet(path)
    else:
        frame.write_csv(path)
    return prepare(str(path), PrepareOptions(**options))


def rules(dataset):
    return {rule: (before, after) for rule, before, after in dataset.description.cleaning}


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_a_behaviour_log(tmp_path, name):
    dataset = prepared(log(), tmp_path, name)
    assert dataset.description.timed
    assert list(dataset.description.tasks) == ["click", "cart", "purchase"]
    assert set(dataset.requests.collect()["split"]) == {"train", "valid", "test"}


def test_saved_and_loaded_it_is_the_same(tmp_path):
    dataset = prepared(log(), tmp_path)
    again = Dataset.load(dataset.save(tmp_path / "out"))
    assert again.events.height == dataset.events.height
    assert again.description.digest


def test_a_changed_file_is_noticed(tmp_path):
    out = prepared(log(), tmp_path).save(tmp_path / "out")
    with (out / "events.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadData, match=r"events\.parquet is missing or differs"):
        Dataset.load(out)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_other_names_and_separators(tmp_path, separator):
    frame = log().rename({"behavior": "behavior_type", "timestamp": "time"})
    (tmp_path / "log.txt").write_text(frame.write_csv(separator=separator))
    assert prepare(str(tmp_path / "log.txt"), PrepareOptions()).events.height > 1000


def test_gzip(tmp_path):
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(log().write_csv().encode()))
    assert prepare(str(tmp_path / "log.csv.gz"), PrepareOptions()).events.height > 1000


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(pl.col("timestamp") * 1000, id="milliseconds"),
        pytest.param(pl.from_epoch("timestamp").dt.strftime("%Y-%m-%d %H:%M:%S"), id="dates"),
    ],
)
def test_times_of_any_kind(tmp_path, times):
    dataset = prepared(log(timestamp=times), tmp_path)
    assert dataset.events["timestamp"].min() >= START
    assert dataset.events["timestamp"].max() < START + 30 * 86_400


def test_string_ids_are_hashed(tmp_path):
    dataset = prepared(log(item_id=pl.format("SKU-{}", "item_id"), user_id=pl.format("u{}", "user_id")), tmp_path)
    assert set(dataset.items["item_id"]) <= {stable_id(f"SKU-{i}") for i in range(1, 41)}


def test_items_keep_the_names_of_the_log(tmp_path):
    """Without an item file too, or beside one that lacks some: callers send these, and recorded requests have them."""
    named = log(item_id=pl.format("SKU-{}", "item_id"))
    assert set(prepared(named, tmp_path).items["key"]) == {f"SKU-{item}" for item in range(1, 41)}
    pl.DataFrame({"item_id": ["SKU-1", "SKU-99"], "title": ["a", "b"]}).write_csv(tmp_path / "items.csv")
    items = prepared(named, tmp_path, items=tmp_path / "items.csv").items
    assert set(items["key"]) == {f"SKU-{item}" for item in (*range(1, 41), 99)}
    assert (items["item_id"] == pl.Series([stable_id(key) for key in items["key"]])).all()


def test_new_items_stay_in_the_catalogue(tmp_path):
    pl.DataFrame({"item_id": [1, 1, 777], "title": ["a", "again", "new"]}).write_csv(tmp_path / "items.csv")
    dataset = prepared(log(), tmp_path, items=tmp_path / "items.csv")
    assert dataset.items.filter(pl.col("item_id") == 777)["title"].to_list() == ["new"]
    assert dataset.items.filter(pl.col("item_id") == 1)["title"].to_list() == ["a"]
    assert all(before >= after for _, before, after in dataset.description.cleaning)
    notes = dataset.description.notes["read"]
    assert "items without an event, known by their content alone: 1" in notes
    assert "item file: 1 rows repeat an item, such as '1'; the first one counts" in notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestamp": None}, "rows without a timestamp: 400 of 1,200"),
        ({"behavior": None}, "rows without a behaviour: 400 of 1,200"),
        ({"user_id": None}, "rows without user or item: 400 of 1,200"),
    ],
)
def test_more_than_a_tenth_of_the_rows_is_not_lost_in_silence(tmp_path, changes, words):
    holes = {
        name: pl.when(pl.int_range(pl.len()) % 3 == 0).then(value).otherwise(pl.col(name))
        for name, value in changes.items()
    }
    with pytest.raises(BadData, match=words):
        prepared(log(**holes), tmp_path)


def test_queries_of_nobody_are_told(tmp_path):
    pl.DataFrame({"user_id": ["u1", "u2"], "query": ["lamp", "door"], "timestamp": [START, START]}).write_csv(
        tmp_path / "q.csv"
    )
    with pytest.raises(BadData, match="queries without user, time or words: 2 of 2, where user ids are numbers"):
        prepared(log(), tmp_path, queries=tmp_path / "q.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_system(tmp_path, end):
    (tmp_path / "log.csv").write_bytes(log().write_csv().replace("\n", end).encode())
    assert prepare(str(tmp_path / "log.csv"), PrepareOptions()).events.height > 1000


def test_parquet_under_any_name(tmp_path):
    log().write_parquet(tmp_path / "log.pq")
    assert prepare(str(tmp_path / "log.pq"), PrepareOptions()).events.height > 1000


def test_a_first_column_without_a_name(tmp_path):
    """As pandas writes its index."""
    text = log().with_row_index("").write_csv(separator="\t")
    (tmp_path / "log.tsv").write_text(text)
    assert prepare(str(tmp_path / "log.tsv"), PrepareOptions()).events.height > 1000


def test_cleaning_is_counted_rule_by_rule(tmp_path):
    dirty = pl.concat(
        [
            log(),
            log().head(7),  # duplicates
            log(rows=5, behavior=pl.lit("teleport"), seed=1),
            log(rows=3, timestamp=pl.lit(99_999_999_999), seed=2),
            log(rows=2, timestamp=pl.lit(5, pl.Int64), seed=3),
        ]
    )
    dataset = prepared(dirty, tmp_path)
    found = rules(dataset)
    assert found["unknown behaviour"] == (1217, 1212)
    assert found["impossible timestamp"] == (1212, 1207)
    before, after = found["exact duplicate"]
    assert before - after >= 7


def test_bots_are_dropped(tmp_path):
    bot = log(rows=100, users=1, user_id=pl.lit(777), timestamp=START + 60 + pl.int_range(pl.len()) // 10)
    dataset = prepared(pl.concat([log(), bot.cast(log().schema)]), tmp_path)
    assert 777 not in dataset.events["user_id"].to_list()


def test_k_core(tmp_path):
    rare = log(rows=3, items=1, item_id=pl.lit(9999), seed=5)
    dataset = prepared(pl.concat([log(), rare.cast(log().schema)]), tmp_path, min_count=5)
    assert 9999 not in dataset.items["item_id"].to_list()
    counts = dataset.events.group_by("item_id").len()["len"]
    assert counts.min() >= 5


def test_missing_values_are_dropped_or_filled_and_counted(tmp_path):
    holes = log(item_id=pl.when(pl.int_range(pl.len()) < 4).then(None).otherwise(pl.col("item_id")))
    items = pl.DataFrame({"item_id": range(1, 31), "title": ["a lamp"] * 30, "price": ["3.5"] * 29 + ["?"]})
    items.write_csv(tmp_path / "items.csv")
    dataset = prepared(holes, tmp_path, items=tmp_path / "items.csv")
    found = rules(dataset)
    assert found["user or item missing"] == (1200, 1196)
    assert "missing title filled (10 values)" in found
    assert "missing price filled (11 values)" in found
    assert dataset.items["price"].is_nan().sum() == 11


def test_a_query_file_gives_events_their_search(tmp_path):
    frame = log()
    some = frame.row(600, named=True)
    pl.DataFrame(
        {"user_id": [some["user_id"]], "query": ["red lamp"], "timestamp": [some["timestamp"] - 60]}
    ).write_csv(tmp_path / "q.csv")
    dataset = prepared(frame, tmp_path, queries=tmp_path / "q.csv")
    searched = dataset.requests.collect().filter(pl.col("query") == "red lamp")
    assert searched["user_id"].unique().to_list() == [some["user_id"]]
    assert (searched["timestamp"] - some["timestamp"] + 60).max() <= 1800


def test_without_times_the_last_one_is_left_out(tmp_path):
    dataset = prepared(log().drop("timestamp"), tmp_path)
    assert not dataset.description.timed
    last = dataset.events.group_by("user_id").agg(pl.col("split").last(), pl.col("timestamp").max().alias("last"))
    assert (last["split"] == "test").all()


def test_views_alone_count_as_clicks(tmp_path):
    dataset = prepared(log(behavior=pl.lit("view")), tmp_path)
    assert list(dataset.description.tasks) == ["click"]
    assert set(dataset.events["behaviour"]) == {Behaviour.CLICK}


def sequences(tmp_path, name="S.txt", attributes=False):
    rng = np.random.default_rng(0)
    (tmp_path / name).write_text(
        "\n".join(f"{u} " + " ".join(map(str, rng.integers(1, 30, rng.integers(3, 9)))) for u in range(1, 60))
    )
    if attributes:
        (tmp_path / "S_item2attributes.json").write_text('{"1": [4, 5], "2": [4]}')
    return prepare(str(tmp_path / name), PrepareOptions())


def test_sequences(tmp_path):
    dataset = sequences(tmp_path)
    assert not dataset.description.timed
    assert list(dataset.description.tasks) == ["purchase"]


def test_attributes_beside_sequences_are_found(tmp_path):
    items = sequences(tmp_path, attributes=True).items
    assert items.filter(pl.col("item_id") == 1)["attributes"].to_list() == [["4", "5"]]
    assert items.filter(pl.col("item_id") == 3)["attributes"].to_list() == [[]]


def test_pairs(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [f"{user} {item}" for user in range(1, 40) for item in rng.integers(1, 25, 6)]
    (tmp_path / "P.txt").write_text("\n".join(pairs))
    dataset = prepare(str(tmp_path / "P.txt"), PrepareOptions())
    assert dataset.events.height == len(pairs)
    assert dataset.events.filter(pl.col("user_id") == 1)["item_id"].to_list() == [int(p.split()[1]) for p in pairs[:6]]


def judged(tmp_path, encoding="latin-1"):
    lines = ["id,product_uid,product_title,search_term,relevance"]
    for query in range(60):
        lines += [f'{query},{query * 3 + at},"Café lamp {at}, 5°",lamp {query},{1 + at % 3}' for at in range(4)]
    (tmp_path / "j.csv").write_bytes("\n".join(lines).encode(encoding))
    return prepare(str(tmp_path / "j.csv"), PrepareOptions())


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_judged_search(tmp_path, encoding):
    dataset = judged(tmp_path, encoding)
    assert dataset.description.tasks == {"relevance": 0.0}
    assert dataset.items["title"].str.starts_with("Café lamp").all()
    assert dataset.requests.collect()["labels"].explode().max() == 2


def test_no_query_is_in_two_parts(tmp_path):
    dataset = judged(tmp_path)
    assert dataset.requests.collect().group_by("query").agg(pl.col("split").n_unique())["split"].max() == 1
    assert dataset.requests.collect()["split"].n_unique() == 3


def test_retrieval_for_training_has_not_seen_the_answer(tmp_path):
    """Users whose only events are of a closed pair of items: a similarity fitted on them would give itself away."""
    rng = np.random.default_rng(1)
    crowd = [f"{u} " + " ".join(map(str, rng.integers(1, 20, 8))) for u in range(1, 60)]
    (tmp_path / "S.txt").write_text("\n".join([*crowd, "900 500 501 502 503 504"]))
    dataset = prepare(str(tmp_path / "S.txt"), PrepareOptions())
    own = dataset.requests.collect().filter((pl.col("user_id") == 900) & (pl.col("split") == "train"))
    assert own.height > 0
    for row in own.iter_rows(named=True):
        score = row["retrieval_scores"][row["labels"].index(3.0)]
        assert np.isnan(score) or score < 1e-5


def test_test_candidates_never_get_the_answer_put_in(tmp_path):
    dataset = prepared(log(items=400), tmp_path)
    test = dataset.split("test")
    assert not test["retrieval_scores"].explode().is_nan().any()
    found = test.select((pl.col("labels").list.sum() > 0) != (pl.col("missed").list.len() > 0))
    assert found.to_series().all()


BAD = {
    "missing": (None, "is no file"),
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "binary": (b"user_id,item_id\x00\x01\x02", "binary file"),
    "header only": (b"user_id,item_id,behavior\n", "no row"),
    "no behaviour column": (
        b"user_id,item_id,color\n1,2,red\n",
        "lacks the column behavior; it has user_id, item_id, color",
    ),
    "two columns missing": (b"user_id,colour\n1,2\n", "lacks the columns item_id, behavior"),
    "nothing known": (
        b"user_id,item_id,behavior\n1,2,jump\n",
        r"unknown behaviours: 1 of 1, 'jump' \(1\).*--behaviour jump=click",
    ),
    "too little": (b"user_id,item_id,behavior\n1,2,buy\n", "cannot be split"),
    "negative id": (b"user_id,item_id,behavior\n-4,2,buy\n", "holds -4"),
    "prose": (b"once upon a time\n", "none of"),
    "broken gzip": (b"\x1f\x8b\x08\x00rubbish", "no whole gzip"),
    "letters in a sequence": (b"1 2 3\n2 x 4\n", "row 2 is '2 x 4'"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_told_and_nothing_is_written(tmp_path, content, words):
    path = tmp_path / "in.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadData, match=words):
        prepare(str(path), PrepareOptions()).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1rubbish")
    with pytest.raises(BadData, match="cannot be read as a table"):
        prepare(str(tmp_path / "x.parquet"), PrepareOptions())


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ("amazon/Beauty.txt", {"users": 22_363, "items": 12_101}),
        ("home_depot/search_relevance.csv.gz", {"judgements": 58_335}),
    ],
)
def test_the_real_data(real_data, source, counts):
    dataset = prepare(str(real_data / source), PrepareOptions(max_train=500, max_eval=200))
    assert {name: dataset.description.counts[name] for name in counts} == counts


@pytest.mark.parametrize("where", ["an event", "a request"])
def test_an_id_out_of_range_is_named(where, shop, tmp_path):
    events, requests = shop.events, shop.requests
    if where == "an event":
        events = events.with_columns(item_id=pl.when(pl.int_range(pl.len()) == 7).then(99_999).otherwise("item_id"))
    else:
        requests = requests.with_columns(item_ids=pl.col("item_ids").list.concat([99_999]))
    with pytest.raises(BadData, match=f"{where} has the item 99999, which is none of the {shop.items.height} items"):
        Dataset(shop.items, events, requests, shop.description).save(tmp_path / "data")
    assert not (tmp_path / "data").exists()
