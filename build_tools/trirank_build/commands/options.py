"""Options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[Path, typer.Option("--data", help="Dataset directory.")]
Run = Annotated[Path, typer.Option("--run", help="Training run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON rather than a table.")]
