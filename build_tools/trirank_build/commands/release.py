"""`trirank release`: which releases there are, which is served, which was, which can go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trirank_build.commands.options import Json
from trirank_build.errors import BadModel, BadUsage
from trirank_build.progress import out

app = typer.Typer(help="List, check, promote and remove releases.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Folder of releases.")]
Release = Annotated[Path, typer.Argument(help="A release.")]


@app.command("list")
def list_releases(folder: Folder, as_json: Json = False) -> None:
    """The releases of a folder, the newest first."""
    from trirank_build.repository.store import releases

    if not folder.is_dir():
        raise BadModel(f"{folder} is no folder of releases; make one with `trirank assemble`")
    listed = releases(folder)
    if not any(each.manifest for each in listed):
        raise BadModel(f"{folder} holds no release; make one with `trirank assemble --out {folder}`")
    if as_json:
        print(json.dumps([_row(each) for each in listed]))
        return
    table = Table("release", "", "recipe", "runtime", "NDCG@10", "gate", "promoted", title=str(folder))
    for each in listed:
        row = _row(each)
        state = ", ".join(word for word in ("current", "in use") if row[word.replace(" ", "_")])
        if each.problem:
            table.add_row(each.name, state, f"[red]{each.problem}[/red]")
            continue
        ndcg = f"{row['ndcg10']:.4f}" if row["ndcg10"] else ""
        table.add_row(each.name, state, row["recipe"], row["runtime"], ndcg, row["gate"], each.promoted[:19])
    out.print(table)


@app.command()
def show(release: Release, as_json: Json = False) -> None:
    """A release's model card, or its manifest as JSON."""
    from rich.markdown import Markdown

    from trirank_build.repository.release import CARD, load_manifest

    manifest = load_manifest(release)
    if as_json:
        print(json.dumps(manifest))
    else:
        out.print(Markdown((release / CARD).read_text()))


@app.command()
def key(file: Annotated[Path, typer.Argument(help="File for the private key; the public one is FILE.pub.")]) -> None:
    """Make a key that releases are signed with. Keep it where releases are made, and nowhere else."""
    from trirank_build.repository.signing import make_key

    out.print(f"{make_key(file)} is what servers are told to trust (trirank serve --trust)", soft_wrap=True)


@app.command()
def sign(
    release: Release, key: Annotated[Path, typer.Option(help="The private key, of `trirank release key`.")]
) -> None:
    """Sign a release, so that servers with --trust take it."""
    from trirank_build.repository.signing import sign as sign_release

    out.print(f"{release} is signed by {sign_release(release, key)}")


@app.command()
def verify(
    release: Release,
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Public key, of `trirank release key`: it has to be signed by one; repeat."),
    ] = None,
) -> None:
    """Say whether a release is still what was assembled, and with --trust by whom; exit status 1 if it is not."""
    from trirank_build.repository.release import verify as problems_of
    from trirank_build.repository.signing import read_public_key, refuse_untrusted

    if trust:
        refuse_untrusted(release, [read_public_key(file) for file in trust])

    problems = problems_of(release)
    for problem in problems:
        out.print(problem, soft_wrap=True, highlight=False)
    if problems:
        sys.exit(1)
    out.print(f"{release} is as it was assembled")


@app.command()
def promote(release: Release) -> None:
    """Point `current` at a release; servers that follow the link take it up."""
    out.print(f"{promote_checked(release)} → {release.resolve().name}")


