"""What the stages read of a release's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from trirank import contract

from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import InvalidRelease
from trirank_backend.features import FeatureSpec, Packer, Transitions
from trirank_backend.text import TextEncoder
from trirank_backend.words.lexicon import FOLDER, load_lessons, load_lexicon
from trirank_backend.words.queries import QueryReader

POLICIES = "policies"
FEATURES = "features"
"""The folder of a release that holds what preprocess and rerank read."""


def load_features(directory: Path) -> tuple[FeatureSpec, Catalogue]:
    """Specification and catalogue of a release's ``features`` folder."""
    return FeatureSpec.load(directory / "features.json"), Catalogue.load(directory / "catalogue")


def load_packer(directory: Path) -> tuple[Packer, TextEncoder]:
    """What turns requests into tensors, from a ``features`` folder.

    Raises:
        InvalidRelease: a file is missing or damaged.
    """
    spec, catalogue = load_features(directory)
    try:
        idf = np.load(directory / "token_idf.npy")
    except (OSError, ValueError) as error:
        raise InvalidRelease(f"{directory / 'token_idf.npy'} cannot be read ({error}); assemble again") from error
    if idf.dtype != np.float32 or idf.shape != (spec.vocabulary_size,):
        raise InvalidRelease(
            f"{directory / 'token_idf.npy'} holds {idf.dtype} of shape {list(idf.shape)}, not one float32 for each of "
            f"{spec.vocabulary_size} ids; assemble again"
        )
    transitions = Transitions.load(directory, len(catalogue))
    lexicon = lessons = reader = None
    if spec.words:
        folder = directory / FOLDER
        lexicon = load_lexicon(folder, len(catalogue))
        lessons = load_lessons(folder, len(lexicon.rarity) - 1)
        reader = QueryReader.load(folder, spec.words, lexicon, lessons)
    text = TextEncoder.load(directory / "tokenizer.json", spec.tables["token"][0], reader)
    return Packer(spec, catalogue, idf, transitions, lexicon, lessons), text


def check_contract(release: Path) -> None:
    """Refuse a release of another contract: code and artefacts must not drift apart unseen.

    Raises:
        InvalidRelease: the manifest is missing, or of another contract.
    """
    try:
        version = json.loads((release / "manifest.json").read_text())["contract"]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRelease(f"{release / 'manifest.json'} cannot be read ({error}); assemble again") from error
    if version != contract.CONTRACT_VERSION:
        raise InvalidRelease(
            f"release {release} is of contract {version}, this backend speaks {contract.CONTRACT_VERSION}; "
            "assemble it again, or install the version that assembled it"
        )
