"""A Triton server that serves one release until it is stopped, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from google.protobuf.json_format import MessageToDict
from trirank import DeadlineExceeded, Overloaded, RankClient, RankError, contract
from trirank_backend.compiled import need_compiling
from trirank_backend.surroundings import COUNTS_VARIABLE, SERVED_VARIABLE

from trirank_build.errors import BadModel, ServeError
from trirank_build.progress import warn, working
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.access import Access
from trirank_build.serving.fitness import unfit
from trirank_build.serving.live import LiveRepository, Served
from trirank_build.serving.ports import Ports, checked_ports
from trirank_build.serving.processes import Watched, wipe_argument
from trirank_build.serving.stores import Stores
from trirank_build.serving.swapping import CONTROL_HEADER, Control, retire, switch, warm_up
from trirank_build.serving.tritonserver import find_tritonserver

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
_SHM_BYTES = 16 << 20
"""A stub's first shared memory; the largest batch fits, so that it need not grow under load."""
_PDEATHSIG = 1
_SCRATCH = "trirank-serve-"
_FRESH_S = 5.0
"""Whoever makes a scratch folder holds it within so long."""
_NOISE = (
    "Failed to initialize NVML",
    "unable to create stream",
    "CudaDriverHelper has not been initialized",
    "CUDA driver version is insufficient",
    "no CUDA-capable device",
)
"""Of a server without a GPU."""


