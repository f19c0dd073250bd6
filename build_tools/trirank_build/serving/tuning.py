"""`trirank tune-serving`: which pipeline, instances, batches and threads serve most on this machine within a promise.

Every trial is a release with settings of its own, served and loaded for real; what is sought is its capacity. The
search is Optuna's (Akiba et al., KDD 2019), and what it finds is measured once more, in turns with the settings that
`assemble` takes by itself, since the best of many noisy trials looks better than it is.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from trirank_backend.scoring import exact_engines
from trirank_loadtest.capacity import find_capacity
from trirank_loadtest.errors import LoadFailed
from trirank_loadtest.measured import Measured
from trirank_loadtest.run import Load, run
from trirank_loadtest.slo import Slo

from trirank_build.errors import BadModel, ServeError
from trirank_build.progress import progress, warn
from trirank_build.repository.release import REQUESTS
from trirank_build.repository.settings import ServingSettings, cores
from trirank_build.serving.server import TritonServer
from trirank_build.serving.stores import Stores

SETTINGS, TRIALS, STUDY = "settings.toml", "trials", "study.db"
_DELAYS = (0, 200, 500, 1000, 2000)
_BATCHES = (4, 8, 16, 32)
_FIRST_RATE = 300.0

Capacity = Callable[[ServingSettings, float, int], float]
"""Settings, a rate to begin at, and repeats of a rate → requests a second that hold; 0: none do."""
_REPEATS = 3
"""Of a rate, in the last judgement."""


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        settings: the best; rate: its capacity, requests a second, median of the last rounds.
        default_rate: of the settings that `assemble` takes by itself, in the same rounds.
        gains: rate over default_rate, round by round.
        trials: number, settings in words, capacity.
    """

    settings: ServingSettings
    rate: float
    default_rate: float
    gains: list[float]
    trials: list[tuple[int, str, float]]


def tune(capacity: Capacity, out: Path, promise: str, trials: int, rounds: int, what: str = "") -> Tuned:
    """Search, judge, and leave the best settings in ``out``.

    Args:
        capacity: see ``served_capacity``; promise: what holds, in words.
        rounds: of the last judgement; what: is served, so that a search for another release is not gone on with.

    Raises:
        BadModel: there is another search in ``out``.
        ServeError: neither the best nor the usual settings hold any rate.
    """
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{(out / STUDY).resolve()}", study_name="serving", load_if_exists=True,
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=max(4, trials // 3)),
    )  # fmt: skip
    identity = f"{promise} {cores()} {what}"
    if study.user_attrs.get("identity", identity) != identity:
        raise BadModel(f"{out} holds a search for other promises, another ranker or machine; choose another --out")
    study.set_user_attr("identity", identity)
    if not any(trial.state.is_finished() for trial in study.trials):
        # What one has without a search, and what the documents advise.
        study.enqueue_trial(_as_choices(ServingSettings()))
        study.enqueue_trial(_as_choices(ServingSettings(pipeline="single", instances=cores())))
    rates: dict[ServingSettings, float] = {}
    with progress() as bar:
        task = bar.add_task("tuning", total=trials, completed=len(study.trials) if len(study.trials) > 2 else 0)
        while sum(trial.state.is_finished() for trial in study.trials) < trials:
            trial = study.ask()
            settings = _suggested(trial)
            if settings not in rates:
                best = max(rates.values(), default=_FIRST_RATE)
                rates[settings] = capacity(settings, best, 1)
            trial.set_user_attr("settings", settings.model_dump_json())
            study.tell(trial, rates[settings])
            bar.advance(task)
        ended = [trial for trial in study.trials if trial.value is not None]
        tried = [ServingSettings.model_validate_json(trial.user_attrs["settings"]) for trial in ended]
        best_settings = tried[max(range(len(ended)), key=lambda at: float(ended[at].value or 0))]
        task = bar.add_task("judging", total=2 * rounds)
        found: dict[ServingSettings, list[float]] = {best_settings: [], ServingSettings(): []}
        for number in range(rounds):
            # The same for both, and another one each round, since the rates that are tried follow from it.
            start = max(_FIRST_RATE, study.best_value) * (0.6 + 0.05 * number)
            for settings in list(found)[:: 1 if number % 2 else -1]:
                found[settings].append(capacity(settings, start, _REPEATS))
                bar.advance(task)
    default = found[ServingSettings()]
    if not any(default) and not any(found[best_settings]):
        raise ServeError(f"no settings hold {promise} at any rate; promise less")
    gains = [new / old if old else float("inf") for new, old in zip(found[best_settings], default, strict=True)]
    tuned = Tuned(
        best_settings, statistics.median(found[best_settings]), statistics.median(default), gains,
        [(one.number, settings.words(), float(one.value or 0)) for one, settings in zip(ended, tried, strict=True)],
    )  # fmt: skip
    words = f"{tuned.rate:.0f} requests/s hold {promise} on {cores()} cores;\n"
    words += f"{tuned.default_rate:.0f} with the settings that `trirank assemble` takes by itself."
    tuned.settings.save(out / SETTINGS, words)
    return tuned


def served_capacity(
    assemble: Callable[[ServingSettings], Path], trials: Path, slos: list[Slo], seconds: float, stores: Stores
) -> Capacity:
    """Capacities of releases that are served and loaded for real.

    Args:
        assemble: makes a release with settings below ``trials``, a folder that is emptied after each.
        seconds: of one run of the load.
    """
    percentiles = tuple(float(slo.name[1:]) for slo in slos if slo.name not in ("mean", "error_rate"))

    deadline_s = max([1.0, *(2e-3 * slo.limit for slo in slos if slo.name != "error_rate")])

    def capacity(settings: ServingSettings, start: float, repeats: int) -> float:
        try:
            release = assemble(settings)
            with TritonServer(release, stores=stores) as server:
                server.wait_ready()

                def measure(rate: float, number: int) -> Measured:
                    load = Load([server.grpc], release / REQUESTS, rate, seconds, through="grpc", seed=number)
                    return run(replace(load, percentiles=percentiles, deadline_s=deadline_s))

                return find_capacity(measure, slos, max(start, 20.0), repeats, least=10 / seconds).rate
        except (ServeError, LoadFailed) as error:  # of these settings, not of the search
            warn(f"{settings.words()}: {error}")
            return 0.0
        finally:
            shutil.rmtree(trials, ignore_errors=True)

    return capacity


def _suggested(trial: optuna.Trial) -> ServingSettings:
    pipeline = trial.suggest_categorical("pipeline", ["ensemble", "single"])
    counts = sorted({1, max(1, cores() // 2), cores(), 2 * cores()})
    choices = {
        "pipeline": pipeline,
        "engine": trial.suggest_categorical("engine", ["", *exact_engines()]) or None,
        "threads": trial.suggest_categorical("threads", sorted({1, cores()})),
        "instances": trial.suggest_categorical("instances", counts),
        "max_batch": trial.suggest_categorical("max_batch", _BATCHES),
        "queue_delay_us": trial.suggest_categorical("queue_delay_us", _DELAYS),
    }
    for name in ("preprocess_instances", "rerank_instances"):
        value = trial.suggest_categorical(name, [1, 2])
        if pipeline == "ensemble":
            choices[name] = value
    return ServingSettings.model_validate(choices)


def _as_choices(settings: ServingSettings) -> dict[str, object]:
    said = settings.model_dump()
    return said | {"engine": said["engine"] or ""}
