"""Rules about what a repository needs of its machine, and about its caches."""

from __future__ import annotations

from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Repository, Surroundings
from trirank_build.engines.plan import compute_capability, load_plan_manifest, manifest_path
from trirank_build.errors import BadModel

_PERSONAL = ("user", "session", "customer", "visitor", "member", "account", "history")
_GPU = pb.ModelInstanceGroup.KIND_GPU


@rule("RES01", Severity.WARNING, "Fewer instances: those that work at a time should fit the cores.")
def more_instances_than_cores(repository: Repository, around: Surroundings) -> Found:
    """Far more instances work on the CPU than there are cores; they take turns and lose their caches."""
    on_cpu = {m.name: m.instances for m in repository.models.values() if pb.ModelInstanceGroup.KIND_CPU in m.kinds}
    total = sum(on_cpu.values())
    if total > 2 * around.cores + len(on_cpu):  # a single instance a model is no choice
        each = ", ".join(f"{name} {count}" for name, count in on_cpu.items())
        yield "repository", f"{total} instances on {around.cores} cores: {each}"


@rule(
    "RES02", Severity.ERROR, "Give the container --shm-size, or lower max_batch_size.",
    "triton-inference-server/server #5681, #7481",
)  # fmt: skip
def shared_memory_too_small(repository: Repository, around: Surroundings) -> Found:
    """A full batch of a Python model does not fit into shared memory, through which its tensors go."""
    for model in repository.models.values():
        if model.backend == "python" and around.shared_memory is not None:
            needed = model.largest_bytes() * model.instances
            if needed > around.shared_memory:
                free = around.shared_memory >> 20
                yield model.name, f"a full batch takes {needed >> 20} MiB, /dev/shm has {free} MiB free"


@rule(
    "RES03", Severity.WARNING, "Set the parameters intra_op_thread_count and inter_op_thread_count.",
    "triton-inference-server/onnxruntime_backend, “Thread options”",
)  # fmt: skip
def threads_of_every_instance(repository: Repository, around: Surroundings) -> Found:
    """Several ONNX Runtime instances on the CPU, each of which starts a thread a core."""
    for model in repository.models.values():
        several_on_cpu = model.kinds == {pb.ModelInstanceGroup.KIND_CPU} and model.instances > 1
        told = "intra_op_thread_count" in model.config.parameters
        if model.backend == "onnxruntime" and several_on_cpu and not told:
            yield model.name, f"{model.instances} instances, {around.cores} cores, no thread count"


@rule("RES04", Severity.INFO, "Add model_warmup with one sample of each shape that callers send.")
def first_caller_waits(repository: Repository, around: Surroundings) -> Found:
    """A model on a GPU has no warm-up, so the first callers wait for what its runtime prepares late."""
    for model in repository.models.values():
        on_gpu = model.backend == "tensorrt" or (model.backend in ("onnxruntime", "pytorch") and _GPU in model.kinds)
        if on_gpu and not model.config.model_warmup:
            yield model.name, f"{model.backend} without model_warmup"


@rule("RES05", Severity.WARNING, "Take response_cache out where an answer is one person's.")
def cache_of_personal_answers(repository: Repository, around: Surroundings) -> Found:
    """Answers that depend on a person are cached: hardly ever asked for again, and kept beyond the call."""
    for model in repository.models.values():
        personal = [t.name for t in model.config.input if any(word in t.name.lower() for word in _PERSONAL)]
        if model.config.response_cache.enable and personal:
            yield model.name, f"response_cache is on, and it takes {', '.join(personal)}"


@rule("RES06", Severity.ERROR, "Serve it where there is a GPU, or set KIND_CPU.")
def no_gpu(repository: Repository, around: Surroundings) -> Found:
    """A model asks for a GPU, and there is none here."""
    for model in repository.models.values():
        if (_GPU in model.kinds or model.backend == "tensorrt") and not around.machine.sms:
            yield model.name, "it asks for a GPU, and nvidia-smi finds none"


@rule(
    "RES07", Severity.ERROR, "Build a plan for this GPU and name it in cc_model_filenames.",
    "NVIDIA/TensorRT #3130, #7613",
)  # fmt: skip
def plan_of_another_gpu(repository: Repository, around: Surroundings) -> Found:
    """No plan of a TensorRT model was built for the GPU that is here."""
    for model in repository.models.values():
        if model.backend != "tensorrt":
            continue
        named = model.config.cc_model_filenames
        for sm in dict.fromkeys(around.machine.sms):
            capability = compute_capability(sm)
            default = model.config.default_model_filename or "model.plan"
            there = any((version / default).exists() for version in model.versions)
            if named and capability not in named and not there:
                yield model.name, f"cc_model_filenames has {', '.join(sorted(named))}, the GPU is {capability}"


@rule("RES08", Severity.ERROR, "Build with the flavour tensorrt, on the GPU and TensorRT that will serve it.")
def plan_that_triton_cannot_load(repository: Repository, around: Surroundings) -> Found:
    """A plan's manifest says that Triton here cannot load it: another flavour, version or CUDA, or changed bytes."""
    for model in repository.models.values():
        if model.backend != "tensorrt":
            continue
        for plan in sorted(path for version in model.versions for path in version.glob("*.plan")):
            if not manifest_path(plan).is_file():
                continue
            try:
                manifest = load_plan_manifest(plan)
            except BadModel as error:
                yield model.name, str(error)
                continue
            version = around.machine.tensorrt
            if manifest.flavour != "tensorrt":
                yield model.name, f"{plan.name} is of {manifest.flavour}, which Triton's backend cannot load"
            elif version and not manifest.same_version(version):
                yield model.name, f"{plan.name} is of TensorRT {manifest.version}, the server has {version}"
