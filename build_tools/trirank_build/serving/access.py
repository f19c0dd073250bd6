"""Who may ask a server what: certificates, callers' tokens, and which of Triton's interfaces are open."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from trirank import RankClient, Tls
from trirank_backend.callers import digest, read_tokens
from trirank_backend.errors import InvalidTokens
from trirank_backend.surroundings import OWN_TOKEN_VARIABLE, TOKENS_VARIABLE

from trirank_build.artefacts import atomic_file
from trirank_build.errors import ServeError

INTERFACES = ("shared-memory", "trace", "logging", "statistics")
"""Of Triton, beside inference, health and metadata. The first three are nothing that a caller of ours needs: through
them a caller reads and writes memory and files of the server (docs/security.md)."""


@dataclass(frozen=True)
class Certificates:
    """PEM files of a server.

    Attributes:
        cert, key: its certificate, with those in between, and the key to it.
        client_ca: whose certificates callers must have; None: callers need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Raises ServeError, with the option at fault, for files that no server could use."""
        now = datetime.now(timezone.utc)
        if self.name() is None:
            raise ServeError(
                f"--tls-cert {self.cert} names no host (subjectAltName), so no caller would take it; issue another"
            )
        chain = _certificates("--tls-cert", self.cert)
        try:
            key = load_pem_private_key(self.key.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ServeError(f"--tls-key {self.key} is no PEM of a key without a password ({error})") from None
        as_bytes = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if key.public_key().public_bytes(*as_bytes) != chain[0].public_key().public_bytes(*as_bytes):
            raise ServeError(
                f"--tls-key {self.key} does not belong to --tls-cert {self.cert}; give the key that it was made with"
            )
        named: list[tuple[str, Path, x509.Certificate]] = [("--tls-cert", self.cert, each) for each in chain]
        if self.client_ca is not None:
            named += [("--client-ca", self.client_ca, each) for each in _certificates("--client-ca", self.client_ca)]
            self._check_shown(chain[0])
        for option, file, certificate in named:
            begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if not begins <= now <= ends:
                raise ServeError(
                    f"{option} {file} is valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, and it is "
                    f"{now:%Y-%m-%d %H:%M}; renew it"
                )

    def _check_shown(self, own: x509.Certificate) -> None:
        """With ``client_ca`` this process asks its own server, too, and shows the server's certificate."""
        with suppress(x509.ExtensionNotFound):
            usage = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            if not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(usage):
                raise ServeError(
                    f"--tls-cert {self.cert} is for servers alone (extendedKeyUsage), and with --client-ca this "
                    "command shows it to its own server; issue one with clientAuth, too"
                )

    def name(self) -> str | None:
        """A name that the certificate is for."""
        (certificate, *_) = _certificates("--tls-cert", self.cert)
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return None
        found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
        return found[0] if found else None


