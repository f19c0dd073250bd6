"""The model card of a release: what it is, from what, how good, for what, in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from trirank import contract

_TEMPLATE = Path(__file__).parent / "MODEL_CARD.md.jinja"


def model_card(facts: dict[str, Any]) -> str:
    """The card of a manifest's facts."""
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(_TEMPLATE.read_text())
    return template.render(max_candidates=contract.MAX_CANDIDATES, **facts).rstrip() + "\n"