@app.command()
def candidates(
    release: Release,
    items: Annotated[list[str], typer.Option("--item", help="Item that the user has met, the newest last; repeat.")],
    count: Annotated[int, typer.Option("--count", min=1, help="Items to find.")] = 10,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave these items out.")] = False,
    as_json: Json = False,
) -> None:
    """What the index of a release finds for a user among all its items."""
    import numpy as np
    import polars as pl
    from trirank.contract import stable_id
    from trirank_backend.candidates import CandidateSource

    from trirank_build.repository.release import ITEMS, load_manifest

    strings = load_manifest(release)["ids"]["item"] == "strings"
    known = np.array([stable_id(item) if strings else _number(item) for item in items], np.int64)
    source = CandidateSource(release)
    if count > source.facts["items"]:
        raise BadUsage(f"--count {count} is more than the release's {source.facts['items']:,} items")
    found = source.find([known], count, exclude_seen=exclude_seen)
    table = pl.read_parquet(release / ITEMS)
    lines = pl.DataFrame({"item_id": found.item_ids[0], "score": found.scores[0].astype(float)})
    lines = lines.join(table, on="item_id", how="inner", maintain_order="left").select(
        "key", "score", "title", "category"
    )
    if as_json:
        print(lines.write_json())
        return
    shown = Table("item", "score", "title", "category")
    for key, score, title, category in lines.iter_rows():
        shown.add_row(key, f"{score:.3f}", title, category)
    out.print(shown)


def _number(item: str) -> int:
    if item.isascii() and item.isdigit() and int(item) < 2**63:
        return int(item)
    raise BadUsage(f"--item {item} is no number below 2^63, and the items of this release are numbers")


@app.command()
def rollback(folder: Folder) -> None:
    """Point `current` at what was served before."""
    from trirank_build.repository.store import CURRENT
    from trirank_build.repository.store import rollback as go_back

    out.print(f"{folder / CURRENT} → {go_back(folder).name}")


@app.command()
def gc(
    folder: Folder,
    keep: Annotated[int, typer.Option(min=1, help="How many of the last promoted or made ones stay.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
) -> None:
    """Remove old releases; the served one and those that a server here has open stay."""
    from trirank_build.repository.store import gc as remove

    gone = remove(folder, keep, dry_run)
    words = "would remove" if dry_run else "removed"
    out.print(f"{words} {len(gone)}" + (f": {', '.join(gone)}" if gone else ""))


@app.command()
def diff(one: Release, other: Release, as_json: Json = False) -> None:
    """In what two releases differ: files, recipe, data, metrics, versions."""
    from trirank_build.repository.release import load_manifest
    from trirank_build.repository.store import diff as differences

    found = differences(load_manifest(one), load_manifest(other))
    if as_json:
        print(json.dumps([{"field": name, "one": a, "other": b} for name, a, b in found]))
        return
    table = Table("field", one.resolve().name, other.resolve().name)
    for row in found:
        table.add_row(*row)
    out.print(table)


def promote_checked(release: Path) -> Path:
    """Promote a release that the doctor finds no error in, those of this machine left out; gives the link.

    Raises:
        BadModel: there is an error, or it is no release.
    """
    from trirank_build.doctor.examine import OF_THIS_MACHINE, examine
    from trirank_build.doctor.finding import Severity
    from trirank_build.repository.release import load_manifest
    from trirank_build.repository.store import promote as point_at

    load_manifest(release)
    for finding in examine(release):
        if finding.rule.severity is Severity.ERROR and finding.rule.id not in OF_THIS_MACHINE:
            raise BadModel(
                f"{release} cannot be promoted: {finding.reason} ({finding.rule.id}). {finding.rule.fix} "
                f"`trirank doctor {release}` says more"
            )
    return point_at(release)


def _row(listed: Any) -> dict[str, Any]:
    manifest, metrics = listed.manifest, listed.manifest.get("metrics", {})
    gate = manifest.get("gate")
    measured = metrics.get("gate")
    return {
        "release": listed.name,
        "current": listed.current,
        "in_use": listed.in_use,
        "recipe": manifest.get("recipe", {}).get("name", ""),
        "runtime": "/".join(filter(None, (manifest.get("runtime"), manifest.get("engine")))),
        "ndcg10": measured["ndcg10"]["value"] if measured else metrics.get("valid_ndcg10"),
        "gate": "none" if gate is None else "passed" if gate["passed"] else "failed",
        "promoted": listed.promoted,
        "problem": listed.problem,
    }
