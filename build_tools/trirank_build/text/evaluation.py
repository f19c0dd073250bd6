"""How well a classifier does: accuracy, precision, recall, F1, and what is taken for what; as a table and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from trirank_build.artefacts import atomic_file
from trirank_build.evaluation.bootstrap import Interval, mean_interval

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
small { color: #777 } .example td { text-align: left }
</style></head><body>
<h1>{{ title }}</h1>
<p>How often is it right? Accuracy <b>{{ "%.4f"|format(found.accuracy.value) }}</b>
<small>{{ "%.4f"|format(found.accuracy.low) }} – {{ "%.4f"|format(found.accuracy.high) }}</small>, macro F1
{{ "%.4f"|format(found.macro_f1) }}, over {{ "{:,}".format(found.texts) }} texts of the {{ split }} part. The interval
is 95 % bootstrap over texts.</p>
<h2>By class</h2>
<table><tr><th>class</th><th>texts</th><th>precision</th><th>recall</th><th>F1</th></tr>
{% for row in found.classes %}<tr><td>{{ row.name }}</td><td>{{ "{:,}".format(row.texts) }}</td>
<td>{{ "%.4f"|format(row.precision) }}</td><td>{{ "%.4f"|format(row.recall) }}</td><td>{{ "%.4f"|format(row.f1) }}</td>
</tr>{% endfor %}</table>
<h2>What is taken for what</h2>
<p>A row is what a text is, a column what it was taken for.</p>
<table><tr><th></th>{% for row in found.classes %}<th>{{ row.name }}</th>{% endfor %}</tr>
{% for row in found.classes %}{% set at = loop.index0 %}<tr><td>{{ row.name }}</td>
{% for count in found.confusion[at] %}<td style="background: rgba({{ "46, 125, 50" if loop.index0 == at
else "198, 40, 40" }}, {{ "%.2f"|format(0.6 * count / (row.texts or 1)) }})">{{ "{:,}".format(count) }}</td>{% endfor %}
</tr>{% endfor %}</table>
{% if found.worst %}<h2>The surest mistakes</h2>
<table class="example"><tr><th>text</th><th>is</th><th>taken for</th><th>with</th></tr>
{% for text, own, taken, share in found.worst %}<tr class="example"><td>{{ text }}</td><td>{{ own }}</td>
<td>{{ taken }}</td><td>{{ "%.3f"|format(share) }}</td></tr>{% endfor %}</table>{% endif %}
</body></html>
"""
WORST = 20
_SHOWN = 160


@dataclass(frozen=True)
class OfClass:
    """One class: how many texts are of it, and how well these are found."""

    name: str
    texts: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TextEvaluation:
    """Of R texts and C classes.

    Attributes:
        accuracy: with its 95 % interval.
        confusion: [C, C] counts, by what a text is and what it was taken for.
        worst: text, class, what it was taken for, and with which probability; the surest mistakes first.
    """

    texts: int
    accuracy: Interval
    macro_f1: float
    classes: list[OfClass]
    confusion: list[list[int]]
    worst: list[tuple[str, str, str, float]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without texts."""
        return {
            "texts": self.texts, "accuracy": self.accuracy._asdict(), "macro_f1": self.macro_f1,
            "classes": [vars(row) for row in self.classes], "confusion": self.confusion,
        }  # fmt: skip

    def table(self, title: str) -> Table:
        """For the terminal."""
        table = Table("class", "texts", "precision", "recall", "F1", title=title)
        for row in self.classes:
            table.add_row(row.name, f"{row.texts:,}", f"{row.precision:.4f}", f"{row.recall:.4f}", f"{row.f1:.4f}")
        value, low, high = self.accuracy
        table.add_row("accuracy", f"{self.texts:,}", "", f"{value:.4f} [{low:.4f}, {high:.4f}]", f"{self.macro_f1:.4f}")
        return table

    def write(self, path: Path, title: str, split: str) -> None:
        """The page, whole or not at all. Loads nothing from outside."""
        page = jinja2.Environment(autoescape=True).from_string(_TEMPLATE).render(title=title, found=self, split=split)
        with atomic_file(path) as scratch:
            scratch.write_text(page)


def evaluate_text(
    texts: list[str], labels: NDArray[np.int64], logits: NDArray[np.float32], classes: list[str]
) -> TextEvaluation:
    """Args:
    labels: [R] what each text is.
    logits: [R, C] what the classifier says.
    """
    taken, count = logits.argmax(1), len(classes)
    confusion = np.bincount(labels * count + taken, minlength=count * count).reshape(count, count)
    rows = []
    for at, name in enumerate(classes):
        right, own, all_taken = int(confusion[at, at]), int(confusion[at].sum()), int(confusion[:, at].sum())
        precision, recall = right / max(all_taken, 1), right / max(own, 1)
        rows.append(OfClass(name, own, precision, recall, 2 * right / max(own + all_taken, 1)))
    shifted = logits - logits.max(1, keepdims=True)
    share = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    wrong = np.flatnonzero(taken != labels)
    surest = wrong[np.argsort(-share[wrong, taken[wrong]], kind="stable")][:WORST]
    worst = [
        (texts[at][:_SHOWN], classes[labels[at]], classes[taken[at]], float(share[at, taken[at]])) for at in surest
    ]
    accuracy = mean_interval((taken == labels).astype(np.float64))
    macro = float(np.mean([row.f1 for row in rows]))
    return TextEvaluation(len(texts), accuracy, macro, rows, confusion.tolist(), worst)
