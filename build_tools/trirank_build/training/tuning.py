"""`trirank tune`: search the recipe's [tuning.space] with Optuna (Akiba et al., KDD 2019), judged on validation alone.

The folder holds ``study.db``, from which a stopped search goes on, the runs of the trials that were not given up, and
``best.toml``, the recipe of the best one so far.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import optuna
import tomli_w

from trirank_build.artefacts import atomic_file
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadRecipe, Diverged
from trirank_build.progress import progress
from trirank_build.recipe import Recipe, TuningRange
from trirank_build.training.trainer import train

STUDY, BEST, TRIALS = "study.db", "best.toml", "trials"
_PHASE = 10_000
"""Steps between two phases, so that pruning compares epochs of the same phase only."""
_WARM_UP_TRIALS = 3
"""Trials that run to their end before any is pruned."""


def tune(recipe: Recipe, dataset: Dataset, out: Path, trials: int | None = None) -> optuna.Study:
    """Run trials until there are ``trials`` (the recipe's number by default), those of earlier calls included.

    Raises:
        BadRecipe: there is nothing to search, a key is unknown, or the folder is of another search.
    """
    space = recipe.tuning.space
    if not space:
        raise BadRecipe(f'recipe {recipe.name} has no [tuning.space]; say there what to try, for instance '
                        '"model.dropout" = { low = 0.1, high = 0.5 }')  # fmt: skip
    for key, values in space.items():  # both ends of every range, before anything runs
        for value in (values.low, values.high) if isinstance(values, TuningRange) else values:
            recipe.changed({key: value})
    wanted = recipe.tuning.trials if trials is None else trials
    out.mkdir(parents=True, exist_ok=True)
    identity = f"{recipe.model_dump_json(exclude={'tuning': {'trials'}})} {dataset.description.digest}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{(out / STUDY).resolve()}", study_name="trirank", load_if_exists=True, direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=recipe.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_WARM_UP_TRIALS, n_warmup_steps=1),
    )  # fmt: skip
    if study.user_attrs.get("identity", identity) != identity:
        raise BadRecipe(f"{out} holds the search of another recipe or dataset; choose another --out")
    study.set_user_attr("identity", identity)
    with progress() as bar:
        ended = [trial for trial in study.trials if trial.state.is_finished()]
        task = bar.add_task("tuning", total=wanted, completed=len(ended))
        for _ in range(wanted - len(ended)):
            _trial(study, recipe, dataset, out)
            bar.advance(task)
            best = _best(study)
            if best is not None:
                bar.update(task, description=f"tuning, best NDCG@10 {best.value:.4f} in trial {best.number}")
                with atomic_file(out / BEST) as scratch:
                    found = recipe.changed(best.params)
                    scratch.write_text(tomli_w.dumps(found.model_dump(exclude_none=True)))
    return study


def _trial(study: optuna.Study, recipe: Recipe, dataset: Dataset, out: Path) -> None:
    trial = study.ask()
    folder = out / TRIALS / str(trial.number)
    phases: list[str] = []

    def report(phase: str, epoch: int, ndcg: float) -> None:
        if phase not in phases:
            phases.append(phase)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed phase reports an epoch again
            trial.report(ndcg, (len(phases) - 1) * _PHASE + epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        run = train(recipe.changed(_draw(trial, recipe)), dataset, folder, report=report)
    except (optuna.TrialPruned, Diverged) as error:
        trial.set_user_attr("why", str(error) or "below the median")
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        shutil.rmtree(folder, ignore_errors=True)
        return
    last = run.facts["curve"][-1]["phase"]
    value = max(point["valid_ndcg10"] for point in run.facts["curve"] if point["phase"] == last)
    study.tell(trial, value)


def _draw(trial: optuna.Trial, recipe: Recipe) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    for key, values in recipe.tuning.space.items():
        if not isinstance(values, TuningRange):
            drawn[key] = trial.suggest_categorical(key, values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            drawn[key] = trial.suggest_int(key, values.low, values.high, log=values.log)
        else:
            drawn[key] = trial.suggest_float(key, values.low, values.high, log=values.log)
    return drawn


def _best(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return max(done, key=lambda trial: trial.value or 0.0) if done else None
