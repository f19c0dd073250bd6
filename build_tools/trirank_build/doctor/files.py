"""Rules about the files of a repository."""

from __future__ import annotations

import stat
from pathlib import Path

from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Model, Repository, Surroundings

_FILES = {
    "python": "model.py", "onnxruntime": "model.onnx", "tensorrt": "model.plan", "pytorch": "model.pt",
    "openvino": "model.xml",
}  # fmt: skip
_COMPLETED = {"onnxruntime", "tensorrt", "tensorflow", "openvino"}
"""Backends whose models tell Triton their inputs and outputs, so that it needs no configuration."""
_ONNX_TYPES = {
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 4: "TYPE_UINT16", 5: "TYPE_INT16", 6: "TYPE_INT32",
    7: "TYPE_INT64", 8: "TYPE_STRING", 9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 12: "TYPE_UINT32",
    13: "TYPE_UINT64", 16: "TYPE_BF16",
}  # fmt: skip


@rule("FILE01", Severity.ERROR, "Mend the line that the reason names; the fields are those of Triton's ModelConfig.")
def config_cannot_be_read(repository: Repository, around: Surroundings) -> Found:
    """config.pbtxt is no ModelConfig; Triton does not load the model."""
    for model in repository.models.values():
        if model.problem:
            yield model.name, f"config.pbtxt: {model.problem}"


@rule("FILE02", Severity.ERROR, "Name both alike, or leave the name out of config.pbtxt.")
def name_is_not_the_folders(repository: Repository, around: Surroundings) -> Found:
    """The name in config.pbtxt is not the folder's; Triton does not load the model."""
    for model in repository.models.values():
        if model.config.name and model.config.name != model.name:
            yield model.name, f"config.pbtxt says name {model.config.name!r}, the folder is {model.name!r}"


@rule("FILE03", Severity.ERROR, "Put the model's files into a folder 1; an ensemble needs an empty one.")
def no_version(repository: Repository, around: Surroundings) -> Found:
    """A model has no version folder; Triton does not load it."""
    for model in repository.models.values():
        if model.folder is not None and not model.versions:
            yield model.name, f"{model.folder} has no folder named by a number"


@rule("FILE04", Severity.ERROR, "Put the file there, or name the one that is there in default_model_filename.")
def no_model_file(repository: Repository, around: Surroundings) -> Found:
    """A version lacks the file that its backend loads."""
    for model in repository.models.values():
        for version in _served(model):
            wanted = _wanted(model)
            if wanted and not any((version / name).exists() for name in wanted):
                yield model.name, f"version {version.name} has none of {', '.join(wanted)}, which {model.backend} loads"


@rule("FILE05", Severity.ERROR, "Name versions that there are, or say latest.")
def version_policy_names_none(repository: Repository, around: Surroundings) -> Found:
    """version_policy names a version that is not there."""
    for model in repository.models.values():
        there = {int(path.name) for path in model.versions}
        missing = set(model.config.version_policy.specific.versions) - there
        if model.folder is not None and missing:
            yield model.name, f"version_policy names {sorted(missing)}, there are {sorted(there)}"


@rule("FILE06", Severity.ERROR, "Write the configuration that the graph has, or export the graph again.")
def graph_is_another(repository: Repository, around: Surroundings) -> Found:
    """An ONNX graph has other inputs or outputs than config.pbtxt declares."""
    for model in repository.models.values():
        if model.backend == "onnxruntime" and model.described:
            for version in _served(model):
                for name in _wanted(model):
                    if (version / name).is_file():
                        yield from ((model.name, problem) for problem in _onnx_problems(model, version / name))


@rule("FILE07", Severity.WARNING, "chmod o-w; who can write a repository can run code in the server.")
def writable_by_all(repository: Repository, around: Surroundings) -> Found:
    """Anybody on the machine may change what is served."""
    if repository.folder is None:
        return
    for path in (repository.folder, *(model.folder for model in repository.models.values())):
        if path is not None and path.stat().st_mode & stat.S_IWOTH:
            yield path.name, f"{path} may be written by everybody (mode {stat.filemode(path.stat().st_mode)})"


@rule("FILE08", Severity.ERROR, "Write a config.pbtxt with backend, inputs and outputs.")
def nothing_says_what_runs_it(repository: Repository, around: Surroundings) -> Found:
    """Neither config.pbtxt nor a file's name says which backend runs a model, or what it takes."""
    for model in repository.models.values():
        if model.problem or model.folder is None:
            continue
        names = {path.name for version in model.versions for path in version.iterdir()}
        guessed = [backend for backend, file in _FILES.items() if file in names]
        backend = model.backend or (guessed[0] if guessed else "")
        if not backend:
            yield model.name, "config.pbtxt names no backend or platform, and no file has a name that tells"
        elif backend == "pytorch" and not model.described:
            yield model.name, f"{backend} models do not tell their inputs and outputs, and config.pbtxt does not either"


def _served(model: Model) -> list[Path]:
    """The version folders that Triton loads by the model's policy."""
    policy = model.config.version_policy
    if policy.HasField("all"):
        return model.versions
    if policy.HasField("specific"):
        return [path for path in model.versions if int(path.name) in policy.specific.versions]
    return model.versions[-max(1, policy.latest.num_versions) :]


def _wanted(model: Model) -> list[str]:
    config = model.config
    if config.cc_model_filenames:
        return list(config.cc_model_filenames.values())
    default = _FILES.get(model.backend, "")
    return [name for name in (config.default_model_filename or default,) if name]


def _onnx_problems(model: Model, path: Path) -> list[str]:
    try:
        import onnx
    except ImportError:  # a serving machine has no need of it
        return []
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, OSError, ValueError) as error:
        return [f"{path.name} cannot be read: {error}"]
    constants = {tensor.name for tensor in graph.initializer}
    problems = []
    for kind, declared, values in (
        ("input", model.config.input, [v for v in graph.input if v.name not in constants]),
        ("output", model.config.output, list(graph.output)),
    ):
        found = {value.name: value.type.tensor_type for value in values}
        for tensor in declared:
            if tensor.name not in found:
                problems.append(f"{kind} {tensor.name} is not in {path.name}, which has {', '.join(sorted(found))}")
                continue
            kind_of = _ONNX_TYPES.get(found[tensor.name].elem_type, "?")
            if kind_of != pb.DataType.Name(tensor.data_type):
                problems.append(
                    f"{kind} {tensor.name} is {pb.DataType.Name(tensor.data_type)}, {kind_of} in {path.name}"
                )
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in found[tensor.name].shape.dim]
            own = model.shape(tensor)
            if not tensor.HasField("reshape") and not fits(own, dims):
                problems.append(f"{kind} {tensor.name} has shape {own} with its batch, {dims} in {path.name}")
        if kind == "input" and (missing := found.keys() - {tensor.name for tensor in declared}):
            problems.append(f"{path.name} takes {', '.join(sorted(missing))}, which config.pbtxt does not declare")
    return problems


def fits(one: list[int], other: list[int]) -> bool:
    """Whether two shapes can be the same, -1 being any length."""
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))
