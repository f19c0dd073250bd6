"""`make demo`: the whole line, from nothing to ranked answers of a real Triton server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trirank import RankClient, RankRequest
from trirank_backend.errors import BackendError
from trirank_backend.scoring import available_engines
from trirank_backend.stores.store import open_store

from trirank_build.artefacts import file_digest
from trirank_build.errors import TrirankBuildError
from trirank_build.online.users import import_users
from trirank_build.presentation import ranking_table
from trirank_build.progress import console, out, working
from trirank_build.serving.stores import usual_stores

if TYPE_CHECKING:
    from trirank_build.data.dataset import Dataset

WORK = Path("work") / "demo"
TOP_K = 10


def main() -> None:
    """Prepare, train, compress, export, gate, assemble, serve, ask, stop. What is there already is used again."""
    try:
        release = build(WORK)
        show(release)
    except (TrirankBuildError, BackendError) as error:
        console.print(f"[red]error:[/red] {error}")
        sys.exit(1)


def build(work: Path) -> Path:
    """The demo's release."""
    with working("loading libraries"):
        from trirank_build.compression.chain import compress
        from trirank_build.compression.recipe import load_compression_recipe
        from trirank_build.data.dataset import Dataset
        from trirank_build.engines.latency import chosen_engine
        from trirank_build.export.beside import gate_path
        from trirank_build.gate.report import write_report
        from trirank_build.gate.verdict import run_gate
        from trirank_build.preparation.options import PrepareOptions
        from trirank_build.preparation.prepare import SHOP, prepare
        from trirank_build.presentation import gate_table
        from trirank_build.recipe import load_recipe
        from trirank_build.repository.assemble import assemble
        from trirank_build.repository.reports import export_run
        from trirank_build.repository.store import promote
        from trirank_build.training.run import BEST
        from trirank_build.training.trainer import train

    data, onnx_path = work / "data", work / "ranker.onnx"
    if not (data / "dataset.json").is_file():
        prepare(SHOP, PrepareOptions()).save(data)
    dataset = Dataset.load(data)
    dense = train(load_recipe("shop"), dataset, work / "run")
    run = compress(load_compression_recipe("shop"), dense, dataset, work / "compression").last
    weights = file_digest(run.directory / BEST)
    marker = work / "exported"
    if not (gate_path(onnx_path).is_file() and marker.is_file() and marker.read_text() == weights):
        with working("exporting to ONNX and checking parity"):
            export_run(run, onnx_path)
        engine = chosen_engine(onnx_path, run.features.spec, available_engines())
        report = run_gate(run, dataset, onnx_path, engine)
        write_report(report, onnx_path)
        out.print(gate_table(report))
        marker.write_text(weights)
    with working("assembling the release"):
        release = assemble(run, dataset, onnx_path, work / "releases")
    promote(release)
    fill_store(release, dataset)
    out.print(f"release {release}, gate's report {gate_path(onnx_path).with_suffix('.html')}")
    return release


def fill_store(release: Path, dataset: Dataset) -> None:
    """Put the histories of the dataset's users where a server of this release looks for them."""
    stores = usual_stores(release, None, None)
    assert stores.users is not None
    with working("adding users' histories"):
        store = open_store(stores.users)
        if next(store.users(), None) is None:
            import_users(dataset.events, store)
        store.close()


def show(release: Path) -> None:
    """Serve it, ask for the three scenarios, print the answers, stop."""
    from trirank_build.repository.release import recorded_requests
    from trirank_build.serving.server import TritonServer

    requests = recorded_requests(release)
    with TritonServer(release, stores=usual_stores(release, None, None)) as server:
        server.wait_ready()
        out.print(f"Triton serves it at {server.grpc} (gRPC), {server.http} (HTTP), {server.metrics} (metrics)\n")
        with RankClient(server.grpc, deadline_s=5) as client:
            for title, request in scenarios(requests):
                out.print(ranking_table(request, client.rank(request), release, title))
                out.print()
    out.print("Triton has stopped. Next: trirank serve work/demo/releases/current")


def scenarios(requests: list[RankRequest]) -> list[tuple[str, RankRequest]]:
    """A search, a home page for a known user, one for an anonymous user."""
    search = next(request for request in requests if request.query and request.user_id is not None)
    known = next(request for request in requests if not request.query and request.user_id is not None)
    anonymous = next(request for request in requests if not request.query and request.user_id is None)
    return [
        (f"search for “{search.query}” by user {search.user_id}", search),
        (f"home page of user {known.user_id}", known),
        ("home page of an anonymous user", anonymous),
    ]


if __name__ == "__main__":
    main()
