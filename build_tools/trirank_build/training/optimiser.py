"""AdamW for what every batch moves, and for the rows of embedding tables that only some batches do.

A table of ten million rows of 64 numbers has 640 million: AdamW reads and writes each of them, and its two moments, at
every step, whatever the batch held. Tables with ``model.embedding_updates = "rows"`` get sparse gradients, and moments
that move only where there is one (torch.optim.SparseAdam, "lazy Adam"); weight decay does not act on them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trirank_build.training.distributed import Ranks
from trirank_build.training.shards import ShardedTable


class Optimiser:
    """Of what is trained of a module.

    Args:
        ranks: the processes that train it together; None: this one alone.
    """

    def __init__(
        self, module: nn.Module, learning_rate: float, weight_decay: float, ranks: Ranks | None = None
    ) -> None:
        self._ranks = ranks
        self._shards = {id(part.shard) for part in module.modules() if isinstance(part, ShardedTable)}
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding) and part.sparse}
        tables |= self._shards
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._rows = [parameter for parameter in trained if id(parameter) in tables]
        self._whole = [parameter for parameter in trained if id(parameter) not in tables]
        self._parts: list[torch.optim.Optimizer] = []
        if self._whole:
            whole = torch.optim.AdamW(self._whole, lr=learning_rate, weight_decay=weight_decay, fused=True)
            self._parts.append(whole)
        if self._rows:
            self._parts.append(torch.optim.SparseAdam(self._rows, lr=learning_rate))

    def backward(self, step: nn.Module, tensors: dict[str, Tensor], half: bool = False) -> Tensor:
        """Gradients of the loss that ``step`` makes of a batch; gives the loss. ``half``: mixed precision, bfloat16."""
        device = next(iter(tensors.values())).device.type
        with torch.autocast(device, torch.bfloat16) if half else nullcontext():
            loss: Tensor = step(**tensors)
        torch.autograd.backward(loss)
        return loss.detach()

    def step(self, rate: float, most: float) -> None:
        """One step at a learning rate, the norm of all gradients cut to ``most``; then they are gone."""
        self._clip(most)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def _clip(self, most: float) -> None:
        together = [parameter.grad for parameter in self._whole if parameter.grad is not None]
        apart: list[Tensor] = []
        for parameter in self._rows:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.coalesce()
                (apart if id(parameter) in self._shards else together).append(parameter.grad.values())
        if not together and not apart:
            return
        norm = nn.utils.get_total_norm(together)
        if self._shards:  # of which every process has its own
            assert self._ranks is not None
            norm = (norm.square() + self._ranks.total(nn.utils.get_total_norm(apart).square())).sqrt()
        torch._foreach_mul_([*together, *apart], (most / (norm + 1e-6)).clamp(max=1.0))

    def state(self) -> dict[str, Tensor]:
        """Moments and counts, by names that ``load`` knows."""
        found: dict[str, Tensor] = {}
        for number, part in enumerate(self._parts):
            for index, state in part.state_dict()["state"].items():
                found |= {f"{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self._parts]
        for name, value in tensors.items():
            number, index, key = name.split(".")
            sparse = isinstance(self._parts[int(number)], torch.optim.SparseAdam)
            states[int(number)].setdefault(int(index), {})[key] = (
                int(value) if sparse and key == "step" else value
            )  # SparseAdam counts in Python
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict({**part.state_dict(), "state": state})
