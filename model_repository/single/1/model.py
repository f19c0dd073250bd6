"""All three steps in one process: the model ``rank`` of the pipeline ``single``."""

from trirank_backend.pipeline import Pipeline
from trirank_backend.triton import Stage, StageTimes, graph_of, release_of, report_quality, stay_on_a_core


class TritonPythonModel:
    def initialize(self, args):
        stay_on_a_core(args)
        release = release_of(args)
        self.pipeline = Pipeline.load(release, *graph_of(args))
        self.pipeline.rehearse(release / "requests.json")
        self.stage = Stage(args, self.pipeline)
        self.quality = report_quality(release)
        self.times = StageTimes(release.name, args["model_instance_name"], self.pipeline.seconds)

    def execute(self, requests):
        self.times.report()
        return self.stage.execute(requests)

    def finalize(self):
        self.pipeline.close()
