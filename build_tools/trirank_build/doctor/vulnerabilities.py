"""Which published vulnerabilities a server of a version has, and which of them cannot be reached."""

from __future__ import annotations

import re
import sys
from datetime import date
from functools import cache
from pathlib import Path

from pydantic import BaseModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_suffix(".toml")


class Vulnerability(BaseModel, frozen=True):
    """What one bulletin says of one part of Triton.

    Attributes:
        release, fixed: the first container's tag, and the server's version, that do not have it.
        closed_by: the interface that has to be open for it; empty: none, or it is not known.
    """

    bulletin: int
    date: date
    cves: tuple[str, ...]
    what: str
    release: str
    fixed: str
    closed_by: str


@cache
def published() -> tuple[Vulnerability, ...]:
    """All that are known, in the order of their mending."""
    raw = tomllib.loads(TABLE.read_text())["vulnerability"]
    return tuple(Vulnerability.model_validate(each) for each in raw)


def of_version(version: str) -> list[Vulnerability]:
    """Those that a server of this version has."""
    return [each for each in published() if order(version) < order(each.fixed)]


def order(version: str) -> tuple[int, ...]:
    """What versions are compared by."""
    found = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return tuple(found + [0] * (3 - len(found)))
