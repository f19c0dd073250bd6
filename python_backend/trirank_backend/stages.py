"""The steps of the ensemble as plain callables over lists of requests, free of Triton.

A request is a dict of arrays with a leading batch axis, as Triton hands them over: usually of length 1, but a
KServe client may send several rows at once. A step answers a list as long as its input, in which a request that
breaks the contract is an InvalidInput and every other one is answered all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Status

from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import InvalidInput, InvalidRelease
from trirank_backend.features import FeatureSpec, Packer, RequestBatch
from trirank_backend.histories import Events, HistoryBatch, SqliteUserStore, UserStore
from trirank_backend.policies import load_policies
from trirank_backend.reranking import PolicyTable, rerank
from trirank_backend.text import TextEncoder, query_trigrams

Tensors = dict[str, NDArray[Any]]
FEATURES = "features"
"""The folder of a release that holds what preprocess and rerank read."""


def load_features(directory: Path) -> tuple[FeatureSpec, Catalogue]:
    """Specification and catalogue of a release's ``features`` folder."""
    return FeatureSpec.load(directory / "features.json"), Catalogue.load(directory / "catalogue")


def load_packer(directory: Path) -> tuple[Packer, TextEncoder]:
    """What turns requests into tensors, from a ``features`` folder.

    Raises:
        InvalidRelease: a file is missing or damaged.
    """
    spec, catalogue = load_features(directory)
    try:
        idf = np.load(directory / "token_idf.npy")
    except (OSError, ValueError) as error:
        raise InvalidRelease(f"{directory / 'token_idf.npy'} cannot be read ({error}); assemble again") from error
    return Packer(spec, catalogue, idf), TextEncoder.load(directory / "tokenizer.json", spec.tables["token"][0])


def check_contract(release: Path) -> None:
    """Refuse a release of another contract: code and artefacts must not drift apart unseen.

    Raises:
        InvalidRelease: the manifest is missing, or of another contract.
    """
    try:
        version = json.loads((release / "manifest.json").read_text())["contract"]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRelease(f"{release / 'manifest.json'} cannot be read ({error}); assemble again") from error
    if version != contract.CONTRACT_VERSION:
        raise InvalidRelease(
            f"release {release} is of contract {version}, this backend speaks {contract.CONTRACT_VERSION}; "
            "assemble it again, or install the version that assembled it"
        )


