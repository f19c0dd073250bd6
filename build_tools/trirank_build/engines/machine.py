"""What a plan has to fit: the GPUs of this machine, and the libraries that its server brings."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from trirank_build.engines.plan import sm_name


@dataclass(frozen=True)
class Machine:
    """What a plan has to fit.

    Attributes:
        sms: architectures of the GPUs, ``sm86``, as nvidia-smi tells; empty: no GPU.
        tensorrt: version of the TensorRT that the server brings; None: not told.
        cuda: major version of the CUDA that the server brings; None: not told.
    """

    sms: tuple[str, ...]
    tensorrt: str | None
    cuda: str | None

    @classmethod
    def here(cls) -> Machine:
        """This machine. NVIDIA's containers say their versions in TRT_VERSION and CUDA_VERSION."""
        tensorrt, cuda = os.environ.get("TRT_VERSION"), os.environ.get("CUDA_VERSION")
        return cls(tuple(present_sms()), tensorrt, cuda.split(".")[0] if cuda else None)


def present_sms() -> list[str]:
    """Architectures of this machine's GPUs by nvidia-smi, in its order; none without one."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [sm_name(line) for line in done.stdout.split() if re.fullmatch(r"\d+\.\d", line)]
