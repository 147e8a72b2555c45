"""The search of `transnormer plan`: which layouts a job could be trained on, which of them fit, and
the fastest ones.

Refusals are worded as the command line spells its options, so that their advice can be typed as it
stands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from ..config import ModelConfig
from .hardware import GPUS, USABLE, Gpu
from .memory import Layout, Memory, ParameterShapes, expected_memory, parameter_shapes
from .mesh_sizes import (
    MeshSizes,
    check_mesh,
    decays_by_token,
    divided_by_tensor,
    divisors_text,
    tensor_refusal,
)
from .speed import find_speed

BATCH_TOKENS = 2**22  # of a step, about, where nobody says how many
# More than anybody has. Within these limits the search takes seconds.
LARGEST = {"gpus": 2**20, "tokens": 1e18, "seq_len": 2**34, "batch_tokens": 2**34}
LARGEST_FACTOR = 2**20
LARGEST_LAYERS = 4_096
MOST_LAYOUTS = 50_000
# each given, or to be found
FACTORS = ("tensor", "context", "replicate", "accumulate", "recompute")


@dataclass(frozen=True)
class Plan:
    """One layout of a job, and what it costs."""

    layout: Layout
    memory: Memory
    tokens_per_second: float  # of all GPUs
    bytes_per_step: dict[str, int]  # sent by one GPU, by factor
    days: float
    megawatt_hours: float  # of the GPUs at their rated power, nothing else


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, its tokens and the GPUs. The search chooses every factor that is None.

    Raises ValueError for a job that no layout can run. batch_tokens: of a step; 0 stands for about
    BATCH_TOKENS, in as many rows as the GPUs can share."""

    config: ModelConfig
    gpus: int
    gpu_name: str = "h100"
    tokens: float = 1e12
    seq_len: int = 2_048
    batch_tokens: int = 0
    replicate: int | None = None
    context: int | None = None
    tensor: int | None = None
    accumulate: int | None = None
    recompute: bool | None = None
    gpu: Gpu = field(init=False)

    def __post_init__(self) -> None:
        if self.gpu_name not in GPUS:
            raise ValueError(f"no GPU {self.gpu_name!r}; there are {', '.join(GPUS)}")
        numbers = {
            name: getattr(self, name)
            for name in (*LARGEST, "replicate", "context", "tensor", "accumulate")
        }
        for name, value in numbers.items():
            least, most = int(name != "batch_tokens"), LARGEST.get(name, LARGEST_FACTOR)
            if value is not None and not least <= value <= most:
                raise ValueError(
                    f"{_option(name)} is {value:,}, but must be from {least} to {most:,}"
                )
        layers = self.config.num_hidden_layers
        if layers > LARGEST_LAYERS:
            raise ValueError(
                f"model.num_hidden_layers = {layers:,}, but a plan has at most {LARGEST_LAYERS:,}"
            )
        if self.batch_tokens % self.seq_len:
            fits = max(1, round(self.batch_tokens / self.seq_len)) * self.seq_len
            raise ValueError(
                f"a step of {self.batch_tokens:,} tokens is not whole rows of {self.seq_len:,}; "
                f"--batch-tokens {spelled(fits)} would be"
            )
        object.__setattr__(self, "gpu", GPUS[self.gpu_name])
        self._check_factors()

    def _check_factors(self) -> None:
        """Refuse what no batch could mend: factors that the GPUs, the model or its rows cannot be
        divided by."""
        left, of = self.gpus, f"--gpus {self.gpus}"
        for name in ("tensor", "context", "replicate"):
            size = getattr(self, name) or 1
            if size > self.gpus:
                raise ValueError(
                    f"--{name} {size} needs at least {size} GPUs; --gpus is {self.gpus}"
                )
            if left % size:
                raise ValueError(
                    f"--{name} {size} does not divide {of}; {divisors_text(left)} would"
                )
            left //= size
            if size > 1:
                of = f"the {left} GPUs that are left for it"
        config, tensor, context = self.config, self.tensor or 1, self.context or 1
        parts = divided_by_tensor(config)
        if tensor > 1 and (refusal := tensor_refusal(config)):
            raise ValueError(f"--tensor {tensor}: {refusal}")
        for name, size in parts.items():
            if size % tensor:
                fits = divisors_text(math.gcd(*parts.values()))
                raise ValueError(
                    f"--tensor {tensor} does not divide model.{name} = {size}; {fits} would"
                )
        if context > 1 and not config.linear:
            raise ValueError(
                f"--context {context} is planned for linear attention alone, model.mixer=gla in "
                "every layer: softmax layers can have it too, but their speed was not measured"
            )
        if context > 1 and decays_by_token(config):
            raise ValueError(
                f"--context {context} needs a decay that is the same for all tokens, not "
                f"model.decay={config.decay}"
            )
        if self.seq_len % (context * tensor):
            both = f"--context {context} x --tensor {tensor}" if context > 1 and tensor > 1 else ""
            one = f"--context {context}" if context > 1 else f"--tensor {tensor}"
            raise ValueError(
                f"{both or one} does not divide rows of --seq {self.seq_len}; "
                f"{divisors_text(self.seq_len)} would"
            )

    @cached_property
    def shapes(self) -> ParameterShapes:
        return parameter_shapes(self.config, self.seq_len)

    @cached_property
    def rows(self) -> int:
        """The rows of a step."""
        if self.batch_tokens:
            return self.batch_tokens // self.seq_len
        rows = max(1, round(BATCH_TOKENS / self.seq_len))
        candidates = itertools.islice(self.candidates(rows), MOST_LAYOUTS)
        return (
            rows if any(self._accepts(layout, rows) for layout in candidates) else self.shared(rows)
        )

    def shared(self, rows: int) -> int:
        """A number of rows near this one that all GPUs can share alike: of those near, one with
        many factors of 2."""
        unit = self.gpus * (self.accumulate or 1)
        for power in range(7, -1, -1):
            each = round(rows / unit / 2**power) * 2**power
            if abs(each * unit - rows) <= rows / 16:
                return each * unit
        return max(1, round(rows / unit)) * unit

    def candidates(self, rows: int) -> Iterator[Layout]:
        """The layouts with `tensor` within a node and, where `context` is free, at least 1,024
        tokens on a context rank."""
        tensors = (
            [n for n in _divisors(self.gpus) if n <= self.gpu.node]
            if self.tensor is None
            else [self.tensor]
        )
        shares_rows = self.config.linear and not decays_by_token(self.config)
        for tensor in tensors:
            left = max(1, self.gpus // tensor)
            cuts = [
                n for n in _divisors(left) if n == 1 or (shares_rows and self.seq_len // n >= 1_024)
            ]
            for context in cuts if self.context is None else [self.context]:
                copies = (
                    _divisors(max(1, left // context))
                    if self.replicate is None
                    else [self.replicate]
                )
                for replicate in copies:
                    shard = max(1, left // (context * replicate))
                    steps = _divisors(max(1, rows // (replicate * shard)))
                    for accumulate in steps if self.accumulate is None else [self.accumulate]:
                        for recompute in (
                            (False, True) if self.recompute is None else (self.recompute,)
                        ):
                            yield Layout(
                                replicate=replicate,
                                shard=shard,
                                context=context,
                                tensor=tensor,
                                accumulate=accumulate,
                                recompute=recompute,
                            )

    def _accepts(self, layout: Layout, rows: int) -> bool:
        """Whether training would begin on a layout. rows: of a step."""
        if rows % layout.accumulate:
            return False
        try:
            check_mesh(
                self.config,
                layout.mesh,
                self.gpus,
                seq_len=self.seq_len,
                rows=rows // layout.accumulate,
            )
        except ValueError:
            return False
        return True

    def layouts(self) -> list[Layout]:
        """All that training would accept. Raises ValueError where there is none, or too many to
        look at."""
        candidates = list(itertools.islice(self.candidates(self.rows), MOST_LAYOUTS + 1))
        if len(candidates) > MOST_LAYOUTS:
            held = " ".join(
                f"--{name} 1" for name in ("context", "accumulate") if getattr(self, name) is None
            )
            raise ValueError(
                f"there are more than {MOST_LAYOUTS:,} layouts to look at; fix some factors, e.g. "
                f"{held}"
            )
        found = [layout for layout in candidates if self._accepts(layout, self.rows)]
        if not found:
            raise ValueError(self._rows_refused())
        return found

    def _rows_refused(self) -> str:
        fits = f"--batch-tokens {spelled(self.shared(self.rows) * self.seq_len)} could be"
        if self.accumulate is not None and self.rows % self.accumulate:
            return (
                f"--accumulate {self.accumulate} does not divide the {self.rows:,} rows of a "
                f"step; {fits}"
            )
        return (
            f"a step's {self.rows:,} rows of {self.seq_len:,} tokens cannot be shared by "
            f"{self.gpus:,} GPUs; {fits}"
        )

    def plans(self) -> list[Plan]:
        """A plan for each layout that training would accept. Raises ValueError as `layouts`
        does."""
        return [self.plan(layout) for layout in self.layouts()]

    def plan(self, layout: Layout) -> Plan:
        rows = self.rows // (layout.accumulate * layout.replicate * layout.shard)
        speed, sent = find_speed(self.shapes, layout, self.gpu, rows, self.seq_len)
        hours = self.tokens / speed / 3_600
        memory = expected_memory(self.shapes, layout, rows, self.seq_len)
        return Plan(
            layout, memory, speed, sent, hours / 24, hours * self.gpus * self.gpu.watts / 1e6
        )

    def fits(self, plan: Plan) -> bool:
        return plan.memory.total <= USABLE * self.gpu.gib * 2**30

    def best(self, most: int = 3) -> list[Plan]:
        """The fastest plans of different meshes that fit; of those within half a percent, the ones
        that need least memory.

        Raises ValueError where none does, naming what is too large and what would fit.
        """
        plans = self.plans()
        found: dict[MeshSizes, Plan] = {}
        for plan in sorted(
            plans,
            key=lambda plan: (-round(math.log(plan.tokens_per_second) * 200), plan.memory.total),
        ):
            if self.fits(plan):
                found.setdefault(plan.layout.mesh, plan)
        if not found:
            raise ValueError(self._too_large(min(plans, key=lambda plan: plan.memory.total)))
        return list(itertools.islice(found.values(), most))

    def _too_large(self, plan: Plan) -> str:
        part, size = max(vars(plan.memory).items(), key=lambda item: item[1])
        short = (
            f"nothing fits {self.gpus} x {self.gpu_name}: at best {plan.memory.total / 2**30:,.1f} "
            "GiB a GPU of "
            f"{USABLE * self.gpu.gib:,.1f} usable, of which {part} {size / 2**30:,.1f}"
        )
        held = {name: getattr(self, name) for name in FACTORS if getattr(self, name) is not None}
        free: dict[str, Any] = dict.fromkeys(held)
        if held and (plans := [plan for plan in replace(self, **free).plans() if self.fits(plan)]):
            best = max(plans, key=lambda plan: plan.tokens_per_second).layout
            changed = [
                _option(name, getattr(best, name))
                for name in held
                if getattr(best, name) != held[name]
            ]
            return f"{short}; {' '.join(changed)} would fit"
        without = f" without {' '.join(_option(*item) for item in held.items())}" if held else ""
        for more in (2**doubled for doubled in range(1, 13)):
            for batch in dict.fromkeys((self.batch_tokens, self.batch_tokens * more)):
                advice = f"--gpus {self.gpus * more}"
                if batch != self.batch_tokens:  # more GPUs may need more rows
                    advice += f" --batch-tokens {spelled(batch)}"
                if self._would_fit(gpus=self.gpus * more, batch_tokens=batch):
                    return f"{short}; {advice} would fit"
                if held and self._would_fit(gpus=self.gpus * more, batch_tokens=batch, **free):
                    return f"{short}; {advice}{without} would fit"
        return f"{short}; take shorter rows (--seq) or a smaller model"

    def _would_fit(self, **changes: Any) -> bool:
        """Whether anything fits with changes to this job. Only the layout of each mesh that needs
        least memory is tried."""
        try:
            job = replace(self, **changes)
            # `layouts` yields the layout of a mesh with the least memory last, because it
            # recomputes and has the smallest microbatches. accumulate = 1 is tried separately,
            # because it keeps no sum of gradients.
            tightest = {(layout.mesh, layout.accumulate == 1): layout for layout in job.layouts()}
        except ValueError:
            return False
        return any(job.fits(job.plan(layout)) for layout in tightest.values())


def compare_tensor(
    config: ModelConfig, gpus: int = 8, seq_len: int = 2_048, gpu_name: str = "h100"
) -> list[Plan]:
    """Plans for tensor = 1, 2, 4, 8, the other GPUs sharing the weights; each data rank reads 8,192
    tokens at a time.

    Sizes that do not divide the GPUs, the model or its rows are left out.
    """
    rows = max(1, 8_192 // seq_len)
    found = []
    for tensor in (1, 2, 4, 8):
        try:
            job = Job(
                config=config,
                gpus=gpus,
                gpu_name=gpu_name,
                seq_len=seq_len,
                replicate=1,
                context=1,
                tensor=tensor,
                batch_tokens=rows * seq_len * max(1, gpus // tensor),
                accumulate=1,
                recompute=False,
            )
            found += job.plans()
        except ValueError:
            if tensor == 1:
                raise
    return found


def saving(plans: Sequence[Plan]) -> float:
    """Share of a GPU's memory that the last plan saves of the first's."""
    return 1 - plans[-1].memory.allocated / plans[0].memory.allocated


def spelled(tokens: int) -> str:
    """A number of tokens as --batch-tokens reads it: 3.75M stands for 3.75 x 2^20."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        text = f"{tokens / unit:g}"
        if tokens >= unit and text.replace(".", "").isdigit() and float(text) * unit == tokens:
            return text + letter
    return str(tokens)


def _option(name: str, value: object = "") -> str:
    """A field of Job as the command line spells it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{ {'seq_len': 'seq'}.get(name, name).replace('_', '-') } {value}".rstrip()


@cache
def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
