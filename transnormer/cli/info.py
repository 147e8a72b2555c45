"""The verbs that tell of models and runs: `info` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, see, stdout_console

if TYPE_CHECKING:
    from ..model.language_model import LanguageModel

STATE_TOKENS = 2_048  # of the text whose state `info` counts


@app.command(epilog=see("transnormer info runs/demo", "docs/training.md"))
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A run, another model's folder, or the name of a size, e.g. 385m."),
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", help="The same.")] = None,
) -> None:
    """What a model is and costs, and how a run stands; without one, what is installed here."""
    import platform

    import torch

    from .. import __version__
    from ..config import SIZES, ModelConfig
    from ..formats.folders import load
    from ..layer_config import nearest
    from ..model.language_model import LanguageModel
    from ..run_folder import CHECKPOINTS, step_folders
    from ..train.runs import describe_run, is_run, read_run

    wanted = model or model_option
    if wanted is None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(
            f"transnormer {__version__}, Python {platform.python_version()}, torch "
            f"{torch.__version__}, GPU: {gpu}"
        )
        for size in SIZES:
            print(f"  {size:>5}  {ModelConfig.named(size).parameter_count():>15,} parameters")
        return
    folder = Path(wanted)
    if wanted.lower() in SIZES:  # a folder of that name is ./NAME
        with torch.device("meta"):
            _say_model(LanguageModel(ModelConfig.named(wanted.lower())))
        return
    if not folder.exists():
        sizes = f"a size ({', '.join(SIZES)}){nearest(wanted, list(SIZES))}"
        raise FileNotFoundError(f"{wanted}: neither a folder nor {sizes}")
    if is_run(folder):
        print(*describe_run(read_run(folder)), sep="\n")
        if not step_folders(folder / CHECKPOINTS):
            print("model           no checkpoint yet")
            return
    _say_model(load(folder))


def _say_model(model: LanguageModel) -> None:
    config = model.config
    weights = sum(p.nbytes for p in model.parameters())
    print(f"parameters      {model.parameter_count():,} ({weights / 2**20:,.1f} MiB in memory)")
    print(
        f"training        {model.flops_per_token(2_048) / 1e9:,.3f} GFLOP per token (forward and "
        "backward, 2,048 tokens)"
    )
    itemsize = model.head_weight.element_size()  # that of keys and values
    state = config.state_bytes(STATE_TOKENS, itemsize)
    if growth := config.growth_bytes(itemsize):
        grows = f" of {STATE_TOKENS:,} tokens, and grows by {growth:,} bytes with every token"
    elif config.linear:
        grows = ", whatever the length"
    else:
        grows = f" of {STATE_TOKENS:,} tokens; it grows by 0 bytes a token once windows are full"
    print(f"state           {state / 2**20:,.2f} MiB per sequence{grows}")
    print(
        "tokenizer       "
        f"{f'{model.tokenizer.get_vocab_size():,} words' if model.tokenizer else 'none'}"
    )
    print(config.to_json(), end="")


@app.command(
    epilog=see("transnormer compare runs/demo runs/second --out curves.png", "docs/training.md")
)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, e.g. runs/first runs/second.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A PNG to draw the loss curves into, one over the other.")
    ] = None,
) -> None:
    """Runs side by side: their losses and speed, the settings in which they differ, their curves in
    one picture."""
    from ..train.runs import compare as read

    figures, settings = read(runs, out)
    console = stdout_console(200)
    console.print(figures)
    if settings is not None:
        console.print(settings)
    elif len(runs) > 1:
        print("All settings are the same.")
    if out is not None:
        print(f"curves in {out}")
