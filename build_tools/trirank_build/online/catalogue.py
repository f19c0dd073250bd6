"""`trirank catalogue`: prices, stock and blocks change while a release is served.

A delta is a table of ``item_id`` and any of ``price``, ``stock`` and ``blocked``; an empty cell changes nothing. It is
added to what was changed before, and the file that servers read is replaced in one step, or not at all.
"""

from __future__ import annotations

import csv
import fcntl
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank_backend.release import FEATURES
from trirank_backend.stores.overlay import STATE, read_overlay, write_overlay

from trirank_build.errors import BadData
from trirank_build.repository.release import load_manifest

COLUMNS = ("price", "stock", "blocked")
_YES, _NO = ("1", "true", "yes"), ("0", "false", "no")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MOST_STOCK = 2**31 - 1
_MOST_PRICE = 1e30
"""Above the largest number of 32 bits a price would be infinite."""


class Update(NamedTuple):
    """What a delta did: rows of it, items that the file tells of now, and rows left out for their unknown item."""

    rows: int
    items: int
    unknown: int


def apply_delta(delta: Path, catalogue: Path, release: Path, skip_unknown: bool = False, fresh: bool = False) -> Update:
    """Add a delta to a file of changes.

    Args:
        delta: CSV or TSV with a header, or JSON lines.
        catalogue: the file that servers read; made if it is not there.
        release: whose items the delta may tell of.
        skip_unknown: leave out rows of other items, rather than refuse the delta.
        fresh: forget what was changed before.

    Raises:
        BadData: the delta cannot be read or has a wrong value; nothing was changed.
        InvalidStore: the file of changes cannot be read.
    """
    kinds = load_manifest(release).get("ids", {})
    known = np.load(release / FEATURES / "catalogue" / "ids.npy", mmap_mode="r")
    changes, unknown, rows = np.zeros(0, STATE), 0, 0
    found: dict[int, tuple[int, float, int, int]] = {}
    for place, row in _rows(delta):
        rows += 1
        item = _item(row.get("item_id"), kinds.get("item", "numbers"), place)
        at = int(np.searchsorted(known, item))
        if at == len(known) or known[at] != item:
            if not skip_unknown:
                raise BadData(
                    f"{place}: item {row['item_id']} is not in the catalogue of {release.resolve().name}; leave it "
                    "out, say --skip-unknown, or assemble a release that has it"
                )
            unknown += 1
            continue
        found[item] = (
            item,
            _value(row, "price", place, _price, found.get(item, (0, np.nan))[1]),
            _value(row, "stock", place, _stock, found[item][2] if item in found else -1),
            _value(row, "blocked", place, _blocked, found[item][3] if item in found else -1),
        )
    changes = np.array([(*found[item], 0) for item in sorted(found)], STATE)
    with _alone(catalogue):
        before = np.zeros(0, STATE)
        if not fresh:
            with suppress(FileNotFoundError):
                before = read_overlay(catalogue, STATE)
        now = _merged(before, changes)
        write_overlay(catalogue, now)
    return Update(rows, len(now), unknown)


def _merged(before: NDArray[Any], changes: NDArray[Any]) -> NDArray[Any]:
    """Both, ascending by id; a change has the last word in what it says."""
    ids = np.union1d(before["id"], changes["id"])
    now = np.zeros(len(ids), STATE)
    now["id"], now["price"], now["stock"] = ids, np.nan, -1
    for name in COLUMNS:
        now[name][np.searchsorted(ids, before["id"])] = before[name]
        said = ~np.isnan(changes[name]) if name == "price" else changes[name] >= 0
        now[name][np.searchsorted(ids, changes["id"][said])] = changes[name][said]
    return now


def _rows(delta: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its values by column.

    Raises:
        BadData: the file cannot be read, or lacks a column.
    """
    try:
        with delta.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            if first.lstrip().startswith("{"):
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise BadData(f"{delta}, line {number} is {line.strip()[:40]}; each line is a JSON object")
                        _check_columns(delta, list(row))
                        yield f"{delta}, line {number}", row
                return
            separator = max(",;\t", key=first.count)
            reader = csv.DictReader(stream, delimiter=separator)
            _check_columns(delta, list(reader.fieldnames or ()))
            for row in reader:
                if None in row:
                    raise BadData(f"{delta}, line {reader.line_num}: it has more cells than the header has names")
                yield f"{delta}, line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise BadData(f"{delta} cannot be read ({error}); give CSV with a header, or JSON lines") from error


def _check_columns(delta: Path, names: list[str]) -> None:
    if "item_id" not in names or not set(COLUMNS) & set(names):
        raise BadData(
            f"{delta} has the columns {', '.join(map(str, names)) or 'none'}; a delta needs item_id and at least one "
            f"of {', '.join(COLUMNS)}"
        )
    if unknown := sorted(set(names) - {"item_id", *COLUMNS}):
        raise BadData(f"{delta} has the column {unknown[0]}, which a delta cannot change; leave it out")


def _item(value: Any, kind: str, place: str) -> int:
    text = "" if value is None else str(value).strip()
    if not text:
        raise BadData(f"{place}: item_id is empty")
    if kind == "strings":
        return contract.stable_id(text)
    if not _WHOLE.fullmatch(text):
        raise BadData(f"{place}: item_id is {text!r}; ids of this catalogue are numbers")
    return int(text)


def _value(row: dict[str, Any], name: str, place: str, read: Callable[[str], Any], absent: Any) -> Any:
    value = row.get(name)
    text = "" if value is None else str(value).strip()
    if not text:
        return absent
    try:
        return read(text)
    except ValueError as error:
        raise BadData(f"{place}: {name} is {text!r}; {error}") from None


def _price(text: str) -> float:
    price = float(text) if _DECIMAL.fullmatch(text) else float("nan")
    if not 0 <= price < _MOST_PRICE:
        raise ValueError("it is a number of 0 or more, with a point")
    return price


def _stock(text: str) -> int:
    stock = float(text) if _DECIMAL.fullmatch(text) else -1.0
    if not (stock.is_integer() and 0 <= stock <= _MOST_STOCK):
        raise ValueError("it is a whole number of pieces, 0 or more")
    return int(stock)


def _blocked(text: str) -> int:
    if text.lower() in _YES:
        return 1
    if text.lower() in _NO:
        return 0
    raise ValueError(f"it is one of {', '.join(_YES + _NO)}")


@contextmanager
def _alone(catalogue: Path) -> Iterator[None]:
    """Two that change a file at a time would lose what one of them says.

    Raises:
        BadData: nothing can be written there.
    """
    try:
        catalogue.parent.mkdir(parents=True, exist_ok=True)
        with catalogue.with_name(f".{catalogue.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BadData(f"{catalogue} cannot be written ({error.strerror}); name another with --catalogue") from error
