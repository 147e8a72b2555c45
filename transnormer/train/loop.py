"""The training loop, read top to bottom: the same on one process and on many, which torchrun
starts."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..data.chat import find_template
from ..data.loader import Batch, Loader
from ..data.shards import TokenData
from ..data.tokenizer import load_tokenizer
from ..files import write_text
from ..formats.folders import find_model, load
from ..model.language_model import LanguageModel, init_weights
from ..model.layers import fill
from ..run_folder import CHECKPOINTS, CURVE, METRICS, RECIPE, step_folders
from . import float8, lora
from .checkpoints import Checkpoints, Origin, RunProgress, damaged, read_progress
from .feed import Feed, StepBatches, validation
from .mesh import Mesh, start
from .metrics import Metrics, console, plot, progress_bar, read_metrics, say
from .optim import learning_rate, new_optimizer, step_unless
from .parallelize import clip, parallelize
from .recipe import Checkpoint, Recipe, Train
from .recovery import Recovery
from .setup import describe, only_one, open_data
from .step import MicrobatchRunner, StepResult, agree, evaluation, gradients, refusal
from .stopping import Interrupted as Interrupted
from .stopping import StopRequests, stop_requests
from .validate import (
    check_memory,
    check_same,
    check_settings,
    check_tokenizer,
    check_vocabulary,
    resets_state,
)

PICTURE_SECONDS = 10  # between two drawings of the curve while a run goes on


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended. The last two fields describe the call that returned the summary, all others
    the whole run.

    final_loss: the training loss of the last step that was applied, in nats per token; NaN where
        metrics.jsonl is lost.
    valid_loss, valid_bits_per_byte: the last evaluation, None where there was none.
    tokens: how many the steps of the finished run read. Steps that were undone by going back do not
        count.
    refused: how many steps were refused in the whole run. Steps that were undone by going back
        count too.
    seconds: the time this call spent on steps, evaluations and checkpoints; 0 where the run was
        finished before.
    peak_memory_bytes: the most that tensors took on one GPU in this call; None on a CPU, or where
    nothing was trained."""

    folder: Path
    steps: int
    tokens: int
    final_loss: float
    valid_loss: float | None
    valid_bits_per_byte: float | None
    refused: int
    seconds: float
    peak_memory_bytes: int | None


def train(recipe: Recipe, runs: str | Path = "runs") -> RunSummary:
    """Run a recipe to its end, or on from where it was stopped, in the folder `runs`/<run>.

    It may be called many times in one process: a call leaves no compiled code, GPU memory, signal
    handlers or random state behind. In a process group that the caller has started it trains on all
    ranks, and leaves the group to the caller.

    Raises ValueError or OSError (one line: what is wrong and what to do) on one process, and
    FailedOnOtherRank on the others; and Interrupted on all after SIGINT, SIGTERM or SIGHUP on any.
    """
    run = Path(runs) / recipe.run
    try:
        with start(recipe.parallel, recipe.train.device) as mesh, _restored(recipe, mesh):
            return _run(recipe, run, mesh)
    except KeyboardInterrupt:  # before there was anything to save, or by a second Ctrl-C
        saved = step_folders(run / CHECKPOINTS)
        where = f"goes on from step {int(saved[0].name[5:])}" if saved else "begins again"
        raise Interrupted(f"stopped at once; the same command {where}", signal.SIGINT) from None


def _run(recipe: Recipe, run: Path, mesh: Mesh) -> RunSummary:
    with ExitStack() as held:
        if mesh.gather(mesh.together(lambda: _finished(run, recipe), first=True))[0]:
            say(f"run {recipe.run} is finished: {recipe.train.steps} steps, in {run}")
            return _summary(recipe, run, mesh, seconds=0.0, peak_memory_bytes=None)
        base = mesh.together(
            lambda: None if recipe.base is None else load(recipe.base, dtype=torch.float32)
        )
        mesh.together(lambda: _prepare(recipe, base), first=True)
        data = mesh.together(lambda: TokenData(recipe.data.path, "train"))
        assert data is not None
        config = mesh.together(lambda: _config(recipe, base, data, mesh))
        loader = mesh.together(lambda: _loader(recipe, data, mesh))
        assert config is not None
        assert loader is not None
        mesh.together(lambda: held.enter_context(_opened(run, recipe)), first=True)
        model, origin = _model(recipe, config, data, mesh, base)
        base = None  # free it, because each of several processes holds a whole copy
        began = time.perf_counter()
        _train(recipe, run, model, origin, loader, mesh)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(mesh.device) if mesh.device.type == "cuda" else None
        return _summary(recipe, run, mesh, seconds=seconds, peak_memory_bytes=peak)


