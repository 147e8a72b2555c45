"""The training loop, read top to bottom."""

from __future__ import annotations

import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from .. import __version__
from ..config import ModelConfig
from ..data.chat import find_template
from ..data.loader import Batch, Loader, TokenData, prepare
from ..data.tokenizer import SMALLEST, load_tokenizer
from ..files import step_folders, write_text
from ..formats.folders import find_model, load
from ..model.language_model import LanguageModel, find_device, init_weights
from . import checkpoint, lora
from .checkpoint import Origin
from .metrics import Metrics, plot, progress, say
from .optim import adamw, learning_rate
from .recipe import Recipe

RUNS = Path("runs")  # in the working directory


class Interrupted(Exception):
    """The run was asked to stop, saved itself, and can go on. `signal_number` says who asked."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end, or on from where it was stopped; returns the run's folder, runs/<run>.

    Raises ValueError or OSError (one line: what is wrong and what to do) and Interrupted after SIGINT or SIGTERM.
    """
    run = RUNS / recipe.run
    checkpoints = step_folders(run / "checkpoints")
    _check_same(run, recipe, bool(checkpoints))
    whole = bool(checkpoints) and not checkpoint.damaged(checkpoints[0], recipe.lora is not None)
    if whole and int(checkpoints[0].name[5:]) >= recipe.train.steps:
        say(f"run {recipe.run} is finished: {recipe.train.steps} steps, in {run}")
        return run
    device = find_device(recipe.train.device)
    if recipe.base is None:
        base, config = None, recipe.model_config(SMALLEST)  # refused before any text is prepared for it
        data = _open_data(recipe)
        config = recipe.model_config(data.vocab_size)
    else:
        base = load(recipe.base, dtype=torch.float32)
        data, config = _open_data(recipe), base.config
        _check_tokenizer(recipe, base, data)
    Loader(data, seq_len=recipe.train.seq_len, batch_size=recipe.rows, seed=0)
    if config.position == "ape" and config.max_position_embeddings < recipe.train.seq_len:
        raise ValueError(
            f"model.max_position_embeddings = {config.max_position_embeddings} is below train.seq_len = {recipe.train.seq_len}"
        )
    if config.eos_token_id is None and data.end_of_text is not None:
        config = config.replace(eos_token_id=data.end_of_text)
    _check_memory(recipe, config, device)
    run.mkdir(parents=True, exist_ok=True)
    with _only_one(run):
        for leftover in run.glob(".*.partial"):
            leftover.unlink()
        write_text(run / "recipe.toml", recipe.to_toml())
        model, origin = _model(recipe, config, data, device, base)
        return _train(recipe, run, model, origin, data)


def _model(
    recipe: Recipe, config: ModelConfig, data: TokenData, device: torch.device, base: LanguageModel | None
) -> tuple[LanguageModel, Origin]:
    """What is trained, new or from `base`, and what its checkpoints are tied to."""
    torch.manual_seed(recipe.train.seed)
    tokenizer, template, adapter, under = load_tokenizer(recipe.data.path), data.chat_template, None, None
    if recipe.base is None or base is None:
        with torch.device("meta"):
            model = LanguageModel(config)
        model.to_empty(device=device)
        init_weights(model, recipe.train.seed)
    else:
        model, folder = base, find_model(recipe.base)
        model.config = config
        template = template or find_template(folder, tokenizer)
        if recipe.lora is not None:
            under = lora.fingerprint(model)
            adapter = lora.inject(model, recipe.lora, folder)
        model.to(device)
    model.tokenizer = tokenizer
    return model, Origin(data=data.fingerprint, chat_template=template, adapter=adapter, base=under)


