"""Step 3 of the ensemble: scores become the best K after the scenario's rules."""

from trirank_backend.stages import Rerank
from trirank_backend.triton import Stage, release_of, report_quality


class TritonPythonModel:
    def initialize(self, args):
        release = release_of(args)
        self.stage = Stage(args, Rerank.load(release))
        self.quality = report_quality(release)

    def execute(self, requests):
        return self.stage.execute(requests)
