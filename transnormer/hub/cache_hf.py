"""Our state in transformers' caches: read from one, and written into one.

transformers has one cache object for each layer. A `LinearAttentionLayer` holds the state of the
layer, [B, H, K, V], as its first recurrent state; the first of them holds the tokens read, [B], as
its second. What the convolution of a linear layer remembers is that layer's third state. A softmax
layer's cache has no place for it, so the first linear layer holds it, as its fourth state and on.
Softmax attention's keys and values are in a `DynamicLayer` or,
with a window, in a `DynamicSlidingWindowLayer`. A linear layer knows no length, so positions come
from the tokens read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from ..layer_config import FULL, LINEAR, SLIDING, LayerConfig
from ..model.mixer import LayerState
from ..model.state import State

CACHES = {
    LINEAR: LinearAttentionLayer,
    FULL: DynamicLayer,
    SLIDING: DynamicSlidingWindowLayer,
}


def read_cache(
    cache: Cache | None, layers: Sequence[LayerConfig], mask: Tensor | None, shape: torch.Size
) -> State | None:
    """What a cache of these layers holds, as our state; None where nothing was read.

    shape: [B, T] of the tokens that are to be read next. mask: of those and of all read before
    them, [B, all]. Raises ValueError for a cache that was not made for these layers, or that does
    not fit the mask."""
    if cache is None:
        return None
    rows, length = shape
    _check_kind(cache, layers)
    linear = [number for number, layer in enumerate(layers) if layer.linear]
    past = 0
    if len(linear) < len(layers):
        past = cache.get_seq_length()
        if mask is not None and mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {past} tokens read and "
                f"{length} to read"
            )
        if not past:
            return None
    elif not cache.layers[0].is_recurrent_states_initialized[0]:
        return None
    # linear layers are updated in place, which a backward pass must not see
    keep: Callable[[Tensor], Tensor] = torch.clone if torch.is_grad_enabled() else lambda part: part
    states: list[LayerState] = []
    for number, (held, layer) in enumerate(zip(cache.layers, layers, strict=True)):
        own = (
            (keep(held.recurrent_states[0]),)
            if layer.linear
            else (held.keys.transpose(1, 2), held.values.transpose(1, 2))
        )
        if layer.convolved:
            holder, index = _place_of_convolution(layers, number)
            past_tokens = cache.layers[holder].recurrent_states[index]
            own = (*own, keep(past_tokens).to(own[0].device))
        states.append(own)
    if linear:
        return State(states, keep(cache.layers[linear[0]].recurrent_states[1]))
    device = cache.layers[0].keys.device
    if mask is None:
        return State(states, torch.full((rows,), past, device=device))
    return State(states, mask[:, :past].to(device).sum(1))


def has_place(layers: Sequence[LayerConfig]) -> bool:
    """Whether transformers' cache can hold what these layers remember."""
    return any(layer.linear for layer in layers) or not any(layer.convolved for layer in layers)


def number_of_states(layers: Sequence[LayerConfig]) -> int:
    """How many states each linear layer's cache must have room for."""
    if not any(layer.convolved for layer in layers):
        return 2
    return 3 + sum(not layer.linear for layer in layers)


def _place_of_convolution(layers: Sequence[LayerConfig], number: int) -> tuple[int, int]:
    """The layer whose cache holds what the convolution of layer `number` remembers, and the number
    of its recurrent state there. `has_place` says whether there is one."""
    if layers[number].linear:
        return number, 2
    first = next(n for n, layer in enumerate(layers) if layer.linear)
    return first, 3 + sum(not layer.linear for layer in layers[:number])


def _check_kind(cache: Cache, layers: Sequence[LayerConfig]) -> None:
    """Raise ValueError for a cache that was not made for these layers."""
    fits = [type(held) for held in cache.layers] == [CACHES[layer.type] for layer in layers]
    # A DynamicCache() without a config makes its layers at first use, which fits full attention
    # alone. An offloading cache keeps its layers elsewhere.
    if not all(layer.linear for layer in layers):
        uniform = all(layer.type == FULL for layer in layers)
        fits = (fits or (uniform and not cache.layers)) and not getattr(cache, "offloading", False)
    if not fits:
        kinds = ", ".join(sorted({type(held).__name__ for held in cache.layers}))
        raise ValueError(
            f"this cache was not made for the model: {type(cache).__name__} of "
            f"{kinds or 'no layers'}; make one by DynamicCache(config=model.config)"
        )


def write_cache(cache: Cache, layers: Sequence[LayerConfig], state: State, length: int) -> None:
    """Put the state after `length` more tokens into the cache. Raises ValueError for what it has no
    place for."""
    first = True
    for number, (parts, layer) in enumerate(zip(state.layers, layers, strict=True)):
        if layer.convolved:
            parts, past = parts[:-1], parts[-1]
            holder, index = _place_of_convolution(layers, number)
            device = state.layers[holder][0].device
            cache.update_recurrent_state(past.detach().to(device), holder, state_idx=index)
        if len(parts) != (1 if layer.linear else 2):
            raise ValueError(
                f"mixer {layer.mixer} keeps {len(parts)} tensors a layer, for which "
                "transformers' cache has no place; transnormer.generate writes with any mixer"
            )
        if layer.linear:
            cache.update_recurrent_state(parts[0].detach(), number)
            # transformers sets it for convolutions alone
            cache.layers[number].device = parts[0].device
            if first:
                cache.update_recurrent_state(state.seen, number, state_idx=1)
            first = False
            continue
        # Our rows are right-aligned to the longest. transformers has a place for each column read,
        # and its sliding cache drops the oldest places itself.
        new = [part[:, -length:].detach() for part in parts]
        new = [nn.functional.pad(part, (0, 0, 0, 0, length - part.shape[1], 0)) for part in new]
        cache.update(new[0].transpose(1, 2), new[1].transpose(1, 2), number)
