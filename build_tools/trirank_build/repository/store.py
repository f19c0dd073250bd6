"""The folder of releases: which is served, which were, which can go.

``current`` is a link to the served release and moves in one step, so that whoever reads it finds the old one or the new
one. ``promotions.jsonl`` is written before the link moves: a promotion that was cut short leaves a line that no link
follows, and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trirank_build.artefacts import atomic_directory, atomic_file
from trirank_build.errors import BadModel
from trirank_build.repository.release import CARD, COMPONENTS, MANIFEST, SIGNATURE, load_manifest, verify

CURRENT, PROMOTIONS = "current", "promotions.jsonl"
_LOCK = ".lock"
_ASSEMBLING, _REMOVING = ".assembling.", ".removing."
_ABANDONED_S = 60
"""Whoever makes a scratch folder holds it within so long."""


@dataclass(frozen=True)
class Listed:
    """A release of a folder, as `trirank release list` shows it.

    Attributes:
        promoted: when it was promoted last, ISO 8601; empty: never.
        problem: why it cannot be read; empty: it can.
    """

    name: str
    manifest: dict[str, Any]
    current: bool
    promoted: str
    in_use: bool
    problem: str = ""


def current(folder: Path) -> Path | None:
    """The served release of a folder."""
    link = folder / CURRENT
    return link.resolve() if link.is_symlink() and link.is_dir() else None


def releases(folder: Path) -> list[Listed]:
    """All of them, the newest first."""
    served, promoted = current(folder), {}
    for line in _promotions(folder):
        promoted[line["release"]] = line["at"]
    found = []
    places = [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]
    for place in sorted(places, key=lambda p: p.stat().st_mtime, reverse=True):
        name, is_current = place.name, served is not None and place.resolve() == served
        try:
            manifest, problem = load_manifest(place), ""
        except BadModel as error:
            manifest, problem = {}, str(error)
        found.append(Listed(name, manifest, is_current, promoted.get(name, ""), _in_use(place), problem))
    return found


def promote(release: Path) -> Path:
    """Point ``current`` beside the release at it, in one step; gives the link.

    Raises:
        BadModel: it is no release, or no longer what was assembled.
    """
    release = release.resolve()
    load_manifest(release)  # what is no release lies in no folder of releases, and gets no lock there
    with _locked(release.parent):
        refuse_damaged(release, "promoted")
        return _move(release.parent, release.name, rollback=False)


def rollback(folder: Path) -> Path:
    """Point ``current`` at what was served before the release that is served now; gives that release.

    Going back again goes one further back, not forward, and never in a circle: promotions are a stack, and going back
    takes the top off.

    Raises:
        BadModel: nothing was served before, or it is gone or damaged.
    """
    with _locked(folder):
        served = current(folder)
        if served is None:
            raise BadModel(f"{folder} has no current release; promote one with `trirank release promote`")
        stack = _served_before(folder, served.name)
        before = stack[-1] if stack else None
        if before is None:
            raise BadModel(f"{served.name} is the first release that {folder} served; there is none to go back to")
        if not (folder / before).is_dir():
            raise BadModel(f"{before}, served before {served.name}, is gone; promote another one of {folder}")
        refuse_damaged(folder / before, "served again")
        _move(folder, before, rollback=True)
    return folder / before


def gc(folder: Path, keep: int, dry_run: bool = False) -> list[str]:
    """Remove releases that nothing needs; gives the names of those that went.

    The served one, those that a server on this machine has open, and the ``keep`` that were promoted or made last stay.
    """
    removed = []
    with _locked(folder):
        listed = releases(folder)
        newest = sorted(listed, key=lambda r: r.promoted or _made(folder / r.name), reverse=True)
        kept = {r.name for r in newest if r.current or r.in_use} | {r.name for r in newest[:keep]}
        for release in listed:
            if release.name in kept or not release.manifest:
                continue  # a folder that is no release is not ours to remove
            removed.append(release.name)
            if not dry_run:
                # Out of sight in one step; a removal that is cut short leaves a hidden folder and no half release.
                trash = Path(tempfile.mkdtemp(prefix=_REMOVING, dir=folder))
                os.replace(folder / release.name, trash / release.name)
                shutil.rmtree(trash)
        if not dry_run:
            for left in (*folder.glob(f"{_REMOVING}*"), *folder.glob(f"{_ASSEMBLING}*")):
                with suppress(FileNotFoundError):  # its assembly has just ended
                    if time.time() - left.stat().st_mtime > _ABANDONED_S and not _in_use(left):
                        shutil.rmtree(left, ignore_errors=True)
    return removed


@contextmanager
def assembling(folder: Path) -> Iterator[Path]:
    """A scratch folder within ``folder`` that `gc` leaves alone for as long as the block runs, and that is gone
    then."""
    with tempfile.TemporaryDirectory(prefix=_ASSEMBLING, dir=folder) as scratch, in_use(Path(scratch)):
        yield Path(scratch)


def settle(made: Path, target: Path) -> Path:
    """Put a release that was made to its place; gives it. Where the same files are there already, they stay, and what
    is told of them is taken from the one that was made; where they are damaged, they are replaced."""
    if not target.is_dir():
        with suppress(OSError):  # another assembly of the same was faster
            os.replace(made, target)
            return target
    with _locked(target.parent):  # so that no promotion verifies it meanwhile
        if _is_damaged(target):
            with atomic_directory(target) as scratch:
                shutil.copytree(made, scratch, dirs_exist_ok=True)
            return target
        (target / SIGNATURE).unlink(missing_ok=True)  # it is of another manifest
        for name in (CARD, COMPONENTS, MANIFEST):
            with atomic_file(target / name) as scratch:
                shutil.copyfile(made / name, scratch)
    return target


@contextmanager
def in_use(release: Path) -> Iterator[None]:
    """While the block runs, `gc` on this machine leaves the folder alone."""
    holder = os.open(release, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(holder)


def diff(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Field, its value in one manifest and in the other, where they differ; nested fields by dotted names."""
    a, b = _flat(one), _flat(other)
    return [
        (name, _short(a.get(name)), _short(b.get(name)))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(each, f"{name}.{key}" if name else str(key)) for key, each in value.items()]
        return {key: each for part in parts for key, each in part.items()}
    return {name: value}


