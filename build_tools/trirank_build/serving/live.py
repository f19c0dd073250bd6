"""The repository that a running server reads: models of one release, or of two while one takes the other's place.

Every stage is named after its release (``ranker_8c8d4e1ce682``), and so is an ensemble of them; the ensemble ``rank``
has the steps of one release. So no request can meet features of one release and scores of another: whichever
configuration of ``rank`` it is taken up by names one release alone. Where the stages share a process, ``rank`` is that
model itself: Triton loads the new one beside the old one, and goes over to it in one step.
"""

from __future__ import annotations

import os
import py_compile
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trirank import contract

from trirank_build.artefacts import WEIGHTS, atomic_directory
from trirank_build.repository.configs import (
    RankerRuntime,
    config_text,
    feedback_config,
    packed_shape,
    parse_config,
    ranker_config,
)
from trirank_build.repository.release import GRAPH, MODELS, TEMPLATES, load_manifest, model_config


@dataclass(frozen=True)
class Served:
    """A release as it is served.

    Attributes:
        release: its folder.
        name: its digest, which its models' names end in.
        pipeline: one of repository.configs.PIPELINES.
        fallback: engine of the runtime ``python`` that takes the place of the release's own runtime, if any.
    """

    release: Path
    name: str
    pipeline: str = "ensemble"
    fallback: str | None = None

    @classmethod
    def of(cls, release: Path, fallback: str | None = None) -> Served:
        """A release of a folder.

        Raises:
            BadModel: this is no release.
        """
        manifest = load_manifest(release)
        return cls(release.resolve(), manifest["release"], manifest["pipeline"], fallback)

    def model(self, stage: str) -> str:
        """The name of a stage's model, or of the ensemble, of this release."""
        return f"{stage}_{self.name}"

    @property
    def entry(self) -> str:
        """The name of the model that answers whole requests with this release: its ensemble, or ``rank`` itself."""
        return contract.ENSEMBLE if self.pipeline == "single" else self.model(contract.ENSEMBLE)

    @property
    def stages(self) -> list[str]:
        """Names of the models that do the work, in order."""
        return [self.entry] if self.pipeline == "single" else [self.model(stage) for stage in contract.STAGES]

    @property
    def models(self) -> list[str]:
        """Names of the models that are this release's alone, those first that others need."""
        return [] if self.pipeline == "single" else [*self.stages, self.entry]

    def ensemble(self, name: str) -> Any:
        """Configuration of an ensemble of its models."""
        config = model_config(self.release, contract.ENSEMBLE)
        config.name = name
        for step in config.ensemble_scheduling.step:
            step.model_name = self.model(step.model_name)
        return config


class LiveRepository:
    """A folder of links to releases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def add(self, served: Served) -> None:
        """Put a release's models beside those that are there."""
        if served.pipeline == "single":
            return
        for stage in contract.STAGES:
            config = model_config(served.release, stage)
            files = list((served.release / MODELS / stage / "1").iterdir())
            if stage == contract.RANKER and served.fallback is not None:
                config = ranker_config(packed_shape(config), RankerRuntime("python", served.fallback))
                graph = [file for file in files if file.name == GRAPH or file.suffix == WEIGHTS]
                files = [*graph, TEMPLATES / stage / "1" / "model.py"]
            config.name = served.model(stage)
            self._write(config, served.release, files)
        self._write(served.ensemble(served.entry))

    def add_feedback(self) -> None:
        """Put the model that takes feedback beside them; it is no release's."""
        folder = self.folder / contract.FEEDBACK
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(config_text(feedback_config()))
        shutil.copyfile(TEMPLATES / contract.FEEDBACK / "1" / "model.py", folder / "1" / "model.py")
        py_compile.compile(str(folder / "1" / "model.py"))

    def point(self, served: Served) -> None:
        """Give ``rank`` the steps of a release that has been added, or make it its only model."""
        if served.pipeline == "single":
            files = list((served.release / MODELS / contract.ENSEMBLE / "1").iterdir())
            self._write(model_config(served.release, contract.ENSEMBLE), served.release, files)
        else:
            self._write(served.ensemble(contract.ENSEMBLE))

    def processes(self) -> dict[str, int]:
        """Python model → how many processes it has: one an instance."""
        configs = (parse_config((folder / "config.pbtxt").read_text()) for folder in self.folder.iterdir())
        return {
            config.name: sum(group.count for group in config.instance_group) or 1
            for config in configs
            if config.backend == "python"
        }

    def touch(self, model: str) -> None:
        """Make a model look changed, so that Triton loads it again when it is told to."""
        for file in (self.folder / model / "1").glob("*.py"):
            os.utime(file)

    def remove(self, served: Served) -> None:
        """Take a release's models away."""
        for name in served.models:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _write(self, config: Any, release: Path | None = None, files: Iterable[Path] = ()) -> None:
        if config.backend == "python":
            config.parameters["release"].string_value = str(release)
        with atomic_directory(self.folder / config.name) as scratch:
            (scratch / "config.pbtxt").write_text(config_text(config))
            (scratch / "1").mkdir()
            for file in files:
                # Python puts compiled code beside what it imports, and a release stays what it was.
                if file.suffix == ".py":
                    shutil.copyfile(file, scratch / "1" / file.name)
                    # Else the stub writes it, and Triton loads the model once more at its next occasion: it has
                    # changed since.
                    py_compile.compile(str(scratch / "1" / file.name))
                elif file.is_file():
                    (scratch / "1" / file.name).symlink_to(file)