@contextmanager
def _restored(recipe: Recipe, mesh: Mesh) -> Iterator[None]:
    """Give the process back as it was: its random state, the console, compiled code, the GPU's
    memory."""
    quiet, gpus = console.quiet, [mesh.device] if mesh.device.type == "cuda" else []
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    console.quiet = not mesh.first
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        console.quiet = quiet
        if recipe.train.compile:
            torch.compiler.reset()
        if gpus:
            gc.collect()  # a model whose forward is wrapped refers to itself
            torch.cuda.empty_cache()


def _summary(
    recipe: Recipe, run: Path, mesh: Mesh, *, seconds: float, peak_memory_bytes: int | None
) -> RunSummary:
    """The first process reads the run's folder, and all return the same, except for `seconds`."""

    def read() -> dict[str, Any]:
        metrics = run / METRICS
        lines = read_metrics(metrics) if metrics.exists() else []
        applied = [
            line["loss"] for line in lines if "refused" not in line and line.get("loss") is not None
        ]
        valid: dict[str, Any] = next((line for line in reversed(lines) if "valid_loss" in line), {})
        progress = read_progress(step_folders(run / CHECKPOINTS)[0])
        return {
            "steps": progress.step,
            "refused": progress.refused_in_all,
            "final_loss": applied[-1] if applied else math.nan,
            "valid_loss": valid.get("valid_loss"),
            "valid_bits_per_byte": valid.get("valid_bits_per_byte"),
        }

    found = mesh.gather(mesh.together(read, first=True))[0]
    assert found is not None
    peaks = [peak for peak in mesh.gather(peak_memory_bytes) if peak is not None]
    return RunSummary(
        folder=run,
        tokens=found["steps"] * recipe.train.batch_tokens,
        seconds=seconds,
        peak_memory_bytes=max(peaks, default=None),
        **found,
    )


def _finished(run: Path, recipe: Recipe) -> bool:
    """Whether nothing is left to do. ValueError where the folder is another run's, or has made more
    steps already."""
    checkpoints = step_folders(run / CHECKPOINTS)
    check_same(run, recipe, bool(checkpoints))
    if not checkpoints or damaged(checkpoints[0]):
        return False
    step = int(checkpoints[0].name[5:])
    if step > recipe.train.steps:
        raise ValueError(
            f"{run} has made {step} steps already, more than train.steps = {recipe.train.steps}; "
            "write more, or give "
            f"another run=NAME"
        )
    return step == recipe.train.steps


def _prepare(recipe: Recipe, base: LanguageModel | None) -> None:
    """See to it that the data are there and fit `base`."""
    if base is None:
        check_vocabulary(recipe)
    data = open_data(recipe)
    if base is not None:
        check_tokenizer(recipe, base, data)


def _config(recipe: Recipe, base: LanguageModel | None, data: TokenData, mesh: Mesh) -> ModelConfig:
    """The config of the model that is trained, once every setting is known to fit it."""
    config = recipe.model_config(data.vocab_size) if base is None else base.config
    check_settings(recipe, config, data, mesh)
    if config.eos_token_id is None and data.end_of_text is not None:
        config = config.replace(eos_token_id=data.end_of_text)
    if recipe.train.float8:
        float8.load(mesh.device)
    check_memory(recipe, config, mesh)
    return config


def _loader(recipe: Recipe, data: TokenData, mesh: Mesh) -> Loader:
    """Gives this rank its rows of every microbatch."""
    return Loader(
        data,
        seq_len=recipe.train.seq_len,
        batch_size=recipe.rows // mesh.data_ranks,
        seed=recipe.train.seed,
        rank=mesh.data_rank,
        ranks=mesh.data_ranks,
        reset_state=resets_state(recipe, data),
    )


@contextmanager
def _opened(run: Path, recipe: Recipe) -> Iterator[None]:
    """The run's folder, for this process alone."""
    with only_one(run):
        for leftover in run.glob(".*.partial"):
            leftover.unlink()
        write_text(run / RECIPE, recipe.to_toml())
        yield


