"""What titles and requests teach of words, from fitting to a ranker that is served with it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from trirank_backend.features import DENSE, WORDS
from trirank_backend.features.table import DENSE_AT
from trirank_backend.words.lexicon import Lessons, load_words
from trirank_backend.words.queries import QueryReader
from trirank_backend.words.spelling import Speller
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadRecipe
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features, fit_features, refresh_features
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.recipe import load_recipe
from trirank_build.words.lessons import FOLDS, Judged, fold_of, learn, load_folds
from trirank_build.words.lexicon import fit_lexicon

KINDS = {
    "garden hose": "50 ft",
    "water pump": "2 hp",
    "led lamp": "60 watt",
    "oak door": "32 in",
    "paint roller": "9 in",
}
MAKERS = ("Alder", "Fjord", "Maple", "Umber", "Zephyr", "Drift")


def titles() -> list[str]:
    return [f"{maker} {kind.title()} {size} in {colour.title()}" for kind, size in KINDS.items() for maker in MAKERS
            for colour in ("red", "blue")]  # fmt: skip


def fitted(tmp_path, texts, language="english"):
    lexicon = fit_lexicon(texts, language, tmp_path / "words")
    lessons = Lessons.none(len(lexicon.rarity) - 1)
    folder = tmp_path / "words"
    return lexicon, QueryReader(load_words(folder), language, Speller.load(folder), lexicon, lessons)


def test_words_in_the_same_places_are_near_each_other(tmp_path):
    lexicon, reader = fitted(tmp_path, titles())
    number = {word: at for at, word in enumerate(reader.words, 1)}
    span = slice(lexicon.near_starts[number["alder"]], lexicon.near_starts[number["alder"] + 1])
    meaning = dict(zip(lexicon.near_words[span].tolist(), lexicon.near_meaning[span].tolist(), strict=True))
    others = [meaning.get(number[maker.lower()], 0) for maker in MAKERS[1:] if maker.lower() in number]
    assert min(others) > meaning.get(number["roller"], 0)


def test_words_that_are_spelt_alike_are_near_each_other(tmp_path):
    lexicon, reader = fitted(tmp_path, ["hammer drill", "hammering set", "lamp shade", "lamps"] * 3, "any")
    number = {word: at for at, word in enumerate(reader.words, 1)}
    span = slice(lexicon.near_starts[number["hammer"]], lexicon.near_starts[number["hammer"] + 1])
    assert number["hammering"] in lexicon.near_words[span][lexicon.near_letters[span] > 0]
    assert number["shade"] not in lexicon.near_words[span][lexicon.near_letters[span] > 0]


@pytest.mark.parametrize(
    ("language", "texts", "query", "best"),
    [
        ("german", ["Gartenschlauch 20 m grün", "Duschkopf Chrom", "Gartenstuhl Holz"], "gartenschläuche", 0),
        ("german", ["Schlauch für den Garten", "Duschkopf Chrom", "Stuhl Holz"] * 20, "gartenschlauch", 0),
        ("any", ["男士跑步鞋 红色", "女士连衣裙 夏季", "儿童书包 蓝色"], "跑步鞋", 0),
        ("any", ["男士跑步鞋 红色", "女士连衣裙 夏季", "儿童书包 蓝色"], "夏季裙", 1),
        ("english", ["1/2 in. drive socket", "3/4 in. drive socket", "socket wrench"], '.5" socket', 0),
        ("english", ["Refrigerator water filter", "Refrigerator 20 cu. ft.", "Ice maker"] * 4, "refridgerater", 1),
    ],
)
def test_queries_find_their_titles_in_any_language(tmp_path, language, texts, query, best):
    lexicon, reader = fitted(tmp_path, texts, language)
    known = {int(word) for word in reader.read([query]).ids[0] if word}
    assert known
    found = [len(known & set(lexicon.titles[row].tolist())) for row in range(len(texts))]
    assert found[best] == max(found) > 0


def test_few_titles_and_strange_ones_can_be_fitted(tmp_path):
    for number, texts in enumerate((["one"], ["", ""], ["a b"] * 3, ["🦊", "\0", "x" * 10_000, "½ in"])):
        lexicon, reader = fitted(tmp_path / str(number), texts)
        assert len(lexicon.titles) == len(texts) + 1
        assert np.isfinite(reader.read(["one fox"]).vectors).all()


def judged(reader, kinds=("fridge", "faucet"), answers=("refrigerator", "tap"), times=12) -> Judged:
    """Queries in words that no title has, whose good titles share a word."""
    queries, request, rows, labels = [], [], [], []
    for at in range(times):
        for query, _ in zip(kinds, answers, strict=True):
            row = len(queries)
            queries.append(f"{query} {at % 3}")
            for item in range(4):
                request.append(row)
                rows.append(item)
                labels.append(2.0 if (item < 2) == (query == kinds[0]) else 0.0)
    categories = np.array([11, 11, 12, 12, 0], np.int32)
    return Judged(queries, np.array(request), np.array(rows), np.array(labels, np.float32), categories)


def taught(tmp_path):
    texts = ["steel refrigerator fridge", "white refrigerator", "kitchen tap", "tap faucet"]
    lexicon, reader = fitted(tmp_path, texts)
    return lexicon, reader, learn(judged(reader), reader)


def test_lessons_say_which_titles_words_a_querys_word_asks_for(tmp_path):
    _, reader, lessons = taught(tmp_path)
    number = {word: at for at, word in enumerate(reader.words, 1)}
    span = slice(lessons.told_starts[number["fridg"]], lessons.told_starts[number["fridg"] + 1])
    told = dict(zip(lessons.told_words[span].tolist(), lessons.told[span].tolist(), strict=True))
    assert told.get(number["refriger"], 0) > 0
    assert number["tap"] not in told


def test_lessons_say_which_category_a_query_asks_for(tmp_path):
    _, reader, lessons = taught(tmp_path)
    found = reader.of(lessons).read(["fridge", "faucet", "unheard of"])
    assert found.intents[:2, 0].tolist() == [11, 12]
    assert (found.shares[:2, 0] > 0.6).all()
    assert found.shares[:2].sum(1) == pytest.approx(1, abs=1e-4)
    assert not found.shares[2].any()


def test_no_request_teaches_nothing(tmp_path):
    lexicon, reader = fitted(tmp_path, titles())
    none = Judged([], np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(61, np.int32))
    lessons = learn(none, reader)
    assert len(lessons.told) == len(lessons.queries) == len(lessons.intent_classes) == 0
    assert len(lessons.missing) == len(lexicon.rarity)


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Dataset:
    """Judgements in the form of Home Depot's, in which synonyms matter."""
    folder = tmp_path_factory.mktemp("searched")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(240):
        kind = list(KINDS)[number % len(KINDS)]
        asked = {"garden hose": "watering tube", "led lamp": "light"}.get(kind, kind)
        for item in rng.choice(60, 6, replace=False):
            title = titles()[item]
            good = kind.title() in title
            rows.append((item + 1, title, f"{asked} {MAKERS[number % 6].lower()} {number}", 3.0 if good else 1.33))
    table = pl.DataFrame(rows, schema=["product_uid", "product_title", "search_term", "relevance"], orient="row")
    table.write_csv(folder / "judged.csv")
    dataset = prepare(str(folder / "judged.csv"), PrepareOptions())
    kind = pl.col("title").str.extract("(?i)(" + "|".join(KINDS) + ")")
    dataset = dataclasses.replace(dataset, items=dataset.items.with_columns(category=kind))
    dataset.save(folder / "dataset")
    return Dataset.load(folder / "dataset")


