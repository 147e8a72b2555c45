"""The verbs that write text: `generate` and `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Device, Model, Seed, Temperature, TopK, TopP, app, load_model, see

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from ..data.chat import Template
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
    device: Device = "auto",
) -> None:
    """Write on from a prompt, streaming."""
    from itertools import chain

    from ..data.documents import require_unicode
    from ..inference.chat import Conversation, reading_bar
    from ..inference.engine import generate_text
    from ..inference.sampling import Sampling
    from ..inference.text import check_stop

    ends = check_stop(stop or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
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
