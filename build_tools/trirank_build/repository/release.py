"""`trirank assemble`: an immutable, content-addressed release.

``models/``         the model repository that Triton serves
``features/``       what preprocess and rerank read: catalogue, tokeniser, policies, user histories
``items.parquet``   titles, brands and prices, for people
``requests.json``   recorded requests, one a bucket where there are any, that prove readiness
``manifest.json``   contract, digests of all files, data, recipe, metrics, parity, engines
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import polars as pl
from trirank import contract
from trirank_backend.histories import Events, SqliteUserStore
from trirank_backend.policies import check_policy, save_policies
from trirank_backend.scoring import exact_engines
from trirank_backend.stages import FEATURES

from trirank_build.artefacts import atomic_file, combined_digest, file_digest, tree_digests
from trirank_build.data.dataset import Dataset
from trirank_build.engines.latency import fastest_engine
from trirank_build.engines.plan import PlanManifest, load_plan_manifest
from trirank_build.errors import BadData, BadModel
from trirank_build.export.onnx import beyond_tensorrt, check_onnx
from trirank_build.export.parity import Parity
from trirank_build.repository.configs import Instances, model_configs
from trirank_build.training.run import TrainedRun

MODELS, MANIFEST, ITEMS, REQUESTS, CURRENT = (
    "models",
    "manifest.json",
    "items.parquet",
    "requests.json",
    "current",
)
TEMPLATES = Path(__file__).parent.parent / "model_repository"
_RECORDED = 8
_PACKAGES = ("trirank", "torch", "onnx", "onnxruntime", "openvino", "numpy", "tokenizers")


def assemble(
    run: TrainedRun,
    dataset: Dataset,
    onnx_path: Path,
    out: Path,
    *,
    runtime: str = "python",
    plans: list[Path] | None = None,
    instances: Instances | None = None,
    engine: str | None = None,
    allow_failing_gate: bool = False,
) -> Path:
    """Write a release below ``out`` under its digest, or find it there already; gives its directory.

    Args:
        engine: what runs the graph with the runtime ``python``; None: the gate's, else the fastest that is exact.
        allow_failing_gate: take a graph whose gate failed, or a compressed one that went through none. The manifest
            says so.

    Raises:
        BadModel: the graph or a plan does not fit the contract, the features or its report, or its gate failed.
        BadData: the dataset is another one than the run was trained on.
    """
    trained_on, given = run.facts["dataset"]["digest"], dataset.description.digest
    if trained_on != given:
        raise BadData(
            f"{run.directory} was trained on dataset {trained_on[:12]}, this one is {given[:12]}; give that one"
        )
    spec = run.features.spec
    check_onnx(onnx_path, spec)
    parity = _parity_of(onnx_path)
    gate = _gate_of(onnx_path, run, allow_failing_gate)
    if engine is None:
        engine = gate["engine"] if gate else fastest_engine(onnx_path, spec, exact_engines())[0]
    plan_files = _checked_plans(plans or [], onnx_path, runtime)
    policies = run.recipe.policies_for(spec.tasks)
    for name, policy in policies.items():
        check_policy(name, policy, spec.tasks)
    capabilities = {m.compute_capability: f"{m.sm}.plan" for _, m in plan_files}
    configs = model_configs(spec.shape, runtime, instances or Instances(), capabilities, engine)

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assembling.", dir=out) as folder:
        scratch = Path(folder) / "release"
        for name, text in configs.items():
            version = scratch / MODELS / name / "1"
            version.mkdir(parents=True)
            (version.parent / "config.pbtxt").write_text(text)
            template = TEMPLATES / name / "1" / "model.py"
            if template.is_file() and not (name == contract.RANKER and runtime != "python"):
                shutil.copyfile(template, version / "model.py")
        ranker = scratch / MODELS / contract.RANKER / "1"
        if runtime == "python":
            shutil.copyfile(onnx_path, ranker / "model.onnx")
        for path, manifest in plan_files:
            shutil.copyfile(path, ranker / f"{manifest.sm}.plan")
        shutil.copytree(run.directory / FEATURES, scratch / FEATURES)
        save_policies(policies, scratch / FEATURES / "policies.json")
        SqliteUserStore.write(scratch / FEATURES / "users.sqlite", _histories(dataset.events))
        dataset.items.select("item_id", "key", "title", "brand", "category", "price").write_parquet(scratch / ITEMS)
        (scratch / REQUESTS).write_text(json.dumps(_recorded(dataset), indent=1) + "\n")

        files = tree_digests(scratch)
        facts: dict[str, Any] = {
            "contract": contract.CONTRACT_VERSION,
            "runtime": runtime,
            "onnx": file_digest(onnx_path),
            "parity": parity,
            "engine": engine if runtime == "python" else None,
            "gate": gate,
            "failing_gate_allowed": allow_failing_gate,
            "compression": run.facts.get("compression"),
            "engines": [manifest.to_json() for _, manifest in plan_files],
            "recipe": run.recipe.model_dump(mode="json"),
            "curve": run.facts["curve"],
            "dataset": run.facts["dataset"],
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        # The digest names what is served; how it came to be is told beside it.
        release = combined_digest(files | {"contract": str(contract.CONTRACT_VERSION)})[:12]
        (scratch / MANIFEST).write_text(json.dumps({"release": release, **facts, "files": files}, indent=1) + "\n")
        target = out / release
        if not target.is_dir():
            os.replace(scratch, target)
    return target


def promote(release: Path) -> Path:
    """Point ``current`` beside the release at it, in one step; gives the link."""
    link = release.parent / CURRENT
    with atomic_file(link) as scratch:
        scratch.symlink_to(release.name)
    return link


def load_manifest(release: Path) -> dict[str, Any]:
    """The manifest of a release.

    Raises:
        BadModel: this is no release.
    """
    try:
        manifest: dict[str, Any] = json.loads((release / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BadModel(f"{release} is no release ({error}); make one with `trirank assemble`") from error
    return manifest


def parity_path(onnx_path: Path) -> Path:
    """Where `trirank export` leaves its report."""
    return onnx_path.with_suffix(".parity.json")


def write_parity(onnx_path: Path, parity: Parity, module: str) -> dict[str, Any]:
    """Leave the export's report beside its graph; `assemble` takes no graph without one. Gives the report."""
    beyond = beyond_tensorrt(onnx.load(str(onnx_path)))
    report = {"onnx": file_digest(onnx_path), "module": module, "beyond_tensorrt": beyond, **parity.to_json()}
    with atomic_file(parity_path(onnx_path)) as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n")
    return report


