"""The verbs that measure a model: `eval perplexity` and `eval harness`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Device, Model, TextField, evaluation, load_model, see, stdout_console

if TYPE_CHECKING:
    from ..evaluation.perplexity import Score


@evaluation.command(
    epilog=see("transnormer eval perplexity --model runs/demo --text book.txt", "docs/inference.md")
)
def perplexity(
    model: Model,
    text: Annotated[
        list[Path],
        typer.Option(
            help="A text, jsonl or parquet file; may be given several times, more may follow it."
        ),
    ],
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    text_field: TextField = "text",
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read so many tokens at most from a fresh state; by default a text is read whole.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Loss, perplexity and bits per byte of texts of any length, each read from its first token to
    its last."""
    files = [*text, *(more or [])]
    scores = _scores(model, files, text_field, window, device)
    total = sum((score for score, _ in scores[1:]), scores[0][0])
    if as_json:
        import json

        each = [
            {"file": str(file), "documents": count} | score.record()
            for file, (score, count) in zip(files, scores, strict=True)
        ]
        record = {"model": str(model), "window": window, "files": each, "together": total.record()}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return

    from rich.table import Table
    from rich.text import Text

    table = Table(
        "text",
        "tokens",
        "bytes",
        "loss (nats/token)",
        "perplexity",
        "bits per byte",
        "perplexity per word",
    )
    for file, (score, _) in zip(files, scores, strict=True):
        table.add_row(Text(str(file)), *_cells(score))
    if len(files) > 1:
        table.add_row("together", *_cells(total))
    stdout_console(200).print(table)


def _scores(
    model: Path, files: list[Path], text_field: str, window: int | None, device: str
) -> list[tuple[Score, int]]:
    """The score of each file's texts, and how many texts it has, beside a progress bar."""
    from rich.markup import escape

    from ..data.documents import read_texts
    from ..data.prepare import progress_bar
    from ..evaluation.perplexity import score_documents

    sizes = [
        sum(len(each.encode()) for each in read_texts(file, text_field=text_field))
        for file in files
    ]
    loaded = load_model(model, device)
    scores = []
    with progress_bar() as report:
        for file, size in zip(files, sizes, strict=True):

            def show(done: int, task: str = escape(str(file)), size: int = size) -> None:
                report(task, done, size)

            try:
                texts = read_texts(file, text_field=text_field)
                scores.append(score_documents(loaded, texts, window=window, progress=show))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
    return scores


@evaluation.command(
    epilog=see(
        "transnormer eval harness --model runs/demo --tasks boolq,piqa --data documents",
        "docs/evaluation.md",
    )
)
def harness(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            help=(
                "Names, commas between; the harness' own, too. By default those of the paper's "
                "table."
            )
        ),
    ] = "",
    data: Annotated[
        Path | None, typer.Option(help="A folder with the tasks' documents: no network is needed.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question; by default the task's own."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many documents of each task.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read at a time.")] = 8_192,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Of longer prompts, read the last so many tokens.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file to write, with all results and settings.")
    ] = None,
    device: Device = "auto",
) -> None:
    """The paper's benchmarks, and all of lm-evaluation-harness, on our own forward."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    from ..files import check_can_write, write_text

    try:
        from ..evaluation.harness import PAPER, evaluate, table
    except ImportError as error:
        raise ValueError(error) from error

    if out is not None:  # known before the hours, not after them
        check_can_write(out)
    names = [name.strip() for name in tasks.split(",") if name.strip()] or PAPER
    loaded = load_model(model, device)
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("tasks", total=None)
        result = evaluate(
            loaded,
            names,
            data=data,
            shots=shots,
            limit=limit,
            batch_tokens=batch_tokens,
            max_length=max_length,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    result["transnormer"] |= {"model": str(model), "command": ["transnormer", *sys.argv[1:]]}
    _show_result(result["transnormer"], table(result))
    if out is not None:  # last, so that a disk that is full by now costs no table
        write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _show_result(ran: dict[str, Any], rows: list[tuple[str, ...]]) -> None:
    """Print what the harness found, and below it what ran."""
    from rich.table import Table

    shown = Table("task", "version", "split", "documents", "shots", "metric", "value")
    for row in rows:
        shown.add_row(*row)
    console = stdout_console(200)
    console.print(shown)
    for line in (f"lm-eval {ran['lm_eval']}, {ran['seconds']:,} s", *ran["notes"]):
        console.print(line, markup=False, highlight=False)


def _cells(score: Score) -> list[str]:
    return [
        f"{score.tokens:,}",
        f"{score.bytes:,}",
        f"{score.loss:.4f}",
        f"{score.perplexity:,.2f}",
        f"{score.bits_per_byte:.4f}",
        f"{score.word_perplexity:,.2f}",
    ]
