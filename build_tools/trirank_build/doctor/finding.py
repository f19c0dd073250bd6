"""What a rule is, and what it finds. A rule is a function that says where and why; the rest stands in its decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, TypeVar


class Severity(IntEnum):
    """How bad it is: it works but could be better; it will hurt; it does not work."""

    INFO = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Rule:
    """Attributes:
    id: stays the same over versions; its letters name the room.
    issue: upstream threads, or empty.
    """

    id: str
    severity: Severity
    what: str
    fix: str
    issue: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at one place."""

    rule: Rule
    where: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rule = asdict(self.rule) | {"severity": self.rule.severity.name.lower()}
        return {**rule, "where": self.where, "reason": self.reason}


RULES: dict[str, Rule] = {}
"""All rules by id."""
Found = Iterator[tuple[str, str]]
"""Where, and why."""
Check = TypeVar("Check", bound=Callable[..., Found])
_CHECKS: dict[str, list[tuple[Rule, Callable[..., Found]]]] = {"static": [], "live": []}


def rule(id: str, severity: Severity, fix: str, issue: str = "", kind: str = "static") -> Callable[[Check], Check]:
    """Make a rule of a function; its docstring says what it is about."""

    def register(check: Check) -> Check:
        if id in RULES:
            raise ValueError(f"there is a rule {id} already")
        RULES[id] = Rule(id, severity, (check.__doc__ or "").strip(), fix, issue)
        _CHECKS[kind].append((RULES[id], check))
        return check

    return register


def run_checks(kind: str, *subject: Any) -> list[Finding]:
    """What all rules of a kind find, the worst first."""
    found = [Finding(rule, where, why) for rule, check in _CHECKS[kind] for where, why in check(*subject)]
    return sorted(found, key=lambda finding: (-finding.rule.severity, finding.rule.id, finding.where))
