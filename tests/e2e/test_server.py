"""The life of a server: found, started, watched, stopped, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from trirank import RankClient, RankRequest
from trirank_build.errors import BadModel, ServeError
from trirank_build.serving import tritonserver
from trirank_build.serving.following import serve as serve_until_stopped
from trirank_build.serving.ports import Ports
from trirank_build.serving.processes import stubs
from trirank_build.serving.server import TritonServer


def serve(world, tmp_path, *more, prefix=()):
    addresses = tmp_path / "addresses.json"
    command = [
        sys.executable,
        "-m",
        "trirank_build.cli",
        "serve",
        str(world.release),
        "--addresses",
        str(addresses),
    ]
    # Ports that no test beside takes while this server is started anew, as the usual ones may be.
    for name in ("grpc", "http", "metrics"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            command += [f"--{name}-port", str(probe.getsockname()[1])]
    process = subprocess.Popen([*prefix, *command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 100
    while not addresses.is_file():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process, json.loads(addresses.read_text())


def family(pid):
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def all_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=30)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("trirank_*")}


AS_A_BACKGROUND_JOB = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
"""Shells start their background jobs so. By a shell, since what forks beside open channels may end in gRPC's own thread
before it is the command (grpc/grpc #43055)."""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("started", [(), AS_A_BACKGROUND_JOB], ids=["", "as a background job"])
def test_ctrl_c_stops_it_and_leaves_nothing(world, tmp_path, how, started):
    before = shared_memory()
    process, addresses = serve(world, tmp_path, prefix=started)
    with RankClient(addresses["grpc"], deadline_s=10) as client:
        assert len(client.rank(RankRequest(item_ids=[1, 2, 3]))) > 0
    processes = family(process.pid)
    assert len(processes) >= 5  # the command, Triton, three stubs
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "stopping" in output
    assert all_gone(processes)
    assert shared_memory() <= before


def test_a_killed_command_takes_its_server_along(world, tmp_path):
    process, _ = serve(world, tmp_path)
    processes = family(process.pid)
    process.kill()
    process.wait()
    assert all_gone(processes)


def test_what_dies_is_started_anew(world, single, tmp_path):
    """A stage's process, one that hangs, and the server itself: callers find it again at the same address."""
    process, addresses = serve(world, tmp_path)
    file = tmp_path / "addresses.json"
    with RankClient(addresses["grpc"], deadline_s=2, retry=None) as client:
        request = RankRequest(item_ids=[1, 2, 3])
        right = client.rank(request)
        for number, harm in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, None)):
            before = os.stat(file).st_mtime_ns
            if harm is None:
                os.kill(json.loads(file.read_text())["tritonserver_pid"], signal.SIGKILL)
            else:
                stage = ("preprocess", "ranker", "rerank")[number]
                only_stub(process, f"{stage}_{world.release.name}").send_signal(harm)
            wait_for(lambda: state_of(file) == "recovering", process)
            assert exit_of_health(file) == 1
            assert exit_of_health(file, "--live") == 0
            wait_for(lambda: state_of(file) == "ready", process)
            assert exit_of_health(file) == 0
            assert client.rank(request, deadline_s=5).item_ids.tolist() == right.item_ids.tolist()
            assert os.stat(file).st_mtime_ns > before
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert output.count("had died; started anew in") == 2
    assert "3 recorded requests in a row were not answered" in output
    assert "Triton was killed by signal 9 (out of memory?)" in output
    assert output.count("ready again") == 2
    assert exit_of_health(file) == 1  # there is none any more


def state_of(file):
    return json.loads(file.read_text())["state"]


