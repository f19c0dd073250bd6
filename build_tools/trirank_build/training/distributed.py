"""One process or many: under ``torchrun`` every rank takes its part of each batch, and gradients are averaged (DDP)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(hours=2)
"""The other ranks wait so long at most while the first one validates."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, on which device."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process validates, writes and reports."""
        return self.rank == 0

    def parallel(self, module: nn.Module, apart: list[str]) -> nn.Module:
        """The module, its gradients averaged over the ranks but for the parameters ``apart``; all start from the first
        rank's weights."""
        if self.world == 1:
            return module
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, apart)
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)

    def agree(self, value: float) -> float:
        """The first rank's value, on all."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor.item())

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks."""
        return self.total(value) / self.world

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the group that ``torchrun`` made (gloo on CPU, nccl on GPUs), or be alone."""
    cuda = torch.cuda.is_available()
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
