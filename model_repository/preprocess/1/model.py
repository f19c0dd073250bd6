"""Step 1 of the ensemble: ids and text become the ranker's tensors."""

from trirank_backend.preprocess import Preprocess
from trirank_backend.triton import Stage, release_of


class TritonPythonModel:
    def initialize(self, args):
        self.preprocess = Preprocess.load(release_of(args))
        self.stage = Stage(args, self.preprocess.tensors)

    def execute(self, requests):
        return self.stage.execute(requests)

    def finalize(self):
        self.preprocess.close()