def exit_of_health(file, *more):
    command = [sys.executable, "-m", "trirank_build.cli", "health", str(file), *more]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def wait_for(condition, process, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def only_stub(process, model):
    (found,) = (stub for stub, name in stubs(process.pid).items() if name == model)
    return found


def test_a_server_that_cannot_start_again_is_given_up(world, tmp_path, monkeypatch):
    """With pauses between the tries, and the reason."""
    from trirank_build.serving import following

    pauses = []
    monkeypatch.setattr(following, "_wait", lambda pause, state: pauses.append(pause))
    monkeypatch.setattr(following, "GIVE_UP_S", 4.0)
    monkeypatch.setattr(following.TritonServer, "wait_ready", first_time_only(following.TritonServer.wait_ready))
    script = f"test -e {tmp_path}/once && exit 1; touch {tmp_path}/once; exec sleep 60"

    def die(server, *_):
        while not (tmp_path / "once").exists():  # killed before, the next one would be the first, too, and sleep
            time.sleep(0.01)
        os.kill(server.pid, signal.SIGKILL)
        while True:
            server.check_alive()

    monkeypatch.setattr(following, "_watch", die)
    with pytest.raises(ServeError, match="Triton ended with 1"):
        serve_until_stopped(
            world.release, Ports(), follow=False, addresses=None, tritonserver=fake(tmp_path, script), host="127.0.0.1"
        )
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert max(pauses) <= 30


def first_time_only(method):
    """What is ready the first time, whatever it is; later what it says."""
    times = []

    def wait_ready(server):
        times.append(1)
        if len(times) > 1:
            method(server)

    return wait_ready


def test_pauses_are_forgotten_after_a_quiet_while():
    from trirank_build.serving.following import Backoff

    backoff = Backoff()
    assert [backoff.pause_s(at) for at in (0, 1, 3, 6, 100, 101)] == [0, 0.5, 1, 2, 0, 0.5]
    assert max(backoff.pause_s(102 + at) for at in range(20)) == 30


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.unlink(), "is no state of a server"),
        (lambda file: file.write_text("rubbish"), "is no state of a server"),
        (lambda file: file.write_text("[]"), "is no state of a server"),
        (lambda file: os.utime(file, (0, 0)), "restart it"),
    ],
)
def test_a_state_that_is_none(tmp_path, harm, words):
    from trirank_build.serving.health import READY, State, check

    file = tmp_path / "state.json"
    State(file).say(READY, grpc="127.0.0.1:8001")
    assert check(file, live=False) == READY
    harm(file)
    for live in (True, False):
        with pytest.raises(ServeError, match=words):
            check(file, live=live)


def test_the_word_that_controls_triton_is_in_no_list_of_processes(world):
    with TritonServer(world.release, swappable=True) as server:
        server.wait_ready()
        assert "trirank-control=" in " ".join(psutil.Process(server.pid).cmdline())
        told = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in family(server.pid)]
        assert not any(server._secret.encode() in each for each in told)
        assert server._secret not in server.log.read_text()
        assert server._control.loaded()  # and Triton knows it nevertheless


