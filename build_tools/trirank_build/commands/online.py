"""`trirank policy`, `trirank catalogue` and `trirank users`: what lies beside a release, and changes more often."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from trirank import contract
from trirank_backend.errors import InvalidPolicy, StoreFailed
from trirank_backend.stores.store import hide_password
from trirank_backend.surroundings import CATALOGUE_VARIABLE, KEYS_VARIABLE, USERS_VARIABLE

from trirank_build.commands.options import Json, check_target, opened
from trirank_build.errors import BadUsage
from trirank_build.progress import out, warn, working

_NUMBER = re.compile(r"-?[1-9][0-9]{0,18}|0")
"""As numbers are written; with a zero in front it is rather text."""

policy_app = typer.Typer(help="Check what a scenario wants of its results.", no_args_is_help=True)
catalogue_app = typer.Typer(help="Change prices, stock and blocks while serving.", no_args_is_help=True)
users_app = typer.Typer(help="Fill, read and empty a user store.", no_args_is_help=True)

Address = Annotated[
    str, typer.Option("--users", envvar=USERS_VARIABLE, help="The user store: sqlite:PATH or redis://HOST:PORT.")
]
UserIds = Annotated[
    Literal["numbers", "strings"] | None, typer.Option("--user-ids", help="Whether users' ids are numbers or text.")
]
OfRelease = Annotated[Path | None, typer.Option("--release", help="Hold it against this release, too.")]


@policy_app.command("check")
def check_policy(
    file: Annotated[Path, typer.Argument(help="Policy file; its name is the scenario's.")],
    release: OfRelease = None,
    as_json: Json = False,
) -> None:
    """Say whether a policy is one, and what its rules are; with --release, whether they fit."""
    from trirank_backend.policies import load_policy

    policy = load_policy(file)
    absent: list[str] = []
    if release is not None:
        from trirank_backend.release import FEATURES
        from trirank_backend.rules import load_rules

        from trirank_build.repository.release import load_manifest

        load_manifest(release)
        rules, _ = load_rules(release / FEATURES)
        if problems := policy.problems(rules):
            raise InvalidPolicy(f"policy {file} does not fit {release.resolve().name}: {'; '.join(problems)}")
        absent = policy.absent(rules)
    rows = [(number, rule.rule, _settings(rule)) for number, rule in enumerate(policy.rules, 1)]
    if as_json:
        said = [{"rule": name, "settings": settings} for _, name, settings in rows]
        print(json.dumps({"scenario": file.stem, "rules": said, "absent": absent}))
        return
    table = Table("", "rule", "settings", title=f"{file.stem}: {policy.description or 'a policy'}")
    for number, name, settings in rows:
        table.add_row(str(number), name, settings)
    out.print(table)
    for each in absent:
        warn(f"{each}; it works without")


def _settings(rule: object) -> str:
    chosen = rule.model_dump(exclude={"rule"}, exclude_defaults=True)  # type: ignore[attr-defined]
    return ", ".join(f"{name} = {value}" for name, value in chosen.items())


@policy_app.command("list")
def list_policies(release: OfRelease = None) -> None:
    """The policies of a release, or those that are shipped."""
    from trirank_backend.policies import SHIPPED, load_policies
    from trirank_backend.release import FEATURES, POLICIES

    folder = SHIPPED if release is None else release / FEATURES / POLICIES
    table = Table("scenario", "rules", "", title=str(folder))
    for name, policy in load_policies(folder).items():
        table.add_row(name, ", ".join(str(rule.rule) for rule in policy.rules), policy.description)
    out.print(table)


@catalogue_app.command("update")
def update_catalogue(
    delta: Annotated[Path, typer.Argument(help="CSV or JSON lines of item_id and any of price, stock, blocked.")],
    release: Annotated[Path, typer.Option(help="The release whose items it tells of.")],
    catalogue: Annotated[
        Path | None,
        typer.Option(
            envvar=CATALOGUE_VARIABLE, help="The file that servers read; catalogue.npy beside the releases by default."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what was changed before: a new release knows it.")
    ] = False,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out items that the release does not have.")
    ] = False,
) -> None:
    """Change prices, stock and blocks; servers see it within a second."""
    from trirank_build.online.catalogue import apply_delta
    from trirank_build.serving.stores import CATALOGUE

    place = catalogue or release.absolute().parent / CATALOGUE
    done = apply_delta(delta, place, release, skip_unknown, fresh)
    if done.unknown:
        warn(f"{done.unknown} of {done.rows} rows tell of items that the release does not have, and were left out")
    out.print(f"{place} tells of {done.items:,} items now")


@users_app.command("import")
def import_users(
    data: Annotated[Path, typer.Argument(help="A prepared dataset, whose events are added.")],
    users: Address,
) -> None:
    """Add the histories of a dataset; what is there already is not added twice."""
    from trirank_build.data.dataset import Dataset
    from trirank_build.online.users import import_users as add_users
    from trirank_build.privacy.anonymise import refuse_anonymised

    dataset = Dataset.load(data)
    refuse_anonymised(dataset, "import the dataset that it was made of")
    if not dataset.description.timed:
        warn("the dataset's timestamps are places in a sequence, no times: later feedback counts as newer all the same")
    with opened(users, new=True) as store, working("adding histories"):
        count = add_users(dataset.events, store)
    out.print(f"{count:,} users' histories are in {hide_password(users)}")


@users_app.command("export")
def export_users(
    users: Address,
    target: Annotated[Path | None, typer.Option("--out", help="File to write all users to, JSON lines.")] = None,
    user: Annotated[
        str | None, typer.Option(help="One user: all that is known, log included, to the terminal.")
    ] = None,
    user_ids: UserIds = None,
) -> None:
    """Write what is known of users."""
    from trirank_build.online import users as of_users

    if (target is None) == (user is None):
        raise BadUsage("say --user ID for one user, or --out FILE for all")
    with opened(users) as store:
        if user is not None:
            print(json.dumps(of_users.export_user(store, _user_ids(user, user_ids)), indent=1))
        elif target is not None:
            check_target(target, "an export", file=True)
            out.print(f"{of_users.export_users(store, target):,} users are in {target}")


@users_app.command("log")
def take_log(
    users: Address,
    target: Annotated[Path, typer.Option("--out", help="Folder; files are added to it.")],
    group: Annotated[str, typer.Option(help="Who reads: each group gets every event once.")] = "trirank",
) -> None:
    """Take events that came since the last time out of the store's log, to files that `data prepare` reads."""
    from trirank_build.online.events import take_out

    check_target(target, "a log of events")
    with opened(users) as store:
        out.print(f"{take_out(store, target, group):,} events more are in {target}")


