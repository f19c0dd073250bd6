"""What was tried on the hot path, side by side: the same pipeline in one process with one thing changed at a time.

    python benchmarks/tried.py [--rounds N] [--seconds S]

``plain``: as ``assemble --pipeline single`` writes it, an instance a core. ``one_instance``: one of it.
``queue_policy``: that with the timeout and its override that every queue had before. ``pinned``: with OpenVINO's own
default, under which each process pins its thread to one core.
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path

import load
from results import WORK, write
from serving import CONCURRENCIES, Rounds, make_requests, releases
from trirank import contract as c
from trirank_build.repository.configs import config_text
from trirank_build.repository.release import model_config
from trirank_build.serving.server import TritonServer

SLEPT_MS = 450.0
PINNED = """
import openvino
_compile = openvino.Core.compile_model
openvino.Core.compile_model = lambda self, model, device, config: _compile(
    self, model, device, config | {"ENABLE_CPU_PINNING": True})
"""


def with_queue_policy(release: Path) -> None:
    """A timeout of ten seconds that callers may shorten."""
    config = model_config(release, c.ENSEMBLE)
    policy = config.dynamic_batching.default_queue_policy
    policy.default_timeout_microseconds, policy.allow_timeout_override = 10_000_000, True
    (release / "models" / c.ENSEMBLE / "config.pbtxt").write_text(config_text(config))


def pinned(release: Path) -> None:
    """Every process's thread on the same core."""
    model = release / "models" / c.ENSEMBLE / "1" / "model.py"
    model.write_text(model.read_text() + PINNED)


def main() -> None:
    """Measure and write ``results/tried.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    served = releases()
    requests, found = make_requests(served["single"]), Rounds()
    with ExitStack() as running:
        places = {}
        for name, base, change in (
            ("plain", "single", None), ("pinned", "single", pinned), ("one_instance", "single_1_instance", None),
            ("queue_policy", "single_1_instance", with_queue_policy),
        ):  # fmt: skip
            release = WORK / "tried" / name
            shutil.rmtree(release, ignore_errors=True)
            shutil.copytree(served[base], release)
            if change is not None:
                change(release)
            server = running.enter_context(TritonServer(release))
            server.wait_ready()
            places[name] = (load.triton(server.grpc, requests), server.pid)
        for number in range(-1, given.rounds):  # the first is not counted
            order = list(places)[number % len(places) :] + list(places)[: number % len(places)]
            for callers in CONCURRENCIES:
                for name in order:
                    target, pid = places[name]
                    run = load.closed_loop(target, callers, given.seconds, [pid])
                    if number >= 0:
                        found.note(f"{name}_rps_c{callers}", run.rate)
                        found.note(f"{name}_p50_ms_c{callers}", run.percentile(50))
                        found.note(f"{name}_p99_ms_c{callers}", run.percentile(99))
                        share = float((run.latencies_ms > SLEPT_MS).mean())
                        found.note(f"{name}_slept_share_ratio_c{callers}", share)
    figures = found.figures(f"200 candidates, h2load, median of {given.rounds} rounds of {given.seconds:g} s")
    write("tried", figures)
    for figure in figures:
        print(f"{figure.name:36} {figure.value:10.4f} {figure.unit:10} [{figure.low:.4f}, {figure.high:.4f}]")


if __name__ == "__main__":
    main()
