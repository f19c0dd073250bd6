"""What lies beside a release while it is served: users, changes of the catalogue, a log of requests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trirank_backend.errors import InvalidStore, StoreFailed
from trirank_backend.stores.overlay import STATE, read_overlay
from trirank_backend.stores.store import hide_password, open_store
from trirank_backend.surroundings import CATALOGUE_VARIABLE, REQUESTS_VARIABLE, USERS_VARIABLE

from trirank_build.errors import ServeError
from trirank_build.progress import warn

USERS, CATALOGUE = "users.sqlite", "catalogue.npy"
"""In the folder of releases, where nothing else is said."""
NONE = "none"


@dataclass(frozen=True)
class Stores:
    """Where they are.

    Attributes:
        users: address of the user store (trirank_backend.stores.store.open_store); None: none, and no feedback.
        catalogue: file of what changes while releases are served.
        requests: folder that requests are logged to, see trirank_backend.request_log.
    """

    users: str | None = None
    catalogue: Path | None = None
    requests: str | None = None

    def environment(self) -> dict[str, str]:
        """What a server's processes are told of them."""
        catalogue = None if self.catalogue is None else str(self.catalogue.absolute())
        said = {USERS_VARIABLE: self.users, CATALOGUE_VARIABLE: catalogue, REQUESTS_VARIABLE: self.requests}
        return {name: value or "" for name, value in said.items()}

    def check(self) -> None:
        """Raises ServeError for a store that cannot be one. One that does not answer is warned of: it may be back soon,
        and until then users are taken for new ones."""
        if self.catalogue is not None and self.catalogue.exists():
            try:
                read_overlay(self.catalogue, STATE)
            except InvalidStore as error:
                raise ServeError(f"--catalogue: {error}") from error
        if self.users is None:
            return
        try:
            store = open_store(self.users)
        except InvalidStore as error:
            raise ServeError(f"--users: {error}") from error
        try:
            store.get([0])
            if not store.is_durable():
                warn(
                    f"{hide_password(self.users)} may lose a second of feedback when it fails: start it with "
                    "--appendonly yes --appendfsync always"
                )
        except StoreFailed as error:
            warn(f"{error}; users are taken for new ones until it does")
        finally:
            store.close()


def usual_stores(release: Path, users: str | None, catalogue: Path | None, requests: str | None = None) -> Stores:
    """What was asked for; for the others files in the folder of releases, where it can be written to.

    Args:
        users: ``none``: none.
    """
    folder = release.absolute().parent
    if users is None:
        users = f"sqlite:{folder / USERS}" if os.access(folder, os.W_OK) else NONE  # readers, too, write beside it
        if users == NONE:
            warn(f"{folder} cannot be written to, so there is no user store; say --users, or --users none")
    if users.startswith("sqlite:"):  # so that it is the same one from any folder
        users = f"sqlite:{Path(users.removeprefix('sqlite:')).absolute()}"
    return Stores(None if users == NONE else users, catalogue or folder / CATALOGUE, requests)
