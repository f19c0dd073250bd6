"""A load test as one HTML file that loads nothing from outside: the verdict, then what it rests on."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from trirank_loadtest.measured import Measured

_SHOWN = ("p50", "p90", "p99", "p99.9")
_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load test</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
.kept { color: #070 } .broken { color: #a00 } small { color: #666 }
svg { max-width: 100%; height: auto } h2 { margin-top: 2rem }
</style></head><body>
<h1>Load test</h1>
<p class="{{ 'kept' if result.passed else 'broken' }}"><b>{{ result.verdict }}</b></p>
<p><small>{{ load.shape }} load, {{ load.seconds|round|int }} s a run, {{ load.mix }} requests, Poisson arrivals,
through {{ "trirank's client" if load.through == "client" else "grpcio" }}, deadline
{{ "%g"|format(load.deadline_s * 1e3) }} ms;
{{ result.date }}, on {{ result.machine }}. Latencies count from when a request was due; one that failed is
infinitely slow.</small></p>
{% if result.slo_checks %}<table><tr><th>promise</th><th>measured</th><th></th></tr>
{% for check in result.slo_checks %}<tr><td>{{ check.promise }}</td><td>{{ check.measured }}</td>
<td class="{{ 'kept' if check.kept else 'broken' }}">{{ "✓" if check.kept else "✗" }}</td></tr>{% endfor %}
</table>{% endif %}
{% if result.differences %}<h2>Is it worse than before?</h2>
<table><tr><th>what</th><th>before</th><th>now</th><th>ratio</th><th>95 % interval</th><th>verdict</th></tr>
{% for one in result.differences %}<tr><td>{{ one.name }}</td><td>{{ "%.4g"|format(one.old) }}</td>
<td>{{ "%.4g"|format(one.new) }}</td><td>{{ "" if one.ratio is none else "%.3f"|format(one.ratio) }}</td>
<td>{{ "%.3f"|format(one.low) }} to {{ "%.3f"|format(one.high) }}</td><td>{{ one.verdict }}</td></tr>{% endfor %}
</table>
{% endif %}
{% for question, chart in charts %}<h2>{{ question }}</h2>{{ chart }}{% endfor %}
<h2>{{ "Every rate that was tried" if runs|length > 1 else "In numbers" }}</h2>
<table><tr><th>asked for /s</th><th>due /s</th><th>answered /s</th><th>failed</th>
{% for name in names %}<th>{{ name }} ms</th>{% endfor %}<th>mean batch</th><th>machine busy</th><th>load busy</th>
<th>load late, p99 ms</th></tr>
{% for run in runs %}<tr><td>{{ "%.0f"|format(run.rate) }}</td><td>{{ "%.0f"|format(run.offered) }}</td>
<td>{{ "%.0f"|format(run.answered) }}</td><td>{{ "%.2f %%"|format(run.error_rate * 100) }}</td>
{% for name in names %}<td>{{ number(run.latencies_ms[name]) }}</td>{% endfor %}
<td>{{ batch(run) }}</td>
<td>{{ "%.0f %%"|format(100 * run.cpu.get("machine", 0)) }}</td>
<td>{{ "%.0f %%"|format(100 * run.cpu.get("load", 0)) }}</td>
<td>{{ "%.1f"|format(run.lag_p99_ms) }}</td></tr>{% endfor %}</table>
{% set run = shown %}
<table><tr><th>at {{ "%.0f"|format(run.rate) }} requests/s</th><th>requests</th><th>failed</th><th>p50 ms</th>
<th>p99 ms</th></tr>
{% for name, kind in run.kinds.items() %}<tr><td>{{ name }}</td><td>{{ "%.0f"|format(kind.requests) }}</td>
<td>{{ "%.0f"|format(kind.failed) }}</td><td>{{ number(kind.p50_ms) }}</td><td>{{ number(kind.p99_ms) }}</td></tr>
{% endfor %}</table>
{% if run.errors %}<table><tr><th>error</th><th>count</th></tr>{% for name, count in run.errors.items() %}
<tr><td>{{ name }}</td><td>{{ count }}</td></tr>{% endfor %}</table>{% endif %}
</body></html>
"""


