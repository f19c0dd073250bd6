"""Rules about the steps of an ensemble and what flows between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.doctor.files import fits
from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Model, Repository, Surroundings


@dataclass(frozen=True)
class End:
    """One end of a tensor's way: which model gives or takes it, under which name of its own."""

    model: Model
    tensor: Any

    def __str__(self) -> str:
        return f"{self.model.name}.{self.tensor.name}"


def steps_of(ensemble: Model, repository: Repository) -> Iterator[tuple[Any, Model]]:
    """The steps whose model is there and says what it takes."""
    for step in ensemble.config.ensemble_scheduling.step:
        model = repository.models.get(step.model_name)
        if model is not None and model.described and not model.problem:
            yield step, model


def ways(ensemble: Model, repository: Repository) -> tuple[dict[str, list[End]], dict[str, list[End]]]:
    """Tensor of the ensemble → who gives it, and who takes it."""
    givers: dict[str, list[End]] = {tensor.name: [End(ensemble, tensor)] for tensor in ensemble.config.input}
    takers: dict[str, list[End]] = {tensor.name: [End(ensemble, tensor)] for tensor in ensemble.config.output}
    for step, model in steps_of(ensemble, repository):
        for tensors, mapping, ends in (
            (model.config.output, step.output_map, givers),
            (model.config.input, step.input_map, takers),
        ):
            by_name = {tensor.name: tensor for tensor in tensors}
            for own, name in mapping.items():
                if own in by_name:
                    ends.setdefault(name, []).append(End(model, by_name[own]))
    return givers, takers


def complete(ensemble: Model, repository: Repository) -> bool:
    """Whether every step's model is known, so that a tensor without a giver has none indeed."""
    steps = ensemble.config.ensemble_scheduling.step
    return len(list(steps_of(ensemble, repository))) == len(steps)


@rule("ENS01", Severity.ERROR, "Put the model into the repository, or name the right one.")
def step_without_model(repository: Repository, around: Surroundings) -> Found:
    """A step names a model that is not there."""
    for ensemble in repository.ensembles():
        for step in ensemble.config.ensemble_scheduling.step:
            if step.model_name not in repository.models:
                yield ensemble.name, f"step {step.model_name} is no model of this repository"


@rule("ENS02", Severity.ERROR, "Keys of the maps are names of the step's own tensors; write those.")
def tensor_that_the_step_lacks(repository: Repository, around: Surroundings) -> Found:
    """input_map or output_map names a tensor that the step's model does not have."""
    for ensemble in repository.ensembles():
        for step, model in steps_of(ensemble, repository):
            for kind, mapping, tensors in (
                ("input", step.input_map, model.config.input),
                ("output", step.output_map, model.config.output),
            ):
                for own in sorted(set(mapping) - {tensor.name for tensor in tensors}):
                    have = ", ".join(tensor.name for tensor in tensors)
                    yield ensemble.name, f"step {model.name} has no {kind} {own}; it has {have}"


@rule("ENS03", Severity.ERROR, "Give both ends one data type, or put a step between them that converts.")
def types_differ(repository: Repository, around: Surroundings) -> Found:
    """A tensor is of one type where it is given and of another where it is taken."""
    for ensemble, giver, taker in _pairs(repository):
        if giver.tensor.data_type != taker.tensor.data_type:
            one, other = (pb.DataType.Name(end.tensor.data_type) for end in (giver, taker))
            yield ensemble.name, f"{giver} is {one}, {taker} takes {other}"


@rule(
    "ENS04",
    Severity.ERROR,
    "Make the shapes agree; -1 stands for any length, and max_batch_size adds an axis in front.",
)
def shapes_differ(repository: Repository, around: Surroundings) -> Found:
    """A tensor has one shape where it is given and another where it is taken."""
    for ensemble, giver, taker in _pairs(repository):
        one, other = giver.model.shape(giver.tensor), taker.model.shape(taker.tensor)
        if not fits(one, other):
            yield ensemble.name, f"{giver} has shape {one} with its batch, {taker} takes {other}"


@rule("ENS05", Severity.ERROR, "Map it, or declare it optional in the step's model.")
def input_left_open(repository: Repository, around: Surroundings) -> Found:
    """A step's model needs an input that the ensemble does not give it."""
    for ensemble in repository.ensembles():
        for step, model in steps_of(ensemble, repository):
            for tensor in model.config.input:
                if not tensor.optional and tensor.name not in step.input_map:
                    yield ensemble.name, f"step {model.name} needs {tensor.name}, which its input_map leaves out"


