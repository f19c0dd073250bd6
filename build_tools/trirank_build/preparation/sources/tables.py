"""Reading what users bring: CSV, TSV and Parquet, gzipped or not, UTF-8 or Latin-1."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import polars as pl

from trirank_build.errors import BadData


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


def read_text(path: Path) -> str:
    """Text in UTF-8, or else in Latin-1.

    Raises:
        BadData: it holds NUL bytes, so it is no text.
    """
    raw = read_bytes(path)
    if b"\0" in raw[:65_536]:
        raise BadData(f"{path} is a binary file, not text; give CSV, TSV or Parquet")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def read_table(path: Path) -> pl.DataFrame:
    """A table whose column names are as in the file; CSV columns are all strings.

    Raises:
        BadData: it cannot be parsed.
    """
    try:
        if path.suffix == ".parquet":
            if not path.is_file():
                raise BadData(f"{path} is no file")
            return pl.read_parquet(path)
        text = read_text(path)
        header = text.split("\n", 1)[0]
        separator = "\t" if header.count("\t") > header.count(",") else ","
        return pl.read_csv(io.BytesIO(text.encode()), separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise BadData(f"{path} cannot be read as a table: {error}".split("\n")[0]) from error


def require(table: pl.DataFrame, path: Path, columns: tuple[str, ...]) -> None:
    """Raises BadData naming the columns that are missing."""
    if missing := [name for name in columns if name not in table.columns]:
        raise BadData(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {', '.join(table.columns)}"
        )
    if table.is_empty():
        raise BadData(f"{path} has a header but no row")


def to_ids(column: pl.Series) -> pl.Series:
    """int64 ids: numbers as they are, anything else by ``contract.stable_id``.

    Raises:
        BadData: two names collide, or an id is negative.
    """
    from trirank.contract import stable_id

    name = column.name
    if column.dtype.is_integer():
        ids = column.cast(pl.Int64)
    else:
        text = column.cast(pl.String).str.strip_chars()
        ids = text.cast(pl.Int64, strict=False)
        if ids.null_count() > text.null_count():
            keys = text.drop_nulls().unique()
            hashed = pl.Series("id", [stable_id(key) for key in keys], dtype=pl.Int64)
            if hashed.n_unique() < keys.len():
                raise BadData(f"two values of {name} have the same 64-bit hash; rename one of them")
            ids = text.replace_strict(keys, hashed, default=None, return_dtype=pl.Int64)
    negative = ids.filter(ids < 0)
    if len(negative):
        raise BadData(f"{name} holds {negative[0]}; ids are 0 or more")
    return ids.alias(name)
