"""The three steps one after the other in one process: what the pipeline ``single`` serves."""

from __future__ import annotations

import math
import time
from pathlib import Path

from trirank import contract

from trirank_backend.errors import BackendError, StageFailed, TooLate
from trirank_backend.preprocess import Prepared, Preprocess
from trirank_backend.requests import Tensors
from trirank_backend.rerank import Rerank
from trirank_backend.scoring import Ranker, load_ranker

GRAPH = "model.onnx"


class Pipeline:
    """Preprocess, ranker and rerank.

    Attributes:
        seconds: stage → seconds that it has worked so far.
    """

    def __init__(self, preprocess: Preprocess, ranker: Ranker, rerank: Rerank) -> None:
        self._preprocess, self._ranker, self._rerank = preprocess, ranker, rerank
        self.seconds = dict.fromkeys(contract.STAGES, 0.0)

    @classmethod
    def load(cls, release: Path, graph: Path, engine: str) -> Pipeline:
        """Open a release's files.

        Args:
            graph: the ranker's ONNX file; engine: one of scoring.ENGINES.
        """
        return cls(Preprocess.load(release), load_ranker(graph, engine), Rerank.load(release))

    def close(self) -> None:
        """Let go of the user store."""
        self._preprocess.close()

    def __call__(self, requests: list[Tensors], deadlines: list[float] | None = None) -> list[Tensors | BackendError]:
        """RANKED_IDS, SCORES, REASONS and STATUS of each request, or why there are none.

        Args:
            deadlines: moments in µs since 1970 after which a request is not worked on any more. The ranker takes the
                requests one by one, so that it is asked before each.
        """
        started = time.perf_counter()
        prepared = self._preprocess(requests)
        answers: list[Tensors | BackendError] = []
        self._count(contract.PREPROCESS, started)
        for one, deadline in zip(prepared, deadlines or [math.inf] * len(requests), strict=True):
            if not isinstance(one, Prepared):
                answers.append(one)
            elif deadline < time.time() * 1e6:
                answers.append(TooLate(f"{contract.RANKER} did not work on it: {contract.TOO_LATE}"))
            else:
                answers.append(self._rank(one))
        return answers

    def _rank(self, prepared: Prepared) -> Tensors | BackendError:
        try:
            started = time.perf_counter()
            scores = self._ranker(prepared.ranker)
            started = self._count(contract.RANKER, started)
            answer = self._rerank(scores, prepared.handover)
            self._count(contract.RERANK, started)
            return answer
        except BackendError as error:
            return error
        except (
            Exception
        ) as error:  # of an engine, whose exceptions share no base; the others' requests are not at fault
            return StageFailed(f"{contract.RANKER}: {error}")

    def _count(self, stage: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[stage] += now - started
        return now
