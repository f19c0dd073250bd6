"""Reading what users bring: CSV with commas, tabs, semicolons or bars, and Parquet; gzipped or not; in any encoding."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl

from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import Report

_SEPARATORS = (",", "\t", ";", "|")
LARGE = 256 << 20
"""Bytes of a file that is read whole."""
ROWS = 1_000_000
"""Of a larger one that are read at a time."""
_SHOWN = 40
"""Letters of a damaged line that an error shows."""


def read_bytes(path: Path) -> bytes:
    """The file's content, unzipped.

    Raises:
        BadData: it is missing, empty, or not what its name says.
    """
    if not path.is_file():
        raise BadData(f"{path} is no file; give a CSV, TSV, Parquet or text file, or the word `shop`")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise BadData(f"{path} is no whole gzip file ({error}); fetch it again") from error
    if not raw.strip():
        raise BadData(f"{path} is empty; it must hold at least one row")
    return raw


def read_text(path: Path, report: Report, encoding: str | None = None) -> str:
    """Text in the encoding that is named. Without a name: UTF-8; where nothing but ASCII is valid UTF-8, Latin-1, which
    the report tells.

    Raises:
        BadData: it is no text, or not in that encoding.
    """
    raw = read_bytes(path)
    if encoding is None and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    if encoding is not None:
        try:
            return raw.decode(encoding)
        except LookupError:
            raise BadData(f"--encoding {encoding} is none; take utf-8, latin-1, cp1252, gb18030, …") from None
        except UnicodeError as error:
            at = _line_of(raw, getattr(error, "start", 0))
            raise BadData(f"{path}, line {at} is not in --encoding {encoding} ({error}); name another") from None
    if b"\0" in raw[:65_536]:
        raise BadData(f"{path} is a binary file, not text; give CSV, TSV or Parquet")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at, damaged = _line_of(raw, error.start), raw.decode("utf-8", "replace")
        line = damaged.splitlines()[at - 1].strip()
        if sum(letter > "\x7f" and letter != "\ufffd" for letter in damaged) > damaged.count("\ufffd"):
            raise BadData(
                f"{path}, line {at} is damaged: most of the file is UTF-8, and {line[:_SHOWN]!r} is not; mend it, or "
                "say --encoding latin-1 if all of it is"
            ) from None
        text = raw.decode("latin-1")
        line = text.splitlines()[at - 1].strip()[:_SHOWN]
        report.note(
            f"{path.name}: read as Latin-1, since line {at} is not UTF-8: {line!r}. "
            "If that does not look right, say --encoding cp1252, gb18030, shift_jis, …"
        )
        return text


def read_table(path: Path, report: Report, encoding: str | None = None, rows: int | None = None) -> pl.DataFrame:
    """A table whose column names are in small letters; CSV columns are all strings.

    Args:
        rows: the first ones alone, of a large file.

    Raises:
        BadData: it cannot be parsed, or two columns have one name.
    """
    if rows is not None and _is_large(path, encoding):
        return next(read_tables(path, report, encoding)).head(rows)
    try:
        if is_parquet(path):
            table = pl.read_parquet(path)
            return table.rename(dict(zip(table.columns, _names(table.columns, path), strict=True)))
        text = read_text(path, report, encoding).lstrip("\r\n").replace("\r\n", "\n").replace("\r", "\n")
        separator, header = split_header(text)
        names = _names(header, path)
        body = io.BytesIO(text.encode())
        return pl.read_csv(body, separator=separator, infer_schema=False, new_columns=names)
    except (pl.exceptions.PolarsError, csv.Error) as error:
        raise BadData(f"{path} cannot be read as a table: {error}".split("\n")[0]) from error


def read_tables(
    path: Path, report: Report, encoding: str | None = None, wanted: Collection[str] = ()
) -> Iterator[pl.DataFrame]:
    """The same of a file of any size: one of more than LARGE bytes by pieces, where it is Parquet or plain UTF-8.

    Args:
        wanted: the columns that anybody looks at, none: all; of a large file no others are read.

    Raises:
        BadData: as read_table.
    """
    if not _is_large(path, encoding):
        yield read_table(path, report, encoding)
        return
    try:
        if is_parquet(path):
            scanned = pl.scan_parquet(path)
            names = scanned.collect_schema().names()
        else:
            with path.open(encoding="utf-8-sig") as stream:
                blank = 0
                while not (head := stream.readline()).strip():
                    blank += 1
            separator, names = split_header(head)
            scanned = pl.scan_csv(path, separator=separator, infer_schema=False, new_columns=names, skip_lines=blank)
        own = _names(names, path)
        scanned = scanned.rename(dict(zip(names, own, strict=True)))
        if wanted and any(name in wanted for name in own):
            report.unused(path, own, list(wanted))
            scanned = scanned.select(name for name in own if name in wanted)
        for table in scanned.collect_batches(chunk_size=ROWS, maintain_order=True):
            for start in range(0, table.height, ROWS):
                yield table.slice(start, ROWS)
    except (pl.exceptions.PolarsError, csv.Error, UnicodeDecodeError) as error:
        told = f"{path} cannot be read as a table: {error}".split("\n")[0]
        if "utf" in told.lower():
            told += ". Say --encoding latin-1, cp1252, … if it is not UTF-8"
        raise BadData(told) from error


def first_line(path: Path) -> str:
    """The first line of a text file that has anything in it, of the first 64 KB; damaged letters are marked."""
    with path.open("rb") as stream:
        return stream.read(65_536).decode("utf-8-sig", "replace").lstrip().split("\n", 1)[0].strip()


def _is_large(path: Path, encoding: str | None) -> bool:
    if not path.is_file() or path.stat().st_size <= LARGE or encoding not in (None, "utf-8", "utf8"):
        return False
    with path.open("rb") as stream:
        return not stream.read(3).startswith((b"\x1f\x8b", codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def is_parquet(path: Path) -> bool:
    """By its first bytes, whatever it is called.

    Raises:
        BadData: there is no file.
    """
    if not path.is_file():
        raise BadData(f"{path} is no file; give a CSV, TSV, Parquet or text file, or the word `shop`")
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def column_names(path: Path, encoding: str | None = None) -> list[str]:
    """Names of a table's columns, in small letters.

    Raises:
        BadData: it cannot be read.
    """
    if is_parquet(path):
        return read_table(path, Report()).columns
    return _names(split_header(read_text(path, Report(), encoding))[1], path)


def split_header(text: str) -> tuple[str, list[str]]:
    """The separator of a CSV file, which is what its first line has most of, and that line's fields."""
    line = text.lstrip("\r\n").replace("\r", "\n").split("\n", 1)[0]
    separator = max(_SEPARATORS, key=line.count)
    return separator, next(csv.reader([line], delimiter=separator), [])


def require(table: pl.DataFrame, path: Path, columns: tuple[str, ...], some: bool = True) -> None:
    """Raises BadData naming the columns that are missing; with ``some`` also where there is no row."""
    if missing := [name for name in columns if name not in table.columns]:
        raise BadData(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {', '.join(table.columns)}"
        )
    if some and table.is_empty():
        raise BadData(f"{path} has a header but no row")


def _names(header: list[str], path: Path) -> list[str]:
    names = [name.strip().lower() for name in header]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadData(f"{path} has two columns named {', '.join(map(repr, twice))}; rename or remove one")
    return names


def _line_of(raw: bytes, at: int) -> int:
    return raw.count(b"\n", 0, at) + 1
