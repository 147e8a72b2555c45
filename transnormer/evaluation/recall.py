"""What a model finds again in what it has read: tasks with one right answer for each question.

Associative recall (MQAR, arXiv 2312.04927) and copying are made of random tokens, and a model is
trained on them. A needle is a sentence in a long text, and any language model can be asked for it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.tokenizer import encode
from ..model.language_model import LanguageModel
from .continuations import Request, score_requests

IGNORED = -100  # the target of a token after which nothing is asked
POWER = 0.01  # a query in the n-th place of two tokens after the pairs has weight n^(POWER - 1)
WORDS = ("apple", "bridge", "candle", "doctor", "engine", "forest", "garden", "harbour")


def associations(
    rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: (ids, targets), int64 [rows, length] each.

    A row begins with `pairs` different keys, each followed by its value. Later each key stands once
    more, most of them soon, among random tokens; its target is its value, every other target is
    IGNORED. Keys are tokens below vocab_size / 2, values those from there on. Raises ValueError
    where the pairs and as many queries do not fit the row, or the vocabulary."""
    places, half = (length - 2 * pairs) // 2, vocab_size // 2
    if not 0 < pairs <= min(places, half):
        raise ValueError(
            f"{pairs} pairs and as many queries do not fit rows of {length} tokens and a "
            f"vocabulary of {vocab_size}"
        )

    def distinct(weights: Tensor) -> Tensor:
        return torch.multinomial(weights.expand(rows, -1), pairs, generator=generator)

    device = generator.device
    keys = distinct(torch.ones(half, device=device))
    values = half + distinct(torch.ones(vocab_size - half, device=device))
    distances = torch.arange(1, places + 1, device=device, dtype=torch.float32)
    queries = 2 * pairs + 2 * distinct(distances ** (POWER - 1))
    ids = torch.randint(vocab_size, (rows, length), generator=generator, device=device)
    ids[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
    ids.scatter_(1, queries, keys)
    targets = torch.full_like(ids, IGNORED).scatter_(1, queries, values)
    return ids, targets


def copies(
    rows: int, length: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random tokens, token 0, and the same tokens again: (ids, targets), int64 [rows, length] each,
    the targets being those of the second half. length: odd, at least 3; else ValueError."""
    if length < 3 or length % 2 == 0:
        raise ValueError(f"a row to copy has an odd number of tokens, at least 3; got {length}")
    size = length // 2
    text = torch.randint(1, vocab_size, (rows, size), generator=generator, device=generator.device)
    ids = torch.cat([text, torch.zeros_like(text[:, :1]), text], dim=1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, size:-1] = text
    return ids, targets


@torch.inference_mode()
def accuracy(model: LanguageModel, ids: Tensor, targets: Tensor, rows: int = 64) -> float:
    """The share of targets that the model finds likeliest, each row read from a fresh state.

    ids, targets: int64 [N, T], targets that are IGNORED not counted. rows: read at a time."""
    right = asked = 0
    for part, wanted in zip(ids.split(rows), targets.split(rows), strict=True):
        x, _ = model.hidden(part)
        places = wanted != IGNORED
        found = F.linear(x[places], model.head_weight).argmax(-1)
        right += int((found == wanted[places]).sum())
        asked += int(places.sum())
    return right / asked


@dataclass(frozen=True)
class Needle:
    """How often the hidden number was found, at one length and depth.

    length: tokens of the prompt. depth: share of the text that stands before the needle. accuracy:
    the share of `trials` prompts after which the right number is the likeliest of `choices`."""

    length: int
    depth: float
    accuracy: float
    trials: int
    choices: int


def needles(
    model: LanguageModel,
    text: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    trials: int = 10,
    choices: int = 10,
    seed: int = 0,
) -> list[Needle]:
    """Hide a sentence that gives a thing a number in a long text, and ask for the number at its
    end.

    text: tokens of documents that the model has not been trained on, at least as many as the
    longest prompt. The answers to choose from are numbers of three digits. What a prompt's answers
    share is read once. Raises ValueError where the text is too short, or the model has no
    tokenizer."""
    draw, tokenizer = random.Random(seed), model.tokenizer
    if tokenizer is None:
        raise ValueError("the model's folder has no tokenizer, so it cannot read text")
    found = []
    for length, depth in itertools.product(lengths, depths):
        requests: list[Request] = []
        for _ in range(trials):
            thing = draw.choice(WORDS)
            numbers = draw.sample(range(100, 1_000), choices)
            question = encode(tokenizer, f"\nThe number of the {thing} is")
            needle = encode(tokenizer, f"\nThe number of the {thing} is {numbers[0]}.\n")
            size = length - len(needle) - len(question)
            if not 0 < size <= len(text):
                raise ValueError(
                    f"a prompt of {length} tokens needs {size} tokens of text; there are "
                    f"{len(text)}"
                )
            start = draw.randrange(len(text) - size + 1)
            hay, before = list(text[start : start + size]), round(depth * size)
            prompt = [*hay[:before], *needle, *hay[before:], *question]
            for number in numbers:
                tokens = np.array([*prompt, *encode(tokenizer, f" {number}")], dtype=np.int64)
                requests.append(Request(len(requests), tokens, len(prompt)))
        scores = score_requests(model, requests, batch_tokens=4_096)
        likeliest = np.array([score for score, _ in scores]).reshape(trials, choices).argmax(1)
        share = float((likeliest == 0).mean())
        found.append(Needle(length, depth, share, trials, choices))
    return found
