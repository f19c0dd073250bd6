"""What runs the rules of cleaning and splitting: polars in this process, or a Dask cluster.

The rules are narwhals' expressions (preparation.cleaning, preparation.splitting), so there is one of each. Files are
read where the engine runs, by one function from an address to tables; what it tells of them comes back and is added up.

Dask, because narwhals runs on it, it is Python alone, its workers keep on disk what memory does not hold, and it starts
on one machine with two commands. PySpark would do, and needs Java beside every worker; narwhals does not run on Ray.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import narwhals as nw
import polars as pl

from trirank_build.artefacts import fits
from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import Frame, Keeps, Report, clean_events
from trirank_build.progress import progress

DASK = "dask://"
LOST_S = 20.0
"""A cluster that has had no worker for so long is taken for gone."""
CONNECT_S = 10.0
_POLL_S = 0.05
_HELD = 256 << 20
"""Bytes of events above which polars' tables go through files."""


class Table(NamedTuple):
    """What was read of a part of a log.

    Attributes:
        events: user_id, item_id, behaviour, timestamp, query and place, which orders all events of a log.
        names: item_id and key, what the log calls its items.
        report: what the part had to say.
    """

    events: pl.DataFrame
    names: pl.DataFrame
    report: Report


Reader = Callable[[str, int], Iterator[Table]]
"""The address of a part, and its number → its tables."""


class Engine(Keeps, Protocol):
    """Reads logs, and runs narwhals' expressions on tables of events."""

    def read(self, parts: list[str], reader: Reader) -> tuple[Frame, pl.DataFrame, list[Report]]:
        """All events of all parts, names of items, and what was told of each table."""
        ...


def clean_here(events: pl.DataFrame, *, timed: bool, report: Report, min_count: int) -> pl.DataFrame:
    """``cleaning.clean_events`` of complete events that are held, in their order."""
    engine, placed = PolarsEngine(), events.with_row_index("place").lazy()
    kept = clean_events(nw.from_native(placed), engine, timed=timed, report=report, min_count=min_count)
    return engine.collect(kept).sort("place").drop("place")


