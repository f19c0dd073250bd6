"""Checkpoints: safetensors with their own description; ``.pt`` only as plain weights, never as a pickle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trirank_build.artefacts import atomic_file
from trirank_build.errors import BadCheckpoint


def save_checkpoint(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write whole or not at all; ``description`` must be JSON."""
    with atomic_file(path) as scratch:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            scratch,
            metadata={"trirank": json.dumps(description)},
        )


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description (empty where the file has none, as a team's own may).

    Raises:
        BadCheckpoint: it is missing, damaged, or a pickle that would run code.
    """
    if not path.is_file():
        raise BadCheckpoint(f"{path} is no file; give a checkpoint in safetensors, or weights in .pt")
    if path.suffix in {".pt", ".pth", ".bin"}:
        return _load_torch(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("trirank", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{path} is no whole safetensors file ({error}); write it with "
            "safetensors.torch.save_file(model.state_dict(), …)"
        ) from error


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are refused below
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and others here
        raise BadCheckpoint(
            f"{path} is damaged, or holds more than tensors and is not opened since a pickle can run code; "
            "save model.state_dict(), best with safetensors"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BadCheckpoint(f"{path} holds no state_dict; save model.state_dict() rather than the model")
    return weights


def load_weights(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put tensors into a module.

    Raises:
        BadCheckpoint: a name or a shape differs.
    """
    own = module.state_dict()
    problems = [f"lacks {name}" for name in own.keys() - tensors.keys()]
    problems += [f"has an extra {name}" for name in tensors.keys() - own.keys()]
    problems += [
        f"has {name} of shape {list(tensors[name].shape)}, the model {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadCheckpoint(f"{path} does not fit the model: it " + ", ".join(sorted(problems)[:3]) + more)
    module.load_state_dict(tensors)
