"""Checkpoints that a kill at any moment cannot spoil, written while training goes on.

A checkpoint is a folder with config.json, tokenizer.json, the weights, and what training needs
beside them. A run on one process writes the weights whole, so that the folder is a model by itself.
In a run on several processes each writes the pieces that it holds and where they belong, so that
any other mesh can read them (with torch.distributed.checkpoint; nothing is pickled), and
`transnormer.load` as well. The weights of a model with adapters are written merged, so that they
can be used as they are. Training goes on from the adapters, which lie in a folder inside.

A thread of each process writes its part from copies in host memory, under a hidden name. At the end
of each step the ranks tell each other whether they have finished. When all have, the first rank
seals the folder and renames it, so that a folder with the name of a checkpoint is always whole. A
checkpoint that is damaged later is named and set aside, and it is never deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..data import chat
from ..files import PIECES, WEIGHTS, flush, write_pieces, write_text
from ..model.card import write_card
from ..model.language_model import LanguageModel
from ..run_folder import SEAL, damage, seal, step_folders
from . import checkpoint_pieces, lora
from .mesh import FailedOnOtherRank, Mesh
from .metrics import say
from .optim import load_optimizer_tensors, optimizer_tensors
from .parallelize import whole
from .recipe import Checkpoint

OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_PIECES = "optimizer-{:05d}-of-{:05d}.safetensors"
RECORD = "training.json"
WINDOW = 32  # how many of the last losses a spike is told by (`step.refusal`)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run depends on.

    data: the fingerprint of its data. base: the fingerprint of the weights under its adapter, where
    it trains one."""

    data: str
    chat_template: str | None = None
    adapter: lora.LoraConfig | None = None
    base: str | None = None


@dataclass
class RunProgress:
    """How far a run is. A checkpoint holds it beside the weights, the optimizer state and the
    random states.

    position: how many samples all steps have read, refused ones included.
    refused: how many steps in a row, up to the last one, were refused.
    refused_in_all: how many were refused in the whole run, also before it went back to a
        checkpoint.
    losses: the losses of the last steps that were applied, where spikes are watched for.
    skipped: the samples (from, to) that were passed over when the run went back.
    """

    step: int = 0
    position: int = 0
    refused: int = 0
    refused_in_all: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: list[list[int]] = field(default_factory=list)

    def pass_step(self, position: int, refused: bool, losses: list[float]) -> None:
        """Count a step that read the samples up to `position`. losses: its loss, where spikes are
        watched for."""
        self.step, self.position = self.step + 1, position
        self.refused = self.refused + 1 if refused else 0
        self.refused_in_all += refused
        if not refused:
            self.losses = [*self.losses, *losses][-WINDOW:]


