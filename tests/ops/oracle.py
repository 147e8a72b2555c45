"""What the tests of the ops measure against.

`exact` is the recurrence in float64; `plain` is plain torch, the yardstick of the error rule: the
quadratic form (for the state, the state einsum), eager, with every tensor in the input dtype. A
backend may be at most twice as far from `exact` as `plain` is, for the output, the state and every
gradient."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from transnormer.ops.lightning import lightning_chunked, lightning_quadratic, lightning_reference

SEED = int(os.environ.get("TRANSNORMER_TEST_SEED", "0"))  # another one: other inputs everywhere
ALIBI = [-(2.0 ** (-4 * (h + 1))) for h in range(2)]
# none, ALiBi's strongest and weakest, strong, nothing but the token itself
DECAYS = [0.0, *ALIBI, -1.5, -50.0]


@dataclasses.dataclass
class Case:
    """Inputs of one call and the gradients that come back to it, all drawn at random in one
    dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    state: Tensor | None
    d_output: Tensor
    d_last: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, dtype: torch.dtype, *, state: torch.dtype | None = None) -> Case:
        return dataclasses.replace(
            self,
            **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "d_output")},
            state=None if self.state is None else self.state.to(state or dtype),
            d_last=self.d_last.to(state or dtype),
        )


def draw(
    length: int,
    K: int = 16,
    V: int = 16,
    *,
    rows: int = 2,
    dtype: torch.dtype = torch.float32,
    decays: list[float] | None = None,
    state: bool = True,
    lengths: list[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """A case; with `lengths` one packed row of that many sequences."""
    generator = torch.Generator().manual_seed(seed + SEED)
    decays = DECAYS if decays is None else decays
    heads, cu_seqlens, sequences = len(decays), None, rows
    if lengths is not None:
        rows, length, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return Case(
        q=random(rows, length, heads, K),
        k=random(rows, length, heads, K),
        v=random(rows, length, heads, V),
        log_decay=torch.tensor(decays, device=device),
        state=random(sequences, heads, K, V) if state else None,
        d_output=random(rows, length, heads, V),
        d_last=random(sequences, heads, K, V),
        cu_seqlens=cu_seqlens,
    )


def run(op: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Tensor]:
    """Output, last state and every gradient of op(q, k, v, log_decay, state=…, cu_seqlens=…)."""
    leaves = {
        name: getattr(case, name)
        for name in ("q", "k", "v", "state")
        if getattr(case, name) is not None
    }
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    state = leaves.get("state")
    output, last = op(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.log_decay,
        state=state,
        cu_seqlens=case.cu_seqlens,
    )
    gradients = torch.autograd.grad(
        (output, last),
        list(leaves.values()),
        (case.d_output.to(output.dtype), case.d_last.to(last.dtype)),
    )
    found = {"output": output.detach(), "last": last.detach()}
    return found | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def exact(case: Case) -> dict[str, Tensor]:
    """The recurrence in float64; on a GPU, where a loop over tokens is slow, the chunked form,
    which is it to 1e-12."""

    def reference(q, k, v, log_decay, *, state, cu_seqlens):  # type: ignore[no-untyped-def]
        if q.is_cuda:
            return lightning_chunked(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens)
        return lightning_reference(
            q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, dtype=torch.float64
        )

    return run(reference, case.to(torch.float64))


def plain(case: Case) -> dict[str, Tensor]:
    """Plain torch in the dtype of the case."""
    return run(plain_attention, case)


def plain_attention(q, k, v, log_decay, *, state=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
    """(output, last state) of the quadratic form and the state einsum, every tensor in the input
    dtype."""

    def one(q, k, v, log_decay, state):  # type: ignore[no-untyped-def]
        length, dtype = q.shape[1], q.dtype
        # [H, T + 1]
        powers = (
            (log_decay.double()[:, None] * torch.arange(length + 1, device=q.device))
            .exp()
            .to(dtype)
        )
        output = lightning_quadratic(q, k, v, log_decay)
        decayed = k * powers[:, :length].flip(1).T[None, :, :, None]
        last = torch.einsum("bthk,bthv->bhkv", decayed, v)
        if state is not None:
            read = torch.einsum("bthk,bhkv->bthv", q, state)
            output = output + powers[:, 1:].T[None, :, :, None] * read
            last = last + powers[:, -1][None, :, None, None] * state
        return output, last

    if cu_seqlens is None:
        return one(q, k, v, log_decay, state)
    bounds = cu_seqlens.tolist()
    parts = [
        one(q[:, a:b], k[:, a:b], v[:, a:b], log_decay, None if state is None else state[n : n + 1])
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])


def distance(found: Tensor, true: Tensor) -> float:
    """||found - true|| / ||true||, and infinite where anything is not finite."""
    if found.shape != true.shape:
        raise AssertionError(f"shape {list(found.shape)} is not {list(true.shape)}")
    difference = (found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-300)
    return difference.item() if found.isfinite().all() else float("inf")


def assert_within_twice(
    op: Callable[..., tuple[Tensor, Tensor]],
    case: Case,
    note: str = "",
    factor: float = 2,
    state: torch.dtype = torch.float32,
) -> None:
    """The error rule. States go in and come back in float32, or go in in the dtype `state`."""
    ours, yardstick, true = run(op, case.to(case.q.dtype, state=state)), plain(case), exact(case)
    for name, want in true.items():
        assert_no_further(name, ours[name], yardstick[name], want, case.q, note, factor)


def assert_no_further(
    name: str,
    found: Tensor,
    yardstick: Tensor,
    true: Tensor,
    like: Tensor,
    note: str = "",
    factor: float = 2,
) -> None:
    """The error rule for one tensor; `like` has the inputs' dtype and device.

    On a GPU in float32, an error of four roundings always passes: of one token, torch sums K or V
    products as a tree, which is off by less than a rounding, and the kernels one after another."""
    if true.numel() == 0:
        return
    on_gpu = like.is_cuda and like.dtype == torch.float32
    least = 4 * torch.finfo(torch.float32).eps if on_gpu else 0.0
    error, allowed = distance(found, true), max(factor * distance(yardstick, true), least)
    assert error <= allowed, f"{name} {note}: error {error:.3g}, allowed is {allowed:.3g}"


def compiled_and_eager_gradients(attention, case):
    """(compiled as one graph, eager) gradients of q, k, v and the state."""

    def loss(q, k, v, state):
        output, last = attention(q, k, v, case.log_decay, state=state)
        return (output * case.d_output).sum() + (last * case.d_last).sum()

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.state)]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return list(zip(gradients(compiled), gradients(loss), strict=True))
