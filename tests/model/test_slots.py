"""Slots: decoding in place is the forward pass, whatever joins and leaves, and a slot that is not
named is not touched."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from transnormer import LanguageModel, State
from transnormer.model.slots import Slots

from .test_language_model import small
from .test_stacks import drawn
from .test_stacks import small as stack

MODELS = {
    "published": {},
    "everywhere": {"position_layers": "all", "norm": "rmsnorm", "gate_rank": 3, "bias": True},
    "rope": {"position": "rope", "activation": "1+elu"},
    "learned": {"position": "ape", "max_position_embeddings": 64},
    "softmax": {"mixer": "softmax", "position": "rope", "activation": "none"},
    "convolved": {"convolution": "heads", "qk_norm": True, "head_norm": True},
    "gated decay": {"decay": "gated", "convolution": "heads"},
    "delta rule": {"decay": "delta"},
    "convolved input": {"convolution": "input", "mixer": "softmax", "position": "none"},
}


def models() -> list[LanguageModel]:
    uniform = [small(**changes) for changes in MODELS.values()]
    return uniform + [stack(**drawn(seed)) for seed in range(12)]


@pytest.mark.parametrize("number", range(len(MODELS) + 12))
@torch.inference_mode()
def test_texts_that_join_and_leave_are_each_as_if_alone(number: int) -> None:
    """Four slots for six texts. Each step reads of some of them up to three tokens; where one ends
    another begins in its slot, some of them from a state that a forward pass left."""
    model, draw = models()[number], random.Random(number)
    texts = [torch.randint(29, (1, draw.randrange(5, 40))) for _ in range(6)]
    whole = [model(text)[0][0] for text in texts]
    slots = Slots.new(model, 4, capacity=40)
    slots.poison_(range(4))
    waiting, running, at = list(range(6)), {}, dict.fromkeys(range(6), 0)
    while waiting or running:
        for slot in range(4):
            if slot not in running and waiting:
                running[slot] = text = waiting.pop()
                at[text] = draw.choice((0, 3))
                before = model(texts[text][:, : at[text]])[1] if at[text] else State.new(model)
                slots.write_(model, [slot], before)
        named = [*draw.sample(sorted(running), draw.randint(1, len(running))), -1]
        draw.shuffle(named)
        ids, lengths = torch.randint(29, (len(named), 3)), []
        for row, slot in enumerate(named):
            text = running.get(slot)
            left = 3 if text is None else min(draw.randint(0, 3), texts[text].shape[1] - at[text])
            if text is not None:
                ids[row, :left] = texts[text][0, at[text] : at[text] + left]
            lengths.append(left)
        logits = model.step_(ids, slots, torch.tensor(named), torch.tensor(lengths))
        for row, (slot, read) in enumerate(zip(named, lengths, strict=True)):
            if (text := running.get(slot)) is None:
                continue
            same(logits[row, :read], whole[text][at[text] : at[text] + read])
            at[text] += read
            assert slots.seen[slot] == at[text]
            if at[text] == texts[text].shape[1]:
                same_state(slots.read(model, [slot]), model(texts[text])[1])
                slots.poison_([slot])
                del running[slot]


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert not len(found) or (found - wanted).abs().max() <= 1e-9 * wanted.abs().max().clamp(min=1)


def same_state(found: State, wanted: State) -> None:
    assert found.seen.equal(wanted.seen)
    for layer, other in zip(found.layers, wanted.layers, strict=True):
        for part, want in zip(layer, other, strict=True):
            assert part.shape == want.shape
            same(part.flatten(), want.flatten())


@pytest.mark.parametrize("number", [0, 4, 5, 9])
@torch.inference_mode()
def test_all_slots_in_order_need_no_names(number: int) -> None:
    model = models()[number]
    ids = torch.randint(29, (3, 20))
    whole, end = model(ids)
    slots = Slots.new(model, 3, capacity=20)
    slots.write_(model, [2, 0, 1], model(ids[:, :4])[1].select([2, 0, 1]))
    steps = [
        model.step_(ids[:, start:stop], slots) for start, stop in itertools.pairwise([4, 5, 8, 20])
    ]
    same(torch.cat(steps, dim=1), whole[:, 4:])
    same_state(slots.read(model, range(3)), end)
    held = slots.nbytes
    model.step_(ids[:, :1], slots)
    assert slots.nbytes == held


@torch.inference_mode()
def test_what_a_slot_cannot_hold_is_nan_or_refused() -> None:
    model = stack(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2)
    ids = torch.randint(29, (2, 12))
    slots = Slots.new(model, 2, capacity=8)
    logits = model.step_(ids, slots, lengths=torch.tensor([8, 9]))
    assert logits[0, :8].isfinite().all()
    assert logits[1, :8].isfinite().all()
    assert logits[1, 8].isnan().all()
    same(logits[:, :8], model(ids)[0][:, :8])
    assert slots.read(model, [0]).seen.tolist() == [8]
    with pytest.raises(ValueError, match="a slot has read 9 tokens, but holds 8"):
        slots.read(model, [1])
    with pytest.raises(ValueError, match="a state of 12 tokens does not fit a slot of 8"):
        slots.write_(model, [0, 1], model(ids)[1])
    learned = small(position="ape", max_position_embeddings=5)
    logits = learned.step_(ids[:1, :6], Slots.new(learned, 1))
    assert logits[0, :5].isfinite().all()
    assert logits[0, 5].isnan().all()


@torch.inference_mode()
def test_what_does_not_fit_is_refused() -> None:
    model = small()
    slots, ids = Slots.new(model, 3), torch.zeros(2, 1, dtype=torch.int64)
    for call, message in (
        (lambda: model.step_(ids, slots), r"ids must be \[S, T\] integers.*\[2, 1\] for 3 slots"),
        (lambda: model.step_(ids, slots, torch.arange(3)), r"rows must be \[2\], one number a row"),
        (
            lambda: model.step_(ids, slots, torch.arange(2), torch.ones(1)),
            r"lengths must be \[2\]",
        ),
        (lambda: model.step_(ids, slots, torch.tensor([1, 1])), "different numbers below N = 3"),
        (lambda: slots.read(model, [0, 3]), r"different numbers below 3; got \[0, 3\]"),
        (lambda: slots.zero_([1, 1]), "slots must be different numbers below 3"),
        (
            lambda: slots.write_(model, [0], State.new(model, 2)),
            "of 3 layers and 2 rows does not fit 1 slots of 3 layers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    softmax = small(mixer="softmax", position="rope")
    with pytest.raises(ValueError, match="the state of a layer is"):
        slots.write_(model, [0], State.new(softmax))


@pytest.mark.parametrize("number", [0, 4, 5, 9])
@torch.inference_mode()
def test_states_are_stacked_row_by_row(number: int) -> None:
    model = models()[number]
    ids = torch.randint(29, (3, 20))
    states = [State.new(model), model(ids[1:2, :13])[1], model(ids[2:, :4])[1]]
    together = State.stack(states)
    assert together.seen.tolist() == [0, 13, 4]
    rows = torch.stack([ids[0, :7], ids[1, 13:], ids[2, 4:11]])
    found, _ = model(rows, together)
    for row, state in enumerate(states):
        wanted, _ = model(rows[row : row + 1], state)
        same(found[row], wanted[0])
