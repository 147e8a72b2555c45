"""The language model: embedding, blocks, norm, head. TransNormerLLM and the softmax baseline are
one class."""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..config import ModelConfig
from ..files import FINGERPRINT, WEIGHTS, read_weights, write_tensors, write_text
from ..ops.context import Context
from ..ops.dispatch import choose
from ..ops.loss import linear_cross_entropy
from . import fused_step
from .card import write_card
from .layers import GLUS, NORMS, Embedding, Linear, TokenPositions, added, fill, rotation
from .mixer import LayerState
from .mixers import MIXERS
from .slots import Slots
from .state import State


class Block(nn.Module):
    """X += Mixer(Norm(X)); X += GLU(Norm(X))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.mixer_norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[config.layers[layer].mixer](config, layer)
        self.glu_norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.glu = GLUS[config.glu](config)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer(self.mixer_norm(x), state, tokens)
        return self._add_and_glu(x, mixed), state

    def step_(
        self, x: Tensor, memory: LayerState, tokens: TokenPositions, backend: str = "auto"
    ) -> Tensor:
        """As the mixer's `step_`. backend: as in `LanguageModel.step_`."""
        refused = fused_step.refusal(self, x, named=backend == "fused")
        if choose("a decoding step", backend, {"fused": refused, "parts": None}) == "fused":
            return fused_step.step_(self, x, memory, tokens)
        mixed = self.mixer.step_(self.mixer_norm(x), memory, tokens)
        return self._add_and_glu(x, mixed)

    def _add_and_glu(self, x: Tensor, mixed: Tensor) -> Tensor:
        x, normed = added(self.glu_norm, x, mixed)
        return x + self.glu(normed)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A causal language model built from a `ModelConfig`. B rows, T tokens, D model width.

    One forward serves every use: a whole text, a piece of one, one token, packed sequences,
    left-padded rows. The state of what came before is an argument and a result; nothing is
    remembered on the module."""

    tokenizer: Any = None  # set by `transnormer.load` where the folder has one
    block: type[Block] = Block  # what the layers are; hub/hf.py puts its own here
    context: Context | None = None  # the processes that share each row, where several do

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.build(config)
        init_weights(self)

    def build(self, config: ModelConfig) -> None:
        """Make the submodules, their weights not yet initialised."""
        # a token that pads and also begins or ends texts is learned like any other
        pad = (
            None
            if config.pad_token_id in (config.bos_token_id, config.eos_token_id)
            else config.pad_token_id
        )
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, padding_idx=pad)
        # of the heads that RoPE turns
        self.rope_widths = sorted(
            {layer.head_dim for layer in config.layers if layer.position == "rope"}
        )
        self.embed_positions = None
        if config.position == "ape":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            self.block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]

    def share_rows(self, group: ProcessGroup) -> None:
        """Share each row of R T tokens among the R ranks of a group: from here on rank r is given
        the r-th slice, of T tokens."""
        self.context = Context.of(group)
        for block in self.blocks():
            block.mixer.context = self.context

    @property
    def head_weight(self) -> Tensor:
        """[vocab, D]: the embedding itself where the head is tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits of the next token after each of ids.

        ids: [B, T] int64. state: what the rows have read before, or None.
        cu_seqlens: [N + 1] integers from 0 to T: the one row (B = 1) holds N sequences, each with
            its own state row.
        pad: [B] integers: how many tokens at the left of each row are padding, to be passed over.
        Returns (logits [B, T, vocab], state after the last token); logits at padding mean nothing.
        Raises ValueError where the shapes do not fit.
        """
        x, state = self.hidden(ids, state, cu_seqlens=cu_seqlens, pad=pad)
        return F.linear(x, self.head_weight), state

    def hidden(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pad: Tensor | None = None,
        inputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """The head's input [B, T, D] and the state; arguments as in `forward`.

        ids: also [B, T, D] floating, vectors in the place of the tokens' embeddings.
        inputs: a list to which every layer's input [B, T, D] is appended.
        """
        self._check(ids, state, cu_seqlens, pad)
        if state is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            state = state.for_autograd()
        # once padding is removed, rows of unequal length are packed sequences
        if pad is not None and len(ids):
            real = _real(ids, pad)
            ends = (ids.shape[1] - pad.to(ids.device)).cumsum(0)
            packed, state = self.hidden(
                ids[real][None], state, cu_seqlens=F.pad(ends, (1, 0)), inputs=inputs
            )
            if inputs is not None:
                inputs[:] = [_unpack(x, real) for x in inputs]
            return _unpack(packed, real), state
        seen = None if state is None else state.seen
        first = 0 if self.context is None else self.context.rank * ids.shape[1]
        lower_right = None
        if self.context is not None and cu_seqlens is None and not self.config.linear:
            lower_right = _lower_right(first, ids.shape[1])
        positions = _positions(ids, seen, cu_seqlens, first)
        tokens = TokenPositions(positions, seen, cu_seqlens, lower_right=lower_right)
        x, tokens = self._embed(ids, tokens)
        if self.embed_positions is not None:
            last = first + ids.shape[1] - 1
            if seen is not None or cu_seqlens is not None:
                last = int(tokens.positions.max()) if tokens.positions.numel() else -1
            if last >= self.embed_positions.num_embeddings:
                raise ValueError(
                    f"position {last} is past the learned table of "
                    f"{self.embed_positions.num_embeddings} (max_position_embeddings)"
                )
            x = x + self.embed_positions(tokens.positions)
        layers = []
        for number, layer in enumerate(self.layers):
            if inputs is not None:
                inputs.append(x)
            x, layer_state = layer(x, None if state is None else state.layers[number], tokens)
            layers.append(layer_state)
        if cu_seqlens is None:
            read = tokens.positions.new_full(ids.shape[:1], ids.shape[1])
        else:
            read = cu_seqlens.diff().to(tokens.positions)
        return self.norm(x), State(layers, read if seen is None else seen + read)

    def _embed(self, ids: Tensor, tokens: TokenPositions) -> tuple[Tensor, TokenPositions]:
        """The tokens' vectors, scaled, without learned positions; and `tokens` with RoPE's
        angles."""
        x = self.embed_tokens(ids) if ids.dim() == 2 else ids
        turns = rotation(self.rope_widths, self.config.rope_theta, tokens.positions, x.dtype)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.hidden_size)
        return x, dataclasses.replace(tokens, rotation=turns)

    @torch.no_grad()
    def step_(
        self,
        ids: Tensor,
        slots: Slots,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Decoding: logits [S, T, vocab] of the next token after each of ids; the slots' states
        move on in place.

        Nothing is waited for on a GPU and no memory depends on what was read, so that a CUDA graph
        can hold the call. Tokens of a row are read one after another, so T is meant to be small.
        ids: [S, T] integers. rows: [S] integers, the slot of each row, all different; -1 for a row
            that only fills up the call: nothing is written for it, and its logits mean nothing.
            None: row i is slot i. Only linear layers check the numbers, and only on a CPU.
        lengths: [S] integers from 0 to T, how many of a row's tokens are read; the logits of the
            others mean nothing. None: all.
        backend: "fused" (`fused_step.py`: few kernels where S T is small), "parts" (the modules one
            after another) or "auto".
        Logits are NaN where a slot is full, or a position is past the learned table. Raises
        ValueError where the shapes do not fit, RuntimeError where the named backend cannot run the
        call."""
        if ids.dim() != 2 or not (rows is not None or len(ids) == len(slots.seen)):
            raise ValueError(
                f"ids must be [S, T] integers, S the slots where rows are not given; got "
                f"{list(ids.shape)} for {len(slots.seen)} slots"
            )
        for name, part in (("rows", rows), ("lengths", lengths)):
            if part is not None and part.shape != ids.shape[:1]:
                raise ValueError(
                    f"{name} must be [{len(ids)}], one number a row; got {list(part.shape)}"
                )
        seen = slots.seen if rows is None else slots.seen[rows]
        positions = seen[:, None] + torch.arange(ids.shape[1], device=ids.device)
        tokens = TokenPositions(positions, seen, slots=rows, lengths=lengths)
        x, tokens = self._embed(ids, tokens)
        if self.embed_positions is not None:
            table = self.embed_positions.num_embeddings
            learned = self.embed_positions(positions.clamp(max=table - 1))
            x = x + learned.masked_fill((positions >= table)[..., None], torch.nan)
        for block, memory in zip(self.blocks(), slots.layers, strict=True):
            x = block.step_(x, memory, tokens, backend)
        read = torch.full_like(seen, ids.shape[1]) if lengths is None else lengths.to(seen)
        if rows is None:
            slots.seen.add_(read)
        else:
            slots.seen.index_add_(0, rows.clamp(min=0), read.where(rows >= 0, 0))
        return fused_step.logits(x, self.norm, self.head_weight, backend)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pad: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy in nats of targets [B, T] (-100: does not count; padding never does),
        logits in slices.

        reduction: "mean", "sum" or "none"; other arguments as in `forward`.
        """
        x, _ = self.hidden(ids, state, cu_seqlens=cu_seqlens, pad=pad)
        if pad is not None:
            targets = targets.masked_fill(~_real(ids, pad), -100)
        return linear_cross_entropy(x, self.head_weight, targets, reduction=reduction)

    def _check(
        self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None, pad: Tensor | None
    ) -> None:
        if ids.dim() != (3 if ids.is_floating_point() else 2):
            raise ValueError(
                f"ids must be [B, T] integers or [B, T, D] vectors; got {list(ids.shape)} "
                f"{ids.dtype}"
            )
        rows = ids.shape[0]
        if cu_seqlens is not None:
            if pad is not None:
                raise ValueError(
                    "cu_seqlens and pad exclude each other: packed sequences have no padding"
                )
            if rows != 1:
                raise ValueError(f"cu_seqlens needs one row of packed sequences; got {rows} rows")
            if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
                raise ValueError(
                    f"cu_seqlens must be [N + 1], N at least 1; got {list(cu_seqlens.shape)}"
                )
            rows = len(cu_seqlens) - 1
            if cu_seqlens.device.type == "cpu":  # on a GPU a look would wait for it
                bounds, length = (
                    cu_seqlens.tolist(),
                    ids.shape[1] * (self.context.ranks if self.context else 1),
                )
                if bounds[:1] != [0] or bounds[-1:] != [length] or bounds != sorted(bounds):
                    raise ValueError(f"cu_seqlens must rise from 0 to T = {length}; got {bounds}")
        if (
            pad is not None
            and pad.device.type == "cpu"
            and not all(0 <= n <= ids.shape[1] for n in pad.tolist())
        ):
            raise ValueError(f"pad must be from 0 to T = {ids.shape[1]}; got {pad.tolist()}")
        if pad is not None and pad.shape != (rows,):
            raise ValueError(f"pad must be [{rows}], one count a row; got {list(pad.shape)}")
        if state is not None and len(state.layers) != len(self.layers):
            raise ValueError(
                f"the state is of a model with {len(state.layers)} layers, this one has "
                f"{len(self.layers)}"
            )
        if state is not None and len(state.seen) != rows:
            raise ValueError(f"the state holds {len(state.seen)} rows, the call {rows}")

    def parameter_count(self) -> int:
        """Number of learned parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int, chunk: int = 128) -> float:
        """Floating-point operations of training one token, forward and backward (three times
        forward).

        Matrix products only, look-ups not counted: 6 for every weight that multiplies a token, and
        the mixer's own: linear attention in chunks of `chunk` tokens, softmax attention over half
        of seq_len on average, or over what its window shows."""
        tables = self.embed_positions.weight.numel() if self.embed_positions is not None else 0
        tables += self.embed_tokens.weight.numel() if self.lm_head is not None else 0
        mixers = sum(block.mixer.flops_per_token(seq_len, chunk) for block in self.blocks())
        return 6.0 * (self.parameter_count() - tables) + 3 * mixers

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, where there is one, tokenizer.json; each whole
        or not at all.

        A model card, README.md, is written where the folder has none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, self.config, self.parameter_count())
        (folder / FINGERPRINT).unlink(missing_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict(), {"format": "pt"})
        if self.tokenizer is not None:
            write_text(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        # last: a folder without it is not a model
        write_text(folder / "config.json", self.config.to_json())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> LanguageModel:
        """Read a folder that `save_pretrained` wrote (for every other kind there is
        `transnormer.load`).

        The weights may also lie in shards, as transformers writes them:
        model.safetensors.index.json names each.
        dtype: of the weights in memory; None keeps the stored one. Raises ValueError or OSError
        naming the file, and every tensor that is missing, unknown or of another shape."""
        folder = Path(folder)
        config = ModelConfig.from_json(folder / "config.json")
        return cls.from_tensors(
            config, read_weights(folder), folder / WEIGHTS, device=device, dtype=dtype
        )

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> LanguageModel:
        """A model with exactly these weights; `source` is named in errors. Raises ValueError where
        they do not fit."""
        with torch.device("meta"):
            model = cls(config)
        wanted = model.state_dict()
        problems = [f"{name} is missing" for name in wanted if name not in tensors]
        problems += [f"{name} is unknown" for name in tensors if name not in wanted]
        problems += [
            f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:4])}{more}")
        model.to_empty(device="cpu")  # gives the decays, which are not stored, their values
        model.load_state_dict(tensors, assign=True)
        return model.to(device=device, dtype=dtype).eval()


