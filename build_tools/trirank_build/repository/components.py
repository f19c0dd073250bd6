"""What a release was made with, as a software bill of materials (CycloneDX 1.6)."""

from __future__ import annotations

from importlib import metadata

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def bill_of_materials(release: str, onnx_digest: str) -> str:
    """JSON: the release's model by its graph's digest, and every installed package that trirank may have used, with its
    dependencies."""
    model = Component(
        name=f"trirank-release-{release}", version=release, type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"release-{release}", hashes=[HashType(alg=HashAlgorithm.SHA_256, content=onnx_digest)],
    )  # fmt: skip
    bom = Bom()
    bom.metadata.component = model
    parts = {}
    installed = _installed("trirank")
    for name, version in sorted(installed.items()):
        purl = PackageURL("pypi", name=name, version=version)
        parts[name] = Component(
            name=name, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=purl.to_string()
        )
        bom.components.add(parts[name])
    bom.register_dependency(model, [parts["trirank"]])
    for name, part in parts.items():
        bom.register_dependency(part, [parts[other] for other in _needs(name) if other in parts])
    return JsonV1Dot6(bom).output_as_string(indent=1)


def _installed(root: str) -> dict[str, str]:
    """Package → version, of what is installed and can be reached from ``root``, its extras included."""
    found: dict[str, str] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # of an extra that is not here
            continue
        waiting += _needs(name)
    return found


def _needs(name: str) -> list[str]:
    """Names that a package may need. An extra's are told by its own packages' being there, so markers are not asked."""
    return sorted({canonicalize_name(Requirement(each).name) for each in metadata.requires(name) or ()})