def test_a_port_in_use_is_one_clear_line(world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "trirank_build.cli",
            "serve",
            str(world.release),
            "--grpc-port",
            str(port),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert f"--grpc-port {port} on 127.0.0.1 cannot be used (Address already in use); choose another" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_none(world):
    with pytest.raises(ServeError, match="ports go from 1 to 65535"):
        TritonServer(world.release, ports=Ports(http=70_000))


def test_chosen_ports(world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TritonServer(world.release, ports=Ports(grpc=port)) as server:
        server.wait_ready()
        assert server.grpc == f"127.0.0.1:{port}"


def test_a_release_that_cannot_be_served_says_why(world, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(world.release, release)
    (release / "features" / "catalogue" / "fields.npy").write_bytes(b"rubbish")
    with TritonServer(release) as server, pytest.raises(ServeError, match=r"fields\.npy cannot be read"):
        server.wait_ready()


def test_a_release_of_another_contract_is_not_served(world, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(world.release, release)
    manifest = json.loads((release / "manifest.json").read_text())
    (release / "manifest.json").write_text(json.dumps(manifest | {"contract": 99}))
    with TritonServer(release) as server, pytest.raises(ServeError, match="of contract 99"):
        server.wait_ready()


def fake(tmp_path, script):
    path = tmp_path / "tritonserver"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_an_old_glibc_is_named(world, tmp_path):
    binary = fake(tmp_path, 'echo "$0: /lib/libc.so.6: version \\`GLIBC_2.35\' not found (required by $0)"; exit 1')
    with TritonServer(world.release, tritonserver=binary) as server:
        with pytest.raises(ServeError, match=r"needs GLIBC_2\.35, this machine has glibc"):
            server.wait_ready()


def test_a_server_that_never_gets_ready(world, tmp_path):
    with TritonServer(world.release, tritonserver=fake(tmp_path, "exec sleep 60")) as server:
        with pytest.raises(ServeError, match="not ready within 1 s"):
            server.wait_ready(timeout_s=1)


def test_the_order_in_which_a_server_is_found(tmp_path, monkeypatch):
    for name in ("told", "variable", "path"):
        (tmp_path / name).mkdir()
    told, variable, on_path = (fake(tmp_path / name, "true") for name in ("told", "variable", "path"))
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    monkeypatch.setenv(tritonserver.VARIABLE, str(variable))
    assert tritonserver.find_tritonserver(told, tmp_path).path == told
    assert tritonserver.find_tritonserver(None, tmp_path).path == variable
    monkeypatch.delenv(tritonserver.VARIABLE)
    assert tritonserver.find_tritonserver(None, tmp_path).path == on_path
    on_path.unlink()
    assert "pytriton" in str(tritonserver.find_tritonserver(None, tmp_path).path)


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ServeError, match="no executable file"):
        tritonserver.find_tritonserver(tmp_path / "none", tmp_path)
    monkeypatch.setattr(tritonserver.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServeError, match=r"pip install 'trirank\[serve\]'"):
        tritonserver.find_tritonserver(None, tmp_path)


def test_short_shared_memory_is_told(world, monkeypatch):
    from trirank_build.serving import server

    monkeypatch.setattr(server.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(ServeError, match="/dev/shm has 1 MiB free.*--shm-size"):
        TritonServer(world.release)


def test_what_a_killed_command_left_is_swept_at_the_next_start(world, tmp_path, monkeypatch):
    """Whoever still runs holds its folder, whatever its process id is in whichever container."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, fresh = tmp_path / "trirank-serve-abandoned", tmp_path / "trirank-serve-fresh"
    shared = Path("/dev/shm") / "trirank_abandoned_1"
    for place in (left / "models", fresh / "models"):
        place.mkdir(parents=True)
    os.utime(left, (0, 0))
    shared.write_bytes(b"x")
    with TritonServer(world.release, tritonserver=fake(tmp_path, "exec sleep 60")) as running:
        assert not left.exists()
        assert not shared.exists()
        assert fresh.exists()
        os.utime(running._scratch, (0, 0))
        with TritonServer(world.release, tritonserver=fake(tmp_path, "exec sleep 60")):
            assert running._scratch.exists()


def test_tritons_log_is_kept_where_one_wants_it_and_errors_are_told(world, tmp_path):
    log = tmp_path / "triton.log"
    script = "echo 'I1125 ready'; echo 'E1125 the disk is full'; echo 'E1125 unable to create stream'; exec sleep 60"
    with TritonServer(world.release, tritonserver=fake(tmp_path, script), log=log) as server:
        deadline, told = time.monotonic() + 20, []
        while not told and time.monotonic() < deadline:
            told += server.new_errors()
        assert told == ["E1125 the disk is full"]
        assert server.new_errors() == []
        log.rename(tmp_path / "rotated")  # by logrotate, say
        assert server.new_errors() == []
        (tmp_path / "rotated").rename(log)
    assert "the disk is full" in log.read_text()
    with pytest.raises(ServeError, match="--log .* cannot be written"):
        TritonServer(world.release, tritonserver=fake(tmp_path, "exit"), log=tmp_path / "no" / "log")


def test_a_damaged_release_is_not_served(world, tmp_path):
    release = shutil.copytree(world.release, tmp_path / world.release.name)
    (release / "features" / "token_idf.npy").write_bytes(b"rubbish")
    with pytest.raises(BadModel, match="cannot be served: features/token_idf.npy has digest"):
        serve_until_stopped(release, Ports(), follow=False, addresses=None)
