"""The ``trirank`` command. Each subcommand reads its arguments, calls one function, prints a table."""

from __future__ import annotations

import json
import logging
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from trirank import RankError, __version__
from trirank_backend.errors import BackendError
from trirank_backend.stores.store import hide_password
from trirank_loadtest.errors import BadLoad, LoadTestError

from trirank_build.commands.data import app as data_app
from trirank_build.commands.doctor import doctor
from trirank_build.commands.engine import app as engine_app
from trirank_build.commands.loadtest import loadtest
from trirank_build.commands.online import catalogue_app, policy_app, users_app
from trirank_build.commands.options import Data, Engine, Json, Run, Seed, check_target
from trirank_build.commands.privacy import app as privacy_app
from trirank_build.commands.release import app as release_app
from trirank_build.commands.release import promote_checked
from trirank_build.commands.serving import health, rank, serve, token
from trirank_build.commands.simulate import simulate
from trirank_build.commands.skew import skew
from trirank_build.commands.text import app as text_app
from trirank_build.errors import BadUsage, TrirankBuildError
from trirank_build.progress import console as errors
from trirank_build.progress import out, warn, working

# Heavy imports (torch, polars, onnx) wait inside the commands, so that `trirank --help` answers at once.

_UsageError: Any = typer.BadParameter.__bases__[0]
"""Click's, which newer releases of Typer carry inside and name nowhere."""

app = typer.Typer(
    help="Ranking on NVIDIA Triton Inference Server: from raw logs to the best K in one gRPC call.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(engine_app, name="engine")
app.add_typer(release_app, name="release")
app.add_typer(policy_app, name="policy")
app.add_typer(catalogue_app, name="catalogue")
app.add_typer(users_app, name="users")
app.add_typer(privacy_app, name="privacy")
app.add_typer(text_app, name="text")
app.command()(doctor)
app.command()(serve)
app.command()(rank)
app.command()(health)
app.command()(token)
app.command()(loadtest)
app.command()(skew)
app.command()(simulate)


def _version(asked: bool) -> None:
    if asked:
        print(f"trirank {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show where errors come from, and what is logged.")
    ] = False,
    log_file: Annotated[Path | None, typer.Option(help="File for the same, appended to.")] = None,
) -> None:
    """What holds for every command."""
    if verbose or log_file is not None:
        logging.getLogger("trirank").setLevel(logging.DEBUG)
    handlers: list[logging.Handler] = [logging.StreamHandler()] if verbose else []
    if log_file is not None:
        try:
            handlers.append(logging.FileHandler(log_file))
        except OSError as error:
            raise BadUsage(f"--log-file {log_file} cannot be written ({error.strerror}); name another") from error
    if handlers:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, handlers=handlers, force=True)
        logging.getLogger("trirank").info("%s", " ".join(_without_secrets(sys.argv)))


def _without_secrets(words: list[str]) -> list[str]:
    """A command line for a log: what follows ``--token``, and passwords of addresses, are left out."""
    found = []
    for before, word in pairwise(["", *words]):
        if before == "--token":
            found.append("***")
        elif word.startswith("--token="):
            found.append("--token=***")
        else:
            found.append(hide_password(word) if "://" in word else word)
    return found