@contextmanager
def engine_of(address: str | None) -> Iterator[Engine]:
    """The engine at an address: None: polars here; ``dask://HOST:PORT``: the cluster of that scheduler.

    Raises:
        BadData: there is no such engine, or the cluster cannot be reached, or it goes away.
    """
    if address is None or address == "polars":
        scratch = Path(tempfile.mkdtemp(prefix="trirank-prepare-"))
        try:
            with fits(scratch):
                yield PolarsEngine(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    elif address.startswith(DASK):
        with _dask(address) as engine:
            yield engine
    else:
        raise BadData(f"--engine {address} is none; say polars, or dask://HOST:PORT of a scheduler")


class PolarsEngine:
    """Polars in this process: tables that are large go through files in ``scratch``, None: all are held."""

    def __init__(self, scratch: Path | None = None) -> None:
        self._scratch, self._files = scratch, 0
        self._kept: list[Path] = []
        """What the newest ``keep`` was made of, or wrote."""

    def read(self, parts: list[str], reader: Reader) -> tuple[Frame, pl.DataFrame, list[Report]]:
        """See Engine."""
        held: list[pl.DataFrame] = []
        files: list[Path] = []
        names: list[pl.DataFrame] = []
        reports = []
        with progress() as bar:
            task = bar.add_task("reading", total=len(parts), visible=len(parts) > 1)
            for number, address in enumerate(parts):
                for table in reader(address, number):
                    names = [pl.concat([*names, table.names]).unique("item_id", keep="any")]
                    reports.append(table.report)
                    held.append(table.events)
                    if self._scratch is not None and sum(each.estimated_size() for each in held) > _HELD:
                        files.append(self._file())
                        pl.concat(held).write_parquet(files[-1])
                        held = []
                bar.advance(task)
        if not reports:
            raise BadData(f"none of {', '.join(parts[:3])} has a row")
        if files:
            if held:
                files.append(self._file())
                pl.concat(held).write_parquet(files[-1])
            self._kept = files
            return nw.from_native(pl.scan_parquet(files)), names[0], reports
        return nw.from_native(pl.concat(held).lazy()), names[0], reports

    def keep(self, frame: Frame) -> Frame:
        """See Engine."""
        native: pl.LazyFrame = frame.to_native()
        if not self._files:  # all that was read is held, and so is what is made of it
            return nw.from_native(native.collect().lazy())
        path = self._file()
        native.sink_parquet(path)
        for file in self._kept:  # rules follow one on the other: nothing is made of what was before any more
            file.unlink()
        self._kept = [path]
        return nw.from_native(pl.scan_parquet(path))

    def together(self, frame: Frame, column: str, rule: Callable[[Frame], Frame]) -> Frame:
        """See Engine."""
        return rule(frame)

    def collect(self, frame: Frame) -> pl.DataFrame:
        """See Engine."""
        native: pl.LazyFrame = frame.to_native()
        return native.collect(engine="streaming") if self._files else native.collect()

    def _file(self) -> Path:
        assert self._scratch is not None
        self._files += 1
        return self._scratch / f"{self._files:05d}.parquet"


@contextmanager
def _dask(address: str) -> Iterator[Engine]:
    try:
        import dask.dataframe  # noqa: F401  # says what of itself is missing
        from distributed import Client
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise BadData(f"--engine {address} needs Dask ({error}); pip install 'trirank[cluster]'") from error
    place = address.replace(DASK, "tcp://", 1)
    advice = "nothing was written. Start it (`dask scheduler`, `dask worker`), and prepare again"
    try:
        client = Client(place, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadData(f"the cluster {address} cannot be reached ({_short(error)}); {advice}") from error
    try:
        with client.as_current():  # else Dask shuffles by files, as if it were one machine
            yield DaskEngine(client, address)
    except ImportError as error:
        raise BadData(f"a worker of {address} lacks a library ({_short(error)}); pip install 'trirank[cluster]' there, "
                      "in the same version") from error  # fmt: skip
    except (OSError, KilledWorker, FutureCancelledError, TimeoutError) as error:
        raise BadData(f"the cluster {address} went away in the middle ({_short(error)}); {advice}") from error
    finally:
        client.close(timeout=2)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class DaskEngine:
    """A cluster: its workers read the parts, and hold, or spill, what is calculated."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self._address = client, address
        self._placed = ""
        """The column of whose values each has all its rows in one partition."""

    def read(self, parts: list[str], reader: Reader) -> tuple[Frame, pl.DataFrame, list[Report]]:
        """See Engine."""
        import dask.dataframe as dd

        read = self._client.map(_read_part, [reader] * len(parts), parts, range(len(parts)), pure=False)
        told = self._client.map(_told_of, read, pure=False)
        self._wait(told, "reading")
        names, reports = zip(*self._client.gather(told), strict=True)
        if not any(reports):
            raise BadData(f"none of {', '.join(parts[:3])} has a row")
        empty = _to_pandas(pl.DataFrame(schema=_SCHEMA))
        frames = dd.from_delayed(self._client.map(_events_of, read, pure=False), meta=empty, verify_meta=False)
        known = pl.concat(names).unique("item_id", keep="any")
        return _lazy(frames), known, [report for part in reports for report in part]

    def keep(self, frame: Frame) -> Frame:
        """See Engine."""
        from distributed import futures_of

        kept = self._client.persist(frame.to_native())
        self._wait(futures_of(kept), "cleaning")
        return _lazy(kept)

    def together(self, frame: Frame, column: str, rule: Callable[[Frame], Frame]) -> Frame:
        """See Engine. Rows go to their value's partition, unless they are there; there the rule runs on polars."""
        native = frame.to_native()
        if self._placed != column:
            native, self._placed = native.shuffle(on=column), column
        return _lazy(native.map_partitions(_on_polars, rule, meta=_to_pandas(pl.DataFrame(schema=_SCHEMA))))

    def collect(self, frame: Frame) -> pl.DataFrame:
        """See Engine."""
        from distributed import futures_of

        kept = self._client.persist(frame.to_native())
        futures = futures_of(kept)
        self._wait(futures, "fetching")
        # A part after the other, so that of the two forms of one part alone both are here.
        return pl.concat([pl.from_pandas(self._client.gather(future)) for future in futures])

    def _wait(self, futures: list[Any], what: str) -> None:
        """Until all are there.

        Raises:
            OSError: there is nobody left to calculate them.
            BadData: reading found something.
        """
        seen = time.monotonic()
        with progress() as bar:
            task = bar.add_task(f"{what} on {self._address}", total=len(futures))
            while not all(future.done() for future in futures):
                bar.update(task, completed=sum(future.done() for future in futures))
                time.sleep(_POLL_S)
                if self._client.status != "running":
                    raise OSError("its scheduler does not answer")
                if self._client.scheduler_info(n_workers=-1)["workers"]:
                    seen = time.monotonic()
                elif time.monotonic() - seen > LOST_S:
                    raise OSError(f"it has had no worker for {LOST_S:.0f} seconds")
            bar.update(task, completed=len(futures))
        for future in futures:
            if future.status == "error":
                raise future.exception()
            if future.status == "cancelled":
                raise OSError("its scheduler does not answer")


_SCHEMA = {
    "user_id": pl.Int64, "item_id": pl.Int64, "behaviour": pl.Int8, "timestamp": pl.Int64, "query": pl.String,
    "place": pl.Int64,
}  # fmt: skip


def _lazy(frame: Any) -> Frame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Dask may move to a package of its own
        return nw.from_native(frame)


def _to_pandas(events: pl.DataFrame) -> Any:
    return events.to_pandas().astype({"query": "string[pyarrow]"})


def _read_part(reader: Reader, address: str, number: int) -> tuple[pl.DataFrame, pl.DataFrame, list[Report]]:
    try:
        tables = list(reader(address, number))
    except OSError as error:  # of the file: the cluster's own are told otherwise
        raise BadData(f"{address} cannot be read by a worker ({_short(error)})") from None
    if not tables:
        return pl.DataFrame(schema=_SCHEMA), pl.DataFrame(schema={"item_id": pl.Int64, "key": pl.String}), []
    names = pl.concat([table.names for table in tables]).unique("item_id", keep="any")
    return pl.concat([table.events for table in tables]), names, [table.report for table in tables]


def _on_polars(rows: Any, rule: Callable[[Frame], Frame]) -> Any:
    kept = rule(nw.from_native(pl.from_pandas(rows).lazy())).to_native().collect()
    return _to_pandas(kept.select(*_SCHEMA))


def _told_of(part: tuple[pl.DataFrame, pl.DataFrame, list[Report]]) -> tuple[pl.DataFrame, list[Report]]:
    return part[1:]


def _events_of(part: tuple[pl.DataFrame, pl.DataFrame, list[Report]]) -> Any:
    return _to_pandas(part[0])
