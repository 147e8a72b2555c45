"""`transnormer prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import TextField, app, see


@app.command(
    epilog=see(
        "transnormer prepare book.txt papers/ --out data/mine --vocab-size 4096", "docs/data.md"
    )
)
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="txt, markdown, jsonl, parquet files, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE tokenizer of this size.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Or take this one: tokenizer.json, or a folder with one.")
    ] = None,
    split: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Chooses the documents held out.")] = 0,
    text_field: TextField = "text",
    format: Annotated[
        str, typer.Option(help="text, or what records hold: messages, prompt, alpaca.")
    ] = "text",
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A chat template to use; by default the tokenizer folder's, or ours."),
    ] = None,
) -> None:
    """Turn text or conversations into token shards, ready to train on."""
    from ..data.prepare import prepare as make

    if (vocab_size is None) == (tokenizer is None):
        raise ValueError(
            "give either --vocab-size, to train a tokenizer, or --tokenizer, the path of one"
        )
    record = make(
        inputs,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        split=split,
        seed=seed,
        text_field=text_field,
        format=format,
        chat_template=chat_template,
    )
    for name in ("train", "valid"):
        part = record["splits"][name]
        if format == "text":
            print(
                f"{name}: {part['documents']:,} documents, {part['bytes']:,} bytes, "
                f"{part['tokens']:,} tokens"
            )
        else:
            print(
                f"{name}: {part['documents']:,} conversations, {part['tokens']:,} tokens, "
                f"{part['learned']:,} to learn"
            )
    print(f"vocabulary {record['vocab_size']:,}, in {out}")
