"""Step 3 of the ensemble: scores become the best K after the scenario's rules."""

from trirank_backend.stages import Rerank
from trirank_backend.triton import Stage, release_of


class TritonPythonModel:
    def initialize(self, args):
        self.stage = Stage(args, Rerank.load(release_of(args)))

    def execute(self, requests):
        return self.stage.execute(requests)