RECIPE = load_recipe("judged_search").changed({"features.words": "english"})


@pytest.fixture(scope="module")
def features(searched, tmp_path_factory) -> Features:
    folder = tmp_path_factory.mktemp("features")
    return fit_features(searched, RECIPE.features, folder)


def test_columns_come_last_and_only_where_they_are_asked_for(searched, features, tmp_path):
    assert features.spec.dense == DENSE + WORDS
    plain = fit_features(searched, RECIPE.changed({"features.words": ""}).features, tmp_path)
    assert plain.spec.dense == DENSE
    one, other = (Examples.read(searched, "valid", each).whole(np.arange(4)) for each in (features, plain))
    np.testing.assert_array_equal(one.packed.dense[..., : len(DENSE)], other.packed.dense)
    assert one.packed.dense[..., len(DENSE) :].any()
    assert not (tmp_path / "words").exists()


LEARNED = ("told_mean", "neighbours_lift", "neighbours_mass", "lesson", "query_intent")


@pytest.mark.parametrize("name", LEARNED)
def test_training_reads_lessons_that_its_own_query_is_not_in(searched, features, name):
    assert len(features.folds) == FOLDS
    train = Examples.read(searched, "train", features)
    batch = train.whole(np.arange(len(train)))
    column = batch.packed.dense[..., getattr(DENSE_AT, name)]
    reader = features.text.reader
    for at in (0, 7, 30):
        fold = fold_of(reader.key(train.queries[at]))
        own = Features(features.folds[fold].packer, features.folds[fold].text)
        alone = Examples.read(searched, "train", own).whole(np.array([at]))
        np.testing.assert_allclose(column[at], alone.packed.dense[0, :, getattr(DENSE_AT, name)], atol=1e-6)
    # Lessons that saw the query say something else: they are what requests that are served are read with.
    seen = Examples.read(searched, "train", Features(features.packer, features.text)).whole(np.arange(len(train)))
    assert not np.allclose(column, seen.packed.dense[..., getattr(DENSE_AT, name)])


