"""`trirank compress --search`: the best chain for a target, with Optuna (Akiba et al., KDD 2019).

Chains are prune → fold → quantise with drawn sizes. Latency is measured on the engines that would serve the graph, and
size on the graph, before anything is trained: a chain's form says both, so only chains that can meet the target cost a
training. What is searched for is the front of latency against NDCG@10 on the validation split.

The folder holds ``study.db``, from which a stopped search goes on, ``trials/`` with the chains, ``front.svg`` and
``front.csv``, and ``best.toml``, the chosen chain as a recipe.
"""

from __future__ import annotations

import csv
import io
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import optuna
import tomli_w
from matplotlib.figure import Figure
from trirank_backend.scoring import available_engines

from trirank_build.artefacts import atomic_file
from trirank_build.compression import fold
from trirank_build.compression.chain import check_chain, compress
from trirank_build.compression.recipe import CompressionRecipe, parse_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.engines.latency import fastest_engine
from trirank_build.errors import BadRecipe
from trirank_build.export.onnx import write_graph
from trirank_build.progress import progress
from trirank_build.training.run import TrainedRun

STUDY, BEST, TRIALS, PLOT, TABLE = "study.db", "best.toml", "trials", "front.svg", "front.csv"
_SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Target:
    """What the chosen chain must meet; None: whatever it gives. Latency at 200 candidates on one thread of this
    machine; size of the graph; share of the dense ranker's NDCG@10 on the validation split."""

    latency_ms: float | None = None
    size_mb: float | None = None
    min_ndcg_ratio: float | None = None


@dataclass(frozen=True)
class Tried:
    """One chain. Number 0 is the recipe that the search started from."""

    number: int
    latency_ms: float
    size_mb: float
    engine: str
    ndcg10: float
    ndcg_ratio: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        tried: chains that were trained, by number.
        front: those that no other beats in latency and NDCG@10 both.
        chosen: the best for the target.
        recipe, plot: files.
    """

    tried: list[Tried]
    front: list[Tried]
    chosen: Tried
    recipe: Path
    plot: Path


def search(
    start: CompressionRecipe, dense: TrainedRun, dataset: Dataset, out: Path, target: Target, trials: int = 20
) -> Found:
    """Try ``start`` and drawn chains until there are ``trials``, those of earlier calls included.

    Raises:
        BadRecipe: no target was given, the folder is of another search, or no chain meets the target.
        BadData: the dataset is another one than the ranker was trained on.
    """
    if target == Target():
        raise BadRecipe("--search needs a target: --latency-ms, --size-mb or --min-ndcg-ratio")
    if dense.recipe.training.privacy is not None:
        raise BadRecipe(
            f"{dense.directory} was trained with differential privacy, and a search chooses by its users; compress "
            "with a recipe of steps that read none"
        )
    dense.check_data(dataset)
    check_chain(start, dense)
    out.mkdir(parents=True, exist_ok=True)
    identity = f"{start.to_toml()} {dataset.description.digest} {dense.directory.resolve()}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{(out / STUDY).resolve()}", study_name="trirank", load_if_exists=True,
        directions=["minimize", "maximize"], sampler=optuna.samplers.TPESampler(seed=start.seed, n_startup_trials=6),
    )  # fmt: skip
    if study.user_attrs.get("identity", identity) != identity:
        raise BadRecipe(f"{out} holds the search of another recipe, ranker or dataset; choose another --out")
    study.set_user_attr("identity", identity)
    base = max(point["valid_ndcg10"] for point in dense.facts["curve"])
    folds = _folds(dense)
    if "start" not in study.user_attrs:
        study.set_user_attr("start", _try(start, dense, dataset, out, Target(), base))
    with progress() as bar:
        ended = [trial for trial in study.trials if trial.state.is_finished()]
        task = bar.add_task("searching", total=trials, completed=1 + len(ended))
        for _ in range(trials - 1 - len(ended)):
            trial = study.ask()
            recipe = _chain(start, _draw(trial, dense), trial.number + 1, folds)
            result = _try(recipe, dense, dataset, out, target, base)
            trial.set_user_attr("result", result)
            if "ndcg10" in result:
                study.tell(trial, [result["latency_ms"], result["ndcg10"]])
            else:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            bar.advance(task)
    return _found(study, start, dense, out, target)


def _draw(trial: optuna.Trial, dense: TrainedRun) -> dict[str, Any]:
    """Sizes that leave something of every layer."""
    sizes, length = dense.recipe.model, dense.features.spec.history_length
    heads = [share for share in _SHARES if round(sizes.heads * (1 - share)) >= 1]
    return {
        "heads": trial.suggest_categorical("heads", heads),
        "ffn": trial.suggest_categorical("ffn", _SHARES),
        "width": trial.suggest_categorical("width", (0.0, 0.25, 0.5)),
        "blocks": trial.suggest_int("blocks", 0, max(sizes.encoder_blocks - 1, 0)),
        "history_length": trial.suggest_categorical("history_length", sorted({length, max(1, length // 2)})),
        "quantise": trial.suggest_categorical("quantise", ("none", "post_training", "aware")),
    }


def _folds(dense: TrainedRun) -> bool:
    """Whether the ranker can be folded: one with a compact table of items would grow."""
    try:
        fold.check(dense.model(), fold.Settings(), dense.features)
    except BadRecipe:
        return False
    return True


def _chain(start: CompressionRecipe, drawn: dict[str, Any], number: int, folds: bool) -> CompressionRecipe:
    steps: list[dict[str, Any]] = [{"kind": "prune", **{k: v for k, v in drawn.items() if k != "quantise"}}]
    if folds:
        steps.append({"kind": "fold", "training": {"epochs": 0}})
    if drawn["quantise"] != "none":
        steps.append({"kind": "quantise", "mode": drawn["quantise"]})
    return parse_recipe(start.to_toml() | {"name": f"{start.name}-{number}", "steps": steps})


def _try(
    recipe: CompressionRecipe, dense: TrainedRun, dataset: Dataset, out: Path, target: Target, base: float
) -> dict[str, Any]:
    """Measure the chain's form, and train it if that can meet the target."""
    model, features = check_chain(recipe, dense)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        path = Path(folder) / "form.onnx"
        write_graph(model, features.spec, path)  # its weights mean nothing, so neither would its parity
        engine, times = fastest_engine(path, features.spec, available_engines())
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6  # with what lies beside the graph
        result: dict[str, Any] = {"latency_ms": times[engine], "size_mb": size, "engine": engine}
    result["recipe"] = recipe.to_toml()
    for name in ("latency_ms", "size_mb"):
        limit = getattr(target, name)
        if limit is not None and result[name] > limit:
            return result | {"skipped": f"{name} {result[name]:.3f} is above {limit:g}"}
    done = compress(recipe, dense, dataset, out / TRIALS / recipe.name)
    ndcg = done.report[-1]["valid_ndcg10"]
    return result | {"ndcg10": ndcg, "ndcg_ratio": ndcg / base}


