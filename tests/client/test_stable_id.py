"""The hash of text ids, in the languages that other services are written in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from trirank import stable_id

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"
TEXTS = ["SKU-1", "Größe 42", "灯", "", "x" * 127, "x" * 128, "x" * 129, "ä" * 300]


@pytest.mark.parametrize(
    "command",
    [
        ["node", EXAMPLES / "stable_id.mjs"],
        ["go", "run", EXAMPLES / "stable_id.go"],
        ["java", "-Dfile.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8", EXAMPLES / "StableId.java"],
    ],
    ids=["javascript", "go", "java"],
)
def test_other_languages_hash_alike(command, tmp_path):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not here")
    environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(tmp_path), "LC_ALL": "C.UTF-8"}
    done = subprocess.run([*map(str, command), *TEXTS], capture_output=True, text=True, check=True, env=environment)
    assert [int(line) for line in done.stdout.split()] == [stable_id(text) for text in TEXTS]
