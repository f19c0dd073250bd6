"""One server and two behind the client's balancing, and how near the model on paper comes to what was measured.

    python benchmarks/scaling.py [--rounds N] [--seconds S]

1,000 candidates, so that the requests and not the load generator decide; each server has one instance of the pipeline
``single``. Both share this machine's cores with Triton's own threads and with the load, so two servers are not twice
the machine here. Load comes from `trirank loadtest`'s own Locust, through our client, which shares the cores. The
model (trirank_loadtest.sizing) is given the capacity and a lone request's time, and asked for p99 at shares of the
capacity; what was measured at those rates, in other runs, stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from results import WORK, Figure, write
from serving import Rounds, make_requests, releases, stores_of
from trirank_build.serving.server import TritonServer
from trirank_loadtest.capacity import find_capacity
from trirank_loadtest.measured import Measured
from trirank_loadtest.run import Load, run
from trirank_loadtest.sizing import Server, machines, percentile_ms
from trirank_loadtest.slo import Slo

CANDIDATES, SHARES = 1000, (0.3, 0.5, 0.7, 0.85)
PROMISE = Slo("p99", 50.0)
RATES = (1_000, 5_000, 20_000, 100_000)


def recorded(release: Path) -> Path:
    """Requests of so many candidates, as a file."""
    requests = [
        {
            "item_ids": np.asarray(one.item_ids).tolist(), "user_id": one.user_id, "query": one.query,
            "scenario": one.scenario, "top_k": one.top_k, "timestamp": one.timestamp,
            "retrieval_scores": np.asarray(one.retrieval_scores).tolist(),
        }
        for one in make_requests(release, candidates=CANDIDATES)
    ]  # fmt: skip
    path = WORK / "scaling.json"
    path.write_text(json.dumps(requests))
    return path


def main() -> None:
    """Measure and write ``results/scaling.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    served = releases()
    release, requests, stores = served["single_1_instance"], recorded(served["single"]), stores_of(served["ensemble"])
    found, made = Rounds(), 0
    with ExitStack() as running:
        addresses = []
        for _ in range(2):
            server = running.enter_context(TritonServer(release, stores=stores))
            server.wait_ready()
            addresses.append(server.grpc)

        def measure(count: int, rate: float) -> Measured:
            nonlocal made
            made += 1
            return run(Load(addresses[:count], requests, rate, given.seconds, seed=made))

        guess = {1: 300.0, 2: 400.0}
        for _ in range(given.rounds):
            rates = {}
            for count in (1, 2):
                at = find_capacity(lambda rate, seed, count=count: measure(count, rate), [PROMISE], guess[count], 1)
                rates[count] = guess[count] = max(at.rate, 20.0)
                found.note(f"capacity_{count}_servers_rps", at.rate)
            found.note("two_servers_over_one_ratio", rates[2] / rates[1])
            lone = measure(1, 20.0).percentile(50.0)
            found.note("lone_p50_ms", lone)
            model = Server.holding(rates[1], PROMISE.limit, 1, lone)
            for share in SHARES:
                seen, said = measure(1, share * rates[1]).percentile(99.0), percentile_ms(model, share * rates[1], 99.0)
                found.note(f"p99_at_{share:.0%}_measured_ms".replace("%", ""), seen)
                found.note(f"p99_at_{share:.0%}_on_paper_ms".replace("%", ""), said)
                print(f"{share:.0%} of {rates[1]:.0f}/s: p99 {seen:.1f} ms measured, {said:.1f} on paper", flush=True)
    note = f"{CANDIDATES} candidates, an instance a server, {os.cpu_count()} cores, {given.rounds} rounds"
    figures = found.figures(note)
    figures = [figure._replace(name=figure.name.removesuffix("_ratio")) for figure in figures]
    by_name = {figure.name: figure.value for figure in figures}
    one = Server.holding(by_name["capacity_1_servers_rps"], PROMISE.limit, 1, by_name["lone_p50_ms"])
    for rate in RATES:
        needed = float(machines(one, rate, 99.0, PROMISE.limit))
        note = f"servers of one instance for p99 <= {PROMISE.limit:g} ms, on paper"
        figures.append(Figure(f"servers_for_{rate}_rps", needed, needed, needed, "servers", note))
    errors = [by_name[f"p99_at_{s}_on_paper_ms"] / by_name[f"p99_at_{s}_measured_ms"] for s in (30, 50, 70, 85)]
    spread = (statistics.median(errors), min(errors), max(errors))
    note = "p99, over shares of capacity"
    figures.append(Figure("paper_over_measured", *(round(value, 3) for value in spread), "", note))
    write("scaling", figures)
    for figure in figures:
        print(f"{figure.name:36} {figure.value:10.3f} {figure.unit:10} [{figure.low:.3f}, {figure.high:.3f}]")


if __name__ == "__main__":
    main()
