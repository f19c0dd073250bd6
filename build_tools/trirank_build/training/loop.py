"""Runs the phases of a training one after the other: deterministic with its seed, resumed at the very batch.

All chance of a batch comes from (seed, phase, epoch, batch, rank), and the state that is saved holds weights,
optimiser and place, so a run that was killed goes on as if it had not been. With differential privacy
(training.private) chance is nobody's to know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trirank_build.errors import BadCheckpoint, Diverged
from trirank_build.models.checkpoint import load_checkpoint, load_weights, save_checkpoint
from trirank_build.progress import console, progress
from trirank_build.training.distributed import Ranks
from trirank_build.training.optimiser import Optimiser
from trirank_build.training.private import Private, PrivateOptimiser
from trirank_build.training.shards import Shards

LAST = "last.safetensors"
CLIP = 1.0
"""Largest norm of a step's gradient."""
FLOOR = 0.1
"""Of the learning rate, where its decay ends."""


class Schedule(Protocol):
    """What a phase's part of the recipe says about its steps."""

    @property
    def epochs(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...


class Phase(Protocol):
    """One objective, trained until validation stops it."""

    @property
    def name(self) -> str:
        """Of the phase, unique in its training."""
        ...

    @property
    def settings(self) -> Schedule:
        """The part of the recipe that says how."""
        ...

    @property
    def step(self) -> nn.Module:
        """From a batch's tensors to its loss; what of it needs gradients is trained."""
        ...

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls."""
        ...

    @property
    def judges_start(self) -> bool:
        """Whether what the phase begins with is validated, too, and kept where no epoch is better."""
        ...

    @property
    def private(self) -> Private | None:
        """How it trains with differential privacy, if it does; the last epoch is kept then, whatever validation
        says."""
        ...

    @property
    def measure(self) -> str:
        """What ``validate`` gives, by name; the curve has it as ``valid_ndcg10`` and the like."""
        ...

    def plan(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """One epoch's batches, as numbers of examples; always as many."""
        ...

    def batch(self, which: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """The tensors of a batch, on the CPU."""
        ...

    def validate(self) -> float:
        """How good it is on the validation split; more is better."""
        ...


def key_of(measure: str) -> str:
    """A measure's name in the curve."""
    return "valid_" + measure.lower().replace("@", "")


class Loop:
    """A training of one model.

    Args:
        phases: name → what makes the phase, once the model has the best weights of the one before.
        directory: for ``last.safetensors``, where it stands, and each phase's best weights, ``PHASE.safetensors``.
        identity: of recipe and data; only a state with the same one is resumed.
        half: mixed precision, bfloat16.
        checkpoint_minutes: at most so much work is lost when the run is killed.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: dict[str, Callable[[], Phase]],
        *,
        seed: int,
        directory: Path,
        identity: str,
        ranks: Ranks,
        half: bool = False,
        checkpoint_minutes: float = 5.0,
    ) -> None:
        self.model, self.phases, self.seed, self.ranks = model, list(phases.items()), seed, ranks
        self.half, self.checkpoint_minutes = half, checkpoint_minutes
        self.directory, self.last, self.identity = directory, directory / LAST, identity
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0
        """Spent before this process."""
        self._started = time.monotonic()
        self._phase = self._epoch = self._at = self._step = 0
        self._total = 0.0
        self._shards = Shards(model, 0, 1)

    def run(self, report: Any = None) -> None:
        """All phases; each ends with its best weights in the model. ``report(phase, epoch, measure)`` is called after
        every epoch and may raise to stop."""
        saved = self._find_place()
        for number in range(self._phase, len(self.phases)):
            self._phase = number
            if number:
                self._load_best(self.phases[number - 1][0])
            name, make = self.phases[number]
            phase = make()
            phase.step.to(self.ranks.device)
            self._run_phase(phase, None if saved is None else self._resume(phase, saved), report)
            saved = None
            self._epoch = self._at = self._step = 0
        self._load_best(name)

    def best(self, phase: str) -> Path:
        """The file of a phase's best weights."""
        return self.directory / f"{phase}.safetensors"

    def _load_best(self, phase: str) -> None:
        self.ranks.wait()  # until the first has written them
        load_weights(self.model, load_checkpoint(self.best(phase))[0], self.best(phase))
        self.ranks.wait()  # until all have read them: the file may be moved now

    def _run_phase(self, phase: Phase, state: dict[str, Tensor] | None, report: Any) -> None:
        settings = phase.settings
        self._shards = Shards(phase.step, self.ranks.rank, self.ranks.world)
        step = self.ranks.parallel(phase.step, self._shards.parameters)
        if phase.private is None:
            optimiser = Optimiser(phase.step, settings.learning_rate, settings.weight_decay, self.ranks)
        else:
            optimiser = PrivateOptimiser(phase.step, settings.learning_rate, settings.weight_decay, phase.private)
        if state is not None:
            optimiser.load(state)
        per_epoch = len(phase.plan(np.random.default_rng(self.seed)))
        total = settings.epochs * per_epoch
        with progress() as bar:
            task = bar.add_task(phase.name, total=total, completed=self._step, visible=self.ranks.leads)
            if phase.judges_start and not self._own(phase):
                self._judge(phase, None)
            while self._epoch < settings.epochs and not self._stalled(phase):
                loss = self._run_epoch(phase, step, optimiser, total, lambda: bar.advance(task))
                self._epoch, self._at, self._total = self._epoch + 1, 0, 0.0
                found = self._judge(phase, loss)
                self._save(phase, optimiser)
                bar.update(task, description=f"{phase.name}, epoch {self._epoch}: {phase.measure} {found:.4f}")
                if report is not None:
                    report(phase.name, self._epoch, found)
            bar.update(task, total=self._step, completed=self._step)
        self._shards.leave()

    def _judge(self, phase: Phase, loss: float | None) -> float:
        """Validate, and keep the weights where they are the phase's best so far; ``loss`` None: before training."""
        with self._shards.whole():
            return self._judge_whole(phase, loss)

    def _judge_whole(self, phase: Phase, loss: float | None) -> float:
        found = self.ranks.agree(phase.validate() if self.ranks.leads else 0.0)
        told = None if loss is None or phase.private is not None else round(loss, 6)  # it is of users without noise
        point = {"phase": phase.name, "epoch": self._epoch, "loss": told, key_of(phase.measure): round(found, 6)}
        self.curve.append(point)
        best = phase.private is not None or max(self._own(phase), key=lambda p: p[key_of(phase.measure)]) is point
        if self.ranks.leads and best:
            place = {"phase": phase.name, "epoch": self._epoch}
            save_checkpoint(self.best(phase.name), self.model.state_dict(), place)
        return found

    def _own(self, phase: Phase) -> list[dict[str, Any]]:
        return [point for point in self.curve if point["phase"] == phase.name]

    def _stalled(self, phase: Phase) -> bool:
        own = self._own(phase)
        if not own or phase.private is not None:
            return False
        best = max(range(len(own)), key=lambda at: own[at][key_of(phase.measure)])
        return len(own) - 1 - best >= phase.settings.patience

    def _run_epoch(self, phase: Phase, step: nn.Module, optimiser: Optimiser, total: int, done: Any) -> float:
        """The rest of an epoch; gives the mean loss over the whole of it."""
        ranks = self.ranks
        plan = phase.plan(np.random.default_rng((self.seed, self._phase, self._epoch)))
        saved = time.monotonic()
        phase.step.train()
        while self._at < len(plan):
            which = plan[self._at][ranks.rank :: ranks.world]
            if not len(which):  # more ranks than examples are left; every rank must take the step
                which = plan[self._at][:1]
            place = (self.seed, self._phase, self._epoch, self._at, ranks.rank)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
            rate = self._rate(phase, total)
            tensors = {
                name: tensor.to(ranks.device, non_blocking=True)
                for name, tensor in phase.batch(np.sort(which), np.random.default_rng(place)).items()
            }
            self._shards.fetch(tensors)
            loss = optimiser.backward(step, tensors, self.half)
            if not torch.isfinite(loss):
                raise Diverged(
                    f"{phase.name}: the loss is {loss.item()} at epoch {self._epoch + 1}, batch {self._at + 1}, "
                    f"learning rate {rate:.2g}; lower learning_rate. The last good checkpoint is kept."
                )
            self._shards.push()
            optimiser.step(rate, CLIP)
            self._step += 1
            self._at += 1
            self._total += float(loss)
            done()
            # Shards are gathered by all processes, whose clocks differ: they are saved after an epoch alone.
            if ranks.leads and not self._shards.tables and time.monotonic() - saved > self.checkpoint_minutes * 60:
                self._save(phase, optimiser)
                saved = time.monotonic()
        return float(ranks.mean(torch.tensor(self._total / len(plan), device=ranks.device)))

    def _rate(self, phase: Phase, total: int) -> float:
        """Warm-up, then a cosine down to FLOOR where the phase decays."""
        settings = phase.settings
        warm = min((self._step + 1) / max(settings.warmup_steps, 1), 1.0)
        if not phase.decays:
            return settings.learning_rate * warm
        fall = (1 - FLOOR) / 2
        return settings.learning_rate * warm * (1 - fall + fall * math.cos(math.pi * min(self._step / total, 1.0)))

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds + time.monotonic() - self._started

    def _save(self, phase: Phase, optimiser: Optimiser) -> None:
        """Write down where training stands: the first process, and of shards each its own moments, before it."""
        tensors = {f"optimiser.{name}": value for name, value in optimiser.state().items()}
        if self._shards.tables:
            if not self.ranks.leads:
                save_checkpoint(self._last_of_own, tensors, self._place())
            self.ranks.wait()
        with self._shards.whole():
            if self.ranks.leads:
                tensors |= {f"step.{name}": tensor for name, tensor in phase.step.state_dict().items()}
                save_checkpoint(self.last, tensors, self._place())

    @property
    def _last_of_own(self) -> Path:
        return self.last.with_name(f"last.{self.ranks.rank}.safetensors")

    def _place(self) -> dict[str, Any]:
        return {
            "identity": self.identity, "phase": self._phase, "epoch": self._epoch, "at": self._at,
            "step": self._step, "total": self._total, "curve": self.curve, "seconds": self.elapsed(),
            "processes": self.ranks.world if self._shards.tables else None,
        }  # fmt: skip

    def _find_place(self) -> dict[str, Tensor] | None:
        """Take up the saved place, if there is one; gives what was saved."""
        if not self.last.is_file():
            return None
        tensors, place = load_checkpoint(self.last)
        if place.get("identity") != self.identity:
            raise BadCheckpoint(f"{self.last} is of another recipe or dataset; choose another --out, or say --fresh")
        if place.get("processes") not in (None, self.ranks.world):
            raise BadCheckpoint(f"{self.last} has tables in {place['processes']} shards; go on with as many processes, "
                                "or say --fresh")  # fmt: skip
        if place.get("processes") is not None and not self.ranks.leads:
            own, its = load_checkpoint(self._last_of_own)
            if any(its[key] != place[key] for key in ("identity", "phase", "epoch", "at")):
                raise BadCheckpoint(f"{self._last_of_own} stands at another place than {self.last}; say --fresh")
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("step.")} | own
        self._phase, self._epoch, self._at = place["phase"], place["epoch"], place["at"]
        self._step, self._total, self.curve = place["step"], place["total"], place["curve"]
        self.seconds = place["seconds"]
        if self.ranks.leads:
            console.print(f"resuming {self.phases[self._phase][0]} at epoch {self._epoch + 1}, batch {self._at + 1}")
        return tensors

    def _resume(self, phase: Phase, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the saved weights back; gives the optimiser's state."""
        own = {n.removeprefix("step."): t for n, t in saved.items() if n.startswith("step.")}
        load_weights(phase.step, own, self.last)
        return {n.removeprefix("optimiser."): t for n, t in saved.items() if n.startswith("optimiser.")}
