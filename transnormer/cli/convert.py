"""The verbs that write a model in another format: `convert` and `export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Model, app, see

if TYPE_CHECKING:
    from ..formats.convert import Written

MaxShard = Annotated[str, typer.Option(help="Bytes a weight file at most, e.g. 5GB, 500MB.")]


@app.command(epilog=see("transnormer convert TransNormerLLM-1B tnl-1b", "docs/published.md"))
def convert(
    source: Annotated[
        Path, typer.Argument(help="A published TransNormerLLM or TransNormerLLM2 folder.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    max_shard: MaxShard = "5GB",
    tokenizer: Annotated[
        bool, typer.Option(help="Convert the folder's tokenizer, where it has one.")
    ] = True,
) -> None:
    """Turn a published checkpoint into our format, every tensor checked, in little memory."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from ..formats.convert import convert as run

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    shard_bytes = _bytes(max_shard)
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        written = run(source, out, shard_bytes=shard_bytes, tokenizer=tokenizer, progress=show)
    _tell(written)


@app.command(
    epilog=see(
        "transnormer export --model runs/demo --out demo --dtype bfloat16", "docs/published.md"
    )
)
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format: Annotated[
        str, typer.Option(help="transnormer, or published: as the published code reads it.")
    ] = "transnormer",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")
    ] = None,
    max_shard: MaxShard = "5GB",
) -> None:
    """Write a model and its tokenizer, without what only training needs."""
    import torch

    from ..formats.convert import export as run

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is unknown; there are float32, bfloat16, float16")
    kind = None if dtype is None else getattr(torch, dtype)
    _tell(run(model, out, format=format, dtype=kind, shard_bytes=_bytes(max_shard)))


def _bytes(size: str) -> int:
    """A number of bytes, such as 5GB, 500MB or 1000."""
    import re

    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)?", size.strip().upper())
    count = int(float(found[1]) * units[found[2] or ""]) if found else 0
    if count < 1:
        raise ValueError(f"{size!r} is no size in bytes; write e.g. 5GB, 500MB")
    return count


def _tell(written: Written) -> None:
    """What a new folder holds."""
    dtypes = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in written.dtypes.items())
    print(f"parameters      {written.config.parameter_count():,}")
    print(f"weights         {dtypes} in {len(written.files)} file{'s' * (len(written.files) > 1)}")
    print(f"tokenizer       {written.tokenizer or 'none'}")
    print(f"fingerprint     {'checked by every load' if written.fingerprint else 'none'}")
    print(f"in {written.folder}")