class TritonServer:
    """A running server; use as a context manager.

    Attributes:
        grpc, http, metrics: ``host:port`` of each endpoint.
        log: what Triton printed.
    """

    def __init__(
        self,
        release: Path,
        *,
        ports: Ports | None = None,
        tritonserver: Path | None = None,
        host: str = "127.0.0.1",
        fallback: str | None = None,
        swappable: bool = False,
        log: Path | None = None,
        stores: Stores | None = None,
        access: Access | None = None,
    ) -> None:
        """Start it; ``wait_ready`` tells when it works.

        Args:
            fallback: engine of the runtime ``python`` that scores where the release's own runtime cannot run here.
            swappable: whether ``swap`` shall work. Triton's model control is then open to this object alone.
            log: file that Triton's words go to; None: one that is gone when the server stops.
            stores: what lies beside the release; None: nothing, so that all users are new.
            access: who may ask it what; None: everybody, also for statistics.

        Raises:
            ServeError: no server is found, a port is in use, shared memory is short, or the release's runtime cannot
                run here and there is no fallback.
            BadModel: ``release`` is none.
        """
        stores = stores or Stores()
        stores.check()
        self._access = access or Access(opened=frozenset({"statistics"}))
        self._access.check()
        _sweep()
        _check_shared_memory()
        _compile_kernels()
        self._control: Control | None = None
        self._swappable = swappable
        self._probed: Path | None = None
        self._recorded: Any = None
        self._scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        self._holder = os.open(self._scratch, os.O_RDONLY)
        fcntl.flock(self._holder, fcntl.LOCK_SH)  # until this process ends, however it does
        self._process: subprocess.Popen[bytes] | None = None
        self._watched: Watched | None = None
        self._secret = ""
        self.log = log or self._scratch / "triton.log"
        self._read = self.log.stat().st_size if self.log.is_file() else 0
        self._shm_prefix = _shared_prefix(self._scratch)
        try:
            self._access = self._access.settled(self._scratch)
            self._binary = binary = find_tritonserver(tritonserver, self._scratch)
            self._fallback = fallback
            self.served = self._fitting(release)
            self._live = LiveRepository(self._scratch / "models")
            self._live.add(self.served)
            self._live.point(self.served)
            self._say_served(self.served)
            if stores.users is not None:
                self._live.add_feedback()
            environment = {
                **os.environ, **binary.environment, **stores.environment(), **self._access.environment(),
                SERVED_VARIABLE: str(self._said),
                COUNTS_VARIABLE: str(self._scratch / "counts.npy"),
            }  # fmt: skip
            ports = ports or Ports()
            numbers = checked_ports(host, ports)
            self.grpc, self.http, self.metrics = (f"{host}:{number}" for number in numbers)
            command = [
                str(binary.path),
                *binary.arguments,
                f"--model-repository={self._live.folder}",
                *self._interfaces(swappable, stores.users is not None),
                "--disable-auto-complete-config",
                *(f"--{name}-address={host}" for name in ("grpc", "http", "metrics")),
                *(f"--{name}-port={number}" for name, number in zip(("grpc", "http", "metrics"), numbers, strict=True)),
                f"--backend-config=python,shm-default-byte-size={_SHM_BYTES}",
                f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
                f"--exit-timeout-secs={STOP_TIMEOUT_S // 2}",
            ]
            with _opened(self.log) as stream:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
        except BaseException:
            self.stop()
            raise

    @property
    def release(self) -> Path:
        """The release that is served now."""
        return self.served.release

    @property
    def pid(self) -> int:
        """Of tritonserver."""
        assert self._process is not None
        return self._process.pid

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until recorded requests went through the ensemble and came back, which warms every stage up too.

        A health probe would not do: it stays 200 when a stub has died (triton-inference-server/server #8604).

        Raises:
            ServeError: the server ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        with working("starting Triton"), self.connect(5.0) as client:
            self._hide_secret(deadline)
            while not client.ready():
                self.check_alive()
                if time.monotonic() > deadline:
                    raise ServeError(
                        f"Triton was not ready within {timeout_s:g} s; its last words: {self._last_words()}"
                    )
                time.sleep(0.1)
        try:
            warm_up(self.connect, self.served, contract.ENSEMBLE)
        except ServeError as error:
            raise ServeError(f"{error}; Triton's last words: {self._last_words()}") from error
        if self._swappable:
            self._controlled().loaded()  # or Triton has another word than this process
        self._watched = Watched(self.pid, self._live.processes())

    def swap(self, release: Path) -> None:
        """Serve another release from now on, without a request that fails or meets both.

        Raises:
            BadModel: ``release`` is none.
            ServeError: it cannot be served, or this server is not swappable; the old one is served as before.
        """
        self._check_swappable()
        new = self._fitting(release)
        if new.name == self.served.name:
            return
        old = self.served
        try:
            switch(self._controlled(), self.connect, self._live, old, new)
        except ServeError as error:
            raise ServeError(
                f"{release} cannot be served: {error}; Triton's last words: {self._last_words()}"
            ) from error
        self.served = new
        self._say_served(new)
        try:
            retire(self._controlled(), self._live, old)
        except ServeError as error:
            warn(f"{new.name} is served, but models of {old.name} are still loaded: {error}")
        self._watched = Watched(self.pid, self._live.processes())

    @property
    def has_http(self) -> bool:
        """Whether HTTP is served: not beside TLS, which Triton's has none of."""
        return self._access.certificates is None

    def dead_models(self) -> list[str]:
        """Models that have lost a process. Triton does not notice: it stays ready, and whoever asks one is told
        so after a second (triton-inference-server/server #8604)."""
        return self._watched.dead() if self._watched is not None else []

    def revive(self, models: list[str]) -> None:
        """Load models anew, whose processes have died; the others go on meanwhile.

        Raises:
            ServeError: they cannot be loaded, or this server is not swappable.
        """
        self._check_swappable()
        for model in models:
            self._live.touch(model)
            self._controlled().load(model)
        self._watched = Watched(self.pid, self._live.processes())

    def _check_swappable(self) -> None:
        if not self._swappable:
            raise ServeError("this server was started for one release; start it with swappable=True")

    def _say_served(self, served: Served) -> None:
        """Tell the models that belong to no release."""
        self._said = self._scratch / "served"
        scratch = self._said.with_name("served.new")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(served.release)
        scratch.replace(self._said)

    def check_alive(self) -> None:
        """Raises ServeError with the reason if the server has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            code = self._process.returncode
            how = f"ended with {code}" if code >= 0 else f"was killed by signal {-code}"
            raise ServeError(f"Triton {how}{' (out of memory?)' * (code == -9)}: {self._last_words()}")

    def probe(self, deadline_s: float = 5.0) -> str:
        """Why a recorded request is not answered; empty: it is, or others are, whom this one waited behind.

        What Triton says of itself would not do: it stays ready when a stub has died (triton-inference-server/server
        #8604).
        """
        try:
            if self._probed != self.release:  # read once: a disk that fails for a moment harms no server
                self._probed, self._recorded = self.release, recorded_requests(self.release)[0]
            before = self._answered(deadline_s)
            with self.connect(deadline_s) as client:
                client.rank(self._recorded)
        except (Overloaded, DeadlineExceeded) as error:
            with suppress(ServeError):
                return "" if self._answered(deadline_s) > before else str(error)
            return str(error)
        except (RankError, ServeError, BadModel) as error:
            return str(error)
        return ""

    def _answered(self, timeout_s: float) -> int:
        return self._controlled().counts(contract.ENSEMBLE, timeout_s)[0]

    def new_errors(self) -> list[str]:
        """Errors that Triton has told since this was asked last, a line each."""
        try:
            size = self.log.stat().st_size
            with self.log.open("rb") as stream:
                stream.seek(self._read if self._read <= size else 0)  # it may have been cut by who rotates logs
                start, text = stream.tell(), stream.read()
        except OSError:  # it was moved away, or is no file
            return []
        whole = text[: text.rfind(b"\n") + 1]  # a line that is half written is read next time
        self._read = start + len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [line for line in lines if re.match(r"E\d{4} ", line) and not any(words in line for words in _NOISE)]

    def stop(self, *, at_once: bool = False) -> None:
        """Let requests in flight finish, end the server and its stubs, remove its files. Safe to call twice.

        Args:
            at_once: do not wait for requests, as where nothing answers any more.
        """
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            if self._process.poll() is None and not at_once:
                self._process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_S)
            # Stubs share the server's process group; one that outlived it is ended here.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            with suppress(ChildProcessError):  # the first process of a container has to bury its orphans
                while os.getpid() == 1 and os.waitpid(-self._process.pid, os.WNOHANG)[0]:
                    pass
        for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._holder >= 0:
            os.close(self._holder)
            self._holder = -1

    def connect(self, deadline_s: float, model: str = contract.ENSEMBLE) -> RankClient:
        """A client of this server that needs nobody's token."""
        return self._access.client(self.grpc, deadline_s, model)

    def _controlled(self) -> Control:
        assert self._control is not None
        return self._control

    def statistics(self) -> dict[str, Any]:
        """Stage or ensemble → its statistics, as Triton counts them, of the release that is served."""
        reply = [MessageToDict(model, preserving_proto_field_name=True) for model in self._controlled().statistics()]
        found = {model["name"]: model for model in reply}
        stages = ("single",) if self.served.pipeline == "single" else contract.STAGES
        names = dict(zip(stages, self.served.stages, strict=True))
        return {stage: found[name] for stage, name in (*names.items(), (contract.ENSEMBLE, contract.ENSEMBLE))}

    def _fitting(self, release: Path) -> Served:
        """The release as it can be served here.

        Raises:
            ServeError: it cannot.
        """
        problems = unfit(release, self._binary)
        if problems and self._fallback is None:
            raise ServeError(
                f"{release} cannot be served here: {'; '.join(problems)}. Serve it where it fits, or say --fallback "
                "onnxruntime"
            )
        if problems:
            warn(f"{'; '.join(problems)}: {self._fallback} in the Python backend scores instead")
        return Served.of(release, self._fallback if problems else None)

    def _interfaces(self, swappable: bool, feedback: bool) -> list[str]:
        # Whoever can load models can run code, so only who knows this word may. Triton takes it as an argument and from
        # nowhere else; it is wiped from the list of arguments, which every local user may read, once Triton has it.
        self._secret = secrets.token_hex(16)
        self._control = Control(self.grpc, self._secret, self._access)
        found = self._access.arguments(self._secret, CONTROL_HEADER, controlled=swappable)
        if not swappable:
            return [*found, "--model-control-mode=none"]
        return [
            *found,
            "--model-control-mode=explicit",
            # Else a release that cannot be loaded, or is loading, makes the whole server "not ready", though it serves
            # the old one all the while, and a load balancer drops every replica that follows the link at once.
            "--strict-readiness=false",
            f"--load-model={contract.ENSEMBLE}",
            *([f"--load-model={contract.FEEDBACK}"] if feedback else []),
        ]

    def _hide_secret(self, deadline: float) -> None:
        """Wipe the word that controls Triton from its list of arguments, as soon as it says anything: it has read them
        by then."""
        said = self._read
        while self.log.is_file() and self.log.stat().st_size <= said and time.monotonic() < deadline:
            self.check_alive()
            time.sleep(0.002)
        try:
            wipe_argument(self.pid, self._secret)
        except OSError as error:
            warn(
                "local users can read in the list of processes how to load models into this server "
                f"({error.strerror}); let this user trace its own processes (kernel.yama.ptrace_scope 0 or 1)"
            )

    def _last_words(self) -> str:
        """The reason in Triton's log, in one line."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        if needed := re.search(r"version `(GLIBC_[\d.]+)' not found", text):
            own = os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else "unknown"
            return f"it needs {needed[1]}, this machine has {own}; use a newer distribution or NVIDIA's container"
        errors = [line for line in text.splitlines() if re.match(r"E\d{4} |error:|.*(Error|error while loading)", line)]
        errors = [line for line in errors if not any(noise in line for noise in _NOISE)]
        words = " | ".join(line.strip() for line in (errors or text.splitlines())[-3:]) or "it said nothing"
        return words[-1500:]

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _check_shared_memory() -> None:
    """Three stubs and their growth must fit (triton-inference-server/server #5681, #7481)."""
    needed = 8 * _SHM_BYTES
    if Path("/dev/shm").is_dir() and (free := shutil.disk_usage("/dev/shm").free) < needed:
        raise ServeError(
            f"/dev/shm has {free >> 20} MiB free, Triton's Python stages need {needed >> 20}; start the container with "
            "--shm-size=1g, or free some"
        )


def _opened(log: Path) -> Any:
    if log.exists() and not log.is_file():
        raise ServeError(f"--log {log} is no regular file, and what Triton says is read from it; name a file")
    try:
        return log.open("ab")
    except OSError as error:
        reason = f"--log {log} cannot be written ({error.strerror})"
        raise ServeError(f"{reason}; name a file in a folder that is there") from error


def _shared_prefix(scratch: Path) -> str:
    """What the shared memory of a server is named, after its scratch folder."""
    return f"trirank_{scratch.name.removeprefix(_SCRATCH)}_"


def _sweep() -> None:
    """Remove what servers left behind that were killed outright: nobody holds their scratch folders any more."""
    for scratch in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # somebody else's, or swept by somebody else meanwhile
            holder = os.open(scratch, os.O_RDONLY)
            try:
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - scratch.stat().st_mtime < _FRESH_S:
                    continue
                for region in Path("/dev/shm").glob(f"{_shared_prefix(scratch)}*"):
                    region.unlink(missing_ok=True)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(holder)


def _compile_kernels() -> None:
    """Once a machine, by the Python that the stubs run, so that not each of them does it at its start."""
    if need_compiling():
        with working("compiling kernels, once a machine"):
            done = subprocess.run([sys.executable, "-m", "trirank_backend.compiled"], capture_output=True, text=True)
        if done.returncode:
            words = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise ServeError(f"the kernels could not be compiled ({words[0]}); is numba installed as constraints say?")


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """So that a killed parent leaves no server behind."""
    assert _libc is not None
    _libc.prctl(_PDEATHSIG, signal.SIGTERM)
