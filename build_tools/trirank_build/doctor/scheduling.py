"""Rules about batches and queues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Model, Repository, Surroundings

_LONG_DELAY_MS = 100.0


@rule("BATCH01", Severity.WARNING, "Set max_batch_size above 1, or take dynamic_batching out.")
def batches_of_one(repository: Repository, around: Surroundings) -> Found:
    """Dynamic batching is on, but no batch can have more than one request."""
    for model in _batching(repository):
        if model.config.max_batch_size <= 1:
            yield model.name, f"dynamic_batching with max_batch_size {model.config.max_batch_size}"


@rule(
    "BATCH02", Severity.WARNING,
    "Pad requests to a few lengths and say which in the parameter candidate_buckets, or set allow_ragged_batch and let "
    "the model pad.",
    "triton-inference-server/server #6937, #8156",
)  # fmt: skip
def shapes_that_never_meet(repository: Repository, around: Surroundings) -> Found:
    """Dynamic batching is on, but Triton batches only requests of the same shape, and shapes vary freely."""
    for model in _batching(repository):
        free = [t.name for t in model.config.input if -1 in t.dims and not t.allow_ragged_batch]
        if model.config.max_batch_size > 1 and free and not model.buckets:
            yield model.name, f"{', '.join(free)} may have any length, without allow_ragged_batch"


@rule("BATCH03", Severity.ERROR, "Prefer sizes up to max_batch_size, or leave preferred_batch_size out.")
def preferred_beyond_the_most(repository: Repository, around: Surroundings) -> Found:
    """preferred_batch_size is above max_batch_size; Triton does not load the model."""
    for model in _batching(repository):
        most = model.config.max_batch_size
        beyond = [size for size in model.config.dynamic_batching.preferred_batch_size if size > most > 0]
        if beyond:
            yield model.name, f"preferred_batch_size {beyond}, max_batch_size {most}"


@rule(
    "BATCH04", Severity.WARNING, "Lower max_queue_delay_microseconds; at 0 batches still form while instances are busy."
)
def waits_too_long(repository: Repository, around: Surroundings) -> Found:
    """A queue holds requests back for company longer than a caller would wait."""
    limit = _LONG_DELAY_MS if around.deadline_ms is None else around.deadline_ms / 2
    for model in _batching(repository):
        delay = model.config.dynamic_batching.max_queue_delay_microseconds / 1e3
        if delay >= limit:
            yield model.name, f"max_queue_delay is {delay:g} ms; the limit here is {limit:g} ms"


@rule("BATCH05", Severity.INFO, "Add dynamic_batching { } if requests come at the same time.")
def batches_nobody_makes(repository: Repository, around: Surroundings) -> Found:
    """A model takes batches, but only callers make them; single requests run one by one."""
    for model in repository.models.values():
        config = model.config
        scheduled = any(
            config.HasField(name) for name in ("dynamic_batching", "sequence_batching", "ensemble_scheduling")
        )
        if config.max_batch_size > 1 and not scheduled and not config.model_transaction_policy.decoupled:
            yield model.name, f"max_batch_size is {config.max_batch_size}, without dynamic_batching"


@rule(
    "QUEUE01", Severity.WARNING, "Take the timeouts out (see QUEUE02), or give each step its share of the deadline.",
    "triton-inference-server/server #7512",
)  # fmt: skip
def timeouts_add_up(repository: Repository, around: Surroundings) -> Found:
    """The steps of an ensemble may each wait so long that together they pass the callers' deadline."""
    if around.deadline_ms is None:
        return
    for ensemble in repository.ensembles():
        steps = [repository.models.get(step.model_name) for step in ensemble.config.ensemble_scheduling.step]
        policies = [_policy(model) for model in steps if model is not None]
        fixed = [p.default_timeout_microseconds / 1e3 for p in policies if not p.allow_timeout_override]
        if sum(fixed) > around.deadline_ms:
            each = " + ".join(f"{ms:g}" for ms in fixed)
            yield (
                ensemble.name,
                f"its steps may wait {each} = {sum(fixed):g} ms, the deadline is {around.deadline_ms:g}",
            )


@rule(
    "QUEUE02", Severity.WARNING,
    "Take timeout, allow_timeout_override and max_queue_size out; callers' gRPC deadlines bound the wait as well.",
    "triton-inference-server/core: PriorityQueue, RateLimiter::PayloadSlotAvailable",
)  # fmt: skip
def requests_may_sleep(repository: Repository, around: Surroundings) -> Found:
    """A queue's policy forbids Triton to prepare the next batch while an instance works; a request that comes just when
    one has answered may then sleep for half a second."""
    for model in _batching(repository):
        policy = _policy(model)
        said = {
            "a timeout": policy.default_timeout_microseconds,
            "allow_timeout_override": policy.allow_timeout_override,
            "max_queue_size": policy.max_queue_size,
        }
        if any(said.values()):
            yield model.name, f"its queue has {', '.join(name for name, value in said.items() if value)}"


@rule(
    "QUEUE03", Severity.ERROR, "Take max_queue_size out of the step; callers' gRPC deadlines bound the wait.",
    "triton-inference-server/server #7512, triton-inference-server/core #466, #470",
)  # fmt: skip
def full_queue_within_an_ensemble(repository: Repository, around: Surroundings) -> Found:
    """A step of an ensemble has a largest queue; when it is full, callers of the ensemble may hang."""
    for name in sorted(repository.steps() & repository.models.keys()):
        if size := _policy(repository.models[name]).max_queue_size:
            yield name, f"max_queue_size is {size}, and it is a step of an ensemble"


@rule(
    "QUEUE04", Severity.WARNING, "Set timeout_action REJECT.", "triton-inference-server/server #6920, #7532"
)  # fmt: skip
def late_and_still_executed(repository: Repository, around: Surroundings) -> Found:
    """A request whose timeout has passed is put behind the others and executed all the same."""
    for model in _batching(repository):
        policy = _policy(model)
        delays = policy.timeout_action == pb.ModelQueuePolicy.DELAY
        if policy.default_timeout_microseconds and delays:
            yield model.name, f"timeout {policy.default_timeout_microseconds} µs with timeout_action DELAY"


def _batching(repository: Repository) -> Iterator[Model]:
    return (model for model in repository.models.values() if model.config.HasField("dynamic_batching"))


def _policy(model: Model) -> Any:
    return model.config.dynamic_batching.default_queue_policy
