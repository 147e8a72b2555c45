"""What a written model must be and say: the hash of every weight file, and some logits, checked
when it is loaded.

The hashes find damage. The logits find what hashes cannot: weights put in the wrong places, or
code, kernels or libraries that no longer compute what the weights were trained for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..files import FINGERPRINT, parse_json, sha256, weights_in, write_text
from ..model.language_model import LanguageModel
from ..model.layers import ACTIVATIONS

TOKENS, WORDS = 16, 64  # how many are read, and how many are compared after the last


@dataclass(frozen=True)
class Fingerprint:
    """What FINGERPRINT holds.

    files: weight file -> {"bytes": size, "sha256": hash}.
    ids: the tokens that are read.
    words, logits: some ids of the vocabulary, and their logits after the last token.
    tolerance, tolerance_half: by how much a logit may differ in float32 and in half precision."""

    files: dict[str, dict[str, Any]]
    ids: list[int]
    words: list[int]
    logits: list[float]
    tolerance: float
    tolerance_half: float

    @classmethod
    def take(
        cls,
        files: dict[str, dict[str, Any]],
        vocab: int,
        logits_of: Callable[[Tensor, Tensor, torch.dtype], Tensor],
    ) -> Fingerprint:
        """The fingerprint of a model whose weight files were just written.

        logits_of: (ids [TOKENS], words, dtype) -> these words' logits after the last token,
            float32, every step rounded to dtype. It is asked in float32 and in bfloat16: how far
            the two are apart says how closely this model's logits can be expected again. Raises
            ValueError where they are not finite.
        """
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (TOKENS,), generator=draw)
        words = torch.randperm(vocab, generator=draw)[:WORDS].sort().values
        exact, rounded = (logits_of(ids, words, dtype) for dtype in (torch.float32, torch.bfloat16))
        if not exact.isfinite().all():
            raise ValueError("the model's logits are not finite, though its weights are")
        half = max(8 * float((exact - rounded).abs().max()), 2**-6 * float(exact.abs().max()))
        # float32 has 2^16 times bfloat16's precision, less what sums in another order lose.
        return cls(files, ids.tolist(), words.tolist(), exact.tolist(), half * 2**-12, half)

    @classmethod
    def read(cls, folder: Path) -> Fingerprint | None:
        """The folder's; None where there is none. Raises ValueError or OSError for a weight file
        that is not as it says."""
        path = folder / FINGERPRINT
        if not path.is_file():
            return None
        try:
            found = cls(**parse_json(path.read_bytes()))
            sizes = {
                name: (record["bytes"], record["sha256"]) for name, record in found.files.items()
            }
            if not all(type(n) is int and n >= 0 for n in found.ids + found.words) or not found.ids:
                raise ValueError("a token id is none")
            if len(found.words) != len(found.logits) or not found.words:
                raise ValueError("its numbers do not fit one another")
            numbers = [*found.logits, found.tolerance, found.tolerance_half]
            if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
                raise ValueError("a logit or tolerance is not a finite number")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        if unknown := [name for name in weights_in(folder) if name not in sizes]:
            raise ValueError(
                f"{folder / unknown[0]} is not listed in {FINGERPRINT}, so nobody knows whether "
                "it is right"
            )
        for name, (size, digest) in sizes.items():
            file = folder / Path(name).name
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file, though {FINGERPRINT} names it")
            if file.stat().st_size != size or sha256(file) != digest:
                raise ValueError(
                    f"{file} is truncated or damaged: its hash is not that of {FINGERPRINT}; "
                    "write the folder again, or "
                    f"remove {FINGERPRINT} if the weights were changed on purpose"
                )
        return found

    def write(self, folder: Path) -> None:
        write_text(folder / FINGERPRINT, json.dumps(asdict(self), indent=2) + "\n")

    @torch.no_grad()
    def check(self, model: LanguageModel, folder: Path) -> None:
        """Raise ValueError, naming the first difference, where the model does not give the
        logits."""
        kinds = {p.dtype for name, p in model.named_parameters() if not name.endswith(".theta")}
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        if len(kinds) > 1:
            raise ValueError(
                f"{folder}: its weights are of several dtypes ({names}); load it with one, "
                "dtype=..."
            )
        if max(self.ids + self.words) >= model.config.vocab_size:
            raise ValueError(
                f"{folder / FINGERPRINT} is of another model: it has more than the "
                f"{model.config.vocab_size} words"
            )
        ids, words = (torch.tensor(part, device=model.device) for part in (self.ids, self.words))
        found = last_logits(model, ids, words).tolist()
        coarse = (
            kinds & {torch.bfloat16, torch.float16}
            or torch.get_float32_matmul_precision() != "highest"
        )
        tolerance = self.tolerance_half if coarse else self.tolerance
        for word, logit, wanted in zip(self.words, found, self.logits, strict=True):
            if not abs(logit - wanted) <= tolerance:  # true for NaN
                raise ValueError(
                    f"{folder / FINGERPRINT}: in {names} on {model.device} the logit of token "
                    f"{word} is {logit:.6g}, not "
                    f"{wanted:.6g} (give or take {tolerance:.2g}): weights are not in their "
                    "places, or this dtype, device "
                    "or version computes otherwise"
                )


def last_logits(model: LanguageModel, ids: Tensor, words: Tensor) -> Tensor:
    """The model's logits of these words after the last of ids [T]: [len(words)] float32."""
    x, _ = model.hidden(ids[None])
    return F.linear(x[0, -1], model.head_weight[words]).float()


