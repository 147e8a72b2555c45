"""The command line's frame: its help, how it ends, and the options that several verbs share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..model.language_model import LanguageModel


def see(example: str, page: str) -> str:
    """What ends a verb's help: an example, and where to read on. An argument of the command line's
    `epilog`."""
    return f"Example: {example.replace('[', chr(92) + '[')}\n\nRead on: {page}"


app = typer.Typer(
    help="TransNormerLLM: train, measure and use a linear-attention language model.",
    epilog=see("transnormer train recipes/demo.toml", "README.md"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluation = typer.Typer(
    help="Measure a model.",
    no_args_is_help=True,
    epilog=see(
        "transnormer eval perplexity --model runs/demo --text book.txt", "docs/evaluation.md"
    ),
)
app.add_typer(evaluation, name="eval")

Model = Annotated[
    Path,
    typer.Option("--model", help="A run, an exported model or a published checkpoint: its folder."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopK = Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(help="Draw among the likeliest tokens whose probabilities add up to this.")
]
TextField = Annotated[
    str, typer.Option(help="The field or column of jsonl and parquet with the text.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]


def main() -> None:
    """Run a verb; what the user can mend is one line on stderr and a non-zero exit."""
    import os
    import warnings

    # click's, or that of the click inside newer typers
    usage_error: Any = typer.BadParameter.__mro__[1]

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # type: ignore[assignment]
    try:
        sys.exit(app(prog_name="transnormer", standalone_mode=False) or 0)
    except usage_error as error:
        # there is none where nothing was asked for, and the help was shown
        if message := error.format_message():
            command = error.ctx.command_path if error.ctx else "transnormer"
            print(f"error: {message} ({command} --help says more)", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError, MemoryError) as error:
        print(f"error: {_said(error)}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        print(f"error: out of memory ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(1)


def _said(error: Exception) -> str:
    """What an error says in one line; the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or "out of memory"


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if show:
        from .. import __version__

        print(__version__)
        raise typer.Exit


def load_model(folder: Path, device: str) -> LanguageModel:
    from ..formats.folders import load
    from ..model.language_model import find_device

    return load(folder, device=find_device(device))


def stdout_console(width: int) -> Console:
    """Where tables are printed: as wide as the terminal, or `width` columns where the output is no
    terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)
