"""`trirank engine`: TensorRT plans."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from trirank_build.commands.options import Run, check_target
from trirank_build.errors import BadModel
from trirank_build.progress import out

app = typer.Typer(help="Build TensorRT plans, and say what they are.", no_args_is_help=True)


@app.command("build")
def build(
    onnx: Annotated[Path, typer.Option("--onnx", help="The exported ranker.")],
    run: Run,
    target: Annotated[Path, typer.Option("--out", help="Folder for the plans.")],
    sm: Annotated[list[str], typer.Option("--sm", help="GPU architecture, 86 say; once for each.")],
    flavour: Annotated[
        Literal["tensorrt", "tensorrt_rtx"], typer.Option(help="Whose plan; Triton loads tensorrt's.")
    ] = "tensorrt_rtx",
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"], typer.Option(help="For tensorrt.")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later TensorRT of the same major run it.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights out, to be refitted from the graph.")
    ] = False,
    workspace_mb: Annotated[int, typer.Option(min=1, help="Most memory that a layer may use.")] = 1024,
) -> None:
    """Build a TensorRT plan for each GPU architecture."""
    check_target(target, "plans")
    from trirank_build.engines.builder import BuildOptions, build_plans
    from trirank_build.engines.plan import load_plan_manifest
    from trirank_build.training.run import TrainedRun

    options = BuildOptions(hardware_compatibility, version_compatible, strip_weights, workspace_mb << 20)
    plans = build_plans(onnx, TrainedRun.load(run).features.spec, sm, target, flavour, options)
    table = Table("plan", "GPU", "made by", "MB", "profiles", title="plans")
    for plan in plans:
        manifest = load_plan_manifest(plan)
        buckets = ", ".join(str(profile["bucket"]) for profile in manifest.profiles)
        size = f"{plan.stat().st_size / 1e6:.1f}"
        table.add_row(str(plan), manifest.sm, f"{manifest.flavour} {manifest.version}", size, buckets)
    out.print(table)


@app.command("verify")
def verify(
    place: Annotated[Path, typer.Argument(help="A plan, or a folder of plans.")],
    onnx: Annotated[Path | None, typer.Option("--onnx", help="The graph that they should come from.")] = None,
) -> None:
    """Say of every plan whether it is what it says; exit status 1 if one is not."""
    from trirank_build.engines.verify import plans_of
    from trirank_build.engines.verify import verify as problems_of

    problems = {plan: problems_of(plan, onnx) for plan in plans_of(place)}
    for plan, found in problems.items():
        out.print(f"{plan}: " + ("; ".join(found) if found else "as it was built"), soft_wrap=True, highlight=False)
    if any(problems.values()):
        sys.exit(1)


@app.command("list")
def list_plans(folder: Annotated[Path, typer.Argument(help="A folder of plans.")]) -> None:
    """The plans that a folder's lock knows."""
    from trirank_build.engines.lock import read_lock

    plans = read_lock(folder)
    if not plans:
        raise BadModel(f"{folder} has no plans; build some with `trirank engine build`")
    table = Table("plan", "GPU", "made by", "CUDA", "from ONNX", "flags", "key", title=str(folder))
    for name, entry in plans.items():
        made_by = f"{entry['flavour']} {entry['version']}"
        shown = (entry["cuda"], entry["onnx"][:12], ", ".join(entry["flags"]), entry["key"][:12])
        table.add_row(name, entry["sm"], made_by, *shown)
    out.print(table)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="A plan.")],
    onnx: Annotated[Path | None, typer.Option("--onnx", help="The graph that it came from.")] = None,
) -> None:
    """Which engine it is, for which GPU, from which model, and whether it is any good."""
    from trirank_build.engines.explain import explain as answers_of

    table = Table(show_header=False, title=str(plan))
    for question, answer in answers_of(plan, onnx):
        table.add_row(question, answer)
    out.print(table)