def main() -> None:
    """Entry point: every known error is one line and exit status 1, or 2 where the arguments are at fault."""
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:  # Typer's own would be a box of several lines
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            place = error.ctx.command_path if error.ctx else "trirank"
            words = " ".join(error.format_message().replace("Value error, ", "").split())
            told = f"[red]error:[/red] {_escaped(words.rstrip('.'))}. See `{place} --help`."
            errors.print(told, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except (TrirankBuildError, BackendError, RankError, LoadTestError) as error:
        logging.getLogger("trirank").debug("where the error comes from", exc_info=True)
        errors.print(f"[red]error:[/red] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, BadUsage | BadLoad) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, the name of a shipped one, or auto: one for this data.")],
    data: Data,
    target: Annotated[Path, typer.Option("--out", help="Run directory; a stopped run goes on.")],
    start_from: Annotated[Path | None, typer.Option(help="A finished run whose weights are the first ones.")] = None,
    update: Annotated[
        Path | None, typer.Option(help="A finished run on earlier data, that goes on with what was added since.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what is there.")] = False,
) -> None:
    """Train a ranker; under torchrun, on as many processes as it starts."""
    check_target(target, "a run")
    if update is not None and start_from is not None:
        raise BadUsage("--update and --start-from both say where to begin; give one")
    from trirank_build.recipe import load_recipe

    loaded = None if recipe == "auto" else load_recipe(recipe)
    from trirank_build.data.dataset import Dataset
    from trirank_build.training.trainer import train as run_training

    dataset, leads = Dataset.load(data), not int(os.environ.get("RANK", "0"))
    if loaded is None:
        from trirank_build.training.auto import choose

        loaded, reasons = choose(dataset)
        if leads:
            out.print("\n".join(reasons), soft_wrap=True, markup=False)
    run = run_training(loaded, dataset, target, start_from=start_from, update=update, fresh=fresh)
    if not leads:  # torchrun's other processes have nothing to add
        return
    title = f"{run.recipe.name}: {run.facts['parameters']:,} parameters"
    table = Table("phase", "epoch", "loss", "validation NDCG@10", title=title)
    for point in run.facts["curve"]:
        loss = "" if point["loss"] is None else f"{point['loss']:.4f}"
        table.add_row(point["phase"], str(point["epoch"]), loss, f"{point['valid_ndcg10']:.4f}")
    out.print(table)
    from trirank_build.presentation import standing

    if (said := standing(run.facts)) is not None:
        out.print(said.text, soft_wrap=True, highlight=False)
        if said.harmful:
            warn("the ranker is worse than the order in which candidates come: there is too little to learn from, or "
                 "the recipe does not fit")  # fmt: skip


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one, with a \\[tuning.space].")],
    data: Data,
    target: Annotated[Path, typer.Option("--out", help="Folder of the search; a stopped one goes on.")],
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all; the recipe's number by default.")] = None,
) -> None:
    """Search a recipe's settings on the validation split."""
    check_target(target, "a search")
    from trirank_build.recipe import load_recipe

    loaded = load_recipe(recipe)
    from trirank_build.data.dataset import Dataset
    from trirank_build.training.tuning import BEST
    from trirank_build.training.tuning import tune as search

    study = search(loaded, Dataset.load(data), target, trials)
    table = Table("trial", "state", "validation NDCG@10", *loaded.tuning.space, title=f"{loaded.name}: trials")
    for trial in study.trials:
        value = "" if trial.value is None else f"{trial.value:.4f}"
        drawn = [trial.params.get(key) for key in loaded.tuning.space]
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in drawn]
        table.add_row(str(trial.number), trial.state.name.lower(), value, *cells)
    out.print(table)
    if (target / BEST).is_file():
        out.print(f"the best one's recipe: {target / BEST}")


@app.command()
def compress(
    recipe: Annotated[str, typer.Argument(help="Compression recipe file, or the name of a shipped one.")],
    run: Run,
    data: Data,
    target: Annotated[Path, typer.Option("--out", help="Folder of the chain; a stopped one goes on.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Take steps whose settings changed again.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Look for the best chain; RECIPE is where it starts.")
    ] = False,
    trials: Annotated[int, typer.Option(min=2, help="For --search: chains to try.")] = 20,
    latency_ms: Annotated[float | None, typer.Option(min=0, help="For --search: most ms at 200 candidates.")] = None,
    size_mb: Annotated[float | None, typer.Option(min=0, help="For --search: most MB of the graph.")] = None,
    min_ndcg_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="For --search: least share of the dense NDCG@10.")
    ] = None,
) -> None:
    """Make a trained ranker smaller and faster, step by step."""
    check_target(target, "a chain")
    from trirank_build.compression.recipe import load_compression_recipe

    loaded = load_compression_recipe(recipe)
    from trirank_build.data.dataset import Dataset
    from trirank_build.training.run import TrainedRun

    dense, dataset = TrainedRun.load(run), Dataset.load(data)
    if search:
        from trirank_build.compression.search import Target
        from trirank_build.compression.search import search as look

        found = look(loaded, dense, dataset, target, Target(latency_ms, size_mb, min_ndcg_ratio), trials)
        table = Table(
            "trial", "ms at 200", "MB", "validation NDCG@10", "of dense", "on the front", title="chains tried"
        )
        for tried in found.tried:
            row = (f"{tried.latency_ms:.3f}", f"{tried.size_mb:.3f}", f"{tried.ndcg10:.4f}", f"{tried.ndcg_ratio:.4f}")
            table.add_row(str(tried.number), *row, "yes" if tried in found.front else "")
        out.print(table)
        out.print(f"Pareto front: {found.plot}; the chosen chain's recipe: {found.recipe}")
        return
    if (latency_ms, size_mb, min_ndcg_ratio) != (None, None, None):
        raise BadUsage("--latency-ms, --size-mb and --min-ndcg-ratio say what --search looks for; say --search too")
    from trirank_build.compression.chain import LINK
    from trirank_build.compression.chain import compress as run_chain

    done = run_chain(loaded, dense, dataset, target, fresh=fresh)
    table = Table("step", "parameters", "MB of checkpoint", "validation NDCG@10", "of dense", title=loaded.name)
    first = done.report[0]["valid_ndcg10"]
    for line in done.report:
        ndcg = line["valid_ndcg10"]
        size = f"{line['bytes'] / 1e6:.3f}"
        table.add_row(line["step"], f"{line['parameters']:,}", size, f"{ndcg:.4f}", f"{ndcg / first:.4f}")
    out.print(table)
    out.print(f"the compressed ranker: {target / LINK}")