def test_the_category_that_a_query_asks_for_is_a_column_and_a_signal(searched, features):
    from trirank.contract import Signal

    valid = Examples.read(searched, "valid", features).whole(np.arange(10))
    share = valid.packed.dense[..., DENSE_AT.query_intent]
    said = (valid.packed.signals & Signal.MATCHES_INTENT.value) > 0
    assert ((share >= 0.2) == said)[valid.valid].all()
    assert said.any()
    good = valid.labels > 1
    assert share[good].mean() > 2 * share[valid.valid & ~good].mean()


def test_queries_of_the_same_words_are_in_one_fold(features):
    reader = features.text.reader
    ways = ("garden hose red", "Garden  Hose red ", "red garden hoses")
    assert len({fold_of(reader.key(way)) for way in ways}) == 1
    assert len({fold_of(reader.key(f"garden {word}")) for word in "abcdefghijklmnop"}) > 2


def test_lessons_where_nothing_was_good_are_none(tmp_path):
    _, reader = fitted(tmp_path, titles())
    bad = Judged(
        ["hose"] * 2, np.array([0, 0, 1]), np.array([0, 1, 2]), np.zeros(3, np.float32), np.zeros(61, np.int32)
    )
    lessons = learn(bad, reader)
    assert len(lessons.told) == len(lessons.intent_classes) == 0
    assert not reader.of(lessons).read(["hose"]).shares.any()


def test_a_query_that_few_have_asked_leaves_no_vector(tmp_path):
    _, reader = fitted(tmp_path, titles())
    asked = judged(reader, ("garden hose", "oak door"))
    everything = learn(asked, reader)
    of_many = np.array([query == "garden hose 0" for query in asked.queries])
    told = learn(dataclasses.replace(asked, told=of_many), reader)
    assert len(everything.queries) == 6
    assert len(told.queries) == 1
    np.testing.assert_array_equal(told.told, everything.told)