@dataclass(frozen=True)
class Access:
    """What is said to a server at its start.

    Attributes:
        certificates: None: nothing is encrypted.
        tokens: file of callers' tokens (trirank_backend.callers); None: callers need none.
        opened: of INTERFACES.
    """

    certificates: Certificates | None = None
    tokens: Path | None = None
    opened: frozenset[str] = frozenset()
    _own: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def check(self) -> None:
        """Raises ServeError for what cannot be."""
        if unknown := self.opened - set(INTERFACES):
            raise ServeError(f"--open {', '.join(sorted(unknown))} is no interface; there are {', '.join(INTERFACES)}")
        if self.certificates is not None:
            self.certificates.check()
        if self.tokens is not None:
            try:
                read_tokens(self.tokens)
            except InvalidTokens as error:
                raise ServeError(f"--tokens: {error}") from None

    def settled(self, folder: Path) -> Access:
        """The same with copies of the certificates, so that this process and Triton go on with what Triton has read,
        whenever the files are renewed.

        Args:
            folder: that nobody else may look into.
        """
        if (files := self.certificates) is None:
            return self
        copies = []
        for name, file in (("tls.pem", files.cert), ("tls.key", files.key)):
            copies.append(folder / name)
            with os.fdopen(os.open(copies[-1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
                stream.write(file.read_bytes())
        return replace(self, certificates=replace(files, cert=copies[0], key=copies[1]))

    def environment(self) -> Mapping[str, str]:
        """What a server's processes are told: the tokens' file, and the digest of this process's own token."""
        if self.tokens is None:
            return {TOKENS_VARIABLE: ""}
        return {
            TOKENS_VARIABLE: str(self.tokens.absolute()),
            OWN_TOKEN_VARIABLE: digest(self._own),
        }

    def arguments(self, secret: str, header: str, *, controlled: bool) -> list[str]:
        """Of tritonserver.

        Args:
            secret: the word that this process alone knows, and ``header`` where it stands.
            controlled: whether models are loaded through gRPC, which is for this process alone, too.
        """
        closed = [each for each in INTERFACES if each not in self.opened] + ["model-repository"] * controlled
        found = []
        if closed:
            found.append(f"--grpc-restricted-protocol={','.join(closed)}:{header}={secret}")
        if self.tokens is not None:
            found.append("--grpc-header-forward-pattern=(?i)authorization")
        if self.certificates is None:
            if closed:
                found.append(f"--http-restricted-api={','.join(closed)}:{header}={secret}")
            if self.tokens is not None:
                found.append("--http-header-forward-pattern=(?i)authorization")
            return found
        files = self.certificates
        found += ["--allow-http=false", "--grpc-use-ssl=true", f"--grpc-server-cert={files.cert}"]
        found.append(f"--grpc-server-key={files.key}")
        if files.client_ca is not None:
            found += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={files.client_ca}"]
        return found

    def tls(self) -> Tls | None:
        """As this process talks to its own server: it trusts that very certificate, and shows it."""
        if (files := self.certificates) is None:
            return None
        shown = files.client_ca is not None
        return Tls(files.cert, files.cert if shown else None, files.key if shown else None, server_name=files.name())

    def channel(self, address: str) -> grpc.Channel:
        """A channel of this process's own server."""
        if (files := self.certificates) is None:
            return grpc.insecure_channel(address)
        own = (None, None) if files.client_ca is None else (files.key.read_bytes(), files.cert.read_bytes())
        options = [("grpc.ssl_target_name_override", name)] if (name := files.name()) else []
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(files.cert.read_bytes(), *own), options)

    def client(self, address: str, deadline_s: float, model: str) -> RankClient:
        """A client of this process's own server, which needs nobody's token."""
        token = None if self.tokens is None else self._own
        return RankClient(address, deadline_s=deadline_s, model=model, retry=None, tls=self.tls(), token=token)


def add_token(file: Path, name: str) -> str:
    """A new token for a caller, whose digest is kept. One that it has already stays good: the new one has the name's
    next free number beside it, so that the caller can go over to it.

    Raises:
        ServeError: the file is none, or the name cannot be one.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ServeError(f"{name!r} is no name of a caller; take up to 64 letters, digits, _ and -")
    token = secrets.token_urlsafe(32)
    with _changed(file) as known:
        numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        known[next(each for each in numbered if each not in known)] = digest(token)
    return token


def remove_token(file: Path, name: str) -> None:
    """Take a caller's token away.

    Raises:
        ServeError: the file is none, or has no such caller.
    """
    with _changed(file) as known:
        if name not in known:
            raise ServeError(f"{file} has no caller {name!r}; it has {', '.join(sorted(known)) or 'none'}")
        del known[name]


@contextmanager
def _changed(file: Path) -> Iterator[dict[str, str]]:
    """Name → digest, written back when the block ends without an error; one at a time. Mode and owner stay."""
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            known = {name: told for told, name in read_tokens(file).items()} if file.exists() else {}
        except InvalidTokens as error:
            raise ServeError(f"--tokens: {error}") from None
        yield known
        before = file.stat() if file.exists() else None
        with atomic_file(file) as scratch:
            scratch.touch(0o600)
            scratch.write_text("".join(f'"{name}" = "{told}"\n' for name, told in sorted(known.items())))
            if before is not None:
                scratch.chmod(before.st_mode & 0o777)
                os.chown(scratch, before.st_uid, before.st_gid)


def _certificates(option: str, file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ServeError(f"{option} {file} is no PEM of a certificate ({error})") from None
