"""`trirank assemble`: write a release (trirank_build.repository.release says what is in one)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from trirank import contract
from trirank.contract import ANONYMOUS_USER, stable_id
from trirank_backend.attributes import FOLDER
from trirank_backend.candidates import FOLDER as RETRIEVAL
from trirank_backend.errors import InvalidRelease
from trirank_backend.policies import SHIPPED, Items, Policy, Release, load_policies
from trirank_backend.release import POLICIES, load_features
from trirank_backend.scoring import ENGINES, exact_engines

from trirank_build.artefacts import file_digest, tree_digests
from trirank_build.data.dataset import Dataset
from trirank_build.engines.latency import chosen_engine
from trirank_build.engines.plan import PlanManifest, load_plan_manifest
from trirank_build.errors import BadModel
from trirank_build.evaluation.scoring import retrieval_ndcg, valid_ndcg
from trirank_build.export.onnx import check_onnx
from trirank_build.export.weights import copy_graph
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features, refresh_features
from trirank_build.features.rule_attributes import rule_attributes
from trirank_build.features.vocabulary import FILE as VOCABULARY
from trirank_build.privacy.queries import plain, shared
from trirank_build.repository.components import bill_of_materials
from trirank_build.repository.configs import Batching, Instances, RankerRuntime, model_configs
from trirank_build.repository.model_card import model_card
from trirank_build.repository.release import (
    CARD,
    COMPONENTS,
    FEATURES,
    ITEMS,
    MANIFEST,
    MODELS,
    REQUESTS,
    TEMPLATES,
    graph_place,
    release_name,
)
from trirank_build.repository.reports import gate_of, parity_of
from trirank_build.repository.store import assembling, settle
from trirank_build.retrieval.index import build_index
from trirank_build.training.run import TrainedRun

_RECORDED = 8
_COMPARED = 500
"""Validation requests on which a ranker is compared with retrieval."""
_ASKED_BY, _INVENTED, _DAY_S = 5, 50, 86_400
"""A query that so many users have asked tells of none of them. Candidates of a request that nobody made."""
_PACKAGES = ("trirank", "torch", "onnx", "onnxruntime", "openvino", "numpy", "tokenizers")


def assemble(
    run: TrainedRun,
    dataset: Dataset,
    onnx_path: Path,
    out: Path,
    *,
    runtime: str = "python",
    pipeline: str = "ensemble",
    plans: list[Path] | None = None,
    instances: Instances | None = None,
    engine: str | None = None,
    provider: str = "cpu",
    threads: int = 1,
    batching: Batching | None = None,
    allow_failing_gate: bool = False,
    policies: Mapping[str, Policy] | None = None,
    index: bool = False,
) -> Path:
    """Write a release below ``out`` under its digest, or find it there already; gives its directory. What is told of it
    (card and manifest: its gate, say) is the newest in either case.

    Args:
        dataset: what the run was trained on, or a newer one of the same shop, from which catalogue and
            recorded requests then come, in the words that the ranker was trained with.
        runtime: one of repository.configs.RUNTIMES.
        pipeline: one of repository.configs.PIPELINES.
        plans: for the runtime ``tensorrt``, one a GPU architecture.
        engine: what runs the graph with the runtime ``python``; None: the gate's, else the fastest that is exact.
        provider: of the runtime ``onnxruntime``; threads: of it and of ``python``.
        allow_failing_gate: take a graph whose gate failed, a compressed one that went through none, or a ranker worse
            than retrieval's order. The manifest says so.
        policies: scenario → policy, beside the shipped ones or in their place.
        index: put an index of all items beside the ranker, see retrieval.index.

    Raises:
        BadModel: the graph or a plan does not fit the contract, the features or its report, its gate failed, or the
            ranker is worse than retrieval's order.
        BadData: the dataset is of another kind or shop than the run was trained on, or the ranker holds its catalogue.
        InvalidRelease: a policy does not fit the items or the ranker.
    """
    refreshed = run.facts["dataset"]["digest"] != dataset.description.digest
    if refreshed:
        run.check_refresh(dataset)
    spec = run.features.spec
    check_onnx(onnx_path, spec)
    parity = parity_of(onnx_path)
    if index and parity["module"] != type(run.model()).__name__:
        raise BadModel(f"{onnx_path} is a {parity['module']}, and an index is made of the run's own ranker, whose "
                       "vectors are not its; leave --index out")  # fmt: skip
    gate = gate_of(onnx_path, run, allow_failing_gate)
    if gate is None and not refreshed and not allow_failing_gate:
        _check_above_retrieval(run, dataset)
    if engine is not None and runtime != "python":
        raise BadModel(f"an engine is for --runtime python, not {runtime}")
    if engine is not None and engine not in ENGINES:
        raise BadModel(f"engine {engine} is none of {', '.join(ENGINES)}")
    plan_files = _checked_plans(plans or [], onnx_path, runtime)
    capabilities = {m.compute_capability: f"{m.sm}.plan" for _, m in plan_files}
    if engine is None and runtime == "python":
        engine = gate["engine"] if gate else chosen_engine(onnx_path, spec, exact_engines())
    compatible = [f"{m.sm}.plan" for _, m in plan_files if m.hardware_compatibility != "none"]
    chosen = RankerRuntime(runtime, engine or "", provider, threads, capabilities, next(iter(compatible), ""))
    configs = model_configs(spec.shape, chosen, instances or Instances(), pipeline, dataset.description.ids, batching)

    out.mkdir(parents=True, exist_ok=True)
    with assembling(out) as folder:
        scratch = folder / "release"
        for name, text in configs.items():
            version = scratch / MODELS / name / "1"
            version.mkdir(parents=True)
            (version.parent / "config.pbtxt").write_text(text)
            template = TEMPLATES / ("single" if pipeline == "single" else name) / "1" / "model.py"
            if template.is_file() and not (name == contract.RANKER and runtime != "python"):
                shutil.copyfile(template, version / "model.py")
        # Beside plans too: `trirank serve --fallback onnxruntime` takes it where no plan fits.
        graph = scratch / graph_place(pipeline)
        copy_graph(onnx_path, graph)
        for path, manifest in plan_files:
            shutil.copyfile(path, graph.with_name(f"{manifest.sm}.plan"))
        if refreshed:
            (scratch / FEATURES).mkdir()
            refresh_features(run.directory / FEATURES, dataset, scratch / FEATURES)
            (scratch / FEATURES / VOCABULARY).unlink()
            for folds in (scratch / FEATURES).glob("*/fold-*"):  # which training alone reads
                shutil.rmtree(folds)
        else:
            shutil.copytree(
                run.directory / FEATURES, scratch / FEATURES, ignore=shutil.ignore_patterns(VOCABULARY, "fold-*")
            )
        _write_rules(scratch / FEATURES, dataset.items, load_policies(SHIPPED) | dict(policies or {}))
        indexed = None
        if index:
            (scratch / RETRIEVAL).mkdir()
            served = Features.load(scratch / FEATURES) if refreshed else run.features
            indexed = build_index(run.model(), served, dataset, scratch / RETRIEVAL)
        recorded = _recorded(dataset) if run.recipe.training.privacy is None else _invented(dataset)
        dataset.items.select("item_id", "key", "title", "brand", "category", "price").write_parquet(scratch / ITEMS)
        (scratch / REQUESTS).write_text(json.dumps(recorded, indent=1) + "\n")

        files = tree_digests(scratch)
        release = release_name(files)
        facts: dict[str, Any] = {
            "release": release,
            "contract": contract.CONTRACT_VERSION,
            "runtime": runtime,
            "pipeline": pipeline,
            "engine": engine,
            "metrics": _metrics(run, gate),
            "onnx": file_digest(onnx_path),
            "parity": parity,
            "gate": gate,
            "index": indexed,
            "failing_gate_allowed": allow_failing_gate,
            "compression": run.facts.get("compression"),
            "privacy": run.facts.get("privacy"),
            "engines": [manifest.to_json() for _, manifest in plan_files],
            "recipe": run.recipe.model_dump(mode="json"),
            "curve": run.facts["curve"],
            "dataset": run.facts["dataset"],
            "refreshed": asdict(dataset.description) if refreshed else None,
            "ids": dataset.description.ids,
            "git": _git_commit(),
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        (scratch / CARD).write_text(model_card(facts))
        (scratch / COMPONENTS).write_text(bill_of_materials(release, facts["onnx"]) + "\n")
        facts["files"] = files | tree_digests(scratch, only=CARD) | tree_digests(scratch, only=COMPONENTS)
        (scratch / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")
        return settle(scratch, out / release)


def _write_rules(features: Path, items: pl.DataFrame, policies: Mapping[str, Policy]) -> None:
    """Policies, and what they read of items.

    Raises:
        InvalidRelease: a policy does not fit.
    """
    spec, catalogue = load_features(features)
    attributes = rule_attributes(items, catalogue, spec)
    attributes.save(features / FOLDER)
    bound_to = Release(Items.of(catalogue, attributes), attributes, spec.tasks)
    (features / POLICIES).mkdir()
    for name, policy in policies.items():
        if problems := policy.problems(bound_to):
            raise InvalidRelease(f"policy {name}: {'; '.join(problems)}")
        (features / POLICIES / f"{name}.toml").write_text(policy.text())


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
        if manifest.stripped:
            raise BadModel(f"{plan} has no weights, and Triton cannot put them in again; build without --strip-weights")
        if tuple(p["bucket"] for p in manifest.profiles) != contract.BUCKETS:
            raise BadModel(f"{plan} has no profile for each of the buckets {contract.BUCKETS}; build again")
        checked.append((plan, manifest))
    return checked


def _recorded(dataset: Dataset) -> list[dict[str, Any]]:
    """Requests of the test split, each scenario among them, with item ids as callers send them. They name nobody: users
    are numbered, times are days, and queries are such as several users have asked. Where a scenario has too few of
    those, words of a title stand for a query, and scores that came of it are left out."""
    named = dataset.requests.filter(pl.col("user_id") != ANONYMOUS_USER)
    common = shared(named, _ASKED_BY) | {""}
    if not named.select(pl.len()).collect().item():  # judged search: nobody has asked
        common |= shared(dataset.requests, 1)
    test = dataset.split("test").with_columns(plain().alias("query"))
    test = test.with_columns(known=pl.col("query").is_in(list(common)))
    test = test.sort("known", descending=True, maintain_order=True)
    picked = test.group_by("scenario", maintain_order=True).head(_RECORDED)
    titles = dict(dataset.items.select("item_id", "title").iter_rows())
    return [
        _request(
            dataset, number if row["user_id"] != ANONYMOUS_USER else None, row["timestamp"], row["scenario"],
            row["query"] if row["known"] else _words_of(titles[row["item_ids"][0]]), row["item_ids"],
            row["retrieval_scores"] if row["known"] else None,
        )
        for number, row in enumerate(picked.iter_rows(named=True), 1)
    ]  # fmt: skip


def _invented(dataset: Dataset) -> list[dict[str, Any]]:
    """The same of a ranker with differential privacy, of nobody's requests: candidates are drawn from all items, words
    of a title are the query in scenarios that have queries, and there are no scores."""
    rng = np.random.default_rng(len(dataset.items))
    asked = (pl.col("query") != "").any().alias("asked")
    scenarios = dataset.split("test").group_by("scenario", maintain_order=True).agg(asked, pl.col("timestamp").max())
    found = []
    for scenario, with_query, moment in scenarios.iter_rows():
        for number in range(_RECORDED):
            drawn = dataset.items[rng.permutation(dataset.items.height)[:_INVENTED]]
            query = _words_of(drawn["title"][0]) if with_query else ""
            found.append(_request(dataset, number or None, moment, scenario, query, drawn["item_id"].to_list(), None))
    return found


def _request(
    dataset: Dataset, user: int | None, moment: int, scenario: str, query: str, items: list[int],
    scores: list[float] | None,
) -> dict[str, Any]:  # fmt: skip
    """As a caller sends it. ``user``: a number for one who is nobody in particular; None: anonymous."""
    ids, keys = dataset.description.ids, {}
    if ids["item"] == "strings":
        keys = dict(dataset.items.filter(pl.col("item_id").is_in(items)).select("item_id", "key").iter_rows())
    named = user if ids.get("user", "numbers") == "numbers" else stable_id(f"recorded request {user}")
    return {
        "user_id": ANONYMOUS_USER if user is None else named,
        "timestamp": moment // _DAY_S * _DAY_S if dataset.description.timed else moment,
        "query": query,
        "scenario": scenario,
        "item_ids": [keys.get(item, item) for item in items],
        "retrieval_scores": scores,
        "top_k": 10,
    }


def _words_of(title: str) -> str:
    return " ".join(title.split()[:3])


def _check_above_retrieval(run: TrainedRun, dataset: Dataset) -> None:
    """Raises BadModel where a ranker that went through no gate orders validation requests worse than they came."""
    dataset = run.judged(dataset)
    if not dataset.sizes("valid").requests:
        return
    examples = Examples.read(dataset, "valid", run.features, _COMPARED)
    if not (examples.labels > 0).any():
        return
    own, retrieval = valid_ndcg(run.model(), examples), retrieval_ndcg(examples)
    if own < retrieval:
        raise BadModel(
            f"the ranker's NDCG@10 on {len(examples)} validation requests is {own:.4f}, that of the order in which "
            f"candidates come {retrieval:.4f}: it would do harm. `trirank evaluate` tells more; train on more data, or "
            "say --allow-failing-gate"
        )


def _metrics(run: TrainedRun, gate: dict[str, Any] | None) -> dict[str, Any]:
    """How good it is: on the validation split while it was trained, and what the gate measured last."""
    found: dict[str, Any] = {"valid_ndcg10": run.facts["valid_ndcg10"]}
    if gate:
        last = gate["stages"][-1]
        found["gate"] = {"split": gate["split"], "requests": gate["requests"], "stage": last["stage"]}
        found["gate"] |= {name: last[name] for name in ("ndcg10", "ndcg_ratio", "latency_ms", "size_mb")}
    return found


def _git_commit() -> str | None:
    """Of the working directory, which holds a team's recipes and models; ``-dirty``: with changes not committed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
