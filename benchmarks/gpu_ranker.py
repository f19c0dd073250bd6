"""The ranker on a GPU, inside Triton's Python backend: PyTorch with a CUDA graph for every shape, so that a batch is
one launch. What gpu.py puts in the place of a release's engine, where the server has no TensorRT.

Weights: of a training run, or, for a larger ranker than the demo's, drawn by chance, which costs the same time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trirank import contract
from trirank_backend.features import FeatureSpec
from trirank_build.models.checkpoint import load_checkpoint, load_weights
from trirank_build.models.family import make_ranker
from trirank_build.recipe import ModelRecipe, load_recipe

BATCHES = (1, 2, 4, 8, 16, 32)
LARGE = {"dim": 128, "heads": 4, "ffn": 256, "encoder_blocks": 3, "cross_blocks": 1}
MODEL = '''"""Step 2 on a GPU, by PyTorch."""
import json
from pathlib import Path

from gpu_ranker import TorchRanker
from trirank_backend.scoring import score_batch
from trirank_backend.triton import Stage


class TritonPythonModel:
    def initialize(self, args):
        told = json.loads((Path(args["model_repository"]) / args["model_version"] / "gpu.json").read_text())
        ranker = TorchRanker(Path(told["run"]), told["large"], told["half"])
        run = lambda requests, deadlines: [{"scores": one} for one in score_batch(ranker, requests)]
        self.stage = Stage(args, run)

    def execute(self, requests):
        return self.stage.execute(requests)
'''


class TorchRanker:
    """Scores [B, N, T] of the ranker's tensors; B is filled up to the next of BATCHES.

    Args:
        run: a training run's folder.
        large: LARGE with weights of chance, instead of the run's.
        half: FP16, but for norms and softmax, which PyTorch adds up in FP32.
    """

    def __init__(self, run: Path, large: bool, half: bool, device: str = "cuda") -> None:
        spec = FeatureSpec.load(run / "features" / "features.json")
        recipe = load_recipe(str(run / "recipe.toml")).model
        torch.manual_seed(0)
        if large:
            self.module = make_ranker(spec, ModelRecipe.model_validate(LARGE))
        else:
            self.module = make_ranker(spec, recipe)
            tensors, _ = load_checkpoint(run / "best.safetensors")
            load_weights(self.module, tensors, run / "best.safetensors")
        self._device, self._dtype = device, torch.float16 if half else torch.float32
        self.module.eval().to(device=device, dtype=self._dtype)
        self._graphs: dict[tuple[int, int], tuple[dict[str, Any], Any, Any]] = {}
        self._specs = contract.ranker_inputs(spec.shape)
        if device == "cuda":
            for bucket in contract.BUCKETS:
                for batch in BATCHES:
                    self._graphs[batch, bucket] = self._capture(batch, bucket)

    def __call__(self, tensors: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        rows, bucket = tensors["candidates"].shape[:2]
        if self._device != "cuda":
            with torch.inference_mode():
                given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
                return self.module(**given).float().numpy()
        batch = next(batch for batch in BATCHES if batch >= rows)
        held, graph, scores = self._graphs[batch, bucket]
        for name, (pinned, place) in held.items():
            pinned[:rows] = torch.from_numpy(np.ascontiguousarray(tensors[name]))
            place.copy_(pinned, non_blocking=True)
        graph.replay()
        return scores[:rows].float().cpu().numpy()

    def _capture(self, batch: int, bucket: int) -> tuple[dict[str, Any], Any, Any]:
        held, places = {}, {}
        for spec in self._specs:
            shape = (batch, *(bucket if axis < 0 else axis for axis in spec.shape))
            dtype = self._dtype if spec.dtype == "FP32" else torch.int32
            places[spec.name] = torch.zeros(shape, dtype=dtype, device="cuda")
            held[spec.name] = (torch.zeros(shape, dtype=dtype).pin_memory(), places[spec.name])
        with torch.inference_mode():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.module(**places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                scores = self.module(**places)
        return held, graph, scores
