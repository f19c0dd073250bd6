"""From one release to the next while requests are answered.

What was tried is in docs/releases.md. In short: Triton has no step that replaces four models at once, but replacing one
ensemble's configuration, or one model, is one step; an ensemble holds on to the models it was loaded with, and a model
to the requests that it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import grpc
from trirank import RankClient, RankError, contract
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trirank_build.errors import ServeError
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.access import Access
from trirank_build.serving.live import LiveRepository, Served

Connect = Callable[[float, str], RankClient]
WARM_ROUNDS = 3
LOAD_TIMEOUT_S = 120.0
DRAIN_S = 1.0
"""How long the old release must have had nothing to do before it goes."""
DRAIN_TIMEOUT_S = 10.0
"""No caller waits longer for an answer. One that gave up between two stages never arrives at the second, so counts
that do not agree are waited for no longer."""
CONTROL_HEADER = "trirank-control"


class Control:
    """Triton's model control, which answers to whoever has the secret.

    Raises ServeError where Triton refuses.
    """

    def __init__(self, address: str, secret: str, access: Access) -> None:
        self._channel = access.channel(address)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # Triton prefixes a restricted protocol's header so.
        self._metadata = ((f"triton-grpc-protocol-{CONTROL_HEADER}", secret),)

    def load(self, model: str) -> None:
        """Load a model, or take up its changed configuration."""
        self._call("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=model), f"load {model}")

    def unload(self, model: str) -> None:
        """Unload a model; requests that it has are finished first."""
        self._call(
            "RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=model), f"unload {model}"
        )

    def loaded(self) -> set[str]:
        """Names of the models that are ready."""
        reply = self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True), "list its models")
        return {model.name for model in reply.models}

    def counts(self, model: str, timeout_s: float = LOAD_TIMEOUT_S) -> tuple[int, int]:
        """Requests that a model answered, and that failed in it."""
        request = service_pb2.ModelStatisticsRequest(name=model)
        (found,) = self._call("ModelStatistics", request, f"tell statistics of {model}", timeout_s).model_stats
        return found.inference_stats.success.count, found.inference_stats.fail.count

    def statistics(self) -> Any:
        """What Triton counts of all models."""
        return self._call("ModelStatistics", service_pb2.ModelStatisticsRequest(), "tell its statistics").model_stats

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()

    def _call(self, method: str, message: Any, what: str, timeout_s: float = LOAD_TIMEOUT_S) -> Any:
        try:
            return getattr(self._stub, method)(message, metadata=self._metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            raise ServeError(f"Triton did not {what}: {error.details() or error.code().name}") from None


def switch(control: Control, connect: Connect, live: LiveRepository, old: Served, new: Served) -> None:
    """Serve ``new`` in place of ``old``, whose models stay loaded for the requests that they have. For callers nothing
    changes until the new one has ranked recorded requests.

    Raises:
        ServeError: the new one cannot be loaded or does not answer; the old one is served as before.
    """
    with _nothing_left_of(new, control, live):
        live.add(new)
        if new.pipeline != "single":
            control.load(new.entry)  # and with it the models that it has; naming those too would load them twice
            warm_up(connect, new, new.entry)
        # A single model is proved as it is loaded (Pipeline.rehearse), while Triton still serves the one before.
        try:
            live.point(new)
            control.load(contract.ENSEMBLE)
        except ServeError:
            live.point(old)
            raise


def retire(control: Control, live: LiveRepository, old: Served) -> None:
    """Unload a release that is served no more, once its stages have answered what they took.

    Raises:
        ServeError: Triton refused; what is left costs memory and nothing else.
    """
    _drain(control, old)
    _take_away(old, control, live)


def warm_up(connect: Connect, served: Served, ensemble: str) -> None:
    """Send a release's recorded requests through an ensemble.

    Args:
        connect: makes a client of a model, which waits for so many seconds.

    Raises:
        ServeError: one of them failed.
    """
    with connect(10.0, ensemble) as client:
        try:
            for request in recorded_requests(served.release) * WARM_ROUNDS:
                client.rank(request)
        except RankError as error:
            raise ServeError(f"a recorded request of {served.name} failed: {error}") from error


def _drain(control: Control, old: Served) -> None:
    """Until requests that were under way in the old release have gone through all its stages."""
    if not old.models:  # Triton ends it once its requests are answered
        return
    started = quiet_since = time.monotonic()
    before = None
    while time.monotonic() - quiet_since < DRAIN_S and time.monotonic() - started < DRAIN_TIMEOUT_S:
        counts = [control.counts(model) for model in old.stages]
        on_their_way = any(done != sum(then) for (done, _), then in pairwise(counts))
        if counts != before or on_their_way:
            before, quiet_since = counts, time.monotonic()
        time.sleep(0.05)


def _take_away(served: Served, control: Control, live: LiveRepository) -> None:
    loaded = control.loaded()
    for model in reversed(served.models):
        if model in loaded:
            control.unload(model)
    live.remove(served)


@contextmanager
def _nothing_left_of(new: Served, control: Control, live: LiveRepository) -> Iterator[None]:
    """If the block fails, the new release's models go again."""
    try:
        yield
    except BaseException:
        _take_away(new, control, live)
        raise
