"""The policies of a release, and what they are bound to."""

from __future__ import annotations

from pathlib import Path

from trirank_backend.attributes import FOLDER, Attributes
from trirank_backend.policies import Items, Policy, Release, load_policies
from trirank_backend.release import POLICIES, load_features


def load_rules(directory: Path) -> tuple[Release, dict[str, Policy]]:
    """What policies are bound to, and the policies, from a ``features`` folder.

    Raises:
        InvalidRelease: a file is missing or damaged.
        InvalidPolicy: a policy is wrong.
    """
    spec, catalogue = load_features(directory)
    attributes = Attributes.load(directory / FOLDER, len(catalogue))
    return Release(Items.of(catalogue, attributes), attributes, spec.tasks), load_policies(directory / POLICIES)
