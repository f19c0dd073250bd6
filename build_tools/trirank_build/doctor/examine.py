"""The doctor's visit: a folder, or a server."""

from __future__ import annotations

from pathlib import Path

from trirank import RankRequest

# Importing a room of rules registers them.
from trirank_build.doctor import code, ensembles, files, live, releases, resources, scheduling
from trirank_build.doctor.finding import Finding, run_checks
from trirank_build.doctor.repository import Repository, Surroundings

OF_THIS_MACHINE = ("RES01", "RES02", "RES06", "RES07", "REL02")
"""Rules that say nothing of a release that will be served elsewhere."""
ROOMS = (files, ensembles, scheduling, resources, code, releases, live)


def examine(place: Path, around: Surroundings | None = None) -> list[Finding]:
    """What is wrong with a repository or a release, the worst first.

    Raises:
        BadModel: there is none.
    """
    return run_checks("static", Repository.read(place), around or Surroundings.here())


def examine_server(
    address: str,
    requests: list[RankRequest],
    around: Surroundings | None = None,
    probe: bool = True,
    caller: live.Caller = live.ANYBODY,
) -> list[Finding]:
    """What is wrong with a running server and with the configurations that it has loaded, the worst first.

    Args:
        requests, caller: see ``live.ask``.

    Raises:
        ServeError: nothing answers there.
    """
    around = around or Surroundings.here()
    server = live.ask(address, requests, probe, caller)
    found = run_checks("live", server, around) + run_checks("static", server.repository, around)
    return sorted(found, key=lambda finding: (-finding.rule.severity, finding.rule.id, finding.where))
