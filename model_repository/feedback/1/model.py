"""What users did: checked, stored, and seen by their next request."""

from trirank_backend.feedback import Feedback
from trirank_backend.triton import Stage


class TritonPythonModel:
    def initialize(self, args):
        self.feedback = Feedback.load()
        self.stage = Stage(args, self.feedback)

    def execute(self, requests):
        return self.stage.execute(requests)

    def finalize(self):
        self.feedback.close()
