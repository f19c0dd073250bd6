"""Signatures of releases: Ed25519 over the manifest, which has the digests of all files.

A server that was told whom to trust takes nothing else, so that whoever can write to the folder of releases, and has no
key, cannot have models of their own run there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from trirank_build.artefacts import atomic_file
from trirank_build.errors import BadModel, BadUsage
from trirank_build.repository.release import MANIFEST, SIGNATURE
from trirank_build.repository.store import refuse_damaged


def make_key(file: Path) -> Path:
    """Write a new private key for its owner alone, and its public half beside it; gives the latter.

    Raises:
        BadUsage: one of them is there.
    """
    public = file.with_name(f"{file.name}.pub")
    for path in (file, public):
        if path.exists():
            raise BadUsage(f"{path} is there already; releases signed with it could not be verified any more")
    key = Ed25519PrivateKey.generate()
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public


def sign(release: Path, file: Path) -> str:
    """Sign a release that is as it was assembled; gives the key's fingerprint.

    Raises:
        BadUsage: the file is no private key of Ed25519.
        BadModel: the release is damaged, or none.
    """
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise BadUsage(f"--key {file} is no PEM of a private key without a password ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadUsage(f"--key {file} is no Ed25519 key; make one with `trirank release key {file}`")
    refuse_damaged(release, "signed")
    signature = key.sign((release / MANIFEST).read_bytes())
    told = {"key": _fingerprint(key.public_key()), "signature": base64.b64encode(signature).decode()}
    with atomic_file(release / SIGNATURE) as scratch:
        scratch.write_text(json.dumps(told) + "\n")
    return told["key"]


def read_public_key(file: Path) -> Ed25519PublicKey:
    """A key that signatures are verified with.

    Raises:
        BadUsage: the file is none.
    """
    try:
        key = load_pem_public_key(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BadUsage(f"{file} is no PEM of a public key ({error}); `trirank release key` writes one") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadUsage(f"{file} is no Ed25519 key; `trirank release key` writes one")
    return key


def refuse_untrusted(release: Path, trusted: list[Ed25519PublicKey]) -> None:
    """Raises BadModel unless one of these keys has signed the release's manifest. That its files are those of the
    manifest is another question (store.refuse_damaged)."""
    file = release / SIGNATURE
    try:
        told = json.loads(file.read_text())
        key, signature = str(told["key"]), base64.b64decode(told["signature"], validate=True)
    except FileNotFoundError:
        raise BadModel(f"{release} is not signed; sign it with `trirank release sign`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(f"{file} is no signature ({error}); sign the release again") from None
    own = [each for each in trusted if _fingerprint(each) == key]
    if not own:
        raise BadModel(f"{file}: key {key} is none that is trusted here ({', '.join(map(_fingerprint, trusted))})")
    try:
        own[0].verify(signature, (release / MANIFEST).read_bytes())
    except InvalidSignature:
        raise BadModel(
            f"{file}: signature is not of this {MANIFEST}, which has been changed since it was signed"
        ) from None
    except OSError as error:
        raise BadModel(f"{release / MANIFEST} cannot be read ({error.strerror}); assemble again") from None


def _fingerprint(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]
