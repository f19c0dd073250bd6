"""Every kind of step does what it says to the tensors."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from trirank_build.compression import chain, factorise, fold, fuse, prune, quantise, search, share
from trirank_build.compression.chain import compress
from trirank_build.compression.finetune import divergences
from trirank_build.compression.recipe import KINDS, parse_recipe
from trirank_build.compression.step import Work
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadRecipe
from trirank_build.evaluation.scoring import score
from trirank_build.export.onnx import export, write_graph
from trirank_build.export.parity import sample_inputs
from trirank_build.features.examples import Examples
from trirank_build.models import forms
from trirank_build.models.family import make_ranker
from trirank_build.models.forms.fuse import Ensemble
from trirank_build.models.forms.prune import Sparse
from trirank_build.models.forms.quantise import QuantisedLinear, QuantisedTable
from trirank_build.models.forms.share import Coded
from trirank_build.models.ranker import SharedContextRanker
from trirank_build.recipe import Recipe
from trirank_build.training.run import TrainedRun
from trirank_build.training.trainer import train

NO_TRAINING = {"epochs": 0}


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture
def model(trained):
    return trained.model()


@pytest.fixture
def deep(trained):
    """A ranker of three encoder blocks and four heads, with weights of chance."""
    torch.manual_seed(1)
    sizes = trained.recipe.model.model_copy(update={"encoder_blocks": 3, "heads": 4})
    return make_ranker(trained.features.spec, sizes).eval()


@pytest.fixture
def inputs(trained, rng):
    return tensors(trained.features.spec, rng)


def tensors(spec, rng, batch=3, candidates=20):
    return {name: torch.from_numpy(array) for name, array in sample_inputs(spec, batch, candidates, rng).items()}


def scores(model, inputs):
    with torch.inference_mode():
        return model.eval()(**inputs)


def settings(kind, **values):
    return KINDS[kind].Settings.model_validate({"kind": kind, "training": NO_TRAINING} | values)


def checked(kind, model, trained, **values):
    return KINDS[kind].check(model, settings(kind, **values), trained.features)[0]


def recipe_of(*steps, **more):
    return parse_recipe({"name": "chain", "training": NO_TRAINING, "steps": list(steps)} | more)


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Pruning


@pytest.mark.parametrize(("values", "gone"), [
    ({"heads": 0.5}, ["encoder.0.attention.query.weight", "encoder.0.attention.key_value.weight",
                      "cross.0.attention.out.weight"]),
    ({"ffn": 0.75}, ["encoder.0.ffn.0.weight", "cross.0.ffn.2.weight", "head.0.weight"]),
    ({"width": 0.5}, ["embedding.weight", "encoder.0.ffn.0.weight", "cross.0.attention.query.weight", "position",
                      "norm_out.weight", "head.0.weight", "prior.weight"]),
    ({"history_length": 4}, ["position"]),
])  # fmt: skip
def test_pruned_tensors_are_smaller(model, trained, values, gone):
    before = {name: p.numel() for name, p in model.named_parameters()}
    pruned = checked("prune", model, trained, **values)
    after = {name: p.numel() for name, p in pruned.named_parameters()}
    assert all(after[name] < before[name] for name in gone)
    assert all(after[name] <= before[name] for name in after)


def test_a_pruned_graph_is_smaller(model, trained, tmp_path, rng):
    spec = trained.features.spec
    write_graph(model, spec, tmp_path / "dense.onnx")
    pruned, features = prune.check(
        copy.deepcopy(model), settings("prune", heads=0.5, ffn=0.5, width=0.5, history_length=4), trained.features
    )
    write_graph(pruned, features.spec, tmp_path / "pruned.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("dense", "pruned")]
    assert sizes[1] < 0.65 * sizes[0]
    history = next(v for v in onnx.load(tmp_path / "pruned.onnx").graph.input if v.name == "history")
    assert history.type.tensor_type.shape.dim[1].dim_value == 4


def test_removing_what_does_nothing_changes_nothing(deep, inputs):
    """A head whose output goes nowhere, places of the feed-forward that nothing reads, a block that adds nothing."""
    with torch.no_grad():
        size = deep.cross[0].attention.head_dim
        deep.cross[0].attention.out.weight[:, size : 2 * size] = 0  # the second head
        deep.encoder[0].ffn[2].weight[:, :8] = 0
        for part in (deep.encoder[1].attention.out, deep.encoder[1].ffn[2]):
            part.weight.zero_()
            part.bias.zero_()
    whole = scores(deep, inputs)
    decisions = {"heads": {"cross.0.attention": [0, 2, 3]}, "ffn": {"encoder.0.ffn": list(range(8, 32))},
                 "blocks": [0, 2]}  # fmt: skip
    torch.testing.assert_close(scores(forms.prune.rebuild(deep, decisions), inputs), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("importance", ["magnitude", "gradient", "taylor"])
def test_what_matters_least_goes(deep, trained, dataset, tmp_path, importance):
    with torch.no_grad():
        for part in (deep.encoder[0].ffn[0], deep.encoder[2].ffn[0]):  # dead places: nothing in, nothing out
            part.weight[5:10] = 0
            part.bias[5:10] = 0
        for part in (deep.encoder[0].ffn[2], deep.encoder[2].ffn[2]):
            part.weight[:, 5:10] = 0
    found = prune._importance(
        deep, settings("prune", ffn=0.5, importance=importance, requests=64), context_of(trained, dataset, tmp_path),
        trained.features,
    )  # fmt: skip
    lowest = set(found["encoder.0.ffn"].topk(5, largest=False).indices.tolist())
    assert lowest == set(range(5, 10))
    assert found["encoder.0.attention"].shape == (4,)
    assert found["encoder"].shape == (3,)
    assert found["width"].shape == (deep.dim,)


def context_of(trained, dataset, folder):
    made = chain._Chain(recipe_of({"kind": "fold"}), trained, dataset, folder)

    def no_training(now, settings, name, *, teacher=None, seed=None):
        assert settings.epochs == 0

    return chain.Context(made._teacher, trained.recipe, dataset, made._requests, folder, 0, no_training)


def test_rounds_remove_a_part_each(trained, dataset, tmp_path):
    done = compress(recipe_of({"kind": "prune", "ffn": 0.5, "rounds": 2}), trained, dataset, tmp_path / "out")
    kept = [json.loads((tmp_path / "out" / "1-prune" / f"round-{n}" / "decisions.json").read_text()) for n in (1, 2)]
    assert [len(decisions["ffn"]["encoder.0.ffn"]) for decisions in kept] == [24, 16]
    assert done.last.model().encoder[0].ffn[0].out_features == 16


def test_two_of_four(model, trained, inputs):
    sparse = checked("prune", model, trained, sparsity="2:4")
    layers = [module for module in sparse.modules() if isinstance(module, Sparse)]
    assert len(layers) == 10
    for layer in layers:
        zeros = (layer.dense_weight().reshape(len(layer.weight), -1, 4) == 0).sum(-1)
        assert (zeros == 2).all()
    with torch.no_grad():
        layers[0].weight += 1.0  # whatever training does
    assert ((layers[0].dense_weight().reshape(-1, 4) == 0).sum(-1) == 2).all()


# Quantisation


@pytest.fixture(scope="module")
def quantised(trained, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    wide = train(
        Recipe.model_validate(trained.recipe.model_dump() | {
            "model": trained.recipe.model.model_dump() | {"dim": 32}, "training": trained.recipe.training.model_dump()
            | {"epochs": 1, "start": "linear"}}),
        dataset, folder / "run",
    )  # fmt: skip
    done = compress(recipe_of({"kind": "quantise", "requests": 64}), wide, dataset, folder / "out")
    run = done.last
    export(run.model(), run.features.spec, folder / "int8.onnx")
    export(wide.model(), wide.features.spec, folder / "dense.onnx")
    return folder, wide, run


def test_scales_are_per_channel_and_symmetric(quantised):
    graph = onnx.load(quantised[0] / "int8.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    assert len(weights) == 10
    for node in weights:
        weight, scale, zero = (constants[name] for name in node.input)
        assert weight.dtype == np.int8
        assert scale.shape == (weight.shape[1],)  # [in, out]: one for each output channel
        assert len(np.unique(scale)) > 1
        assert not zero.any()
        assert (np.abs(weight).max(0) == 127).all()
    inputs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(inputs) == len(weights) - 1  # queries and keys of the encoder read the same, with the same scale
    assert all(constants[node.input[1]].shape == () and not constants[node.input[2]].any() for node in inputs)


def test_quantised_constants_are_smaller(quantised):
    sizes = [
        sum(numpy_helper.to_array(t).nbytes for t in onnx.load(quantised[0] / f"{name}.onnx").graph.initializer)
        for name in ("int8", "dense")
    ]
    assert sizes[0] < 0.4 * sizes[1]


def test_quantised_scores_are_near(quantised, dataset):
    _, wide, run = quantised
    examples = Examples.read(dataset, "valid", wide.features, 100)
    dense, int8 = score(wide.model(), examples), score(run.model(), examples)
    assert 0 < np.abs(dense - int8).max() < 0.3 * dense.std()


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_calibration_covers_the_inputs(trained, method, rng):
    layer = QuantisedLinear(nn.Linear(32, 32))
    values = torch.from_numpy(rng.normal(size=(4000, 32)).astype(np.float32))
    values[0, 0] = 50.0  # one that is far out

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = layer

        def forward(self, x):
            return self.part(x)

    quantise.calibrate(
        Wrapped(), [{"x": values[:2000]}, {"x": values[2000:]}], settings("quantise", calibration=method)
    )
    top = float(layer.input_scale) * 127
    if method == "minmax":
        assert top == pytest.approx(50.0)
    else:
        assert 2.0 < top < 20.0


def test_training_passes_through_the_rounding():
    layer = QuantisedLinear(nn.Linear(32, 32))
    layer.input_scale.fill_(0.05)
    table = QuantisedTable(nn.Embedding(10, 32))
    layer(table(torch.arange(10))).square().sum().backward()
    assert layer.layer.weight.grad.abs().sum() > 0
    assert table.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["aware", "incremental"])
def test_modes_with_training(trained, dataset, tmp_path, mode, monkeypatch):
    monkeypatch.setattr(quantise, "NARROWEST", 8)
    frozen = []
    train_phase = chain.run_phase

    def watched(phase, model, *arguments):
        layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
        frozen.append(sum(not m.layer.weight.requires_grad and m.active for m in layers) / len(layers))
        before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        curve = train_phase(phase, model, *arguments)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        return curve

    monkeypatch.setattr(chain, "run_phase", watched)
    step = {"kind": "quantise", "mode": mode, "requests": 64, "groups": 3, "training": {"epochs": 1}}
    done = compress(recipe_of(step), trained, dataset, tmp_path / "out")
    assert frozen == ([0.0] if mode == "aware" else pytest.approx([1 / 3, 2 / 3]))
    assert all(m.active for m in done.last.model().modules() if isinstance(m, QuantisedLinear))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_halves_leave_norms_and_softmax(quantised, inputs, precision, tmp_path):
    _, wide, _ = quantised
    half, _ = quantise.check(wide.model(), settings("quantise", precision=precision), wide.features)
    assert all(p.dtype == torch.float32 for m in half.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    whole, halved = scores(wide.model(), inputs), scores(half, inputs)
    assert 0 < (whole - halved).abs().max() < 0.05 * max(float(whole.std()), 1.0)
    export(half, wide.features.spec, tmp_path / "half.onnx")  # BF16 runs on OpenVINO alone
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in graph.node:
        if node.op_type in {"Softmax", "LayerNormalization"}:
            assert types[node.output[0]] == onnx.TensorProto.FLOAT


# Factorising


def test_the_svd_of_a_low_rank_matrix_is_exact(trained, dataset, tmp_path, model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in (model.encoder[0].ffn[0], model.cross[0].ffn[2]):
            layer.weight.copy_(torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features))
        model.embedding.weight.copy_(torch.randn(len(model.embedding.weight), 3) @ torch.randn(3, model.dim))
    whole = scores(model, inputs)
    work = Work(copy.deepcopy(model), trained.features)
    factorise.run(work, settings("factorise", matrices="all", energy=1 - 1e-9), context_of(trained, dataset, tmp_path))
    ranks = work.decisions[0][1]["ranks"]
    assert ranks["encoder.0.ffn.0"] == ranks["cross.0.ffn.2"] == 2
    assert ranks["embedding"] == 3
    assert numbers(work.model) < 0.5 * numbers(model)
    torch.testing.assert_close(scores(work.model, inputs), whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
def test_a_budget_is_kept(trained, dataset, tmp_path, model, budget):
    matrices = factorise._matrices(model, "all")
    whole = sum(m.numel() for m in matrices.values())
    work = Work(copy.deepcopy(model), trained.features)
    factorise.run(work, settings("factorise", matrices="all", budget=budget), context_of(trained, dataset, tmp_path))
    left = sum(m.numel() for m in factorise._matrices(work.model, "all").values())
    assert 0.5 * budget * whole < left <= budget * whole


# Sharing


def test_blocks_share_their_mean(deep, trained, dataset, tmp_path, inputs):
    with torch.no_grad():  # alike already: then sharing changes nothing
        for block in deep.encoder[1:]:
            for own, first in zip(block.parameters(), deep.encoder[0].parameters(), strict=True):
                own.copy_(first)
    whole, before = scores(deep, inputs), numbers(deep)
    work = Work(deep, trained.features)
    share.run(work, settings("share", blocks=True), context_of(trained, dataset, tmp_path))
    torch.testing.assert_close(scores(work.model, inputs), whole, atol=1e-5, rtol=1e-5)
    assert numbers(work.model) < before - 2 * sum(p.numel() for p in work.model.encoder.parameters()) + 1


@pytest.mark.parametrize("groups", [1, 4])
def test_codebooks(trained, dataset, tmp_path, model, groups):
    table = model.embedding.weight.detach().clone()
    work = Work(model, trained.features)
    share.run(work, settings("share", codes=64, groups=groups), context_of(trained, dataset, tmp_path))
    coded = work.model.embedding
    assert isinstance(coded, Coded)
    assert coded.codes.dtype == torch.int8
    ids = torch.arange(len(table), dtype=torch.int32)
    error = (coded(ids) - table).square().sum() / table.square().sum()
    assert error < 0.9
    assert not coded(torch.zeros(1, dtype=torch.int32)).any()


def test_more_groups_are_nearer(trained, dataset, tmp_path, model):
    table = model.embedding.weight.detach().clone()
    errors = []
    for groups in (1, 4, 16):
        coded = Coded(len(table), table.shape[1], groups, 64)
        coded.learn(table, 0)
        found = coded(torch.arange(len(table), dtype=torch.int32)).detach()
        errors.append(float((found - table).square().sum()))
    assert errors[0] > errors[1] > errors[2]


# Folding


def test_a_folded_ranker_says_the_same(trained, dataset, tmp_path, model):
    examples = Examples.read(dataset, "valid", trained.features, 100)
    whole = score(model, examples)
    work = Work(model, trained.features)
    fold.run(work, settings("fold"), context_of(trained, dataset, tmp_path))
    spec = work.features.spec
    assert spec.shape.item_fields == 1
    assert spec.shape.history_fields == 3
    np.testing.assert_allclose(score(work.model, examples.seen_by(work.features)), whole, atol=1e-4)


@pytest.mark.parametrize("kind", ["low_rank", "quotient_remainder"])
def test_a_compact_table_is_not_folded_into_a_large_one(trained, kind):
    """17 MB became 2.56 GB of ten million items (issue 16)."""
    sizes = trained.recipe.model.model_copy(
        update={"embedding": kind, "embedding_rank": 2, "embedding_rows": 16, "cross_blocks": 0}
    )
    compact = make_ranker(trained.features.spec, sizes)
    with pytest.raises(BadRecipe, match=r"it would make 0.0\d MB, a vector for each of 312 items, .* leave fold out"):
        checked("fold", compact, trained)
    assert compact.folded is None


def test_a_search_leaves_fold_out_where_it_cannot_be(trained, model):
    sizes = trained.recipe.model.model_copy(update={"embedding": "quotient_remainder", "embedding_rows": 16})
    compact = make_ranker(trained.features.spec, sizes)
    start = recipe_of({"kind": "fold"})
    drawn = {"heads": 0.5, "ffn": 0.5, "width": 0.0, "blocks": 0, "history_length": 8, "quantise": "none"}
    for ranker, folds in ((model, True), (compact, False)):
        dense = SimpleNamespace(model=lambda ranker=ranker: ranker, features=trained.features)
        assert search._folds(dense) == folds
        kinds = [step.kind for step in search._chain(start, drawn, 1, folds).steps]
        assert ("fold" in kinds) == folds


def test_nor_is_one_that_a_step_made_compact(trained, model):
    factors = checked("factorise", model, trained, matrices="embeddings", budget=0.3)
    with pytest.raises(BadRecipe, match="kept compact"):
        checked("fold", factors, trained)


# Fusing and distilling


def test_the_mean_of_equal_weights_changes_nothing(model, inputs):
    torch.testing.assert_close(scores(fuse.averaged([model, copy.deepcopy(model)]), inputs), scores(model, inputs))


def test_the_mean_lies_between(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1.0
    mean = fuse.averaged([model, other])
    torch.testing.assert_close(mean.norm_out.weight, model.norm_out.weight + 0.5)


def test_a_soup_is_no_worse_than_its_best_member(trained, dataset, tmp_path):
    step = {"kind": "fuse", "members": 2, "training": {"epochs": 1, "learning_rate": 1e-4}}
    done = compress(recipe_of(step), trained, dataset, tmp_path / "out")
    curves = done.last.facts["compression"][0]["curves"]
    assert set(curves) == {"member-0", "member-1"}
    best = max(point["valid_ndcg10"] for curve in curves.values() for point in curve)
    assert done.report[1]["valid_ndcg10"] >= best - 1e-6


def test_an_ensemble_is_one_graph_and_teaches_one_student(trained, dataset, tmp_path):
    member = train(trained.recipe.changed({"seed": 8, "training.epochs": 1}), dataset, tmp_path / "member")
    chain_of = recipe_of(
        {"kind": "fuse", "mode": "ensemble", "runs": [str(member.directory)]},
        {"kind": "distil", "teacher": "previous", "training": {"epochs": 1}},
    )
    done = compress(chain_of, trained, dataset, tmp_path / "out")
    shutil.rmtree(member.directory)  # a checkpoint needs nothing but itself
    ensemble = TrainedRun.load(done.steps[0])
    weights = ensemble.model().weights
    assert not torch.allclose(weights, weights.mean())
    export(ensemble.model(), ensemble.features.spec, tmp_path / "ensemble.onnx")
    assert isinstance(done.last.model(), SharedContextRanker)
    assert done.report[1]["parameters"] > 2 * done.report[2]["parameters"] - 10


def test_a_fresh_student_has_its_own_sizes(trained, dataset, tmp_path):
    sizes = trained.recipe.model.model_dump() | {"dim": 8, "ffn": 8}
    step = {"kind": "distil", "student": sizes, "training": {"epochs": 1, "labels": 0}}
    done = compress(recipe_of(step), trained, dataset, tmp_path / "out")
    assert done.last.model().dim == 8


@pytest.mark.parametrize("teacher", ["dense", "previous"])
def test_a_teacher_sees_its_own_features(trained, dataset, tmp_path, teacher, monkeypatch):
    seen = {}

    def watch(kind, method, fields_of):
        original = getattr(kind, method)

        def watched(self, *inputs, **named):
            if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():  # as teachers are asked
                fields, expected = fields_of(self, inputs, named)
                seen.setdefault(kind.__name__, set()).add((fields.shape[-1], expected))
            return original(self, *inputs, **named)

        monkeypatch.setattr(kind, method, watched)

    watch(SharedContextRanker, "item_vectors", lambda self, inputs, named: (inputs[0], self.fields))
    watch(Ensemble, "forward", lambda self, inputs, named: (named["candidates"], self.members[0].fields))
    one = {"epochs": 1}
    steps = [{"kind": "fold"}, {"kind": "fuse", "mode": "ensemble", "members": 2, "training": one},
             {"kind": "distil", "teacher": teacher, "training": one}]  # fmt: skip
    compress(recipe_of(*steps), trained, dataset, tmp_path / "out")
    dense_fields = len(trained.features.spec.item_fields)
    assert (dense_fields, dense_fields) in seen["SharedContextRanker"]  # while the members were trained
    assert all(given == expected for calls in seen.values() for given, expected in calls)
    assert seen.get("Ensemble") == ({(1, 1)} if teacher == "previous" else None)


def test_divergence_is_zero_between_equals(rng):
    logits = torch.from_numpy(rng.normal(size=(2, 3, 5)).astype(np.float32))
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert divergences(logits, logits, valid, 2.0).abs().max() < 1e-6
    other = logits.clone()
    other[1, :, 3:] += 100.0  # padding says nothing
    assert divergences(other, logits, valid, 1.0).abs().max() < 1e-6
    other[0, 0, 0] += 1.0
    assert divergences(other, logits, valid, 1.0)[0, 0] > 0.01
