"""The training loop, read top to bottom."""

from __future__ import annotations

import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from .. import __version__
from ..config import ModelConfig
from ..data.loader import Loader, TokenData, prepare
from ..data.tokenizer import SMALLEST, load_tokenizer
from ..evaluation.perplexity import score_windows
from ..files import damage, step_folders, write_text
from ..model.language_model import LanguageModel, find_device, init_weights
from . import checkpoint
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
    if checkpoints and int(checkpoints[0].name[5:]) >= recipe.train.steps and not damage(checkpoints[0]):
        say(f"run {recipe.run} is finished: {recipe.train.steps} steps, in {run}")
        return run
    device = find_device(recipe.train.device)
    recipe.model_config(SMALLEST)  # refused before any text is prepared for it
    data = _open_data(recipe)
    config = recipe.model_config(data.vocab_size)
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
        return _train(recipe, run, config, data, device)


def _train(recipe: Recipe, run: Path, config: ModelConfig, data: TokenData, device: torch.device) -> Path:
    torch.manual_seed(recipe.train.seed)
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device=device)
    init_weights(model, recipe.train.seed)
    model.tokenizer = load_tokenizer(recipe.data.path)
    optimizer = adamw(model, recipe.optim)
    steps, checkpoints = recipe.train.steps, run / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    checkpoint.clear_partial(checkpoints)
    done, position = checkpoint.resume(checkpoints, model, optimizer, data.fingerprint)
    _describe(recipe, run, model, data, device, done)
    if recipe.train.recompute:
        _recompute(model)

    loader = Loader(data, seq_len=recipe.train.seq_len, batch_size=recipe.rows, seed=recipe.train.seed)
    loader.seek(position)
    valid, bytes_per_token = _validation(recipe, data)
    metrics = Metrics(run / "metrics.jsonl", done, recipe.train.tensorboard)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.dtype == "bfloat16")

    def save(step: int) -> None:
        metrics.flush()
        checkpoint.save(checkpoints, step, model, optimizer, loader.position, data.fingerprint, recipe.checkpoint.keep)

    def evaluate() -> dict[str, float]:
        with autocast:
            loss = score_windows(model, valid)
        return {"valid_loss": loss, "valid_bits_per_byte": loss / math.log(2) / bytes_per_token}

    model.train()
    with _stop_requests() as stop, progress(steps, done) as show:
        for step in range(done + 1, steps + 1):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optim, step, steps)
            loss = torch.zeros((), device=device)
            for _ in range(recipe.train.accumulate):
                ids = next(loader).to(device)  # [B, T + 1]
                with autocast:
                    part = model.loss(ids[:, :-1], ids[:, 1:], reduction="sum") / recipe.train.batch_tokens
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


def _open_data(recipe: Recipe) -> TokenData:
    """The training split, prepared first where data.text says from what."""
    wanted, path = recipe.data, Path(recipe.data.path)
    if not path.exists():
        if not wanted.text:
            raise FileNotFoundError(
                f"data.path = {path}: no such folder; make it with `transnormer prepare`, or set data.text"
            )
        say(f"preparing {path} from {', '.join(wanted.text)}")
        prepare(
            wanted.text, path, vocab_size=wanted.vocab_size or None, tokenizer=wanted.tokenizer or None,
            split=wanted.split, seed=wanted.seed, text_field=wanted.text_field,
        )  # fmt: skip
    elif wanted.text:
        source = TokenData(path, "train").source
        asked: dict[str, Any] = {
            "vocab_size": wanted.vocab_size or None, "tokenizer": wanted.tokenizer or None, "split": wanted.split,
            "seed": wanted.seed, "text_field": wanted.text_field, "inputs": list(wanted.text),
        }  # fmt: skip
        for key, value in asked.items():
            if source[key] != value:
                raise ValueError(
                    f"{path} was prepared with {key} = {source[key]!r}, the recipe says {value!r}; "
                    f"remove it or choose another data.path"
                )
    return TokenData(path, "train")


def _validation(recipe: Recipe, data: TokenData) -> tuple[list[torch.Tensor], float]:
    """Windows [B, T + 1] of the validation split, always the same ones, and the split's bytes per token."""
    valid = TokenData(recipe.data.path, "valid")
    length = min(recipe.train.seq_len, valid.tokens - 1)
    count = min(valid.tokens - 1, recipe.eval.tokens) // length if length > 0 else 0
    starts = [number * length for number in range(count)]
    windows = [torch.from_numpy(valid.window(start, length + 1)) for start in starts]
    rows = max(1, recipe.rows)
    batches = [torch.stack(windows[first : first + rows]) for first in range(0, len(windows), rows)]
    return batches, valid.bytes / max(1, valid.tokens)


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

    Counted are weights, gradients and AdamW's two moments, all float32, and of the activations only those that no
    implementation can do without: what the projections read and wrote.
    """
    kept = 1 if recipe.train.recompute else config.num_hidden_layers
    floats = kept * (4 * config.inner_size + 2 * config.intermediate_size + 2 * config.hidden_size)
    tokens = recipe.rows * recipe.train.seq_len
    activations = tokens * floats * (2 if recipe.train.dtype == "bfloat16" else 4)
    needed = 16 * config.parameter_count() + activations
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if needed > free:
        raise ValueError(
            f"training {config.parameter_count():,} parameters with {tokens:,} tokens at a time needs more than "
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


def _describe(
    recipe: Recipe, run: Path, model: LanguageModel, data: TokenData, device: torch.device, done: int
) -> None:
    """Say what is about to run, and add this start to run.json: command, versions, commit, device."""
    epochs = recipe.train.steps * recipe.train.batch_tokens / data.tokens
    say(
        f"run {recipe.run}: {model.parameter_count():,} parameters on {device}, {data.tokens:,} training tokens read "
        f"{epochs:.2g} times" + (f"; going on after step {done} of {recipe.train.steps}" if done else "")
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
