"""`trirank privacy`: what personal data lies where, and keys of pseudonyms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trirank_build.progress import out

app = typer.Typer(help="Say where personal data lies; make keys.", no_args_is_help=True)


@app.command("list")
def list_places() -> None:
    """What personal data lies where, for how long, and what takes a person out of it."""
    from rich.markdown import Markdown

    from trirank_build.privacy.inventory import table

    out.print(Markdown(table()))


@app.command()
def key(file: Annotated[Path, typer.Argument(help="File to write it to.")]) -> None:
    """Make a key for `trirank data prepare --anonymise`. Keep it apart from the datasets: with it, a pseudonym can be
    found again for every user id."""
    from trirank_build.privacy.anonymise import make_key

    make_key(file)
    out.print(f"{file} is a new key; users have other pseudonyms under another", soft_wrap=True)
