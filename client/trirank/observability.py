"""Event hooks for traces, metrics and logs. Each imports its library when it is made, and needs
``pip install 'trirank[observability]'``, but for logs.

>>> from trirank import RankClient
>>> from trirank.observability import log_hooks, merged, prometheus_hooks
>>> RankClient("127.0.0.1:8001", event_hooks=merged(prometheus_hooks(), log_hooks()))  # doctest: +SKIP
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from trirank._events import EVENTS, Event
from trirank._options import EventHooks

_ENDS = ("response", "error", "fallback", "cancelled")
_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


def merged(*hooks: EventHooks) -> dict[str, list[Callable[[Event], None]]]:
    """Several sets of hooks as one."""
    return {name: [hook for each in hooks for hook in each.get(name, ())] for name in EVENTS}


def prometheus_hooks(registry: Any = None) -> EventHooks:
    """Metrics: ``trirank_client_requests_total{outcome}``, ``trirank_client_request_seconds``,
    ``trirank_client_retries_total``, ``trirank_client_hedges_total``.

    Args:
        registry: a prometheus_client registry; None: the process's own.
    """
    import prometheus_client

    where = prometheus_client.REGISTRY if registry is None else registry
    requests = prometheus_client.Counter(
        "trirank_client_requests", "Calls of rank that have ended", ["outcome"], registry=where
    )
    seconds = prometheus_client.Histogram(
        "trirank_client_request_seconds", "Of a call, retries and hedges included", buckets=_BUCKETS, registry=where
    )
    retries = prometheus_client.Counter("trirank_client_retries", "Attempts after one that failed", registry=where)
    hedges = prometheus_client.Counter("trirank_client_hedges", "Second calls beside a slow one", registry=where)

    def ended(event: Event) -> None:
        said = {"response": "ok", "fallback": "fallback", "cancelled": "cancelled"}
        requests.labels(said.get(event.name) or type(event.error).__name__).inc()
        seconds.observe(event.elapsed_s)

    return {
        **{name: [ended] for name in _ENDS},
        "retry": [lambda event: retries.inc()],
        "hedge": [lambda event: hedges.inc()],
    }


def log_hooks(logger: logging.Logger | None = None, *, users: bool = False) -> EventHooks:
    """One line a call that did not go well, at WARNING, and one for every other at DEBUG; fields in ``extra``.

    Args:
        users: whether to log the user's id; it is left out unless asked for.
    """
    log = logger or logging.getLogger("trirank")

    def ended(event: Event) -> None:
        usual = event.name == "cancelled" or (event.name == "response" and event.attempts <= 1)
        level = logging.DEBUG if usual else logging.WARNING
        if not log.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "event": event.name,
            "server": event.address,
            "attempts": event.attempts,
            "milliseconds": round(event.elapsed_s * 1e3, 3),
            "candidates": len(event.request.item_ids),
            "scenario": event.request.scenario,
        }
        if event.error is not None:
            fields["error"] = type(event.error).__name__
        if users:
            fields["user_id"] = event.request.user_id
        words = " ".join(f"{name}={value}" for name, value in fields.items())
        log.log(level, "rank %s", words, extra={"trirank": fields})

    return {name: [ended] for name in _ENDS}


def opentelemetry_hooks(tracer: Any = None) -> EventHooks:
    """A client span a call, and the W3C trace context sent along, so that the server's spans join it (Triton:
    ``--trace-config mode=opentelemetry``).

    Args:
        tracer: an OpenTelemetry tracer; None: of the global provider.
    """
    from opentelemetry import trace
    from opentelemetry.propagate import inject

    spans = tracer or trace.get_tracer("trirank")

    def begins(event: Event) -> None:
        span = spans.start_span("rank", kind=trace.SpanKind.CLIENT)
        event.state["span"] = span
        carrier: dict[str, str] = {}
        inject(carrier, context=trace.set_span_in_context(span))
        event.metadata += [(name.lower(), value) for name, value in carrier.items()]

    def happens(event: Event) -> None:
        event.state["span"].add_event(event.name, {"server.address": event.address, "trirank.attempt": event.attempts})

    def ended(event: Event) -> None:
        span = event.state["span"]
        span.set_attribute("server.address", event.address)
        span.set_attribute("trirank.attempts", event.attempts)
        span.set_attribute("trirank.candidates", len(event.request.item_ids))
        if event.name == "cancelled":
            span.set_attribute("trirank.cancelled", True)
        if event.error is not None:
            span.record_exception(event.error)
            span.set_status(trace.StatusCode.ERROR, type(event.error).__name__)
        span.end()

    return {
        "request": [begins],
        **{name: [happens] for name in ("attempt", "retry", "hedge")},
        **{name: [ended] for name in _ENDS},
    }