@rule("ENS06", Severity.ERROR, "Let a step give it, or name it as the step does that gives it.")
def given_by_none(repository: Repository, around: Surroundings) -> Found:
    """A step or the answer takes a tensor that nothing gives."""
    for ensemble in repository.ensembles():
        if complete(ensemble, repository):
            givers, takers = ways(ensemble, repository)
            for name in sorted(takers.keys() - givers.keys()):
                yield ensemble.name, f"{name}, which {', '.join(map(str, takers[name]))} takes, is given by no step"


@rule("ENS07", Severity.ERROR, "Give each its own name.")
def given_twice(repository: Repository, around: Surroundings) -> Found:
    """Two steps give a tensor of the same name."""
    for ensemble in repository.ensembles():
        for name, ends in sorted(ways(ensemble, repository)[0].items()):
            steps = [end for end in ends if end.model is not ensemble]
            if len(steps) > 1:
                yield ensemble.name, f"{name} is given by {' and by '.join(map(str, steps))}"


@rule("ENS08", Severity.ERROR, "Break the circle; a step can only wait for steps before it.")
def goes_in_a_circle(repository: Repository, around: Surroundings) -> Found:
    """Steps wait for each other, so that none ever starts."""
    for ensemble in repository.ensembles():
        givers, takers = ways(ensemble, repository)
        needs: dict[str, set[str]] = {}
        for name, ends in takers.items():
            for end in ends:
                needs.setdefault(end.model.name, set()).update(giver.model.name for giver in givers.get(name, ()))
        waiting = {name: before - {ensemble.name} for name, before in needs.items() if name != ensemble.name}
        while ready := [name for name, before in waiting.items() if not before & waiting.keys()]:
            for name in ready:
                del waiting[name]
        if waiting:
            yield ensemble.name, f"{', '.join(sorted(waiting))} wait for each other"


@rule(
    "ENS09",
    Severity.ERROR,
    "Give the output another name; a caller who asks for it gets the request's own tensor back.",
)
def output_named_like_an_input(repository: Repository, around: Surroundings) -> Found:
    """An ensemble's output has the name of one of its inputs; both share one namespace."""
    for ensemble in repository.ensembles():
        names = {tensor.name for tensor in ensemble.config.input}
        for tensor in ensemble.config.output:
            if tensor.name in names:
                yield ensemble.name, f"{tensor.name} is an input and an output"


@rule("ENS10", Severity.ERROR, "Raise the step's max_batch_size, or lower the ensemble's.")
def step_takes_smaller_batches(repository: Repository, around: Surroundings) -> Found:
    """An ensemble takes larger batches than one of its steps."""
    for ensemble in repository.ensembles():
        for _, model in steps_of(ensemble, repository):
            if 0 < model.config.max_batch_size < ensemble.config.max_batch_size:
                most = ensemble.config.max_batch_size
                yield ensemble.name, f"max_batch_size is {most}, step {model.name} takes {model.config.max_batch_size}"


@rule(
    "ENS11", Severity.WARNING, "Send numbers: hash strings to INT64 in the client, encode them in the first step.",
    "triton-inference-server/server #7153",
)  # fmt: skip
def strings_on_the_way(repository: Repository, around: Surroundings) -> Found:
    """Many strings go into an ensemble or between its steps; BYTES tensors are packed and unpacked one by one."""
    for ensemble in repository.ensembles():
        givers, takers = ways(ensemble, repository)
        for name in sorted(givers.keys() & takers.keys()):
            end = next(iter(givers[name]))
            many = any(axis != 1 for axis in end.tensor.dims)
            if end.tensor.data_type == pb.TYPE_STRING and many:
                yield ensemble.name, f"{end} is BYTES of shape {list(end.tensor.dims)}"


@rule("ENS12", Severity.ERROR, "Take it out; send recorded requests through the ensemble before traffic comes.")
def warm_up_of_an_ensemble(repository: Repository, around: Surroundings) -> Found:
    """An ensemble has model_warmup, which Triton refuses."""
    for ensemble in repository.ensembles():
        if ensemble.config.model_warmup:
            yield ensemble.name, "model_warmup is set"


def _pairs(repository: Repository) -> Iterator[tuple[Model, End, End]]:
    """Ensemble, giver and taker of every tensor on its way."""
    for ensemble in repository.ensembles():
        givers, takers = ways(ensemble, repository)
        for name in sorted(givers.keys() & takers.keys()):
            for taker in takers[name]:
                for giver in givers[name]:
                    if giver.model is not taker.model:
                        yield ensemble, giver, taker
