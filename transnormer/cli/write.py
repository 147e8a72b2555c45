"""The verbs that write text: `generate` and `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Device, Model, Seed, Temperature, TopK, TopP, app, load_model, see

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from ..data.chat import Template
    from ..inference.sampling import Sampling
    from ..model.language_model import LanguageModel


@app.command(
    epilog=see(
        "transnormer generate --model runs/demo --prompt ROMEO: --max-tokens 100",
        "docs/inference.md",
    )
)
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="The text to go on from; '-' reads it from standard input.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Take the prompt for the user's turn, by the model's chat template."
        ),
    ] = False,
    system: Annotated[str, typer.Option(help="What the model is told first, with --chat.")] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(help='Many prompts: a file of lines {"prompt": …}, which may set options.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --prompts, the file of texts: one line each.")
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, help="With --prompts, how many texts are written at a time.")
    ] = 16,
    prefix_mib: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --prompts, MiB for the states of shared beginnings, which are read once.",
        ),
    ] = 256,
    device: Device = "auto",
) -> None:
    """Write on from a prompt, streaming; or from each prompt of a file, into a file."""
    from ..inference.sampling import Sampling
    from ..inference.text import check_stop

    ends = check_stop(stop or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if prompts is not None or out is not None:
        if prompts is None or out is None or prompt or chat or system:
            raise ValueError(
                "--prompts and --out belong together, without --prompt, --chat and --system"
            )
        _write_file(model, prompts, out, sampling, max_tokens, ends, slots, prefix_mib, device)
    else:
        _write_one(model, prompt, sampling, max_tokens, ends, chat, system, device)


def _write_file(
    model: Path,
    prompts: Path,
    out: Path,
    sampling: Sampling,
    max_tokens: int,
    ends: Sequence[str],
    slots: int,
    prefix_mib: int,
    device: str,
) -> None:
    """`generate` from each prompt of a file."""
    from dataclasses import asdict

    from rich.progress import MofNCompleteColumn

    from ..data.prepare import progress_bar
    from ..inference.batch import read_lines, write_texts
    from ..inference.scheduler import RequestSettings

    settings = RequestSettings(**asdict(sampling), max_tokens=max_tokens, stop=ends)
    if prompts.resolve() == out.resolve():
        raise ValueError(f"{out}: --out would overwrite the prompts")
    lines, loaded = read_lines(prompts, settings), load_model(model, device)
    with progress_bar(MofNCompleteColumn()) as report:

        def progress(done: int, total: int) -> None:
            report("writing (texts)", done, total)

        prefix_bytes = prefix_mib * 2**20
        write_texts(loaded, lines, out, slots=slots, prefix_bytes=prefix_bytes, progress=progress)


def _write_one(
    model: Path,
    prompt: str,
    sampling: Sampling,
    max_tokens: int,
    ends: Sequence[str],
    chat: bool,
    system: str,
    device: str,
) -> None:
    """`generate` from one prompt, streaming."""
    from itertools import chain

    from ..data.documents import require_unicode
    from ..inference.chat import Conversation, reading_bar
    from ..inference.session import generate_text

    if chat and not prompt:
        raise ValueError("--chat needs a --prompt, which is what the user says")
    if system and not chat:
        raise ValueError("--system needs --chat, because only a chat template has a place for it")
    loaded = load_model(model, device)
    text = require_unicode(_standard_input() if prompt == "-" else prompt, "--prompt")
    if not chat:
        with reading_bar() as progress:
            pieces = generate_text(
                loaded, text, max_tokens=max_tokens, sampling=sampling, stop=ends, progress=progress
            )
            # once there is something to write on with, or nothing came
            begun = text + next(pieces, "")
        _stream(chain([begun], pieces))
        return
    with _chat_template(model, loaded) as template:
        if template is None:
            raise ValueError(f"--chat needs a chat template, and {model} has none")
        conversation = Conversation(
            loaded, template, system=system, max_tokens=max_tokens, sampling=sampling, stop=ends
        )
        with reading_bar() as progress:
            conversation.hear(text, progress)
        _stream(conversation.answer())


@app.command(epilog=see("transnormer chat --model runs/demo", "docs/inference.md"))
def chat(
    model: Model,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a turn at most.")] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a turn ends, without a chat template; by default at an empty line."
        ),
    ] = None,
    system: Annotated[
        str, typer.Option(help="What the model is told first, where it has a chat template.")
    ] = "",
    device: Device = "auto",
) -> None:
    """Take turns with a model on one state, whose size does not grow. /help lists what else there
    is."""
    from ..inference.chat import Conversation, talk
    from ..inference.sampling import Sampling
    from ..inference.text import check_stop

    ends = check_stop(stop or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded = load_model(model, device)
    with _chat_template(model, loaded) as template:
        if template is not None and ends:
            raise ValueError(
                "--stop is for models without a chat template; this one's says where a turn ends"
            )
        if template is None and system:
            raise ValueError(f"--system needs a chat template, and {model} has none")
        conversation = Conversation(
            loaded, template, system=system, max_tokens=max_tokens, sampling=sampling, stop=ends
        )
        talk(conversation, str(model))


def _chat_template(folder: Path, loaded: LanguageModel) -> AbstractContextManager[Template | None]:
    """The chat template in a model's folder, or None where there is none."""
    from contextlib import nullcontext

    from ..data.chat import Template, find_template
    from ..formats.folders import find_model

    source = find_template(find_model(folder), loaded.tokenizer) if loaded.tokenizer else None
    return nullcontext() if source is None else Template(source, loaded.tokenizer)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 at byte {error.start}") from None


def _stream(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