def _short(value: Any) -> str:
    if value is None:
        return "—"
    text = value if isinstance(value, str) else json.dumps(value)
    is_digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if is_digest else text if len(text) <= 60 else text[:57] + "…"


def refuse_damaged(release: Path, what: str) -> None:
    """Raises BadModel if a release is no longer what was assembled; ``what`` cannot be done with it then."""
    if problems := verify(release):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadModel(f"{release} cannot be {what}: {'; '.join(problems[:3])}{more}; assemble it again")


def _move(folder: Path, name: str, rollback: bool) -> Path:
    served = current(folder)
    if served is None or served.name != name:
        line = {"release": name, "before": served.name if served else None, "at": _now().isoformat()}
        with (folder / PROMOTIONS).open("a") as stream:
            # The line break goes in front too: a line that was cut short must not swallow this one.
            stream.write("\n" + json.dumps(line | {"rollback": rollback}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        with atomic_file(folder / CURRENT) as scratch:
            scratch.symlink_to(name)
    return folder / CURRENT


def _promotions(folder: Path) -> list[dict[str, Any]]:
    path = folder / PROMOTIONS
    found = []
    for line in path.read_text().split("\n") if path.is_file() else []:
        if not line:
            continue
        try:
            entry = json.loads(line)
            found.append({key: entry[key] for key in ("release", "before", "at", "rollback")})
        except (ValueError, KeyError, TypeError):  # cut short while it was written: that promotion never happened
            continue
    return found


def _is_damaged(release: Path) -> bool:
    try:
        return bool(verify(release))
    except BadModel:
        return True


def _served_before(folder: Path, served: str) -> list[str]:
    """What was served before the release that is served now, the last one last."""
    lines = _promotions(folder)
    while lines:
        stack: list[str] = []
        whole: list[str] = []  # as it was before the last rollback, which may have been cut short
        for line in lines:
            name, before = line["release"], line["before"]
            if line["rollback"]:
                whole = stack
                stack = stack[: len(stack) - stack[::-1].index(name)] if name in stack else [name]
                continue
            if before not in stack and whole and whole[-1] == before:
                stack = whole
            # A promotion that was cut short left a line of its own, but nothing was served by it.
            stack = stack[: len(stack) - stack[::-1].index(before)] if before in stack else [before] if before else []
            stack.append(name)
        if stack[-1] == served:
            return stack[:-1]
        lines.pop()  # the last one was cut short
    return []


def _in_use(place: Path) -> bool:
    try:
        holder = os.open(place, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(holder)
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One promotion, rollback or removal at a time."""
    if not folder.is_dir():
        raise BadModel(f"{folder} is no folder of releases; make one with `trirank assemble`")
    with (folder / _LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _made(place: Path) -> str:
    return datetime.fromtimestamp(place.stat().st_mtime, timezone.utc).isoformat()
