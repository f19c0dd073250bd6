"""Candidates among all items of a release: the user's state by a graph, the items nearest to it by an index.

A release has these where it was assembled with them (`trirank assemble --index`): a service that has no retrieval of
its own, or wants the ranker's view beside it, opens them in its own process. Items are compared as the ranker's
affinity compares them, so what is found here is what the ranker likes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from trirank.contract import PAD_ITEM_ID, Behaviour

from trirank_backend.catalogue import NO_ROW
from trirank_backend.errors import InvalidRelease
from trirank_backend.release import FEATURES, check_contract, load_packer

_KINDS = sorted(behaviour.value for behaviour in Behaviour)
FOLDER, STATE, INDEX, FACTS = "retrieval", "state.onnx", "items.faiss", "index.json"


class Found(NamedTuple):
    """Attributes:
    item_ids: [B, K] int64, best first; PAD_ITEM_ID: there are no more.
    scores: [B, K] float32 affinities, to be sent along as retrieval scores; NaN where there is no item.
    """

    item_ids: NDArray[np.int64]
    scores: NDArray[np.float32]


class CandidateSource:
    """Of one release; safe to be called by several threads.

    Args:
        release: a release's folder.
        threads: that one call takes.

    Raises:
        InvalidRelease: the release has no index, or it is damaged; or faiss is not installed.
    """

    def __init__(self, release: Path, threads: int = 1) -> None:
        try:
            import faiss
        except ImportError as error:
            raise InvalidRelease(f"candidates need faiss ({error}); pip install 'trirank[retrieval]'") from error
        mapped, self._faiss, self._threads = faiss.IO_FLAG_MMAP_IFC, faiss, threads
        check_contract(release)
        folder = release / FOLDER
        if not (folder / FACTS).is_file():
            raise InvalidRelease(f"{release} has no index of its items; assemble it again with --index")
        try:
            self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            graph = str((folder / STATE).resolve())
            self._state = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            self._index = faiss.read_index(str(folder / INDEX), mapped)
        except Exception as error:  # neither library's exceptions share a public base
            raise InvalidRelease(f"the index of {release} cannot be read ({error}); assemble again") from error
        self._packer, _ = load_packer(release / FEATURES)
        self._items = self._packer.catalogue
        if self._index.ntotal != len(self._items):
            raise InvalidRelease(
                f"the index of {release} has {self._index.ntotal:,} items, its catalogue {len(self._items):,}; "
                "assemble again"
            )
        self._search = search_of(self.facts)

    def find(
        self, histories: list[NDArray[np.int64]], k: int, behaviours: list[NDArray[np.int32]] | None = None,
        exclude_seen: bool = False,
    ) -> Found:  # fmt: skip
        """The best ``k`` items of all for each user.

        Args:
            histories: [B] item ids of what each user did, newest last; ids that the catalogue lacks are left out.
            behaviours: [B] contract.Behaviour of each; None: clicks.
            exclude_seen: leave out what is in the history.

        Raises:
            ValueError: ``k`` is none of 1 to the number of items, lists differ in length, or a behaviour is none.
        """
        if not 1 <= k <= len(self._items):
            raise ValueError(f"k = {k}; it is 1 to {len(self._items):,}, the number of items")
        if behaviours is not None and len(behaviours) != len(histories):
            raise ValueError(f"{len(histories)} histories and {len(behaviours)} lists of behaviours; each has one")
        length = self._packer.spec.history_length
        rows, kinds = np.full((len(histories), length), NO_ROW, np.int32), np.zeros((len(histories), length), np.int32)
        seen = []
        for at, ids in enumerate(histories):
            own = self._items.rows(np.asarray(ids, np.int64))
            clicks = np.full(len(own), Behaviour.CLICK.value, np.int32)
            kind = clicks if behaviours is None else np.asarray(behaviours[at], np.int32)
            if (wrong := kind[~np.isin(kind, _KINDS)]).size:
                raise ValueError(f"user {at} has a behaviour {wrong[0]}; they are {_KINDS[0]} to {_KINDS[-1]}")
            if len(kind) != len(own):
                raise ValueError(f"user {at} has {len(own)} items and {len(kind)} behaviours; each item has one")
            kept = own != NO_ROW
            newest, its = own[kept][-length:], kind[kept][-length:]
            rows[at, length - len(newest) :], kinds[at, length - len(newest) :] = newest, its
            seen.append(own[kept])
        (states,) = self._state.run(["state"], {"history": self._packer.history(rows, kinds)})
        more = max((len(set(one.tolist())) for one in seen), default=0) if exclude_seen else 0
        self._faiss.omp_set_num_threads(self._threads)  # of this thread's calls
        scores, found = self._index.search(states, min(k + more, len(self._items)), params=self._search)
        if exclude_seen:
            for at, one in enumerate(seen):
                gone = np.isin(found[at], one)
                order = np.argsort(gone, kind="stable")
                found[at], scores[at] = np.where(gone, -1, found[at])[order], scores[at][order]
        found, scores = found[:, :k], scores[:, :k]
        there = found >= 0
        ids = np.where(there, self._items.ids[np.maximum(found, 0)], PAD_ITEM_ID)
        return Found(ids, np.where(there, scores, np.nan).astype(np.float32))


def search_of(facts: dict[str, Any]) -> Any:
    """How an index is searched; None: it is exact and there is nothing to choose."""
    import faiss

    if not facts["probes"]:
        return None
    found = faiss.SearchParametersIVF()
    found.nprobe = int(facts["probes"])
    return found
