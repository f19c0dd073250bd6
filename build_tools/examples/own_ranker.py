"""A team's own ranker: any torch.nn.Module with this call signature exports, is checked and is served like ours.

    trirank export --run work/demo/run --out own.onnx --model own_ranker:TwoTowers --checkpoint own.safetensors \
        --arguments '{"vocabulary": "$vocabulary_size", "dense": "$dense", "tasks": "$tasks", "dim": 32}'

What its inputs hold is said in trirank.contract.ranker_inputs: ids are of one joint vocabulary with 0 for "missing".
A candidate's score may depend on the candidate and the request alone; the export proves that it does.
"""

from __future__ import annotations

from torch import Tensor, nn


class TwoTowers(nn.Module):
    """The mean of the user's events and the query, times the candidate (Covington et al. 2016, in spirit)."""

    def __init__(self, vocabulary: int, dense: int, tasks: int, dim: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.user = nn.Linear(dim, dim)
        self.dense = nn.Linear(dense, tasks)
        self.scale = nn.Linear(1, tasks)

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        """[B, L, F+2], [B, Q], [B, N, F], [B, N, D], [B, C] → scores [B, N, T]."""
        user = self.embedding(history).sum(2).mean(1) + self.embedding(query).mean(1)  # [B, dim]
        items = self.embedding(candidates).sum(2)  # [B, N, dim]
        match = (items * self.user(user)[:, None]).sum(-1, keepdim=True)  # [B, N, 1]
        return self.scale(match) + self.dense(dense)  # [B, N, T]
