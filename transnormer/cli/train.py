"""`transnormer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .app import app, see


class TrainCommand(TyperCommand):
    """Its help ends with the tables of settings, read from the recipe when it is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import dataclasses
        import typing

        from ..train.recipe import Recipe

        tables = ["Settings, any of which may be given as key=value, by table:"]
        for name, kind in typing.get_type_hints(Recipe).items():
            keys = next(
                (part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)),
                None,
            )
            if keys is not None:
                tables.append(
                    f"{name}: {', '.join(field.name for field in dataclasses.fields(keys))}"
                )
            elif name == "model":
                tables.append(
                    "model: size, kind and any field of ModelConfig, e.g. hidden_size, or from "
                    "alone"
                )
        self.epilog = "\n\n".join([*tables, self.epilog or ""])
        super().format_help(ctx, formatter)


@app.command(
    cls=TrainCommand,
    epilog=see("transnormer train recipes/demo.toml optim.lr=1e-3 run=second", "docs/training.md"),
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/demo.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: key=value, e.g. optim.lr=1e-3.")
    ] = None,
) -> None:
    """Train a model from a recipe into runs/<run>; the same command again goes on where it
    stopped."""
    import time

    from ..train.loop import Interrupted
    from ..train.loop import train as run
    from ..train.mesh import FailedOnOtherRank
    from ..train.metrics import say
    from ..train.recipe import Recipe

    try:
        run(Recipe.load(recipe, overrides or ()))
    except Interrupted as error:
        say(str(error))
        raise typer.Exit(128 + error.signal_number) from error
    except FailedOnOtherRank as error:
        time.sleep(2)  # torchrun ends all when one has ended, and the other is to say why first
        raise typer.Exit(1) from error
