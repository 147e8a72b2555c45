"""Muon, the optimizer of the blocks' matrices where `optim.name = muon`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dict[str, Any]
# one process orthogonalises several matrices in a batch only up to so many elements
ORTHOGONAL_ELEMENTS = 2**25


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are made equal (arXiv 2502.16982), for fused and sharded
    matrices too.

    It computes what `torch.optim.Muon` does with Nesterov's momentum and
    adjust_lr_fn="match_rms_adamw": the root mean square of an update is 0.2 lr, which is about
    AdamW's, so that both can share a learning rate. A fused projection consists of several maps.
    Each is orthogonalised by itself, because a map with small gradients would hardly move
    otherwise. Where matrices are sharded, each rank orthogonalises some of them whole and
    broadcasts the results. Matrices of one shape are orthogonalised in one batch."""

    def __init__(
        self, groups: list[Group], *, lr: float, weight_decay: float, momentum: float = 0.95
    ):
        state_names = ("momentum",)
        super().__init__(
            groups,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "state_names": state_names,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters. closure: ignored, because no gradient is computed twice."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, same in alike.items():
                processes = same[0].device_mesh.size() if hasattr(same[0], "device_mesh") else 1
                number = processes * max(1, ORTHOGONAL_ELEMENTS // shape.numel())
                for first in range(0, len(same), number):
                    some = same[first : first + number]
                    for p, update in zip(some, self._updates(some, group), strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                            update, alpha=-group["lr"]
                        )

    def _updates(self, parameters: list[Any], group: Group) -> Iterator[Tensor]:
        """The update of each parameter for a learning rate of 1, sharded like it. All parameters
        have one shape."""
        mesh = getattr(parameters[0], "device_mesh", None)
        processes, rank = (mesh.size(), dist.get_rank()) if mesh else (1, 0)
        mine: list[Tensor] = []
        for number, p in enumerate(parameters):
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            momentum: Tensor = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update: Any = p.grad.lerp(momentum, group["momentum"]).bfloat16()
            whole = update.full_tensor() if mesh else update
            # Other ranks' matrices are dropped at once, so that memory does not grow with the
            # number of processes.
            if number % processes == rank:
                mine.append(whole)
        turned = iter(_orthogonal(torch.stack(mine), *group["blocks"]) if mine else ())
        if mesh is None:
            yield from (update.to(p.dtype) for p, update in zip(parameters, turned, strict=True))
            return
        from torch.distributed.tensor import distribute_tensor

        for number, p in enumerate(parameters):
            owner = number % processes
            update = next(turned).contiguous() if owner == rank else torch.empty_like(whole)
            dist.broadcast(update, owner)
            yield distribute_tensor(update, mesh, p.placements, src_data_rank=None).to(p.dtype)


def _orthogonal(x: Tensor, matrices: int, rows: int) -> Tensor:
    """About U V^T times 0.2 sqrt(longer side), for each x = U S V^T of a batch [N, rows, columns].

    The rows of each x belong to `matrices` maps in turn, `rows` rows at a time. Each map is
    orthogonalised by itself."""
    y = (
        x.unflatten(1, (-1, matrices, rows)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        if matrices > 1
        else x
    )
    if turned := y.shape[1] > y.shape[2]:
        y = y.mT
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)
    # Newton-Schulz; the coefficients, by Keller Jordan, bring any value to about 1 in five steps
    for _ in range(5):
        square = y @ y.mT
        y = torch.baddbmm(
            y, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), y, beta=3.4445
        )
    y = (y.mT if turned else y) * (0.2 * math.sqrt(max(y.shape[1:])))
    if matrices == 1:
        return y
    return y.unflatten(0, (len(x), matrices)).unflatten(2, (-1, rows)).transpose(1, 2).flatten(1, 3)
