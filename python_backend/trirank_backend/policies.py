"""What a scenario wants of its results, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trirank.contract import Signal

from trirank_backend.errors import InvalidRelease


@dataclass(frozen=True)
class Policy:
    """One scenario's rules.

    Attributes:
        task_weights: weight of each of the ranker's score columns in the final score.
        deduplicate: keep only the best variant of each product.
        exclude_purchased: drop what the user has bought.
        boosts: Signal name → what it adds to the final score.
        keep_unknown: show candidates that the catalogue does not know behind all others, in retrieval's order, rather
            than drop them.
    """

    task_weights: dict[str, float]
    deduplicate: bool = True
    exclude_purchased: bool = False
    boosts: dict[str, float] = field(default_factory=dict)
    keep_unknown: bool = False


def save_policies(policies: dict[str, Policy], path: Path) -> None:
    """Write scenario → policy as JSON."""
    path.write_text(json.dumps({name: asdict(policy) for name, policy in policies.items()}, indent=1) + "\n")


def load_policies(path: Path, tasks: tuple[str, ...]) -> dict[str, Policy]:
    """Read what ``save_policies`` wrote, checked against the ranker's tasks.

    Raises:
        InvalidRelease: the file is damaged, or names a task or signal that does not exist.
    """
    try:
        policies = {name: Policy(**raw) for name, raw in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRelease(f"policies {path} cannot be read ({error}); assemble again") from error
    if not policies:
        raise InvalidRelease(f"policies {path} name no scenario; assemble again")
    for name, policy in policies.items():
        check_policy(name, policy, tasks)
    return policies


def check_policy(name: str, policy: Policy, tasks: tuple[str, ...]) -> None:
    """Raises InvalidRelease where a policy names a task or signal that does not exist."""
    if unknown := set(policy.task_weights) - set(tasks):
        raise InvalidRelease(f"policy {name} weighs tasks {sorted(unknown)}; the ranker has {list(tasks)}")
    if unknown := set(policy.boosts) - set(Signal.__members__):
        raise InvalidRelease(f"policy {name} boosts {sorted(unknown)}; signals are {list(Signal.__members__)}")
