"""Step 2 of the ensemble, runtime ``python``: ONNX Runtime scores the packed tensors."""

from pathlib import Path

from trirank_backend.scoring import OnnxRanker
from trirank_backend.triton import Stage, score_batches


class TritonPythonModel:
    def initialize(self, args):
        version = Path(args["model_repository"], args["model_version"])
        ranker = OnnxRanker(version / "model.onnx")
        self.stage = Stage(args, lambda requests: score_batches(ranker, requests))

    def execute(self, requests):
        return self.stage.execute(requests)
