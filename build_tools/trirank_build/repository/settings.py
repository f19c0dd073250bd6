"""How a release is served on a machine, as a file: what `trirank tune-serving` finds, and `trirank assemble --settings`
takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from trirank import contract

from trirank_build.artefacts import atomic_file
from trirank_build.errors import BadModel
from trirank_build.repository.configs import Batching, Instances

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ServingSettings(BaseModel):
    """Of the runtime ``python``. Every field has the default that `trirank assemble` takes by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipeline: Literal["ensemble", "single"] = "ensemble"
    engine: str | None = None
    """None: the gate's, else the fastest here."""
    threads: int = Field(default=1, ge=1, le=256)
    """Of one call of the ranker."""
    instances: int = Field(default=1, ge=1, le=256)
    """Of the ranker, or of the pipeline ``single``."""
    preprocess_instances: int = Field(default=1, ge=1, le=256)
    rerank_instances: int = Field(default=1, ge=1, le=256)
    max_batch: int = Field(default=contract.MAX_BATCH, ge=1, le=contract.MAX_BATCH)
    queue_delay_us: int = Field(default=0, ge=0, le=100_000)
    """How long the first request of a batch waits for company."""

    @classmethod
    def load(cls, path: Path) -> ServingSettings:
        """From a TOML file.

        Raises:
            BadModel: it cannot be read, has a key that there is not, or a value out of range.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadModel(
                f"settings {path} cannot be read ({error}); `trirank tune-serving` writes such files"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise BadModel(f"settings {path}: {place} is {first['input']!r}: {first['msg']}") from None

    def save(self, path: Path, words: str = "") -> None:
        """As TOML, with words above it."""
        comment = "".join(f"# {line}\n" for line in words.splitlines())
        with atomic_file(path) as scratch:
            scratch.write_text(comment + tomli_w.dumps(self.model_dump(exclude_none=True)))

    def of_release(self) -> dict[str, Any]:
        """As repository.assemble takes them."""
        return {
            "pipeline": self.pipeline, "engine": self.engine, "threads": self.threads,
            "instances": Instances(self.preprocess_instances, self.instances, self.rerank_instances, self.instances),
            "batching": Batching(self.max_batch, self.queue_delay_us),
        }  # fmt: skip

    def words(self) -> str:
        """In a line."""
        said = [self.pipeline, self.engine or "", f"{self.instances} of {self.threads} threads"]
        said.append(f"batch {self.max_batch}")
        if self.pipeline == "ensemble":
            said.append(f"preprocess {self.preprocess_instances}, rerank {self.rerank_instances}")
        return ", ".join(filter(None, [*said, f"delay {self.queue_delay_us} µs" * (self.queue_delay_us > 0)]))


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
