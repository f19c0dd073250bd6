"""Step 1: ids, a user and a query become the ranker's tensors."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Signal, Status

from trirank_backend.compiled import compile_all
from trirank_backend.errors import InvalidInput
from trirank_backend.features import Lines, Packer
from trirank_backend.handover import HEADER, Handover
from trirank_backend.histories import Events, HistoryBatch
from trirank_backend.lookup_kernels import drop_repeats
from trirank_backend.policies import Policy, query_key
from trirank_backend.release import FEATURES, check_contract, load_packer
from trirank_backend.request_log import TENSORS, RequestLog, Settings, packed_text
from trirank_backend.requests import Filters, Request, Tensors
from trirank_backend.rules import load_rules
from trirank_backend.stores.events import Past
from trirank_backend.stores.guarded import GuardedUsers
from trirank_backend.stores.store import READ_TIMEOUT_S, open_store
from trirank_backend.surroundings import REQUESTS_VARIABLE, USERS_VARIABLE
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
        users: where pasts come from; None: nowhere, all users are new.
        policies: scenario → policy, in the order in which handovers count them.
        regions: names of the regions that FILTERS may ask for.
        log: where requests are written to; None: nowhere.
    """

    def __init__(
        self,
        packer: Packer,
        text: TextEncoder,
        users: GuardedUsers | None,
        policies: Mapping[str, Policy],
        regions: Sequence[str] = (),
        log: RequestLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._packer = packer
        self._text = text
        self._users = users
        self._policies = {name: place for place, name in enumerate(policies)}
        of_policies = list(policies.values())
        self._keeping, self._scored, self._drawing, self._querying = (
            frozenset(place for place, policy in enumerate(of_policies) if getattr(policy, what))
            for what in ("keep_unknown", "asks_retrieval", "asks_seed", "asks_query")
        )
        self._regions = {name: number for number, name in enumerate(regions, 1)}
        self._log = log
        self._scenarios = list(policies)
        self._clock = clock

    @classmethod
    def load(cls, release: Path) -> Preprocess:
        """Open a release's files."""
        check_contract(release)
        compile_all()
        directory = release / FEATURES
        packer, text = load_packer(directory)
        rules, policies = load_rules(directory)
        address = os.environ.get(USERS_VARIABLE)
        users = GuardedUsers(open_store(address, READ_TIMEOUT_S)) if address else None
        wanted = os.environ.get(REQUESTS_VARIABLE)
        log = RequestLog(Settings.read(wanted), release.resolve().name) if wanted else None
        return cls(packer, text, users, policies, rules.attributes.names["region"], log)

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """What is asked meanwhile is nobody's request, and not written down."""
        log, self._log = self._log, None
        try:
            yield
        finally:
            self._log = log

    def close(self) -> None:
        """Let go of the user store, and write down what is to be logged."""
        if self._users is not None:
            self._users.close()
        if self._log is not None:
            self._log.close()

    def __call__(self, requests: list[Tensors]) -> list[Prepared | InvalidInput]:
        """Each request, prepared."""
        answers: list[Prepared | InvalidInput | None] = []
        good: list[Request] = []
        for tensors in requests:
            try:
                request = Request(tensors, self._policies)
                self._check_regions(request.filters)
                good.append(request)
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

        # The end of this second: what was told in it has happened, and all that reads events asks for those before.
        now = int(self._clock()) + 1
        moments = [moment for request in requests for moment in request.timestamps or [now] * len(request)]
        users = [user for request in requests for user in request.users]
        queries = [query for request in requests for query in request.queries]
        scores = _side_by_side([r.retrieval_scores for r in requests], requests, np.nan, np.float32)
        sent = [events for request in requests for events in request.histories]
        pasts, unanswered = self._pasts(sent, users)
        length = spec.history_length
        history = HistoryBatch.of(
            [past and past.events.before(now, length) for past, now in zip(pasts, moments, strict=True)], length
        )
        packed = self._packer.pack(
            Lines(
                starts=starts,
                rows=rows,
                scores=scores,
                query=self._text.encode(queries, spec.query_length),
                words=query_trigrams(queries),
                timestamps=np.array(moments, np.int64),
                anonymous=np.array([user == contract.ANONYMOUS_USER for user in users]),
                history_rows=self._packer.catalogue.rows(history.item_ids),
                history_behaviours=history.behaviours,
                history_timestamps=history.timestamps,
                understood=self._text.understood(queries),
            )
        )
        for line, past in enumerate(pasts):
            if past is not None and len(past.disliked):
                places = slice(starts[line], starts[line + 1])
                packed.signals[places][np.isin(ids[places], past.disliked)] |= Signal.DISLIKED.value
        policies = [policy for request in requests for policy in request.policies]
        header = np.zeros(len(widths), HEADER)
        header["unknown"], header["repeats"] = counts.T
        header["top_k"] = [top_k for request in requests for top_k in request.top_k]
        header["policy"], header["moment"] = policies, moments
        header["trace"] = [trace for request in requests for trace in request.trace]
        header["packed"] = [request.packed for request in requests for _ in range(len(request))]
        header["min_price"], header["max_price"] = -np.inf, np.inf
        known = history.behaviours[:, -1] != 0
        for line, (policy, (unknown, repeats)) in enumerate(zip(policies, counts.tolist(), strict=True)):
            kept = policy in self._keeping
            header[line]["status"] = (
                (users[line] != contract.ANONYMOUS_USER and not known[line] and Status.COLD_USER.value)
                | (unknown > 0 and not kept and Status.UNKNOWN_ITEMS_DROPPED.value)
                | (repeats > 0 and Status.DUPLICATES_DROPPED.value)
                | (sent[line] is None and users[line] in unanswered and Status.DEGRADED.value)
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
            own = ids[of_places].reshape(shape)
            handover = Handover(
                header=header[of_lines],
                rows=rows[of_places].reshape(shape),
                signals=packed.signals[of_places].reshape(shape),
                scores=scores[of_places].reshape(shape)[:, : shape[1] if self._scored & set(request.policies) else 0],
                unknown=self._unknown(request, own, counts[of_lines, 0], pasts[of_lines]),
            )
            self._complete(handover, request, own)
            prepared.append(Prepared(ranker, handover))
            if self._log is not None and self._log.wants():
                self._write_down(request, of_lines, moments, history, ranker)
        return prepared

    def _write_down(
        self, request: Request, lines: slice, moments: list[int], history: HistoryBatch, ranker: Tensors
    ) -> None:
        """Log a request, a line each."""
        assert self._log is not None
        for row, line in enumerate(range(lines.start, lines.stop)):
            there = history.behaviours[line] != 0
            scores = request.retrieval_scores
            said = {
                "request_id": request.request_id, "moment": moments[line], "user_id": request.users[row],
                "query": request.queries[row], "scenario": self._scenarios[request.policies[row]],
                "top_k": request.top_k[row], "sent_history": request.histories[row] is not None,
                "item_ids": request.item_ids[row].copy(),
                "retrieval_scores": None if scores is None else scores[row].copy(),
                "history": {
                    "item_ids": history.item_ids[line, there], "behaviours": history.behaviours[line, there],
                    "timestamps": history.timestamps[line, there],
                },
            }  # fmt: skip
            if self._log.settings.tensors:
                said["tensors"] = {name: packed_text(ranker[name][row]) for name in TENSORS}
            self._log.add(said)

    def _complete(self, handover: Handover, request: Request, ids: NDArray[np.int64]) -> None:
        """Fill in what few requests need.

        Args:
            ids: [R, N] candidates.
        """
        header = handover.header
        header["scored"], header["kept"] = handover.scores.shape[1] > 0, handover.unknown.shape[1]
        for line, policy in enumerate(request.policies):
            if policy in self._drawing:
                said = f"{request.users[line]} {request.queries[line]}".encode()
                header[line]["seed"] = zlib.crc32(said, zlib.crc32(ids[line])) >> 1
            if policy in self._querying:
                header[line]["query"] = query_key(request.queries[line])
            if (filters := request.filters[line]) is not None:
                header[line]["region"] = self._regions.get(filters.region, 0)
                for name in ("min_stock", "min_price", "max_price"):
                    header[line][name] = getattr(filters, name)

    def _check_regions(self, filters: list[Filters | None]) -> None:
        for each in filters:
            if each is not None and each.region and each.region not in self._regions:
                names = ", ".join(list(self._regions)[:8]) or "none: no item says where it can be had"
                raise InvalidInput(f"FILTERS: region is {each.region[:64]!r}; this catalogue has {names}")

    def _unknown(
        self, request: Request, ids: NDArray[np.int64], counts: NDArray[np.int32], pasts: list[Past | None]
    ) -> NDArray[np.int64]:
        """[R, U] what a request's policies keep though the catalogue does not know it.

        Args:
            ids: [R, N] candidates.
            counts: [R] how many the catalogue does not know.
        """
        kept = [policy in self._keeping for policy in request.policies]
        most = max((int(count) for count, keep in zip(counts, kept, strict=True) if keep), default=0)
        found = np.full((len(ids), most), contract.PAD_ITEM_ID, np.int64)
        for line in range(len(ids) if most else 0):
            if not kept[line]:
                continue
            strange = (self._packer.catalogue.rows(ids[line]) < 0) & (ids[line] != contract.PAD_ITEM_ID)
            if (past := pasts[line]) is not None and len(past.disliked):
                strange &= ~np.isin(ids[line], past.disliked)
            _, places = np.unique(np.where(strange, ids[line], contract.PAD_ITEM_ID), return_index=True)
            places = np.sort(places[strange[places]])
            if request.retrieval_scores is not None:
                scores = request.retrieval_scores[line, places]
                places = places[np.argsort(-scores, kind="stable")]
            found[line, : len(places)] = ids[line, places]
        return found

    def _pasts(self, sent: list[Events | None], users: list[int]) -> tuple[list[Past | None], set[int]]:
        """What each line's user did, as sent with the request, else as stored; what they do not want to see, as stored;
        and the users that the store did not answer for."""
        wanted = {user for user in users if user != contract.ANONYMOUS_USER}
        stored: Mapping[int, Past] | None = {}
        if wanted and self._users is not None:
            stored = self._users.get(sorted(wanted))
        found = stored or {}
        pasts = [
            found.get(user) if events is None else Past(events, found[user].disliked if user in found else _NOBODY)
            for user, events in zip(users, sent, strict=True)
        ]
        strangers = {user for user, events in zip(users, sent, strict=True) if events is None} & wanted
        return pasts, strangers if stored is None else set()


_NOBODY = np.zeros(0, np.int64)


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