class Checkpoints:
    """Writes and reads the checkpoints of a run. Every rank has one and calls the same methods in
    the same order.

    A save has two phases: all ranks write, then the first rank seals. `flags` says how far this
    rank is. The caller sums the flags of all ranks at the end of each step and gives the sums to
    `advance`, which begins the next phase or raises what went wrong: OSError on the rank that could
    not write, FailedOnOtherRank on the others. Earlier checkpoints are untouched by a save that
    fails."""

    def __init__(self, parent: Path, mesh: Mesh, origin: Origin, keep: Checkpoint):
        self._parent, self._mesh, self._origin, self._keep = parent, mesh, origin, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[Any] | None = None
        self._phase: str | None = None
        self._partial, self._prune = parent, False
        # the memory that copies are made into, kept from one save to the next
        self._host: dict[str, Tensor] = {}
        if mesh.first:
            parent.mkdir(exist_ok=True)
            clear_partial(parent)
        mesh.gather(None)  # no rank writes before the folder is cleared

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and self._mesh.world == 1:
            # what was begun is finished; raised over `error` only where that fails too
            self.settle()
        self._writer.shutdown()

    # Writing.

    def save(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, progress: RunProgress
    ) -> None:
        """Begin to write the checkpoint of `progress`, after the one before is done. Returns when
        all is copied."""
        self.settle()
        mesh, origin = self._mesh, self._origin
        self._partial = self._parent / f".step-{progress.step:07d}.partial"
        # otherwise the last checkpoint before the refused steps must stay
        self._prune = progress.refused == 0
        tensors = model.state_dict()
        weights = tensors.items() if origin.adapter is None else lora.merged(model, tensors)
        state = optimizer_tensors(model, optimizer) | {
            f"torch{checkpoint_pieces.RANDOM}{mesh.rank}": torch.get_rng_state()
        }
        if mesh.device.type == "cuda":
            state[f"cuda{checkpoint_pieces.RANDOM}{mesh.rank}"] = torch.cuda.get_rng_state()
        files = {
            _name(WEIGHTS, PIECES, mesh): self._copies(weights),
            _name(OPTIMIZER, OPTIMIZER_PIECES, mesh): self._copies(sorted(state.items())),
        }
        adapter = (
            {} if origin.adapter is None else self._copies(whole(lora.adapter_tensors(model)))[0]
        )
        copied = torch.cuda.Event() if mesh.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        record = (
            json.dumps(
                asdict(progress) | {"data": origin.data, "base": origin.base, "mesh": mesh.sizes}
            )
            + "\n"
        )

        def write() -> dict[str, dict[str, object]]:
            if copied is not None:
                copied.synchronize()
            folder = self._partial
            folder.mkdir(exist_ok=True)
            hashes = {
                name: write_pieces(folder / name, *content) for name, content in files.items()
            }
            if mesh.first:
                _describe(folder, model, origin)
                write_text(folder / RECORD, record)
            if origin.adapter is not None and mesh.first:
                lora.save_adapter(folder / lora.FOLDER, adapter, origin.adapter)
            return hashes

        self._phase, self._job = "written", self._writer.submit(write)

    def _copies(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Copy what this process writes of the tensors to the host.

        Returns (the copies; their offsets in the whole tensors, or None on one process, whose
        tensors are whole). Copies from a GPU are complete only after a `torch.cuda.Event`."""
        copies, layout = {}, {}
        for name, piece, begin, shape in checkpoint_pieces.pieces(tensors, self._mesh):
            held = self._host.get(name)
            if held is None or held.shape != piece.shape or held.dtype != piece.dtype:
                held = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
                self._host[name] = held
            copies[name] = held.copy_(piece, non_blocking=True)
            layout[name] = {"saved_offsets": begin, "shape": shape}
        return copies, layout if self._mesh.world > 1 else None

    @property
    def flags(self) -> tuple[int, int]:
        """(this process has not finished, this process failed), to be summed over all."""
        if self._job is None or not self._job.done():
            return int(self._job is not None), 0
        return 0, int(self._job.exception() is not None)

    def advance(self, unfinished: int, failed: int) -> None:
        """Go on to the next phase if all processes are through with this one."""
        if failed:
            job, self._phase, self._job = self._job, None, None
            error = job.exception() if job is not None else None
            if self._mesh.first:
                clear_partial(self._parent)
            raise error if error is not None else FailedOnOtherRank
        if self._phase is None or unfinished:
            return
        if self._phase == "sealed":
            self._phase = self._job = None
            return
        assert self._job is not None
        known = {
            name: wanted
            for each in self._mesh.gather(self._job.result())
            for name, wanted in each.items()
        }
        self._phase = "sealed"
        self._job = self._writer.submit(self._seal, known) if self._mesh.first else None

    def settle(self) -> None:
        """Wait until what was begun is sealed."""
        while self._phase is not None:
            if self._job is not None:
                self._job.exception()
            told = self._mesh.gather(self.flags)
            self.advance(sum(each[0] for each in told), sum(each[1] for each in told))

    def _seal(self, known: dict[str, dict[str, object]]) -> None:
        folder = self._parent / self._partial.name[1:].removesuffix(".partial")
        seal(self._partial, known)
        if folder.exists():
            set_aside(folder)
        self._partial.rename(folder)
        flush(self._parent)
        every = self._keep.keep_every
        for old in step_folders(self._parent)[self._keep.keep :] if self._prune else []:
            if not every or int(old.name[5:]) % every:
                remove(old)

    # Reading.

    def resume(self, model: LanguageModel, optimizer: torch.optim.Optimizer) -> RunProgress:
        """Load the newest good checkpoint into model and optimizer; without any, a run's beginning.

        A damaged one that is newer is named and set aside. Raises ValueError where none is good,
        and where the model, the data, or the weights under the adapter are not those of the
        checkpoint, naming what differs."""
        folder, later = self._newest(lambda record: True)
        if folder is None and later:
            wrong = self._damage(later[0])
            raise self._mesh.failure(
                f"{later[0]}: {wrong}; none is good: to start again, move {self._parent} away"
            )
        return RunProgress() if folder is None else self._load(folder, later, model, optimizer)

    def go_back(self, model: LanguageModel, optimizer: torch.optim.Optimizer) -> RunProgress | None:
        """Load the newest good checkpoint that was not written directly after a refused step, and
        remove those after it.

        Returns None where there is none.
        """
        self.settle()
        folder, later = self._newest(lambda record: not record.get("refused"))
        return None if folder is None else self._load(folder, later, model, optimizer)

    def _newest(self, fits: Callable[[dict[str, Any]], bool]) -> tuple[Path | None, list[Path]]:
        """The newest good checkpoint that fits, and those after it."""
        found = self._mesh.gather(step_folders(self._parent) if self._mesh.first else [])[0]
        for number, folder in enumerate(found):
            if self._damage(folder) is None and fits(_record(folder)):
                return folder, found[:number]
        return None, found

    def _damage(self, folder: Path) -> str | None:
        """As `damaged`, but each process checks a part of the files, because hashing takes time."""
        found = self._mesh.gather(damaged(folder, self._mesh.rank, self._mesh.world))
        return next((wrong for wrong in found if wrong is not None), None)

    def _load(
        self,
        folder: Path,
        later: list[Path],
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
    ) -> RunProgress:
        """Read a checkpoint, then see to it that those after it count no longer."""
        progress = self._mesh.together(lambda: self._read(folder, model, optimizer))
        for other in later:
            wrong = self._damage(other)  # which every process must ask
            if self._mesh.first and wrong is not None:
                say(
                    f"{other}: {wrong}; it is now {set_aside(other).name}, and the run goes on "
                    f"from {folder.name}"
                )
            elif self._mesh.first:
                remove(other)
        assert progress is not None
        return progress

    def _read(
        self, folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer
    ) -> RunProgress:
        record, origin, mesh = _record(folder), self._origin, self._mesh
        if record["data"] != origin.data:
            raise ValueError(
                f"{folder} was trained on other data than data.path holds now; give another "
                "run=NAME"
            )
        if record["base"] != origin.base:
            raise ValueError(
                f"{folder} was trained on other weights than model.from holds now; give another "
                "run=NAME"
            )
        if (
            other := difference(ModelConfig.from_json(folder / "config.json"), model.config)
        ) is not None:
            raise ValueError(f"{folder} is of another model: {other}; give another run=NAME")
        before, now = record.get("mesh"), mesh.sizes
        if before != now:
            say(
                f"{folder.name} was written by the mesh {_words(before or {})}; this one is "
                f"{_words(now)}"
            )
        if origin.adapter is None:
            checkpoint_pieces.read(folder, model.state_dict())
        else:
            lora.load_adapter(folder / lora.FOLDER, model)
        optimizer_state = checkpoint_pieces.optimizer_state(folder, model)
        random = {
            name: optimizer_state.pop(name)
            for name in list(optimizer_state)
            if checkpoint_pieces.RANDOM in name
        }
        mine = {
            name: drawn
            for name, drawn in random.items()
            if before == now and name.endswith(f"/{mesh.rank}")
        }
        checkpoint_pieces.read(folder, optimizer_state | mine)
        optimizer.state.clear()
        if optimizer_state:  # there is none before the first step that was not refused
            load_optimizer_tensors(model, optimizer, optimizer_state)
        for name, drawn in mine.items():
            if name.startswith("torch"):
                torch.set_rng_state(drawn)
            elif mesh.device.type == "cuda":
                torch.cuda.set_rng_state(drawn)
        return read_progress(folder)


def read_progress(folder: Path) -> RunProgress:
    """Where the run was when it wrote a checkpoint."""
    record = _record(folder)
    return RunProgress(**{name: record[name] for name in asdict(RunProgress()) if name in record})


def damaged(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint; None where all is as it was written. rank, ranks: look at a
    share of the files."""
    try:
        names = sorted(json.loads((folder / SEAL).read_text(encoding="utf-8")))[rank::ranks]
    except (OSError, ValueError, TypeError):
        names = []  # `damage` will say what is wrong with the seal
    return damage(folder, names)


def difference(theirs: ModelConfig, ours: ModelConfig) -> str | None:
    """The first field in which two models differ, as text."""
    stored, wanted = theirs.to_dict(), ours.to_dict()
    for key in [*wanted, *stored]:
        if stored.get(key) != wanted.get(key):
            return f"its {key} is {json.dumps(stored.get(key))}, not {json.dumps(wanted.get(key))}"
    return None


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it counts no longer; its new path."""
    numbers = iter(range(1, 1_000))
    away = folder.with_name(f"damaged-{folder.name}")
    while away.exists():
        away = folder.with_name(f"damaged-{folder.name}-{next(numbers)}")
    return folder.rename(away)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill leaves no half of it under its name."""
    doomed = folder.rename(folder.with_name(f".{folder.name}.partial"))
    shutil.rmtree(doomed, ignore_errors=True)


def clear_partial(parent: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for leftover in parent.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _name(alone: str, many: str, mesh: Mesh) -> str:
    return alone if mesh.world == 1 else many.format(mesh.rank + 1, mesh.world)


def _words(shape: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in shape.items())


def _describe(folder: Path, model: LanguageModel, origin: Origin) -> None:
    """Write what makes a folder with weights a model."""
    write_card(folder, model.config, model.config.parameter_count())
    if model.tokenizer is not None:
        write_text(folder / "tokenizer.json", model.tokenizer.to_str(pretty=True))
    if origin.chat_template is not None:
        write_text(folder / chat.FILE, origin.chat_template)
    write_text(folder / "config.json", model.config.to_json())


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return found
