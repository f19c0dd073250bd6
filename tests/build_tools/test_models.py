"""The family of rankers: every architecture and table trains, is served and exports the same way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trirank_backend.features import FeatureSpec
from trirank_build.export.onnx import export
from trirank_build.models.embeddings import embedding_bytes, make_embedding
from trirank_build.models.family import ARCHITECTURES, make_ranker
from trirank_build.recipe import ModelRecipe

ITEMS = 500
SPEC = FeatureSpec(
    history_length=6,
    query_length=3,
    item_fields=("item", "brand", "category", "price"),
    tables={"item": (0, ITEMS + 1), "brand": (ITEMS, 11), "category": (ITEMS + 10, 6), "price": (ITEMS + 15, 5),
            "behaviour": (ITEMS + 19, 6), "time_gap": (ITEMS + 25, 17), "token": (ITEMS + 41, 40)},
    tasks=("click", "purchase"),
)  # fmt: skip
SMALL = {"dim": 16, "heads": 2, "encoder_blocks": 1, "ffn": 32, "dropout": 0.0}
VARIANTS = {
    **{name: {"architecture": name} for name in ARCHITECTURES},
    "full attention": {"attention": "full"},
    "dot product": {"similarity": "dot"},
    "low rank": {"embedding": "low_rank", "embedding_rank": 4},
    "quotient remainder": {"embedding": "quotient_remainder", "embedding_rows": 32},
    "no encoder": {"encoder_blocks": 0},
    "no cross-attention": {"cross_blocks": 0},
}


def ranker(**changes):
    torch.manual_seed(0)
    return make_ranker(SPEC, ModelRecipe(**SMALL | changes)).eval()


def inputs(rng, requests=3, candidates=5):
    shape = SPEC.shape
    history = rng.integers(1, SPEC.vocabulary_size, (requests, 6, 6)).astype(np.int32)
    history[0, :3] = 0  # a short history, padded in front
    arrays = {
        "history": history,
        "query": rng.integers(1, SPEC.vocabulary_size, (requests, 3)).astype(np.int32),
        "candidates": rng.integers(1, SPEC.vocabulary_size, (requests, candidates, 4)).astype(np.int32),
        "dense": rng.normal(size=(requests, candidates, shape.dense)).astype(np.float32),
        "context": rng.normal(size=(requests, shape.context)).astype(np.float32),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def disturbed(model):
    """Weights that start at zero would hide a missing input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_exports_and_depends_on_neither_padding_nor_batch(name, tmp_path):
    parity = export(disturbed(ranker(**VARIANTS[name])), SPEC, tmp_path / "ranker.onnx")
    assert max(parity.by_bucket.values()) < 1e-4
    assert parity.padding < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_learns(name, rng):
    model = disturbed(ranker(**VARIANTS[name])).train()
    model(**inputs(rng)).square().sum().backward()
    unused = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    allowed = {"mask"}  # of masked-item pre-training alone
    if name == "no cross-attention":  # nothing but the newest event's state meets candidates
        allowed |= {"context.weight", "context.bias"}
    if not model.has_states:
        allowed |= {"prior.weight", "log_temperature"}
    assert unused <= allowed


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].get("architecture") != "bst"])
def test_a_state_knows_nothing_of_what_comes_after_it(name, rng):
    """Unless attention is full, in which case pre-training hides what is to be found."""
    model = ranker(**VARIANTS[name])
    history = inputs(rng)["history"]
    changed = history.clone()
    changed[:, -1] = torch.from_numpy(rng.integers(1, SPEC.vocabulary_size, (3, 6)).astype(np.int32))
    known = (history != 0).any(-1)[:, :-1]  # what stands at padded places is never used
    before, after = model.states(history)[:, :-1][known], model.states(changed)[:, :-1][known]
    if name == "full attention":
        assert not torch.allclose(before, after, atol=1e-5)
    else:
        torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_a_masked_event_is_not_seen(rng):
    model = ranker(attention="full")
    history = inputs(rng)["history"]
    masked = torch.zeros(3, 6, dtype=torch.bool)
    masked[:, 4] = True
    changed = history.clone()
    changed[:, 4, :4] = 1
    torch.testing.assert_close(model.states(history, masked), model.states(changed, masked))


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_what_pre_training_teaches_is_what_is_served(attention, rng):
    """A fresh ranker's scores are the affinities that pre-training works on, so that nothing learned is lost."""
    model = ranker(attention=attention)
    given = inputs(rng)
    given["query"].zero_()
    with torch.no_grad():
        model.context.weight.zero_()
        model.context.bias.zero_()
        scores = model(**given)
        state = model.next_state(given["history"])
        logits = model.logits(state[:, None], model.item_vectors(given["candidates"]))[:, 0]
    for task in range(2):
        torch.testing.assert_close(scores[..., task], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_empty_history_ranks_by_the_rest(name, rng):
    model, given = disturbed(ranker(**VARIANTS[name])), inputs(rng)
    given["history"].zero_()
    scores = model(**given)
    assert torch.isfinite(scores).all()
    assert scores.std(dim=1).min() > 0


def test_cosine_does_not_care_how_long_a_vector_is(rng):
    model = ranker()
    states, items = torch.randn(2, 4, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(model.logits(states, items), model.logits(3 * states, 5 * items), atol=1e-3, rtol=1e-3)
    pairs = model.pairs(states, items[:, :4])
    torch.testing.assert_close(pairs, model.logits(states, items[:, :4]).diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", ["plain", "low_rank", "quotient_remainder"])
def test_missing_is_nothing_and_stays_so(kind):
    table = make_embedding(SPEC, ModelRecipe(**SMALL, embedding=kind, embedding_rank=4, embedding_rows=32))
    ids = torch.arange(SPEC.vocabulary_size)
    table(ids).square().sum().backward()
    torch.optim.SGD(table.parameters(), 0.1).step()
    vectors = table(ids)
    assert not vectors[0].any()
    assert len(torch.unique(vectors, dim=0)) == len(ids)  # and no two ids are the same


def test_small_tables_are_small():
    sizes = {
        kind: embedding_bytes(
            make_embedding(SPEC, ModelRecipe(**SMALL, embedding=kind, embedding_rank=2, embedding_rows=32))
        )
        for kind in ("plain", "low_rank", "quotient_remainder")
    }
    rest = (SPEC.vocabulary_size - ITEMS) * 16 * 4
    assert sizes["plain"] == SPEC.vocabulary_size * 16 * 4
    assert sizes["low_rank"] == rest + (ITEMS + 1) * 2 * 4 + 2 * 16 * 4
    assert sizes["quotient_remainder"] == rest + (32 + -(-(ITEMS + 1) // 32)) * 16 * 4


def test_ten_million_items_fit():
    """Sizes alone: weights, gradients and Adam's two moments in single precision."""
    items = 10_000_000
    tables = {n: (f, items) if n == "item" else (f + items, s) for n, (f, s) in SPEC.tables.items()}
    spec = FeatureSpec(**{**vars(SPEC), "tables": tables})
    with torch.device("meta"):
        sizes = {
            kind: embedding_bytes(make_embedding(spec, ModelRecipe(dim=64, embedding=kind, embedding_rows=65_536)))
            for kind in ("plain", "low_rank", "quotient_remainder")
        }
    assert sizes["plain"] == pytest.approx(2.56e9, rel=0.01)
    assert sizes["low_rank"] == pytest.approx(sizes["plain"] / 4, rel=0.01)
    assert sizes["quotient_remainder"] < sizes["plain"] / 100
