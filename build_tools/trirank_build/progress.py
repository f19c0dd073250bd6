"""One look for all that is shown: progress on the error stream, so that output can be piped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

console = Console(stderr=True)
out = Console(width=None if sys.stdout.isatty() else 150)


def warn(words: str) -> None:
    """One line on the error stream that something goes otherwise than one might think."""
    console.print("[yellow]warning:[/yellow]", Text(words), soft_wrap=True, highlight=False)


def progress() -> Progress:
    """A progress display; use as a context manager."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def working(description: str) -> Iterator[None]:
    """A moving bar for a step whose length is not known."""
    with progress() as bar:
        task = bar.add_task(description, total=None)
        yield
        bar.update(task, total=1, completed=1)
