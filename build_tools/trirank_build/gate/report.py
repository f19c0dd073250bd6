"""The gate's report, as JSON for `assemble` and as one HTML file that loads nothing from outside."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from trirank_build.artefacts import atomic_file
from trirank_build.evaluation.report import svg
from trirank_build.export.beside import gate_path
from trirank_build.gate.verdict import Report

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Gate</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
tr.failed { background: #fbeaea } .failed b { color: #a00 } .passed b { color: #070 } small { color: #777 }
</style></head><body>
<h1>Gate</h1>
<p class="{{ 'passed' if report.passed else 'failed' }}"><b>{{ 'Passed' if report.passed else 'Failed' }}</b>:
{{ "{:,}".format(report.facts.requests) }} requests of the {{ report.facts.split }} split,
engine {{ report.facts.engine }}, graph {{ report.facts.onnx[:12] }}.<br>
<small>Ranker: {{ report.facts.ranker }}. Data: {{ report.facts.source }} ({{ report.facts.dataset[:12] }}).
{{ report.facts.date }}, on {{ report.facts.machine }}.</small></p>
{{ chart }}
{% if report.failures %}<ul>{% for failure in report.failures %}<li>{{ failure }}</li>{% endfor %}</ul>{% endif %}
<table><tr><th>stage</th><th>NDCG@10</th><th>of the dense ranker's</th><th>Kendall's tau</th>
<th>overlap of best ten</th><th>largest difference</th>
<th>ms at {{ report.facts.candidates_of_latency }}, ranker alone</th><th>ms, whole call</th><th>MB</th></tr>
{% for row in report.rows %}<tr class="{{ 'failed' if row.failures }}"><td>{{ row.stage }}</td>
{% for value in (row.ndcg10, row.ndcg_ratio) %}<td>{{ "%.4f"|format(value.value) }}
<small>{{ "%.4f"|format(value.low) }} – {{ "%.4f"|format(value.high) }}</small></td>{% endfor %}
<td>{{ "%.4f"|format(row.kendall_tau) }}</td><td>{{ "%.4f"|format(row.overlap) }}</td>
<td>{{ "" if row.difference is none else "%.1e"|format(row.difference) }}</td>
{% set live = row.stage == "ensemble" %}
<td>{{ "" if live else "%.3f"|format(row.latency_ms) }}</td><td>{{ "%.3f"|format(row.latency_ms) if live else "" }}</td>
<td>{{ "%.3f"|format(row.size_mb) }}</td></tr>
{% endfor %}</table>
<p>Tau and overlap are against the dense ranker's order. The difference is the largest one of a score from the stage
before, as a share of the scores' standard deviation, where both compute the same. Latencies are medians on one thread
of the machine that ran the gate, the whole call's with the requests above; compare within a column.</p>
<h2>Thresholds</h2>
<table><tr><th>stage</th><th>what</th><th>measured</th><th>limit</th><th></th></tr>
{% for row in report.rows %}{% for check in row.checks %}<tr class="{{ '' if check.passed else 'failed' }}">
<td>{{ row.stage if loop.first else "" }}</td><td>{{ check.what }}</td><td>{{ "%.4g"|format(check.value) }}</td>
<td>{{ "≥" if check.at_least else "≤" }} {{ "%g"|format(check.limit) }}</td>
<td>{{ "✓" if check.passed else "✗" }}</td></tr>{% endfor %}{% endfor %}</table>
<h2>One request</h2>
<table><tr>{% for name in report.facts.example %}<th>{{ name }}</th>{% endfor %}</tr>
{% for titles in zip(*report.facts.example.values()) %}<tr>{% for title in titles %}<td style="text-align: left">
{{ title }}</td>{% endfor %}</tr>{% endfor %}</table>
</body></html>
"""


def write_report(report: Report, onnx_path: Path) -> Path:
    """Leave the report beside the graph, where `assemble` looks for it, and as HTML beside that; gives the JSON."""
    path = gate_path(onnx_path)
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(report=report, chart=svg(_chart(report)), zip=zip)
    )
    with atomic_file(path.with_suffix(".html")) as scratch:
        scratch.write_text(page)
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return path


def _chart(report: Report) -> Figure:
    """NDCG@10 of each stage over the dense ranker's, beside its limit."""
    rows = report.rows[::-1]
    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = [row.ndcg_ratio for row in rows]
    error = [[ratio.value - ratio.low for ratio in ratios], [ratio.high - ratio.value for ratio in ratios]]
    axes.errorbar([ratio.value for ratio in ratios], range(len(rows)), xerr=error, fmt="o")
    axes.axvline(report.thresholds.min_ndcg_ratio, linestyle=":", color="grey")
    axes.set_yticks(range(len(rows)), [row.stage for row in rows])
    axes.set_xlabel("NDCG@10 over the dense ranker's, with 95 % intervals; dotted: the limit")
    return figure
