"""A model repository as rules see it, from a folder or from a running server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.engines.machine import Machine
from trirank_build.errors import BadModel
from trirank_build.repository.configs import BUCKETS_PARAMETER, parse_config
from trirank_build.repository.release import MANIFEST, MODELS

_PLATFORMS = {
    "tensorrt_plan": "tensorrt", "onnxruntime_onnx": "onnxruntime", "pytorch_libtorch": "pytorch",
    "tensorflow_savedmodel": "tensorflow", "tensorflow_graphdef": "tensorflow", "ensemble": "ensemble",
}  # fmt: skip
_BYTES = {
    pb.TYPE_BOOL: 1, pb.TYPE_UINT8: 1, pb.TYPE_UINT16: 2, pb.TYPE_UINT32: 4, pb.TYPE_UINT64: 8, pb.TYPE_INT8: 1,
    pb.TYPE_INT16: 2, pb.TYPE_INT32: 4, pb.TYPE_INT64: 8, pb.TYPE_FP16: 2, pb.TYPE_BF16: 2, pb.TYPE_FP32: 4,
    pb.TYPE_FP64: 8,
}  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """What the repository is served on, and for whom.

    Attributes:
        shared_memory: free bytes of /dev/shm; None: there is none.
        deadline_ms: of a caller; None: not told.
    """

    cores: int
    machine: Machine
    shared_memory: int | None
    deadline_ms: float | None = None

    @classmethod
    def here(cls, deadline_ms: float | None = None) -> Surroundings:
        """This machine."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
        return cls(cores, Machine.here(), shm, deadline_ms)


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: of its folder.
        config: ModelConfig; where there is no config.pbtxt, an empty one, which Triton completes for some backends.
        folder: None: known from a server alone.
        problem: why config.pbtxt cannot be read; empty: it can.
    """

    name: str
    config: Any
    folder: Path | None = None
    problem: str = ""

    @property
    def backend(self) -> str:
        """``ensemble``, ``python``, ``tensorrt``, …; empty: the configuration does not say."""
        if self.config.HasField("ensemble_scheduling"):
            return "ensemble"
        return self.config.backend or _PLATFORMS.get(self.config.platform, self.config.platform)

    @property
    def described(self) -> bool:
        """Whether the configuration names inputs and outputs; where it does not, Triton asks the model."""
        return bool(self.config.input) and bool(self.config.output)

    @property
    def versions(self) -> list[Path]:
        """Its version folders."""
        if self.folder is None:
            return []
        found = [path for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name))

    @property
    def instances(self) -> int:
        """How many work at a time."""
        return sum(max(1, group.count) for group in self.config.instance_group) or 1

    @property
    def kinds(self) -> set[int]:
        """Kinds of its instance groups; empty: Triton chooses."""
        return {group.kind for group in self.config.instance_group} - {pb.ModelInstanceGroup.KIND_AUTO}

    @property
    def buckets(self) -> list[int]:
        """Lengths that its variable axes take, where its configuration says so."""
        text = (
            self.config.parameters[BUCKETS_PARAMETER].string_value
            if BUCKETS_PARAMETER in self.config.parameters
            else ""
        )
        return [int(part) for part in text.split(",") if part.strip().isdigit()]

    def shape(self, tensor: Any) -> list[int]:
        """Of a tensor of this model, batch axis included."""
        return [*([-1] if self.config.max_batch_size > 0 else []), *tensor.dims]

    def largest_bytes(self) -> int:
        """Of all inputs and outputs of one full batch, variable axes taken at their longest bucket, or at one."""
        longest = max(self.buckets, default=1)
        elements = {
            id(tensor): int(np.prod([longest if axis < 0 else axis for axis in tensor.dims] or [1]))
            * _BYTES.get(tensor.data_type, 0)
            for tensor in (*self.config.input, *self.config.output)
        }
        return max(1, self.config.max_batch_size) * sum(elements.values())


@dataclass(frozen=True)
class Repository:
    """All models of a repository.

    Attributes:
        folder: None: known from a server alone.
        release: the folder of the trirank release that it belongs to, if any.
    """

    models: dict[str, Model]
    folder: Path | None = None
    release: Path | None = None

    @classmethod
    def read(cls, place: Path) -> Repository:
        """A repository, or a release of trirank.

        Raises:
            BadModel: there is no such folder, or no model in it.
        """
        release = place if (place / MANIFEST).is_file() and (place / MODELS).is_dir() else None
        folder = place / MODELS if release else place
        if release is None and (place.parent / MANIFEST).is_file() and place.name == MODELS:
            release = place.parent
        if not folder.is_dir():
            raise BadModel(f"{place} is no folder; give a model repository, a release, or the host:port of a server")
        models = {}
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                models[path.name] = _read(path)
        if not models:
            raise BadModel(f"{place} holds no model; a repository has one folder a model")
        return cls(models, folder, release)

    def ensembles(self) -> Iterator[Model]:
        """The ensembles of it."""
        return (model for model in self.models.values() if model.backend == "ensemble")

    def steps(self) -> set[str]:
        """Names of the models that are steps of an ensemble."""
        return {step.model_name for each in self.ensembles() for step in each.config.ensemble_scheduling.step}


def _read(folder: Path) -> Model:
    path = folder / "config.pbtxt"
    if not path.is_file():
        return Model(folder.name, pb.ModelConfig(), folder)
    try:
        return Model(folder.name, parse_config(path.read_text()), folder)
    except (text_format.ParseError, UnicodeDecodeError, OSError) as error:
        return Model(folder.name, pb.ModelConfig(), folder, str(error))
