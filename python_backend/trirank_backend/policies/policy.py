"""A policy: what a scenario wants of its results, a list of rules in one TOML file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trirank_backend.errors import InvalidPolicy, InvalidRelease
from trirank_backend.policies.boost import Boost
from trirank_backend.policies.bury import Bury
from trirank_backend.policies.cap import Cap
from trirank_backend.policies.deduplicate import Deduplicate
from trirank_backend.policies.dpp import Dpp
from trirank_backend.policies.explore import Explore
from trirank_backend.policies.filter import Filter
from trirank_backend.policies.mix import Mix
from trirank_backend.policies.mmr import Mmr
from trirank_backend.policies.page import Page
from trirank_backend.policies.pin import Pin
from trirank_backend.policies.quota import Quota
from trirank_backend.policies.rule import Phase, Release, Rule, Step, item_id, query_key
from trirank_backend.policies.sponsored import Sponsored

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RULES = (Mix, Filter, Boost, Bury, Explore, Deduplicate, Mmr, Dpp, Cap, Quota, Pin, Sponsored)
AnyRule = Annotated[
    Mix | Filter | Boost | Bury | Explore | Deduplicate | Mmr | Dpp | Cap | Quota | Pin | Sponsored,
    Field(discriminator="rule"),
]
SHIPPED = Path(__file__).parent / "shipped"


class Policy(BaseModel):
    """One scenario's rules.

    Attributes:
        description: what it is for.
        keep_unknown: show candidates that the catalogue does not know behind all others, in retrieval's order, rather
            than drop them.
        keep_unavailable: show what is sold out or blocked, too.
        rules: in the order in which they are applied.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str = ""
    keep_unknown: bool = False
    keep_unavailable: bool = False
    rules: list[AnyRule] = []

    @model_validator(mode="after")
    def _rules_fit_each_other(self) -> Policy:
        for problem in (*self._order(), *self._positions(), *self._pins()):
            raise ValueError(problem)
        return self

    def _order(self) -> Iterator[str]:
        last, scored = None, None
        for number, rule in enumerate(self.rules, 1):
            if last is not None and rule.phase < last.phase:
                yield (
                    f"rule {number} ({rule.rule}) comes after {last.rule}, whose work it would undo; put it before: "
                    "first filters and scores, then deduplicate, then mmr, dpp, cap and quota, then pin and sponsored"
                )
            if isinstance(rule, Mix) and scored is not None:
                yield f"rule {number} (mix) comes after {scored.rule}, whose score it would replace; put it before"
            before = [each for each in self.rules[: number - 1] if each.phase is Phase.ORDER and _meet(each, rule)]
            if isinstance(rule, Mmr | Dpp) and before:
                yield (
                    f"rule {number} ({rule.rule}) comes after {before[-1].rule}, whose order it would undo: it "
                    "makes its own from the scores; put it before, and leave out all but one of mmr and dpp"
                )
            if rule.phase is Phase.SCORE and not isinstance(rule, Filter):
                scored = rule
            last = rule

    def _positions(self) -> Iterator[str]:
        taken: list[tuple[int, int, Rule]] = []
        for number, rule in enumerate(self.rules, 1):
            for position in rule.positions():
                for other, held, first in taken:
                    if other != number and held == position and _meet(first, rule):
                        yield f"rules {other} and {number} both want position {position}; move one of them"
                taken.append((number, position, rule))

    def _pins(self) -> Iterator[str]:
        pinned: dict[int, list[Pin]] = {}
        for number, rule in enumerate(self.rules, 1):
            if isinstance(rule, Pin):
                same = pinned.setdefault(item_id(rule.item), [])
                if any(_meet(rule, other) for other in same):
                    yield f"rule {number} pins item {rule.item}, which another rule pins already; leave one out"
                same.append(rule)
        for number, rule in enumerate(self.rules, 1):
            if isinstance(rule, Filter):
                for item in rule.items:
                    if any(_meet(rule, pin) for pin in pinned.get(item_id(item), ())):
                        yield f"rule {number} filters item {item} out, which another rule pins; leave one of them out"

    def text(self) -> str:
        """The policy as TOML, what was left out left out."""
        import tomli_w  # a server reads policies, and writes none

        rules = [{"rule": rule.rule, **rule.model_dump(exclude_unset=True, exclude_none=True)} for rule in self.rules]
        own = self.model_dump(exclude={"rules"}, exclude_unset=True)
        return tomli_w.dumps(own | ({"rules": rules} if rules else {}))

    @property
    def asks_query(self) -> bool:
        """Whether a rule is for certain searches."""
        return any(rule.queries for rule in self.rules)

    @property
    def asks_retrieval(self) -> bool:
        """Whether a rule reads retrieval's scores."""
        return any(isinstance(rule, Mix) and rule.retrieval for rule in self.rules)

    @property
    def asks_seed(self) -> bool:
        """Whether a rule draws by chance, and reads feedback's counts for it."""
        return any(isinstance(rule, Explore) for rule in self.rules)

    def problems(self, release: Release) -> list[str]:
        """What does not fit a release."""
        found = [
            f"rule {number} ({rule.rule}): {problem}"
            for number, rule in enumerate(self.rules, 1)
            for problem in rule.problems(release)
        ]
        filters = [rule for rule in self.rules if isinstance(rule, Filter)]
        for number, rule in enumerate(self.rules, 1):
            row = rule.row(release) if isinstance(rule, Pin) else -1
            if row >= 0 and any(_meet(rule, each) and _drops(each, release, row) for each in filters):
                found.append(
                    f"rule {number} (pin): a filter leaves its item out for its brand, category or seller; "
                    "leave one of them out"
                )
        return found

    def absent(self, release: Release) -> list[str]:
        """What it names that a release does not have, or does not have at that price; the rules work without."""
        found = [
            f"rule {number} ({rule.rule}): {what}"
            for number, rule in enumerate(self.rules, 1)
            for what in rule.absent(release)
        ]
        filters = [rule for rule in self.rules if isinstance(rule, Filter)]
        for number, rule in enumerate(self.rules, 1):
            row = rule.row(release) if isinstance(rule, Pin) else -1
            if row >= 0 and any(_meet(rule, each) and _too_dear_or_cheap(each, release, row) for each in filters):
                found.append(f"rule {number} (pin): a filter leaves its item out at today's price")
        return found

    def bind(self, release: Release) -> list[tuple[Rule | None, Step]]:
        """The rules' steps for a release, in order; those of None prepare the others. Without a rule ``mix`` the tasks'
        scores count alike.

        Raises:
            InvalidRelease: a rule does not fit it.
        """
        if problems := self.problems(release):
            raise InvalidRelease("; ".join(problems))
        mixed = any(isinstance(rule, Mix) for rule in self.rules)
        steps: list[tuple[Rule | None, Step]] = [] if mixed else [(default := Mix(), default.bind(release))]
        if any(isinstance(rule, Deduplicate) for rule in self.rules):
            holds = [(None, _for_queries(rule, rule.hold(release))) for rule in self.rules if isinstance(rule, Pin)]
            steps = [*holds, *steps]
        return [*steps, *((rule, _for_queries(rule, rule.bind(release))) for rule in self.rules)]


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        InvalidPolicy: it cannot be read, is no TOML, or a rule is wrong; the message names each.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidPolicy(f"policy {path} cannot be read ({error.strerror}); name a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidPolicy(f"policy {path} is no valid TOML: {error}") from error
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        told = "; ".join(_told(each) for each in error.errors())
        raise InvalidPolicy(f"policy {path}: {told}") from None


def load_policies(folder: Path) -> dict[str, Policy]:
    """Scenario → policy, of a folder of ``SCENARIO.toml`` in the order of their names.

    Raises:
        InvalidPolicy: there is none, or one is wrong.
    """
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise InvalidPolicy(f"{folder} holds no policy; a policy is a file SCENARIO.toml")
    return {file.stem: load_policy(file) for file in files}


def _told(error: Any) -> str:
    """One of pydantic's errors, with the rule by its number from 1."""
    place: list[str] = []
    for at, part in enumerate(error["loc"]):
        if at == 1 and error["loc"][0] == "rules" and isinstance(part, int):
            place[-1] = f"rule {part + 1}"
        elif at == 2 and place and place[0].startswith("rule "):
            place[0] += f" ({part})"
        else:
            place.append(str(part))
    words = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        words = f"there is no rule {error['ctx']['tag']!r}; rules are {', '.join(_names())}"
    elif error["type"] == "union_tag_not_found":
        words = f"it does not say which rule it is; say rule = one of {', '.join(_names())}"
    elif error["type"] == "extra_forbidden":
        words = "unknown key"
    elif error["type"] != "value_error":
        words += f" (got {error['input']!r})"
    return f"{'.'.join(place)}: {words}" if place else words


def _names() -> list[str]:
    return [rule.model_fields["rule"].default for rule in RULES]


def _meet(one: Rule, other: Rule) -> bool:
    """Whether there are requests that both are for."""
    mine, others = ({query_key(query) for query in rule.queries} for rule in (one, other))
    return not mine or not others or bool(mine & others)


def _drops(rule: Filter, release: Release, row: int) -> bool:
    """Whether a filter leaves an item out whoever asks and whenever."""
    of_item = release.items
    for names, kind, codes in (
        (rule.brands, "brand", of_item.brands),
        (rule.categories, "category", of_item.categories),
        (rule.sellers, "seller", of_item.sellers),
    ):
        code = int(codes[row])
        if code >= 0 and release.attributes.names[kind][code] in names:
            return True
    return False


def _too_dear_or_cheap(rule: Filter, release: Release, row: int) -> bool:
    """Whether a filter leaves an item out at the price that the release has."""
    price = release.items.prices[row]
    too_cheap = rule.min_price is not None and not price >= np.float32(rule.min_price)
    return too_cheap or (rule.max_price is not None and not price <= np.float32(rule.max_price))


def _for_queries(rule: Rule, step: Step) -> Step:
    return partial(_if_asked, frozenset(map(query_key, rule.queries)), step) if rule.queries else step


def _if_asked(keys: frozenset[int], step: Step, page: Page) -> None:
    if page.query in keys:
        step(page)
