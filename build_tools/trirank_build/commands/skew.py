"""`trirank skew`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trirank_build.commands.options import Json
from trirank_build.progress import out, working


def skew(
    release: Annotated[Path, typer.Argument(help="The release that served.")],
    requests: Annotated[Path, typer.Option(help="Folder that its requests were logged to, with tensors.")],
    data: Annotated[
        Path | None, typer.Option(help="Take histories from this dataset rather than from the log.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Requests to compare, at most.")] = 10_000,
    as_json: Json = False,
) -> None:
    """Replay logged requests through training's features and compare bit by bit; exit status 3 if any differs."""
    from trirank_build.data.dataset import Dataset
    from trirank_build.online.skew import measure_skew

    with working("replaying"):
        found = measure_skew(release, requests, None if data is None else Dataset.load(data), limit)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        table = Table("tensor", "differ", "largest difference", "first", title=f"{found.compared:,} requests compared")
        for name, count in found.differing.items():
            table.add_row(name, f"{count:,}", f"{found.worst[name]:.3g}" if count else "", found.first.get(name, ""))
        out.print(table)
        for reason, count in found.left_out.items():
            out.print(f"{count:,} requests left out: {reason}")
    if found.differs:
        sys.exit(3)
