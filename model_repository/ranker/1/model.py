"""Step 2 of the ensemble, runtime ``python``: the release's engine scores the packed tensors."""

import json
from pathlib import Path

from trirank_backend.scoring import load_ranker
from trirank_backend.triton import Stage, score_batches


class TritonPythonModel:
    def initialize(self, args):
        version = Path(args["model_repository"], args["model_version"])
        engine = json.loads(args["model_config"])["parameters"]["engine"]["string_value"]
        ranker = load_ranker(version / "model.onnx", engine)
        self.stage = Stage(args, lambda requests: score_batches(ranker, requests))

    def execute(self, requests):
        return self.stage.execute(requests)
