"""The folder of releases: what is served, what was, what can go; and nothing half-done, whenever it is cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from trirank import contract
from trirank_build.cli import app
from trirank_build.errors import BadModel
from trirank_build.repository import store
from trirank_build.repository.release import MANIFEST, MODELS, load_manifest, recorded_requests, release_name, verify
from trirank_build.repository.store import (
    CURRENT,
    PROMOTIONS,
    assembling,
    current,
    diff,
    gc,
    in_use,
    promote,
    releases,
    rollback,
)
from typer.testing import CliRunner


def copy_of(release, folder, number):
    """Another release: the same but for one recorded request."""
    target = shutil.copytree(release, folder / f"making{number}")
    requests = json.loads((target / "requests.json").read_text())
    (target / "requests.json").write_text(json.dumps(requests[number:]))
    manifest = load_manifest(target)
    from trirank_build.artefacts import tree_digests

    manifest["files"] = {name: digest for name, digest in tree_digests(target).items() if name != MANIFEST}
    manifest["release"] = release_name(manifest["files"])
    (target / MANIFEST).write_text(json.dumps(manifest))
    os.utime(target, (1e9 + number, 1e9 + number))
    return target.rename(folder / manifest["release"])


@pytest.fixture
def four(world, tmp_path):
    return [copy_of(world.release, tmp_path, number) for number in range(1, 5)]


def test_a_release_is_as_it_was_assembled(world, four):
    assert [verify(release) for release in (world.release, *four)] == [[]] * 5


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: (r / "features" / "token_idf.npy").write_bytes(b"other"), "features/token_idf.npy has digest"),
        (lambda r: (r / MODELS / "ranker" / "1" / "model.onnx").unlink(), "models/ranker/1/model.onnx is missing"),
        (lambda r: (r / "notes.txt").write_text("hello"), "notes.txt does not belong to it"),
        (lambda r: (r / "MODEL_CARD.md").write_text("the best of all"), "MODEL_CARD.md has digest"),
    ],
)
def test_whatever_changed_is_named(four, harm, words):
    harm(four[0])
    assert any(words in problem for problem in verify(four[0]))
    with pytest.raises(BadModel, match="cannot be promoted: .*; assemble it again"):
        promote(four[0])
    assert current(four[0].parent) is None


def test_a_renamed_release_and_a_changed_manifest(four):
    manifest = load_manifest(four[0])
    (four[0] / MANIFEST).write_text(json.dumps(manifest | {"contract": 99, "release": "0" * 12}))
    problems = " ".join(verify(four[0]))
    assert f"contract is 99, this trirank speaks {contract.CONTRACT_VERSION}" in problems
    assert "release is '000000000000' in the manifest" in problems
    moved = four[1].rename(four[1].with_name("other"))
    assert verify(moved) == [f"its folder is named other, not {four[1].name}"]


def test_a_configuration_that_breaks_the_contract(four):
    path = four[0] / MODELS / "rerank" / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "scores"', 'name: "marks"'))
    problems = verify(four[0])
    assert "rerank: input marks is not of the contract" in problems
    assert "rerank: input scores is missing" in problems


def test_promotion_and_rollback(four):
    folder = four[0].parent
    for release in four[:3]:
        promote(release)
    assert current(folder) == four[2]
    assert rollback(folder) == four[1]
    assert rollback(folder) == four[0]  # one further back, not forward again
    with pytest.raises(BadModel, match="first release"):
        rollback(folder)
    assert current(folder) == four[0]
    promote(four[3])
    assert rollback(folder) == four[0]


def test_promoting_what_is_served_changes_nothing(four):
    folder = four[0].parent
    promote(four[0])
    promote(four[1])
    promote(four[1])
    assert rollback(folder) == four[0]


def test_rollback_to_what_is_gone_or_damaged(four):
    folder = four[0].parent
    with pytest.raises(BadModel, match="no current release"):
        rollback(folder)
    promote(four[0])
    promote(four[1])
    (four[0] / "items.parquet").write_bytes(b"")
    with pytest.raises(BadModel, match="cannot be served again: items.parquet"):
        rollback(folder)
    shutil.rmtree(four[0])
    with pytest.raises(BadModel, match=f"{four[0].name}, served before {four[1].name}, is gone"):
        rollback(folder)
    assert current(folder) == four[1]


@pytest.mark.parametrize("step", ["os.fsync", "Path.symlink_to", "os.replace"])
def test_a_promotion_cut_short_leaves_the_old_one(four, step, monkeypatch):
    folder = four[0].parent
    promote(four[0])

    def crash(*arguments, **more):
        raise KeyboardInterrupt

    where, name = step.split(".")
    monkeypatch.setattr({"os": os, "Path": type(folder)}[where], name, crash)
    with pytest.raises(KeyboardInterrupt):
        promote(four[1])
    monkeypatch.undo()
    assert current(folder) == four[0]
    assert verify(four[0]) == []
    promote(four[2])
    assert rollback(folder) == four[0]


def test_a_killed_promotion_leaves_one_or_the_other(four):
    """Processes that promote back and forth are killed at any point; the link is always whole."""
    folder = four[0].parent
    promote(four[0])
    code = (
        "import sys; from pathlib import Path; from trirank_build.repository.store import promote\n"
        "print(flush=True)\nwhile True:\n  for r in sys.argv[1:]: promote(Path(r))"
    )
    for pause in (0.003, 0.011, 0.027, 0.04):
        command = [sys.executable, "-c", code, str(four[1]), str(four[2])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert current(folder) in four[:3]
        assert verify(current(folder)) == []
    promote(four[3])  # the lock of a killed process is gone with it
    assert rollback(folder) in four[:3]


def test_a_line_cut_short_is_passed_over(four):
    folder = four[0].parent
    promote(four[0])
    with (folder / PROMOTIONS).open("a") as stream:
        stream.write('{"release": "half')
    promote(four[1])
    assert rollback(folder) == four[0]


def test_old_ones_go_and_what_is_needed_stays(four):
    folder = four[0].parent
    promote(four[0])
    (folder / "notes").mkdir()
    with in_use(four[1]):
        assert [each.in_use for each in releases(folder) if each.name == four[1].name] == [True]
        assert gc(folder, keep=1, dry_run=True) == [four[3].name, four[2].name]
        assert all(release.is_dir() for release in four)
        gc(folder, keep=1)
    assert [release.is_dir() for release in four] == [True, True, False, False]
    assert gc(folder, keep=1) == [four[1].name]
    assert current(folder) == four[0]
    assert (folder / "notes").is_dir()
    assert not list(folder.glob(".removing.*"))


def test_what_differs(four):
    found = {name: (one, other) for name, one, other in diff(*map(load_manifest, four[:2]))}
    assert set(found) == {"release", "files.requests.json"}
    assert found["release"] == (four[0].name, four[1].name)
    assert all(len(digest) == 12 for digest in found["files.requests.json"])


def test_by_command(four):
    folder, run = four[0].parent, CliRunner().invoke
    assert run(app, ["release", "promote", str(four[0])]).exit_code == 0
    assert run(app, ["release", "promote", str(four[1])]).exit_code == 0
    assert four[0].name in run(app, ["release", "rollback", str(folder)]).output
    listed = json.loads(run(app, ["release", "list", str(folder), "--json"]).output)
    assert [row["release"] for row in listed if row["current"]] == [four[0].name]
    assert four[0].name in run(app, ["release", "list", str(folder)]).output
    assert "Ranker" in run(app, ["release", "show", str(four[0])]).output
    assert json.loads(run(app, ["release", "show", str(four[0]), "--json"]).output)["release"] == four[0].name
    assert run(app, ["release", "verify", str(four[0])]).exit_code == 0
    assert "files.requests.json" in run(app, ["release", "diff", str(four[0]), str(four[1])]).output
    assert "would remove 2" in run(app, ["release", "gc", str(folder), "--keep", "2", "--dry-run"]).output
    (four[0] / "items.parquet").write_bytes(b"")
    assert run(app, ["release", "verify", str(four[0])]).exit_code == 1


@pytest.mark.parametrize("command", [["list"], ["rollback"], ["gc"]])
def test_no_folder_of_releases(tmp_path, command):
    done = CliRunner().invoke(app, ["release", *command, str(tmp_path / "nowhere")])
    assert isinstance(done.exception, BadModel)
    assert "is no folder of releases" in str(done.exception)


def test_the_link_is_relative(four):
    assert os.readlink(promote(four[0])) == four[0].name
    assert (four[0].parent / CURRENT).resolve() == four[0]
    assert store.current(four[0].parent / "nowhere") is None


def test_going_back_never_goes_round_in_a_circle(four):
    """Promote C, A, B, A: what was served before A is B, before that A, before that C."""
    folder, (a, b, c, _) = four[0].parent, four
    for release in (c, a, b, a):
        promote(release)
    assert [rollback(folder).name for _ in range(3)] == [b.name, a.name, c.name]
    with pytest.raises(BadModel, match="first release"):
        rollback(folder)
    promote(b)
    assert rollback(folder) == c


def test_a_rollback_cut_short_is_done_again(four, monkeypatch):
    folder = four[0].parent
    for release in four[:3]:
        promote(release)

    def crash(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(folder), "symlink_to", crash)
    with pytest.raises(KeyboardInterrupt):
        rollback(folder)
    monkeypatch.undo()
    assert current(folder) == four[2]
    promote(four[3])
    assert [rollback(folder).name for _ in range(3)] == [four[2].name, four[1].name, four[0].name]


def test_an_assembly_that_takes_long_is_left_alone(four):
    folder = four[0].parent
    with assembling(folder) as scratch:
        (scratch / "half").write_text("")
        os.utime(scratch, (0, 0))
        gc(folder, keep=10)
        assert (scratch / "half").is_file()
    dead = folder / ".assembling.dead"
    dead.mkdir()
    os.utime(dead, (0, 0))
    gc(folder, keep=10)
    assert not dead.exists()


def test_recorded_requests_that_are_gone_or_damaged_are_named(four):
    (four[0] / "requests.json").write_text('[{"item_ids"')
    with pytest.raises(BadModel, match="requests.json cannot be read"):
        recorded_requests(four[0])
    (four[0] / "requests.json").unlink()
    with pytest.raises(BadModel, match="requests.json cannot be read"):
        recorded_requests(four[0])
