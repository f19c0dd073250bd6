"""Options that several subcommands share, and what is said of them before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from trirank import Tls
from trirank_backend.stores.store import Store, open_store

from trirank_build.errors import BadUsage

Data = Annotated[Path, typer.Option("--data", help="Dataset directory.")]
Run = Annotated[Path, typer.Option("--run", help="Training run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON rather than a table.")]
Engine = Literal["onnxruntime", "onnxruntime-tensorrt-rtx", "onnxruntime-cuda", "openvino", "openvino-bf16"]
"""As trirank_backend.scoring has them, which takes a second to import; a test holds the two together."""


Seed = Annotated[int, typer.Option(help="Random seed.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM of who signed the server's certificate: TLS is spoken.")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM of the caller's own certificate.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM of its key.")]
Token = Annotated[str | None, typer.Option(envvar="TRIRANK_TOKEN", help="The caller's token.")]


def tls_of(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    """How a server is spoken to; None: without TLS.

    Raises:
        BadUsage: the caller has a certificate of their own, and it is not said whom they trust.
    """
    if ca is None and (cert or key):
        raise BadUsage("--tls-cert and --tls-key are the caller's own; say --tls-ca, too")
    return None if ca is None else Tls(ca, cert, key)


@contextmanager
def opened(address: str, option: str = "--users", new: bool = False, keys: str | None = None) -> Iterator[Store]:
    """A user store; ``new``: whether a file may be made; ``keys``: see open_store.

    Raises:
        BadUsage: it is a file that is not there.
    """
    kind, _, path = address.partition(":")
    if kind == "sqlite" and not new and not Path(path).is_file():
        raise BadUsage(f"{option} {address}: there is no such file; `trirank users import` makes one")
    store = open_store(address, keys=keys)
    try:
        yield store
    finally:
        store.close()


def check_target(target: Path, what: str, *, replaces: str = "", file: bool = False, option: str = "--out") -> None:
    """Whether ``--out`` can be written, asked before the work rather than after it.

    Args:
        what: what is to be written, for the message.
        replaces: a file that stands in folders of this kind, which are replaced; none other is.
        file: whether it is to be a file, not a folder.
        option: what names it.

    Raises:
        BadUsage: it cannot, or something else stands there.
    """
    if file and target.is_dir():
        raise BadUsage(f"{option} {target} is a folder; {what} is a file: give its name too")
    if not file and target.exists() and not target.is_dir():
        raise BadUsage(f"{option} {target} is a file; {what} is a folder: choose another name")
    if replaces and target.is_dir() and any(target.iterdir()) and not (target / replaces).is_file():
        raise BadUsage(f"{option} {target} holds something else than {what}, which would be lost; choose another name")
    parent = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    if parent.is_file() and parent != target.absolute():
        raise BadUsage(f"{option} {target} cannot be written: {parent} is a file; choose another place")
    parent = parent.parent if parent.is_file() else parent
    # Where even root may not write, as below /proc, asking for rights alone says yes.
    writable = os.access(parent, os.W_OK | os.X_OK) and not str(parent.resolve()).startswith(("/proc", "/sys"))
    if not writable:
        raise BadUsage(f"{option} {target} cannot be written: {parent} takes no new files; choose another place")
