"""Padding and packed sequences, as transformers' masks and position ids tell of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a call stand in their rows."""

    pad: Tensor | None = None  # [B]: how many columns at the left of each row are padding
    padded_right: bool = False  # whether any column at the right is
    bounds: Tensor | None = None  # [N + 1]: where N sequences packed in one row begin and end

    @property
    def no_cache_from(self) -> str | None:
        """What the rows are, in words, where no cache can go on from them; else None."""
        if self.padded_right:
            return "rows padded at the right (padding_side='left' puts it where it can be)"
        return None if self.bounds is None else "packed rows"


def read_rows(
    shape: torch.Size,
    mask: Tensor | None,
    position_ids: Tensor | None,
    bounds: Tensor | None,
    seen: Tensor | None,
) -> Rows:
    """The rows of a call of shape [B, T], from what transformers and its collators give.

    bounds: where the sequences packed in one row begin and end, if that is known; else position_ids
    tell it. seen: [B] int64, the tokens read before. Raises ValueError for what cannot be read
    right."""
    rows, length = shape
    pad, padded_right = (None, False) if mask is None else _padding(mask, length)
    if pad is not None and seen is not None and bool(((pad > 0) & (seen > 0)).any()):
        raise ValueError("attention_mask has a hole: padding after tokens that were read before")
    if position_ids is not None and bounds is None:
        real = None if mask is None else mask[:, -length:].bool()
        bounds = _packed(position_ids, seen, pad, real, rows, length)
    return Rows(pad, padded_right, bounds)


def _padding(mask: Tensor, length: int) -> tuple[Tensor | None, bool]:
    """Read the padding of the last `length` columns of a mask.

    Returns ([B] how many columns at the left of each row are padding, or None where none is;
    whether any column at the right is). Raises ValueError for padding between tokens."""
    if mask.dim() != 2 or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [B, T] with T at least {length}; got {list(mask.shape)}"
        )
    real = mask[:, -length:].bool()
    if bool(real.all()):
        return None, False
    count, first = real.sum(1), real.int().argmax(1)
    last = length - real.flip(1).int().argmax(1)
    # a row of padding alone
    first, last = first.where(count > 0, length), last.where(count > 0, length)
    if bool((last - first != count).any()):
        raise ValueError("attention_mask has a hole: padding between the tokens of a row")
    return (first if bool(first.any()) else None), bool((last < length).any())


def _packed(
    position_ids: Tensor,
    seen: Tensor | None,
    pad: Tensor | None,
    real: Tensor | None,
    rows: int,
    length: int,
) -> Tensor | None:
    """Where the sequences that position_ids [B or 1, T] pack into one row begin and end; None for
    one sequence a row.

    real: [B, T] bool or None: whose places count. Raises ValueError for places that do not follow
    from what was read."""
    start = torch.zeros(rows, dtype=torch.int64, device=position_ids.device)
    start = start if seen is None else start + seen
    places = torch.arange(length, device=position_ids.device)
    expected = (start if pad is None else start - pad)[:, None] + places
    wrong = position_ids != expected
    if not bool((wrong if real is None else wrong & real).any()):
        return None
    begins = (position_ids[0] == 0).nonzero().flatten()
    bounds = nn.functional.pad(begins, (0, 1), value=length)
    whole = rows == 1 and seen is None and pad is None and len(begins) and not begins[0]
    if whole and torch.equal(position_ids[0], places - begins.repeat_interleave(bounds.diff())):
        return bounds
    raise ValueError(
        f"position_ids must go on from the tokens read ({start.tolist()}) one by one, or begin "
        "again at 0 where "
        "sequences are packed in one row"
    )