def write_report(result: dict[str, Any], path: Path) -> None:
    """The page of a result (see results.py)."""
    runs = [Measured.from_json(raw) for raw in result["runs"]]
    ordered = sorted(runs, key=lambda run: run.rate)
    shown = next((run for run in reversed(ordered) if result["shown_rate"] == run.rate), runs[0])
    names = [name for name in _SHOWN if name in shown.latencies_ms]
    charts = []
    if len({run.rate for run in runs}) > 1:
        charts += [
            ("How slow does it get as more comes in?", _latencies(ordered, names, result)),
            ("Where is the time spent?", _stages(ordered)),
            ("Do batches form?", _batches(ordered)),
        ]
    else:
        charts.append(("Where is the time spent?", _stages([shown])))
    charts += [
        (f"What happened over time, at {shown.rate:.0f} requests/s?", _timeline(shown)),
        (f"How long did requests take, at {shown.rate:.0f} requests/s?", _histogram(shown)),
    ]
    page = jinja2.Environment(autoescape=True).from_string(_TEMPLATE).render(
        result=result, load=result["load"], runs=ordered, shown=shown, names=names, number=_number, batch=_batch,
        charts=[(question, _svg(figure)) for question, figure in charts],
    )  # fmt: skip
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(page)
    scratch.replace(path)


def _number(value: float | None) -> str:
    return "∞" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _batch(run: Measured) -> str:
    """Of what scores: the ranker, or all stages in one."""
    found = [stage for stage in run.stages if stage.model.partition("_")[0] in ("ranker", "rank")]
    return f"{found[0].batch:.1f}" if found else ""


def _figure(height: float = 3.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _latencies(runs: list[Measured], names: list[str], result: dict[str, Any]) -> Figure:
    figure, axes = _figure(3.8)
    for name in names:
        points = [(run.offered, run.latencies_ms[name]) for run in runs if math.isfinite(run.latencies_ms[name])]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    for check in result["slo_checks"]:
        if check["limit_ms"]:
            axes.axhline(check["limit_ms"], linestyle=":", color="grey")
    if result["capacity"]:
        axes.axvline(result["capacity"]["rate"], linestyle="--", color="#27632a", label="capacity")
    axes.set_yscale("log")
    axes.set_xlabel("requests due a second; dotted: what is promised")
    axes.set_ylabel("ms")
    axes.legend()
    return figure


def _stages(runs: list[Measured]) -> Figure:
    models = list(dict.fromkeys(stage.model for run in runs for stage in run.stages))
    figure, axes = _figure()
    places = range(len(runs))
    bottom = [0.0] * len(runs)
    for at, model in enumerate(models):
        by_run = [next((stage for stage in run.stages if stage.model == model), None) for run in runs]
        for what, hatch in (("queue", "//"), ("compute", "")):
            heights = [0.0 if stage is None else getattr(stage, f"{what}_ms") for stage in by_run]
            axes.bar(places, heights, bottom=bottom, color=f"C{at}", hatch=hatch, alpha=0.8, label=f"{model}: {what}")
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(places, [f"{run.rate:.0f}" for run in runs], rotation=45 if len(runs) > 8 else 0)
    axes.set_xlabel("requests a second")
    axes.set_ylabel("mean ms a request, by the server")
    axes.legend(fontsize=8)
    return figure


def _batches(runs: list[Measured]) -> Figure:
    figure, axes = _figure()
    for model in dict.fromkeys(stage.model for run in runs for stage in run.stages):
        points = [(run.offered, stage.batch) for run in runs for stage in run.stages if stage.model == model]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=model)
    axes.set_xlabel("requests due a second")
    axes.set_ylabel("mean requests of a batch")
    axes.legend(fontsize=8)
    return figure


def _timeline(run: Measured) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    seconds = [row["second"] for row in run.timeline]
    for name in ("p50_ms", "p99_ms"):
        above.plot(seconds, [row[name] for row in run.timeline], label=name.removesuffix("_ms"))
    above.set_ylabel("ms")
    above.legend()
    below.plot(seconds, [row["due"] for row in run.timeline], label="due")
    below.plot(seconds, [row["failed"] for row in run.timeline], label="failed", color="C3")
    below.set_ylabel("requests")
    below.set_xlabel("s")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def _histogram(run: Measured) -> Figure:
    figure, axes = _figure()
    edges, counts = run.histogram["edges_ms"], run.histogram["counts"]
    if counts:
        axes.stairs(counts, edges, fill=True, alpha=0.6)
        axes.set_xscale("log")
    for name in ("p50", "p99"):
        if math.isfinite(run.latencies_ms[name]):
            axes.axvline(run.latencies_ms[name], linestyle="--", color="grey")
            axes.text(run.latencies_ms[name], axes.get_ylim()[1], f" {name}", va="top")
    axes.set_xlabel("ms from when it was due")
    axes.set_ylabel("requests")
    return figure


def _svg(figure: Figure) -> Markup:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])  # drawn here
