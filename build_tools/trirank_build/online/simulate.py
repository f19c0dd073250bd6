"""`trirank simulate`: customers of the synthetic shop use a live service, and what they do is trained on.

In each round customers come to two servers and to retrieval's plain order, the same customers with the same luck in
all three. What they do goes to their server as feedback. After a round the loop's server gets a release that was
trained on its own log (requests that it wrote down, and what came of them) and all data before; through the gate,
promoted while customers come. The first control is the first release, never trained again, though its users'
histories go on; the second is retrieval's first ten as they come, without a policy. A customer looks at position k
with probability k^-bias, and chooses of what was looked at as the shop's own model says (preparation.sources.shop).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank import FeedbackEvent, RankClient, RankRequest
from trirank.contract import ANONYMOUS_USER
from trirank_backend.scoring import exact_engines
from trirank_backend.stores.store import open_store

from trirank_build.artefacts import atomic_file
from trirank_build.data.dataset import Dataset
from trirank_build.engines.latency import chosen_engine
from trirank_build.errors import BadUsage, TrirankBuildError
from trirank_build.gate.report import write_report
from trirank_build.gate.verdict import run_gate
from trirank_build.online.datasets import with_feedback
from trirank_build.online.events import all_events
from trirank_build.online.requests import logged_requests
from trirank_build.online.users import import_users
from trirank_build.preparation.sources.shop import BUY, DAY_S, DAYS, START, Shop, ShopSize, Visits
from trirank_build.progress import out, working
from trirank_build.recipe import Recipe
from trirank_build.repository.assemble import assemble
from trirank_build.repository.reports import export_run
from trirank_build.serving.server import TritonServer
from trirank_build.serving.stores import Stores
from trirank_build.training.trainer import train

LOOP, NEVER, RETRIEVAL = ARMS = ("retrained", "never retrained", "retrieval's order")
PAGE = 10
SETTINGS = "settings.json"
"""Stands in every folder of a simulation."""
ROUND_DAYS = 7
_BATCH = 50
"""Customers that come at a time: their feedback is told before the next ones come."""
_GATE_REQUESTS = 300


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        sessions: customers of a round.
        bias: how fast people stop looking; also what training corrects for.
        log: requests of the log that the first release is trained on.
    """

    rounds: int = 3
    sessions: int = 4_000
    bias: float = 1.0
    log: int = 4_000
    products: int = 1_600
    users: int = 1_000
    seed: int = 0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        purchases: arm → [rounds + 1, sessions] purchases of each customer; in round r the loop's release has been
            trained on r rounds.
        releases: the loop's, by round.
    """

    purchases: dict[str, NDArray[np.int64]]
    releases: list[str] = field(default_factory=list)

    def rates(self) -> dict[str, list[float]]:
        """Purchases a customer, by arm and round."""
        return {arm: found.mean(1).tolist() for arm, found in self.purchases.items()}

    def gain(self, against: str, number: int = -1, samples: int = 2_000) -> tuple[float, float, float]:
        """By how much the loop sells more in a round, and the 95 % interval, customers drawn anew in pairs."""
        ours, others = self.purchases[LOOP][number], self.purchases[against][number]
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(ours), size=(samples, len(ours)))
        ratios = ours[drawn].mean(1) / np.maximum(others[drawn].mean(1), 1e-9) - 1
        low, high = np.percentile(ratios, [2.5, 97.5])
        return float(ours.mean() / others.mean() - 1), float(low), float(high)


class Arm:
    """A server with a store of its own."""

    def __init__(self, name: str, release: Path, dataset: Dataset, folder: Path, log: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.users, self.requests = name, f"sqlite:{folder / 'users.sqlite'}", folder / "requests"
        store = open_store(self.users)
        import_users(dataset.events, store)
        store.close()
        stores = Stores(self.users, requests=str(self.requests) if log else None)
        self.server = TritonServer(release, stores=stores, swappable=True)
        self.server.wait_ready()
        self.client = RankClient(self.server.grpc, deadline_s=20)

    def pages(self, visits: Visits, which: range, number: int) -> list[list[int]]:
        """Items shown to some customers."""
        answers = self.client.rank_many(
            [
                RankRequest(
                    item_ids=visits.items[at], retrieval_scores=visits.scores[at], timestamp=int(visits.when[at]),
                    user_id=None if visits.user[at] == ANONYMOUS_USER else int(visits.user[at]),
                    query=visits.query[at], top_k=PAGE, request_id=f"{number}-{at}",
                )
                for at in which
            ],
            concurrency=4,
        )  # fmt: skip
        return [answer.item_ids.tolist() for answer in answers]

    def close(self) -> None:
        """Stop the server."""
        self.client.close()
        self.server.stop()


def simulate(recipe: Recipe, folder: Path, settings: Settings, told: Callable[[str], None] = out.print) -> Outcome:
    """Run the loop; files of each round lie below ``folder``.

    Raises:
        TrirankBuildError: a release did not pass its gate, or a server failed.
    """
    last = START + (DAYS + (settings.rounds + 1) * ROUND_DAYS) * DAY_S
    if last > time.time():
        raise BadUsage(
            f"{settings.rounds} rounds would end in the future, and feedback from there is refused; this clock allows "
            f"{max(0, int((time.time() - START) / DAY_S - DAYS) // ROUND_DAYS - 1)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in (
        *folder.glob("data-*"),
        *folder.glob("run-*"),
        *(folder / name for name in ("loop", "never", "releases")),
    ):
        shutil.rmtree(left, ignore_errors=True)  # of a simulation before, whose events have the same ids
    (folder / SETTINGS).write_text(json.dumps(vars(settings), indent=1) + "\n")
    size = ShopSize(settings.products, settings.users, settings.log, 50)
    shop = Shop(size, settings.seed)
    first = dataset = Dataset.load(shop.dataset().save(folder / "data-0"))
    recipe = recipe.changed({"training.position_bias": settings.bias})
    release = _release(recipe, dataset, folder, 0)
    shape = (settings.rounds + 1, settings.sessions)
    found = Outcome({arm: np.zeros(shape, np.int64) for arm in ARMS}, [release.name])
    with ExitStack() as stack:
        loop = Arm(LOOP, release, dataset, folder / "loop", log=True)
        stack.callback(loop.close)
        never = Arm(NEVER, release, dataset, folder / "never", log=False)
        stack.callback(never.close)
        for number in range(settings.rounds + 1):
            visits = shop.visits(settings.sessions, number, DAYS + number * ROUND_DAYS, ROUND_DAYS)
            luck = np.random.default_rng([settings.seed, number, 1])  # another stream than the customers'
            _round(found, [loop, never], visits, number, settings, luck)
            told(f"round {number}: " + ", ".join(f"{arm} {rate[number]:.4f}" for arm, rate in found.rates().items()))
            if number == settings.rounds:
                break
            store = open_store(loop.users)
            grown = with_feedback(first, all_events(store), logged_requests(loop.requests))
            store.close()
            dataset = Dataset.load(grown.save(folder / f"data-{number + 1}"))
            release = _release(recipe, dataset, folder, number + 1)
            _promote_under_load(loop, release, shop, settings, number)
            found.releases.append(release.name)
    return found


def _round(
    found: Outcome, arms: list[Arm], visits: Visits, number: int, settings: Settings, luck: np.random.Generator
) -> None:
    """Customers come, choose, and tell."""
    count, candidates = visits.items.shape
    looked, clicked, carted, bought = luck.random((count, PAGE)), *luck.random((3, count, candidates))
    chance = np.arange(1, PAGE + 1) ** -settings.bias
    with working(f"round {number}: customers"):
        for start in range(0, count, _BATCH):
            which = range(start, min(start + _BATCH, count))
            pages = {arm.name: arm.pages(visits, which, number) for arm in arms}
            pages[RETRIEVAL] = [visits.items[at, :PAGE].tolist() for at in which]
            for name, shown in pages.items():
                events: list[FeedbackEvent] = []
                for at, page in zip(which, shown, strict=True):
                    place = {item: candidate for candidate, item in enumerate(visits.items[at].tolist())}
                    candidate = np.array([place[item] for item in page])
                    seen = looked[at, : len(page)] < chance[: len(page)]
                    click = seen & (clicked[at, candidate] < visits.click[at, candidate])
                    cart = click & (carted[at, candidate] < visits.cart[at, candidate])
                    buys = cart & (bought[at, candidate] < BUY)
                    found.purchases[name][number, at] = buys.sum()
                    if name != RETRIEVAL:
                        events += _events(visits, at, page, number, click, cart, buys)
                arm = next((arm for arm in arms if arm.name == name), None)
                for first in range(0, len(events), 1_000):
                    assert arm is not None
                    arm.client.feedback(events[first : first + 1_000])


def _events(
    visits: Visits,
    at: int,
    page: list[int],
    number: int,
    click: NDArray[np.bool_],
    cart: NDArray[np.bool_],
    buys: NDArray[np.bool_],
) -> list[FeedbackEvent]:
    """What a service tells of one page."""
    user = None if visits.user[at] == ANONYMOUS_USER else int(visits.user[at])
    kinds = (
        ("impression", np.ones(len(page), bool), 0),
        ("click", click, 20),
        ("cart", cart, 40),
        ("purchase", buys, 60),
    )
    return [
        FeedbackEvent(
            user_id=user, item_id=page[place], kind=kind, timestamp=int(visits.when[at]) + later,
            request_id=f"{number}-{at}", position=place + 1, event_id=f"{number}-{at}-{place}-{kind}",
        )
        for kind, happened, later in kinds
        for place in np.flatnonzero(happened).tolist()
    ]  # fmt: skip


def _release(recipe: Recipe, dataset: Dataset, folder: Path, number: int) -> Path:
    """Train, export, gate, assemble.

    Raises:
        TrirankBuildError: the gate failed.
    """
    run = train(recipe, dataset, folder / f"run-{number}")
    graph = folder / f"ranker-{number}.onnx"
    export_run(run, graph)
    engine = chosen_engine(graph, run.features.spec, exact_engines())
    report = run_gate(run, dataset, graph, engine, requests=_GATE_REQUESTS)
    write_report(report, graph)
    if not report.passed:
        raise TrirankBuildError(f"round {number}: the gate failed: {'; '.join(report.failures)}")
    return assemble(run, dataset, graph, folder / "releases", engine=engine)


def _promote_under_load(loop: Arm, release: Path, shop: Shop, settings: Settings, number: int) -> None:
    """Swap while customers of nobody's round come; any error is raised."""
    visits = shop.visits(_BATCH, 1_000 + number, DAYS + number * ROUND_DAYS, 1)
    stop, failed = threading.Event(), list[BaseException]()

    def come() -> None:
        try:
            with RankClient(loop.server.grpc, deadline_s=20, retry=None) as client:
                while not stop.is_set():
                    for at in range(_BATCH):
                        client.rank(RankRequest(item_ids=visits.items[at], top_k=PAGE, timestamp=int(visits.when[at])))
        except Exception as error:
            failed.append(error)

    load = threading.Thread(target=come)
    load.start()
    try:
        loop.server.swap(release)
    finally:
        stop.set()
        load.join()
    if failed:
        raise TrirankBuildError(f"a request failed while release {release.name} was promoted: {failed[0]}")


def write_outcome(found: Outcome, settings: Settings, folder: Path) -> tuple[Path, Path]:
    """The outcome as JSON and as a plot."""
    from matplotlib.figure import Figure

    gains = {arm: found.gain(arm) for arm in ARMS[1:]}
    report: dict[str, Any] = {
        "settings": vars(settings), "purchases_a_customer": found.rates(), "releases": found.releases,
        "gain": {arm: dict(zip(("value", "low", "high"), gain, strict=True)) for arm, gain in gains.items()},
    }  # fmt: skip
    path, plot = folder / "closed_loop.json", folder / "closed_loop.svg"
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, rates in found.rates().items():
        spread = found.purchases[arm].std(1) / np.sqrt(found.purchases[arm].shape[1]) * 1.96
        axes.errorbar(range(len(rates)), rates, yerr=spread, marker="o", capsize=3, label=arm)
    axes.set(xlabel="rounds that the loop's release was trained on", ylabel="purchases a customer", ylim=(0, None))
    axes.set_xticks(range(len(found.releases)))
    axes.legend()
    axes.set_title("the same customers, with the same luck, at three shops")
    figure.savefig(plot)
    return path, plot
