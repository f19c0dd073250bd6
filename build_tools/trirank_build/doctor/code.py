"""Rules about the code of Python models, read and not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Model, Repository, Surroundings

_OPENS = {
    "InferenceSession", "Thread", "Process", "Pool", "ThreadPoolExecutor", "ProcessPoolExecutor", "connect", "Redis",
    "StrictRedis", "InferenceServerClient", "compile_model", "from_pretrained", "Session",
}  # fmt: skip
"""Last part of the name of what starts threads, opens a store or loads a model."""


@rule("CODE01", Severity.ERROR, "Define class TritonPythonModel with a method execute(self, requests).")
def no_model_class(repository: Repository, around: Surroundings) -> Found:
    """model.py is no Python, or has no TritonPythonModel.execute."""
    for model, place, tree in _sources(repository):
        if isinstance(tree, SyntaxError):
            yield model.name, f"{place} line {tree.lineno}: {tree.msg}"
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel"]
        imported = any(
            alias.asname == "TritonPythonModel" or alias.name == "TritonPythonModel"
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        )
        inherits = any(class_.bases for class_ in classes)
        methods = {node.name for class_ in classes for node in class_.body if isinstance(node, _FUNCTIONS)}
        if not imported and not inherits and "execute" not in methods:
            yield model.name, f"{place} has no TritonPythonModel.execute"


@rule(
    "CODE02", Severity.WARNING, "Open it in initialize; the module is imported before the stub is what it will be.",
    "triton-inference-server/server #7690, #4776",
)  # fmt: skip
def opened_at_import(repository: Repository, around: Surroundings) -> Found:
    """model.py starts threads, opens a store or loads a model when it is imported; threads and forks do not mix."""
    for model, place, tree in _modules(repository):
        for node in tree.body:
            if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                continue
            for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
                if _last_name(call.func) in _OPENS:
                    yield model.name, f"{place} line {call.lineno}: {ast.unparse(call.func)}"


@rule(
    "CODE03", Severity.INFO, "Make the models steps of an ensemble, if their order does not depend on answers.",
    "triton-inference-server/server #7622",
)  # fmt: skip
def calls_other_models(repository: Repository, around: Surroundings) -> Found:
    """model.py calls other models itself (BLS), which costs more a hop than an ensemble."""
    for model, place, tree in _modules(repository):
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        asks = [call for call in calls if _last_name(call.func) == "InferenceRequest"]
        if asks:
            yield model.name, f"{place} line {asks[0].lineno}: InferenceRequest"


@rule(
    "CODE04",
    Severity.INFO,
    "Say pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG), or the code that fits.",
)
def errors_without_a_code(repository: Repository, around: Surroundings) -> Found:
    """model.py answers errors without a code; callers see INTERNAL, and retry what can never succeed."""
    for model, place, tree in _modules(repository):
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if _last_name(call.func) == "TritonError" and len(call.args) + len(call.keywords) < 2:
                yield model.name, f"{place} line {call.lineno}: {ast.unparse(call)}"


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _modules(repository: Repository) -> Iterator[tuple[Model, str, ast.Module]]:
    """Those that are Python; CODE01 tells of the others."""
    for model, place, tree in _sources(repository):
        if isinstance(tree, ast.Module):
            yield model, place, tree


def _sources(repository: Repository) -> Iterator[tuple[Model, str, ast.Module | SyntaxError]]:
    for model in repository.models.values():
        if model.backend == "python":
            for version in model.versions:
                path = version / (model.config.default_model_filename or "model.py")
                if path.is_file():
                    yield model, f"{version.name}/{path.name}", _parsed(path)


def _parsed(path: Path) -> ast.Module | SyntaxError:
    try:
        return ast.parse(path.read_text(errors="replace"))
    except SyntaxError as error:
        return error


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
