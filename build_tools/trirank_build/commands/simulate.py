"""`trirank simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trirank_build.commands.options import Seed, check_target
from trirank_build.progress import out


def simulate(
    target: Annotated[Path, typer.Option("--out", help="Folder for data, runs, releases and the report.")],
    recipe: Annotated[str, typer.Option(help="Recipe file, or the name of a shipped one.")] = "shop",
    rounds: Annotated[int, typer.Option(min=1, help="How often it is trained on what has happened.")] = 3,
    sessions: Annotated[int, typer.Option(min=50, help="Customers of a round.")] = 4_000,
    position_bias: Annotated[
        float, typer.Option(min=0, max=3, help="People look at position k with probability k^-bias.")
    ] = 1.0,
    seed: Seed = 0,
) -> None:
    """Let customers of the synthetic shop use a live service, and train on what they do."""
    check_target(target, "a simulation", replaces="settings.json")
    from trirank_build.online.simulate import ARMS, Settings, write_outcome
    from trirank_build.online.simulate import simulate as run
    from trirank_build.recipe import load_recipe

    settings = Settings(rounds=rounds, sessions=sessions, bias=position_bias, seed=seed)
    found = run(load_recipe(recipe), target, settings)
    path, plot = write_outcome(found, settings, target)
    table = Table("round", *ARMS, title="purchases a customer")
    rates = found.rates()
    for number in range(rounds + 1):
        table.add_row(str(number), *(f"{rates[arm][number]:.4f}" for arm in ARMS))
    out.print(table)
    for arm in ARMS[1:]:
        gain, low, high = found.gain(arm)
        out.print(f"after {rounds} rounds {gain:+.1%} ({low:+.1%} to {high:+.1%}) against {arm}")
    out.print(f"{path}, {plot}")