class Preprocess:
    """Ids and text → packed tensors."""

    def __init__(
        self,
        packer: Packer,
        text: TextEncoder,
        users: UserStore,
        scenarios: frozenset[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._packer = packer
        self._text = text
        self._users = users
        self._scenarios = scenarios
        self._clock = clock

    @classmethod
    def load(cls, release: Path) -> Preprocess:
        """Open a release's files."""
        check_contract(release)
        directory = release / FEATURES
        packer, text = load_packer(directory)
        scenarios = frozenset(load_policies(directory / "policies.json", packer.spec.tasks))
        return cls(packer, text, SqliteUserStore(directory / "users.sqlite"), scenarios)

    def close(self) -> None:
        """Let go of the user store."""
        self._users.close()

    def __call__(self, requests: list[Tensors]) -> list[Tensors | InvalidInput]:
        """Tensors of the ranker, ``items`` and ``preprocess_status`` of each request."""
        answers: list[Tensors | InvalidInput | None] = []
        good: list[_Parsed] = []
        for request in requests:
            try:
                good.append(_Parsed(request, self._scenarios))
                answers.append(None)
            except InvalidInput as error:  # noqa: PERF203  # one bad request must not spoil the batch
                answers.append(error)
        if good:
            packed = iter(self._pack(good))
            answers = [next(packed) if answer is None else answer for answer in answers]
        return answers  # type: ignore[return-value]  # every None was filled

    def _pack(self, requests: list[_Parsed]) -> list[Tensors]:
        spec, catalogue = self._packer.spec, self._packer.catalogue
        width = max(request.bucket for request in requests)
        sizes = [len(request.item_ids) for request in requests]
        ids = _stack([request.item_ids for request in requests], width, contract.PAD_ITEM_ID)
        rows = catalogue.rows(ids)
        sent = ids != contract.PAD_ITEM_ID
        repeats = _repeats(ids, sent)
        unknown = sent & ~repeats & (rows < 0)
        rows = np.where(repeats, -1, rows).astype(np.int32)

        now = int(self._clock())
        timestamps = np.concatenate([_or_full(r.timestamps, len(r.item_ids), now) for r in requests])
        queries = [text for request in requests for text in request.queries]
        users = np.concatenate([request.user_ids for request in requests])
        history, cold = self._histories(requests, users, timestamps)
        batch = RequestBatch(
            rows=rows,
            retrieval_scores=_stack(
                [_or_full(r.retrieval_scores, r.item_ids.shape, np.nan) for r in requests], width, np.nan
            ).astype(np.float32, copy=False),
            query=self._text.encode(queries, spec.query_length),
            query_trigrams=query_trigrams(queries),
            timestamps=timestamps,
            anonymous=users == contract.ANONYMOUS_USER,
            history_rows=catalogue.rows(history.item_ids),
            history_behaviours=history.behaviours,
            history_timestamps=history.timestamps,
        )
        packed = self._packer.pack(batch)
        status = np.zeros((len(ids), 4), np.int32)
        status[:, 1] = unknown.sum(1)
        status[:, 2] = repeats.sum(1)
        status[:, 0] = (
            cold * Status.COLD_USER.value
            + (status[:, 1] > 0) * Status.UNKNOWN_ITEMS_DROPPED.value
            + (status[:, 2] > 0) * Status.DUPLICATES_DROPPED.value
        )
        tensors: Tensors = {
            **packed.tensors(),
            contract.ITEMS.name: np.stack([rows, packed.signals], axis=-1),
            contract.PREPROCESS_STATUS.name: status,
        }
        per_item = ("candidates", "dense", contract.ITEMS.name)
        starts = np.cumsum([0, *sizes])
        return [
            {
                name: np.ascontiguousarray(array[a:b, : request.bucket] if name in per_item else array[a:b])
                for name, array in tensors.items()
            }
            for request, a, b in zip(requests, starts[:-1], starts[1:], strict=True)
        ]

    def _histories(
        self, requests: list[_Parsed], users: NDArray[np.int64], timestamps: NDArray[np.int64]
    ) -> tuple[HistoryBatch, NDArray[np.bool_]]:
        """Each row's history: sent with the request, else stored; and which known users have none."""
        sent = [events for request in requests for events in request.histories]
        wanted = sorted(
            {
                user
                for user, events in zip(users.tolist(), sent, strict=True)
                if events is None and user != contract.ANONYMOUS_USER
            }
        )
        stored = self._users.get(wanted) if wanted else {}
        length = self._packer.spec.history_length
        rows = [
            events if events is not None else stored.get(user)
            for user, events in zip(users.tolist(), sent, strict=True)
        ]
        cut = [
            None if events is None else events.before(now, length)
            for events, now in zip(rows, timestamps.tolist(), strict=True)
        ]
        empty = np.array([events is None or not len(events.item_ids) for events in cut])
        return HistoryBatch.of(cut, length), empty & (users != contract.ANONYMOUS_USER)


class _Parsed:
    """One request, checked. Raises InvalidInput for what the contract does not allow."""

    def __init__(self, request: Tensors, scenarios: frozenset[str]) -> None:
        self.item_ids: NDArray[np.int64] = request["ITEM_IDS"]
        size, sent = self.item_ids.shape
        try:
            self.bucket = contract.bucket_for(sent)
        except ValueError as error:
            raise InvalidInput(f"ITEM_IDS has {error}") from None
        if (self.item_ids == contract.PAD_ITEM_ID).all(1).any():
            raise InvalidInput(
                f"ITEM_IDS has 0 candidates (only {contract.PAD_ITEM_ID}, which is padding); send at least one"
            )
        self.user_ids: NDArray[np.int64] = request["USER_ID"][:, 0]
        _top_k(request["TOP_K"])
        _scenarios(request["SCENARIO"], scenarios)
        self.queries = _queries(request.get("QUERY"), size)
        self.timestamps: NDArray[np.int64] | None = None
        if (timestamps := request.get("TIMESTAMP")) is not None:
            self.timestamps = timestamps[:, 0]
            if (timestamps < 0).any():
                raise InvalidInput(f"TIMESTAMP is {timestamps.min()}; it is seconds since 1970, 0 or more")
        self.retrieval_scores: NDArray[np.float32] | None = request.get("RETRIEVAL_SCORES")
        if (scores := self.retrieval_scores) is not None:
            if scores.shape != self.item_ids.shape:
                raise InvalidInput(
                    f"RETRIEVAL_SCORES has shape {list(scores.shape)}, ITEM_IDS {list(self.item_ids.shape)}; "
                    "send one score a candidate, padded alike"
                )
            finite = np.isfinite(scores)
            if not finite.all():
                row, at = np.argwhere(~finite)[0]
                raise InvalidInput(
                    f"RETRIEVAL_SCORES[{row}, {at}] is {scores[row, at]}; send finite numbers, or leave them out"
                )
        self.histories = _histories(request, size)


def _top_k(values: NDArray[np.int32]) -> None:
    if values.min() < 1 or values.max() > contract.MAX_TOP_K:
        wrong = values[(values < 1) | (values > contract.MAX_TOP_K)][0]
        raise InvalidInput(f"TOP_K is {wrong}; it goes from 1 to {contract.MAX_TOP_K}")


def _scenarios(values: NDArray[Any], known: frozenset[str]) -> None:
    for value in values[:, 0]:
        name = value.decode("utf-8", "replace")
        if name not in known:
            raise InvalidInput(f"SCENARIO is {name[:64]!r}; this release has {', '.join(sorted(known))}")


def _queries(values: NDArray[Any] | None, size: int) -> list[str]:
    if values is None:
        return [""] * size
    texts = []
    for value in values[:, 0]:
        if len(value) > contract.MAX_QUERY_BYTES:
            raise InvalidInput(f"QUERY has {len(value)} bytes; the limit is {contract.MAX_QUERY_BYTES}")
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"QUERY is not UTF-8: byte {value[error.start]:#04x} at {error.start}; encode it as UTF-8"
            ) from None
    return texts


def _histories(request: Tensors, size: int) -> list[Events | None]:
    ids = request.get("HISTORY_IDS")
    behaviours, timestamps = request.get("HISTORY_BEHAVIOURS"), request.get("HISTORY_TIMESTAMPS")
    if ids is None:
        if behaviours is not None or timestamps is not None:
            raise InvalidInput("HISTORY_BEHAVIOURS and HISTORY_TIMESTAMPS need HISTORY_IDS beside them")
        return [None] * size
    if ids.shape[1] > contract.MAX_HISTORY:
        raise InvalidInput(f"HISTORY_IDS has {ids.shape[1]} events; the limit is {contract.MAX_HISTORY}")
    for name, array in (("HISTORY_BEHAVIOURS", behaviours), ("HISTORY_TIMESTAMPS", timestamps)):
        if array is not None and array.shape != ids.shape:
            raise InvalidInput(f"{name} has shape {list(array.shape)}, HISTORY_IDS {list(ids.shape)}")
    real = ids != contract.PAD_ITEM_ID
    if behaviours is None:
        behaviours = np.full(ids.shape, contract.Behaviour.CLICK, np.int32)
    codes = [code.value for code in contract.Behaviour]
    if (wrong := real & ~np.isin(behaviours, codes)).any():
        raise InvalidInput(f"HISTORY_BEHAVIOURS holds {behaviours[wrong][0]}; codes are {codes}")
    if timestamps is None:
        timestamps = np.zeros(ids.shape, np.int64)
    elif (timestamps < 0).any():
        raise InvalidInput(f"HISTORY_TIMESTAMPS holds {timestamps.min()}; seconds since 1970, 0 or more")
    histories: list[Events | None] = []
    for row, keep in enumerate(real):
        order = np.argsort(timestamps[row, keep], kind="stable")
        histories.append(Events(ids[row, keep][order], behaviours[row, keep][order], timestamps[row, keep][order]))
    return histories


class Rerank:
    """Scores → the best K."""

    def __init__(self, catalogue: Catalogue, table: PolicyTable) -> None:
        self._catalogue = catalogue
        self._table = table

    @classmethod
    def load(cls, release: Path) -> Rerank:
        """Open a release's files."""
        check_contract(release)
        spec, catalogue = load_features(release / FEATURES)
        return cls(
            catalogue,
            PolicyTable(load_policies(release / FEATURES / "policies.json", spec.tasks), spec.tasks),
        )

    def __call__(self, requests: list[Tensors]) -> list[Tensors]:
        """RANKED_IDS, SCORES, REASONS, STATUS of each request."""
        width = max(request["items"].shape[1] for request in requests)
        items = _stack([request["items"] for request in requests], width, contract.PAD_ITEM_ID)
        rows, signals = items[..., 0], np.where(items[..., 0] < 0, 0, items[..., 1])
        top_k = np.concatenate([request["TOP_K"][:, 0] for request in requests])
        policy = np.array([self._table.index[s.decode()] for r in requests for s in r["SCENARIO"][:, 0]])
        ranked = rerank(
            scores=_stack([request["scores"] for request in requests], width, 0),
            signals=signals,
            valid=rows >= 0,
            products=self._catalogue.products[rows],
            policy=policy,
            table=self._table,
            top_k=int(top_k.max()),
        )
        found = np.where(ranked.order < 0, -1, rows[np.arange(len(rows))[:, None], ranked.order])
        ids = self._catalogue.item_ids(found)
        status = np.concatenate([request[contract.PREPROCESS_STATUS.name] for request in requests])
        status[:, 3] = ranked.filtered
        status[:, 0] |= (ranked.filtered > 0) * Status.ITEMS_FILTERED.value
        status[:, 0] |= ((ranked.order >= 0).sum(1) < top_k) * Status.FEWER_THAN_TOP_K.value
        answers = []
        start = 0
        for request in requests:
            part = slice(start, start := start + len(request["TOP_K"]))
            asked = top_k[part]
            longest = int(asked.max())
            beyond = np.arange(longest)[None, :] >= asked[:, None]
            answers.append(
                {
                    "RANKED_IDS": _cut(ids[part], longest, beyond, contract.PAD_ITEM_ID),
                    "SCORES": _cut(ranked.scores[part], longest, beyond, 0),
                    "REASONS": _cut(ranked.reasons[part], longest, beyond, 0),
                    "STATUS": status[part],
                }
            )
        return answers


def _stack(arrays: list[NDArray[Any]], width: int, fill: float) -> NDArray[Any]:
    """Concatenate along the batch, padding axis 1 to ``width``."""
    if all(array.shape[1] == width for array in arrays):
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    stacked = np.full((sum(len(array) for array in arrays), width, *arrays[0].shape[2:]), fill, arrays[0].dtype)
    start = 0
    for array in arrays:
        stacked[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return stacked


def _or_full(array: NDArray[Any] | None, shape: Any, fill: float) -> NDArray[Any]:
    return np.full(shape, fill) if array is None else array


def _cut(array: NDArray[Any], length: int, beyond: NDArray[np.bool_], fill: int) -> NDArray[Any]:
    """[B, length]: cut or padded, and filled where a row asked for less."""
    wide = np.full((len(array), length), fill, array.dtype)
    wide[:, : array.shape[1]] = array[:, :length]
    wide[beyond] = fill
    return wide


def _repeats(ids: NDArray[np.int64], sent: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[B, N]: whether the same id stands earlier in the row."""
    order = np.argsort(ids, axis=1, kind="stable")
    request = np.arange(len(ids))[:, None]
    ordered = ids[request, order]
    repeats = np.zeros(ids.shape, bool)
    repeats[request, order[:, 1:]] = ordered[:, 1:] == ordered[:, :-1]
    return repeats & sent