@app.command()
def gate(
    run: Run,
    data: Data,
    onnx: Annotated[Path, typer.Option("--onnx", help="The exported ranker.")],
    engine: Annotated[
        Engine | None,
        typer.Option(help="What runs it; by default the fastest here."),
    ] = None,
    requests: Annotated[int, typer.Option(min=10, help="Held-out requests.")] = 1_000,
    split: Annotated[
        Literal["valid", "test"], typer.Option(help="Which requests; what is chosen by test is no longer known there.")
    ] = "valid",
    live: Annotated[bool, typer.Option(help="Whether to ask a live ensemble too.")] = True,
    as_json: Json = False,
) -> None:
    """Prove that the ranking survived, from the dense ranker to the live ensemble; exit status 1 if it did not."""
    from trirank_backend.scoring import available_engines

    from trirank_build.data.dataset import Dataset
    from trirank_build.engines.latency import chosen_engine
    from trirank_build.export.onnx import check_onnx
    from trirank_build.gate.report import write_report
    from trirank_build.gate.verdict import run_gate
    from trirank_build.training.run import TrainedRun

    trained = TrainedRun.load(run)
    check_onnx(onnx, trained.features.spec)
    runs = engine or chosen_engine(onnx, trained.features.spec, available_engines())
    report = run_gate(trained, Dataset.load(data), onnx, runs, split=split, requests=requests, live=live)
    path = write_report(report, onnx)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        from trirank_build.presentation import gate_table

        out.print(gate_table(report))
        out.print(f"report: {path} and {path.with_suffix('.html')}")
    if not report.passed:
        errors.print(f"[red]failed:[/red] {_escaped('; '.join(report.failures))}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def evaluate(
    run: Run,
    data: Data,
    split: Annotated[
        Literal["train", "valid", "test"],
        typer.Option(help="Which requests; look at test once, when all is chosen."),
    ] = "valid",
    protocol: Annotated[
        Literal["requests", "catalogue", "sampled"],
        typer.Option(
            help="requests: as logged; catalogue: the next choice among all items; sampled: among some.",
        ),
    ] = "requests",
    negatives: Annotated[int, typer.Option(min=1, help="For sampled: items drawn beside the choice.")] = 100,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a ranker with retrieval order and the simple baselines."""
    if html is not None:
        check_target(html, "a report", file=True, option="--html")
    from trirank_build.data.dataset import Dataset
    from trirank_build.evaluation import evaluate as evaluation
    from trirank_build.evaluation.report import verdict, write_report
    from trirank_build.features.examples import Examples
    from trirank_build.training.run import TrainedRun

    trained = TrainedRun.load(run)
    dataset = trained.judged(Dataset.load(data))
    with working("evaluating"):
        if protocol == "requests":
            examples = Examples.read(dataset, split, trained.features)
            found = evaluation.evaluate(trained.model(), examples, dataset, trained.features, seed=seed)
        else:
            found = evaluation.evaluate_catalogue(
                trained.model(), dataset, trained.features, split,
                negatives=negatives if protocol == "sampled" else None, seed=seed,
            )  # fmt: skip
    if html is not None:
        write_report(found, f"{trained.recipe.name} on {dataset.description.source}", trained.facts["curve"], html)
    if as_json:
        print(json.dumps(found.to_json() | {"verdict": verdict(found)}))
        return
    from trirank_build.presentation import evaluation_tables

    for table in evaluation_tables(found, split):
        out.print(table)
    out.print(verdict(found))


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Option("--out", help="ONNX file to write.")],
    model: Annotated[str | None, typer.Option(help="Your own package.module:Class.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights, .safetensors or .pt.")] = None,
    arguments: Annotated[str, typer.Option(help="Its constructor's arguments, as JSON.")] = "{}",
) -> None:
    """Write ONNX, proven equal to the module; of a run, or of your own module with a run's features."""
    check_target(target, "an ONNX graph", file=True)
    from trirank_build.export.onnx import export as write_onnx
    from trirank_build.export.onnx import load_module, parse_arguments
    from trirank_build.repository.reports import write_parity
    from trirank_build.training.run import TrainedRun

    trained = TrainedRun.load(run)
    if (model is None) != (checkpoint is None):
        raise BadUsage("--model and --checkpoint go together")
    if model is not None and checkpoint is not None:
        sys.path.insert(0, str(Path.cwd()))
        module = load_module(model, parse_arguments(arguments, trained.features.spec), checkpoint)
    else:
        module = trained.model()
    with working("exporting and checking parity"):
        parity = write_onnx(module, trained.features.spec, target)
    beyond = write_parity(target, parity, type(module).__name__)["beyond_tensorrt"]
    if beyond:
        warn(f"TensorRT's parser does not take {', '.join(beyond)}; the graph runs on a CPU alone")
    table = Table("candidates", "largest difference", title=f"{target}: module against ONNX")
    for bucket, difference in parity.by_bucket.items():
        table.add_row(str(bucket), f"{difference:.1e}")
    table.add_row("padding", f"{parity.padding:.1e}")
    table.add_row("batching", f"{parity.batching:.1e}")
    out.print(table)


@app.command("tune-serving")
def tune_serving(
    run: Run,
    data: Data,
    onnx: Annotated[Path, typer.Option("--onnx", help="The exported ranker.")],
    target: Annotated[Path, typer.Option("--out", help="Folder of the search; a stopped one goes on.")],
    slo: Annotated[list[str], typer.Option(help="A promise that is kept: p99=50ms, error_rate=0.1%.")],
    trials: Annotated[int, typer.Option(min=2, help="Settings that are tried, the usual ones among them.")] = 12,
    seconds: Annotated[float, typer.Option(min=1, help="Of one run of the load.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="In which the best is judged against the usual settings.")] = 3,
    allow_failing_gate: Annotated[bool, typer.Option("--allow-failing-gate", help="As of `trirank assemble`.")] = False,
) -> None:
    """Find what serves most on this machine within a promise: pipeline, instances, batches, engine, threads."""
    check_target(target, "a search")
    from trirank_loadtest.slo import read_all

    slos = read_all(slo)
    from trirank_build.artefacts import file_digest
    from trirank_build.data.dataset import Dataset
    from trirank_build.repository.assemble import assemble as make_release
    from trirank_build.repository.settings import ServingSettings
    from trirank_build.serving.stores import Stores
    from trirank_build.serving.tuning import SETTINGS, TRIALS, served_capacity
    from trirank_build.serving.tuning import tune as search
    from trirank_build.training.run import TrainedRun

    trained, dataset = TrainedRun.load(run), Dataset.load(data)
    if not onnx.is_file():
        raise BadUsage(f"--onnx {onnx} is no file; `trirank export` writes one")

    def made(settings: ServingSettings) -> Path:
        return make_release(
            trained, dataset, onnx, target / TRIALS, allow_failing_gate=allow_failing_gate, **settings.of_release()
        )

    capacity = served_capacity(made, target / TRIALS, slos, seconds, Stores())
    what = f"{file_digest(onnx)} {dataset.description.digest} {seconds}"
    found = search(capacity, target, ", ".join(one.words() for one in slos), trials, rounds, what)
    table = Table("trial", "settings", "requests/s that hold", title="settings tried")
    for number, words, rate in found.trials:
        table.add_row(str(number), words, f"{rate:.0f}")
    out.print(table)
    low, high = min(found.gains), max(found.gains)
    out.print(
        f"{found.settings.words()}: {found.rate:.0f} requests/s, {found.rate / max(found.default_rate, 1e-9):.2f} "
        f"({low:.2f} to {high:.2f}) times the {found.default_rate:.0f} of the usual settings. "
        f"Take them: trirank assemble … --settings {target / SETTINGS}", highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


@app.command()
def assemble(
    run: Run,
    data: Data,
    onnx: Annotated[Path, typer.Option("--onnx", help="The exported ranker.")],
    target: Annotated[Path, typer.Option("--out", help="Folder of releases.")],
    runtime: Annotated[
        Literal["python", "onnxruntime", "tensorrt"], typer.Option(help="What runs the ranker.")
    ] = "python",
    pipeline: Annotated[
        Literal["ensemble", "single"],
        typer.Option(
            help="ensemble: a model a stage. single: all stages in one process, for --runtime python.",
        ),
    ] = "ensemble",
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="For tensorrt: a plan, once for each.")] = None,
    provider: Annotated[
        Literal["cpu", "openvino", "cuda", "tensorrt"],
        typer.Option(help="For onnxruntime: its execution provider."),
    ] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of one call on a CPU; not for tensorrt.")] = 1,
    ranker_instances: Annotated[
        int, typer.Option(min=1, help="Rankers at work at a time; for single, whole pipelines. Not for tensorrt.")
    ] = 1,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="For python: what runs it; by default the gate's, else the fastest.",
        ),
    ] = None,
    allow_failing_gate: Annotated[
        bool,
        typer.Option(
            "--allow-failing-gate",
            help="Take a graph that failed the gate, or ranks worse than retrieval; the manifest says so.",
        ),
    ] = False,
    policies: Annotated[
        Path | None,
        typer.Option(help="Folder of policies SCENARIO.toml, beside the shipped ones or in their place."),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(help="What `trirank tune-serving` found: pipeline, engine, threads, instances, batches."),
    ] = None,
    index: Annotated[
        bool, typer.Option("--index", help="Put an index of all items in it, to find candidates with.")
    ] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Point `current` at it.")] = False,
) -> None:
    """Make a release: a model repository with all that it needs."""
    check_target(target, "a folder of releases")
    if settings is not None and (runtime, pipeline, threads, ranker_instances, engine) != (
        "python", "ensemble", 1, 1, None,
    ):  # fmt: skip
        raise BadUsage("--settings says how the release is served: leave --runtime, --pipeline, --threads, "
                       "--ranker-instances and --engine out")  # fmt: skip
    from trirank_backend.policies import load_policies

    from trirank_build.data.dataset import Dataset
    from trirank_build.repository.assemble import assemble as make_release
    from trirank_build.repository.configs import Instances
    from trirank_build.repository.release import load_manifest
    from trirank_build.repository.settings import ServingSettings
    from trirank_build.training.run import TrainedRun

    own = load_policies(policies) if policies is not None else None
    instances = Instances(ranker=ranker_instances, single=ranker_instances)
    served: dict[str, Any] = {"pipeline": pipeline, "instances": instances, "engine": engine, "threads": threads}
    if settings is not None:
        served = ServingSettings.load(settings).of_release()
    with working("assembling"):
        made = make_release(
            TrainedRun.load(run),
            Dataset.load(data),
            onnx,
            target,
            runtime=runtime,
            plans=plan,
            provider=provider,
            allow_failing_gate=allow_failing_gate,
            policies=own,
            index=index,
            **served,
        )
    if any(plan["flavour"] != "tensorrt" for plan in load_manifest(made)["engines"]):
        warn(
            "plans of TensorRT-RTX show the layout, but Triton's TensorRT backend cannot load them; build with "
            "--flavour tensorrt in NVIDIA's container to serve this release on a GPU"
        )
    if runtime == "python" and settings is None and pipeline == "ensemble":
        errors.print(
            "[dim]All stages could share one process (--pipeline single), which answers more requests a second on a "
            "CPU; `trirank tune-serving` finds what serves most here.[/dim]", soft_wrap=True,
        )  # fmt: skip
    if promote:
        promote_checked(made)
    print(made)


if __name__ == "__main__":
    main()
