"""Structured pruning: identify what matters least, remove it, retrain, as often as the recipe says.

What goes are attention heads, places of the feed-forward layers and of the scoring head, whole encoder blocks, numbers
of all vectors (the width), and the oldest events of the history. The tensors really get smaller. Importance is summed
over all parameters of a part (Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019):

- magnitude: squares of the weights
- gradient: squares of the gradients (the diagonal of the empirical Fisher information)
- taylor: squares of weight times gradient, what the loss would change to first order

``sparsity = "2:4"`` is another thing: it keeps all shapes and sets the smaller two of every four neighbouring weights
of a row to zero, which GPUs from Ampere on skip. On a CPU it gains nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trirank_build.artefacts import atomic_file
from trirank_build.compression.step import Context, StepSettings, Work
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.models.forms.prune import axes, embedding_tables, feed_forwards, rebuild, sparse_layers
from trirank_build.models.ranker import Attention, SharedContextRanker
from trirank_build.training.ranking import RankingStep

Share = Annotated[float, Field(ge=0)]


class Settings(StepSettings):
    """Of each layer alike."""

    kind: Literal["prune"] = "prune"
    heads: Share = 0.0
    """Share of each attention's heads to remove."""
    ffn: Share = 0.0
    """Share of the width of the feed-forward layers and of the scoring head to remove."""
    width: Share = 0.0
    """Share of the numbers of every vector, those of items included, to remove; heads keep their own width."""
    blocks: Annotated[int, Field(ge=0)] = 0
    """Encoder blocks to remove."""
    history_length: Annotated[int, Field(ge=1)] | None = None
    """Newest events to keep; None: all."""
    importance: Literal["magnitude", "gradient", "taylor"] = "taylor"
    requests: Annotated[int, Field(ge=1)] = 512
    """Training requests whose gradients are read."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """Times to identify, remove and retrain; each removes its part."""
    sparsity: Literal["none", "2:4"] = "none"

    @property
    def reads(self) -> str:
        """See StepSettings."""
        return super().reads or ("" if self.importance == "magnitude" else f'importance = "{self.importance}"')


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    ranker = shared_context(model, "prune")
    for name, attention in _attentions(ranker).items():
        _kept(attention.heads, settings.heads, f"heads of {name}", "heads")
    for name, layer in feed_forwards(ranker).items():
        _kept(layer.out_features, settings.ffn, f"places of {name}", "ffn")
    _kept(ranker.dim, settings.width, "numbers of a vector", "width")
    if settings.width and embedding_tables(ranker) is None:
        raise BadRecipe("prune.width does not fit embedding tables that were factorised or shared; prune first")
    blocks = len(ranker.encoder)
    if settings.blocks and settings.blocks >= blocks:
        raise BadRecipe(f"prune.blocks = {settings.blocks} leaves none of the {blocks} encoder blocks; say "
                        f"{blocks - 1} at most")  # fmt: skip
    if settings.blocks and not isinstance(ranker.encoder, nn.ModuleList):
        raise BadRecipe("prune.blocks does not fit blocks that share their weights; prune before sharing")
    if settings.history_length is not None and settings.history_length > ranker.history_length:
        raise BadRecipe(f"prune.history_length = {settings.history_length} is more than the {ranker.history_length} "
                        "events that the ranker sees")  # fmt: skip
    if settings.sparsity == "2:4" and not sparse_layers(ranker):
        raise BadRecipe('prune.sparsity = "2:4" finds no linear layer whose inputs are a multiple of 4')
    start = _start(ranker)
    zeros = {name: torch.zeros(size) for name, size in start.items()}
    rebuilt = rebuild(ranker, _decide(ranker, settings, settings.rounds, zeros, start))
    return rebuilt, _features(features, settings)


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    start = _start(shared_context(work.model, "prune"))
    for number in range(1, settings.rounds + 1):
        ranker = shared_context(work.model, "prune")
        folder = context.directory / f"round-{number}"
        place = folder / "decisions.json"
        if not place.is_file():
            scores = _importance(ranker, settings, context, work.features)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as scratch:
                scratch.write_text(json.dumps(_decide(ranker, settings, number, scores, start)))
        decisions: Decisions = json.loads(place.read_text())
        work.model = rebuild(ranker, decisions)
        work.decisions.append((settings.kind, decisions))
        if number == settings.rounds:
            work.features = _features(work.features, settings)
        context.finetune(work, settings.training, f"round-{number}")


def _features(features: Features, settings: Settings) -> Features:
    length = settings.history_length
    return features if length is None else features.changed(history_length=length)


def _attentions(ranker: SharedContextRanker) -> dict[str, Attention]:
    return {name: module for name, module in ranker.named_modules() if isinstance(module, Attention)}


def _start(ranker: SharedContextRanker) -> dict[str, int]:
    """Sizes that shares are of."""
    return {**{name: a.heads for name, a in _attentions(ranker).items()},
            **{name: layer.out_features for name, layer in feed_forwards(ranker).items()},
            "width": ranker.dim, "encoder": len(ranker.encoder)}  # fmt: skip


def _kept(size: int, share: float, what: str, key: str) -> int:
    """How many of ``size`` stay."""
    kept = round(size * (1 - share))
    if kept < 1:
        raise BadRecipe(f"prune.{key} = {share:g} leaves none of the {size} {what}; say {1 - 1 / size:.3g} at most")
    return kept


def _decide(
    ranker: SharedContextRanker, settings: Settings, number: int, scores: dict[str, Tensor], start: dict[str, int]
) -> Decisions:
    """What stays after round ``number``, of what is there now: the most important."""
    part = number / settings.rounds

    def best(name: str, share: float) -> list[int]:
        count = _kept(start[name], share * part, name, "heads or ffn")
        return sorted(scores[name].topk(min(count, len(scores[name]))).indices.tolist())

    decisions: Decisions = {"heads": {}, "ffn": {}}
    if settings.blocks:
        remove = round(settings.blocks * part)
        decisions["blocks"] = sorted(scores["encoder"].topk(start["encoder"] - remove).indices.tolist())
    # Blocks go first, so the names are those that the others have then.
    numbers = {old: new for new, old in enumerate(decisions.get("blocks", range(len(ranker.encoder))))}

    def renamed(name: str) -> str | None:
        first, _, rest = name.partition(".")
        if first != "encoder" or not isinstance(ranker.encoder, nn.ModuleList):
            return name
        at, _, rest = rest.partition(".")
        return f"encoder.{numbers[int(at)]}.{rest}" if int(at) in numbers else None

    for kind, names, share in (
        ("heads", _attentions(ranker), settings.heads), ("ffn", feed_forwards(ranker), settings.ffn),
    ):  # fmt: skip
        for name in names if share else ():
            if (new := renamed(name)) is not None:
                decisions[kind][new] = best(name, share)
    if settings.width:
        decisions["width"] = best("width", settings.width)
    if number == settings.rounds:
        if settings.history_length is not None:
            decisions["history_length"] = settings.history_length
        if settings.sparsity != "none":
            decisions["sparsity"] = settings.sparsity
    return decisions


def _importance(
    ranker: SharedContextRanker, settings: Settings, context: Context, features: Features
) -> dict[str, Tensor]:
    """Name of each attention → importance of its heads; of each pair of layers → of its places; ``encoder`` → of its
    blocks."""
    values: dict[str, Tensor] = {name: p.detach().square() for name, p in ranker.named_parameters()}
    if settings.importance != "magnitude":
        tasks = {task: context.dataset.description.tasks[task] for task in features.spec.tasks}
        step = RankingStep(ranker.eval(), context.recipe.training, tasks)
        total = {name: torch.zeros_like(p) for name, p in ranker.named_parameters()}
        for batch in context.batches(features, settings.requests):
            ranker.zero_grad()
            step(**batch).backward()
            for name, parameter in ranker.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    total[name] += (gradient if settings.importance == "gradient" else gradient * parameter).square()
        ranker.zero_grad()
        values = {name: t.detach() for name, t in total.items()}

    def of_rows(name: str) -> Tensor:
        return values[f"{name}.weight"].sum(1) + values[f"{name}.bias"]

    found: dict[str, Tensor] = {}
    for name, attention in _attentions(ranker).items():
        inner = attention.heads * attention.head_dim
        per_place = of_rows(f"{name}.query") + values[f"{name}.out.weight"].sum(0)
        both = of_rows(f"{name}.key_value")
        per_place = per_place + both[:inner] + both[inner:]
        found[name] = per_place.reshape(attention.heads, attention.head_dim).sum(1)
    for name in feed_forwards(ranker):
        found[name] = of_rows(f"{name}.0") + values[f"{name}.2.weight"].sum(0)
    found["width"] = _of_numbers(ranker, values)
    found["encoder"] = torch.stack([
        torch.stack([values[f"encoder.{at}.{name}"].sum() for name, _ in block.named_parameters()]).sum()
        for at, block in enumerate(ranker.encoder)
    ]) if isinstance(ranker.encoder, nn.ModuleList) else torch.zeros(len(ranker.encoder))  # fmt: skip
    return found


def _of_numbers(ranker: SharedContextRanker, values: dict[str, Tensor]) -> Tensor:
    """[D] importance of each number of the vectors."""
    parts = []
    for name, (axis, times) in axes(ranker).items():
        of_axis = values[name].movedim(axis, 0).flatten(1).sum(1) if values[name].ndim > 1 else values[name]
        parts.append(of_axis.reshape(times, -1).sum(0))
    return torch.stack(parts).sum(0)