def _train(recipe: Recipe, run: Path, model: LanguageModel, origin: Origin, data: TokenData) -> Path:
    device = model.device
    optimizer = adamw(model, recipe.optim)
    steps, checkpoints = recipe.train.steps, run / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    checkpoint.clear_partial(checkpoints)
    done, position = checkpoint.resume(checkpoints, model, optimizer, origin)
    reset_state = data.flags if recipe.train.reset_state is None else recipe.train.reset_state
    loader = Loader(
        data, seq_len=recipe.train.seq_len, batch_size=recipe.rows, seed=recipe.train.seed, reset_state=reset_state
    )
    loader.seek(position)
    valid, bytes_per_token = _validation(recipe, reset_state)
    _describe(recipe, run, model, loader, device, done)
    if recipe.train.recompute:
        _recompute(model)

    metrics = Metrics(run / "metrics.jsonl", done, recipe.train.tensorboard)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.dtype == "bfloat16")

    def save(step: int) -> None:
        metrics.flush()
        checkpoint.save(checkpoints, step, model, optimizer, loader.position, origin, recipe.checkpoint.keep)

    def evaluate() -> dict[str, float]:
        model.eval()
        with autocast:
            loss = _mean_loss(model, valid)
        model.train()
        return {"valid_loss": loss, "valid_bits_per_byte": loss / math.log(2) / bytes_per_token}

    model.train()
    with _stop_requests() as stop, progress(steps, done) as show:
        for step in range(done + 1, steps + 1):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optim, step, steps)
            loss = torch.zeros((), device=device)
            batches = [next(loader) for _ in range(recipe.train.accumulate)]
            learned = max(1, sum(batch.learned for batch in batches))
            for batch in batches:
                batch = batch.to(device)
                with autocast:
                    part = _summed_loss(model, batch) / learned
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip or math.inf)
            line: dict[str, Any] = {"step": step, "loss": loss.item(), "gradient_norm": norm.item()}
            if not math.isfinite(line["loss"]) or not math.isfinite(line["gradient_norm"]):
                raise ValueError(
                    f"step {step}: loss {line['loss']}, gradient norm {line['gradient_norm']}; stopped before it could "
                    f"reach the weights. Checkpoints are as they were; try run=NAME with a lower optim.lr or a longer warm-up"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            speed = recipe.train.batch_tokens / (time.perf_counter() - began)
            line |= {
                "tokens": step * recipe.train.batch_tokens,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "tokens_per_second": round(speed, 1),
            }
            last = step == steps
            if valid and (last or (recipe.eval.every and step % recipe.eval.every == 0)):
                line |= evaluate()
                say(
                    f"step {step}/{steps}  loss {line['loss']:.3f}  validation loss {line['valid_loss']:.3f} "
                    f"({line['valid_bits_per_byte']:.3f} bits per byte)"
                )
            metrics.write(line)
            show(step, line["loss"], speed)
            if last or stop or (recipe.checkpoint.every and step % recipe.checkpoint.every == 0):
                save(step)
            if last or "valid_loss" in line:
                plot(run / "metrics.jsonl", run / "loss.png", recipe.run)
            if stop and not last:
                raise Interrupted(f"stopped and saved at step {step}; the same command goes on from there", stop[0])
    metrics.close()
    say(f"finished: model in {run}, curve in {run / 'loss.png'}")
    return run


def _summed_loss(model: LanguageModel, batch: Batch) -> torch.Tensor:
    return model.loss(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="sum")


@torch.inference_mode()
def _mean_loss(model: LanguageModel, batches: Sequence[Batch]) -> float:
    """Nats per learned token."""
    total = sum(_summed_loss(model, batch.to(model.device)).item() for batch in batches)
    return total / sum(batch.learned for batch in batches)


def _open_data(recipe: Recipe) -> TokenData:
    """The training split, prepared first where data.text says from what."""
    wanted, path = recipe.data, Path(recipe.data.path)
    asked: dict[str, Any] = {
        "vocab_size": wanted.vocab_size or None, "tokenizer": wanted.tokenizer or None, "split": wanted.split,
        "seed": wanted.seed, "text_field": wanted.text_field, "format": wanted.format,
        "chat_template": wanted.chat_template or None,
    }  # fmt: skip
    if not path.exists():
        if not wanted.text:
            raise FileNotFoundError(
                f"data.path = {path}: no such folder; make it with `transnormer prepare`, or set data.text"
            )
        if recipe.base is not None and not wanted.tokenizer:
            asked["tokenizer"] = find_model(recipe.base)
        say(f"preparing {path} from {', '.join(wanted.text)}")
        prepare(wanted.text, path, **asked)
    elif wanted.text:
        # what folders of text do not say; the tokenizer of model.from is looked at, not its name
        source = {"format": "text", "chat_template": None} | TokenData(path, "train").source
        for key, value in (asked | {"inputs": list(wanted.text)}).items():
            taken = key == "tokenizer" and recipe.base is not None and value is None
            if source[key] != value and not taken:
                raise ValueError(
                    f"{path} was prepared with {key} = {source[key]!r}, the recipe says {value!r}; "
                    f"remove it or choose another data.path"
                )
    return TokenData(path, "train")


def _check_tokenizer(recipe: Recipe, base: LanguageModel, data: TokenData) -> None:
    """Refuse data that were encoded otherwise than the model's were."""
    if data.vocab_size > base.config.vocab_size:
        raise ValueError(
            f"{recipe.data.path} has {data.vocab_size:,} words, {recipe.base} {base.config.vocab_size:,}; "
            f"prepare it with --tokenizer {recipe.base}"
        )
    if base.tokenizer is not None and base.tokenizer.to_str() != load_tokenizer(recipe.data.path).to_str():
        raise ValueError(
            f"{recipe.data.path} was not encoded with the tokenizer of {recipe.base}; prepare it with --tokenizer, "
            f"or set data.text and another data.path"
        )


def _validation(recipe: Recipe, reset_state: bool) -> tuple[list[Batch], float]:
    """Batches of the validation split, always the same ones, and the split's bytes per learned token."""
    valid = TokenData(recipe.data.path, "valid")
    if valid.tokens < 2:
        return [], 0.0
    length, rows = min(recipe.train.seq_len, valid.tokens - 1), max(1, recipe.rows)
    loader = Loader(valid, seq_len=length, batch_size=rows, seed=0, reset_state=reset_state)
    count = min(loader.count, recipe.eval.tokens // length)
    batches = [loader.batch(range(first, min(first + rows, count))) for first in range(0, count, rows)]
    return [batch for batch in batches if batch.learned], valid.bytes / max(1, valid.learned)


def _check_same(run: Path, recipe: Recipe, begun: bool) -> None:
    """Refuse to go on with other settings. A start that saved nothing binds nobody."""
    path = run / "recipe.toml"
    if path.exists():
        if begun and (difference := Recipe.load(path).difference(recipe)):
            raise ValueError(
                f"{run} was started with other settings: {difference}; give another run=NAME or remove {run}"
            )
    elif run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ValueError(f"{run} exists and is not a run of ours; give another run=NAME or remove it")


def _check_memory(recipe: Recipe, config: ModelConfig, device: torch.device) -> None:
    """Refuse, before allocating, what cannot fit.

    Counted are weights, of those that are trained gradients and AdamW's two moments, all float32, and of the
    activations only those that no implementation can do without: what the projections read and wrote.
    """
    trained = weights = config.parameter_count()
    if recipe.lora is not None:
        with torch.device("meta"):
            maps = lora.targets(LanguageModel(config), recipe.lora).values()
        trained = sum(recipe.lora.rank * (each.in_features + each.out_features) for each in maps)
    kept = 1 if recipe.train.recompute else config.num_hidden_layers
    floats = kept * (4 * config.inner_size + 2 * config.intermediate_size + 2 * config.hidden_size)
    tokens = recipe.rows * recipe.train.seq_len
    activations = tokens * floats * (2 if recipe.train.dtype == "bfloat16" else 4)
    there = recipe.base is not None and device.type == "cpu"  # the weights are, then
    needed = (0 if there else 4 * weights) + 12 * trained + activations
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if needed > free:
        raise ValueError(
            f"training {trained:,} parameters with {tokens:,} tokens at a time needs more than "
            f"{needed / 2**30:,.1f} GiB, {activations / 2**30:,.1f} of them for activations; {free / 2**30:,.1f} GiB of "
            f"{device.type} memory are free. Choose a smaller model or batch, train.accumulate or train.recompute"
        )


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or less where a container (cgroup v2) allows less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _recompute(model: LanguageModel) -> None:
    """Keep only each block's input in the forward pass; the rest is computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint as recomputed

    for block in model.layers:
        forward = block.forward
        block.forward = lambda *args, forward=forward: recomputed(forward, *args, use_reentrant=False)


def _describe(recipe: Recipe, run: Path, model: LanguageModel, loader: Loader, device: torch.device, done: int) -> None:
    """Say what is about to run, and add this start to run.json: command, versions, commit, device."""
    epochs = recipe.train.steps * recipe.train.accumulate * recipe.rows / loader.count
    trained, all_of_them = sum(p.numel() for p in model.parameters() if p.requires_grad), model.parameter_count()
    count = f"{all_of_them:,}" if trained == all_of_them else f"{trained:,} of {all_of_them:,}"
    say(
        f"run {recipe.run}: {count} parameters on {device}, {loader.data.tokens:,} training tokens "
        + (f"({loader.data.learned:,} of them to learn) " if loader.data.flags else "")
        + f"read {epochs:.2g} times"
        + (f"; going on after step {done} of {recipe.train.steps}" if done else "")
    )
    path = run / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() and done else []
    starts.append(
        {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "after_step": done,
            "command": sys.argv,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "versions": {"transnormer": __version__, "python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__},
            "commit": _commit(),
        }
    )  # fmt: skip
    write_text(path, json.dumps({"parameters": model.parameter_count(), "starts": starts}, indent=2) + "\n")


def _commit() -> str | None:
    """The commit of our own checkout; None where there is none, or no git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that a first SIGINT, SIGTERM or SIGHUP is put into; a second one has its usual effect."""
    received: list[int] = []

    def note(got: int, frame: object) -> None:
        received.append(got)
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous: dict[int, Any] = {}
    try:
        for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[asked] = signal.signal(asked, note)
    except ValueError:  # not the main thread: nobody can signal us
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(run: Path) -> Iterator[None]:
    """Hold the run's lock; the system lets go of it however the process ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run} is being trained by another process") from None
        yield
