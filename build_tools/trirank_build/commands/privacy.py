"""`trirank privacy`: what personal data lies where, and keys of pseudonyms and of sealed files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trirank_build.errors import BadData, BadUsage
from trirank_build.progress import out

app = typer.Typer(help="Say where personal data lies; make keys.", no_args_is_help=True)


@app.command("list")
def list_places() -> None:
    """What personal data lies where, for how long, and what takes a person out of it."""
    from rich.markdown import Markdown

    from trirank_build.privacy.inventory import table

    out.print(Markdown(table()))


@app.command()
def rotate(folders: Annotated[list[Path], typer.Argument(help="Folders of sealed logs and datasets.")]) -> None:
    """Wrap the data keys of sealed files with the newest of TRIRANK_KEYS' master keys; older ones are not needed for
    them any more. Servers go on writing."""
    from trirank_backend.master_keys import named_keys
    from trirank_backend.sealed_files import rewrap
    from trirank_backend.surroundings import KEYS_VARIABLE

    masters = named_keys()
    if masters is None:
        raise BadUsage(f"{KEYS_VARIABLE} names no master keys; set it to their file")
    for folder in folders:
        count = rewrap(folder, masters)
        if not count:
            raise BadData(f"{folder} holds no sealed files; name a folder of logs, or a dataset")
        out.print(f"{count} sealed files of {folder} have the newest master key", soft_wrap=True)


@app.command()
def key(file: Annotated[Path, typer.Argument(help="File to write it to.")]) -> None:
    """Make a key for `trirank data prepare --anonymise`. Keep it apart from the datasets: with it, a pseudonym can be
    found again for every user id."""
    from trirank_build.privacy.anonymise import make_key

    make_key(file)
    out.print(f"{file} is a new key; users have other pseudonyms under another", soft_wrap=True)
