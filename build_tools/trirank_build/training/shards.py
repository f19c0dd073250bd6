"""Tables in shards: under torchrun each process keeps every so-manieth row of a table, and the moments of these alone.

Before a step every process asks the others for the rows that its part of the batch holds; after it, the gradients go
back to the rows' owners. Both are exchanges of all with all, outside of the model and of DDP, so that it is no matter
how often a model looks a table up. To validate and to write weights the first process gathers the whole table for that
time; where a phase begins and ends, each process has the whole table for a moment.

Tables with ``model.embedding_updates = "rows"`` are kept so: their steps know which rows they need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trirank_build.models.forms.form import replace

IDS = ("history", "query", "candidates", "chosen", "others")
"""Tensors of a batch that hold ids of the joint vocabulary."""


class ShardedTable(nn.Module):
    """Rows r of a table [V, D] with r mod world = rank, of which a batch's are fetched before they are looked up.

    Its ``state_dict`` is the whole table's; there is one only while the table is gathered.
    """

    def __init__(self, table: nn.Embedding, rank: int, world: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.rank, self.world = rank, world
        self.shard = nn.Parameter(table.weight.detach()[rank::world].clone())
        self.whole: Tensor | None = None
        self.ids: Tensor | None = None
        """[N] ascending: the rows that were fetched, ``rows`` [N, D]."""
        self.rows: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.whole is not None:
            return F.embedding(ids, self.whole)
        assert self.ids is not None
        assert self.rows is not None
        return F.embedding(torch.searchsorted(self.ids, ids.long().contiguous()), self.rows)

    def fetch(self, ids: Tensor) -> None:
        """Have the rows ``ids``, ascending and each once, from their owners."""
        # By owner, so that what is sent to each lies together.
        self._order = torch.argsort(ids % self.world, stable=True)
        asked, self._sent = ids[self._order], torch.bincount(ids % self.world, minlength=self.world)
        self._received = torch.empty_like(self._sent)
        dist.all_to_all_single(self._received, self._sent)
        self._wanted = self._exchange(asked, self._sent, self._received)
        found = self._exchange(self.shard.detach()[self._wanted // self.world], self._received, self._sent)
        rows = torch.empty_like(found)
        rows[self._order] = found
        self.ids, self.rows = ids, rows.requires_grad_(torch.is_grad_enabled())

    def push(self) -> None:
        """Send the gradients of the fetched rows to their owners, whose gradient is the mean over the processes."""
        assert self.rows is not None
        gradient = self.rows.grad if self.rows.grad is not None else torch.zeros_like(self.rows)
        found = self._exchange(gradient[self._order], self._sent, self._received) / self.world
        at = (self._wanted // self.world)[None]
        mine = self._wanted > 0  # the row of "missing" stays zeros
        self.shard.grad = torch.sparse_coo_tensor(at[:, mine], found[mine], self.shard.shape, check_invariants=False)
        self.ids = self.rows = None

    @staticmethod
    def _exchange(values: Tensor, sent: Tensor, received: Tensor) -> Tensor:
        found = values.new_empty((int(received.sum()), *values.shape[1:]))
        dist.all_to_all_single(found, values.contiguous(), received.tolist(), sent.tolist())
        return found

    def gather(self) -> None:
        """Put the whole table together in the first process; every process has to call this."""
        most = -(-self.num_embeddings // self.world)
        own = self.shard.new_zeros((most, self.embedding_dim))
        own[: len(self.shard)] = self.shard.detach()
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(own, parts, dst=0)
        if parts is not None:
            self.whole = torch.stack(parts, 1).flatten(0, 1)[: self.num_embeddings].contiguous()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        table = self.whole
        if table is None:  # its shape, for whoever holds another state against this
            table = torch.empty(self.num_embeddings, self.embedding_dim, device="meta")
        destination[f"{prefix}weight"] = table

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.shard.copy_(state_dict[f"{prefix}weight"][self.rank :: self.world])


class Shards:
    """The sharded tables of a module while a phase trains it; none in one process, or where all rows move."""

    def __init__(self, module: nn.Module, rank: int, world: int) -> None:
        self._module = module
        self.tables: dict[str, ShardedTable] = {}
        if world > 1:
            for name, part in list(module.named_modules()):
                if isinstance(part, nn.Embedding) and part.sparse and not name.endswith("rest"):
                    self.tables[name] = ShardedTable(part, rank, world)
                    replace(module, name, self.tables[name])

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that are not the same in all processes."""
        return [f"{name}.shard" for name in self.tables]

    def fetch(self, tensors: dict[str, Tensor]) -> None:
        """Have the rows of a batch."""
        if self.tables:
            ids = torch.unique(torch.cat([tensors[name].flatten() for name in IDS if name in tensors]).long())
            for table in self.tables.values():
                own = ids[ids < table.num_embeddings]
                table.fetch(own if len(own) and own[0] == 0 else F.pad(own, (1, 0)))  # 0 is looked up where none is

    def push(self) -> None:
        """Give the gradients of a step to the rows' owners."""
        for table in self.tables.values():
            table.push()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The first process has whole tables within; every process has to come here."""
        for table in self.tables.values():
            table.gather()
        try:
            yield
        finally:
            for table in self.tables.values():
                table.whole = None

    def leave(self) -> None:
        """Whole tables again in every process, with weights that mean nothing until others are loaded."""
        for name, table in self.tables.items():
            whole = nn.Embedding(table.num_embeddings, table.embedding_dim, padding_idx=0, sparse=True)
            replace(self._module, name, whole.to(table.shard.device))
        self.tables = {}
