"""Step 3 of the ensemble: scores become the best K after the scenario's policy."""

from trirank_backend.rerank import Rerank
from trirank_backend.triton import Stage, each, release_of, report_quality


class TritonPythonModel:
    def initialize(self, args):
        release = release_of(args)
        self.stage = Stage(args, each(Rerank.load(release).tensors))
        self.quality = report_quality(release)

    def execute(self, requests):
        return self.stage.execute(requests)
