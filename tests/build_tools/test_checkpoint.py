"""Checkpoints carry weights and nothing that runs."""

from __future__ import annotations

import pickle

import pytest
import torch
from trirank_build.errors import BadCheckpoint
from trirank_build.models.checkpoint import load_checkpoint, load_weights, save_checkpoint

WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def test_there_and_back(tmp_path):
    save_checkpoint(tmp_path / "c.safetensors", WEIGHTS, {"epoch": 3})
    tensors, description = load_checkpoint(tmp_path / "c.safetensors")
    assert description == {"epoch": 3}
    assert torch.equal(tensors["weight"], WEIGHTS["weight"])


def test_plain_torch_weights(tmp_path):
    torch.save(WEIGHTS, tmp_path / "c.pt")
    assert set(load_checkpoint(tmp_path / "c.pt")[0]) == set(WEIGHTS)


class Evil:
    def __reduce__(self):
        return (print, ("gotcha",))


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_a_pickle_is_not_opened(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadCheckpoint, match="safetensors"):
        load_checkpoint(tmp_path / name)
    assert "gotcha" not in capsys.readouterr().out


def test_a_whole_module_is_not_opened(tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "c.pt")
    with pytest.raises(BadCheckpoint, match="can run code"):
        load_checkpoint(tmp_path / "c.pt")


def test_something_else_than_weights(tmp_path):
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(BadCheckpoint, match="no state_dict"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_a_truncated_checkpoint(tmp_path, keep):
    save_checkpoint(tmp_path / "c.safetensors", WEIGHTS, {})
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:keep])
    with pytest.raises(BadCheckpoint, match="no whole safetensors"):
        load_checkpoint(tmp_path / "c.safetensors")


def test_none_at_all(tmp_path):
    with pytest.raises(BadCheckpoint, match="is no file"):
        load_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.ones(2, 3)}, "lacks bias"),
        (WEIGHTS | {"more": torch.ones(1)}, "extra more"),
        (WEIGHTS | {"bias": torch.ones(5)}, r"bias of shape \[5\], the model \[2\]"),
    ],
)
def test_weights_of_another_model(tmp_path, tensors, words):
    with pytest.raises(BadCheckpoint, match=words):
        load_weights(torch.nn.Linear(3, 2), tensors, tmp_path)
