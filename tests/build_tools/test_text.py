"""Text classifiers: reading, training, what they find, compression, and what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl
import pytest
import torch
import trirank_build.text.model as text_model
from trirank_build.data.dataset import REVIEWS, SENTIMENT, Dataset
from trirank_build.errors import BadCheckpoint, BadData, BadModel, BadRecipe, BadUsage
from trirank_build.features.fitting import fit_features
from trirank_build.recipe import load_recipe
from trirank_build.text.corpus import read_corpus
from trirank_build.text.evaluation import evaluate_text
from trirank_build.text.linear import fit_linear, presence
from trirank_build.text.model import TextModel, compress_text, label_table
from trirank_build.text.reading import HIDDEN, PADDING, Reader
from trirank_build.text.recipe import ReadingRecipe, TextRecipe, load_text_recipe
from trirank_build.text.reviews import with_reviews
from trirank_build.text.training import Labelling, Masking, TextRun, logits_of, make_classifier, train_text

GOOD, BAD = ("wonderful", "excellent", "sturdy", "很好", "schön"), ("broken", "awful", "flimsy", "很差", "kaputt")
THINGS = ("lamp", "hose", "backpack", "keyboard", "灯", "Lampe")


def reviews(count: int = 600, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences whose sentiment is that of one of their words, "not" turning it round."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        good = bool(rng.random() < 0.5)
        turned = bool(rng.random() < 0.3)
        word = rng.choice(GOOD if good else BAD)
        found.append(
            (f"the {rng.choice(THINGS)} number {number} is {'not ' if turned else ''}{word}", int(good != turned))
        )
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "reviews.csv"
    pl.DataFrame(reviews(), schema=["review", "positive"], orient="row").write_csv(path)
    return path


TINY = TextRecipe.model_validate({
    "name": "tiny",
    "reading": {"units": "subwords", "vocabulary": 200, "length": 24},
    "model": {"length": 16, "dim": 32, "heads": 2, "blocks": 1, "ffn": 64, "rows": 256, "dropout": 0.1},
    "pretraining": {"epochs": 1}, "training": {"epochs": 5, "learning_rate": 3e-3, "batch_size": 32, "warmup_steps": 5},
    "compression": {"calibration_texts": 64, "min_accuracy_ratio": 0.9, "min_agreement": 0.9},
})  # fmt: skip


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    corpus = read_corpus(table, "sentiment")
    out = tmp_path_factory.mktemp("run") / "run"
    return corpus, train_text(corpus, TINY, out, task="sentiment", source=table.name, read={"seed": 7})


@pytest.fixture(scope="module")
def small(trained, tmp_path_factory):
    corpus, run = trained
    folder = tmp_path_factory.mktemp("small") / "model"
    return compress_text(run, corpus, folder), TextModel.load(folder), folder


def test_a_text_and_its_repetitions_are_in_one_part_and_parts_have_all_classes(table, tmp_path):
    twice = pl.concat([pl.read_csv(table), pl.read_csv(table).head(50)])
    twice.write_csv(tmp_path / "twice.csv")
    one, other = read_corpus(table, "sentiment"), read_corpus(tmp_path / "twice.csv", "sentiment")
    assert one.digest == other.digest
    assert {len(set(one.part(name)[1].tolist())) for name in ("train", "valid", "test")} == {2}
    assert [len(one.part(name)[0]) for name in ("train", "valid", "test")] == pytest.approx([480, 60, 60], abs=25)


def test_texts_that_are_read_alike_are_in_one_part(tmp_path):
    rows = [(f"Text Number {i}", i % 2) for i in range(200)] + [(f"text  number {i}", i % 2) for i in range(200)]
    pl.DataFrame(rows, schema=["text", "label"], orient="row").write_csv(tmp_path / "t.csv")
    found = read_corpus(tmp_path / "t.csv", "labels")
    part = dict(zip(found.texts, found.split.tolist(), strict=True))
    assert all(part[f"Text Number {i}"] == part[f"text  number {i}"] for i in range(200))


def test_labels_of_few_texts_are_in_every_part(tmp_path):
    rows = [(f"text {label} {i}", f"label {label}") for label in range(30) for i in range(12)]
    pl.DataFrame(rows, schema=["text", "label"], orient="row").write_csv(tmp_path / "t.csv")
    found = read_corpus(tmp_path / "t.csv", "labels")
    assert all(len(set(found.part(name)[1].tolist())) == 30 for name in ("train", "valid", "test"))


def test_a_text_with_two_labels_teaches_nothing(table, tmp_path):
    torn = pl.concat([pl.read_csv(table), pl.read_csv(table).head(1).with_columns(positive=1 - pl.col("positive"))])
    torn.write_csv(tmp_path / "torn.csv")
    found = read_corpus(tmp_path / "torn.csv", "sentiment")
    assert pl.read_csv(table)["review"][0] not in found.texts
    assert ("one text, several labels", 601, 599) in found.cleaning


@pytest.mark.parametrize(
    ("rows", "task", "said"),
    [
        ([("a text", "1")] * 3, "sentiment", "nothing but 'positive'; a classifier needs two labels"),
        ([(f"t{i}", i % 2) for i in range(40)] + [("one", "maybe")], "sentiment", "'maybe', which is neither positive"),
        ([(f"t{i}", "a" if i else "b") for i in range(40)], "labels", "fewer than 10 different texts \\('b' 1\\)"),
        ([("", "1"), (" ", "0")], "sentiment", "no row of .* is left after cleaning"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(rows, task, said, tmp_path):
    pl.DataFrame(rows, schema=["text", "label"], orient="row", strict=False).write_csv(tmp_path / "t.csv")
    with pytest.raises(BadData, match=said):
        read_corpus(tmp_path / "t.csv", task)


def test_a_column_that_is_not_there_is_named_with_those_that_are(table):
    with pytest.raises(BadData, match="columns review, positive; --text body is none. Name the one with --text"):
        read_corpus(table, "sentiment", text="body")
    with pytest.raises(BadData, match="none is called category or label"):
        read_corpus(table, "category")


def test_a_very_long_text_is_read_as_far_as_it_says_something(table, tmp_path):
    long = pl.DataFrame({"review": ["good " * 25_000], "positive": [1]})
    pl.concat([pl.read_csv(table), long]).write_csv(tmp_path / "long.csv")
    found = read_corpus(tmp_path / "long.csv", "sentiment")
    assert max(map(len, found.texts)) == 20_000
    assert any("more than 20,000 letters" in note for note in found.notes)


@pytest.mark.parametrize("units", ["characters", "subwords"])
def test_readers_give_units_and_what_stands_together(units):
    reader = Reader.fit(["abc abd", "abe abf", "xyz"] * 5, ReadingRecipe(units=units, vocabulary=100, length=6))
    read = reader.read(["abc abd", "", "a" * 50, "\u4f60\u597d"])
    assert read.shape == (4, 6)
    assert not read[1].any()
    found = reader.inputs(read, 6, 64)
    fields, grams = found["fields"], found["grams"]
    assert fields.shape == (4, 6, 4)
    assert (fields[..., 0] == read).all()
    assert ((fields[..., 1:] == 0) | (fields[..., 1:] >= reader.units)).all()
    assert fields.max() < reader.units + 64
    assert grams.max() < reader.size
    assert not grams[1].any()


def test_an_n_gram_counts_once_and_none_reaches_into_what_is_hidden():
    reader = Reader.fit(["ab ab ab"], ReadingRecipe(units="characters", vocabulary=100, length=8))
    read = reader.read(["ababab"])
    pairs = reader.hashes(read)[0, :, 1]
    assert (pairs > 0).sum() == 2
    hidden = read.copy()
    hidden[0, 1] = HIDDEN
    assert not reader.hashes(hidden)[0, 0:2, 1].any()


def test_the_linear_model_has_a_number_for_what_two_texts_have():
    reader = Reader.fit(["abcd", "abce", "xyxy"], ReadingRecipe(units="characters", vocabulary=100, length=8))
    assert len(reader.known) == 3  # ab, bc, abc
    assert (reader.inputs(reader.read(["abcd"]), 8, 64)["grams"] >= reader.units).sum() == 3
    assert (reader.inputs(reader.read(["xyxy"]), 8, 64)["grams"] >= reader.units).sum() == 0


def test_the_encoder_sees_a_long_texts_ends_and_the_linear_model_all_of_it():
    reader = Reader.fit(["abcdefghij"] * 5, ReadingRecipe(units="characters", vocabulary=100, length=10))
    units = reader.read(["abcdefghij", "abc"])
    found = reader.inputs(units, 4, 64)
    letters = {unit: letter for letter, unit in reader.tokenizer.get_vocab().items()}
    seen = ["".join(letters[unit] for unit in row if unit) for row in found["fields"][..., 0]]
    assert seen == ["abij", "abc"]
    assert found["grams"].shape == (2, 40)
    assert (found["grams"][0] > 0).sum() == 10 + 9 + 8 + 7


def test_masks_hide_what_is_to_be_found():
    reader = Reader.fit(["the cat sat on the mat"] * 5, ReadingRecipe(units="characters", vocabulary=100, length=32))
    units = reader.read(["the cat sat on the mat"] * 40)
    model = make_classifier(reader, 2, TINY)
    phase = Masking(model, reader, TINY.pretraining, units, units, 0)
    batch = phase.batch(np.arange(40), np.random.default_rng(0))
    shown = batch["fields"][..., 0].flatten()[batch["at"]]
    assert 0.7 < (shown == HIDDEN).float().mean() < 0.9
    assert (batch["chosen"].numpy() == units[:, :16].flatten()[batch["at"].numpy()]).all()
    assert len(batch["at"]) / (units[:, :16] != PADDING).sum() == pytest.approx(0.15, abs=0.04)


def test_padding_and_company_change_nothing(trained):
    corpus, run = trained
    model, texts = run.model(), corpus.part("test")[0][:5]
    units = run.reader.read(texts)
    alone = np.concatenate([logits_of(model, run.reader, row[None]) for row in units])
    with torch.inference_mode():
        whole = run.reader.inputs(units, 16, 256)
        together = model(**{name: torch.from_numpy(array) for name, array in whole.items()}).numpy()
    np.testing.assert_allclose(alone, together, atol=1e-4)


def test_a_text_of_nothing_is_a_number(trained):
    _, run = trained
    assert np.isfinite(logits_of(run.model(), run.reader, np.zeros((2, 24), np.int32))).all()


def test_the_classifier_learns_what_a_bag_of_words_cannot(trained):
    corpus, run = trained
    texts, labels = corpus.part("test")
    found = evaluate_text(texts, labels, logits_of(run.model(), run.reader, run.reader.read(texts)), run.classes)
    assert found.accuracy.value > 0.9
    share = run.facts["valid_accuracy"]
    assert share["both"] >= max(share["encoder"], share["linear"]) - 1e-9


def test_the_linear_part_in_the_graph_is_the_linear_model(trained):
    corpus, run = trained
    (texts, labels), (judged, truth) = corpus.part("train"), corpus.part("valid")
    told = [presence(run.reader, run.reader.read(part)) for part in (texts, judged)]
    linear = fit_linear(told[0], labels, told[1], truth, 2)
    model, bare = run.model(), run.model()
    with torch.no_grad():
        model.linear.weight.copy_(torch.from_numpy(linear.table(0.5)))
        bare.linear.weight.zero_()
    units = run.reader.read(judged)
    added = logits_of(model, run.reader, units) - logits_of(bare, run.reader, units)
    np.testing.assert_allclose(added, 0.5 * linear.logits(told[1]), atol=1e-4)


def test_a_stopped_training_goes_on_and_another_one_is_not_overwritten(trained, tmp_path):
    corpus, run = trained
    again = train_text(corpus, TINY, run.directory, task="sentiment", source="x")
    assert again.facts == run.facts
    smaller = TINY.model_copy(update={"compression": TINY.compression.model_copy(update={"calibration_texts": 7})})
    assert (
        train_text(corpus, smaller, run.directory, task="sentiment", source="x").recipe.compression.calibration_texts
        == 7
    )
    assert train_text(corpus, TINY, run.directory, task="sentiment", source="x").recipe == TINY
    other = TINY.model_copy(update={"seed": 8})
    with pytest.raises(BadCheckpoint, match="say --fresh to replace it"):
        train_text(corpus, other, run.directory, task="sentiment", source="x")
    (tmp_path / "mine").write_text("")
    with pytest.raises(BadCheckpoint, match="choose another --out$"):
        train_text(corpus, TINY, tmp_path, task="sentiment", source="x", fresh=True)
    with pytest.raises(BadCheckpoint, match="trirank text train TASK FILE"):
        TextRun.load(tmp_path)


def test_a_killed_training_goes_on_where_it_stood(trained, tmp_path, monkeypatch):
    corpus, run = trained
    labelled = Labelling.validate

    def killed(phase):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return labelled(phase)

    seen: list[int] = []
    monkeypatch.setattr(Labelling, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        train_text(corpus, TINY, tmp_path / "run", task="sentiment", source="x")
    monkeypatch.undo()
    again = train_text(corpus, TINY, tmp_path / "run", task="sentiment", source="x")
    assert [point["valid_accuracy"] for point in again.facts["curve"] if "valid_accuracy" in point] == [
        point["valid_accuracy"] for point in run.facts["curve"] if "valid_accuracy" in point
    ]


def test_several_processes_are_refused(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadUsage, match="by one process"):
        train_text(trained[0], TINY, tmp_path / "run", task="sentiment", source="x")


def test_metrics_are_those_of_the_books():
    labels = np.array([0, 0, 0, 1, 1, 2])
    taken = np.array([0, 0, 1, 1, 0, 2])
    found = evaluate_text(list("abcdef"), labels, np.eye(3, dtype=np.float32)[taken], ["x", "y", "z"])
    assert found.accuracy.value == pytest.approx(4 / 6)
    assert found.confusion == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert [(round(c.precision, 4), round(c.recall, 4), round(c.f1, 4)) for c in found.classes] == [
        (0.6667, 0.6667, 0.6667), (0.5, 0.5, 0.5), (1, 1, 1),
    ]  # fmt: skip
    assert found.macro_f1 == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert [row[0] for row in found.worst] == ["c", "e"]


def test_the_page_shows_texts_as_texts(tmp_path):
    evil = "<script>alert(1)</script>"
    logits = np.array([[2, 1], [0, 3]], np.float32)
    evaluate_text([evil, "b"], np.array([1, 1]), logits, ["<b>", "y"]).write(tmp_path / "p.html", evil, "valid")
    page = (tmp_path / "p.html").read_text()
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r"(?:src|href)=|url\(", page)


def test_compression_keeps_what_it_promises_and_is_smaller(small):
    facts, _, _ = small
    assert facts["passed"]
    assert facts["mb"]["int8"] < 0.7 * facts["mb"]["float32"]
    assert facts["module_difference"] < 1e-3


def test_a_compressed_classifier_says_what_the_dense_one_says(small, trained):
    corpus, run = trained
    _, model, _ = small
    texts, labels = corpus.part("test")
    found = model.probabilities(texts)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    own = logits_of(run.model(), run.reader, run.reader.read(texts)).argmax(1)
    assert (found.argmax(1) == own).mean() > 0.9
    assert (found.argmax(1) == labels).mean() > 0.85


def test_texts_that_say_nothing_are_refused_or_left_open(small):
    _, model, _ = small
    with pytest.raises(BadData, match="text 2 of 2 is empty"):
        model.probabilities(["fine", " "])
    strange = model.probabilities(["\u0001\u0002", "x" * 100_000, "ᚠᚢᚦᚨᚱᚲ"])
    assert np.isfinite(strange).all()


def test_a_loss_beyond_the_gate_writes_nothing_unless_told(trained, tmp_path, monkeypatch):
    corpus, run = trained
    usual = text_model.quantised

    def spoilt(*given):
        module = usual(*given)
        with torch.no_grad():
            module.head[3].bias[0] += 100
        return module

    monkeypatch.setattr(text_model, "quantised", spoilt)
    with pytest.raises(
        BadModel, match="accuracy over the dense classifier's is .* the limit is 0.9; .*--allow-failing"
    ):
        compress_text(run, corpus, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not compress_text(run, corpus, tmp_path / "model", allow_failing=True)["passed"]


def test_other_texts_are_refused(trained, tmp_path):
    _, run = trained
    pl.DataFrame(reviews(300, seed=5), schema=["review", "positive"], orient="row").write_csv(tmp_path / "o.csv")
    with pytest.raises(BadData, match="give the file that it was trained on"):
        compress_text(run, read_corpus(tmp_path / "o.csv", "sentiment"), tmp_path / "model")


def test_a_damaged_model_is_refused(small, tmp_path):
    import shutil

    shutil.copytree(small[2], tmp_path / "model")
    (tmp_path / "model" / "model.onnx").write_bytes(b"no")
    with pytest.raises(BadCheckpoint, match="is not the one that text.json names"):
        TextModel.load(tmp_path / "model")


def test_a_table_is_labelled_row_by_row(small, tmp_path):
    _, model, _ = small
    pl.DataFrame({"id": [1, 2, 3], "text": ["the lamp is wonderful", "\x1f", "the hose is awful"]}).write_csv(
        tmp_path / "t.csv"
    )
    assert label_table(model, tmp_path / "t.csv", tmp_path / "out.csv") == (2, 1)
    found = pl.read_csv(tmp_path / "out.csv")
    assert found["predicted"].to_list() == ["positive", None, "negative"]
    assert found.columns == ["id", "text", "predicted", "probability"]


def test_recipes_are_checked():
    assert load_text_recipe("text").name == "text"
    with pytest.raises(BadRecipe, match="neither a file nor one of the shipped text recipes"):
        load_text_recipe("nothing")
    with pytest.raises(ValueError, match="heads = 5 does not divide dim"):
        TextRecipe.model_validate({"name": "x", "model": {"heads": 5}})


def write_reviews(path, dataset, **columns):
    ids = dataset.items["item_id"].to_list()[:3]
    rows = {"item_id": [ids[0]] * 6 + [ids[1]] * 2 + [ids[2], 10**12], "positive": [1] * 6 + [0, 0, 1, 1]} | columns
    pl.DataFrame(rows).write_csv(path)
    return ids


def test_reviews_become_columns_of_the_items(shop, tmp_path):
    ids = write_reviews(tmp_path / "r.csv", shop)
    found = with_reviews(shop, tmp_path / "r.csv")
    items = {row["item_id"]: row for row in found.items.iter_rows(named=True)}
    usual = 7 / 9
    assert items[ids[0]][REVIEWS] == 6
    assert items[ids[0]][SENTIMENT] == pytest.approx((6 + 5 * usual) / 11)
    assert items[ids[1]][SENTIMENT] == pytest.approx(5 * usual / 7)
    assert items[ids[2]][REVIEWS] == 1
    assert found.items.height == shop.items.height
    assert any(
        "9 reviews of 3 items, 78% of them positive; 1 are of other items" in n for n in found.description.notes["read"]
    )
    (tmp_path / "f").mkdir()
    features = fit_features(found, load_recipe("shop").features, tmp_path / "f")
    rows = features.catalogue.rows(np.array(ids))
    sentiment, number = features.packer.kernel_items.sentiment, features.packer.kernel_items.reviews
    assert sentiment[rows[0]] > 0 > sentiment[rows[1]]
    assert number[rows[0]] > number[rows[2]] > 0
    assert not sentiment[-1]


def test_numbers_of_reviews_stay_of_a_size(shop, tmp_path):
    from trirank_build.features.vocabulary import Vocabulary

    items = shop.items.with_columns(pl.lit(0.8).alias(SENTIMENT), pl.lit(10, pl.Int64).alias(REVIEWS))
    counts = np.ones(items.height, np.int64)
    fitted = Vocabulary.fit(items, counts, 0)
    later = items.with_columns(pl.lit(0.79).alias(SENTIMENT), pl.lit(1_000, pl.Int64).alias(REVIEWS))
    assert np.abs(fitted.numbers(items, counts)[:, 2:]).max() < 2
    assert np.abs(fitted.numbers(later, counts)[:, 2:]).max() < 5
    without = Vocabulary.fit(shop.items, counts, 0)
    assert not without.numbers(later, counts)[:, 2:].any()  # the ranker has never seen anything but zeros there


def test_reviews_are_kept_when_a_dataset_is_written(shop, tmp_path):
    ids = write_reviews(tmp_path / "r.csv", shop)
    with_reviews(shop, tmp_path / "r.csv").save(tmp_path / "data")
    found = Dataset.load(tmp_path / "data").items.filter(pl.col("item_id") == ids[0])
    assert found[REVIEWS].item() == 6


def test_reviews_of_the_future_are_left_out(shop, tmp_path):
    late = shop.requests.filter(pl.col("split") != "train").select(pl.col("timestamp").min()).collect().item()
    ids = write_reviews(tmp_path / "r.csv", shop, timestamp=[late - 10] * 5 + [late + 10] * 5)
    found = with_reviews(shop, tmp_path / "r.csv", max_loss=1)
    assert found.items.filter(pl.col("item_id") == ids[0])[REVIEWS].item() == 5
    assert any("5 reviews were written after training's end" in note for note in found.description.notes["read"])


def test_texts_of_reviews_are_judged_by_a_classifier(shop, small, tmp_path):
    ids = shop.items["item_id"].to_list()[:2]
    pl.DataFrame({
        "item_id": [ids[0]] * 4 + [ids[1]] * 8,
        "review": ["the lamp is wonderful", "the hose is excellent", "the lamp is sturdy", "",
                   *["the lamp is awful"] * 8],
    }).write_csv(tmp_path / "r.csv")  # fmt: skip
    found = with_reviews(shop, tmp_path / "r.csv", small[1])
    share = dict(found.items.filter(pl.col(REVIEWS) > 0).select("item_id", SENTIMENT).iter_rows())
    assert share[ids[0]] > 0.5 > share[ids[1]]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"item_id": [1], "review": ["x"]}, "none says whether a review is positive. Train a classifier"),
        ({"review": ["x"], "positive": [1]}, "lacks the column item_id"),
        ({"item_id": [10**12], "positive": [1]}, "none of the 1 reviews"),
    ],
)
def test_reviews_that_say_nothing_are_refused(columns, said, shop, tmp_path):
    pl.DataFrame(columns).write_csv(tmp_path / "r.csv")
    with pytest.raises(BadData, match=said):
        with_reviews(shop, tmp_path / "r.csv")


def test_a_classifier_of_something_else_is_refused(shop, small, tmp_path):
    write_reviews(tmp_path / "r.csv", shop, review=["x"] * 10)
    other = TextModel(small[1].reader, small[1].sizes, {**small[1].facts, "classes": ["a", "b"]}, small[1].session)
    with pytest.raises(BadUsage, match="--text-model tells a, b; reviews want one of sentiments"):
        with_reviews(shop, tmp_path / "r.csv", other)


def test_the_command_goes_from_texts_to_labels(table, tmp_path, capsys):
    from trirank_build.cli import app

    (tmp_path / "tiny.toml").write_text(
        'name = "tiny"\n[reading]\nvocabulary = 200\nlength = 24\n'
        "[model]\ndim = 32\nheads = 2\nblocks = 1\nffn = 32\nrows = 256\n[pretraining]\nepochs = 0\n"
        "[training]\nepochs = 1\n[compression]\nmin_accuracy_ratio = 0.5\nmin_agreement = 0.5\n"
    )
    run, model = tmp_path / "run", tmp_path / "model"

    def said(*words) -> str:
        app([str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    told = said("text", "train", "sentiment", table, "--out", run, "--recipe", tmp_path / "tiny.toml")
    assert "accuracy" in told
    assert "trirank text compress" in told
    page = tmp_path / "page.html"
    assert "page:" in said("text", "evaluate", run, table, "--report", page)
    assert "What is taken for what" in page.read_text()
    found = json.loads(said("text", "evaluate", run, table, "--split", "test", "--json"))
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    assert "limit 0.5" in said("text", "compress", run, table, "--out", model)
    assert "600 texts labelled" in said("text", "label", model, table, "--out", tmp_path / "labels.csv")
