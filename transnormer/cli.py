"""The command line. Each verb's modules are imported when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from rich.console import Console

    from .data.chat import Template
    from .evaluation.perplexity import Score
    from .formats.convert import Written
    from .model.language_model import LanguageModel


def see(example: str, page: str) -> str:
    """What ends a verb's help: an example, and where to read on. An argument of the command line's `epilog`."""
    return f"Example: {example.replace('[', chr(92) + '[')}\n\nRead on: {page}"


app = typer.Typer(
    help="TransNormerLLM: train, measure and use a linear-attention language model.",
    epilog=see("transnormer train recipes/demo.toml", "README.md"),
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
evaluation = typer.Typer(
    help="Measure a model.", no_args_is_help=True,
    epilog=see("transnormer eval perplexity --model runs/demo --text book.txt", "docs/evaluation.md"),
)  # fmt: skip
app.add_typer(evaluation, name="eval")

Model = Annotated[Path, typer.Option("--model", help="A run, an exported model or a published checkpoint: its folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopK = Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Draw among the fewest tokens with this much probability.")]
MaxShard = Annotated[str, typer.Option(help="Bytes a weight file at most, e.g. 5GB, 500MB.")]
TextField = Annotated[str, typer.Option(help="The field or column of jsonl and parquet with the text.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]


def main() -> None:
    """Run a verb; what the user can mend is one line on stderr and a non-zero exit."""
    import os
    import warnings

    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, or that of the click inside newer typers

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # type: ignore[assignment]
    try:
        sys.exit(app(prog_name="transnormer", standalone_mode=False) or 0)
    except usage_error as error:
        if message := error.format_message():  # there is none where nothing was asked for, and the help was shown
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


class TrainCommand(TyperCommand):
    """Its help ends with the tables of settings, read from the recipe when it is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import dataclasses
        import typing

        from .train.recipe import Recipe

        tables = ["Settings, any of which may be given as key=value, by table:"]
        for name, kind in typing.get_type_hints(Recipe).items():
            keys = next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)
            if keys is not None:
                tables.append(f"{name}: {', '.join(field.name for field in dataclasses.fields(keys))}")
            elif name == "model":
                tables.append("model: size, kind and any field of ModelConfig, e.g. hidden_size, or from alone")
        self.epilog = "\n\n".join([*tables, self.epilog or ""])
        super().format_help(ctx, formatter)


@app.command(
    cls=TrainCommand, epilog=see("transnormer train recipes/demo.toml optim.lr=1e-3 run=second", "docs/training.md")
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/demo.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: key=value, e.g. optim.lr=1e-3.")
    ] = None,
) -> None:
    """Train a model from a recipe into runs/<run>; the same command again goes on where it stopped."""
    import time

    from .train.loop import Interrupted
    from .train.loop import train as run
    from .train.metrics import say
    from .train.parallel import Elsewhere
    from .train.recipe import Recipe

    try:
        run(Recipe.load(recipe, overrides or ()))
    except Interrupted as error:
        say(str(error))
        raise typer.Exit(128 + error.signal_number) from error
    except Elsewhere as error:
        time.sleep(2)  # torchrun ends all when one has ended, and the other is to say why first
        raise typer.Exit(1) from error


