"""Rules about releases of trirank."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

from trirank_backend.scoring import ENGINES

from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Repository, Surroundings
from trirank_build.errors import BadModel
from trirank_build.repository.release import load_manifest, verify

_AT_RUN_TIME = ("numpy", "onnxruntime", "openvino", "tokenizers")


@rule("REL01", Severity.ERROR, "Take the release again from where it was assembled.")
def not_what_was_assembled(repository: Repository, around: Surroundings) -> Found:
    """A release has changed since it was assembled, or is of another contract."""
    if repository.release is not None:
        try:
            yield from ((repository.release.name, problem) for problem in verify(repository.release))
        except BadModel as error:
            yield repository.release.name, str(error)


@rule("REL02", Severity.ERROR, "Install it, or assemble with --engine onnxruntime.")
def engine_is_not_installed(repository: Repository, around: Surroundings) -> Found:
    """The engine that shall score is not installed here."""
    manifest = _manifest(repository)
    engine = manifest.get("engine")
    if engine in ENGINES and importlib.util.find_spec(engine.split("-")[0]) is None:
        yield manifest["release"], f"engine {engine} is not installed"


@rule("REL06", Severity.ERROR, "Assemble again with an engine that there is, or without --engine.")
def engine_that_nobody_knows(repository: Repository, around: Surroundings) -> Found:
    """The release names an engine that this version does not have; no server would start with it."""
    manifest = _manifest(repository)
    engine = manifest.get("engine")
    if engine and engine not in ENGINES:
        yield manifest["release"], f"engine {engine} is none of {', '.join(ENGINES)}"


@rule("REL03", Severity.WARNING, "Run `trirank gate` on the graph and assemble again.")
def nothing_proves_its_ranking(repository: Repository, around: Surroundings) -> Found:
    """A compressed ranker is served that failed its gate, or went through none."""
    manifest = _manifest(repository)
    gate = manifest.get("gate")
    if manifest.get("compression") and gate is None:
        yield manifest["release"], "it is compressed and went through no gate"
    elif gate and not gate["passed"]:
        yield manifest["release"], f"its gate failed: {'; '.join(gate['failures'])}"


@rule("REL04", Severity.WARNING, "Install the versions of the manifest, or assemble again with what is here.")
def other_versions(repository: Repository, around: Surroundings) -> Found:
    """A library is here in another major version than the release was assembled and proven with."""
    manifest = _manifest(repository)
    for package in _AT_RUN_TIME:
        then, now = manifest.get("versions", {}).get(package, "absent"), _version(package)
        if then != "absent" and now is not None and then.split(".")[0] != now.split(".")[0]:
            yield manifest["release"], f"{package} was {then}, here it is {now}"


@rule(
    "REL05", Severity.INFO,
    "Assemble once more with --pipeline single and give both more than they can take: "
    "trirank loadtest RELEASE --find-capacity --slo p99=50ms.",
)  # fmt: skip
def single_would_serve_more(repository: Repository, around: Surroundings) -> Found:
    """Stages and ranker are three Python models, which hand over to each other; all in one process serve more on a
    CPU."""
    manifest = _manifest(repository)
    on_cpu = manifest.get("runtime") == "python" and not str(manifest.get("engine")).startswith("onnxruntime-")
    if on_cpu and manifest.get("pipeline") == "ensemble":
        yield manifest["release"], "its stages are three models with --runtime python"


def _manifest(repository: Repository) -> dict[str, Any]:
    if repository.release is None:
        return {}
    try:
        return load_manifest(repository.release)
    except BadModel:  # REL01 tells
        return {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