@torch.no_grad()
def init_weights(model: LanguageModel, seed: int | None = None) -> None:
    """Normal weights of `initializer_range`, zero biases and pad row, norms at one, LRPE geometric:
    as published.

    seed: None draws one from torch's generator. Each tensor has a generator of its own, seeded by
    its name, so that its values do not depend on what else is initialised, or where."""
    if model.device.type == "meta":
        return
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            generator = torch.Generator(module.weight.device).manual_seed(
                seed ^ zlib.crc32(name.encode())
            )
            values = torch.empty(
                module.weight.shape, dtype=module.weight.dtype, device=module.weight.device
            )
            values.normal_(0.0, model.config.initializer_range, generator=generator)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                values[module.padding_idx].zero_()
            fill(module.weight, values)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU where there is one. ValueError for one that cannot
    be used here."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; there are auto, cpu, cuda")
    if name != "cpu" and not cuda:
        raise ValueError(f"device {name!r}: no CUDA device can be used here")
    return torch.device(name)


def _lower_right(before: int, length: int) -> Tensor:
    """The causal mask of `length` queries whose own keys follow `before` earlier ones, described as
    attention kernels know it. Its module imports torch's compiler, so it is imported late."""
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(length, before + length)  # type: ignore[no-any-return,no-untyped-call]


def _real(ids: Tensor, pad: Tensor) -> Tensor:
    """[B, T] bool: True where a token is not padding."""
    return torch.arange(ids.shape[1], device=ids.device) >= pad.to(ids.device)[:, None]


def _unpack(packed: Tensor, real: Tensor) -> Tensor:
    """[1, N, D] of the N real tokens -> [B, T, D], zero at padding."""
    x = packed.new_zeros(*real.shape, packed.shape[-1])
    x[real] = packed[0]
    return x


def _positions(ids: Tensor, seen: Tensor | None, cu_seqlens: Tensor | None, first: int) -> Tensor:
    """Each token's place in its own sequence: [T] where all rows agree, else [B, T]; int64. ids:
    from `first` on."""
    places = torch.arange(first, first + ids.shape[1], device=ids.device)
    if cu_seqlens is None:
        return places if seen is None else seen[:, None] + places
    owner = torch.searchsorted(cu_seqlens.to(places), places, right=True) - 1
    starts = cu_seqlens[:-1] if seen is None else cu_seqlens[:-1] - seen
    return (places - starts[owner])[None]