@users_app.command("key")
def add_key(
    file: Annotated[Path, typer.Argument(help="File of master keys, which is made where there is none.")],
    name: Annotated[str | None, typer.Option(help="Of the key; today's date by default.")] = None,
) -> None:
    """Add a master key for sealed stores: what is sealed from then on is sealed with it."""
    from datetime import date

    from trirank_backend.master_keys import add_master_key

    add_master_key(file, name or date.today().isoformat())
    out.print(
        f"set {KEYS_VARIABLE}={file} for servers and commands; without it the store cannot be read", soft_wrap=True
    )


@users_app.command("rotate")
def rotate_keys(users: Address) -> None:
    """Wrap a sealed store's keys with the newest master key, and seal with a new one from now on. Servers go on."""
    with opened(users) as store:
        store.rotate()
    out.print("done; older master keys are not needed for this store any more")


@users_app.command("copy")
def copy_store(
    users: Address,
    into: Annotated[str, typer.Option(help="Address of the store to copy into.")],
    source_keys: Annotated[
        str | None, typer.Option(help="Master keys of the store that is read, if it is sealed; else it is plain.")
    ] = None,
) -> None:
    """Copy a store's log and users into another, which is sealed where TRIRANK_KEYS is set."""
    from trirank_build.online.users import copy_users

    with opened(users, keys=source_keys or "") as source, opened(into, "--into", new=True) as target:
        if target.log(limit=1) or next(target.users(), None) is not None:
            raise BadUsage(f"--into {hide_password(into)} has users already; name a new store")
        with working("copying"):
            events, count = copy_users(source, target)
    out.print(f"{events:,} events and {count:,} users are in {hide_password(into)}")


@users_app.command("erase")
def erase_user(
    user: Annotated[str, typer.Argument(help="The user's id, as callers send it.")],
    users: Address,
    user_ids: UserIds = None,
    logs: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of `users log`, or of `serve --log-requests`, to erase the user from, too; repeat."),
    ] = None,
) -> None:
    """Forget a user everywhere in the store, its log of events included, and in files of logs. Datasets that were made
    of them, and models, are made anew without the user."""
    from trirank_build.online.users import erase_from_files

    gone, lines, failed = 0, 0, []
    with opened(users) as store:
        ids = _user_ids(user, user_ids)
        lines += sum(erase_from_files(folder, set(ids)) for folder in logs or ())
        for each in ids:  # all of them, whatever comes of one
            try:
                gone += store.erase(each)
            except StoreFailed as error:  # noqa: PERF203
                failed.append(error)
    if logs:
        out.print(f"{lines} lines of user {user} are gone from {len(logs)} folders of logs")
    if failed:
        raise failed[0]
    out.print(f"{gone} events of user {user} are gone" if gone else f"nothing was known of user {user}")


def _user_ids(text: str, kind: str | None) -> list[int]:
    """A user's id in the store. Digits may be a number or a text that looks like one, and then both are meant: in a
    store of numbers nobody has the hash of a text, nor the other way round."""
    if kind is None and text.lstrip("-").isdigit():
        if not _NUMBER.fullmatch(text):
            raise BadUsage(f"user {text}: is that a number or text? Say --user-ids numbers or --user-ids strings")
        return [*_user_ids(text, "numbers"), contract.stable_id(text)]
    if kind != "numbers":
        return [contract.stable_id(text)]
    number = int(text) if re.fullmatch(r"-?[0-9]{1,19}", text) else 2**63
    if not -(2**63) <= number < 2**63:
        raise BadUsage(f"user {text} is no number of at most 64 bits; say --user-ids strings if it is text")
    return [number]
