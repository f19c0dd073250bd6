"""A release: an immutable model repository with all that it needs, named by its content.

``models/``         the model repository that Triton serves
``features/``       what preprocess and rerank read: catalogue, tokeniser, policies and what these read of items;
                    nothing of users
``items.parquet``   titles, brands and prices, for people
``requests.json``   recorded requests, each scenario among them, that prove readiness
``MODEL_CARD.md``   what it is, from what, and how good
``sbom.cdx.json``   software bill of materials (CycloneDX): what the release was made with
``manifest.json``   contract, digests of all files, data, recipe, metrics, parity, gate, engines
``manifest.sig``    its signature, where the release was signed (trirank_build.repository.signing)

Nothing here needs torch or ONNX, so that a serving machine can do without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from trirank import RankRequest, contract

from trirank_build.artefacts import combined_digest, tree_digests
from trirank_build.engines.plan import PlanManifest
from trirank_build.errors import BadModel
from trirank_build.repository.configs import models_of, parse_config, problems_of

MODELS, FEATURES, MANIFEST, ITEMS, REQUESTS, CARD, COMPONENTS, SIGNATURE = (
    "models",
    "features",
    "manifest.json",
    "items.parquet",
    "requests.json",
    "MODEL_CARD.md",
    "sbom.cdx.json",
    "manifest.sig",
)
TEMPLATES = Path(__file__).parent.parent / "model_repository"
GRAPH = "model.onnx"
_BESIDE = (MANIFEST, CARD, COMPONENTS, SIGNATURE)
"""Files that tell how a release came to be, and are no part of its name."""


def release_name(files: dict[str, str]) -> str:
    """The name of a release with these files: it says what is served; how that came to be is told beside it."""
    served = {name: digest for name, digest in files.items() if name not in _BESIDE}
    return combined_digest(served | {"contract": str(contract.CONTRACT_VERSION)})[:12]


def graph_place(pipeline: str) -> str:
    """Where a release of this pipeline has its ONNX graph."""
    model = contract.ENSEMBLE if pipeline == "single" else contract.RANKER
    return f"{MODELS}/{model}/1/{GRAPH}"


def load_manifest(release: Path) -> dict[str, Any]:
    """The manifest of a release.

    Raises:
        BadModel: this is no release.
    """
    try:
        manifest: dict[str, Any] = json.loads((release / MANIFEST).read_text())
        missing = [
            key for key in ("release", "contract", "runtime", "pipeline", "engines", "files") if key not in manifest
        ]
    except (OSError, ValueError, TypeError) as error:
        raise BadModel(f"{release} is no release ({error}); make one with `trirank assemble`") from error
    if missing:
        raise BadModel(f"{release / MANIFEST} lacks {', '.join(missing)}; make it again with `trirank assemble`")
    return manifest


def recorded_requests(release: Path) -> list[RankRequest]:
    """The requests that a release carries to prove that it works.

    Raises:
        BadModel: they are missing or damaged.
    """
    try:
        return [RankRequest.from_dict(raw) for raw in json.loads((release / REQUESTS).read_text())]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadModel(f"{release / REQUESTS} cannot be read ({error}); assemble again") from error


def model_config(release: Path, model: str) -> Any:
    """The configuration of one of a release's models, parsed.

    Raises:
        BadModel: it is missing or damaged.
    """
    path = release / MODELS / model / "config.pbtxt"
    try:
        return parse_config(path.read_text())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BadModel(f"{path} cannot be read ({error}); assemble again") from error


def plan_manifests(manifest: dict[str, Any]) -> list[PlanManifest]:
    """Of the plans that a release holds.

    Raises:
        BadModel: the manifest was written by another version of trirank.
    """
    try:
        return [PlanManifest(**engine) for engine in manifest["engines"]]
    except TypeError as error:
        raise BadModel(
            f"release {manifest['release']} describes its plans otherwise ({error}); assemble again"
        ) from error


def verify(release: Path) -> list[str]:
    """What is wrong with a release; nothing is a good answer. Every file that differs is named.

    Raises:
        BadModel: this is no release.
    """
    manifest = load_manifest(release)
    try:
        return list(_problems(release, manifest))
    except OSError as error:
        return [f"{error.filename or release} cannot be read ({error.strerror})"]


def _problems(release: Path, manifest: dict[str, Any]) -> Iterator[str]:
    wanted: dict[str, str] = manifest["files"]
    found = {name: digest for name, digest in tree_digests(release).items() if name not in (MANIFEST, SIGNATURE)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} does not belong to it"
        elif found[name] != wanted[name]:
            yield f"{name} has digest {found[name][:12]}, not {wanted[name][:12]}"
    name = release_name(wanted)
    if manifest["release"] != name:
        yield f"release is {manifest['release']!r} in the manifest, {name!r} by its files"
    if release.resolve().name != manifest["release"]:
        yield f"its folder is named {release.resolve().name}, not {manifest['release']}"
    if manifest["contract"] != contract.CONTRACT_VERSION:
        yield f"contract is {manifest['contract']}, this trirank speaks {contract.CONTRACT_VERSION}"
    for model in models_of(manifest["pipeline"]):
        yield from (f"{model}: {problem}" for problem in _config_problems(release, model))
    for plan in plan_manifests(manifest):
        file = f"{MODELS}/{contract.RANKER}/1/{plan.sm}.plan"
        if wanted.get(file) != plan.plan:
            yield f"{file} is {str(wanted.get(file))[:12]}, not {plan.plan[:12]} as its engine's lock says"
        if plan.onnx != manifest.get("onnx"):
            yield f"{file} was built from ONNX {plan.onnx[:12]}, the release's is {str(manifest.get('onnx'))[:12]}"


def _config_problems(release: Path, model: str) -> list[str]:
    try:
        return problems_of(model_config(release, model))
    except BadModel as error:
        return [str(error)]