def _model(
    recipe: Recipe, config: ModelConfig, data: TokenData, mesh: Mesh, base: LanguageModel | None
) -> tuple[LanguageModel, Origin]:
    """What is trained, new or from `base`, and what its checkpoints are tied to."""
    torch.manual_seed(recipe.train.seed)
    tokenizer, template, adapter, under = (
        load_tokenizer(recipe.data.path),
        data.chat_template,
        None,
        None,
    )
    if base is not None and recipe.base is not None:
        folder = find_model(recipe.base)
        template = template or find_template(folder, tokenizer)
        if recipe.lora is not None:
            under = lora.fingerprint(base)
            adapter = lora.inject(base, recipe.lora, folder)
    if base is not None and mesh.world == 1:
        model = base.to(mesh.device)
        model.config = config
    else:
        with torch.device("meta"):
            model = LanguageModel(config)
        if recipe.lora is not None:
            lora.inject(model, recipe.lora, folder)
    settings = recipe.train
    parallelize(
        model,
        mesh,
        recompute=settings.recompute,
        compile=settings.compile,
        dtype=settings.dtype,
        float8=settings.float8,
    )
    if model is not base:
        model.to_empty(device=mesh.device)
        if base is None:
            init_weights(model, recipe.train.seed)
        else:
            whole = base.state_dict()
            for name, tensor in model.state_dict().items():
                fill(tensor, whole[name].to(mesh.device))
    # lora.dropout, which alone draws after this line, must draw another mask on each rank
    if mesh.world > 1:
        torch.manual_seed(settings.seed + mesh.rank)
    model.tokenizer = tokenizer
    return model, Origin(data=data.fingerprint, chat_template=template, adapter=adapter, base=under)


def _train(
    recipe: Recipe, run: Path, model: LanguageModel, origin: Origin, loader: Loader, mesh: Mesh
) -> None:
    """Every step of the run that is left, with its evaluations and checkpoints."""
    settings, steps = recipe.train, recipe.train.steps
    optimizer = new_optimizer(model, recipe.optim)
    evaluate = _evaluation(recipe, model, mesh, resets_state(recipe, loader.data))
    went_back: dict[str, Any] = {}  # said in the metrics of the step that follows
    model.train()
    with (
        Checkpoints(run / CHECKPOINTS, mesh, origin, recipe.checkpoint) as checkpoints,
        Feed(loader, settings.accumulate, mesh) as feed,
        MicrobatchRunner(model, mesh, settings) as runner,
        stop_requests(at_once=mesh.world == 1) as stop,
    ):
        probe = _probe(recipe, model, loader, mesh)
        recovery = Recovery(checkpoints, model, optimizer, mesh, settings.patience, probe)
        progress = checkpoints.resume(model, optimizer)
        feed.seek(progress.position)
        describe(recipe, run, model, loader, mesh, progress.step)
        metrics = Metrics(run / METRICS, progress.step, settings.tensorboard, write=mesh.first)
        with _picture(recipe, run, mesh) as redraw, progress_bar(steps, progress.step) as show:
            while progress.step < steps:
                # Take a step on all ranks.
                began, step, batches = time.perf_counter(), progress.step + 1, next(feed)
                result = take_step(
                    recipe, optimizer, runner, batches, progress, mesh, stop, checkpoints.flags
                )
                checkpoints.advance(*result.saving)
                speed = settings.batch_tokens / (time.perf_counter() - began)
                line = _metrics_line(step, result, settings, optimizer, speed) | went_back
                went_back, last = {}, step == steps

                # Was it refused? Then the weights are as they were.
                if not result.applied:
                    line |= {"refused": result.refusal, "samples": batches.samples}
                    samples = "samples {:,} to {:,}".format(*batches.samples)
                    say(f"step {step}: {result.refusal}; not applied ({samples})")

                # Validate.
                if evaluate and (last or (recipe.eval.every and step % recipe.eval.every == 0)):
                    line |= evaluate(f"step {step}/{steps}  loss {result.loss:.3f}")
                metrics.write(line)
                show(step, result.loss, speed)

                # Recover: ruined weights are never saved. The run goes back to the newest
                # checkpoint from before the trouble.
                saves = bool(last or result.stop or _due(step, recipe.checkpoint))
                valid = line.get("valid_loss")
                trouble = recovery.trouble(progress, result.refusal, valid, saves=saves, last=last)
                if trouble is not None:
                    progress = recovery.go_back(progress, trouble)
                    went_back = {"went_back": {"after_step": step, "for": trouble}}
                    feed.seek(progress.position)
                    metrics.cut(progress.step)
                    continue

                # Save, and stop where that was asked for.
                if saves:
                    metrics.flush()
                    checkpoints.save(model, optimizer, progress)
                if valid is not None:
                    redraw()
                if result.stop and not last:
                    checkpoints.settle()
                    said = f"stopped and saved at step {step}; the same command goes on from there"
                    raise Interrupted(said, result.stop)
        checkpoints.settle()
        metrics.close()
    say(f"finished: model in {run}, curve in {run / CURVE}")