def gate_path(onnx_path: Path) -> Path:
    """Where `trirank gate` leaves its report."""
    return onnx_path.with_suffix(".gate.json")


def _gate_of(onnx_path: Path, run: TrainedRun, allow_failing: bool) -> dict[str, Any] | None:
    """The gate's report on this very graph; None where there is none and none is needed.

    Raises:
        BadModel: it failed, or it is missing and the ranker is compressed.
    """
    path, allow = gate_path(onnx_path), "or say --allow-failing-gate"
    report: dict[str, Any] | None = None
    if path.is_file():
        try:
            read: dict[str, Any] = json.loads(path.read_text())
            report = read if read["onnx"] == file_digest(onnx_path) else None
        except (ValueError, KeyError) as error:
            raise BadModel(f"{path} is no report of the gate ({error}); run `trirank gate` again") from error
    if allow_failing:
        return report
    if report is None and run.facts.get("compression"):
        raise BadModel(f"{onnx_path} is compressed and has no report of the gate; run `trirank gate` on it, {allow}")
    if report is not None and not report["passed"]:
        raise BadModel(f"{onnx_path} did not pass the gate: {'; '.join(report['failures'])}. Compress less, {allow}")
    return report


def _parity_of(onnx_path: Path) -> dict[str, Any]:
    """The export's report on this very graph.

    Raises:
        BadModel: there is none.
    """
    path = parity_path(onnx_path)
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if report["onnx"] == file_digest(onnx_path):
            return report
        reason = "it is of another graph"
    except (OSError, ValueError, KeyError) as error:
        reason = str(error)
    raise BadModel(f"{onnx_path} has no parity report {path.name} ({reason}); make both with `trirank export`")


def _checked_plans(plans: list[Path], onnx_path: Path, runtime: str) -> list[tuple[Path, PlanManifest]]:
    if runtime != "tensorrt":
        if plans:
            raise BadModel(f"plans are for --runtime tensorrt, not {runtime}")
        return []
    if not plans:
        raise BadModel("--runtime tensorrt needs plans; build them with `trirank engine build` and give --plan PATH")
    digest = file_digest(onnx_path)
    checked = []
    for plan in plans:
        manifest = load_plan_manifest(plan)
        if manifest.onnx != digest:
            raise BadModel(
                f"{plan} was built from ONNX {manifest.onnx[:12]}, not from {onnx_path} ({digest[:12]}); build again"
            )
        if tuple(p["bucket"] for p in manifest.profiles) != contract.BUCKETS:
            raise BadModel(f"{plan} has no profile for each of the buckets {contract.BUCKETS}; build again")
        checked.append((plan, manifest))
    return checked


def _histories(events: pl.DataFrame) -> Iterator[tuple[int, Events]]:
    grouped = (
        events.sort("user_id", "timestamp", maintain_order=True)
        .group_by("user_id", maintain_order=True)
        .agg("item_id", pl.col("behaviour").cast(pl.Int32), "timestamp")
    )
    for user, items, behaviours, times in zip(*(grouped[column] for column in grouped.columns), strict=True):
        newest = slice(-contract.MAX_HISTORY, None)
        yield user, Events(items.to_numpy()[newest], behaviours.to_numpy()[newest], times.to_numpy()[newest])


def _recorded(dataset: Dataset) -> list[dict[str, Any]]:
    """Requests of the test split, each scenario among them."""
    test = dataset.split("test")
    picked = test.group_by("scenario", maintain_order=True).head(_RECORDED)
    return [
        {
            "user_id": row["user_id"],
            "timestamp": row["timestamp"],
            "query": row["query"],
            "scenario": row["scenario"],
            "item_ids": row["item_ids"],
            "retrieval_scores": row["retrieval_scores"],
            "top_k": 10,
        }
        for row in picked.iter_rows(named=True)
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
