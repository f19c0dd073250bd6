"""The documents tell the truth: figures, commands, links."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from trirank import stable_id

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCKS = [
    pytest.param(path, block, id=f"{path.name}-{at}")
    for path in DOCUMENTS
    for at, block in enumerate(re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text(), re.DOTALL))
]


def test_every_figure_is_what_a_benchmark_wrote():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_have_the_documented_form(path):
    raw = json.loads(path.read_text())
    assert raw["benchmark"] == path.stem
    assert raw["machine"]["cores"] > 0
    for figure in raw["figures"]:
        assert figure["low"] <= figure["value"] <= figure["high"], figure["name"]


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_commands_exist_with_their_options(path, block):
    command = typer.main.get_command(__import__("trirank_build.cli", fromlist=["app"]).app)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        while words and words[0] != "trirank" and words[0] != "docker":
            words.pop(0)
        if not words or words[0] == "docker":
            continue
        found = command
        for word in words[1:]:
            if not hasattr(found, "commands"):
                break
            assert word in found.commands, line
            found = found.commands[word]
        known = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_environment_variables_are_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    names = set()
    for folder in ("client", "python_backend", "build_tools", "loadtest", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(re.findall(r'"(TRIRANK_[A-Z_]+)"', path.read_text()))
    assert names
    assert {name for name in names if f"`{name}`" not in readme} == set()


def test_the_hash_of_strings_is_documented_with_true_examples():
    text = (ROOT / "docs" / "data.md").read_text()
    examples = re.findall(r"^\| `([^`]+)` \| (\d{10,}) \|$", text, re.MULTILINE)
    assert len(examples) == 3
    assert [stable_id(key) for key, _ in examples] == [int(number) for _, number in examples]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_find_what_they_import(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