def _found(study: optuna.Study, start: CompressionRecipe, dense: TrainedRun, out: Path, target: Target) -> Found:
    results = [study.user_attrs["start"], *(trial.user_attrs.get("result", {}) for trial in study.trials)]
    names = Tried.__dataclass_fields__.keys() - {"number"}
    tried = [
        Tried(number, **{name: result[name] for name in names})
        for number, result in enumerate(results) if "ndcg10" in result
    ]  # fmt: skip
    front = [one for one in tried if not any(_beats(other, one) for other in tried)]
    with atomic_file(out / TABLE) as scratch, scratch.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*Tried.__dataclass_fields__, "front"])
        writer.writeheader()
        writer.writerows(asdict(one) | {"front": one in front} for one in tried)
    _plot(tried, front, target, out / PLOT)
    meeting = [one for one in tried if _meets(one, target)]
    if not meeting:
        nearest = max(tried, key=lambda one: one.ndcg_ratio)
        raise BadRecipe(
            f"none of the {len(results)} chains meets the target ({_words(target)}); the best trained one is "
            f"{nearest}. All are in {out / TABLE}; try more with --trials, or ask for less"
        )
    # Of two that rank as well, within the noise of a validation split, the faster one.
    best = max(one.ndcg10 for one in meeting)
    chosen = min((one for one in meeting if one.ndcg10 >= 0.995 * best), key=lambda one: one.latency_ms)
    recipe = parse_recipe(results[chosen.number]["recipe"] | {"name": f"{start.name}-found"})
    with atomic_file(out / BEST) as scratch:
        scratch.write_text(tomli_w.dumps(recipe.to_toml()))
    return Found(tried, front, chosen, out / BEST, out / PLOT)


def _beats(other: Tried, one: Tried) -> bool:
    no_worse = other.latency_ms <= one.latency_ms and other.ndcg10 >= one.ndcg10
    return no_worse and (other.latency_ms < one.latency_ms or other.ndcg10 > one.ndcg10)


def _meets(one: Tried, target: Target) -> bool:
    return (
        (target.latency_ms is None or one.latency_ms <= target.latency_ms)
        and (target.size_mb is None or one.size_mb <= target.size_mb)
        and (target.min_ndcg_ratio is None or one.ndcg_ratio >= target.min_ndcg_ratio)
    )


def _words(target: Target) -> str:
    parts = {"latency at most": (target.latency_ms, "ms"), "size at most": (target.size_mb, "MB"),
             "NDCG@10 at least": (target.min_ndcg_ratio, "of the dense ranker's")}  # fmt: skip
    return ", ".join(f"{what} {value:g} {unit}" for what, (value, unit) in parts.items() if value is not None)


def _plot(tried: list[Tried], front: list[Tried], target: Target, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([one.latency_ms for one in tried], [one.ndcg_ratio for one in tried], color="#999", label="tried")
    ordered = sorted(front, key=lambda one: one.latency_ms)
    line = ([one.latency_ms for one in ordered], [one.ndcg_ratio for one in ordered])
    axes.plot(*line, "o-", color="#27632a", label="Pareto front")
    for one in ordered:
        axes.annotate(str(one.number), (one.latency_ms, one.ndcg_ratio), textcoords="offset points", xytext=(5, 5))
    if target.latency_ms is not None:
        axes.axvline(target.latency_ms, color="#a00", linestyle=":", label="target")
    if target.min_ndcg_ratio is not None:
        axes.axhline(target.min_ndcg_ratio, color="#a00", linestyle=":", label="target")
    axes.set(xlabel="ms at 200 candidates", ylabel="validation NDCG@10, share of the dense ranker's")
    axes.legend()
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    with atomic_file(path) as scratch:
        scratch.write_text(buffer.getvalue())
