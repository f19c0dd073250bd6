"""`trirank doctor`: examine a model repository or a running server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from trirank_build.commands.options import Json, TlsCa, TlsCert, TlsKey, Token, tls_of
from trirank_build.errors import BadUsage
from trirank_build.progress import out

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def doctor(
    target: Annotated[str, typer.Argument(help="A model repository, a release, or host:port of a server's gRPC.")],
    release: Annotated[
        Path | None, typer.Option(help="For a server: the release it serves, whose recorded requests are sent.")
    ] = None,
    deadline_ms: Annotated[float | None, typer.Option(min=0.001, help="What callers wait.")] = None,
    probe: Annotated[
        bool, typer.Option(help="For a server: whether to send each model one request, and one that must fail.")
    ] = True,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="It will be served on another machine: say nothing of this one.")
    ] = False,
    fail_on: Annotated[
        Literal["info", "warning", "error"], typer.Option(help="From where on the exit status is 1.")
    ] = "warning",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with any Triton repository or server, why, and how to mend it."""
    from trirank_build.doctor.examine import OF_THIS_MACHINE, examine, examine_server
    from trirank_build.doctor.finding import Severity
    from trirank_build.doctor.live import Caller
    from trirank_build.doctor.repository import Surroundings
    from trirank_build.repository.release import recorded_requests

    around = Surroundings.here(deadline_ms)
    place, _, url = target.rpartition("://")
    if not place and Path(target).exists():
        findings = examine(Path(target), around)
    elif ":" in url and url.rpartition(":")[2].isdigit():
        caller = Caller(tls_of(tls_ca, tls_cert, tls_key), token)
        findings = examine_server(url, recorded_requests(release) if release else [], around, probe, caller)
    else:
        raise BadUsage(f"{target} is neither a folder nor host:port of a server")
    if elsewhere:
        findings = [finding for finding in findings if finding.rule.id not in OF_THIS_MACHINE]
    failing = [finding for finding in findings if finding.rule.severity >= Severity[fail_on.upper()]]
    if as_json:
        print(json.dumps({"target": target, "findings": [finding.to_json() for finding in findings]}, indent=1))
    elif findings:
        table = Table("id", "", "where", "what, why, and what to do", show_lines=True)
        for finding in findings:
            rule = finding.rule
            severity = rule.severity.name.lower()
            words = Text.assemble((rule.what, "bold"), f"\n{finding.reason}\n", ("→ ", "green"), rule.fix)
            if rule.issue:
                words.append(f"\n{rule.issue}", "dim")
            table.add_row(rule.id, Text(severity, _COLOURS[severity]), Text(finding.where), words)
        out.print(table)
    else:
        out.print("nothing found")
    if failing:
        sys.exit(1)
