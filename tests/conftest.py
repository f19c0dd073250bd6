"""A small world that most tests share: a shop, a trained ranker, its ONNX, its release."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TRIRANK_DATA", ROOT.parent / "shared" / "data"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Servers one after the other, since they and those who measure them want a core for themselves; the other files
    beside them, each as a whole."""
    from xdist.scheduler import LoadScopeScheduling

    class ServersTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "servers" if "/e2e/" in file or file.endswith("/test_cli.py") else file

    return ServersTogether(config, log)


@pytest.fixture(scope="session")
def shop():
    from trirank_build.preparation.sources.shop import ShopSize, make_shop

    return make_shop(ShopSize(products=150, users=150, requests=4000, candidates=20), seed=1)


@pytest.fixture(scope="session")
def recipe():
    from trirank_build.recipe import Recipe

    return Recipe.model_validate(
        {
            "name": "tiny",
            "features": {"history_length": 8, "query_length": 6, "title_length": 6, "vocabulary": 300},
            "model": {"dim": 16, "heads": 2, "encoder_blocks": 1, "ffn": 32},
            # From nothing, so that what it ranks by is in all of its weights, the embeddings among them.
            "training": {"epochs": 3, "candidates": 12, "warmup_steps": 5, "start": "nothing"},
        }
    )


@dataclass(frozen=True)
class World:
    """Where the small world's files are; ``users`` is the address of a store with its users."""

    data: Path
    run: Path
    onnx: Path
    release: Path
    users: str

    @property
    def stores(self):
        """To serve it with."""
        from trirank_build.serving.stores import Stores

        return Stores(self.users, self.data.parent / "catalogue.npy")


@pytest.fixture(scope="session")
def policies():
    from trirank_backend.policies import Policy

    rules = {
        "search": [{"rule": "deduplicate"}],
        "home": [{"rule": "filter", "bought": True}, {"rule": "deduplicate"}],
        "new_items": [{"rule": "boost", "signals": ["NEW_ITEM"], "by": 5.0}, {"rule": "deduplicate"}],
    }
    return {name: Policy.model_validate({"rules": own}) for name, own in rules.items()}


@pytest.fixture(scope="session")
def world(shop, recipe, policies, tmp_path_factory) -> World:
    from trirank_backend.stores.store import open_store
    from trirank_build.data.dataset import Dataset
    from trirank_build.online.users import import_users
    from trirank_build.repository.assemble import assemble
    from trirank_build.repository.reports import export_run
    from trirank_build.training.trainer import train

    folder = tmp_path_factory.mktemp("world")
    dataset = Dataset.load(shop.save(folder / "data"))
    run = train(recipe, dataset, folder / "run")
    onnx = folder / "ranker.onnx"
    export_run(run, onnx)
    release = assemble(run, dataset, onnx, folder / "releases", engine="onnxruntime", policies=policies)
    users = f"sqlite:{folder / 'users.sqlite'}"
    store = open_store(users)
    import_users(dataset.events, store)
    store.close()
    return World(folder / "data", folder / "run", onnx, release, users)


@pytest.fixture(scope="session")
def single(world, trained, policies, tmp_path_factory):
    """The small world's release with all stages in one process."""
    from trirank_build.data.dataset import Dataset
    from trirank_build.repository.assemble import assemble
    from trirank_build.repository.configs import Instances

    folder = tmp_path_factory.mktemp("single")
    dataset = Dataset.load(world.data)
    two = Instances(single=2)  # as one would have them
    return assemble(
        trained, dataset, world.onnx, folder, pipeline="single", engine="onnxruntime", instances=two, policies=policies
    )


@pytest.fixture(scope="session")
def trained(world):
    from trirank_build.training.run import TrainedRun

    return TrainedRun.load(world.run)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the real data is not at {DATA}; point TRIRANK_DATA at it")
    return DATA
