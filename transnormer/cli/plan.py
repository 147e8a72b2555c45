"""`transnormer plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, see, stdout_console

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..planning.search import Job


@app.command(
    epilog=see("transnormer plan --size 7b --gpus 64 --gpu h100 --tokens 1T", "docs/planning.md")
)
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Fields of the model to change, e.g. model.hidden_size=25600."),
    ] = None,
    size: Annotated[str, typer.Option(help="The model: a named size, e.g. 175b.")] = "385m",
    gpus: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind, e.g. h100, h200, a100, b200.")] = "h100",
    tokens: Annotated[str, typer.Option(help="To train on, e.g. 300B, 2T.")] = "1T",
    seq: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 2_048,
    batch_tokens: Annotated[
        str,
        typer.Option(
            help="Tokens a step; K is 2^10, M 2^20. By default about 4M that the GPUs can share."
        ),
    ] = "",
    replicate: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of copies of the model.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of GPUs that share each row.")
    ] = None,
    tensor: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of GPUs that share each product.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of microbatches a step.")
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option("--recompute/--no-recompute", help="Fix whether activations are recomputed."),
    ] = None,
    compare_tensor: Annotated[
        bool,
        typer.Option(
            "--compare-tensor", help="Instead: --tensor 1, 2, 4, 8, beside the Transformer's."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Find the meshes of GPUs on which a training run fits, what they need, and how long it
    takes."""
    from ..planning.search import Job
    from ..train.recipe import model_overrides

    config = model_overrides(size, overrides or ())
    if compare_tensor:
        _show_tensor_sizes(config, gpus, seq, gpu.lower(), as_json)
        return
    job = Job(
        config=config,
        gpus=gpus,
        gpu_name=gpu.lower(),
        tokens=_count(tokens, 1_000),
        seq_len=seq,
        batch_tokens=_count(batch_tokens, 1_024) if batch_tokens else 0,
        replicate=replicate,
        context=context,
        tensor=tensor,
        accumulate=accumulate,
        recompute=recompute,
    )
    _show_plans(job, as_json)


def _show_tensor_sizes(
    config: ModelConfig, gpus: int, seq_len: int, gpu_name: str, as_json: bool
) -> None:
    """Print what a model needs under tensor parallelism of several sizes, beside a Transformer."""
    import json

    from ..config import TRANSFORMER
    from ..planning import search
    from ..planning.check import compared

    models = {"ours": config, "Transformer": config.replace(**TRANSFORMER)}
    found = {
        name: search.compare_tensor(each, gpus, seq_len, gpu_name) for name, each in models.items()
    }
    if as_json:
        memory = {name: [vars(plan.memory) for plan in plans] for name, plans in found.items()}
        print(json.dumps(memory, indent=2))
    else:
        stdout_console(100).print(compared(found))


def _show_plans(job: Job, as_json: bool) -> None:
    """Find the best plans of a job, check their shares, and print them."""
    import json
    import textwrap

    from rich.console import Console

    from ..planning import scaling
    from ..planning.check import as_settings, check_plan, record, table

    with Console(stderr=True).status("looking for meshes") as status:
        plans, checked = job.best(), True
        for number, each in enumerate(plans):
            status.update(f"cutting the model for plan {number + 1} of {len(plans)}")
            checked &= check_plan(job.config, each)
    if as_json:
        print(json.dumps(record(job, plans), indent=2))
        return
    stdout_console(100).print(table(job, plans))
    if checked:
        print(
            "Shares of weights, and so of gradients and optimizer, are checked against the real "
            "sharding code."
        )
    else:
        print(
            "There are too many processes to simulate: shares are not checked against the real "
            "sharding code."
        )
    if any(each.layout.tensor * each.layout.context > 1 for each in plans):
        print(
            "Speeds are those of GPUs that wait for no host: under tensor and context with "
            "train.graph = true."
        )
    if (fits := scaling.read_fits()) is not None:
        print(textwrap.fill(scaling.described(job.config, job.tokens, fits), 100))
    print("The best as settings of `transnormer train`:", *as_settings(job, plans[0]))


def _count(text: str, thousand: int) -> int:
    """A number of tokens, such as 2T, 300B, 4M or 1000."""
    import re

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper())
    count = round(float(found[1]) * thousand ** " KMBT".index(found[2] or " ")) if found else 0
    if count < 1:
        raise ValueError(f"{text!r} is no number of tokens; write e.g. 2T, 300B, 4M")
    return count