@torch.no_grad()
def weights_hash(model: LanguageModel) -> str:
    """The SHA-256 of a model's config and of every weight as it is in memory, in hexadecimal: what
    is computed from them belongs to no other model. It reads all weights."""
    digest = hashlib.sha256(model.config.to_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def published_logits(
    read: Callable[[str, int, int | None], Iterator[Tensor]],
    config: ModelConfig,
    ids: Tensor,
    words: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The same from published weights, by the published equations with T x T matrices and without
    our modules.

    read(name, start, stop): rows of a published tensor, in pieces; only a piece is held at a time.
    dtype: what weights and the result of every step are rounded to; sums are in float32.
    """
    published = _Published(read, config, dtype)
    # [T, D]
    x = published.embedded(ids)
    for layer in range(config.num_hidden_layers):
        x = published.block(x, layer)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    last = published.norm(x, "model.final_norm")[-1]
    rows = [published.rows(head, word, word + 1) for word in words.tolist()]
    return published.cast(torch.cat(rows) @ last)


@dataclass(frozen=True)
class _Published:
    """The published equations on published weights; read, config and dtype as in
    `published_logits`."""

    read: Callable[[str, int, int | None], Iterator[Tensor]]
    config: ModelConfig
    dtype: torch.dtype

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).float()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.cat([self.cast(piece) for piece in self.read(name, start, stop)])

    def linear(self, x: Tensor, name: str, width: int) -> Tensor:
        y, done = x.new_empty(len(x), width), 0
        # kept results between the pieces would scatter the memory
        for piece in self.read(f"{name}.weight", 0, None):
            y[:, done : done + len(piece)] = x @ self.cast(piece).T
            done += len(piece)
        return self.cast(y + self.rows(f"{name}.bias") if self.config.bias else y)

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config.norm_eps
        if self.config.norm == "srmsnorm":
            return self.cast(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
        weight, bias = self.rows(f"{name}.weight"), self.rows(f"{name}.bias")
        return self.cast(F.layer_norm(x, x.shape[-1:], weight, bias, eps))

    def embedded(self, ids: Tensor) -> Tensor:
        name = "model.embed_tokens.weight"
        x = torch.cat([self.rows(name, word, word + 1) for word in ids.tolist()])
        return self.cast(x * math.sqrt(self.config.hidden_size)) if self.config.embed_scale else x

    def block(self, x: Tensor, layer: int) -> Tensor:
        """x [T, D] -> [T, D]."""
        at, d, f = f"model.layers.{layer}", self.config.hidden_size, self.config.intermediate_size
        mixed = self.mixed(self.norm(x, f"{at}.token_norm"), layer)
        x = self.cast(x + self.linear(mixed, f"{at}.token_mixer.out_proj", d))
        y = self.norm(x, f"{at}.channel_norm")
        gate = self.linear(y, f"{at}.channel_mixer.l1", f)
        y = self.cast(gate * self.linear(y, f"{at}.channel_mixer.l2", f))
        return self.cast(x + self.linear(y, f"{at}.channel_mixer.l3", d))

    def mixed(self, x: Tensor, layer: int) -> Tensor:
        """What the mixer's last projection reads, of x [T, D]."""
        config, at = self.config, f"model.layers.{layer}.token_mixer"
        time, act = torch.arange(len(x)), ACTIVATIONS[config.activation]
        q, k, v, u = self.linear(x, f"{at}.qkvu_proj", 4 * config.inner_size).chunk(4, dim=-1)
        # [H, T, head_dim]
        q, k, v = (
            part.unflatten(-1, (config.num_attention_heads, -1)).transpose(0, 1)
            for part in (q, k, v)
        )
        q, k = self.cast(act(q)), self.cast(act(k))
        if config.has_position(layer):
            theta = self.rows(f"{at}.lrpe.theta")  # [H, 1, head_dim]
            angle = (theta.double() * time[:, None]).float()
            q, k = (
                self.cast(torch.cat([part * angle.cos(), part * angle.sin()], dim=-1))
                for part in (q, k)
            )
        distance = time[:, None] - time
        log_decay = torch.tensor(config.log_decay(layer))[:, None, None]
        decay = torch.exp(log_decay * distance.clamp(min=0))
        y = (q @ k.transpose(-1, -2) * decay * (distance >= 0)) @ v
        return self.cast(u * self.norm(self.cast(y.transpose(0, 1).flatten(-2)), f"{at}.norm"))
