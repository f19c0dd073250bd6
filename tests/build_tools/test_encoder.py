"""A team's own text encoder, here a tiny one: words it knows have vectors, and synonyms the same one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from trirank_backend.errors import InvalidRelease
from trirank_backend.features.table import DENSE_AT
from trirank_backend.words.encoder import SentenceEncoder
from trirank_build.data.dataset import Dataset
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features, fit_features
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.recipe import load_recipe

MEANINGS = {"hose": 0, "schlauch": 0, "tube": 0, "lamp": 1, "lampe": 1, "door": 2, "tür": 2}


def make_encoder(folder: Path, width: int = 8, pooled: bool = False, inputs=("input_ids", "attention_mask")) -> Path:
    """An embedding table as an ONNX graph in sentence-transformers' shape, and its tokeniser."""
    folder.mkdir(parents=True)
    words = ["[UNK]", *MEANINGS]
    rng = np.random.default_rng(0)
    meanings = np.eye(3, width) + rng.normal(0, 0.01, (3, width))
    table = np.stack([np.full(width, 0.01), *(meanings[at] for at in MEANINGS.values())]).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    shape: list = ["batch", "length", width]
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["last_hidden_state", "axis"], ["vectors"], keepdims=0))
        shape = ["batch", width]
    graph = helper.make_graph(
        nodes, "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in inputs],
        [helper.make_tensor_value_info("vectors" if pooled else "last_hidden_state", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("pooled", [False, True])
def test_texts_become_vectors_of_length_one_in_any_company(tmp_path, pooled):
    encoder = SentenceEncoder(make_encoder(tmp_path / "encoder", pooled=pooled))
    alone = np.concatenate([encoder.encode([text]) for text in ("hose", "schlauch", "lamp")])
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
    assert alone[0] @ alone[1] > 0.99
    assert alone[0] @ alone[2] < 0.2
    if not pooled:  # a graph that pools by itself has to mind the mask by itself, too
        together = encoder.encode(["hose", "a much longer text about no hose at all", "schlauch", "lamp"])
        np.testing.assert_allclose(together[[0, 2, 3]], alone, atol=1e-5)


def test_a_text_without_tokens_has_no_vector(tmp_path):
    encoder = SentenceEncoder(make_encoder(tmp_path / "encoder"))
    assert not encoder.encode(["", "  "]).any()
    assert encoder.encode(["x " * 50_000]).shape == (1, 8)


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("judged")
    titles = ["green hose", "red hose", "desk lamp", "oak door", "lamp with door", "hose reel"]
    rows = [
        (
            item + 1,
            title,
            f"{query} {number}",
            3.0 if MEANINGS[query] in {MEANINGS.get(w) for w in title.split()} else 1,
        )
        for number in range(40)
        for query in ("schlauch", "lampe", "tür")
        for item, title in enumerate(titles)
    ]
    table = pl.DataFrame(rows, schema=["product_uid", "product_title", "search_term", "relevance"], orient="row")
    table.write_csv(folder / "judged.csv")
    prepare(str(folder / "judged.csv"), PrepareOptions()).save(folder / "dataset")
    return Dataset.load(folder / "dataset")


def fit(dataset: Dataset, encoder: Path, folder: Path) -> Features:
    folder.mkdir()
    recipe = load_recipe("judged_search").changed({"features.words": "any", "features.encoder": str(encoder)})
    return fit_features(dataset, recipe.features, folder)


def test_a_query_in_another_language_finds_its_titles_by_the_encoder(judged, tmp_path):
    features = fit(judged, make_encoder(tmp_path / "encoder"), tmp_path / "features")
    train = Examples.read(judged, "train", features)
    batch = train.whole(np.arange(len(train)))
    cosine, good = batch.packed.dense[..., DENSE_AT.encoder_cosine], batch.labels > 1
    assert cosine[good].min() > cosine[~good & batch.valid].max()
    assert (np.abs(cosine) <= 1.02).all()
    # No title has a word of these queries, so that nothing else could tell.
    assert not batch.packed.dense[..., DENSE_AT.word_share].any()


def test_features_bring_their_encoder_along(judged, tmp_path):
    made = make_encoder(tmp_path / "encoder")
    fit(judged, made, tmp_path / "features")
    (made / "model.onnx").unlink()
    found = Features.load(tmp_path / "features").text.understood(["schlauch", ""])
    assert found.encoded.shape == (2, 8)
    assert found.encoded[0].any()
    assert not found.encoded[1].any()


def test_an_encoder_of_another_width_is_refused_with_both(judged, tmp_path):
    fit(judged, make_encoder(tmp_path / "encoder"), tmp_path / "features")
    wider = make_encoder(tmp_path / "wider", width=12)
    (wider / "model.onnx").rename(tmp_path / "features" / "words" / "encoder" / "model.onnx")
    with pytest.raises(InvalidRelease, match="vectors of 12 numbers, those of the items have 8; fit the features"):
        Features.load(tmp_path / "features")


def pooling(folder, mode):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({mode: True, "word_embedding_dimension": 8}))


def test_the_graph_may_lie_where_sentence_transformers_puts_it(tmp_path):
    folder = make_encoder(tmp_path / "encoder")
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    assert SentenceEncoder(folder).width == 8


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "model.onnx").unlink(), "holds no text encoder"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "holds no text encoder"),
        (lambda f: (f / "model.onnx").write_bytes(b"no graph"), "holds no text encoder"),
        (lambda f: (f / "model.onnx_data").write_bytes(b""), "keeps its weights beside it"),
        (lambda f: (f / "2_Dense").mkdir(), "which the graph must contain"),
        (lambda f: pooling(f, "pooling_mode_max_tokens"), "asks for pooling_mode_max_tokens"),
    ],
)
def test_a_damaged_encoder_is_refused(tmp_path, spoil, said):
    folder = make_encoder(tmp_path / "encoder")
    spoil(folder)
    with pytest.raises(InvalidRelease, match=said):
        SentenceEncoder(folder)


def test_a_graph_that_takes_something_else_is_refused(tmp_path):
    folder = make_encoder(tmp_path / "encoder", inputs=("input_ids", "pixels"))
    with pytest.raises(InvalidRelease, match="takes pixels; a text encoder takes"):
        SentenceEncoder(folder)


def test_the_first_state_is_taken_where_the_pooling_says_so(tmp_path):
    folder = make_encoder(tmp_path / "encoder")
    pooling(folder, "pooling_mode_cls_token")
    found = SentenceEncoder(folder).encode(["hose lamp", "hose"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
