"""Signatures of releases, and their bills of materials."""

from __future__ import annotations

import json
import shutil
from importlib import metadata

import pytest
from test_cli import trirank
from trirank_build.errors import BadModel, BadUsage
from trirank_build.repository.release import COMPONENTS, MANIFEST, SIGNATURE, load_manifest, verify
from trirank_build.repository.signing import make_key, read_public_key, refuse_untrusted, sign
from trirank_build.repository.store import promote
from trirank_build.serving.following import serve
from trirank_build.serving.ports import Ports


@pytest.fixture
def release(world, tmp_path):
    return shutil.copytree(world.release, tmp_path / "releases" / world.release.name)


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "key.pem", make_key(tmp_path / "key.pem")


def test_a_signed_release(release, keys):
    private, public = keys
    assert private.stat().st_mode & 0o777 == 0o600
    fingerprint = sign(release, private)
    assert verify(release) == []
    refuse_untrusted(release, [read_public_key(public)])
    assert fingerprint in (release / SIGNATURE).read_text()
    assert "is as it was assembled" in trirank("release", "verify", release, "--trust", public).stdout
    promote(release)  # a signature changes nothing else


def of_another_key(release, private, tmp_path):
    make_key(tmp_path / "other")
    sign(release, tmp_path / "other")


def changed_after(release, private, tmp_path):
    sign(release, private)
    manifest = load_manifest(release)
    (release / MANIFEST).write_text(json.dumps(manifest | {"metrics": {"valid_ndcg10": 1.0}}))


def forged(release, private, tmp_path):
    """Another one's signature under the name of the key that is trusted."""
    sign(release, private)
    told = json.loads((release / SIGNATURE).read_text())
    of_another_key(release, private, tmp_path)
    other = json.loads((release / SIGNATURE).read_text())
    (release / SIGNATURE).write_text(json.dumps(other | {"key": told["key"]}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda *_: None, "is not signed; sign it with"),
        (of_another_key, "is none that is trusted here"),
        (changed_after, "has been changed since it was signed"),
        (forged, "has been changed since it was signed"),
        (lambda release, *_: (release / SIGNATURE).write_text("rubbish"), "is no signature"),
        (lambda release, *_: (release / SIGNATURE).write_text('{"key": 1, "signature": "?"}'), "is no signature"),
    ],
)
def test_what_is_not_trusted_is_not_served(release, keys, tmp_path, harm, words):
    private, public = keys
    harm(release, private, tmp_path)
    with pytest.raises(BadModel, match=words):
        refuse_untrusted(release, [read_public_key(public)])
    with pytest.raises(BadModel, match=words):
        serve(release, Ports(), follow=False, addresses=None, trusted=[public])


def test_a_file_that_was_changed_is_found_by_its_digest(release, keys):
    private, public = keys
    sign(release, private)
    (release / "requests.json").write_text("[]")
    refuse_untrusted(release, [read_public_key(public)])  # the manifest is as it was signed,
    with pytest.raises(BadModel, match="requests.json has digest"):  # and says what the file was
        serve(release, Ports(), follow=False, addresses=None, trusted=[public])


def test_keys_that_are_none(release, keys, tmp_path):
    private, public = keys
    for path, words in ((public, "no PEM of a private key"), (tmp_path / "none", "No such file")):
        with pytest.raises(BadUsage, match=words):
            sign(release, path)
    with pytest.raises(BadUsage, match="no PEM of a public key"):
        read_public_key(private)
    with pytest.raises(BadUsage, match="is there already"):
        make_key(private)
    assert not (release / SIGNATURE).exists()
    (release / "requests.json").write_text("[]")
    with pytest.raises(BadModel, match="cannot be signed"):
        sign(release, private)


def test_a_bill_of_materials(world):
    text = (world.release / COMPONENTS).read_text()
    bom = json.loads(text)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    found = {part["name"]: part["version"] for part in bom["components"]}
    for name in ("trirank", "torch", "numpy", "onnx", "tritonclient", "nvidia-pytriton"):
        assert found[name] == metadata.version(name)
    manifest = load_manifest(world.release)
    assert manifest["files"][COMPONENTS]
    assert bom["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": manifest["onnx"]}]
    (needs,) = (each["dependsOn"] for each in bom["dependencies"] if each["ref"].startswith("pkg:pypi/trirank@"))
    assert any(other.startswith("pkg:pypi/numpy@") for other in needs)