def test_fitting_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from trirank_build.words.lexicon import fit_lexicon; "
        "parts = [text.split() for text in ('qw er ty', 'as df gh', 'zx cv bn')]; "
        "fit_lexicon([f'{a} {b} {c}' for a in parts[0] for b in parts[1] for c in parts[2]], 'any', Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True,
                       env=os.environ | {"PYTHONHASHSEED": seed})  # fmt: skip
    one, other = ({p.name: p for p in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert one.keys() == other.keys()
    for name, path in one.items():
        if name.endswith(".npy"):  # the last digits of a factorisation are the processor's own
            np.testing.assert_allclose(np.load(path), np.load(other[name]), atol=1 if "vectors" in name else 0)
        else:
            assert path.read_bytes() == other[name].read_bytes()
    near = [np.load(each["word_vectors.npy"]) for each in (one, other)]
    np.testing.assert_allclose(*near, atol=1e-4)


def test_a_batch_of_several_folds_is_what_its_requests_are_alone(searched, features):
    train = Examples.read(searched, "train", features)
    which = np.array([5, 0, 11, 3])
    together = train.whole(which)
    for place, at in enumerate(which):
        alone = train.whole(np.array([at]))
        for name, column in alone.packed._asdict().items():
            np.testing.assert_array_equal(getattr(together.packed, name)[place], column[0], err_msg=name)


def test_words_are_kept_when_the_specification_changes(searched, features):
    changed = features.changed(history_length=1, without=("retrieval",))
    assert changed.packer.lexicon is features.packer.lexicon
    assert len(changed.folds) == FOLDS
    batch = Examples.read(searched, "valid", changed).whole(np.arange(3))
    assert batch.packed.dense[..., DENSE_AT.word_bm25].any()


def test_a_newer_catalogue_is_read_with_the_old_words(searched, features, tmp_path):
    trained = tmp_path / "old"
    fit_features(searched, RECIPE.features, _made(trained))
    items = searched.items.with_columns(
        title=pl.when(pl.col("item_id") == 1).then(pl.lit("Fjord Oak Door 32 in in Red")).otherwise(pl.col("title"))
    )
    newer = Dataset(items, searched.events, searched.requests, searched.description)
    found = refresh_features(trained, newer, _made(tmp_path / "new"))
    words = load_words(tmp_path / "new" / "words")
    assert words == load_words(trained / "words")
    row = found.catalogue.rows(np.array([1]))[0]
    named = [words[number - 1] for number in found.packer.lexicon.titles[row] if number]
    assert named[:3] == ["fjord", "oak", "door"]
    assert load_folds(tmp_path / "new" / "words", len(words))


def _made(folder):
    folder.mkdir()
    return folder


def test_a_language_that_nobody_stems_is_refused_by_name():
    with pytest.raises(BadRecipe, match="klingon.* is no language; they are any, arabic"):
        load_recipe("shop").changed({"features.words": "klingon"})


def test_privacy_goes_without_words():
    with pytest.raises(BadRecipe, match="lessons on words have no noise"):
        load_recipe("shop_private").changed({"features.words": "english"})


def test_an_encoder_goes_with_words():
    with pytest.raises(BadRecipe, match="encoder goes with words"):
        load_recipe("shop").changed({"features.encoder": "somewhere"})


def test_a_damaged_word_list_is_refused(searched, tmp_path):
    from trirank_backend.errors import InvalidRelease

    fit_features(searched, RECIPE.features, _made(tmp_path / "f"))
    (tmp_path / "f" / "words" / "words.json").write_text("{")
    with pytest.raises(InvalidRelease, match="assemble again"):
        Features.load(tmp_path / "f")


def test_a_release_understands_what_its_training_understood(searched, tmp_path):
    """Trained, exported, assembled: the stages of the release pack what training packed, and rank by it."""
    from trirank import contract
    from trirank_backend.pipeline import Pipeline
    from trirank_build.repository.assemble import assemble
    from trirank_build.repository.release import graph_place
    from trirank_build.repository.reports import export_run
    from trirank_build.training.trainer import train

    run = train(RECIPE.changed({"training.epochs": 1}), searched, tmp_path / "run")
    export_run(run, tmp_path / "ranker.onnx")
    release = assemble(run, searched, tmp_path / "ranker.onnx", tmp_path / "releases", engine="onnxruntime")
    words = release / "features" / "words"
    assert (words / "told.npy").is_file()
    assert not list(words.glob("fold-*"))  # which training alone reads
    pipeline = Pipeline.load(release, release / graph_place("ensemble"), "onnxruntime")
    examples = Examples.read(searched, "valid", run.features)
    for at in range(3):
        count = int((examples.rows[at] >= 0).sum())
        bucket = contract.bucket_for(count)
        ids, scores = np.full((1, bucket), contract.PAD_ITEM_ID, np.int64), np.zeros((1, bucket), np.float32)
        ids[0, :count], scores[0, :count] = examples.ids[examples.rows[at, :count]], examples.scores[at, :count]
        request = {
            "USER_ID": np.array([[contract.ANONYMOUS_USER]], np.int64), "ITEM_IDS": ids,
            "TOP_K": np.array([[count]], np.int32), "SCENARIO": np.array([[b"search"]], object),
            "QUERY": np.array([[examples.queries[at].encode()]], object), "RETRIEVAL_SCORES": scores,
        }  # fmt: skip
        prepared = pipeline._preprocess([request])[0]
        trained = examples.whole(np.array([at])).packed.dense[0, :count]
        np.testing.assert_allclose(prepared.ranker["dense"][0, :count], trained, atol=1e-5)
        assert trained[:, len(DENSE) :].any()
        assert len(pipeline([request])) == 1
    pipeline.close()


def test_a_shop_keeps_vectors_of_queries_that_many_users_asked(shop, tmp_path):
    from trirank_build.privacy.queries import shared

    found = fit_features(shop, load_recipe("shop").changed({"features.words": "english"}).features, tmp_path)
    asked = shop.requests.filter((pl.col("split") == "train") & (pl.col("query") != ""))
    kept, different = len(found.packer.lessons.queries), asked.select(pl.col("query").n_unique()).collect().item()
    assert 0 < kept <= len(shared(asked, 5)) < different