@app.command(epilog=see("transnormer generate --model runs/demo --prompt ROMEO: --max-tokens 100", "docs/inference.md"))
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from; '-' reads it from standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt for the user's turn, by the model's chat template.")
    ] = False,
    system: Annotated[str, typer.Option(help="What the model is told first, with --chat.")] = "",
    device: Device = "auto",
) -> None:
    """Write on from a prompt, streaming."""
    from itertools import chain

    from .data.documents import require_unicode
    from .inference.chat import Conversation, reading_bar
    from .inference.engine import generate_text
    from .inference.sampling import Sampling
    from .inference.text import check_stop

    ends = check_stop(stop or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if chat and not prompt:
        raise ValueError("--chat needs a --prompt, which is what the user says")
    if system and not chat:
        raise ValueError("--system needs --chat, because only a chat template has a place for it")
    loaded = _load(model, device)
    text = require_unicode(_standard_input() if prompt == "-" else prompt, "--prompt")
    if not chat:
        with reading_bar() as progress:
            pieces = generate_text(loaded, text, max_tokens=max_tokens, sampling=sampling, stop=ends, progress=progress)
            begun = text + next(pieces, "")  # once there is something to write on with, or nothing came
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
        list[str] | None, typer.Option(help="Where a turn ends, without a chat template; by default at an empty line.")
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told first, where it has a chat template.")] = "",
    device: Device = "auto",
) -> None:
    """Take turns with a model on one state, whose size does not grow. /help lists what else there is."""
    from .inference.chat import Conversation, talk
    from .inference.sampling import Sampling
    from .inference.text import check_stop

    ends = check_stop(stop or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded = _load(model, device)
    with _chat_template(model, loaded) as template:
        if template is not None and ends:
            raise ValueError("--stop is for models without a chat template; this one's says where a turn ends")
        if template is None and system:
            raise ValueError(f"--system needs a chat template, and {model} has none")
        conversation = Conversation(
            loaded, template, system=system, max_tokens=max_tokens, sampling=sampling, stop=ends
        )
        talk(conversation, str(model))


@app.command(epilog=see("transnormer prepare book.txt papers/ --out data/mine --vocab-size 4096", "docs/data.md"))
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="txt, markdown, jsonl, parquet files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    vocab_size: Annotated[int | None, typer.Option(help="Train a byte-level BPE tokenizer of this size.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Or take this one: tokenizer.json, or a folder with one.")
    ] = None,
    split: Annotated[float, typer.Option(help="Share of the documents held out for validation.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Chooses the documents held out.")] = 0,
    text_field: TextField = "text",
    format: Annotated[str, typer.Option(help="text, or what records hold: messages, prompt, alpaca.")] = "text",
    chat_template: Annotated[
        Path | None, typer.Option(help="A chat template to use; by default the tokenizer folder's, or ours.")
    ] = None,
) -> None:
    """Turn text or conversations into token shards, ready to train on."""
    from .data.prepare import prepare as make

    if (vocab_size is None) == (tokenizer is None):
        raise ValueError("give either --vocab-size, to train a tokenizer, or --tokenizer, the path of one")
    record = make(
        inputs, out, vocab_size=vocab_size, tokenizer=tokenizer, split=split, seed=seed, text_field=text_field,
        format=format, chat_template=chat_template,
    )  # fmt: skip
    for name in ("train", "valid"):
        part = record["splits"][name]
        if format == "text":
            print(f"{name}: {part['documents']:,} documents, {part['bytes']:,} bytes, {part['tokens']:,} tokens")
        else:
            print(
                f"{name}: {part['documents']:,} conversations, {part['tokens']:,} tokens, {part['learned']:,} to learn"
            )
    print(f"vocabulary {record['vocab_size']:,}, in {out}")


