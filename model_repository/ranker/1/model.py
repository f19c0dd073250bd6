"""Step 2 of the ensemble, runtime ``python``: the release's engine scores the packed tensors."""

from trirank_backend.scoring import GuardedRanker
from trirank_backend.triton import Stage, graph_of, release_of


class TritonPythonModel:
    def initialize(self, args):
        self.stage = Stage(args, GuardedRanker.load(release_of(args), *graph_of(args)))

    def execute(self, requests):
        return self.stage.execute(requests)
