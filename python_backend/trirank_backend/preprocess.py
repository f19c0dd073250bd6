"""Step 1: ids, a user and a query become the ranker's tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Status

from trirank_backend.compiled import compile_all
from trirank_backend.errors import InvalidInput
from trirank_backend.features import Lines, Packer
from trirank_backend.handover import Handover
from trirank_backend.histories import Events, HistoryBatch, SqliteUserStore, UserStore
from trirank_backend.lookup_kernels import drop_repeats
from trirank_backend.policies import load_policies
from trirank_backend.release import FEATURES, check_contract, load_packer
from trirank_backend.requests import Request, Tensors
from trirank_backend.text import TextEncoder, query_trigrams


class Prepared(NamedTuple):
    """A request that is ready for the ranker: its tensors [R, …], and what rerank has to know."""

    ranker: Tensors
    handover: Handover

    def tensors(self) -> Tensors:
        """All of it by the names that it crosses a process boundary with."""
        return {**self.ranker, contract.HANDOVER.name: self.handover.tensor()}


class Preprocess:
    """Looks up what requests name, and packs it.

    A step answers a list as long as its input, in which a request that breaks the contract is an InvalidInput, and
    every other one is answered all the same.

    Args:
        policies: scenario → its place among the release's policies.
        keeping: places of those that keep what the catalogue does not know.
    """

    def __init__(
        self,
        packer: Packer,
        text: TextEncoder,
        users: UserStore,
        policies: Mapping[str, int],
        clock: Callable[[], float] = time.time,
        keeping: frozenset[int] = frozenset(),
    ) -> None:
        self._packer = packer
        self._text = text
        self._users = users
        self._policies = policies
        self._keeping = keeping
        self._clock = clock

    @classmethod
    def load(cls, release: Path) -> Preprocess:
        """Open a release's files."""
        check_contract(release)
        compile_all()
        directory = release / FEATURES
        packer, text = load_packer(directory)
        policies = load_policies(directory / "policies.json", packer.spec.tasks)
        places = {name: at for at, name in enumerate(policies)}
        keeping = frozenset(places[name] for name, policy in policies.items() if policy.keep_unknown)
        return cls(packer, text, SqliteUserStore(directory / "users.sqlite"), places, keeping=keeping)

    def close(self) -> None:
        """Let go of the user store."""
        self._users.close()

    def __call__(self, requests: list[Tensors]) -> list[Prepared | InvalidInput]:
        """Each request, prepared."""
        answers: list[Prepared | InvalidInput | None] = []
        good: list[Request] = []
        for tensors in requests:
            try:
                good.append(Request(tensors, self._policies))
                answers.append(None)
            except InvalidInput as error:  # noqa: PERF203  # one bad request must not spoil the batch
                answers.append(error)
        prepared = iter(self._prepare(good) if good else ())
        return [next(prepared) if answer is None else answer for answer in answers]

    def tensors(self, requests: list[Tensors], deadlines: list[float]) -> list[Tensors | InvalidInput]:
        """The same for a model of its own, which has to send all of it on."""
        return [one.tensors() if isinstance(one, Prepared) else one for one in self(requests)]

    def _prepare(self, requests: list[Request]) -> list[Prepared]:
        spec = self._packer.spec
        widths = [request.bucket for request in requests for _ in range(len(request))]
        starts = np.zeros(len(widths) + 1, np.int64)
        np.cumsum(widths, out=starts[1:])
        ids = _side_by_side([request.item_ids for request in requests], requests, contract.PAD_ITEM_ID, np.int64)
        rows = self._packer.catalogue.rows(ids)
        counts = np.zeros((len(widths), 2), np.int32)
        drop_repeats(ids, starts, contract.PAD_ITEM_ID, rows, counts)

        now = int(self._clock())
        moments = [moment for request in requests for moment in request.timestamps or [now] * len(request)]
        users = [user for request in requests for user in request.users]
        queries = [query for request in requests for query in request.queries]
        history, cold = self._histories([events for r in requests for events in r.histories], users, moments)
        packed = self._packer.pack(
            Lines(
                starts=starts,
                rows=rows,
                scores=_side_by_side([r.retrieval_scores for r in requests], requests, np.nan, np.float32),
                query=self._text.encode(queries, spec.query_length),
                words=query_trigrams(queries),
                timestamps=np.array(moments, np.int64),
                anonymous=np.array([user == contract.ANONYMOUS_USER for user in users]),
                history_rows=self._packer.catalogue.rows(history.item_ids),
                history_behaviours=history.behaviours,
                history_timestamps=history.timestamps,
            )
        )
        status = np.empty((len(widths), 3), np.int32)
        status[:, 1:] = counts
        kept = [policy in self._keeping for request in requests for policy in request.policies]
        for line, (unknown, repeats) in enumerate(counts.tolist()):
            status[line, 0] = (
                (cold[line] and Status.COLD_USER.value)
                | (unknown > 0 and not kept[line] and Status.UNKNOWN_ITEMS_DROPPED.value)
                | (repeats > 0 and Status.DUPLICATES_DROPPED.value)
            )
        prepared, line = [], 0
        for request in requests:
            of_lines = slice(line, line + len(request))
            of_places = slice(starts[of_lines.start], starts[of_lines.stop])
            line = of_lines.stop
            shape = (len(request), request.bucket)
            ranker = {
                "history": packed.history[of_lines],
                "query": packed.query[of_lines],
                "candidates": packed.candidates[of_places].reshape(*shape, -1),
                "dense": packed.dense[of_places].reshape(*shape, -1),
                "context": packed.context[of_lines],
            }
            handover = Handover(
                status=status[of_lines],
                top_k=np.array(request.top_k, np.int32),
                policy=np.array(request.policies, np.int32),
                rows=rows[of_places].reshape(shape),
                signals=packed.signals[of_places].reshape(shape),
                unknown=self._unknown(request, ids[of_places].reshape(shape), counts[of_lines, 0], kept[of_lines]),
            )
            prepared.append(Prepared(ranker, handover))
        return prepared

    def _unknown(
        self, request: Request, ids: NDArray[np.int64], counts: NDArray[np.int32], kept: list[bool]
    ) -> NDArray[np.int64]:
        """[R, U] what a request's policies keep though the catalogue does not know it.

        Args:
            ids: [R, N] candidates.
            counts: [R] how many the catalogue does not know.
        """
        most = max((int(count) for count, keep in zip(counts, kept, strict=True) if keep), default=0)
        found = np.full((len(ids), most), contract.PAD_ITEM_ID, np.int64)
        for line in range(len(ids) if most else 0):
            if not kept[line]:
                continue
            strange = (self._packer.catalogue.rows(ids[line]) < 0) & (ids[line] != contract.PAD_ITEM_ID)
            _, places = np.unique(np.where(strange, ids[line], contract.PAD_ITEM_ID), return_index=True)
            places = np.sort(places[strange[places]])
            if request.retrieval_scores is not None:
                scores = request.retrieval_scores[line, places]
                places = places[np.argsort(-scores, kind="stable")]
            found[line, : len(places)] = ids[line, places]
        return found

    def _histories(
        self, sent: list[Events | None], users: list[int], moments: list[int]
    ) -> tuple[HistoryBatch, list[bool]]:
        """Each line's history: sent with the request, else stored; and which known users have none."""
        wanted = {
            user for user, events in zip(users, sent, strict=True) if events is None and user != contract.ANONYMOUS_USER
        }
        stored = self._users.get(sorted(wanted)) if wanted else {}
        length = self._packer.spec.history_length
        found = [events if events is not None else stored.get(user) for user, events in zip(users, sent, strict=True)]
        cut = [
            None if events is None else events.before(now, length) for events, now in zip(found, moments, strict=True)
        ]
        cold = [
            user != contract.ANONYMOUS_USER and (events is None or not len(events.item_ids))
            for user, events in zip(users, cut, strict=True)
        ]
        return HistoryBatch.of(cut, length), cold


def _side_by_side(arrays: list[NDArray[Any] | None], requests: list[Request], fill: float, dtype: type) -> NDArray[Any]:
    """[S]: all lines' values one after the other, each filled up to its request's bucket."""
    if len(requests) == 1 and arrays[0] is not None and arrays[0].shape[1] == requests[0].bucket:
        # A copy of its own, which may be written to (see catalogue.read_only).
        return np.array(arrays[0], dtype).reshape(-1)
    flat: NDArray[Any] = np.full(sum(len(request) * request.bucket for request in requests), fill, dtype)
    start = 0
    for array, request in zip(arrays, requests, strict=True):
        end = start + len(request) * request.bucket
        if array is not None:
            flat[start:end].reshape(len(request), request.bucket)[:, : array.shape[1]] = array
        start = end
    return flat
