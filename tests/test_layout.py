"""The layout keeps its promises: dependencies point one way, the client is light, everything is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "trirank": ROOT / "client",
    "trirank_backend": ROOT / "python_backend",
    "trirank_build": ROOT / "build_tools",
    "trirank_loadtest": ROOT / "loadtest",
}
MAY_IMPORT = {
    "trirank": set(),
    "trirank_backend": {"trirank"},
    "trirank_build": {"trirank", "trirank_backend", "trirank_loadtest"},
    "trirank_loadtest": {"trirank"},
}
FILES = [
    pytest.param(package, path, id=path.relative_to(ROOT).as_posix())
    for package, folder in PACKAGES.items()
    for path in sorted((folder / package).rglob("*.py"))
    if "model_repository" not in path.parts
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(("package", "path"), FILES)
def test_dependencies_point_one_way(package, path):
    ours = imported(path) & set(PACKAGES) - {package}
    assert ours <= MAY_IMPORT[package]


def test_no_room_of_the_build_tools_is_in_a_circle():
    """Rooms are the packages and modules right below trirank_build; imports within functions count as well."""
    root = PACKAGES["trirank_build"] / "trirank_build"
    needs: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room == "model_repository":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, _, rest = name.partition(".")
                if package == "trirank_build" and rest:
                    needs.setdefault(room, set()).add(rest.split(".")[0])
    waiting = {room: others - {room} for room, others in needs.items()}
    assert len(waiting) > 10
    while free := [room for room, others in waiting.items() if not others & waiting.keys()]:
        for room in free:
            del waiting[room]
    assert waiting == {}


@pytest.mark.parametrize(("package", "path"), FILES)
def test_every_module_says_what_it_is_for(package, path):
    assert path.stat().st_size == 0 or ast.get_docstring(ast.parse(path.read_text()))


def test_the_client_is_light():
    heavy = ["torch", "onnx", "onnxruntime", "locust", "typer", "polars", "tokenizers", "pydantic", "rich"]
    code = f"import sys, trirank; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_answers_for_help_without_loading_torch():
    code = "import sys, trirank_build.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_wheel_holds_all_that_serving_needs(tmp_path):
    import zipfile

    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("trirank-*.whl"))).namelist()
    for stage in ("preprocess", "ranker", "rerank", "single"):
        assert f"trirank_build/model_repository/{stage}/1/model.py" in names
    assert {"trirank/py.typed", "trirank_loadtest/user.py", "trirank_build/recipes/shop.toml"} <= set(names)


def test_model_files_are_a_few_lines():
    for path in (ROOT / "model_repository").rglob("model.py"):
        assert len(path.read_text().splitlines()) <= 25, path