def take_step(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    runner: MicrobatchRunner,
    batches: StepBatches,
    progress: RunProgress,
    mesh: Mesh,
    stop: StopRequests,
    saving: tuple[int, int],
) -> StepResult:
    """Take the step after `progress`, or refuse it, and move `progress` past it. All ranks do the
    same and return the same result."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe.optim, progress.step + 1, recipe.train.steps)
    loss = gradients(runner, batches, mesh)
    # the first step has compiled everything; a stop now waits for the step, and saves it
    stop.at_once = False
    gradient_norm = clip(runner.model, mesh, recipe.optim.clip)
    not_finite, read_result = agree(mesh, loss, gradient_norm, stop, saving)
    # Without a spike rule the fused AdamW update is queued before the host reads the result,
    # because its kernel reads `not_finite` on the device. Other optimizers cannot, and step below.
    queued = not recipe.train.spike and step_unless(optimizer, not_finite)
    result = read_result()
    result = result._replace(refusal=refusal(result, progress.losses, recipe.train.spike))
    if result.applied and not queued:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses = [result.loss] if recipe.train.spike else []
    progress.pass_step(batches.samples[1], not result.applied, losses)
    return result


def _metrics_line(
    step: int, result: StepResult, settings: Train, optimizer: torch.optim.Optimizer, speed: float
) -> dict[str, Any]:
    """What metrics.jsonl says of every step. speed: in tokens per second."""
    return {
        "step": step,
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "tokens": step * settings.batch_tokens,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "tokens_per_second": round(speed, 1),
    }


@contextmanager
def _picture(recipe: Recipe, run: Path, mesh: Mesh) -> Iterator[Callable[[], None]]:
    """What draws the curve anew, unless it was drawn in the last PICTURE_SECONDS. It is drawn in
    any case when the run ends, also when it diverges or is stopped."""
    drawn = time.monotonic()

    def redraw(*, now: bool = False) -> None:
        nonlocal drawn
        if mesh.first and (now or time.monotonic() - drawn > PICTURE_SECONDS):
            plot(run / METRICS, run / CURVE, recipe.run)
            drawn = time.monotonic()

    try:
        yield redraw
    except (ValueError, Interrupted):
        redraw(now=True)
        raise
    redraw(now=True)


def _due(step: int, recipe: Checkpoint) -> bool:
    return any(every and step % every == 0 for every in (recipe.every, recipe.keep_every))


def _probe(
    recipe: Recipe, model: LanguageModel, loader: Loader, mesh: Mesh
) -> Callable[[], float] | None:
    """A function that measures the loss of one microbatch of the training split, always the same
    one, without gradients. None where no token of it can be learned.

    Where rows are trained in segments it reads their first segments only, so that it needs no more
    memory than training."""
    rows = recipe.rows // mesh.data_ranks
    mine = range(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    ids, targets, cu_seqlens = mesh.split(loader.batch(number % loader.count for number in mine))
    if recipe.train.segment:  # which excludes packed sequences, so cu_seqlens is None
        ids, targets = ids[:, : recipe.train.segment], targets[:, : recipe.train.segment]
    return evaluation(model, [Batch(ids, targets, cu_seqlens)], mesh, recipe.train.dtype)


def _evaluation(
    recipe: Recipe, model: LanguageModel, mesh: Mesh, reset_state: bool
) -> Callable[[str], dict[str, float]] | None:
    """A function that measures the loss of the validation split, prints it behind a text, and
    returns it for metrics.jsonl. None where the split has no token to learn."""
    valid = TokenData(recipe.data.path, "valid")
    settings = recipe.train
    batches = validation(
        valid,
        mesh,
        seq_len=settings.seq_len,
        rows=recipe.rows,
        tokens=recipe.eval.tokens,
        reset_state=reset_state,
    )
    measure = evaluation(model, batches, mesh, settings.dtype)
    if measure is None:
        return None

    def figures(text: str) -> dict[str, float]:
        loss = measure()
        bits = loss / math.log(2) / (valid.bytes / valid.learned)
        say(f"{text}  validation loss {loss:.3f} ({bits:.3f} bits per byte)")
        return {"valid_loss": loss, "valid_bits_per_byte": bits}

    return figures