@app.command(epilog=see("transnormer convert TransNormerLLM-1B tnl-1b", "docs/published.md"))
def convert(
    source: Annotated[Path, typer.Argument(help="A published TransNormerLLM or TransNormerLLM2 folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    max_shard: MaxShard = "5GB",
    tokenizer: Annotated[bool, typer.Option(help="Convert the folder's tokenizer, where it has one.")] = True,
) -> None:
    """Turn a published checkpoint into our format, every tensor checked, in little memory."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from .formats.convert import convert as run

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    shard_bytes = _bytes(max_shard)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        written = run(source, out, shard_bytes=shard_bytes, tokenizer=tokenizer, progress=show)
    _tell(written)


@app.command(epilog=see("transnormer export --model runs/demo --out demo --dtype bfloat16", "docs/published.md"))
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format: Annotated[
        str, typer.Option(help="transnormer, or published: as the published code reads it.")
    ] = "transnormer",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
    max_shard: MaxShard = "5GB",
) -> None:
    """Write a model and its tokenizer, without what only training needs."""
    import torch

    from .formats.convert import export as run

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is unknown; there are float32, bfloat16, float16")
    kind = None if dtype is None else getattr(torch, dtype)
    _tell(run(model, out, format=format, dtype=kind, shard_bytes=_bytes(max_shard)))


@evaluation.command(epilog=see("transnormer eval perplexity --model runs/demo --text book.txt", "docs/inference.md"))
def perplexity(
    model: Model,
    text: Annotated[
        list[Path],
        typer.Option(help="A text, jsonl or parquet file; may be given several times, more may follow it."),
    ],
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    text_field: TextField = "text",
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many tokens at most from a fresh state; by default a text is read whole."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Loss, perplexity and bits per byte of texts of any length, each read from its first token to its last."""
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from .data.documents import read_texts
    from .data.prepare import progress_bar
    from .evaluation.perplexity import score_documents

    files = [*text, *(more or [])]
    sizes = [sum(len(each.encode()) for each in read_texts(file, text_field=text_field)) for file in files]
    loaded = _load(model, device)
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
    total = sum((score for score, _ in scores[1:]), scores[0][0])
    if as_json:
        each = [
            {"file": str(file), "documents": count} | score.record()
            for file, (score, count) in zip(files, scores, strict=True)
        ]
        record = {"model": str(model), "window": window, "files": each, "together": total.record()}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    table = Table("text", "tokens", "bytes", "loss (nats/token)", "perplexity", "bits per byte", "perplexity per word")
    for file, (score, _) in zip(files, scores, strict=True):
        table.add_row(Text(str(file)), *_cells(score))
    if len(files) > 1:
        table.add_row("together", *_cells(total))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@evaluation.command(
    epilog=see("transnormer eval harness --model runs/demo --tasks boolq,piqa --data documents", "docs/evaluation.md")
)
def harness(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="Names, commas between; the harness' own, too. By default those of the paper's table.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="A folder with the tasks' documents: no network is needed.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; by default the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of each task.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read at a time.")] = 8_192,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Of longer prompts, read the last so many tokens.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write, with all results and settings.")] = None,
    device: Device = "auto",
) -> None:
    """The paper's benchmarks, and all of lm-evaluation-harness, on our own forward."""
    import json

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from .files import check_can_write, write_text

    try:
        from .evaluation.harness import PAPER, evaluate, table
    except ImportError as error:
        raise ValueError(error) from error

    if out is not None:  # known before the hours, not after them
        check_can_write(out)
    names = [name.strip() for name in tasks.split(",") if name.strip()] or PAPER
    loaded = _load(model, device)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tasks", total=None)
        result = evaluate(
            loaded, names, data=data, shots=shots, limit=limit, batch_tokens=batch_tokens, max_length=max_length,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    result["transnormer"] |= {"model": str(model), "command": ["transnormer", *sys.argv[1:]]}
    shown = Table("task", "version", "split", "documents", "shots", "metric", "value")
    for row in table(result):
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(shown)
    ran = result["transnormer"]
    for line in (f"lm-eval {ran['lm_eval']}, {ran['seconds']:,} s", *ran["notes"]):
        console.print(line, markup=False, highlight=False)
    if out is not None:  # last, so that a disk that is full by now costs no table
        write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


@app.command(epilog=see("transnormer info runs/demo", "docs/training.md"))
def info(
    model: Annotated[
        str | None, typer.Argument(help="A run, another model's folder, or the name of a size, e.g. 385m.")
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", help="The same.")] = None,
) -> None:
    """What a model is and costs, and how a run stands; without one, what is installed here."""
    import platform

    import torch

    from . import __version__
    from .config import SIZES, ModelConfig, nearest
    from .files import step_folders
    from .formats.folders import load
    from .model.language_model import LanguageModel
    from .train.runs import describe_run, is_run, read_run

    wanted = model or model_option
    if wanted is None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"transnormer {__version__}, Python {platform.python_version()}, torch {torch.__version__}, GPU: {gpu}")
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
        if not step_folders(folder / "checkpoints"):
            print("model           no checkpoint yet")
            return
    _say_model(load(folder))


def _say_model(model: LanguageModel) -> None:
    from .model.state import State

    config = model.config
    weights = sum(p.nbytes for p in model.parameters())
    print(f"parameters      {model.parameter_count():,} ({weights / 2**20:,.1f} MiB in memory)")
    print(
        f"training        {model.flops_per_token(2_048) / 1e9:,.3f} GFLOP per token (forward and backward, 2,048 tokens)"
    )
    grows = " and grows with every token" if not config.fixed_state else ", whatever the length"
    print(f"state           {State.new(model).nbytes / 2**20:,.2f} MiB per sequence{grows}")
    print(f"tokenizer       {f'{model.tokenizer.get_vocab_size():,} words' if model.tokenizer else 'none'}")
    print(config.to_json(), end="")


@app.command(epilog=see("transnormer compare runs/demo runs/second --out curves.png", "docs/training.md"))
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, e.g. runs/first runs/second.")],
    out: Annotated[Path | None, typer.Option(help="A PNG to draw the loss curves into, one over the other.")] = None,
) -> None:
    """Runs side by side: their losses and speed, the settings in which they differ, their curves in one picture."""
    from .train.runs import compare as read

    figures, settings = read(runs, out)
    console = _console(200)
    console.print(figures)
    if settings is not None:
        console.print(settings)
    elif len(runs) > 1:
        print("All settings are the same.")
    if out is not None:
        print(f"curves in {out}")


@app.command(epilog=see("transnormer plan --size 7b --gpus 64 --gpu h100 --tokens 1T", "docs/planning.md"))
def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the model to change, e.g. model.hidden_size=25600.")
    ] = None,
    size: Annotated[str, typer.Option(help="The model: a named size, e.g. 175b.")] = "385m",
    gpus: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind, e.g. h100, h200, a100, b200.")] = "h100",
    tokens: Annotated[str, typer.Option(help="To train on, e.g. 300B, 2T.")] = "1T",
    seq: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 2_048,
    batch_tokens: Annotated[
        str, typer.Option(help="Tokens a step; K is 2^10, M 2^20. By default about 4M that the GPUs can share.")
    ] = "",
    replicate: Annotated[int | None, typer.Option(min=1, help="Hold this many copies of the model.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Hold this many GPUs that share each row.")] = None,
    tensor: Annotated[
        int | None, typer.Option(min=1, help="Hold this many GPUs that share each matrix product.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Hold this many micro-batches a step.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Hold whether activations are computed twice.")
    ] = None,
    compare_tensor: Annotated[
        bool, typer.Option("--compare-tensor", help="Instead: --tensor 1, 2, 4, 8, beside the Transformer's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Find the meshes of GPUs on which a training run fits, what they need, and how long it takes."""
    import json

    from rich.console import Console

    from .config import TRANSFORMER
    from .train import plan_search
    from .train.plan_check import as_settings, check_plan, compared, record, table
    from .train.recipe import model_overrides

    config = model_overrides(size, overrides or ())
    console = _console(100)
    if compare_tensor:
        models = {"ours": config, "Transformer": config.replace(**TRANSFORMER)}
        found = {name: plan_search.compare_tensor(each, gpus, seq, gpu.lower()) for name, each in models.items()}
        if as_json:
            print(json.dumps({name: [vars(plan.memory) for plan in plans] for name, plans in found.items()}, indent=2))
        else:
            console.print(compared(found))
        return
    job = plan_search.Job(
        config=config, gpus=gpus, kind=gpu.lower(), tokens=_count(tokens, 1_000), seq_len=seq,
        batch_tokens=_count(batch_tokens, 1_024) if batch_tokens else 0, replicate=replicate, context=context,
        tensor=tensor, accumulate=accumulate, recompute=recompute,
    )  # fmt: skip
    with Console(stderr=True).status("looking for meshes") as status:
        plans, checked = job.best(), True
        for number, each in enumerate(plans):
            status.update(f"cutting the model for plan {number + 1} of {len(plans)}")
            checked &= check_plan(config, each)
    if as_json:
        print(json.dumps(record(job, plans), indent=2))
        return
    console.print(table(job, plans))
    if checked:
        print("Shares of weights, and so of gradients and optimizer, are checked against the real sharding code.")
    else:
        print("So many processes take too long to pretend: shares are not checked against the real sharding code.")
    if any(each.layout.tensor * each.layout.context > 1 for each in plans):
        print("Speeds are those of GPUs that wait for no host: under tensor and context with train.graph = true.")
    print("The best as settings of `transnormer train`:", *as_settings(job, plans[0]))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    if show:
        from . import __version__

        print(__version__)
        raise typer.Exit


def _said(error: Exception) -> str:
    """What an error says in one line; the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or "out of memory"


def _load(folder: Path, device: str) -> LanguageModel:
    from .formats.folders import load
    from .model.language_model import find_device

    return load(folder, device=find_device(device))


def _chat_template(folder: Path, loaded: LanguageModel) -> AbstractContextManager[Template | None]:
    """The chat template in a model's folder, or None where there is none."""
    from contextlib import nullcontext

    from .data.chat import Template, find_template
    from .formats.folders import find_model

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


def _console(width: int) -> Console:
    """Where tables are printed: as wide as the terminal, or so wide where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def _bytes(size: str) -> int:
    """A number of bytes, such as 5GB, 500MB or 1000."""
    import re

    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)?", size.strip().upper())
    count = int(float(found[1]) * units[found[2] or ""]) if found else 0
    if count < 1:
        raise ValueError(f"{size!r} is no size in bytes; write e.g. 5GB, 500MB")
    return count


def _count(text: str, thousand: int) -> int:
    """A number of tokens, such as 2T, 300B, 4M or 1000."""
    import re

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper())
    count = round(float(found[1]) * thousand ** " KMBT".index(found[2] or " ")) if found else 0
    if count < 1:
        raise ValueError(f"{text!r} is no number of tokens; write e.g. 2T, 300B, 4M")
    return count


def _tell(written: Written) -> None:
    """What a new folder holds."""
    dtypes = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in written.dtypes.items())
    print(f"parameters      {written.config.parameter_count():,}")
    print(f"weights         {dtypes} in {len(written.files)} file{'s' * (len(written.files) > 1)}")
    print(f"tokenizer       {written.tokenizer or 'none'}")
    print(f"fingerprint     {'checked by every load' if written.fingerprint else 'none'}")
    print(f"in {written.folder}")


def _cells(score: Score) -> list[str]:
    return [
        f"{score.tokens:,}", f"{score.bytes:,}", f"{score.loss:.4f}", f"{score.perplexity:,.2f}",
        f"{score.bits_per_byte:.4f}", f"{score.word_perplexity:,.2f}",
    ]  # fmt: skip
