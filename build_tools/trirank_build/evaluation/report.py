"""An evaluation as one HTML file: tables, learning curve, NDCG by slice, calibration. Loads nothing from outside."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from trirank_build.artefacts import atomic_file
from trirank_build.evaluation.metrics import calibration_error
from trirank_build.evaluation.summary import RANKER, Evaluation

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
tr.ranker { background: #eef6ee } small { color: #777 } svg { max-width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<p><b>{{ verdict }}</b></p>
<p>{{ "{:,}".format(found.requests) }} requests; {{ found.protocol }}. Intervals are 95 % bootstrap over requests.</p>
<h2>Orders</h2>
<table><tr><th>order</th>{% for metric in metrics %}<th>{{ metric }}</th>{% endfor %}</tr>
{% for name, row in found.table.items() %}<tr class="{{ name }}"><td>{{ name }}</td>
{% for metric in metrics %}<td>{% if metric in row %}{{ "%.4f"|format(row[metric].value) }}
<small>{{ "%.4f"|format(row[metric].low) }} – {{ "%.4f"|format(row[metric].high) }}</small>{% endif %}</td>{% endfor %}
</tr>{% endfor %}</table>
<h2>The ranker's NDCG@10 above the others</h2>
<table><tr><th>order</th><th>difference</th><th>95 % interval</th><th>p</th></tr>
{% for name, d in found.differences.items() %}<tr><td>{{ name }}</td><td>{{ "%+.4f"|format(d.value) }}</td>
<td>{{ "%+.4f"|format(d.low) }} to {{ "%+.4f"|format(d.high) }}</td><td>{{ "%.1e"|format(d.p_value) }}</td></tr>
{% endfor %}</table>
<h2>NDCG@10 by slice</h2>{{ slices }}
<table><tr><th>slice</th><th>requests</th>{% for name in found.table %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, (count, row) in found.slices.items() %}<tr><td>{{ name }}</td><td>{{ "{:,}".format(count) }}</td>
{% for order in found.table %}<td>{{ "%.4f"|format(row[order].value) }}</td>{% endfor %}</tr>{% endfor %}</table>
{% if calibration %}<h2>Calibration</h2>
<p>The share of its request's softmax that a candidate got, against the share of the gain that it brought.
Expected calibration error {{ "%.4f"|format(error) }}.</p>{{ calibration }}{% endif %}
{% if curve %}<h2>Learning curve</h2>{{ curve }}{% endif %}
</body></html>
"""


def write_report(found: Evaluation, title: str, curve: list[dict[str, Any]], path: Path) -> None:
    """Write the file whole or not at all. ``curve`` is that of the run (``run.json``)."""
    metrics = list(dict.fromkeys(metric for row in found.table.values() for metric in row))
    page = jinja2.Environment(autoescape=True).from_string(_TEMPLATE).render(
        title=title, verdict=verdict(found), found=found, metrics=metrics, slices=svg(_by_slice(found)),
        calibration=svg(_calibration(found)) if len(found.calibration) else "",
        error=calibration_error(found.calibration) if len(found.calibration) else 0,
        curve=svg(_curve(curve)) if curve else "",
    )  # fmt: skip
    with atomic_file(path) as scratch:
        scratch.write_text(page)


def verdict(found: Evaluation) -> str:
    """The differences in NDCG@10 as a sentence."""
    ways: dict[str, list[str]] = {"better than": [], "worse than": [], "not to be told from": []}
    for name, difference in found.differences.items():
        how = "better than" if difference.low > 0 else "worse than" if difference.high < 0 else "not to be told from"
        ways[how].append(name)
    said = [f"{how} {', '.join(names)}" for how, names in ways.items() if names]
    return f"The ranker's order is {'; '.join(said)}." if said else "There is nothing to compare the ranker with."


def _by_slice(found: Evaluation) -> Figure:
    names = list(found.slices)[::-1]
    figure = Figure(figsize=(9, 1 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    others = [name for name in found.table if name not in (RANKER, "optimum")]
    best = max(others, key=lambda name: found.table[name]["NDCG@10"].value)
    for order, shift in ((RANKER, 0.2), (best, -0.2)):
        values = [found.slices[name][1][order] for name in names]
        error = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        axes.barh([at + shift for at in range(len(names))], [v.value for v in values], 0.38, xerr=error, label=order)
    axes.set_yticks(range(len(names)), [f"{name} ({found.slices[name][0]:,})" for name in names])
    axes.set_xlabel("NDCG@10")
    axes.legend()
    return figure


def _calibration(found: Evaluation) -> Figure:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.calibration[:, 1], found.calibration[:, 2], "o-", label=RANKER)
    top = float(found.calibration[:, 1:].max())
    axes.plot([0, top], [0, top], ":", color="grey", label="calibrated")
    axes.set(xlabel="predicted share", ylabel="observed share")
    axes.legend()
    return figure


def _curve(curve: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, ndcg = figure.subplots(1, 2)
    for phase in dict.fromkeys(point["phase"] for point in curve):
        points = [point for point in curve if point["phase"] == phase]
        for axes, key in ((loss, "loss"), (ndcg, "valid_ndcg10")):
            axes.plot([point["epoch"] for point in points], [point[key] for point in points], "o-", label=phase)
    loss.set(xlabel="epoch", ylabel="training loss")
    ndcg.set(xlabel="epoch", ylabel="validation NDCG@10")
    ndcg.legend()
    return figure


def svg(figure: Figure) -> Markup:
    """A figure as part of a page. Its letters are the reader's own, so that no script is missing."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "trirank", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])
