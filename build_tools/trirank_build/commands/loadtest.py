"""`trirank loadtest`: a load that counts latencies from when requests were due, what a service promises held against
it, and the highest rate at which it holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from trirank_build.artefacts import atomic_file
from trirank_build.commands.options import Json, check_target
from trirank_build.errors import BadUsage, ServeError
from trirank_build.progress import out

START_TIMEOUT_S, STOP_TIMEOUT_S = 180.0, 60.0
RESULT, REPORT = "loadtest.json", "loadtest.html"


def loadtest(
    release: Annotated[
        Path | None, typer.Argument(help="A release: it is served for the test, unless --server names who does.")
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="host:port of a gRPC endpoint that is there already; several: in turns.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="Recorded requests: a requests.json, or a folder of `trirank serve --log-requests`."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second; with --find-capacity the first that is tried.")] = 100,
    seconds: Annotated[float, typer.Option(help="Of a run.")] = 20,
    shape: Annotated[
        Literal["constant", "step", "spike", "diurnal"], typer.Option(help="Of the rate over a run.")
    ] = "constant",
    mix: Annotated[
        str, typer.Option(help="recorded, or drawn:zipf=1.1,users=100000,search=0.5: in the recorded ones' image.")
    ] = "recorded",
    feedback: Annotated[float, typer.Option(help="Feedback calls beside each request, on average.")] = 0,
    through: Annotated[Literal["client", "grpc"], typer.Option(help="Our client, or grpcio alone.")] = "client",
    deadline_s: Annotated[float, typer.Option(help="Seconds that a request has, from when it was due.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Locust's processes; above 1 a master and so many workers.")] = 1,
    slo: Annotated[
        list[str] | None, typer.Option(help="A promise: p99=50ms, mean=10ms, error_rate=0.1%; ends with 1 if broken.")
    ] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Find the highest rate that keeps every --slo.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Of a rate whose promise is judged, with --find-capacity.")] = 3,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier loadtest.json of the same load; ends with 1 where this is worse.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help=f"Folder for {RESULT} and {REPORT}, a page to read.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="Locust's own web page instead, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Load a server in an open loop, and hold it to what you promise."""
    from trirank_loadtest.capacity import find_capacity as search
    from trirank_loadtest.compare import check_alike
    from trirank_loadtest.compare import compare as compared
    from trirank_loadtest.results import described, read_result, result_of, with_differences
    from trirank_loadtest.run import Load, run
    from trirank_loadtest.slo import read_all

    slos = read_all(slo or [])
    if find_capacity and not slos:
        raise BadUsage("--find-capacity needs to know what shall hold; say --slo p99=50ms, for instance")
    if find_capacity and shape != "constant":
        raise BadUsage(f"--find-capacity seeks a rate, and --shape {shape} has many; leave one of them out")
    if release is None and not server:
        raise BadUsage("give a release to serve and load, or --server HOST:PORT")
    recorded = requests or (release / "requests.json" if release is not None else None)
    if recorded is None:
        raise BadUsage("--server alone does not say what to send; give --requests, or the release that is served there")
    if target is not None:
        check_target(target, "a load test's results", replaces=RESULT)
    earlier = read_result(compare) if compare is not None else None
    percentiles = tuple(float(one.name[1:]) for one in slos if one.name not in ("mean", "error_rate"))

    def asked(addresses: list[str], rate: float, seed: int) -> Load:
        return Load(
            addresses=addresses, requests=recorded, rate=rate, seconds=seconds, shape=shape, mix=mix,
            feedback=feedback, through=through, deadline_s=deadline_s, workers=workers, seed=seed,
            percentiles=percentiles,
        )  # fmt: skip

    planned = asked(server or ["127.0.0.1:1"], rate, 0)
    planned.check()
    for one in slos:
        if one.name != "error_rate" and one.limit >= deadline_s * 1e3:
            raise BadUsage(f"--slo {one.words()} and --deadline-s {deadline_s:g}: what is not answered by the deadline "
                           "has failed; give requests more time than you promise")  # fmt: skip
    if earlier is not None:
        check_alike(earlier, described(planned, slos, find_capacity))
    with _served(release, server) as addresses:
        load = asked(addresses, rate, 0)
        if web:
            _web(load)
            return
        runs, capacity = [], None
        if find_capacity:

            def measure(rate: float, seed: int) -> Any:
                found = run(asked(addresses, rate, seed))
                out.print(f"[dim]{rate:8.0f} requests/s: p99 {found.percentile(99.0):.1f} ms, "
                          f"{found.error_rate:.2%} failed[/dim]", highlight=False)  # fmt: skip
                return found

            capacity = search(measure, slos, rate, repeats, least=10 / seconds)
        else:
            runs = [run(load)]
    result = result_of(load, slos, runs, capacity)
    if target is not None:
        _keep(result, target)
    if earlier is not None:
        result = with_differences(result, compared(earlier, result))
        if target is not None:
            _keep(result, target)
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        _show(result)
        if target is not None:
            out.print(f"{target / REPORT}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if result["passed"] else 1)


def _keep(result: dict[str, Any], target: Path) -> None:
    from trirank_loadtest.report import write_report

    target.mkdir(parents=True, exist_ok=True)
    with atomic_file(target / RESULT) as scratch:
        scratch.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_report(result, target / REPORT)


def _show(result: dict[str, Any]) -> None:
    from trirank_loadtest.measured import Measured

    runs = sorted((Measured.from_json(raw) for raw in result["runs"]), key=lambda one: one.rate)
    shown = next(one for one in runs if one.rate == result["shown_rate"])
    table = Table("requests/s", "answered/s", "failed", "p50 ms", "p95 ms", "p99 ms", "machine busy", "load busy")
    for one in runs:
        table.add_row(
            f"{one.rate:.0f}", f"{one.answered:.0f}", f"{one.error_rate:.2%}",
            *(f"{one.percentile(share):.2f}" for share in (50.0, 95.0, 99.0)),
            f"{one.cpu.get('machine', 0):.0%}", f"{one.cpu.get('load', 0):.0%}",
        )  # fmt: skip
    out.print(table)
    kinds = Table("at " + f"{shown.rate:.0f} requests/s", "count", "failures", "p50 ms", "p99 ms")
    for name, kind in shown.kinds.items():
        numbers = ("∞" if kind[key] is None else f"{kind[key]:.2f}" for key in ("p50_ms", "p99_ms"))
        kinds.add_row(name, f"{kind['requests']:.0f}", f"{kind['failed']:.0f}", *numbers)
    for name, count in shown.errors.items():
        kinds.add_row(f"[red]{name}[/red]", str(count), "", "", "")
    out.print(kinds)
    stages = Table("model", "requests", "queue ms", "compute ms", "mean batch")
    for stage in shown.stages:
        stages.add_row(
            stage.model, str(stage.requests), f"{stage.queue_ms:.2f}", f"{stage.compute_ms:.2f}", f"{stage.batch:.1f}"
        )
    out.print(stages)
    for one in result["differences"]:
        out.print(f"{one['name']}: {one['old']:.4g} before, {one['new']:.4g} now, {one['verdict']}", highlight=False)
    out.print(result["verdict"], highlight=False, soft_wrap=True)


@contextmanager
def _served(release: Path | None, server: list[str] | None) -> Iterator[list[str]]:
    """Addresses of those that are there, or of a server of its own for the release."""
    if server:
        yield server
        return
    assert release is not None
    with tempfile.TemporaryDirectory(prefix="trirank-load-") as scratch:
        addresses, words = Path(scratch, "addresses.json"), Path(scratch, "words")
        command = [sys.executable, "-m", "trirank_build.cli", "serve", str(release), "--addresses", str(addresses)]
        command += ["--open", "statistics"]
        with words.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not addresses.is_file():
                if process.poll() is not None or time.monotonic() > deadline:
                    said = words.read_text(errors="replace").strip().splitlines()
                    raise ServeError((said or ["the server did not start"])[-1].removeprefix("error: "))
                time.sleep(0.1)
            yield [str(json.loads(addresses.read_text())["grpc"])]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _web(load: Any) -> None:
    from trirank_loadtest.run import locust

    command = locust(load, None, "--shape-seconds", "0", "--web-host", "127.0.0.1", "--autostart")
    out.print("Locust's page: http://127.0.0.1:8089; users are streams of requests, Ctrl-C ends it", highlight=False)
    subprocess.run(command, check=False)
